"""Draws the results of compare.py: PNGs with a dot for each seed, and means with their 95% intervals.

    python examples/world/pictures.py build/compare/results.csv --output build/compare --sweep build/sweep/results.csv

The intervals of differences are simultaneous over the methods of a picture. The same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import HEADLINE
from results import BANDS
from summary import MEAN, RATE, SIMULTANEOUS, choose_methods, make_parser, pairs, read_runs, summarise

from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.files import writing
from noisefit.base.settings import default_text, fields_of
from noisefit.run.settings import Settings

WIDTH, DPI = 9, 150  # inches; shown at 900 pixels, 11 points are 15 pixels
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "figure.constrained_layout.use": True, "legend.frameon": False,
}  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers tell apart; shapes tell them apart in grey.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999")
MARKERS = "osD^vPX*"
SEEDS = {"s": 14, "alpha": 0.4, "linewidths": 0}
DEFAULTS = {field.name: default_text(field) for field in fields_of(Settings)}
ABLATION = "#777777"


def look(index: int) -> dict[str, str]:
    """The colour and shape of the line of this number."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def draw_rows(axes: Axes, rows: Mapping[str, tuple[Iterable[float], Sequence[float]]]) -> None:
    """Draws a row for each method: a dot for each seed, the mean, and the interval where there is one.

    Args:
        axes: whose horizontal axis has the values.
        rows: for each method its values and (mean, low, high), in percent or as they are.
    """
    for place, (name, (values, (mean, low, high))) in enumerate(rows.items()):
        style = look(list(HEADLINE).index(name)) if name in HEADLINE else {"color": ABLATION, "marker": "o"}
        values = list(values)
        spread = place + np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [place] * len(values)
        axes.scatter(values, spread, color=style["color"], **SEEDS)
        if np.isfinite(low):
            axes.plot([low, high], [place, place], color=style["color"], linewidth=2.2, solid_capstyle="butt")
        axes.plot(mean, place, **style, markersize=7)
    axes.set_yticks(range(len(rows)), [name.replace(":", "\n") for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.8)


def row_figure(panels: int, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side with the same rows, high enough for the methods' names."""
    lines = max(1.8, *(name.count(":") + 1.4 for name in names))  # of every row, as they are equally high
    figure = Figure(figsize=(WIDTH, 1.4 + 0.2 * lines * len(names)))
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def draw_differences(
    runs: pd.DataFrame, summary: pd.DataFrame, against: str, measures: Mapping[str, tuple[str, float]]
) -> Figure:
    """Each method's difference to another on the same seed, with simultaneous intervals; a panel for each measure.

    Args:
        runs, summary: as from `read_runs` and `summarise`.
        against: the other method.
        measures: for each, the label of its axis, and the factor from its unit to the label's.
    """
    names = [name for name in summary.loc[RATE].index if name != against]
    figure, panels = row_figure(len(measures), names)
    for axes, (measure, (label, factor)) in zip(panels, measures.items(), strict=True):
        interval = factor * summary.loc[measure, list(SIMULTANEOUS)].astype(float)
        draw_rows(axes, {name: (factor * pairs(runs, name, against, measure), interval.loc[name]) for name in names})
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(label)
    return figure


def draw_refusals(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """The share of questions that each method refuses, by whether there was something to know."""
    names = list(summary.loc[RATE].index)
    figure, panels = row_figure(3, names)
    kinds = {"refused_known": "told facts\n(fewer is better)", "refused_unknown": "untold facts\n(more is better)",
             "refused_false_premise": "no such country\n(more is better)"}  # fmt: skip
    for axes, (measure, title) in zip(panels, kinds.items(), strict=True):
        interval = 100 * summary.loc[measure, list(MEAN)].astype(float)
        draw_rows(axes, {name: (100 * runs[measure][name].dropna(), interval.loc[name]) for name in names})
        axes.set_title(title)
        axes.set_xlabel("refused, %")
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    figure.suptitle("Share of “I do not know” among the answers to questions on …")
    return figure


def draw_fame(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """The hallucination rate by how often the corpus told the fact; a line for each headline method."""
    figure = Figure(figsize=(WIDTH, 5))
    axes = figure.subplots()
    names = [name for name in summary.loc[RATE].index if name in HEADLINE]
    for index, name in enumerate(names):
        style, shift = look(list(HEADLINE).index(name)), 0.06 * (index - (len(names) - 1) / 2)
        places = np.arange(len(BANDS)) + shift
        mean, low, high = (100 * np.array([summary.loc[(f"{RATE}_{band}", name), column] for band in BANDS])
                           for column in MEAN)  # fmt: skip
        axes.plot(places, mean, **style, linewidth=1, markersize=7, label=name)
        axes.vlines(places, low, high, color=style["color"], linewidth=2)
        for place, band in zip(places, BANDS, strict=True):
            values = 100 * runs[f"{RATE}_{band}"][name].dropna()
            axes.scatter([place] * len(values), values, color=style["color"], **SEEDS)
    axes.set_xticks(range(len(BANDS)), BANDS)
    axes.set_xlabel("fame: how often the corpus told the fact")
    axes.set_ylabel("hallucination rate, %")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=1.2)
    return figure


def swept(method: str) -> tuple[str, str, float | None] | None:
    """Where a method of a sweep is drawn: the flag of its axis, the name of its line, and its place on the axis.

    The place is None for several scale factors, among which `auto` chooses; a method without layer noise is None.
    """
    name, *changes = method.split(":")
    if name.split("_")[0] not in ("snr", "auto"):
        return None
    flags = dict(change.partition("=")[::2] for change in changes)
    flag, count = ("auto_scale_factors", "auto_max_layers") if name == "auto" else ("noise_std", "num_noise_layers")
    value, layers = (flags.pop(name, DEFAULTS[name]) for name in (flag, count))
    number = f", {layers} layer{'s' * (layers != '1')}" if layers != "0" else ""
    line = name + number + "".join(f", {other}={value}" for other, value in flags.items())
    try:
        return flag, line, float(value)
    except ValueError:
        factors = "as by default" if value == DEFAULTS[flag] else value.replace(",", " or ")
        return flag, f"{line}, factors {factors}", None


def draw_sweep(runs: pd.DataFrame, against: str) -> Figure:
    """The difference of the hallucination rate against the noise's strength; a line for each policy and layer count.

    Raises:
        InputError: no method of the sweep has a strength, or a seed in common with `against`.
    """
    lines: dict[str, dict[str, dict[float | None, pd.Series]]] = {}
    for method in runs.index.unique("method"):
        place = swept(method)
        if place and len(found := pairs(runs, method, against, RATE)):
            lines.setdefault(place[0], {}).setdefault(place[1], {})[place[2]] = 100 * found
    if not lines:
        raise InputError(f"--sweep: no run with noise_std=, or of auto, on a seed that {against} has")
    figure = Figure(figsize=(WIDTH, 4.4 + 0.25 * max(map(len, lines.values()))))
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axes, (flag, of_flag) in zip(panels, sorted(lines.items(), reverse=True), strict=True):
        for index, (name, points) in enumerate(of_flag.items()):
            style = look(index + 1)
            if None in points:
                axes.axhline(points[None].mean(), color=style["color"], linestyle="--", linewidth=1.5, label=name)
                continue
            means = {place: points[place].mean() for place in sorted(points)}
            for place in means:
                seeds = points[place]
                axes.scatter([place] * len(seeds), seeds, color=style["color"], **SEEDS)
            axes.plot(list(means), list(means.values()), **style, markersize=7, label=name)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xscale("log")
        places = sorted({place for points in of_flag.values() for place in points if place is not None})
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xticks([], minor=True)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_xlabel(flag)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
    panels[0].set_ylabel(f"hallucination rate against {against}, points")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; raises InputError for results that cannot be drawn."""
    parser = make_parser("pictures.py", "Draws the results of compare.py.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the PNGs")
    parser.add_argument("--sweep", type=Path, metavar="CSV", help="results of a sweep, for sweep.png")
    options = parser.parse_args(arguments)
    runs, against = read_runs(options.results, options.size), options.against
    summary = summarise(runs, choose_methods(runs, options.methods, against), against)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        rate = {RATE: (f"hallucination rate against {against} on the same seed, points; dots are seeds", 100)}
        both = {"calibration_error": ("calibration error\n(less is better)", 1),
                "self_consistency": ("self-consistency, points\n(more is better)", 100)}  # fmt: skip
        figures = {
            "differences": draw_differences(runs, summary, against, rate),
            "fame": draw_fame(runs, summary),
            "refusals": draw_refusals(runs, summary),
            "calibration_consistency": draw_differences(runs, summary, against, both),
        }
        figures["calibration_consistency"].suptitle(f"Against {against} on the same seed; dots are seeds")
        if options.sweep:
            sweep = read_runs(options.sweep, options.size)
            if against not in sweep.index:
                sweep = pd.concat([sweep, runs.loc[[against]]])
            figures["sweep"] = draw_sweep(sweep, against)
        with writing(options.output):
            options.output.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            path = options.output / f"{name}.png"
            with writing(path):
                figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})  # None: no version


if __name__ == "__main__":
    with one_line_errors("pictures.py"):
        main()
