"""The files of checkpoints: which one a run goes on from, whether it is whole, and whether it is of the same run.

Nothing here loads a tensor or writes a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from noisefit.base.errors import InputError, in_a_line, notice
from noisefit.base.files import ends_of
from noisefit.base.schema import AMOUNT, ANY, COUNT, EACH, INTEGER, OBJECT, TEXT, Maybe, checked, require
from noisefit.fork.branches import STRATEGIES
from noisefit.inputs.examples import Examples, rows_digest
from noisefit.inputs.prompts import Example
from noisefit.run.method_settings import POLICIES
from noisefit.run.noise_policy import POLICY_SHAPE, policy_from, read_policy
from noisefit.run.settings import Settings
from noisefit.run.standing import STANDING_SHAPE

STATE, OPTIMIZER, PROCESSES = "checkpoint.json", "optimizer.safetensors", "processes.safetensors"
TEACHER = "teacher.safetensors"  # the weights of a teacher that has its own
SCORES = "knowledge.csv"  # what the base model knows of the rows, where the run goes by it
LOOP_SHAPE = {**dict.fromkeys(("step", "total_steps", "seen_targets", "bad_steps"), COUNT), "strategy": TEXT,
              "policy": POLICY_SHAPE, "standing": STANDING_SHAPE}  # fmt: skip
METRICS_SHAPE = {**dict.fromkeys(("steps", "skipped", "targets", "tokens"), COUNT), "seconds": AMOUNT,
                 "noisy_steps": [COUNT], "told": COUNT}  # fmt: skip
STATE_SHAPE = {"saved_at": INTEGER, "run": OBJECT, "loop": LOOP_SHAPE, "metrics": METRICS_SHAPE,
               "schedule": {"last_epoch": COUNT}, "scaler": Maybe(OBJECT), "files": {EACH: [ANY]}}  # fmt: skip

# Settings that a resumed run may change: how long it runs, what it records, how its work is cut and where files are.
# What the files hold is compared instead of their names, and the number of rows a step instead of the cut.
FREE = {
    "model", "model_revision", "train_data", "eval_data", "output_model", "overwrite_output", "trust_remote_code",
    "max_steps", "epochs", "max_bad_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "logging_steps", "eval_steps", "patience", "sample_steps", "sample_prompts", "report_to", "run_name",
    "batch_size", "gradient_accumulation_steps", "loss_chunk_size", "gradient_checkpointing", "attn_implementation",
    "eval_data_split", "revision",
}  # fmt: skip
# They count where the rows differ, and explain it.
OF_THE_ROWS = {"max_length", "chat_template", "loss_on", "long_rows", "columns", "data_weights", "eval_split", "split",
               "dataset_config"}  # fmt: skip
ROWS, FILES, EVALUATION = "rows of --train_data", "files of --model", "rows of --eval_data"
NOTED = (EVALUATION,)  # changes that are said and no reason to refuse, but where the best is kept


def find_checkpoint(
    wanted: str | None, output: Path, run: Mapping[str, Any], total_steps: int,
    starts_afresh: bool = False,
) -> Path | None:  # fmt: skip
    """The checkpoint that `--resume_from_checkpoint` asks for, looked through; `None` where the run starts afresh.

    All processes call it, and must see the same.

    Args:
        wanted: the value of `--resume_from_checkpoint`.
        output: the run's output folder.
        run: what `identify_run` says of it.
        total_steps: of the run as it is now.
        starts_afresh: whether `auto` may start afresh over checkpoints that are all damaged.

    Raises:
        InputError: there is none, it is not whole, it is of a run with other numbers, or past this one's end.
    """
    folder, problem = None, None
    try:
        folder = _find(wanted, output, json.loads(json.dumps(run)), total_steps, starts_afresh)
    except InputError as error:
        problem = str(error)
    views = gather_object([(str(folder), problem)])
    problems = [problem for _, problem in views if problem is not None]
    if problems:
        raise InputError(problems[0])
    if len(set(views)) > 1:
        raise InputError(
            f"--resume_from_checkpoint {wanted}: the processes see different checkpoints "
            f"({', '.join(sorted({found for found, _ in views}))}); all nodes must share the disk they are on"
        )
    return folder


def _find(
    wanted: str | None, output: Path, run: Mapping[str, Any], total_steps: int, starts_afresh: bool
) -> Path | None:
    flag = f"--resume_from_checkpoint {wanted}"
    if wanted is None:
        return None
    if wanted in ("latest", "auto"):
        folder = latest_whole(output, told=True)
        if folder is None and list_checkpoints(output) and not (wanted == "auto" and starts_afresh):
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


def asked_for(settings: Settings) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names, before anything of it is checked; `None` for none."""
    wanted = settings.resume_from_checkpoint
    if wanted is None:
        return None
    return latest_whole(Path(settings.output_model)) if wanted in ("latest", "auto") else Path(wanted)


def latest_whole(output: Path, told: bool = False) -> Path | None:
    """The checkpoint of `output` that was saved last and is whole; if `told`, with a line for each one passed over."""
    for folder in reversed(list_checkpoints(output)):
        problem = _problem(folder)
        if problem is None:
            return folder
        if told:
            notice(f"{folder} is passed over: {problem}")
    return None


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


def digest_of(path: Path) -> list[int | str]:
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
        state = checked_state(read_state(folder), name)
        if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.name != f"checkpoint-{state['loop']['step']}":
            return f"{STATE} is of step {state['loop']['step']}"
        for name, recorded in state["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            found = digest_of(folder / name)  # a pickle is found out here, whatever its size
            if found != recorded:
                changed = f"has {size} bytes instead of {recorded[0]}" if size != recorded[0] else "was changed"
                return f"{name} {changed}"
    except SafetensorError:
        return f"{name} is not a safetensors file; nothing else is loaded"
    except InputError as error:
        return f"{name} is not readable as one of a checkpoint ({in_a_line(error, 100)})"
    except (OSError, ValueError, RecursionError) as error:
        reason = in_a_line(error, 100)
        return f"{name} is not readable as one of a checkpoint ({type(error).__name__}: {reason})"
    return None


def checked_state(state: Any, where: str) -> dict[str, Any]:
    """What a checkpoint's JSON says. Raises `InputError` where it is not of the kinds that a checkpoint has there."""
    found: dict[str, Any] = checked(state, STATE_SHAPE, where)
    loop, metrics, files = found["loop"], found["metrics"], found["files"]
    require(loop["step"] > 0, where, "step is 0")
    require(loop["bad_steps"] <= loop["step"], where, "bad_steps is more than step")
    require(found["schedule"]["last_epoch"] <= loop["step"], where, "last_epoch is more than step")
    require(loop["strategy"] in STRATEGIES, where, f"strategy is none of {', '.join(STRATEGIES)}")
    policy_from(loop["policy"], f"{where}: policy", len(metrics["noisy_steps"]) - 1, found["run"])
    elsewhere = [name for name in files if ".." in Path(name).parts or Path(name).is_absolute()]
    require(not elsewhere, where, "files are not names")
    weights = any(name.startswith(("adapter_model.", "model")) for name in files)
    require({OPTIMIZER, PROCESSES} <= set(files) and weights, where, "files are lacking")
    return found


def identify_run(
    settings: Settings, examples: Sequence[Example], eval_examples: Sequence[Example],
    rows_per_step: int, accelerator: Any,
) -> dict[str, Any]:  # fmt: skip
    """Everything that another run with the same numbers must share, as plain values.

    Args:
        settings: of the run.
        examples, eval_examples: the tokenized rows.
        rows_per_step: rows an optimizer step, over all micro-batches and processes.
        accelerator: of the run.
    """
    identity = {name: value for name, value in settings.record().items() if name not in FREE}
    if (
        settings.noise_policy not in POLICIES
    ):  # what the file says, wherever it is; the run writes it anew in its output
        policy = read_policy(settings.noise_policy)
        identity["noise_policy"] = hashlib.sha256(repr((policy.layers, policy.base_stds)).encode()).hexdigest()
    return identity | {
        ROWS: _digest_of_rows(examples),
        EVALUATION: _digest_of_rows(eval_examples),
        FILES: _model_digest(settings.model, settings.model_revision),
        "rows an optimizer step": rows_per_step,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; for digests only that they do."""
    same = set() if now.get("keep_best") else set(NOTED)
    same |= OF_THE_ROWS if before.get(ROWS) == now.get(ROWS) else set()
    found = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if name not in before:
            found.append(f"{name} is not known of it, as an older version wrote it")
        elif old != new and name == FILES and " at " in f"{old}" and " at " in f"{new}":  # both are of the hub
            found.append(f"--model is {new} and was {old}: --model_revision takes a commit")
        elif old != new and name not in same:
            digests = ROWS, FILES, EVALUATION
            found.append(f"the {name} have changed" if name in digests else f"{name} was {old} and is {new}")
    return found


def _digest_of_rows(examples: Sequence[Example]) -> str:
    return examples.digest if isinstance(examples, Examples) else rows_digest(examples)


def _model_digest(name: str, revision: str | None) -> str:
    """Of a model on the hub its name and commit; of a folder config.json, and each weight file's size, beginning and
    end: a copy elsewhere is the same model."""
    folder, content = Path(name), hashlib.sha256()
    if not folder.is_dir():
        return f"{name} at {revision}"
    for path in sorted(folder.glob("*.safetensors")):
        content.update(f"{path.name} {path.stat().st_size}".encode() + ends_of(path))
    content.update((folder / "config.json").read_bytes())
    return content.hexdigest()
