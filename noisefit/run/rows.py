"""The rows of a run: in lists where they are few, and where they are many in files that all processes share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from noisefit.base.errors import InputError, notice
from noisefit.base.meeting import apart
from noisefit.base.settings import words_of
from noisefit.inputs.columns import check_renames, parse_columns
from noisefit.inputs.examples import Examples, Listed, choose, held_out, prompt_key, texts_of, weighted
from noisefit.inputs.prompts import PromptSettings, repeated, tell_of_length, tell_of_turns, usable_examples
from noisefit.inputs.sources import EVALUATION, Source, find_source, is_file_name
from noisefit.inputs.stored import StoredExamples, cache_folder, is_large
from noisefit.inputs.storing import store
from noisefit.inputs.tables import ANY_ROWS, Row, SomeRows, read_rows, stream_rows, tell_of_skipped
from noisefit.run.knowledge import by_what_is_known
from noisefit.run.left_out import LeftOut
from noisefit.run.settings import Settings

NO_LIMIT = 2**31  # tokens


@dataclass(frozen=True)
class Data:
    """What `--train_data` and `--eval_data` name, read as far as that goes without a tokenizer.

    Attributes:
        sources, eval_sources: one for each word.
        rows, eval_rows: of each source; `None` where they are to be stored.
        left_out: what became of rows so far.
    """

    sources: list[Source]
    eval_sources: list[Source]
    rows: list[list[Row] | None]
    eval_rows: list[list[Row] | None]
    left_out: LeftOut = field(default_factory=LeftOut)


def read_data(settings: Settings) -> Data:
    """Find the rows of a run, and read those that are listed.

    Raises:
        InputError: as `find_source` and `read_rows`; or flags have nothing that they are of.
    """
    words, revisions = words_of(settings.train_data), words_of(settings.revision)
    datasets = [word for word in words if not is_file_name(word)]
    names = [word for word in datasets if not Path(word).is_dir()]
    for flag, there in (("split", datasets), ("dataset_config", datasets), ("revision", names)):
        if getattr(settings, flag) is not None and not there:
            what = "name on the hub" if flag == "revision" else "folder or name on the hub"
            raise InputError(f"--{flag} is of a {what}, and --train_data has none; leave it out")
    if len(revisions) not in (0, 1, len(names)):
        raise InputError(f"--revision has {len(revisions)} words, and --train_data {len(names)} names on the hub; give "
                         "one for all, or one for each")  # fmt: skip
    revision_of = dict(zip(names, revisions if len(revisions) > 1 else revisions * len(names), strict=False))
    renames = parse_columns(settings.columns)
    splits: tuple[str, ...] = (settings.split or "train",)
    eval_splits: tuple[str, ...] = (settings.eval_data_split,) if settings.eval_data_split else EVALUATION
    sources = [find_source("--train_data", word, renames, splits, settings.dataset_config, revision_of.get(word))
               for word in words]  # fmt: skip
    config_of = dict.fromkeys(words, settings.dataset_config)  # those of another dataset are not known
    eval_sources = [find_source("--eval_data", word, renames, eval_splits, config_of.get(word), revision_of.get(word))
                    for word in words_of(settings.eval_data)]  # fmt: skip
    if renames:
        check_renames(renames, {str(source): source.column_names() for source in (*sources, *eval_sources)})
    always = settings.unknown_rows != "keep"  # what decides on rows needs them in a list, and their other columns
    if always:
        sources = [source.holding(ANY_ROWS) for source in sources]
    left_out = LeftOut()
    return Data(sources, eval_sources, [list_rows(source, always, left_out) for source in sources],
                [list_rows(source, False, left_out, "eval") for source in eval_sources], left_out)  # fmt: skip


def with_commits(settings: Settings, data: Data) -> Settings:
    """`--revision` as the commits that the hub's names stood for, where they are known: so a repetition has the same
    rows."""
    commits = [source.commit for source in data.sources if not is_file_name(source.word)
               and not Path(source.word).is_dir()]  # fmt: skip
    known = [commit for commit in commits if commit is not None]
    return replace(settings, revision=known) if known and len(known) == len(commits) else settings


def make_data(
    settings: Settings, data: Data, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_ids: Iterable[int],
    accelerator: Accelerator,
) -> tuple[Examples, Examples, str | None, dict[str, Any]]:  # fmt: skip
    """The tokenized rows of a run, with lines about them. All processes call it.

    Args:
        settings: of the run.
        data: as `read_data` gave it.
        tokenizer, vocabulary, stop_ids, accelerator: as for `make_rows`.

    Returns:
        The rows of an epoch, those that are held out, the content of `knowledge.csv`, see `by_what_is_known`, and that
        of `rows.json`.

    Raises:
        InputError: as `by_what_is_known`, `make_rows`, `held_out` and `weighted`.
    """
    stop_ids = list(stop_ids)
    left_out = data.left_out
    rows, scores = by_what_is_known(settings, data.sources, data.rows, tokenizer, accelerator, left_out)
    how = tokenizer, settings, vocabulary, stop_ids, accelerator, settings.long_rows, left_out
    parts = [make_rows(source, of_it, *how) for source, of_it in zip(data.sources, rows, strict=True)]
    others = [make_rows(source, of_it, *how, use="eval")
              for source, of_it in zip(data.eval_sources, data.eval_rows, strict=True)]  # fmt: skip
    source_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    numbers, eval_numbers = np.arange(len(source_of)), np.arange(sum(map(len, others)))
    if settings.eval_split:
        if scores is None:
            others = parts
        else:  # held out as they stand in their file, whatever becomes of rows that the model does not know
            others = [make_rows(source, of_it, *how[:-1], told=False)
                      for source, of_it in zip(data.sources, data.rows, strict=True)]  # fmt: skip
        prompts = np.concatenate([part.prompts for part in others])
        of_rows = prompts[~np.concatenate([part.continues for part in others])]
        held = held_out(of_rows, settings.eval_split, settings.seed)
        eval_numbers = np.flatnonzero(np.isin(prompts, of_rows[held]))
        numbers = np.flatnonzero(~np.isin(np.concatenate([part.prompts for part in parts]), of_rows[held]))
        notice(f"--eval_split {settings.eval_split:g}: {held.sum():,} of {len(held):,} rows are held out, with "
               f"{len(np.unique(of_rows[held])):,} of {len(np.unique(prompts)):,} prompts")  # fmt: skip
        if not len(numbers):
            raise InputError(f"--eval_split {settings.eval_split:g} leaves no row to train on; give a smaller share")
    evaluated = {str(source): part.num_rows for source, part in zip(data.eval_sources, others, strict=False)}
    if settings.eval_split:
        counts = _rows_by_part(others, eval_numbers)
        for source, count in zip(data.sources, counts, strict=True):
            left_out.note("train", source, held_out=SomeRows(count, []))
            evaluated[f"{source} (--eval_split {settings.eval_split:g})"] = count
    trained = dict(zip(map(str, data.sources), _rows_by_part(parts, numbers), strict=True))
    record = left_out.record(trained, evaluated)
    if settings.data_weights is not None:
        further = choose(parts, numbers).continues
        rows_taken = weighted(source_of[numbers][~further], settings.data_weights, settings.seed, data.sources)
        numbers = numbers[texts_of(rows_taken, further)]
    examples = choose(parts, numbers)
    if len(parts) > 1 or settings.data_weights is not None:
        _tell_of_shares(data.sources, source_of[numbers], examples)
    return examples, choose(others, eval_numbers), scores, record


def _rows_by_part(parts: Sequence[Examples], numbers: np.ndarray) -> list[int]:
    """How many rows of each part the texts with these numbers are, whole ones."""
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[numbers]
    counts: list[int] = np.bincount(part_of[~choose(parts, numbers).continues], minlength=len(parts)).tolist()
    return counts


def _tell_of_shares(sources: Sequence[Source], source_of: np.ndarray, examples: Examples) -> None:
    """A line for each source: how much of an epoch it is. `source_of` is that of each text."""
    rows = np.bincount(source_of[~examples.continues], minlength=len(sources))
    texts = np.bincount(source_of, minlength=len(sources))
    tokens = np.bincount(source_of, examples.targets, len(sources))
    for source, count, several, supervised in zip(sources, *(a.tolist() for a in (rows, texts, tokens)), strict=True):
        in_texts = f" in {several:,} texts" if several > count else ""
        notice(f"{source}: {count:,} rows an epoch{in_texts}, {count / max(rows.sum(), 1):.1%} of all, with "
               f"{supervised / max(tokens.sum(), 1):.1%} of the supervised tokens")  # fmt: skip


def list_rows(
    source: str | os.PathLike[str], always: bool = False, left_out: LeftOut | None = None, use: str = "train"
) -> list[Row] | None:  # fmt: skip
    """The rows of a source; `None` where it is large, unless they are needed `always`. `left_out` notes the others, as
    of this use.

    Raises:
        InputError: as `read_rows`.
    """
    if is_large(source) and not always:
        return None
    rows, skipped = read_rows(source)
    tell_of_skipped(source, skipped)
    (left_out or LeftOut()).note(use, source, skipped=skipped)
    return rows


def make_rows(
    source: str | os.PathLike[str], rows: list[Row] | None, tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings, vocabulary: int, stop_ids: Iterable[int], accelerator: Accelerator,
    long_rows: str = "drop", left_out: LeftOut | None = None, told: bool = True, use: str = "train",
) -> Examples:  # fmt: skip
    """The tokenized rows of a source, with lines about those that cannot be used. All processes call it.

    Where they are not listed, one process a machine tokenizes them, unless that was done before, and the others wait.

    Args:
        source: a file or another source.
        rows: as `list_rows` gave them.
        tokenizer, settings, vocabulary, stop_ids: as for `noisefit.inputs.prompts.usable_examples`.
        accelerator: of the run.
        long_rows: what becomes of rows over `max_length`, as `--long_rows` has it.
        left_out: where it is noted which rows are not taken, or not whole.
        told: whether to say so.
        use: `train` or `eval`, under which it is noted.

    Raises:
        InputError: as `usable_examples`, and as `store`; no row is left; one is too long under `error`; or the
            machines have different files.
    """
    name = None
    with apart(f"tokenizing {source}"):
        if rows is None and accelerator.is_local_main_process:
            name = store(source, tokenizer, settings, vocabulary, stop_ids)
    views = gather_object([(rows is None, name)])
    names = {name for _, name in views if name is not None}
    if len({large for large, _ in views}) > 1 or len(names) > 1:
        raise InputError(
            f"{source}: it is not the same for all processes; all machines need the same file and libraries"
        )
    how, left_out = (tokenizer, settings, vocabulary, stop_ids), left_out or LeftOut()
    made: Examples
    if rows is not None:
        made, dropped, cut, several = _tokenized(source, rows, *how)
    else:
        with apart(f"reading the tokenized rows of {source}"):
            made = StoredExamples(cache_folder() / names.pop())
        dropped, cut, several = made.dropped, made.cut, made.apart
        tell_of_skipped(source, made.skipped)
        left_out.note(use, source, skipped=made.skipped)
    left_out.note(use, source, dropped=dropped, split=several, **{"cut" if long_rows == "cut" else "too_long": cut})
    if long_rows == "error" and (too_long := sorted([*dropped.first, *cut.first])):
        _refuse(source, too_long[0], rows, *how)
    if long_rows == "drop":
        made = choose([made], np.flatnonzero(~made.is_cut))
    if told:
        tell_of_turns(source, tokenizer, several)
        any_left = len(made) > 0 or rows == []
        tell_of_length(source, settings.max_length, dropped, cut, any_left, is_cut=long_rows == "cut")
    return made


def _tokenized(
    source: str | os.PathLike[str], rows: list[Row], tokenizer: PreTrainedTokenizerBase, settings: PromptSettings,
    vocabulary: int, stop_ids: Iterable[int],
) -> tuple[Examples, SomeRows, SomeRows, SomeRows]:  # fmt: skip
    """Listed rows tokenized, and which of them have no room for an answer, not for all of it, and several examples."""
    examples, numbers, dropped = usable_examples(tokenizer, rows, str(source), settings, vocabulary, stop_ids)
    prompts = {row.number: prompt_key(row) for row in rows}
    cut = dict.fromkeys(number for number, example in zip(numbers, examples, strict=True) if example.is_cut)
    made = Listed(
        examples, [number in cut for number in numbers], [prompts[number] for number in numbers], numbers
    )  # fmt: skip
    return made, SomeRows.of(dropped), SomeRows.of([*cut]), SomeRows.of(repeated(numbers))


def _refuse(
    source: str | os.PathLike[str], number: int, rows: list[Row] | None, tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings, vocabulary: int, stop_ids: Iterable[int],
) -> None:  # fmt: skip
    """`--long_rows error`: the line about the first row that is too long, which is tokenized again for its length."""
    row = next(row for row in (stream_rows(source, []) if rows is None else rows) if row.number == number)
    whole = replace(settings, max_length=NO_LIMIT)
    examples, _, _ = usable_examples(tokenizer, [row], str(source), whole, vocabulary, stop_ids)
    length = max(len(example.input_ids) for example in examples)
    raise InputError(f"{source}: row {number} has {length} tokens, and --max_length is {settings.max_length}; raise "
                     "that, or give --long_rows drop or cut")  # fmt: skip
