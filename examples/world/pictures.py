"""Draws the results of compare.py: PNGs with a dot for each seed, and means with their 95% intervals.

    python examples/world/pictures.py build/compare/results.csv --output build/compare --sweep build/sweep/results.csv
    python examples/world/pictures.py docs/experiment/answering.csv --size answering --only unknown_share --output build

The intervals of differences are simultaneous over the methods of a picture. The same results give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from answering_pictures import draw_risk_coverage, draw_unknown_share, read_curves, risk_lines, unknown_share_lines
from drawing import (
    SEEDS,
    WIDTH,
    Styles,
    draw_differences,
    draw_rows,
    in_style,
    look,
    row_figure,
    styles_of,
    write_figures,
)
from matplotlib.figure import Figure
from paired import AT_MATCHED, MEAN, PRIMARY, RATE, pairs, read_runs, summarise
from results import BANDS
from summary import choose_runs, make_parser

from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.settings import default_text, fields_of
from noisefit.run.settings import Settings

# What is drawn of worlds whose primary figure this is, where `--only` does not say it.
USUAL = {
    RATE: ("differences", "fame", "refusals", "calibration_consistency"),
    AT_MATCHED: ("matched", "risk_coverage_answering"),
}
BOTH = {"calibration_error": ("calibration error\n(less is better)", 1),
        "self_consistency": ("self-consistency, points\n(more is better)", 100)}  # fmt: skip
PICTURES = (*USUAL[RATE], *USUAL[AT_MATCHED], "unknown_share")
DEFAULTS = {field.name: default_text(field) for field in fields_of(Settings)}


def draw_refusals(runs: pd.DataFrame, summary: pd.DataFrame, styles: Styles) -> Figure:
    """The share of questions that each method refuses, by whether there was something to know."""
    names = list(summary.loc[RATE].index)
    figure, panels = row_figure(3, names)
    kinds = {"refused_known": "told facts\n(fewer is better)", "refused_unknown": "untold facts\n(more is better)",
             "refused_false_premise": "no such country\n(more is better)"}  # fmt: skip
    for axes, (measure, title) in zip(panels, kinds.items(), strict=True):
        interval = 100 * summary.loc[measure, list(MEAN)].astype(float)
        rows = {name: (100 * runs[measure][name].dropna(), interval.loc[name]) for name in names}
        draw_rows(axes, rows, styles)
        axes.set_title(title)
        axes.set_xlabel("refused, %")
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    figure.suptitle("Share of “I do not know” among the answers to questions on …")
    return figure


def draw_fame(runs: pd.DataFrame, summary: pd.DataFrame, styles: Styles) -> Figure:
    """The hallucination rate by how often the corpus told the fact; a line for each method with a style."""
    figure = Figure(figsize=(WIDTH, 5))
    axes = figure.subplots()
    names = [name for name in summary.loc[RATE].index if name in styles]
    for index, name in enumerate(names):
        style, shift = styles[name], 0.06 * (index - (len(names) - 1) / 2)
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


def draw_compared(names: Sequence[str], options: argparse.Namespace, primary: str) -> dict[str, Figure]:
    """The pictures of these names, and of a sweep if there is one; those that compare methods, that is.

    Raises:
        InputError: the results cannot be compared.
    """
    runs, chosen, against = choose_runs(options, options.against)
    summary = summarise(runs, list(chosen), against, primary)
    styles = styles_of(list(chosen), options.labels is not None)
    differences = partial(draw_differences, runs, summary, against, styles=styles)
    seeds = f"against {against} on the same seed, points; dots are seeds"
    drawn: dict[str, Callable[[], Figure]] = {
        "differences": lambda: differences({RATE: (f"hallucination rate {seeds}", 100)}),
        "fame": lambda: draw_fame(runs, summary, styles),
        "refusals": lambda: draw_refusals(runs, summary, styles),
        "calibration_consistency": lambda: differences(BOTH),
        "matched": lambda: differences({AT_MATCHED: (f"wrong at matched right {seeds}", 100)}),
        "risk_coverage_answering": lambda: draw_risk_coverage(
            *risk_lines(read_curves(options.results, options.size), chosen), styles
        ),
    }
    figures = {name: drawn[name]() for name in names}
    if "calibration_consistency" in figures:
        figures["calibration_consistency"].suptitle(f"Against {against} on the same seed; dots are seeds")
    if options.sweep:
        sweep, method = read_runs(options.sweep, options.size), chosen[against]
        if method not in sweep.index:
            sweep = pd.concat([sweep, runs.loc[[against]].rename(index={against: method})])
        figures["sweep"] = draw_sweep(sweep, method)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; raises InputError for results that cannot be drawn."""
    parser = make_parser("pictures.py", "Draws the results of compare.py.")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the PNGs")
    add("--only", nargs="+", choices=PICTURES, help="what to draw (default: by the primary figure)")
    add("--sweep", type=Path, metavar="CSV", help="results of a sweep, for sweep.png")
    options = parser.parse_args(arguments)
    primary = options.primary or PRIMARY[options.size]
    names = options.only or USUAL[primary]
    compared = [name for name in names if name != "unknown_share"]
    with in_style():
        figures = draw_compared(compared, options, primary) if compared or options.sweep else {}
        if "unknown_share" in names:
            figures["unknown_share"] = draw_unknown_share(unknown_share_lines(read_runs(options.results, options.size)))
        write_figures(figures, options.output)


if __name__ == "__main__":
    with one_line_errors("pictures.py"):
        main()
