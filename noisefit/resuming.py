"""Which checkpoint a run goes on from, and whether it can. Nothing here loads a tensor or writes a file."""

from __future__ import annotations

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from noisefit.branches import STRATEGIES
from noisefit.errors import InputError, notice
from noisefit.identity import NOTED, differences
from noisefit.policy import NoisePolicy, check_values
from noisefit.prompts import asks_for_date

STATE, OPTIMIZER, PROCESSES = "checkpoint.json", "optimizer.safetensors", "processes.safetensors"


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
    problems = [problem for _, problem in views if problem is not None]
    if problems:
        raise InputError(problems[0])
    if len(set(views)) > 1:
        raise InputError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: the processes see different checkpoints "
            f"({', '.join(sorted({found for found, _ in views}))}); all nodes must share the disk they are on"
        )
    return folder


def _find(args: Namespace, run: Mapping[str, Any], total_steps: int) -> Path | None:
    wanted, output = args.resume_from_checkpoint, Path(args.output_model)
    flag = f"--resume_from_checkpoint {wanted}"
    if wanted is None:
        return None
    if wanted in ("latest", "auto"):
        folder = _latest(output)
        if folder is None and list_checkpoints(output) and not (wanted == "auto" and args.overwrite_output):
            raise InputError(f"{flag}: no checkpoint in {output} is whole; remove them, or give another --output_model")
        if folder is None and wanted == "auto":
            return None
        if folder is None:
            raise InputError(f"{flag}: no checkpoint in {output}; auto starts afresh where there is none")
    else:
        folder = Path(wanted)
        problem = _problem(folder)
        if problem is not None:
            raise InputError(f"{flag}: {problem}")
    state = read_state(folder)
    if state["loop"]["step"] > total_steps:
        raise InputError(
            f"{folder} stands after step {state['loop']['step']}, but --max_steps or --epochs end the run at step "
            f"{total_steps}; raise them, or give an earlier checkpoint"
        )
    different = differences(state["run"], run)
    if different:
        raise InputError(
            f"{folder} is of a run with other settings: {'; '.join(different)}. Resume it with its own, or start "
            "afresh in another --output_model"
        )
    for name in NOTED:
        if state["run"].get(name) != run.get(name):
            notice(f"the {name} are not those that {folder.name} was saved with")
    return folder


def prompt_date(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Date and time for a chat template that asks: of the run that is resumed, else now; `None` where it does not ask.

    All processes call it, and get the same.
    """
    if not asks_for_date(tokenizer, args.chat_template):
        return None
    date, wanted = None, args.resume_from_checkpoint
    if wanted is not None:
        folder = _latest(Path(args.output_model), quiet=True) if wanted in ("latest", "auto") else Path(wanted)
        # What is wrong with it is told by `find_checkpoint`.
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            date = datetime.fromisoformat(read_state(folder)["run"]["prompt_date"]) if folder else None
    [found] = broadcast_object_list([(date or datetime.now()).isoformat(timespec="seconds")])
    return str(found)


def _latest(output: Path, quiet: bool = False) -> Path | None:
    """The checkpoint of `output` that was saved last and is whole; a line for each one passed over, if not `quiet`."""
    for folder in reversed(list_checkpoints(output)):
        problem = _problem(folder)
        if problem is None:
            return folder
        if not quiet:
            notice(f"{folder} is passed over: {problem}")
    return None


def last_whole(output: Path) -> str | None:
    """The name of the checkpoint that `--resume_from_checkpoint latest` would go on from."""
    folder = _latest(output, quiet=True)
    return None if folder is None else folder.name


def list_checkpoints(output: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of `output` in the order in which they were saved.

    That need not be the order of the steps: a run can go on from an earlier one.
    """

    folders = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,12}", path.name)]
    return sorted((folder for folder in folders if folder.is_dir()), key=saved_at)


def saved_at(folder: Path) -> int:
    """When a checkpoint was saved, in nanoseconds; of a damaged one when it was damaged, lest an older one be taken
    without a word."""
    try:
        when = read_state(folder)["saved_at"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        when = None
    return when if type(when) is int and abs(when) < 2**63 else folder.stat().st_mtime_ns


def read_state(folder: Path) -> dict[str, Any]:
    """What is not tensors in a checkpoint."""
    path = folder / STATE
    if not path.is_file():  # a pipe would keep us waiting
        raise FileNotFoundError(f"{path}: no such file")
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def fingerprint(path: Path) -> list[int | str]:
    """A file's size, and the SHA-256 of its content or, of a safetensors file, of what says which tensors it holds.

    Raises:
        SafetensorError: the file's name says that it is one, and it is not.
    """
    content = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
            content.update(file.read(8 + int.from_bytes(file.read(8), "little")))
        else:
            content.update(file.read())
    return [path.stat().st_size, content.hexdigest()]


def _problem(folder: Path) -> str | None:
    """Why this is no checkpoint to go on from, in a few words; `None` where it is one."""
    name = STATE
    try:
        if not folder.is_dir():
            return "no such folder"
        if not (folder / STATE).is_file():
            inside = list_checkpoints(folder)
            hint = f"; it holds {inside[-1].name}" if inside else ""
            return f"no {STATE} in it, so it is no checkpoint, or not whole{hint}"
        state = read_state(folder)
        _check_state(state)
        for name, recorded in state["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            found = fingerprint(folder / name)  # a pickle is found out here, whatever its size
            if found != recorded:
                changed = f"has {size} bytes instead of {recorded[0]}" if size != recorded[0] else "was changed"
                return f"{name} {changed}"
    except SafetensorError:
        return f"{name} is not a safetensors file; nothing else is loaded"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        return f"{name} is not readable as one of a checkpoint ({type(error).__name__}: {reason})"
    return None


def _check_state(state: Mapping[str, Any]) -> None:
    """Raise `ValueError`, `KeyError` or `TypeError` where a value is not of the kind that a checkpoint has there."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    def is_count(value: Any, most: float = 2**53) -> bool:
        return type(value) is int and 0 <= value <= most

    loop, metrics, files = state["loop"], state["metrics"], state["files"]
    require(isinstance(state["run"], dict), "run")
    require(is_count(loop["step"]) and loop["step"] > 0 and is_count(loop["total_steps"]), "step, total_steps")
    require(is_count(loop["seen_targets"]) and is_count(loop["bad_steps"], loop["step"]), "seen_targets, bad_steps")
    require(is_count(state["schedule"]["last_epoch"], loop["step"]), "last_epoch")
    require(all(is_count(metrics[name]) for name in ("steps", "skipped", "targets", "tokens")), "metrics")
    require(type(metrics["seconds"]) in (int, float) and 0 <= metrics["seconds"] <= 2**53, "seconds")
    noisy_steps = metrics["noisy_steps"]
    require(isinstance(noisy_steps, list) and all(is_count(steps) for steps in noisy_steps), "noisy_steps")
    check_values(NoisePolicy(**loop["policy"]), len(noisy_steps) - 1)
    require(loop["strategy"] in STRATEGIES, "strategy")
    require(state["scaler"] is None or isinstance(state["scaler"], dict), "scaler")
    require(all(name == Path(name).name for name in files), "files")
    weights = any(name.startswith(("adapter_model.", "model")) for name in files)
    require({OPTIMIZER, PROCESSES} <= set(files) and weights, "files")
