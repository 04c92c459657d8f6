"""What all pictures of the experiment share: their style, rows of intervals, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import HEADLINE
from paired import SIMULTANEOUS, pairs

from noisefit.base.files import writing

WIDTH, DPI = 9, 150  # inches; shown at 900 pixels, 11 points are 15 pixels
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "figure.constrained_layout.use": True, "legend.frameon": False,
}  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers tell apart; shapes tell them apart in grey.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999")
MARKERS = "osD^vPX*"
SEEDS = {"s": 14, "alpha": 0.4, "linewidths": 0}
OTHER = {"color": "#777777", "marker": "o"}  # a method that is no line of any picture
Styles = Mapping[str, Mapping[str, str]]  # of methods; see `styles_of`


def look(index: int) -> dict[str, str]:
    """The colour and shape of the line of this number; a colour that comes again has another shape."""
    place = index % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[(place + index // len(COLOURS)) % len(MARKERS)]}


def styles_of(methods: Sequence[str], labelled: bool) -> Styles:
    """The same look for a method in all pictures: by its place in the file of labels, else in the headline."""
    return {name: look(index) for index, name in enumerate(methods if labelled else HEADLINE)}


def draw_rows(axes: Axes, rows: Mapping[str, tuple[Iterable[float], Sequence[float]]], styles: Styles) -> None:
    """Draws a row for each method: a dot for each seed, the mean, and the interval where there is one.

    Args:
        axes: whose horizontal axis has the values.
        rows: for each method its values and (mean, low, high), in percent or as they are.
        styles: those of other methods are grey.
    """
    for place, (name, (values, (mean, low, high))) in enumerate(rows.items()):
        style = styles.get(name, OTHER)
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
    runs: pd.DataFrame, summary: pd.DataFrame, against: str, measures: Mapping[str, tuple[str, float]], styles: Styles
) -> Figure:
    """Each method's difference to another on the same seed, with simultaneous intervals; a panel for each measure.

    Args:
        runs, summary: as from `read_runs` and `summarise`.
        against: the other method.
        measures: for each, the label of its axis, and the factor from its unit to the label's.
    """
    names = [name for name in summary.index.unique("method") if name != against]
    figure, panels = row_figure(len(measures), names)
    for axes, (measure, (label, factor)) in zip(panels, measures.items(), strict=True):
        interval = factor * summary.loc[measure, list(SIMULTANEOUS)].astype(float)
        rows = {name: (factor * pairs(runs, name, against, measure), interval.loc[name]) for name in names}
        draw_rows(axes, rows, styles)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(label)
    return figure


@contextmanager
def in_style() -> Iterator[None]:
    """Figures made here are those of any machine, whatever matplotlib's settings there are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def write_figures(figures: Mapping[str, Figure], folder: Path) -> None:
    """Writes a PNG for each into the folder, which is made; the same figures give the same bytes."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with writing(path):
            figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})  # None: no version
