"""Making stored rows, see `noisefit.inputs.stored`: our reader and our tokenizing, run by `datasets` on all cores."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from noisefit.base.errors import InputError, notice
from noisefit.base.files import free_lock, sync_folder, writing
from noisefit.inputs import (
    columns,
    conversations,
    examples,
    prompts,
    readers,
    sources,
    stored,
    tables,
    templates,
    turns,
)
from noisefit.inputs.conversations import Message
from noisefit.inputs.examples import prompt_key, rows_digest
from noisefit.inputs.prompts import PromptSettings, usable_examples
from noisefit.inputs.sources import Source, Table, as_source, file_digest, quiet_datasets
from noisefit.inputs.stored import ABOUT, StoredExamples, cache_folder, read_about
from noisefit.inputs.tables import Row, SomeRows, stream_rows

LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "sentencepiece", "tiktoken")  # that tokens depend on
BATCH = 1000  # rows of a part of the files
OUR_PART = re.compile(r"[0-9a-f]{64}\.\w+\.part")  # a folder in which rows are written, as `_staging` names it
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h

_storing, _by_main_thread = False, True
_hooked: list[bool] = []


def store(
    source: Table,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings,
    vocabulary: int,
    stop_ids: Iterable[int],
) -> str:
    """Have the tokenized rows of a source in the cache, those that were cut too. One process a machine calls it.

    Args:
        source: a file, see `noisefit.inputs.tables.read_records`, or another source.
        tokenizer, settings, vocabulary, stop_ids: as for `noisefit.inputs.prompts.usable_examples`.

    Returns:
        The name of their folder in `cache_folder()`.

    Raises:
        InputError: as `read_rows` and `usable_examples`; the file is edited meanwhile; or `datasets` is missing.
        LocalError: the cache cannot be written.
    """
    how = {"settings": settings, "vocabulary": vocabulary, "stop_ids": sorted(stop_ids)}
    source = as_source(source)
    content = source.content()
    name = _key(content, tokenizer, how)
    folder = cache_folder() / name
    if _is_as_written(folder):
        notice(f"{source}: its rows are tokenized already, in {folder}")
        return name
    try:
        import datasets  # noqa: F401 (two seconds, and not everywhere)
    except ImportError:
        size = source.size / 2**20
        raise InputError(f"{source}: a file of {size:.0f} MiB is tokenized by way of the library datasets, which is "
                         "not installed; pip install datasets") from None  # fmt: skip
    with writing(cache_folder(), "; HF_DATASETS_CACHE names another folder"), _staging(name) as staged:
        notice(f"{source}: its rows are tokenized once, on {_cores()} cores, and kept in {folder}")
        _write(staged, source, tokenizer, how)
        if source.content() != content:
            raise InputError(f"{source}: it was edited while it was read; start again")
        sync_folder(staged)
        if not _is_as_written(folder):  # else a machine that shares the disk was faster
            shutil.rmtree(folder, ignore_errors=True)
            try:
                staged.rename(folder)
            except OSError:  # or is so now
                if not _is_as_written(folder):
                    raise
    return name


def _is_as_written(folder: Path) -> bool:
    """Whether stored rows are all there, byte by byte: whoever maps them looks at their sizes alone."""
    about = read_about(folder)
    return about is not None and all(
        file_digest(folder / name) == digest for name, (_, digest) in about["files"].items()
    )


def _write(staged: Path, source: Source, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any]) -> None:
    from datasets import Dataset, Features, List, Value

    skipped: list[int] = []

    def cells() -> Iterator[dict[str, Any]]:
        for row in stream_rows(source, skipped):
            history = json.dumps(row.history) if row.history else ""
            yield {"number": row.number, "prompt": row.prompt, "response": row.response, "history": history}

    text = Value("string")
    as_text = Features(number=Value("int64"), prompt=text, response=text, history=text)
    as_tokens = Features(number=Value("int64"), input_ids=List(Value("int32")), target_start=Value("int32"),
                         gaps=List(Value("int32")), is_cut=Value("bool"), prompt_key=Value("int64"))  # fmt: skip
    with _errors_of_ours(), quiet_datasets():
        rows = Dataset.from_generator(cells, features=as_text, cache_dir=str(staged / "rows"))
        examples = rows.map(
            _columns, batched=True, batch_size=BATCH, num_proc=min(_cores(), len(rows)),
            remove_columns=["prompt", "response", "history"],
            features=as_tokens, fn_kwargs={"path": str(source), "tokenizer": tokenizer, **how}, desc="Tokenizing",
            cache_file_name=str(staged / "tokens.arrow"), new_fingerprint=staged.name.partition(".")[0][:32],
        )  # fmt: skip
    numbers = examples.data.column("number").to_numpy()
    cut = np.unique(numbers[examples.data.column("is_cut").to_numpy()])
    dropped = np.setdiff1d(rows.data.column("number").to_numpy(), numbers)
    del rows, examples
    if not len(numbers):
        tables.tell_of_skipped(source, skipped)
        prompts.tell_of_length(str(source), how["settings"].max_length, dropped.tolist(), [], any_left=False)
    shutil.rmtree(staged / "rows")
    files = {file.name: (file.stat().st_size, file_digest(file)) for file in sorted(staged.glob("*.arrow"))}
    counted = {"skipped": skipped, "dropped": dropped.tolist(), "cut": cut.tolist(),
               "apart": prompts.repeated(numbers.tolist())}  # fmt: skip
    about = {"files": files, "digest": "", **{name: SomeRows.of(counted[name]) for name in counted}}
    (staged / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    about["digest"] = rows_digest(StoredExamples(staged))
    (staged / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _columns(
    cells: Mapping[str, list[Any]], path: str, tokenizer: PreTrainedTokenizerBase, **how: Any
) -> dict[str, list[Any]]:
    """A batch of rows as `datasets` has them, tokenized as those of a list are."""
    rows = [
        Row(number, prompt, response, history=tuple(Message(*turn) for turn in json.loads(history or "[]")))
        for number, prompt, response, history in zip(
            cells["number"], cells["prompt"], cells["response"], cells["history"], strict=True
        )
    ]
    examples, numbers, _ = usable_examples(tokenizer, rows, path, **how)
    keys = {row.number: prompt_key(row) for row in rows}
    return {
        "number": numbers,
        "input_ids": [example.input_ids for example in examples],
        "target_start": [example.target_start for example in examples],
        "gaps": [[border for gap in example.gaps for border in gap] for example in examples],
        "is_cut": [example.is_cut for example in examples],
        "prompt_key": [keys[number] for number in numbers],
    }


def _key(content: Any, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any]) -> str:
    """A digest of all that decides on the tokens: source, tokenizer with its template and date, settings, code."""
    kind, settings = type(tokenizer), how["settings"]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = {str(file.relative_to(folder)): file_digest(file) for file in Path(folder).rglob("*") if file.is_file()}
    ours = (readers, columns, conversations, sources, tables, templates, prompts, turns, examples, stored)
    code = [inspect.getfile(module) for module in (*ours, kind)]
    facts = {
        "source": content,
        "tokenizer": [f"{kind.__module__}.{kind.__qualname__}", sorted(saved.items())],
        "settings": [settings.max_length, settings.loss_on, how["vocabulary"], how["stop_ids"]],
        "code": [*sys.version_info[:3], *(file_digest(Path(file)) for file in (*code, __file__))],
        "libraries": [_version(name) for name in LIBRARIES],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _staging(name: str) -> Iterator[Path]:
    """A folder to write in, locked while it is; those that killed runs left, whose locks are free, are removed."""
    parent = cache_folder()
    parent.mkdir(parents=True, exist_ok=True)
    for left in filter(lambda path: OUR_PART.fullmatch(path.name), parent.iterdir()):
        if (lock := free_lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    new = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
    new.chmod(parent.stat().st_mode)  # for all who may use the cache
    lock = free_lock(new)
    staged = new.rename(new.with_name(f"{new.name}.part"))  # after the lock: others look at this name alone
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def _errors_of_ours() -> Iterator[None]:
    """What is wrong with a row or with the disk, taken out of the errors that `datasets` wraps it in.

    The processes that it forks meanwhile end with this one, and leave Ctrl-C to it.
    """
    global _storing
    if hasattr(os, "register_at_fork") and not _hooked:
        os.register_at_fork(before=_before_fork, after_in_child=_in_fork)
        _hooked.append(True)
    _storing = True
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (InputError, OSError, KeyboardInterrupt)):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from None
        if cause is not None:
            raise cause from None
        if "abruptly died" in str(error):
            raise InputError("a process that tokenized was killed, for want of memory as a rule; see dmesg") from None
        raise
    finally:
        _storing = False


def _before_fork() -> None:
    global _by_main_thread
    _by_main_thread = threading.current_thread() is threading.main_thread()


def _in_fork() -> None:
    if _storing:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The signal comes at the end of the thread that forked: a pool's own ends before its workers may.
        if sys.platform == "linux" and _by_main_thread:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
