"""What determines the numbers of a run, so that it is not resumed as another one."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from noisefit.files import ends_of
from noisefit.policy import POLICIES, read_policy
from noisefit.prompts import Example

# Settings that a resumed run may change: how long it runs, what it records, how its work is cut and where files are.
# What the files hold is compared instead of their names, and the number of rows a step instead of the cut.
FREE = {
    "model", "train_data", "eval_data", "config", "output_model", "overwrite_output", "trust_remote_code",
    "max_steps", "epochs", "max_bad_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "logging_steps", "eval_steps", "report_to", "run_name", "batch_size", "gradient_accumulation_steps",
    "loss_chunk_size", "gradient_checkpointing", "attn_implementation",
}  # fmt: skip
# They count where the rows differ, and explain it.
OF_THE_ROWS = {"max_length", "chat_template", "loss_on"}
ROWS, FILES, EVALUATION = "rows of --train_data", "files of --model", "rows of --eval_data"
NOTED = (EVALUATION,)  # changes that are said and no reason to refuse


def identify_run(
    args: Namespace, config: PreTrainedConfig, examples: Sequence[Example], eval_examples: Sequence[Example],
    rows_per_step: int, accelerator: Any,
) -> dict[str, Any]:  # fmt: skip
    """Everything that another run with the same numbers must share, as plain values.

    Args:
        args: the run's settings.
        config: the base model's.
        examples, eval_examples: the tokenized rows.
        rows_per_step: rows an optimizer step, over all micro-batches and processes.
        accelerator: of the run.
    """
    identity = {name: value for name, value in vars(args).items() if name not in FREE}
    if args.noise_policy not in POLICIES:  # what the file says, wherever it is; the run writes it anew in its output
        policy = read_policy(args.noise_policy)
        identity["noise_policy"] = hashlib.sha256(repr((policy.layers, policy.base_stds)).encode()).hexdigest()
    return identity | {
        ROWS: _rows_digest(examples),
        EVALUATION: _rows_digest(eval_examples),
        FILES: _model_digest(args.model, config),
        "rows an optimizer step": rows_per_step,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; for digests only that they do."""
    same = set(NOTED) | (OF_THE_ROWS if before.get(ROWS) == now.get(ROWS) else set())
    found = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old != new and name not in same:
            found.append(f"the {name} have changed" if name in (ROWS, FILES) else f"{name} was {old} and is {new}")
    return found


def _rows_digest(examples: Sequence[Example]) -> str:
    content = hashlib.sha256()
    for example in examples:
        content.update(array("q", [example.target_start, len(example.input_ids), *example.input_ids]).tobytes())
    return content.hexdigest()


def _model_digest(name: str, config: PreTrainedConfig) -> str:
    """Of a folder config.json, and each weight file's size, beginning and end: a copy elsewhere is the same model."""
    folder, content = Path(name), hashlib.sha256()
    if not folder.is_dir():
        return f"{name} at {getattr(config, '_commit_hash', None)}"
    for path in sorted(folder.glob("*.safetensors")):
        content.update(f"{path.name} {path.stat().st_size}".encode() + ends_of(path))
    content.update((folder / "config.json").read_bytes())
    return content.hexdigest()
