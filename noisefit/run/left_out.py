"""`rows.json` of an output folder: which rows a run has, and which it left out or took in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from noisefit.inputs.tables import SomeRows

ROWS = "rows.json"


@dataclass
class LeftOut:
    """What becomes of rows, noted where they are read, cut and chosen.

    Attributes:
        kinds: of each source, by its use (`train` or `eval`) and its name, the rows that are not taken as they are, by
            what becomes of them: `skipped` (an empty or missing cell), `dropped` (the prompt leaves no answer within
            `--max_length`), `too_long` (left out as `--long_rows` says), `cut` (without the end of the answer), `split`
            (taken as several texts), `held_out` (for the evaluation). The report tells others by their name.
        unknown: what `--unknown_rows` did; empty under `keep`.
    """

    kinds: dict[tuple[str, str], dict[str, SomeRows]] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)

    def note(self, use: str, source: object, **kinds: Sequence[int] | SomeRows) -> None:
        """Note rows of a source for a use, by their numbers or by how many and the first of them. What was noted before
        of a kind is replaced."""
        self.kinds.setdefault((use, str(source)), {}).update({kind: SomeRows.of(some) for kind, some in kinds.items()})

    def note_unknown(self, treatment: str, below: float, numbers: Sequence[int] | SomeRows, unscored: int) -> None:
        """Note the rows of the training data that the base model does not know.

        Args:
            treatment: `drop`, `refuse` or `weight`.
            below: the threshold on the mean log-probability of a row's decisive tokens, in nats.
            numbers: of these rows.
            unscored: rows that stay as they are, since nothing decisive was within `--max_length`.
        """
        self.unknown = {"treatment": treatment, "below": float(below), **_as_json(SomeRows.of(numbers))}
        self.unknown["unscored"] = unscored

    def record(self, train: Mapping[str, int], evaluation: Mapping[str, int]) -> dict[str, Any]:
        """The content of `rows.json`.

        Args:
            train, evaluation: from a source's name to the rows that the run has of it, each once, however often its
                weight repeats it.
        """
        both = {"train": train, "eval": evaluation}
        found: dict[str, Any] = {
            use: [{"source": name, "rows": int(rows)} | self._noted(use, name) for name, rows in sources.items()]
            for use, sources in both.items()
        }
        return found | ({"unknown": self.unknown} if self.unknown else {})

    def _noted(self, use: str, name: str) -> dict[str, Any]:
        return {kind: _as_json(some) for kind, some in self.kinds.get((use, name), {}).items() if some.number}


def _as_json(some: SomeRows) -> dict[str, Any]:
    return {"number": int(some.number), "first": [int(number) for number in some.first]}
