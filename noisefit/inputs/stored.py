"""Rows that do not fit a list: tokenized once a machine into Arrow files, which its processes map into their memory.

The files lie in the cache of the library `datasets` (`HF_DATASETS_CACHE`), in a folder `noisefit/KEY`, where the key is
a digest of all that the tokens depend on: a cache of something else is never found. `datasets` is needed to make them;
to read them, `pyarrow` alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
from huggingface_hub.constants import HF_HOME

from noisefit.base.errors import InputError
from noisefit.inputs.prompts import Example
from noisefit.inputs.tables import SomeRows

ABOUT = "about.json"
LARGE = 8 * 2**20  # bytes of a file; as lists its tokens would take ten times as many, and `datasets` starts in seconds


def is_large(path: str | None) -> bool:
    """Whether the rows of a file are stored rather than listed; of one that is not there, no."""
    try:
        return path is not None and Path(path).stat().st_size >= LARGE
    except OSError:  # whoever reads it says so
        return False


def cache_folder() -> Path:
    """Where the stored rows of all files lie: in the folder that `datasets` uses, without a wait for its import."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser() / "noisefit"


class StoredExamples(Sequence[Example]):
    """Tokenized rows in files, each made an `Example` when it is asked for.

    A process holds 9 bytes a row (lengths, borders, cuts), and 1 MB per million rows for the parts of the files; the
    tokens, int32, are the files' own pages.

    Attributes:
        digest: of all rows, see `rows_digest`.
        lengths: tokens of each row, `[rows]` int32.
        num_targets: supervised tokens of all rows.
        skipped, dropped, cut, apart: rows of the file with an empty cell, without room for an answer, with its end cut,
            and conversations in several examples.
    """

    def __init__(self, folder: Path):
        """Map the files of `folder`. Raises `InputError` where they are not all there, or not as they were written."""
        import pyarrow

        about, wrong = read_about(folder), f"{folder}: the tokenized rows are not all there, or were changed; remove it"
        if about is None:
            raise InputError(wrong)
        self.digest: str = about["digest"]
        told = (SomeRows(*about[name]) for name in ("skipped", "dropped", "cut", "apart"))
        self.skipped, self.dropped, self.cut, self.apart = told
        parts = []
        for name in about["files"]:
            try:
                with pyarrow.memory_map(str(folder / name)) as file:  # the arrays keep what they need of it
                    parts += pyarrow.ipc.open_stream(file).read_all().to_batches()
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{wrong} ({error})") from None
        self._parts = [(part["input_ids"].offsets.to_numpy(), part["input_ids"].values.to_numpy()) for part in parts]
        self._first = [0, *accumulate(len(part) for part in parts)]
        # Of each row where a gap starts and ends, gap by gap.
        self._gaps = [(part["gaps"].offsets.to_numpy(), part["gaps"].values.to_numpy()) for part in parts]
        self._target_starts = np.concatenate([part["target_start"].to_numpy() for part in parts])
        self._is_cut = np.concatenate([part["is_cut"].to_numpy(zero_copy_only=False) for part in parts])
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._parts])
        in_gaps = sum(int(borders[1::2].sum(dtype=np.int64) - borders[::2].sum(dtype=np.int64))
                      for borders in (values[offsets[0] : offsets[-1]] for offsets, values in self._gaps))  # fmt: skip
        after_starts = self.lengths.sum(dtype=np.int64) - self._target_starts.sum(dtype=np.int64)
        self.num_targets = int(after_starts) - in_gaps

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # with its IndexError
        number = bisect_right(self._first, index) - 1
        offsets, tokens = self._parts[number]
        row = index - self._first[number]
        ids = tokens[offsets[row] : offsets[row + 1]].tolist()
        offsets, borders = self._gaps[number]
        border = iter(borders[offsets[row] : offsets[row + 1]].tolist())
        gaps = tuple(zip(border, border, strict=True))
        return Example(ids, int(self._target_starts[index]), bool(self._is_cut[index]), gaps=gaps)


def read_about(folder: Path) -> dict | None:
    """What `ABOUT` says of stored rows; `None` where they are not all there, or their files have another size."""
    try:
        about: dict = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, (size, _) in about["files"].items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return about if whole else None


def rows_digest(examples: Iterable[Example]) -> str:
    """By which rows are known as the same: of their tokens, borders and weights, however they are kept."""
    content = hashlib.sha256()
    for example in examples:
        content.update(array("q", [example.target_start, len(example.input_ids), *example.input_ids]).tobytes())
        if example.gaps:
            content.update(array("q", [-1, *(border for gap in example.gaps for border in gap)]).tobytes())
        if example.weight != 1:
            content.update(array("d", [example.weight]).tobytes())
    return content.hexdigest()
