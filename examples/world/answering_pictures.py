"""The pictures of the second world alone: what unknown rows cost, and risk against coverage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from drawing import COLOURS, OTHER, SEEDS, WIDTH, Styles, look
from matplotlib.figure import Figure
from methods import COMMON
from paired import RATE
from results import MATCHED, PLAIN, read_results
from risk import matched, reached

from noisefit.base.errors import InputError

SHARE_RUN = re.compile(r"basefit:(?:unknown_share=(?P<share>[\d.]+)|told_only)(?::epochs=(?P<epochs>\d+))?")
ORACLE = "told_only"
FARTHEST = 1.5  # the largest share of plain fine-tuning's right answers that is looked at
LEFT = -9  # where the oracle stands on the axis of shares, in percent


def unknown_share_lines(runs: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The hallucination rate in percent, by seed and share of unknown rows, for each number of epochs.

    A line is of the seeds that have all of its shares. `ORACLE` is a column, too: all told rows, and no others.

    Raises:
        InputError: there are no two shares with a seed in common.
    """
    found: dict[int, dict[float | str, pd.Series]] = {}
    for method in runs.index.unique("method"):
        if match := SHARE_RUN.fullmatch(method):
            share = ORACLE if match["share"] is None else float(match["share"])
            found.setdefault(int(match["epochs"] or COMMON["epochs"]), {})[share] = 100 * runs[RATE][method]
    lines = {}
    for epochs in sorted(found):
        shares = sorted(share for share in found[epochs] if share != ORACLE)
        line = pd.DataFrame({share: found[epochs][share] for share in shares}).dropna()
        if len(shares) > 1 and len(line):
            lines[epochs] = line.assign(**{ORACLE: found[epochs].get(ORACLE, np.nan)})
    if not lines:
        raise InputError("unknown_share: there are no runs of basefit:unknown_share= with two shares on one seed")
    return lines


def draw_unknown_share(lines: Mapping[int, pd.DataFrame]) -> Figure:
    """The curve of Gekhman et al. (arXiv 2405.05904): what rows on unknown facts cost of the known ones.

    `lines` as from `unknown_share_lines`: a line each, dots for seeds, and hollow the oracle.
    """
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    for index, (epochs, found) in enumerate(lines.items()):
        style, line, oracle = look(3 + index), found.drop(columns=ORACLE), found[ORACLE].dropna()
        places = 100 * line.columns.to_numpy(float)
        axes.plot(places, line.mean(), **style, markersize=8, label=f"{epochs} epochs")
        for place, share in zip(places, line, strict=True):
            axes.scatter([place] * len(line), line[share], color=style["color"], zorder=3, **SEEDS)
        if len(oracle):
            axes.plot(LEFT, oracle.mean(), **style, markersize=9, markerfacecolor="white", linestyle="none")
            axes.scatter([LEFT] * len(oracle), oracle, color=style["color"], zorder=3, **SEEDS)
    shares = sorted({share for found in lines.values() for share in found if share != ORACLE})
    axes.set_xticks(
        [LEFT, *(100 * share for share in shares)], ["oracle: told\nrows alone", *(f"{share:.0%}" for share in shares)]
    )
    axes.axvline(LEFT / 2, color="0.8", linewidth=0.8, linestyle="--")
    axes.set_xlim(left=1.6 * LEFT)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of training rows on facts that the model was never told")
    axes.set_ylabel("told facts answered wrong, %; dots are seeds")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.legend(loc="upper left", bbox_to_anchor=(0.2, 1))
    return figure


@dataclass(frozen=True)
class Curve:
    """Risk against coverage of one run: see `risk.wrong_by_right`."""

    wrong: tuple[int, ...]
    asked: int

    @property
    def right(self) -> int:
        """How many right answers it has."""
        return len(self.wrong) - 1


@dataclass(frozen=True)
class RiskLine:
    """Risk against coverage of a method, the mean over worlds, in percent of all questions."""

    right: np.ndarray  # (n,), right answers that are let through, from none on
    wrong: np.ndarray  # (n,), the wrong ones that come with them
    matched: tuple[float, float]  # where the primary figure is measured; missing right answers count as wrong
    whole: bool  # whether no world's run misses any there: it is then a point of the line


def read_curves(path: Path, size: str) -> dict[str, dict[int, Curve]]:
    """The curves of a results file's runs on worlds of a size, by method and seed; earlier runs have none.

    Raises:
        InputError: it is no such file.
    """
    curves: dict[str, dict[int, Curve]] = {}
    for row in read_results(path):
        if row["size"] == size and row["wrong_by_right"]:
            curve = Curve(tuple(map(int, row["wrong_by_right"].split())), int(row["asked"]))
            curves.setdefault(row["method"], {})[int(row["seed"])] = curve
    return curves


def risk_lines(curves: Mapping[str, Mapping[int, Curve]], chosen: Mapping[str, str]) -> tuple[dict[str, RiskLine], int]:
    """The mean curve of each method over the worlds on which all of them, and plain fine-tuning, have been run.

    A point is the mean over worlds where each lets through the same share of its plain run's right answers; so the
    primary figure lies on the line. The line ends where one of the worlds' runs has no more right answers: beyond it
    the mean would be of other worlds than before it.

    Args:
        curves: as from `read_curves`.
        chosen: methods, by the names of their lines.

    Returns:
        Lines, and how many worlds they are of.

    Raises:
        InputError: there is no such world.
    """
    seeds = sorted(set.intersection(*(set(curves.get(method, ())) for method in (PLAIN, *chosen.values()))))
    if not seeds:
        raise InputError(
            f"risk_coverage_answering: there is no seed on which {PLAIN} and all methods shown have a curve"
        )
    lines = {}
    for name, method in chosen.items():
        points = []
        for share in np.arange(0, 100 * FARTHEST + 1) / 100:
            runs = [(curves[method][seed], share * curves[PLAIN][seed].right) for seed in seeds]
            found = [(reached(wanted) / run.asked, *matched(run.wrong, run.asked, wanted)) for run, wanted in runs]
            points.append((*100 * np.mean(found, axis=0),))
        right, wrong, short = np.array(points).T
        there, at = short == 0, round(100 * MATCHED)
        lines[name] = RiskLine(right[there], wrong[there], (right[at], wrong[at]), bool(there[at]))
    return lines, len(seeds)


def draw_risk_coverage(lines: Mapping[str, RiskLine], worlds: int, styles: Styles) -> Figure:
    """A line for each method, with a mark where right answers are matched; in the legend the highest there is first.

    `lines` and `worlds` as from `risk_lines`.
    """
    figure = Figure(figsize=(WIDTH, 5.4))
    axes = figure.subplots()
    for place, name in enumerate(sorted(lines, key=lambda name: -lines[name].matched[1])):
        style, line = styles.get(name, OTHER), lines[name]
        again = name in list(styles)[len(COLOURS) :]  # a colour that another line has
        label = f"{line.matched[1]:.1f}%  {name}"
        axes.plot(line.right, line.wrong, color=style["color"], linewidth=1.4, linestyle="--" if again else "-")
        axes.plot(*line.matched, **style, markersize=8, linestyle="none", label=label, zorder=3 + place / 100,
                  markerfacecolor=style["color"] if line.whole else "white")  # fmt: skip
    axes.axvline(next(iter(lines.values())).matched[0], color="0.7", linewidth=1, linestyle=":", zorder=0)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("right answers let through, % of all questions")
    axes.set_ylabel("wrong answers let through, % of all questions")
    axes.set_title(f"Mean of {worlds} worlds; marked at {MATCHED:.0%} of plain fine-tuning’s right answers")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    missing = (
        "" if all(line.whole for line in lines.values()) else "\n(hollow: right ones missing are counted as wrong)"
    )
    axes.legend(loc="upper left", title=f"Wrong at matched right{missing}", alignment="left")
    return figure
