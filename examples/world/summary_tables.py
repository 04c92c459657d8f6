"""The tables that summary.py prints, as title, header and cells: those of the first world, and of the second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile

import pandas as pd
from paired import AT_MATCHED, MEAN, OWN, RATE, RATIO, SIMULTANEOUS
from results import BANDS
from risk import KINDS

Tables = dict[str, dict[str, list[str]]]

FAME = tuple(f"{RATE}_{band}" for band in (*BANDS, "new_phrasing"))
REFUSALS = ("refused_known", "refused_unknown", "refused_false_premise")
OTHERS = (
    "invented_rate", *REFUSALS, "self_consistency", "calibration_error", "brier", "train_accuracy",
    "train_untold_accuracy",
)  # fmt: skip
AS_THEY_COME = ("right_rate", "wrong_rate", "best_right_minus_wrong", "auroc", "aurc")
SWEPT = {
    RATE: (RATE, *OTHERS, RATIO, "noise_to_signal"),
    AT_MATCHED: (AT_MATCHED, "right_rate", "wrong_rate", RATE, "refused_unknown", "auroc"),
}
# The others are shown in percent.
DIGITS = {"calibration_error": 3, "brier": 3, RATIO: 2, "noise_to_signal": 4, "auroc": 3, "aurc": 3, "hidden_growth": 3}
TIME = "training time, ratio"


def show(values: Iterable[float], measure: str, sign: str = "") -> str:
    """A mean, or one with the ends of its interval, in the unit of the tables; signed with "+"; a dash for NaN."""
    factor, digits = (1, DIGITS[measure]) if measure in DIGITS else (100, 1)
    known = [factor * value for value in values if math.isfinite(value)]
    texts = [f"{round(value, digits) + 0.0:{sign}.{digits}f}" for value in known]  # + 0.0, as -0.0 says nothing
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(texts) == 3 else "".join(texts) or "-"


def make_tables(summary: pd.DataFrame, against: str | None, primary: str = RATE) -> Tables:
    """The tables to read, of what `summarise` returns for this primary figure; without `against`, the means."""
    table = _Columns(summary, against, primary)
    if against is None:
        shown = {measure: table.column(measure, MEAN[:1]) for measure in SWEPT[primary]}
        common = _common(table.methods)
        rest = [method[len(common) :].removeprefix(":") for method in table.methods]
        title = f"Means; all methods begin with {common}" if common else "Means"
        return {title: table.head | {"method": rest} | shown}
    return _of_answering(table) if primary == AT_MATCHED else _of_rate(table)


def _of_rate(table: _Columns) -> Tables:
    """The first world's."""
    main = table.main("rate, %") | {TIME: table.column(RATIO, OWN)}
    fame = {measure.removeprefix(f"{RATE}_"): table.column(measure, MEAN) for measure in FAME}
    units = "differences in points (calibration_error, brier: as is)"
    return {
        f"Hallucination rate, 95% intervals, those of differences simultaneous; {table.least}": table.head | main,
        "Hallucination rate by fame, %, 95% intervals; [n]: of n seeds only": table.head | fame,
        f"Means of {table.against}, {units}; * Holm p < 0.05": table.head | table.differences(OTHERS),
    }


def _of_answering(table: _Columns) -> Tables:
    """The second world's."""
    main = table.main("wrong, %") | {"of which right missing": table.column("matched_shortfall", MEAN[:1])}
    kinds = table.means(("wrong_rate", *KINDS))
    refusals = table.means((RATE, *REFUSALS))
    others = table.means(("self_consistency", "hidden_growth")) | {TIME: table.column(RATIO, OWN)}
    others |= table.means(("train_untold_accuracy",))
    stars = f"* Holm p < 0.05 against {table.against}"
    return {
        f"Wrong at matched right, 95% intervals, those of differences simultaneous; {table.least}": table.head | main,
        f"As they come, means of {table.against}, differences in points (auroc, aurc: as is); * Holm p < 0.05":
            table.head | table.differences(AS_THEY_COME),
        f"Errors by kind, % of all questions; {stars}": table.head | kinds,
        f"Told facts wrong ({RATE}) and refusals, % of the questions of their kind; {stars}": table.head | refusals,
        f"Agreement and cost, % (hidden_growth: as is); [n]: of n seeds only; {stars}":
            table.head | others,
    }  # fmt: skip


class _Columns:
    """Columns of cells, a cell for each method of a summary.

    A cell says where its measure has fewer seeds, or pairs, than the primary figure.
    """

    def __init__(self, summary: pd.DataFrame, against: str | None, primary: str):
        self.summary, self.against, self.primary = summary, against, primary
        self.of_primary = summary.loc[primary]
        self.methods = list(self.of_primary.index)
        self.head = {"method": self.methods, "seeds": [str(count) for count in self.of_primary["seeds"]]}

    @property
    def least(self) -> str:
        """What no p value can be less than."""
        family, most = self.of_primary["p"].count(), self.of_primary["pairs"].max()
        return f"with {most} pairs, no Holm p of {family} methods is under {min(1, family / 2 ** (most - 1)):.2g}"

    def column(self, measure: str, names: Sequence[str], sign: str = "") -> list[str]:
        """These columns of the summary, in one."""
        count = "seeds" if names[0] == "mean" else "pairs"
        counts = zip(self.summary.loc[measure, count], self.of_primary[count], strict=True)
        few = [f" [{n}]" if n < most else "" for n, most in counts]
        values = self.summary.loc[measure, list(names)].to_numpy(float)
        return [show(row, measure, sign) + note for row, note in zip(values, few, strict=True)]

    def main(self, mean: str) -> dict[str, list[str]]:
        """The primary figure with its intervals and p values; `mean` is its head."""
        against = self.column(self.primary, SIMULTANEOUS, "+")
        columns = {mean: self.column(self.primary, MEAN), f"against {self.against}, points": against}
        columns["pairs"] = [str(count or "-") for count in self.of_primary["pairs"]]
        columns["Holm p"] = [f"{p:.3f}" if p >= 0 else "-" for p in self.of_primary["holm_p"]]
        return columns

    def means(self, measures: Iterable[str]) -> dict[str, list[str]]:
        """The means of every method, starred where they differ from those of `against`."""
        columns = {}
        for measure in measures:
            cells = zip(self.column(measure, MEAN[:1]), self._stars(measure), strict=True)
            columns[measure] = list(map("".join, cells))
        return columns

    def differences(self, measures: Iterable[str]) -> dict[str, list[str]]:
        """The means of `against`, and the differences of the others to it, starred."""
        columns = {}
        for measure in measures:
            changes = zip(self.column(measure, OWN[:1], "+"), self._stars(measure), strict=True)
            cells = zip(self.methods, self.column(measure, MEAN[:1]), changes, strict=True)
            columns[measure] = [mean if name == self.against else "".join(change) for name, mean, change in cells]
        return columns

    def _stars(self, measure: str) -> list[str]:
        return ["*" if p < 0.05 else "" for p in self.summary.loc[measure, "holm_p"]]


def _common(methods: Sequence[str]) -> str:
    """What several names of methods, that is, their parts up to a colon, begin with; of each a part is left over."""
    parts = [method.split(":")[:-1] for method in methods]
    same = takewhile(lambda level: len(set(level)) == 1, zip(*parts)) if len(methods) > 1 else ()  # noqa: B905
    return ":".join(level[0] for level in same)


def print_table(title: str, columns: dict[str, list[str]], markdown: bool) -> None:
    """Prints a table with its columns aligned."""
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    print(f"{title}:\n")
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    print()
