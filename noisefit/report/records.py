"""What a run noted beside its metrics: answers that it drew while it trained, and the rows that it left out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError
from noisefit.base.schema import COUNT, MEASURE, NUMBER, OBJECT, TEXT, Maybe, checked
from noisefit.report.files import parse, read_bytes, read_object

SAMPLE = {"step": NUMBER, "prompt": TEXT, "response": Maybe(TEXT), "generated_response": TEXT, "logprob": MEASURE,
          "outcome": Maybe(TEXT)}  # fmt: skip
SOURCE = {"source": TEXT, "rows": COUNT}
SOME = {"number": COUNT, "first": [COUNT]}
UNKNOWN = SOME | {"treatment": TEXT, "below": NUMBER, "unscored": COUNT}
DRAWING = {"about": {"skipped": Maybe(SOME)}}
ROWS = {"train": [OBJECT], "eval": (OBJECT,), "unknown": Maybe(UNKNOWN)}
NAMED = 5  # lines that cannot be read


@dataclass(frozen=True)
class Sample:
    """An answer to a prompt of the evaluation, drawn after a step of the training.

    Attributes:
        step: how many optimizer steps were taken.
        prompt, reference, answer: what was asked, the response of the data, and what the model said.
        logprob: natural logarithm of the answer's probability; NaN where it is not known.
        outcome: `right`, `wrong` or `not_attempted`; empty where it is not known.
    """

    step: float
    prompt: str
    reference: str
    answer: str
    logprob: float
    outcome: str


@dataclass(frozen=True)
class SourceRecord:
    """A source of rows: how many the run has of it, and by what became of the others how many, and the first's
    numbers."""

    source: str
    rows: int
    others: dict[str, tuple[int, list[int]]]


@dataclass(frozen=True)
class RowsRecord:
    """`rows.json` of a run; `unknown` as it stands there, `None` under `--unknown_rows keep`."""

    train: list[SourceRecord]
    evaluation: list[SourceRecord]
    unknown: dict[str, Any] | None


def read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    """The samples of `samples.jsonl`, none where there is no such file; and a sentence on the lines that are none.

    A sample more or less is no reason to show nothing. The last line may be torn, and is not counted.
    """
    found, unreadable = [], []
    rows = (read_bytes(path) or b"").split(b"\n")
    for number, text in enumerate(rows, 1):
        if not text.strip():
            continue
        try:
            line = checked(parse(text), SAMPLE, str(path))
        except (ValueError, RecursionError, InputError):
            unreadable += [number] if number < len(rows) else []
            continue
        found.append(Sample(line["step"], line["prompt"], line["response"] or "", line["generated_response"],
                            line["logprob"], line["outcome"] or ""))  # fmt: skip
    if not unreadable:
        return found, []
    named = ", ".join(map(str, unreadable[:NAMED])) + (", ..." if len(unreadable) > NAMED else "")
    return found, [f"{path.name}: left out as no samples: {len(unreadable)} lines (line {named})."]


def read_rows_record(path: Path) -> RowsRecord | None:
    """`rows.json`; `None` where there is no such file.

    Raises:
        InputError: it is none that a run wrote.
    """
    content = read_object(path, ROWS)
    if content is None:
        return None
    train, evaluation = ([_source(entry, f"{path}: {key}[{i}]") for i, entry in enumerate(content[key])]
                         for key in ("train", "eval"))  # fmt: skip
    return RowsRecord(train, evaluation, content["unknown"])


def _source(entry: dict[str, Any], where: str) -> SourceRecord:
    about = checked(entry, SOURCE, where)
    some = {key: checked(value, SOME, f"{where}: {key}") for key, value in entry.items() if isinstance(value, dict)}
    return SourceRecord(about["source"], about["rows"], {key: (s["number"], s["first"]) for key, s in some.items()})


def read_drawing(path: Path) -> tuple[dict[str, str], tuple[int, list[int]]] | None:
    """What stands beside answers: the settings that are set, by name; and how many rows of the input had no prompt,
    with the numbers of the first. `None` where there is no such file.

    Raises:
        InputError: it is none that `generate.py` wrote.
    """
    content = read_object(path, DRAWING)
    if content is None:
        return None
    plain = {name: value for name, value in content.items() if value is not None and not isinstance(value, dict)}
    skipped = content["about"]["skipped"] or {"number": 0, "first": []}
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in plain.items()}
    return words, (skipped["number"], skipped["first"])
