"""Metrics: a line a logged step in `metrics.jsonl`, and the same numbers to wandb or TensorBoard where asked."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from noisefit.errors import InputError, notice
from noisefit.files import append_json_line
from noisefit.hooks import EMBEDDING
from noisefit.memory import peak_memory
from noisefit.noise import RecordedNoise
from noisefit.objectives import LOSSES

LINES = ("metrics.jsonl", "eval_metrics.jsonl")  # the files, in the output folder


def check_tracker(args: Namespace) -> None:
    """Raise `InputError` where `--report_to` names a tracker that is not installed."""
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to}: not installed; pip install {args.report_to}")


def start_trackers(accelerator: Accelerator, args: Namespace) -> None:
    """Start what `--report_to` asks for. A tracker that fails costs a warning and not the run."""
    if args.report_to == "none":
        return
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
    name = args.run_name or Path(args.output_model).resolve().name
    try:
        accelerator.init_trackers("noisefit", config=plain, init_kwargs={"wandb": {"name": name}})
    except Exception as error:  # whatever a tracker's client raises: no network, no key, a full disk
        accelerator.trackers = []
        notice(f"--report_to {args.report_to} failed, training goes on without it: {' '.join(str(error).split())}")


def progress_bar(accelerator: Accelerator, total: int, what: str, unit: str, initial: int = 0) -> tqdm:
    """A bar on the main process; in a log file, which keeps every update, a rarely updated one."""
    interval = 0.1 if sys.stderr.isatty() else 20
    main = accelerator.is_main_process
    return tqdm(total=total, initial=initial, desc=what, unit=unit, mininterval=interval, disable=not main)


def check_bad_steps(args: Namespace, step: int, bad_steps: int) -> int:
    """Say that a step is skipped, as its loss or gradient is not finite.

    Args:
        args: the run's settings.
        step: its number.
        bad_steps: such steps in a row, this one included.

    Returns:
        `bad_steps`.

    Raises:
        InputError: they are as many as `--max_bad_steps`.
    """
    what = f"step {step}: the loss or its gradient is not a finite number"
    if bad_steps >= args.max_bad_steps:
        raise InputError(
            f"{what}, {bad_steps} steps in a row (--max_bad_steps); lower --learning_rate or --noise_std, use bf16 "
            "instead of fp16, or look at the rows of these steps. No weight was touched by them"
        )
    notice(f"{what}; the step is skipped ({bad_steps} in a row, the run ends at {args.max_bad_steps})")
    return bad_steps


class Metrics:
    """Sums of the losses since the last logged line, kept on the device until that line is due.

    Args:
        accelerator: of the run.
        args: the run's settings.
        weights: of the losses that the objective has.
        num_layers: of the model.
    """

    def __init__(self, accelerator: Accelerator, args: Namespace, weights: Mapping[str, float], num_layers: int):
        self.accelerator, self.weights, self.num_layers = accelerator, weights, num_layers
        self.path, self.eval_path = (Path(args.output_model) / name for name in LINES)
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(LOSSES), device=self.accelerator.device)
        # Of each layer, with the embedding last, where its index -1 points: noise to signal, and steps with noise.
        self._ratios = torch.zeros(self.num_layers + 1, device=self.accelerator.device)
        self._noisy_steps = [0] * (self.num_layers + 1)
        self._steps = self._skipped = self._targets = self._tokens = 0
        self._since = time.perf_counter()

    def add_step(
        self, sums: Tensor, noise: Mapping[int, RecordedNoise], target_tokens: int, tokens: int, skipped: bool
    ) -> None:
        """Add an optimizer step.

        Args:
            sums: `[len(LOSSES)]`, this process's sums of the losses.
            noise: the noisy layers' noise, whose record of `noise_to_signal` is taken from it.
            target_tokens, tokens: the step's supervised and real tokens, over all processes.
            skipped: its numbers were not finite and its gradient was not used; it is counted, and nothing else.
        """
        ratios = {layer: of_layer.pop_noise_to_signal() for layer, of_layer in noise.items()}
        self._tokens += tokens
        if skipped:
            self._skipped += 1
            return
        self._sums += sums
        for layer, ratio in ratios.items():
            self._ratios[layer] += ratio
            self._noisy_steps[layer] += 1
        self._steps += 1
        self._targets += target_tokens

    def log(self, step: int, epoch: float, learning_rate: float, grad_norm: Tensor) -> dict[str, Any]:
        """Write the line of a step. All processes call it.

        Args:
            step, epoch: how far the training is, in optimizer steps and passes over the data.
            learning_rate, grad_norm: of this step; the norm before clipping.

        Returns:
            The line. Losses are means over the supervised tokens since the last line, but for skipped steps;
            `target_tokens` counts these; `tokens_per_second` counts real tokens, prompts included, over all processes.
            What is not a finite number, a mean over nothing, or a loss that the objective does not have, is `None`.
        """
        sums = dict(zip(LOSSES, self.accelerator.reduce(self._sums, "sum").tolist(), strict=True))
        ratios = self.accelerator.reduce(self._ratios, "mean").tolist()
        memory = self.accelerator.gather(torch.tensor([peak_memory(self.accelerator.device)], device=self._sums.device))
        means = {name: sums[name] / self._targets for name in self.weights} if self._targets else {}
        by_layer = {
            "embedding" if layer == EMBEDDING else str(layer): _finite(ratios[layer] / self._noisy_steps[layer])
            for layer in (*range(self.num_layers), EMBEDDING)
            if self._noisy_steps[layer]
        }
        known = [ratio for ratio in by_layer.values() if ratio is not None]
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": sum(self.weights[name] * mean for name, mean in means.items()) if means else None,
            **{f"{name}_loss": means.get(name) for name in LOSSES},
            "learning_rate": learning_rate,
            "grad_norm": _finite(float(grad_norm)),
            "target_tokens": self._targets,
            "tokens_per_second": round(self._tokens / max(time.perf_counter() - self._since, 1e-9), 1),
            "noise_to_signal": statistics.fmean(known) if known else 0.0 if self._steps and not by_layer else None,
            "layer_noise_to_signal": by_layer,
            "peak_memory_gib": _finite(round(memory.max().item(), 3)),
            "skipped_steps": self._skipped,
        }
        self._reset()
        if self.accelerator.is_main_process:
            append_json_line(self.path, line)
        flat = line | {f"noise_to_signal/{layer}": ratio for layer, ratio in by_layer.items()}
        self._track({name: value for name, value in flat.items() if value not in (None, by_layer)})
        return line

    def own_sums(self) -> dict[str, Tensor]:
        """This process's part of the line that is not yet due, for a checkpoint."""
        return {"losses": self._sums, "noise_to_signal": self._ratios}

    def counts(self) -> dict[str, Any]:
        """The part that all processes share."""
        return {
            "steps": self._steps,
            "noisy_steps": self._noisy_steps,
            "skipped": self._skipped,
            "targets": self._targets,
            "tokens": self._tokens,
            "seconds": time.perf_counter() - self._since,
        }

    def restore(self, own_sums: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        """Undo of `own_sums` and `counts`."""
        self._sums = own_sums["losses"].to(self._sums)
        self._ratios = own_sums["noise_to_signal"].to(self._ratios)
        self._steps, self._skipped, self._noisy_steps = counts["steps"], counts["skipped"], counts["noisy_steps"]
        self._targets, self._tokens = counts["targets"], counts["tokens"]
        self._since = time.perf_counter() - counts["seconds"]

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What takes place within is no training: its time does not count in `tokens_per_second`."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def log_evaluation(self, step: int, epoch: float, ce_loss: float, target_tokens: int) -> None:
        """Write a line to `eval_metrics.jsonl`. All processes call it."""
        ce = _finite(ce_loss)
        line = {"step": step, "epoch": round(epoch, 4), "eval_ce_loss": ce, "eval_target_tokens": target_tokens}
        if self.accelerator.is_main_process:
            append_json_line(self.eval_path, line)
        self._track(line)

    def _track(self, line: dict[str, Any]) -> None:
        try:
            self.accelerator.log(line, step=line["step"])
        except Exception as error:  # as in start_trackers
            self.accelerator.trackers = []
            reason = " ".join(str(error).split())
            notice(f"the tracker failed at step {line['step']}, training goes on without it: {reason}")


def _finite(value: float) -> float | None:
    """`None` for what JSON has no number for."""
    return value if math.isfinite(value) else None
