"""What the page says of what is not there: rows that a run left out, and what the page itself does not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from noisefit.report.html import items, section, table, text
from noisefit.report.records import RowsRecord, SourceRecord
from noisefit.report.runs import Run

# Kinds of `rows.json`. One that is not here is told by its name.
KINDS = {
    "skipped": "left out, as a cell is empty or missing",
    "dropped": "left out, as the prompt leaves no answer within --max_length",
    "too_long": "left out, as they are longer than --max_length (--long_rows)",
    "cut": "taken without the end of the answer, which --max_length cuts",
    "split": "taken as several texts",
    "held_out": "held out for the evaluation",
}
TREATMENTS = {
    "drop": "left out",
    "refuse": "trained with a refusal for an answer",
    "weight": "trained with less weight",
}


def left_out_section(runs: Sequence[Run], others: Mapping[str, Sequence[str]]) -> str:
    """The rows that each run has and has not, and what the page does not show of the runs and of `others`, by name."""
    parts = []
    for run in runs:
        if run.rows is not None:
            parts += [f"<h3>{_heading('Rows', run.name, runs)}</h3>", *_rows_of(run.rows)]
    for name, lines in [*((run.name, run.not_shown) for run in runs), *others.items()]:
        if lines:
            parts += [f"<h3>{_heading('Not on this page', name, [*runs, *others])}</h3>", items(lines)]
    return section("left-out", "What was left out", *parts) if parts else ""


def _heading(what: str, name: str, all_of_them: Sequence[object]) -> str:
    return text(what if len(all_of_them) == 1 else f"{what}: {name}")


def _rows_of(record: RowsRecord) -> list[str]:
    sources = [("training", source) for source in record.train]
    sources += [("evaluation", source) for source in record.evaluation]
    parts = [table(["Source", "For", "Rows"], [[source.source, use, source.rows] for use, source in sources])]
    lines = [f"{source.source}, {use}: {line}" for use, source in sources for line in _lines(source)]
    if record.unknown is not None:
        found = record.unknown
        what = TREATMENTS.get(found["treatment"], found["treatment"])
        lines.append(f"{_count(found['number'])} that the base model does not know (below {found['below']:.4g}) "
                     f"{_are(found['number'])} {what}{_named(found['number'], found['first'])}")  # fmt: skip
        if found["unscored"]:
            lines.append(f"{_count(found['unscored'])} could not be told known or unknown, as nothing decisive was "
                         "within --max_length, and stayed")  # fmt: skip
    return [*parts, items(lines) if lines else "<p>All rows were taken whole.</p>"]


def _lines(source: SourceRecord) -> list[str]:
    return [
        f"{_count(number)} {_are(number)} {KINDS.get(kind, kind.replace('_', ' '))}{_named(number, first)}"
        for kind, (number, first) in source.others.items()
        if number
    ]


def _count(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _named(number: int, first: Sequence[int]) -> str:
    named = ", ".join(map(str, first))
    return f" (row {named}{', …' if len(first) < number else ''})" if first else ""
