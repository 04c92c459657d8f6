"""How large the noise becomes in a training, for each way in which its scale can live; a table and a picture.

    python benchmarks/noise_scale.py [--seeds 3] [--picture noise_scale.png]

Trainings on the demo world (`make build/world/facts.json`) as `make demo` makes them, but with adapters on all linear
layers, which is where a model can grow its hidden states. Each run is kept under `--output`: the same command goes on
where it was killed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ways import check_picture
from world_runs import WorldRun, add_world_flags, check_world_flags, world_run

from noisefit.base.errors import one_line_errors

PLAIN = "plain fine-tuning"
NOISE = {"noise_std": 0.3}
KINDS: dict[str, dict[str, object]] = {
    "live": {**NOISE},
    "live, with its gradient": {**NOISE, "noise_gradient": True},
    "live, at most 0.5": {**NOISE, "max_noise_to_signal": 0.5},
    "frozen": {**NOISE, "noise_scale": "frozen"},
    "relative": {"noise_std": 0.21, "noise_scale": "relative"},  # at the start as large as the others
    PLAIN: {"loss_mode": "basefit"},
}
# Of Okabe and Ito, but for their black.
COLOURS = dict(zip(KINDS, ("#D55E00", "#CC79A7", "#E69F00", "#0072B2", "#009E73"), strict=False))
TITLE = """Live noise runs away. A limit or a frozen scale holds the noise, but not the hidden states;
the scale's gradient, or noise relative to each token, holds both"""

Runs = Mapping[str, Sequence[WorldRun]]
"""The runs of a kind of noise, one a seed."""


def noise_to_signal(line: dict) -> float:
    """The mean over the layers with noise."""
    return line["noise_to_signal"]


def hidden_rms(line: dict) -> float:
    """Likewise."""
    return statistics.fmean(line["hidden_rms"])


def make_runs(args: argparse.Namespace) -> dict[str, list[WorldRun]]:
    runs: dict[str, list[WorldRun]] = {name: [] for name in KINDS}
    for seed in range(args.seeds):
        for name, flags in KINDS.items():
            folder = args.output / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
            rest = {"target_modules": "all-linear", "seed": seed, "epochs": args.epochs}
            runs[name].append(world_run(folder, args.world, flags | rest))
    return runs


def middle(values: Iterable[float], form: str) -> str:
    """Median, and the least and the most where there are several."""
    values = sorted(values)
    around = f" ({values[0]:{form}} to {values[-1]:{form}})" if len(values) > 1 else ""
    return f"{statistics.median(values):{form}}{around}"


def print_table(runs: Runs) -> None:
    columns: dict[str, Callable[[WorldRun], float]] = {
        "at the start": lambda run: noise_to_signal(run.lines[0]),
        "at the end": lambda run: noise_to_signal(run.lines[-1]),
        "growth": lambda run: noise_to_signal(run.lines[-1]) / noise_to_signal(run.lines[0]),
        "hidden rms grows": lambda run: hidden_rms(run.lines[-1]) / hidden_rms(run.lines[0]),
        "last ce_loss": lambda run: run.lines[-1]["ce_loss"],
        "wrong answers": lambda run: run.wrong,
    }
    print(f"{'noise':<26}{'layers':<9}" + "".join(f"{name:>25}" for name in columns))
    for name, made in runs.items():
        cells = []
        for column, measure in columns.items():
            known = name != PLAIN or column in ("last ce_loss", "wrong answers")
            form = ".1%" if column == "wrong answers" else ".3f" if column == "last ce_loss" else ".3g"
            cells.append(middle(map(measure, made), form) if known else "")
        print(f"{name:<26}{' '.join(map(str, made[0].layers)):<9}" + "".join(f"{cell:>25}" for cell in cells))


def draw(path: str, runs: Runs) -> None:
    """Noise to signal, and the size of the hidden states, over the steps: a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4.8), dpi=150, layout="constrained")
    measures = {"noise to signal": noise_to_signal, "root mean square of the hidden states": hidden_rms}
    for axes, (title, measure) in zip(panels, measures.items(), strict=True):
        for name, made in runs.items():
            wrong = statistics.median(run.wrong for run in made)
            look = {"color": COLOURS[name]} if name in COLOURS else {"linestyle": "none"}  # plain: in the legend alone
            for run in made:
                noisy = [line for line in run.lines if name in COLOURS]
                steps, values = ([value(line) for line in noisy] for value in (itemgetter("step"), measure))
                label = f"{name}: {wrong:.0%} of the answers wrong" if run is made[0] else None
                axes.plot(steps, values, linewidth=1.3, label=label, **look)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set(xlabel=f"optimizer step, {len(runs[PLAIN])} trainings of each kind")
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(TITLE, fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_world_flags(parser, "noise_scale")
    parser.add_argument("--picture", metavar="FILE", help="draw noise and hidden states over the steps")
    args = parser.parse_args(arguments)
    check_world_flags(parser, args)
    check_picture(parser, args.picture)
    runs = make_runs(args)
    print_table(runs)
    if args.picture:
        draw(args.picture, runs)


if __name__ == "__main__":
    with one_line_errors("noise_scale.py"):
        main()
