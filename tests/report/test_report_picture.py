"""The report's picture: it shows what the files of the runs say, and can be read."""

import json
import math
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from report_runs import (
    LOSSES,
    NOISELESS,
    SMALL,
    draw_folders,
    evaluations,
    legend_of,
    line,
    lines_of,
    marks,
    points,
    policy,
    snr,
    write_run,
)

from noisefit.report.drawing import make_picture, running_mean
from noisefit.report.page import noisy_layers
from noisefit.report.runs import read_runs


def test_what_is_drawn_is_what_the_files_say(tmp_path):
    run = write_run(tmp_path / "a", eval_metrics=evaluations((8, 2.5), (15, 1.5)), layer_snr=snr(12, 2, 10))
    axes, figure = draw_folders(run)
    assert list(axes) == [*LOSSES, "snr", "noise_to_signal", "hidden_rms", "tokens_per_second", "peak_memory_gib"]
    for key in (*LOSSES, "tokens_per_second", "peak_memory_gib"):
        assert points(lines_of(axes[key])["a"]) == [(step, line(step)[key]) for step in (5, 10, 15)]
        assert axes[key].get_xlabel() == "optimizer step" and axes[key].get_title()
    assert [axes[key].get_ylabel() for key in LOSSES] == ["nats a token"] * 4
    assert [axes[key].get_ylabel() for key in ("tokens_per_second", "peak_memory_gib")] == ["tokens/s", "GiB"]
    assert axes["tokens_per_second"].get_ylim()[0] == axes["peak_memory_gib"].get_ylim()[0] == 0
    evaluated = lines_of(axes["ce_loss"])["a: evaluation"]
    assert points(evaluated) == [(8, 2.5), (15, 1.5)] and evaluated.get_linestyle() == "--"
    assert evaluated.get_color() == lines_of(axes["ce_loss"])["a"].get_color()
    assert list(legend_of(figure)) == ["layer 2", "layer 10", "evaluation", "layer with noise", "layer without"]


def test_one_run_has_a_line_for_each_noisy_layer_and_several_have_their_means(tmp_path):
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    axes, figure = draw_folders(one)
    drawn = lines_of(axes["noise_to_signal"])
    assert list(drawn) == ["2", "10"]
    assert points(drawn["10"]) == [(step, 0.3 / step) for step in (5, 10, 15)]
    assert legend_of(figure)["layer 10"].get_color() == drawn["10"].get_color() != drawn["2"].get_color()
    sizes = lines_of(axes["hidden_rms"])
    assert points(sizes["2"]) == [(5, 10), (10, 20), (15, 30)] and points(sizes["10"]) == [(5, 20), (10, 40), (15, 60)]
    assert points(lines_of(draw_folders(one, two)[0]["hidden_rms"])["a"]) == [(5, 15), (10, 30), (15, 45)]
    drawn = lines_of(draw_folders(one, two)[0]["noise_to_signal"])
    assert points(drawn["b"]) == [(step, 0.2 / step) for step in (5, 10, 15)] and list(drawn) == ["a", "b"]
    embedding = write_run(tmp_path / "c", [line(5, layer_noise_to_signal={"embedding": 0.4})])
    assert points(lines_of(draw_folders(embedding)[0]["noise_to_signal"])["embedding"]) == [(5, 0.4)]
    assert noisy_layers(read_runs([str(embedding)])[0]) == "embedding"


def contrast(first, second):
    """The ratio of WCAG 2.2 of two colours of three shares."""
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(
        sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip(weights, colour, strict=True)
        )
        for colour in (first, second)
    )
    return (high + 0.05) / (low + 0.05)


def in_the_dark(colour):
    """What the page's filter, `invert(.905) hue-rotate(180deg)`, makes of a colour, by the standard's matrix."""
    inverted = [0.905 * (1 - c) + 0.095 * c for c in colour]
    turned = np.array([[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]]) @ inverted
    return np.clip(turned, 0, 1).tolist()


def test_the_line_of_each_layer_is_seen_on_the_paper_light_and_dark(tmp_path):
    noise = {str(layer): 0.1 for layer in range(32)}
    axes, _ = draw_folders(write_run(tmp_path / "a", [line(5, layer_noise_to_signal=noise)]))
    shades = [to_rgb(drawn.get_color()) for drawn in lines_of(axes["noise_to_signal"]).values()]
    assert len(set(shades)) == 32
    for shade in shades:
        assert contrast(shade, (1, 1, 1)) >= 3
        assert contrast(in_the_dark(shade), (0x18 / 255,) * 3) >= 3


def test_the_chosen_layers_are_marked(tmp_path):
    run = write_run(tmp_path / "a", layer_snr=snr(24, 0, 1, 2, 7))
    axes = draw_folders(run)[0]["snr"]
    assert points(lines_of(axes)["a"]) == list(enumerate(snr(24)["snr"]))
    assert marks(axes, "a") == ([0, 1, 2, 7], [i for i in range(24) if i not in (0, 1, 2, 7)])
    assert axes.get_yscale() == "log" and all(tick == int(tick) for tick in axes.get_xticks())
    assert noisy_layers(read_runs([str(run)])[0]) == "0-2, 7"
    assert draw_folders(write_run(tmp_path / "b", layer_snr=snr(8)))[0]["snr"].get_yscale() == "linear"
    # Of runs with the same SNR the one drawn later has the smaller marks, above the hollow ones of all.
    axes = draw_folders(run, write_run(tmp_path / "c", layer_snr=snr(24, 2, 3)))[0]["snr"]
    assert marks(axes, "a")[0] == [0, 1, 2, 7] and marks(axes, "c")[0] == [2, 3]
    first, second, hollow = (lines_of(axes)[name] for name in ("a: with noise", "c: with noise", "c: without"))
    assert first.get_markersize() > second.get_markersize() and first.zorder > hollow.zorder


def test_an_automatic_policy_shows_the_kl_at_the_chosen_or_best_scale(tmp_path):
    run = write_run(tmp_path / "a", noise_policy=policy())
    axes = draw_folders(run)[0]
    assert points(lines_of(axes["kl"])["a"]) == [(2, 2.1), (3, 3.1), (4, 4.05)]
    assert marks(axes["kl"], "a") == ([4], [2, 3]) and axes["kl"].get_ylabel() == "nats a token"
    assert len(lines_of(axes["snr"])["a"].get_xdata()) == 5
    # Given by hand, it has neither the SNR nor what was measured; an edited scale is not on the grid.
    hand = write_run(tmp_path / "b", noise_policy={"selected": [1, 3], "scales": [0.5, 1], "snr": []})
    assert not {"snr", "kl"} & set(draw_folders(hand)[0]) and noisy_layers(read_runs([str(hand)])[0]) == "1, 3"
    (run / "noise_policy.json").write_text(json.dumps(policy() | {"scales": [2.5]}))
    layer = read_runs([str(run)])[0].layers[4]
    assert layer.scale == 2.5 and math.isnan(layer.kl) and layer.score == 3.0


def test_null_leaves_a_gap_and_what_is_always_null_has_no_panel(tmp_path):
    skipped = dict.fromkeys((*LOSSES, "noise_to_signal", "layer_noise_to_signal", "hidden_rms"))
    lines = [line(1), line(2), line(3, **skipped), line(4), line(5, **skipped), line(6), line(7)]
    axes, _ = draw_folders(write_run(tmp_path / "a", lines))
    for drawn in (lines_of(axes["loss"])["a"], lines_of(axes["noise_to_signal"])["2"]):
        assert [step for step, y in points(drawn) if math.isnan(y)] == [3, 5]
        assert drawn.get_markevery() == [3]  # the point between two gaps
    plain = write_run(tmp_path / "b", [line(5, **NOISELESS), line(10, **NOISELESS)], layer_snr=snr(4))
    axes, figure = draw_folders(plain)
    assert list(axes) == ["loss", "ce_loss", "snr", "tokens_per_second", "peak_memory_gib"]
    assert noisy_layers(read_runs([str(plain)])[0]) == "none"
    alone, _ = draw_folders(write_run(tmp_path / "c", [line(5)]))
    assert points(lines_of(alone["loss"])["c"]) == [(5, 0.2)] and lines_of(alone["loss"])["c"].get_markevery() == [0]
    nothing, figure = draw_folders(write_run(tmp_path / "d", [{"step": 5}]))
    assert not nothing and "no numbers were logged" in figure.get_suptitle()
    numbers = '{"step": 5, "loss": NaN, "ce_loss": Infinity, "soft_loss": 1e999, "grad_norm": 1' + 400 * "0" + "}\n"
    (tmp_path / "d" / "metrics.jsonl").write_text(numbers)
    assert read_runs([str(tmp_path / "d")])[0].metrics == {}


def test_many_lines_are_drawn_with_their_running_mean(tmp_path):
    axes, figure = draw_folders(write_run(tmp_path / "a", [line(step) for step in range(1, 121)]))
    drawn = lines_of(axes["loss"])
    assert points(drawn["a: as logged"]) == [(step, 1 / step) for step in range(1, 121)]
    mean, logged = drawn["a"].get_ydata(), drawn["a: as logged"].get_ydata()
    assert mean[0] == logged[0] and mean[50] == pytest.approx(np.mean(logged[47:54]))
    assert mean[-1] == pytest.approx(np.mean(logged[-4:])) and drawn["a"].get_linewidth() > 1
    assert {"as logged", "running mean"} <= set(legend_of(figure))
    assert running_mean([1, 2, math.nan, 6], 1)[:2] == [1, 1.5] and math.isnan(running_mean([1, math.nan], 1)[1])


def test_several_runs_have_a_colour_each(tmp_path):
    runs = [write_run(tmp_path / f"{i}" / "adapter", layer_snr=snr(4, i % 4)) for i in range(13)]
    runs[1] = write_run(tmp_path / "1" / "adapter", [line(5, **NOISELESS)])
    axes, figure = draw_folders(*runs)
    names = [str(i) for i in range(13)]
    looks = {name: (handle.get_color(), handle.get_linestyle()) for name, handle in legend_of(figure).items()}
    assert len({looks[name] for name in names}) == 13 and len({to_hex(looks[name][0]) for name in names}) == 10
    for key in ("loss", "snr"):
        drawn = {name: lines_of(axes[key])[name] for name in names if name in lines_of(axes[key])}
        assert all(looks[name] == (d.get_color(), d.get_linestyle()) for name, d in drawn.items()) and len(drawn) > 11
    assert "1" in lines_of(axes["loss"]) and "1" not in lines_of(axes["soft_loss"])


def texts_of(figure):
    """Every visible text with its box in pixels, and the panels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [axis.get_offset_text(), *axis.get_minorticklabels()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found if text.get_text()]
    return boxes, [axes.get_window_extent() for axes in figure.axes]


@pytest.mark.slow
@pytest.mark.parametrize("runs, steps, layers", [(1, 3, 48), (1, 1, 1), (2, 100, 24), (6, 12_000_000, 4), (10, 70, 12)])
def test_no_text_overlaps_another_or_is_clipped(tmp_path, runs, steps, layers):
    every = 1 if steps < 1000 else steps // 5
    folders = []
    for i in range(runs):
        noise = {str(layer): 10.0 ** -(layer % 6) for layer in range(0, layers, 2)}
        changes = dict(rdrop_loss=1e-7 * (i + 1), layer_noise_to_signal=noise, tokens_per_second=1234567.0 * (i + 1))
        lines = [line(step, **changes) for step in range(every, steps + 1, every)]
        name = f"run_{i}" if runs < 10 else f"a_rather_long_name_of_run_{i}"
        files = dict(noise_policy=snr(layers, *range(0, layers, 2)) | {"layers": []}, noisefit_config={})
        folders.append(write_run(tmp_path / name, lines, eval_metrics=evaluations((every, 1e-5 + i)), **files))
    axes, figure = draw_folders(*folders)
    boxes, panels = texts_of(figure)
    for panel in figure.axes:  # no label twice, as of ticks between whole steps
        labels = [label.get_text() for label in panel.get_xticklabels()]
        assert len(set(labels)) == len(labels), labels
    assert len(boxes) > 8 * len(axes) and len(axes) >= 8 and len(legend_of(figure)) <= runs + 10
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        assert not any(box.overlaps(panel) for panel in panels), text
    for (one, box), (other, box_of_other) in combinations(boxes, 2):
        assert not box.overlaps(box_of_other), (one, other)


def test_the_picture_does_not_depend_on_the_users_style(tmp_path):
    runs = read_runs([str(write_run(tmp_path / "a", [SMALL]))])
    expected = make_picture(runs)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert make_picture(runs) == expected
        assert matplotlib.rcParams["font.size"] == 30
