"""Output folders of made-up runs for the tests of the report, and what its figures show of them."""

import json

import numpy as np

from noisefit.report.drawing import draw
from noisefit.report.runs import read_runs

LOSSES = ("loss", "ce_loss", "soft_loss", "consistency_loss")
SMALL = {"step": 5, "loss": 1.0}
NOISELESS = dict(
    soft_loss=None, consistency_loss=None, noise_to_signal=0.0, layer_noise_to_signal={}, hidden_rms=[]
)  # fmt: skip


def line(step, **changes):
    """A line of metrics.jsonl as the loop writes it; the numbers differ from step to step and from key to key."""
    numbers = {key: (i + 1) / step for i, key in enumerate(LOSSES)} | {"rdrop_loss": None, "grad_norm": 1.0}
    noise = {"noise_to_signal": 0.2 / step, "layer_noise_to_signal": {"2": 0.1 / step, "10": 0.3 / step}}
    noise["hidden_rms"] = [2.0 * step, 4.0 * step]
    speed = {"tokens_per_second": 100.0 * step, "peak_memory_gib": 2.5, "skipped_steps": 0}
    return {"step": step, "epoch": step / 8, **numbers, **noise, **speed} | changes


def write_run(folder, lines=None, **files):
    """An output folder: metrics.jsonl, and the named files as JSON, or as they are where they are text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line(step) for step in (5, 10, 15)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(content) + "\n" for content in lines))
    for name, content in files.items():
        suffix = ".jsonl" if name == "eval_metrics" else ".json"
        (folder / (name + suffix)).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def evaluations(*pairs):
    return "".join(json.dumps({"step": step, "eval_ce_loss": loss}) + "\n" for step, loss in pairs)


def snr(layers, *selected):
    return {"snr": [60 * 0.8**i for i in range(layers)], "selected": list(selected)}


def policy():
    """Of 5 layers the last 3 were measured, and the last was chosen, at a scale that has not its best score."""
    entries = []
    for layer in (2, 3, 4):
        grid = [dict(factor=f, scale=f * layer, kl=f / 10 + layer, score=score, ce_change=0.0, allowed=score < 9)
                for f, score in ((0.5, 1.0), (1.0, 3.0), (2.0, 9.0))]  # fmt: skip
        scale = 2.0 if layer == 4 else None
        entries.append(dict(layer=layer, selected=layer == 4, scale=scale, best_score=3.0, grid=grid))
    return snr(5, 4) | {"scales": [2.0], "layers": entries, "threshold": 2.0, "num_layers": 5}


def draw_folders(*folders):
    """The axes of the figure by what they show, and the figure."""
    figure = draw(read_runs([str(folder) for folder in folders]))
    return {axes.get_label(): axes for axes in figure.axes}, figure


def lines_of(axes):
    return {drawn.get_gid(): drawn for drawn in axes.lines}


def points(drawn):
    return list(map(tuple, np.transpose(drawn.get_data())))


def marks(axes, name):
    """The layers with filled and with hollow marks of a run."""
    filled, hollow = (lines_of(axes)[f"{name}: {kind}"] for kind in ("with noise", "without"))
    assert filled.get_markerfacecolor() == filled.get_color() and hollow.get_markerfacecolor() == "white"
    return list(filled.get_xdata()), list(hollow.get_xdata())


def legend_of(figure):
    """The entries of the only legend, by their texts."""
    (legend,) = figure.legends
    return {text.get_text(): handle for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
