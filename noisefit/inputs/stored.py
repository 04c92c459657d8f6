"""Rows that do not fit a list: tokenized once a machine into Arrow files, which its processes map into their memory.

The files lie in the cache of the library `datasets` (`HF_DATASETS_CACHE`), in a folder `noisefit/KEY`, where the key is
a digest of all that the tokens depend on: a cache of something else is never found. `datasets` is needed to make them;
to read them, `pyarrow` alone.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray

from noisefit.base.errors import InputError
from noisefit.inputs.examples import Examples, continues
from noisefit.inputs.prompts import Example
from noisefit.inputs.sources import Table, as_source
from noisefit.inputs.tables import SomeRows

ABOUT = "about.json"
LARGE = 8 * 2**20  # bytes; as lists its tokens would take ten times as many, and `datasets` starts in seconds


def is_large(source: Table) -> bool:
    """Whether the rows of a source are stored rather than listed."""
    return as_source(source).size >= LARGE


def cache_folder() -> Path:
    """Where the stored rows of all files lie: in the folder that `datasets` uses, without a wait for its import."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser() / "noisefit"


class StoredExamples(Examples):
    """Tokenized rows in files, each made an `Example` when it is asked for.

    A process holds 14 bytes a text (lengths, borders, targets, cuts, rows), and 1 MB per million rows for the parts
    of the files; the tokens, int32, are the files' own pages.

    Attributes:
        skipped, dropped, cut, apart: rows of the file with an empty cell, without room for an answer, with its end cut,
            and conversations in several examples.
    """

    def __init__(self, folder: Path):
        """Map the files of `folder`. Raises `InputError` where they are not all there, or not as they were written."""
        import pyarrow

        about, wrong = read_about(folder), f"{folder}: the tokenized rows are not all there, or were changed; remove it"
        if about is None:
            raise InputError(wrong)
        self._digest: str = about["digest"]
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
        self.is_cut = np.concatenate([part["is_cut"].to_numpy(zero_copy_only=False) for part in parts])
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._parts])
        self.targets = self.lengths - self._target_starts - np.concatenate([_widths(*gaps) for gaps in self._gaps])
        self._cut_examples = self.is_cut
        numbers = np.concatenate([part["number"].to_numpy() for part in parts])
        self.continues = continues(numbers)
        if self.is_cut.any():
            self.is_cut = np.isin(numbers, numbers[self.is_cut])
        self._prompts = [part["prompt_key"].to_numpy() for part in parts]

    @property
    def prompts(self) -> NDArray[np.int64]:
        return np.concatenate(self._prompts)

    @property
    def digest(self) -> str:
        return self._digest

    def row(self, index: int) -> Example:
        number = bisect_right(self._first, index) - 1
        offsets, tokens = self._parts[number]
        place = index - self._first[number]
        ids = tokens[offsets[place] : offsets[place + 1]].tolist()
        offsets, borders = self._gaps[number]
        border = iter(borders[offsets[place] : offsets[place + 1]].tolist())
        gaps = tuple(zip(border, border, strict=True))
        return Example(ids, int(self._target_starts[index]), bool(self._cut_examples[index]), gaps=gaps)


def read_about(folder: Path) -> dict | None:
    """What `ABOUT` says of stored rows; `None` where they are not all there, or their files have another size."""
    try:
        about: dict = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, (size, _) in about["files"].items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return about if whole else None


def _widths(offsets: NDArray[np.int32], borders: NDArray[np.int32]) -> NDArray[np.int32]:
    """Tokens in the gaps of each row, `[rows]`, of where they start and end, gap by gap."""
    ends = borders[offsets[0] : offsets[-1]]
    up_to = np.concatenate([[0], np.cumsum(ends[1::2] - ends[::2])])
    return np.diff(up_to[(offsets - offsets[0]) // 2]).astype(np.int32)
