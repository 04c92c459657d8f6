"""Metrics: a line a logged step in `metrics.jsonl`, and the same numbers to the trackers where asked; likewise
evaluations, and the answers to sampled prompts."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from noisefit.base.errors import notice
from noisefit.base.files import append_json_line, append_whole
from noisefit.fork.hooks import EMBEDDING
from noisefit.fork.tally import TokenTally
from noisefit.method.losses import add_losses
from noisefit.method.objectives import LOSSES
from noisefit.run.memory import peak_memory
from noisefit.run.runaway import describe_runaway
from noisefit.run.settings import Settings

LINES = ("metrics.jsonl", "eval_metrics.jsonl", "samples.jsonl")  # the files, in the output folder


class Metrics:
    """Sums of the losses since the last logged line, kept on the device until that line is due.

    Args:
        accelerator: of the run.
        output: the run's output folder.
        num_layers: of the model.
        settings: of the run.
    """

    def __init__(self, accelerator: Accelerator, output: Path, num_layers: int, settings: Settings):
        self.accelerator, self.num_layers, self.settings = accelerator, num_layers, settings
        self.path, self.eval_path, self.samples_path = (output / name for name in LINES)
        # Of each layer, as below, the noise to signal of its first step with noise, NaN before; and whether a growth of
        # one was told.
        self._start = torch.full((num_layers + 1,), math.nan, device=accelerator.device)
        self._told = 0
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), device=self.accelerator.device)
        self._losses: dict[str, Tensor] = {}
        # Of each layer, with the embedding last, where its index -1 points: noise to signal and size of the hidden
        # states, summed over the steps with noise, and how many these were.
        self._sizes = torch.zeros(self.num_layers + 1, 2, device=self.accelerator.device)
        self._noisy_steps = [0] * (self.num_layers + 1)
        self._steps = self._skipped = self._targets = self._tokens = 0
        self._predicted: tuple[Tensor, int] | None = None  # of the line's own step; it is not kept in checkpoints
        self._since = time.perf_counter()

    def add_step(
        self, loss: Tensor, losses: Mapping[str, Tensor], noise_sizes: Mapping[int, Tensor], target_tokens: int,
        tokens: int, skipped: bool, tally: TokenTally | None = None,
    ) -> None:  # fmt: skip
        """Add an optimizer step.

        Args:
            loss: this process's share of the loss that was optimized, a mean over the step's supervised tokens.
            losses: this process's sums over tokens of the losses that it is made of, by name.
            noise_sizes: of the noisy layers `[2]`: noise to signal, and the hidden states' root mean square.
            target_tokens, tokens: the step's supervised and real tokens, over all processes.
            skipped: its numbers were not finite and its gradient was not used; it is counted, and nothing else.
            tally: how well its supervised tokens are predicted, this process's share; where its line is due.
        """
        self._tokens += tokens
        if skipped:
            self._skipped += 1
            return
        self._loss += loss * target_tokens
        add_losses(self._losses, losses)
        for layer, sizes in noise_sizes.items():
            self._start[layer] = torch.where(self._start[layer].isnan(), sizes[0], self._start[layer])
            self._sizes[layer] += sizes
            self._noisy_steps[layer] += 1
        self._steps += 1
        self._targets += target_tokens
        self._predicted = None if tally is None else (tally.sums, target_tokens)

    def log(self, step: int, epoch: float, learning_rate: float, grad_norm: Tensor) -> dict[str, Any]:
        """Write the line of a step. All processes call it.

        Args:
            step, epoch: how far the training is, in optimizer steps and passes over the data.
            learning_rate, grad_norm: of this step; the norm before clipping.

        Returns:
            The line. `loss` is the one that was optimized. It and the losses that it is made of are means over the
            supervised tokens since the last line, but for skipped steps. `token_accuracy` and `entropy` are those of
            this step, as they take a pass over the logits. `target_tokens` counts the tokens since the last line;
            `tokens_per_second` counts real ones, prompts included, over all processes. `None` stands for what is not
            finite, for losses that the objective does not have, for all losses where every step was skipped, and for
            what was not counted.
        """
        names = sorted(self._losses)
        predicted, counted = self._predicted or (torch.full_like(self._sizes[0], math.nan), 1)
        sums = torch.stack([self._loss, *(self._losses[name] for name in names), *predicted])
        loss, *losses, hits, entropy = self.accelerator.reduce(sums, "sum").tolist()
        means = {name: value / self._targets for name, value in zip(names, losses, strict=True)}
        sizes = self.accelerator.reduce(self._sizes, "mean").tolist()
        memory = self.accelerator.gather(torch.tensor([peak_memory(self.accelerator.device)], device=self._loss.device))
        noisy = [layer for layer in (*range(self.num_layers), EMBEDDING) if self._noisy_steps[layer]]
        ratios, rms = ([_finite(sizes[layer][i] / self._noisy_steps[layer]) for layer in noisy] for i in range(2))
        names_of_layers = ["embedding" if layer == EMBEDDING else str(layer) for layer in noisy]
        by_layer = dict(zip(names_of_layers, ratios, strict=True))
        known = [ratio for ratio in by_layer.values() if ratio is not None]
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss / self._targets if self._targets else None,
            **{f"{name}_loss": means.get(name) for name in dict.fromkeys((*LOSSES, *names))},
            "token_accuracy": _finite(hits / counted),
            "entropy": _finite(entropy / counted),
            "learning_rate": learning_rate,
            "grad_norm": _finite(float(grad_norm)),
            "target_tokens": self._targets,
            "tokens_per_second": round(self._tokens / max(time.perf_counter() - self._since, 1e-9), 1),
            "noise_to_signal": statistics.fmean(known) if known else 0.0 if self._steps and not by_layer else None,
            "layer_noise_to_signal": by_layer,
            "hidden_rms": rms,
            "peak_memory_gib": _finite(round(memory.max().item(), 3)),
            "skipped_steps": self._skipped,
        }
        self._reset()
        start = self.accelerator.reduce(self._start, "mean").tolist()
        first = {name: start[layer] for name, layer in zip(names_of_layers, noisy, strict=True)}
        if not self._told and (runaway := describe_runaway(self.settings, step, by_layer, first)):
            notice(runaway)
            self._told = 1
        if self.accelerator.is_main_process:
            append_json_line(self.path, line)
        flat = line | {f"noise_to_signal/{layer}": ratio for layer, ratio in by_layer.items()}
        flat |= {f"hidden_rms/{layer}": value for layer, value in zip(names_of_layers, rms, strict=True)}
        self._track({name: value for name, value in flat.items() if isinstance(value, (int, float))})
        return line

    def state_dict(self) -> dict[str, Any]:
        """The line that is not yet due: this process's part as tensors, and what all share as numbers."""
        own = {f"losses.{name}": value for name, value in self._losses.items()}
        return own | {
            "loss": self._loss,
            "noise_sizes": self._sizes,
            "noise_start": self._start,
            "told": self._told,
            "steps": self._steps,
            "noisy_steps": self._noisy_steps,
            "skipped": self._skipped,
            "targets": self._targets,
            "tokens": self._tokens,
            "seconds": time.perf_counter() - self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo of `state_dict`."""
        own = {name: value.to(self._loss) for name, value in state.items() if isinstance(value, Tensor)}
        self._loss, self._sizes, self._start = own.pop("loss"), own.pop("noise_sizes"), own.pop("noise_start")
        self._told = state["told"]
        self._losses = {name.removeprefix("losses."): value for name, value in own.items()}
        self._steps, self._skipped, self._noisy_steps = state["steps"], state["skipped"], state["noisy_steps"]
        self._targets, self._tokens = state["targets"], state["tokens"]
        self._since = time.perf_counter() - state["seconds"]

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What takes place within is no training: its time does not count in `tokens_per_second`."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def log_evaluation(self, step: int, epoch: float, figures: Mapping[str, float]) -> None:
        """Write a line to `eval_metrics.jsonl`. All processes call it."""
        line = {"step": step, "epoch": round(epoch, 4)} | {name: _finite(value) for name, value in figures.items()}
        if self.accelerator.is_main_process:
            append_json_line(self.eval_path, line)
        self._track({name: value for name, value in line.items() if value is not None})

    def log_samples(
        self, step: int, epoch: float, samples: Sequence[Mapping[str, Any]], figures: Mapping[str, float]
    ) -> None:
        """Write a line for each sampled prompt to `samples.jsonl`, all or none. All processes call it.

        Args:
            step, epoch: as for `log`.
            samples: what the line is to say of each; none of them is a tensor.
            figures: of all of them, for trackers, which get the texts, too, where they show any.
        """
        lines = [{"step": step, "epoch": round(epoch, 4)} | dict(sample) for sample in samples]
        if self.accelerator.is_main_process and lines:
            append_whole(self.samples_path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        known = {f"samples/{name}": value for name, value in figures.items() if math.isfinite(value)}
        self._track({"step": step} | known)
        for tracker in self.accelerator.trackers if lines else ():
            tracker.log_samples(lines, step)

    def _track(self, line: dict[str, Any]) -> None:
        self.accelerator.log(line, step=line["step"])


def _finite(value: float) -> float | None:
    """`None` for what JSON has no number for."""
    return value if math.isfinite(value) else None
