"""`--cache_teacher`: the base model's predictions at the supervised positions, computed once and kept on disk.

`OUTPUT/teacher_cache` has parts in safetensors, each of some rows: a row's digest, how many of its tokens are
supervised, and the `TopK` of each. A row is found by its digest, which is made of its tokens: a row that was edited is
not found, and the predictions are computed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from noisefit.base.errors import InputError, in_a_line, notice
from noisefit.base.files import sync_folder, writing
from noisefit.base.meeting import apart
from noisefit.inputs.batches import collate, cut_step
from noisefit.inputs.prompts import Example
from noisefit.method.teacher import BaseModel, Teacher
from noisefit.method.top_k import TopK
from noisefit.run.checkpoint_files import FILES
from noisefit.run.output import CACHE
from noisefit.run.output_folder import OutputFolder
from noisefit.run.preparation import Prepared
from noisefit.run.processes import on_any_process, progress_bar
from noisefit.run.weights import write_tensors

ABOUT, PARTS = "about.json", "parts"
PART_ROWS = 1024  # rows a file: what the main process holds of all others' at a time
OF_THE_PREDICTIONS = ("quantization", "temperature", "cache_teacher")  # settings that change them


def with_predictions(prepared: Prepared, output: OutputFolder, teacher: Teacher, strategy: str) -> Sequence[Example]:
    """The rows with the teacher's predictions, where `--cache_teacher` asks for them. All processes call it.

    A cache that a run left in the output folder is used if it has all rows, and is replaced or removed if not.

    Args:
        prepared, output, teacher: of the run.
        strategy: that the branches are run with.

    Raises:
        InputError: the processes do not share the disk.
        LocalError: it cannot be written.
    """
    settings, examples, accelerator = prepared.settings, prepared.examples, prepared.accelerator
    folder = output.path / CACHE
    if not isinstance(teacher, BaseModel) or not settings.cache_teacher:
        if accelerator.is_main_process and output.is_own(f"{CACHE}/"):
            output.remove_folder(folder)
        return examples
    about = {name: str(prepared.run[name]) for name in (FILES, "mixed_precision", *OF_THE_PREDICTIONS)}
    rows = {_digest(example): example for example in examples}
    with apart(f"reading {folder}"):
        found = _read(folder, about) if output.is_whole(CACHE) else {}
    if on_any_process(accelerator, not rows.keys() <= found.keys()) == [True]:
        found = {}  # which may be the files that are to be replaced
        with output.staging(CACHE) if accelerator.is_main_process else nullcontext() as staged:
            _compute(prepared, rows, teacher, strategy, staged)
            with apart(f"writing {folder}"), writing(folder):
                if staged is not None:
                    text = json.dumps({PARTS: math.ceil(len(rows) / PART_ROWS)} | about, indent=2)
                    (staged / ABOUT).write_text(text + "\n", encoding="utf-8")
                    sync_folder(staged)
                    output.place_folder(staged, CACHE)
        with apart(f"reading {folder}"):
            found = _read(folder, about)
        if on_any_process(accelerator, not rows.keys() <= found.keys()) == [True]:
            raise InputError(f"--cache_teacher: not all processes can read {folder}; all nodes must share the disk")
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        notice(f"the teacher's predictions of {len(rows)} rows are kept in {folder}, {size:.3g} MiB")
    else:
        notice(f"the teacher's predictions of {len(rows)} rows are those in {folder}")
    return [replace(example, teacher=found[_digest(example)]) for example in examples]


def _compute(
    prepared: Prepared, rows: Mapping[bytes, Example], teacher: BaseModel, strategy: str, staged: Path | None
) -> None:
    """Write the parts to `staged`, on the main process."""
    accelerator, settings, examples = prepared.accelerator, prepared.settings, list(rows.values())
    how = strategy, settings.cache_teacher, settings.temperature
    with progress_bar(accelerator, len(rows), "the teacher's predictions", "row") as progress:
        for number, start in enumerate(range(0, len(rows), PART_ROWS)):
            part, mine = examples[start : start + PART_ROWS], list[tuple[list[Example], TopK]]()
            for share in cut_step(part, settings.batch_size, accelerator.num_processes, accelerator.process_index):
                batch = collate(share, prepared.tokenizer.pad_token_id, accelerator.device)
                mine.append((share, teacher.top_k(batch, *how).to("cpu")))
            everyones = gather_object(mine)
            with apart("writing the teacher's predictions"):
                if staged is not None:
                    with writing(staged):
                        write_tensors(staged / _part(number), _as_tensors(everyones))
            progress.update(len(part))


def _as_tensors(batches: Sequence[tuple[Sequence[Example], TopK]]) -> dict[str, Tensor]:
    rows = [example for share, _ in batches for example in share]
    digests = torch.tensor([list(_digest(example)) for example in rows], dtype=torch.uint8)
    counts = torch.tensor([example.num_targets for example in rows])
    return {"digests": digests, "counts": counts} | TopK.joined([top for _, top in batches])._asdict()


def _read(folder: Path, about: Mapping[str, str]) -> dict[bytes, TopK]:
    """The predictions of a row by its digest; none where the cache is of another model, or cannot be read."""
    found: dict[bytes, TopK] = {}
    try:
        recorded = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        parts = recorded.pop(PARTS)
        if recorded != about:
            return {}
        for number in range(parts):  # whatever else lies there is not this program's
            tensors = load_file(folder / _part(number))  # mapped into memory: a row is read when it is needed
            top = TopK(tensors["tokens"], tensors["log_probs"]).split(tensors["counts"].tolist())
            found |= zip([bytes(digest) for digest in tensors["digests"].tolist()], top, strict=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        notice(f"{folder} is not used: {in_a_line(error)}")
        return {}
    return found


def _part(number: int) -> str:
    return f"part-{number:05}.safetensors"


def _digest(example: Example) -> bytes:
    gaps = [-1, *(border for gap in example.gaps for border in gap)] if example.gaps else []
    return hashlib.sha256(array("q", [example.target_start, *example.input_ids, *gaps]).tobytes()).digest()
