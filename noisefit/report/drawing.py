"""The picture of training runs: a panel a quantity."""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from noisefit.base.errors import InputError
from noisefit.report.panels import panels_of
from noisefit.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MADE_BY = "noisefit.report"  # in both files, by which older ones are known
BY_LAYER = ("snr", "kl")
OF_PROMPTS = ("right_rate", "wrong_rate")  # shares
FROM_ZERO = ("tokens_per_second", "peak_memory_gib")  # the others have differences that would be lost from zero
LOGARITHMIC = ("snr", "kl", "noise_to_signal", "hidden_rms")  # where they span more than a decade
# Okabe and Ito's without yellow, and three far from them for any colour vision. Further runs repeat them, dash-dotted.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #8000E0 #602000 #002080".split()
LAST_SHADE = 0.58  # of viridis, for layers: brighter ones have a contrast under 3 with white
MANY = 60  # logged lines from which on a running mean is drawn over them
FEW = 8  # noisy layers up to which each has an entry in the legend


def draw(runs: Sequence[Run], narrow: bool = False) -> Figure:
    """The picture of some runs: a panel a quantity, of those that some run has.

    Args:
        runs: at least one.
        narrow: for a phone: the panels below each other, and no title, which the page has.

    Returns:
        The figure. An axes has its key in `panels_of` as its label, a line the run's name or the layer's as its gid.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = panels_of(runs)
    keys = [key for key in panels if any(_has(run, key) for run in runs)]
    with_layers = [run for run in runs if run.layers]
    columns = 1 if narrow else max(1, 2 if len(keys) == 4 else min(len(keys), 3))
    width = 4.2 if narrow else max(6.5, 4.2 * columns)
    figure = Figure(figsize=(width, 2.75 * math.ceil(len(keys) / columns) + 1.1), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09, hspace=0.04, wspace=0.03))
    if not narrow or not keys:
        figure.suptitle(title_of(runs) + ("" if keys else ": no numbers were logged"), fontsize=13, parse_math=False)
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(math.ceil(len(keys) / columns), columns, place, label=key)
        for index, run in enumerate(runs):
            if key in BY_LAYER and run.layers:
                _draw_layers(axes, run, key, look_of(index), with_layers.index(run), len(with_layers))
            elif len(runs) == 1 and (of_layers := _by_layer(run, key)):  # of several the mean over the layers
                for layer, colour in _layer_colours(run).items():
                    if layer in of_layers:
                        _draw_steps(axes, key, run.steps, of_layers[layer], layer, dict(color=colour))
            elif key in run.metrics:
                _draw_steps(axes, key, run.steps, run.metrics[key], run.name, look_of(index))
            if finite(measured := run.evaluations(key)):
                style = look_of(index) | dict(linestyle="--", linewidth=1.2, marker="o", markersize=3)
                axes.plot(run.evaluation[0], measured, **style, gid=f"{run.name}: evaluation")
        _finish(axes, key, *panels[key])
    _add_legend(figure, runs, keys)
    return figure


def _draw_steps(axes: Axes, key: str, steps: list[float], values: list[float], gid: str, look: dict[str, Any]) -> None:
    """A line, thin under its running mean where it has many points; it has a gap where a value is missing."""
    # A point between two gaps would not be seen: it gets a mark.
    gaps = [True, *map(math.isnan, values), True]
    alone = [i for i in range(len(values)) if gaps[i] and not gaps[i + 1] and gaps[i + 2]]
    style = look | dict(marker="o", markersize=3.5, markevery=alone)
    if len(steps) >= MANY and key != "peak_memory_gib":
        axes.plot(steps, values, **style | dict(linestyle="-"), linewidth=0.7, alpha=0.35, gid=f"{gid}: as logged")
        values = running_mean(values, min(len(values) // 40, 50))
    axes.plot(steps, values, **style, linewidth=1.6, gid=gid)


def _draw_layers(axes: Axes, run: Run, key: str, look: dict[str, Any], place: int, places: int) -> None:
    """A value a layer, with a filled mark where it gets noise; marks on marks get smaller, so that each is seen."""
    known = {i: getattr(layer, key) for i, layer in run.layers.items() if not math.isnan(getattr(layer, key))}
    share = 0.5 if places == 1 else 1 - place / (places - 1)
    look |= dict(linewidth=0.6 + 1.6 * share, markersize=(3 + 5.5 * share) * max(0.6, min(1.0, 24 / len(run.layers))))
    axes.plot(list(known), list(known.values()), **look, gid=run.name)
    look |= dict(linestyle="", marker="o")
    for chosen, fill in ((False, "white"), (True, look["color"])):
        marked = {i: value for i, value in known.items() if run.layers[i].chosen == chosen}
        gid = f"{run.name}: {'with noise' if chosen else 'without'}"
        axes.plot(list(marked), list(marked.values()), **look, markerfacecolor=fill, zorder=3 + chosen, gid=gid)


def _finish(axes: Axes, key: str, title: str, unit: str) -> None:
    """Title, units, ticks, and the scale that the values ask for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_title(title, fontsize=10.5)
    axes.set_xlabel("layer" if key in BY_LAYER else "optimizer step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    data: Any = [line.get_ydata() for line in axes.lines]
    values = finite(value for line in data for value in line)
    if key in LOGARITHMIC and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        subs = (1, 2, 5) if max(values) < 1000 * min(values) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 2.5, 5, 10)))
    if key in OF_PROMPTS:
        axes.set_ylim(-0.02, 1.02)  # all of them, as one that never moves would else stand among numbers that none has
    if key in FROM_ZERO:
        axes.set_ylim(0, 1.08 * max(values) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    short = FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e5 else f"{value / 1000:,.6g}k")
    axes.xaxis.set_major_formatter(short)
    # In full: the corner where matplotlib would put a common factor is beside the title.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _add_legend(figure: Figure, runs: Sequence[Run], keys: Sequence[str]) -> None:
    """The legend of all panels, under them: the runs, or the layers of a single one, and how the lines are meant."""
    from matplotlib.lines import Line2D

    entries: list[tuple[str, dict[str, Any]]] = []
    if len(runs) > 1:
        entries = [(run.name, look_of(index) | dict(linewidth=2)) for index, run in enumerate(runs)]
    elif "noise_to_signal" in keys:
        entries = [(f"layer {layer}" if layer.isdecimal() else layer, dict(color=colour, linewidth=2))
                   for layer, colour in _layer_colours(runs[0]).items()]  # fmt: skip
        if len(entries) > FEW:  # the colours follow the depth, so some of them say which are the others
            entries = [entries[round(i * (len(entries) - 1) / 5)] for i in range(6)]
    if any(finite(run.evaluations(key)) for run in runs for key in keys):
        entries.append(("evaluation", dict(color="0.4", linestyle="--")))
    if any(key in BY_LAYER for key in keys):
        mark = dict(color="0.4", marker="o", linestyle="", markersize=6)
        entries += [("layer with noise", mark), ("layer without", mark | dict(markerfacecolor="white"))]
    if any(len(run.steps) >= MANY for run in runs):
        entries += [("as logged", dict(color="0.4", linewidth=0.7)), ("running mean", dict(color="0.4", linewidth=1.8))]
    if not entries:
        return
    room = max(1, int(figure.get_figwidth() / (0.078 * max(len(label) for label, _ in entries) + 0.5)))
    columns = math.ceil(len(entries) / math.ceil(len(entries) / room))  # of rows as full as each other
    entries = [entry for column in range(columns) for entry in entries[column::columns]]  # to be read in rows
    legend = figure.legend([Line2D([], [], **style) for _, style in entries], ["name"] * len(entries),
                           loc="outside lower center", frameon=False, fontsize=9, ncols=columns)  # fmt: skip
    for text, (label, _) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=label, parse_math=False)  # set here, as "_name" would be left out, and "$" begin a formula


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """Means over `half` values on either side; of the first ones over as many as both sides have. NaN stay NaN."""
    near = (finite(values[max(i - half, 0) : min(i + half, 2 * i) + 1]) for i in range(len(values)))
    return [math.nan if math.isnan(value) else statistics.fmean(of) for value, of in zip(values, near, strict=True)]


def make_picture(runs: Sequence[Run], narrow: bool = False) -> bytes:
    """`draw` as a PNG. Raises `InputError` where matplotlib is not installed."""
    return as_png(lambda: draw(runs, narrow))


def as_png(draw_it: Callable[[], Figure]) -> bytes:
    """A picture as a PNG, the same whatever the user's matplotlibrc says.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("the picture needs matplotlib, which is not installed: pip install matplotlib") from None
    file = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", "Glyph")  # a folder's name in letters that the font lacks
        draw_it().savefig(file, format="png", metadata={"Software": MADE_BY})  # with Agg, without a window
    return file.getvalue()


def title_of(runs: Sequence[Run]) -> str:
    """What a picture or a page of them is called."""
    return f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"


def finite(values: Iterable[float]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if not math.isnan(value)]


def _has(run: Run, key: str) -> bool:
    if key in BY_LAYER:
        return bool(finite(getattr(layer, key) for layer in run.layers.values()))
    return key in run.metrics or bool(finite(run.evaluations(key)))


def _by_layer(run: Run, key: str) -> dict[str, list[float]]:
    return {"noise_to_signal": run.noise, "hidden_rms": run.sizes}.get(key, {})


def look_of(index: int) -> dict[str, Any]:
    """Colour and line of a run, by its place."""
    return dict(color=COLOURS[index % len(COLOURS)], linestyle="-" if index < len(COLOURS) else "-.")


def _layer_colours(run: Run) -> dict[str, Any]:
    from matplotlib import colormaps

    places = [i / max(len(run.noise) - 1, 1) for i in range(len(run.noise))]  # darkest first
    return {layer: colormaps["viridis"](LAST_SHADE * place) for layer, place in zip(run.noise, places, strict=True)}
