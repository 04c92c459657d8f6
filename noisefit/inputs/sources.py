"""Where rows come from: a file, a folder laid out as a dataset of the hub or as `save_to_disk` leaves one, or a name on
the hub. Files have our own readers, which lose no cell; folders and names go through the library `datasets`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError, notice, on_main_process
from noisefit.inputs import readers
from noisefit.inputs.columns import Needed, renamed
from noisefit.inputs.readers import COMPRESSED, READERS, suffix_of, wanted_columns

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TOGETHER = 1000  # rows of a dataset that are made Python's at a time


Table = str | os.PathLike[str]
"""A file, or another source of records."""


@dataclass(frozen=True)
class Source(os.PathLike[str]):
    """Rows to read, of one file or dataset; it stands where else a path does.

    In a line it is its name: a path, or `NAME (split)`.

    Attributes:
        word: as it was given.
        name: for lines.
        renames: which of its columns is to be called `prompt` and so on, by these names.
        dataset: a `datasets.Dataset`; `None` for a file.
        commit: of the hub, where it is from there and known.
        held: all its records, where they are kept to be read again.
    """

    word: str
    name: str
    renames: Mapping[str, str] = field(default_factory=dict)
    dataset: Any = field(default=None, repr=False)
    commit: str | None = None
    held: list[tuple[int, dict[str, Any]]] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.name

    def __fspath__(self) -> str:
        return self.word

    def stream(self, columns: Iterable[Needed], others: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """See `stream_records`."""
        if self.held is not None:
            yield from self.held
        elif self.dataset is None:
            yield from readers.stream_records(self.word, columns, others, self.renames)
        else:
            wanted = wanted_columns(self, self.dataset.data.schema, tuple(columns), others, self.renames)
            number = 0
            for batch in self.dataset.select_columns(wanted).iter(TOGETHER):
                for cells in zip(*batch.values(), strict=True):
                    number += 1
                    record = dict(zip(batch, cells, strict=True))
                    yield number, renamed(record, self.renames) if self.renames else record

    def holding(self, columns: Iterable[Needed]) -> Source:
        """The same with its records in memory, so that they are parsed once however often they are read. Raises
        `InputError` as `stream_records`."""
        return replace(self, held=list(self.stream(columns, others=True)))

    @property
    def size(self) -> int:
        """Bytes, about; of a file that is not there none."""
        if self.dataset is not None:
            return int(self.dataset.data.nbytes)
        try:
            path = Path(self.word)
            return path.stat().st_size * (4 if path.suffix.lower() in COMPRESSED else 1)
        except OSError:  # whoever reads it says so
            return 0

    def column_names(self) -> list[str]:
        """Its columns, as they are called there; see `noisefit.inputs.readers.column_names`."""
        return readers.column_names(self.word) if self.dataset is None else list(self.dataset.column_names)

    def content(self) -> list[Any]:
        """What decides on its records, as plain values: for a file its content, wherever it lies.

        Raises:
            InputError: a file cannot be read.
        """
        facts: list[Any] = [sorted(self.renames.items())]
        if self.dataset is None:
            path = Path(self.word)
            return [*facts, file_digest(path), suffix_of(path), path.suffix.lower() in COMPRESSED]
        files = [file_digest(Path(file["filename"])) for file in self.dataset.cache_files]
        return [*facts, files, self.dataset._fingerprint, len(self.dataset)]


def stream_records(
    source: Table, columns: Iterable[Needed], others: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a source, each read when it is asked for, with their numbers, from 1.

    Args:
        source: a file, see `noisefit.inputs.tables.read_records`, or another source.
        columns: that it must have.
        others: whether its other columns are wanted too.

    Raises:
        InputError: as `noisefit.inputs.readers.stream_records`.
    """
    if isinstance(source, Source):
        yield from source.stream(columns, others)
    else:
        yield from readers.stream_records(source, columns, others)


def as_source(table: Table) -> Source:
    """A file as a source; a source as it is."""
    return table if isinstance(table, Source) else Source(os.fspath(table), os.fspath(table))


def is_file_name(word: str) -> bool:
    """Whether a word names a file, there or not, rather than a folder or a dataset of the hub."""
    path = Path(word)
    if path.is_dir():
        return False
    known = path.suffix.lower() in (*READERS, *COMPRESSED)
    return os.path.lexists(path) or known or HUB_NAME.fullmatch(word) is None


def find_source(
    flag: str, word: str, renames: Mapping[str, str], splits: Sequence[str], config: str | None = None,
    revision: str | None = None,
) -> Source:  # fmt: skip
    """What a word of `--train_data` or `--eval_data` names. Of a dataset all is there when this returns.

    Args:
        flag: it was given to, for the line.
        word: a file, a folder, or a name on the hub.
        renames: see `Source`.
        splits: that are looked for, the first one that there is; `datasets` knows more than names, `train[:10%]` say.
        config, revision: of a dataset.

    Raises:
        InputError: there is no such thing, no such split or configuration, or it cannot be read. A file is looked at
            when it is read.
    """
    if is_file_name(word):
        return Source(word, word, renames)
    try:
        import datasets  # seconds, and not everywhere
    except ImportError:
        raise InputError(f"{flag} {word}: what is not a file is read by way of the library datasets, which is not "
                         "installed; pip install datasets") from None  # fmt: skip
    with quiet_datasets(), _errors_of_datasets(flag, word, datasets):
        path = Path(word)
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(word)
            if isinstance(loaded, datasets.DatasetDict):
                split = _which(flag, word, splits, list(loaded), slices=False)
                return Source(word, f"{word} ({split})", renames, loaded[split])
            split = str(loaded.split or "train")
            if split not in splits and splits != EVALUATION:
                raise InputError(f"{flag} {word}: it is one split, {split}, and no {splits[0]}; leave that out")
            return Source(word, word, renames, loaded)
        builder = _builder(datasets, word, config, revision, renames)
        builder.download_and_prepare()
        split = _which(flag, word, splits, list(builder.info.splits or ()))
        commit = None if path.is_dir() or not COMMIT.fullmatch(str(builder.hash)) else str(builder.hash)
        if type(builder).__name__ == "Cache":
            notice(f"{word}: the hub was not asked; its rows are those in the cache, of commit {commit or 'unknown'}")
        return Source(word, f"{word} ({split})", renames, builder.as_dataset(split=split), commit)


EVALUATION = ("validation", "test", "eval", "dev")
"""The splits of a dataset that `--eval_data` takes, the first that there is."""


def _builder(datasets: Any, word: str, config: str | None, revision: str | None, renames: Mapping[str, str]) -> Any:
    """What makes a dataset of the files of a folder or of the hub. No code of theirs runs: `datasets` runs none."""
    where = os.path.abspath(word) if Path(word).is_dir() else word  # a folder may be called as one of its modules
    builder = datasets.load_dataset_builder(where, config, revision=revision)
    if not hasattr(builder.config, "keep_default_na"):
        return builder
    # Left to itself, pandas takes NA or null for a missing answer, and 007 for a number.
    names = ["prompt", "response", "messages", "conversations", "question", "answer", *renames.values()]
    as_text = {"keep_default_na": False, "converters": {name: str for name in names}}
    return datasets.load_dataset_builder(where, config, revision=revision, **as_text)


def _which(flag: str, word: str, splits: Sequence[str], there: Sequence[str], slices: bool = True) -> str:
    """The split that is meant; with `slices` also a part of one, or several: `train[:10%]`, `train+test`."""
    for split in splits:
        if split in there or (slices and re.search(r"[\[+]", split)):
            return split
    how = "--split" if flag == "--train_data" else "--eval_data_split"
    raise InputError(f"{flag} {word}: it has no split {' or '.join(splits)}; its splits: {', '.join(there) or 'none'}; "
                     f"give one as {how}")  # fmt: skip


@contextmanager
def _errors_of_datasets(flag: str, word: str, datasets: Any) -> Iterator[None]:
    """What is wrong with a dataset, as a line: the library has classes of errors for some of it, and texts for all."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())[:300] or type(error).__name__
        what = f"{flag} {word}"
        if isinstance(error, (datasets.exceptions.DatasetNotFoundError, ConnectionError)):
            raise InputError(f"{what}: no such file or folder, and on the hub: {reason}") from None
        if names := re.search(r"(?:available configs: |Available: )\[(.*?)\]", reason):
            raise InputError(f"{what}: give one of its configurations as --dataset_config: "
                             f"{names[1].replace(chr(39), '')}") from None  # fmt: skip
        raise InputError(f"{what}: not to be read as a dataset: {reason}") from None


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No lines of the library; its bars on the main process, where there is somebody to see them."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    shown = not datasets.are_progress_bars_disabled()
    before = [(logs, logs.get_verbosity()) for logs in (datasets.logging, hub_logging)]
    if not (on_main_process() and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    for logs, _ in before:
        logs.set_verbosity(logs.CRITICAL)
    try:
        yield
    finally:
        for logs, verbosity in before:
            logs.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file. Raises `InputError` where it cannot be read."""
    content = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                content.update(block)
    except OSError as error:
        raise InputError(f"{path}: not readable: {error}") from None
    return content.hexdigest()
