"""Checkpoints: the whole state of a run in a folder, from which it goes on as if it had never stopped.

`OUTPUT/checkpoint-STEP` is a model's folder, as the final one is, with four more files: the optimizer's tensors, the
processes' own state (random generators, sums of the metrics) and the metrics so far; and `checkpoint.json`, with what
is not tensors. Nothing is pickled. A checkpoint is written under another name and renamed once it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

import noisefit
from noisefit.errors import InputError, notice
from noisefit.files import sync_folder, writing
from noisefit.identity import differences
from noisefit.random_state import random_state, restore_random_state
from noisefit.tracking import LINES, Metrics
from noisefit.weights import gather_optimizer, gather_weights, restore_optimizer, write_model

STATE, OPTIMIZER, PROCESSES = "checkpoint.json", "optimizer.safetensors", "processes.safetensors"
UNFINISHED = ".tmp"  # behind a checkpoint's name while it is written or removed


def find_checkpoint(args: Namespace, run: Mapping[str, Any], total_steps: int) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` asks for, looked through; `None` where the run starts afresh.

    All processes call it, and must see the same.

    Args:
        args: the run's settings.
        run: what `identify_run` says of it.
        total_steps: of the run as it is now.

    Raises:
        InputError: there is none, it is not whole, it is of a run with other numbers, or past this one's end.
    """
    folder, problem = None, None
    try:
        folder = _find(args, json.loads(json.dumps(run)), total_steps)
    except InputError as error:
        problem = str(error)
    views = gather_object([(str(folder), problem)])
    if problem is not None:
        raise InputError(problem)
    if len(set(views)) > 1:
        raise InputError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: the processes see different checkpoints "
            f"({', '.join(sorted({found for found, _ in views}))}); all nodes must share the disk they are on"
        )
    return folder


def _find(args: Namespace, run: Mapping[str, Any], total_steps: int) -> Path | None:
    wanted = args.resume_from_checkpoint
    flag = f"--resume_from_checkpoint {wanted}"
    if wanted is None:
        return None
    if wanted in ("latest", "auto"):
        folder = _latest(Path(args.output_model))
        if folder is None and wanted == "auto":
            return None
        if folder is None:
            raise InputError(f"{flag}: no checkpoint in {args.output_model}; auto starts afresh where there is none")
    else:
        folder = Path(wanted).expanduser()
        problem = _problem(folder)
        if problem is not None:
            raise InputError(f"{flag}: {problem}")
    state = read_state(folder)
    if state["loop"]["step"] > total_steps:
        raise InputError(f"{folder} stands after step {state['loop']['step']}, but --max_steps or --epochs end the run "
                         f"at step {total_steps}; raise them, or give an earlier checkpoint")  # fmt: skip
    different = differences(state["run"], run)
    if different:
        raise InputError(
            f"{folder} is of a run with other settings: {'; '.join(different)}. Resume it with its own, or start "
            "afresh in another --output_model"
        )
    return folder


def _latest(output: Path) -> Path | None:
    """The checkpoint of `output` that was saved last and is whole; a line for each one passed over."""
    for folder in reversed(list_checkpoints(output)):
        problem = _problem(folder)
        if problem is None:
            return folder
        notice(f"{folder} is passed over: {problem}")
    return None


def list_checkpoints(output: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of `output` in the order in which they were saved.

    That need not be the order of the steps: a run can go on from an earlier one.
    """

    def saved_at(folder: Path) -> tuple[int, int]:
        try:
            when = int(json.loads((folder / STATE).read_bytes())["saved_at"])
        except (OSError, ValueError, KeyError, TypeError):
            when = folder.stat().st_mtime_ns
        return when, int(folder.name.rpartition("-")[2])

    folders = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=saved_at)


def read_state(folder: Path) -> dict[str, Any]:
    """What is not tensors in a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _problem(folder: Path) -> str | None:
    """Why this is no checkpoint to go on from, in a few words; `None` where it is one. Reads no whole tensor."""
    if not folder.is_dir():
        return "no such folder"
    try:
        state = read_state(folder)
        files, _, _ = state["files"], state["run"].keys(), int(state["loop"]["step"])
        for name, size in files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if path.suffix == ".safetensors" and found is not None:
                with safe_open(path, framework="pt") as file:
                    file.keys()
            if found != size:
                return f"{name} has {found} bytes instead of {size}" if found is not None else f"{name} is missing"
        missing = {OPTIMIZER, PROCESSES} - set(files)
    except SafetensorError:
        return f"{path.name} is not a safetensors file; nothing else is loaded"
    except FileNotFoundError:
        inside = list_checkpoints(folder)
        hint = f"; it holds {inside[-1].name}" if inside else ""
        return f"no {STATE} in it, so it is no checkpoint, or not whole{hint}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} is not readable"
    return f"{STATE} names no {min(missing)}" if missing else None


class Checkpoints:
    """Saves the state of a run to its output folder, and gives it back. All processes call its methods.

    Args:
        args: the run's settings.
        run: what `identify_run` says of it.
        accelerator, model, optimizer, schedule, metrics: of the run; model and optimizer as prepared.
        tokenizer: with its chat template.
    """

    def __init__(
        self, args: Namespace, run: Mapping[str, Any], accelerator: Accelerator, model: nn.Module, optimizer: Any,
        schedule: LambdaLR, metrics: Metrics, tokenizer: PreTrainedTokenizerBase,
    ):  # fmt: skip
        self.args, self.run, self.accelerator = args, dict(run), accelerator
        self.model, self.optimizer, self.schedule = model, optimizer.optimizer, schedule
        self.metrics, self.tokenizer = metrics, tokenizer
        self.output = Path(args.output_model)

    def save(self, step: int, **variables: Any) -> Path:
        """Write `checkpoint-STEP`, then remove the oldest ones beyond `--save_total_limit`.

        Args:
            step: optimizer steps taken.
            variables: the loop's own, JSON values, for `load` to return.

        Raises:
            LocalError: it cannot be written. What was there before is there still.
        """
        weights = gather_weights(self.accelerator, self.model, adapter_only=not self.args.full_finetune)
        optimizer = gather_optimizer(self.model, self.optimizer)
        own = {f"random.{name}": tensor for name, tensor in random_state(self.accelerator.device).items()}
        own |= {f"metrics.{name}": tensor.cpu() for name, tensor in self.metrics.own_sums().items()}
        everyones = gather_object([own])
        folder = self.output / f"checkpoint-{step}"
        if not self.accelerator.is_main_process:
            return folder
        scaler = self.accelerator.scaler
        state = {
            "noisefit_version": noisefit.__version__,
            "saved_at": time.time_ns(),
            "run": self.run,
            "loop": {"step": step, **variables},
            "metrics": self.metrics.counts(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        before = list_checkpoints(self.output)
        left = f"; {before[-1].name} is whole: --resume_from_checkpoint latest goes on from it" if before else ""
        beside = folder.with_name(folder.name + UNFINISHED)
        shutil.rmtree(beside, ignore_errors=True)
        with writing(folder, left):
            try:
                write_model(beside, self.accelerator.unwrap_model(self.model).model, weights, self.tokenizer)
                save_file(optimizer, beside / OPTIMIZER)
                save_file(
                    {
                        f"{rank}.{name}": tensor
                        for rank, theirs in enumerate(everyones)
                        for name, tensor in theirs.items()
                    },
                    beside / PROCESSES,
                )
                for name in LINES:
                    if (self.output / name).exists():
                        shutil.copyfile(self.output / name, beside / name)
                state["files"] = {path.name: path.stat().st_size for path in beside.iterdir()}
                (beside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
                sync_folder(beside)
                if folder.exists():  # of a later end of the run, gone back from
                    remove_checkpoint(folder)
                os.replace(beside, folder)
                sync_folder(self.output)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
            self._prune(keep=folder)
        return folder

    def _prune(self, keep: Path) -> None:
        """Remove what a kill left half-written or half-removed, and the oldest checkpoints beyond the limit."""
        for leftover in self.output.glob(f"checkpoint-*{UNFINISHED}"):
            shutil.rmtree(leftover)
        limit = self.args.save_total_limit
        if limit:
            for folder in list_checkpoints(self.output)[:-limit]:
                if folder != keep:
                    remove_checkpoint(folder)

    def load(self, folder: Path) -> dict[str, Any]:
        """Give everything but the model's weights, which `load_model` read, the state that it had.

        Returns:
            The loop's variables, `step` among them.

        Raises:
            InputError: the checkpoint's files do not fit this run or each other.
        """
        try:
            state = read_state(folder)
            restore_optimizer(self.model, self.optimizer, load_file(folder / OPTIMIZER))
            # The schedule may end later now: the learning rate is computed anew, by the step that it stands at.
            self.schedule.last_epoch = state["schedule"]["last_epoch"] - 1
            self.schedule.step()
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            own = _under(f"{self.accelerator.process_index}.", load_file(folder / PROCESSES))
            self.metrics.restore(_under("metrics.", own), state["metrics"])
            restore_random_state(_under("random.", own), self.accelerator.device)
            variables: dict[str, Any] = state["loop"]
            return variables
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(f"{folder}: its files do not fit this run ({reason}); resume from another one") from None


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def remove_checkpoint(folder: Path) -> None:
    """Under another name first, so that a kill leaves no folder that looks like a checkpoint and is half of one."""
    removed = folder.with_name(f"{folder.name}.removed{UNFINISHED}")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)
