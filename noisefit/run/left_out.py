"""`rows.json` of an output folder: which rows a run has, and which it left out or took in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from noisefit.inputs.tables import SomeRows
from noisefit.run.output_folder import OutputFolder

ROWS = "rows.json"
# What may become of a row that is not taken as it is; a source may have others besides, which are told by their names.
KINDS = {
    "skipped": "with an empty or missing cell, left out",
    "dropped": "whose prompt leaves no answer within --max_length, left out",
    "too_long": "longer than --max_length, left out as --long_rows says",
    "cut": "with the end of the answer cut at --max_length",
    "split": "longer than --max_length, taken in pieces",
    "held_out": "taken for the evaluation",
}


@dataclass(frozen=True)
class SourceRows:
    """What a run took of one source of rows.

    Attributes:
        source: as the flag names it: a file, a folder's file, a data set on the hub with its split.
        rows: those that the run has of it, each once, however often its weight repeats them.
        others: by a key of `KINDS`, the rows that this became of: their numbers, or how many and the first of them.
    """

    source: str
    rows: int
    others: Mapping[str, Sequence[int] | SomeRows] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As it stands in `rows.json`; a kind without rows is left out."""
        counted = {kind: SomeRows.of(numbers) for kind, numbers in self.others.items()}
        return {"source": self.source, "rows": self.rows} | {
            kind: {"number": some.number, "first": list(map(int, some.first))}
            for kind, some in counted.items()
            if some.number
        }


@dataclass(frozen=True)
class UnknownRows:
    """What `--unknown_rows` other than `keep` did.

    Attributes:
        treatment: `drop`, `refuse` or `weight`.
        below: the threshold on the mean log-probability of a row's decisive tokens, in nats.
        numbers: of the rows of `--train_data` that the base model does not know.
        unscored: rows that stay as they are, since nothing decisive was within `--max_length`.
    """

    treatment: str
    below: float
    numbers: Sequence[int] | SomeRows
    unscored: int = 0

    def record(self) -> dict[str, Any]:
        """As it stands in `rows.json`."""
        some = SomeRows.of(self.numbers)
        found = {"treatment": self.treatment, "below": float(self.below), "number": some.number}
        return found | {"first": list(map(int, some.first)), "unscored": self.unscored}


def write_rows(
    output: OutputFolder, train: Sequence[SourceRows], evaluation: Sequence[SourceRows] = (),
    unknown: UnknownRows | None = None,
) -> None:  # fmt: skip
    """Write `rows.json`, whole or not at all. The main process calls it.

    Args:
        output: the run's folder.
        train, evaluation: the sources, in the order of the flags.
        unknown: what became of rows that the base model does not know; `None` under `--unknown_rows keep`.

    Raises:
        LocalError: it cannot be written.
    """
    content: dict[str, Any] = {"train": [source.record() for source in train]}
    content["eval"] = [source.record() for source in evaluation]
    output.write_json(ROWS, content | ({} if unknown is None else {"unknown": unknown.record()}))
