"""Checkpoints: the whole state of a run in a folder, from which it goes on as if it had never stopped.

`OUTPUT/checkpoint-STEP` is a model's folder, as the final one is, with more files: the optimizer's tensors, the
processes' own state (random generators, sums of the metrics), the weights of a teacher that has its own, and the
metrics so far; and `checkpoint.json`, with what is not tensors. Nothing is pickled. A checkpoint is written elsewhere
and gets its name once it is whole.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

import noisefit
from noisefit.base.errors import InputError, LocalError, is_out_of_memory, notice
from noisefit.base.files import sync_folder, writing
from noisefit.base.meeting import apart
from noisefit.base.random_state import random_state, restore_random_state
from noisefit.fork.decoder import find_decoder_layers
from noisefit.method.teacher import Teacher
from noisefit.run.checkpoint_files import (
    OPTIMIZER,
    PROCESSES,
    SCORES,
    STATE,
    TEACHER,
    digest_of,
    latest_whole,
    list_checkpoints,
    read_state,
    saved_at,
)
from noisefit.run.metrics import LINES, Metrics
from noisefit.run.output_folder import OutputFolder
from noisefit.run.standing import BEST, copy_best
from noisefit.run.weights import (
    check_optimizer,
    gather_optimizer,
    gather_weights,
    restore_optimizer,
    write_model,
    write_tensors,
)


class Checkpoints:
    """Saves the state of a run to its output folder, and gives it back. All processes call its methods.

    Args:
        output: the run's folder.
        limit: the value of `--save_total_limit`.
        adapter_only: whether an adapter is trained, and not the whole model.
        run: what `identify_run` says of it.
        accelerator, model, optimizer, schedule, metrics: of the run; model and optimizer as prepared.
        tokenizer: with its chat template.
        teacher: of the soft term.
    """

    def __init__(
        self, output: OutputFolder, limit: int, adapter_only: bool, run: Mapping[str, Any], accelerator: Accelerator,
        model: nn.Module, optimizer: Any, schedule: LambdaLR, metrics: Metrics, tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher,
    ):  # fmt: skip
        self.output, self.limit, self.adapter_only = output, limit, adapter_only
        self.run, self.accelerator = dict(run), accelerator
        self.model, self.optimizer, self.schedule = model, optimizer.optimizer, schedule
        self.metrics, self.tokenizer, self.teacher = metrics, tokenizer, teacher

    def save(self, step: int, **variables: Any) -> Path:
        """Write `checkpoint-STEP`, then remove the oldest ones beyond `--save_total_limit`.

        Args:
            step: optimizer steps taken.
            variables: the loop's own, JSON values, for `load` to return.

        Raises:
            LocalError: it cannot be written. What was there before is there still.
        """
        weights = gather_weights(self.accelerator, self.model, adapter_only=self.adapter_only)
        tensors = {OPTIMIZER: gather_optimizer(self.model, self.optimizer), TEACHER: self.teacher.state_dict()}
        metrics = self.metrics.state_dict()
        own = {f"random.{name}": tensor for name, tensor in random_state(self.accelerator.device).items()}
        own |= {f"metrics.{name}": value.cpu() for name, value in metrics.items() if isinstance(value, Tensor)}
        everyones = gather_object([own])
        folder = self.output.path / f"checkpoint-{step}"
        with apart(f"writing {folder}") as is_main:
            if is_main:
                self._save(folder, step, variables, weights, tensors, everyones, metrics)
        return folder

    def _save(
        self, folder: Path, step: int, variables: Mapping[str, Any], weights: dict[str, Tensor],
        tensors: dict[str, dict[str, Tensor]], everyones: list[dict[str, Tensor]], metrics: Mapping[str, Any],
    ) -> None:  # fmt: skip
        tensors[PROCESSES] = {f"{rank}.{name}": value for rank, theirs in enumerate(everyones)
                              for name, value in theirs.items()}  # fmt: skip
        tensors = {name: content for name, content in tensors.items() if content or name != TEACHER}
        scaler = self.accelerator.scaler
        state = {
            "noisefit_version": noisefit.__version__,
            # After all others, also where a clock goes wrong.
            "saved_at": max([time.time_ns(), *(saved_at(other) + 1 for other in list_checkpoints(self.output.path))]),
            "run": self.run,
            "loop": {"step": step, **variables},
            "metrics": {name: value for name, value in metrics.items() if not isinstance(value, Tensor)},
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        before = latest_whole(self.output.path)
        advice = (
            f"; {before and before.name} is whole: free some space, and --resume_from_checkpoint latest goes on from it"
        )
        with writing(folder, advice if before else "; free some space"):
            self._write(folder, weights, tensors, state)
        self._prune(keep=folder)

    def _write(
        self, folder: Path, weights: dict[str, Tensor], tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]
    ) -> None:
        with self.output.staging(folder.name) as staged:
            write_model(staged, self.accelerator.unwrap_model(self.model).model, weights, self.tokenizer)
            for name, content in tensors.items():
                write_tensors(staged / name, content)
            for name in (*LINES, SCORES):
                if (self.output.path / name).exists():
                    shutil.copyfile(self.output.path / name, staged / name)
            if self.run.get("keep_best") and state["loop"]["standing"]["best"] is not None:
                copy_best(self.output, staged / BEST)
            files = sorted(path for path in staged.rglob("*") if path.is_file())
            state["files"] = {path.relative_to(staged).as_posix(): digest_of(path) for path in files}
            (staged / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            sync_folder(staged)
            self.output.place_folder(staged, folder.name)

    def _prune(self, keep: Path) -> None:
        """Remove the oldest checkpoints beyond the limit. Those that no run wrote here are not counted."""
        try:
            for folder in self.output.checkpoints()[: -self.limit] if self.limit else ():
                if folder != keep:
                    self.output.remove_folder(folder)
        except (OSError, LocalError) as error:  # the new one is whole, so the run goes on
            notice(f"an older checkpoint could not be removed: {error}")

    def load(self, folder: Path) -> dict[str, Any]:
        """Give everything but the model's weights, which `load_model` read, the state that it had.

        Returns:
            The loop's variables, `step` among them.

        Raises:
            InputError: the checkpoint's files do not fit this run or each other.
        """
        with apart(f"reading {folder}") as is_main, _fitting(folder):
            state = read_state(folder)
            if len(state["metrics"]["noisy_steps"]) != len(find_decoder_layers(self.model)) + 1:
                raise ValueError("it is of a model with another number of layers")
            # The main process alone reads what may be larger than the model, and the others are sent it.
            moments = load_file(folder / OPTIMIZER) if is_main else {}
            check_optimizer(self.model, moments)
            teacher = load_file(folder / TEACHER) if TEACHER in state["files"] else {}
            own = _under(f"{self.accelerator.process_index}.", load_file(folder / PROCESSES))
        restore_optimizer(self.accelerator, self.model, self.optimizer, moments)
        with _fitting(folder):
            if state["schedule"]["last_epoch"]:
                # The schedule may end later now: the learning rate is computed anew, by the step that it stands at.
                self.schedule.last_epoch = state["schedule"]["last_epoch"] - 1
                self.schedule.step()
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.teacher.load_state_dict(teacher)
            self.metrics.load_state_dict(_under("metrics.", own) | state["metrics"])
            restore_random_state(_under("random.", own), self.accelerator.device)
            variables: dict[str, Any] = state["loop"]
        return variables


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn what is wrong with a checkpoint's files into an `InputError`."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{folder}: its files do not fit this run ({reason}); resume from another one") from None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
