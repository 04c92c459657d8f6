"""Reading the answers of `generate.py`, and what a file says of the truth and of confidence."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from noisefit.answers.scoring import Prompt
from noisefit.base.errors import InputError
from noisefit.base.files import read_text
from noisefit.inputs.columns import Needed, check_renames, parse_columns
from noisefit.inputs.sources import Source
from noisefit.inputs.tables import ANY_ROWS, BEFORE_ABSTAINING, Row, asked_row, name_rows, read_records, text_cell
from noisefit.method.decisive import words

NEEDED: tuple[Needed, ...] = (*ANY_ROWS, "generated_response")
LOGPROB = "logprob"
ALIASES = ("answers", "aliases")


def read_answers(path: str, by: str | None, before_abstaining: bool = False) -> list[Prompt]:
    """The answers of a file, a prompt with all its rounds each, in order of first appearance.

    Args:
        path: the file.
        by: the column by whose values prompts are grouped, if any.
        before_abstaining: take the answers as they were before `--abstain_below` replaced some, where it did.

    Raises:
        InputError: as `read_records`; a row without prompt or reference; one prompt with two references or groups; a
            round with fewer answers than another; a list of true answers that is none; a log-probability that is none,
            or missing in some rows.
    """
    found: dict[str, dict[str, Any]] = {}
    rounds: Counter[str] = Counter()
    without: list[int] = []
    for row, record in read_records(path, (*NEEDED, by) if by else NEEDED):
        asked = asked_row(path, row, record)
        reference = reference_of(path, row, record, asked)
        if asked is None or not reference:
            raise InputError(f"{path}: row {row}: prompt or response is empty: nothing to compare with")
        prompt = asked.asked
        facts = {
            "response": reference,
            **{column: answer_cell(path, row, column, record.get(column)) for column in ("answer", "question")},
            **{column: texts_cell(path, row, column, record.get(column)) for column in ALIASES},
        }
        if by and by not in ALIASES:
            facts[by] = answer_cell(path, row, by, record.get(by))
        facts["question"] = facts["question"] or (asked.prompt if asked.history else "")
        entry = found.setdefault(prompt, {"facts": facts, "answers": [], "logprobs": [], "row": row, "empty": False})
        for column, value in facts.items():
            if entry["facts"][column] != value:
                raise InputError(f"{path}: rows {entry['row']} and {row} give one prompt two values of {column!r}")
        entry["empty"] |= is_unanswerable(record, facts["answer"], facts["answers"] or facts["aliases"])
        answer = BEFORE_ABSTAINING if before_abstaining and BEFORE_ABSTAINING in record else "generated_response"
        entry["answers"].append(answer_cell(path, row, answer, record.get(answer)))
        logprob = _logprob(path, row, record.get(LOGPROB))
        entry["logprobs"].append(logprob)
        without += [row] if logprob is None else []
        rounds[str(record.get("round"))] += 1
    if not found:
        raise InputError(f"{path}: it has no rows")
    if len(set(rounds.values())) > 1:
        counts = ", ".join(f"{count} of round {name}" for name, count in rounds.items())
        raise InputError(f"{path}: answers are missing: {counts}")
    some = len(without) < sum(rounds.values())
    if without and some:
        raise InputError(
            f"{path}: {name_rows(without)}: no {LOGPROB}, which other rows have; expected one in every row, or the "
            "column left out"
        )
    return [
        Prompt(
            prompt, facts["response"], tuple(entry["answers"]), facts["answer"], _group(facts, by), facts["question"],
            tuple(dict.fromkeys((*facts["answers"], *facts["aliases"]))), entry["empty"],
            tuple(entry["logprobs"]) if some else None,
        )
        for prompt, entry in found.items()
        for facts in [entry["facts"]]
    ]  # fmt: skip


def with_columns(path: str, columns: Sequence[str] | None) -> Source:
    """A file as it is read under `--columns`, to be written with its other columns, none of which may be lost.

    Raises:
        InputError: as `parse_columns` and `check_renames`; a row has a column that is renamed, and one of the
            new name; or as `read_records`.
    """
    renames = parse_columns(columns)
    any_of_them: Needed = ((*renames, *renames.values()), ())
    for number, record in read_records(path, (any_of_them,), others=False) if renames else ():
        for name, given in renames.items():
            if name != given and name in record and given in record and name not in renames.values():
                raise InputError(f"{path}: row {number}: --columns {name}={given}: it has a column {name!r} too, which "
                                 "would be lost; rename or remove one of them")  # fmt: skip
    source = Source(path, path, renames)
    if renames:
        check_renames(renames, {path: source.column_names()})
    return source


def answer_cell(path: str, row: int, column: str, value: Any) -> str:
    """`text_cell` of a file of answers: in JSON Lines a truth or a group may be a number, which is its text here."""
    return text_cell(path, row, column, str(value) if isinstance(value, int | float) else value)


def reference_of(path: str, row: int, record: Mapping[str, Any], asked: Row | None) -> str:
    """The true answer that stands in a record: its `response`, else the last turn of its conversation."""
    return answer_cell(path, row, "response", record.get("response")) or (asked.response if asked else "")


def is_unanswerable(record: Mapping[str, Any], answer: Collection[str], listed: Collection[str]) -> bool:
    """Whether the column `answer` is there and empty, with no list of true answers beside it: a refusal is right."""
    return record.get("answer") is not None and not answer and not listed


def read_phrases(path: str | None) -> tuple[str, ...]:
    """The phrases of `--refusals FILE`, one a line; empty lines are none.

    Raises:
        InputError: the file cannot be read, or has no phrase, or a line without a word.
    """
    if path is None:
        return ()
    lines = [(number, line.strip()) for number, line in enumerate(read_text(Path(path), "--refusals ").split("\n"), 1)]
    phrases = {number: line for number, line in lines if line}
    if not phrases:
        raise InputError(f"--refusals {path}: it has no lines; expected a phrase that refuses on each")
    for number, phrase in phrases.items():
        if not words(phrase):
            raise InputError(f"--refusals {path}: line {number}: {phrase[:40]!r} has no word; expected a phrase as it "
                             "stands in answers, no pattern")  # fmt: skip
    return tuple(phrases.values())


def _group(facts: dict[str, Any], by: str | None) -> str:
    value = facts[by] if by else ""
    return value if isinstance(value, str) else ", ".join(value)


def texts_cell(path: str, row: int, column: str, cell: Any) -> tuple[str, ...]:
    """A list of true answers: as JSON where the cell is text; empty ones are left out."""
    if isinstance(cell, str) and cell.strip():
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    elif isinstance(cell, str) or cell is None:
        return ()
    if not isinstance(cell, list) or not all(isinstance(text, str) for text in cell):
        raise InputError(
            f'{path}: row {row}: {column} is {str(cell)[:40]!r}, expected a list of texts, in a CSV as JSON: ["a", "b"]'
        )
    return tuple(stripped for text in cell if (stripped := text.strip()))


def _logprob(path: str, row: int, cell: Any) -> float | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        value = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not -math.inf < value <= 0:
        raise InputError(f"{path}: row {row}: {LOGPROB} is {str(cell)[:40]!r}, expected a number that is at most 0")
    return value
