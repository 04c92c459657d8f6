"""The report: pictures that show what the files of a run say, on a page that needs nothing else."""

import base64
import io
import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from noisefit.errors import one_line_errors
from noisefit.report import main, read_runs, short_names
from noisefit.report_page import draw, make_page, make_picture, noisy_layers, running_mean

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("loss", "ce_loss", "soft_loss", "consistency_loss")
SMALL = {"step": 5, "loss": 1.0}
NOISELESS = dict(soft_loss=None, consistency_loss=None, noise_to_signal=0.0, layer_noise_to_signal={})


def line(step, **changes):
    """A line of metrics.jsonl as the loop writes it; the numbers differ from step to step and from key to key."""
    numbers = {key: (i + 1) / step for i, key in enumerate(LOSSES)} | {"rdrop_loss": None, "grad_norm": 1.0}
    noise = {"noise_to_signal": 0.2 / step, "layer_noise_to_signal": {"2": 0.1 / step, "10": 0.3 / step}}
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


def test_what_is_drawn_is_what_the_files_say(tmp_path):
    run = write_run(tmp_path / "a", eval_metrics=evaluations((8, 2.5), (15, 1.5)), layer_snr=snr(12, 2, 10))
    axes, figure = draw_folders(run)
    assert list(axes) == [*LOSSES, "snr", "noise_to_signal", "tokens_per_second", "peak_memory_gib"]
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
    drawn = lines_of(draw_folders(one, two)[0]["noise_to_signal"])
    assert points(drawn["b"]) == [(step, 0.2 / step) for step in (5, 10, 15)] and list(drawn) == ["a", "b"]
    embedding = write_run(tmp_path / "c", [line(5, layer_noise_to_signal={"embedding": 0.4})])
    assert points(lines_of(draw_folders(embedding)[0]["noise_to_signal"])["embedding"]) == [(5, 0.4)]
    assert noisy_layers(read_runs([str(embedding)])[0]) == "embedding"


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
    skipped = dict.fromkeys((*LOSSES, "noise_to_signal", "layer_noise_to_signal"))
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


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/x/runs/full"], ["full"]),
        (["/x/runs/a", "/x/runs/b"], ["a", "b"]),
        (["/x/a/adapter", "/x/b/adapter"], ["a", "b"]),
        (["/x/a/1/adapter", "/x/b/1/adapter", "/x/b/2/adapter"], ["a/1", "b/1", "b/2"]),
        (["/x/a", "/x/a/b"], ["a", "b"]),
        (["/x/a\nb\udcff"], ["a?b?"]),
        (["/"], ["/"]),
        ([f"/x/{30 * 'a'}{i}{30 * 'b'}" for i in (1, 2)], [f"{i}: {19 * 'a'}…{20 * 'b'}" for i in (1, 2)]),
    ],
)
def test_names_are_what_tells_the_runs_apart(paths, names):
    assert short_names(paths) == names


class Page(HTMLParser):
    """What a page has: tags, attributes, and the text outside of tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_all_it_needs(tmp_path, monkeypatch, capsys):
    settings = {"loss_mode": "full", "noise_std": 0.1, "seed": 1, "output_model": "a"}
    write_run(tmp_path / "a", eval_metrics=evaluations((15, 1.25)), noise_policy=policy(), noisefit_config=settings)
    other = settings | {"loss_mode": "basefit", "output_model": "b", "target_modules": ["q", "v"]}
    write_run(tmp_path / "b", [line(5, **NOISELESS, skipped_steps=3)], noisefit_config=other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.html").write_text("of before")
    (tmp_path / "kept").hardlink_to(tmp_path / "report.html")  # as whoever reads the file right now has it
    main(["a", "b", "a", str(tmp_path / "b")])
    assert capsys.readouterr().out.split() == ["report.png", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "kept", "report.html", "report.png"]
    assert (tmp_path / "kept").read_text() == "of before"
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    picture = base64.b64decode(sources[0].partition(",")[2], validate=True)
    assert picture == (tmp_path / "report.png").read_bytes()
    Image.open(io.BytesIO(picture)).load()
    assert page.tags.count("details") == 2 and ("open", None) not in page.attributes
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and "url(" not in page.text
    cells = "".join((tmp_path / "report.html").read_text(encoding="utf-8").partition("<h2>Runs")[2])
    row_a, row_b = (next(row for row in cells.splitlines() if f"</b>{name}</td>" in row) for name in "ab")
    for value in ("15", "0.06667", "0.1333", "1.25", "1,000", "2.5", "4"):
        assert f"<td>{value}</td>" in row_a
    assert "<td>3</td>" in row_b and "<td>none</td>" in row_b
    assert "<tr><td>loss_mode</td><td>full</td><td>basefit</td></tr>" in cells
    assert "<td>–</td><td>[&quot;q&quot;, &quot;v&quot;]</td>" in cells
    assert "noise_std" not in cells and "output_model" not in cells
    assert "<tr><td>4</td><td>●</td><td>24.58</td><td>3</td><td>2</td><td>4.05</td></tr>" in cells
    assert "<tr><td>0</td><td>○</td><td>60</td><td>–</td><td>–</td><td>–</td></tr>" in cells
    assert "<tr><td>noise_std</td><td>0.1</td></tr>" in make_page(read_runs(["a"]), picture)


def test_names_and_settings_cannot_break_the_page_or_the_picture(tmp_path):
    names = ["<script>alert(1)<", "_left_out", "$x^2$", '"&quot;', "中文"]
    bad = {"loss_mode": "<script>alert(2)</script>", "noise_<b>": "</td><img src=x>"}
    runs = [
        write_run(tmp_path / name, layer_snr=snr(4, 1), noisefit_config=bad | {"seed": f"{name}\ud800"})
        for name in names
    ]
    found = read_runs([str(run) for run in runs])
    assert set(names) <= set(legend_of(draw(found)))
    make_picture(read_runs([str(write_run(tmp_path / "$\\frac{$", [SMALL]))]))  # a name that is no formula
    main([*map(str, runs), "--output", str(tmp_path / "odd")])  # also writes half a character
    for text in (make_page(found[:1], b""), (tmp_path / "odd.html").read_text(encoding="utf-8")):
        page = Page(text)
        assert "script" not in page.tags and page.tags.count("img") == 1 and "<script>alert(1)<" in page.text


def run_main(*words, capsys):
    """The status and the lines on stderr, as of a program."""
    with pytest.raises(SystemExit) as end, one_line_errors("noisefit.report"):
        main([str(word) for word in words])
    return end.value.code, capsys.readouterr().err.splitlines()


GOOD = json.dumps(line(5)) + "\n"
METRICS, SNR, POLICY = "metrics.jsonl", "layer_snr.json", "noise_policy.json"
BAD_FILES = [
    (METRICS, "", "no step was logged yet"),
    (METRICS, GOOD + "{\n" + GOOD, "metrics.jsonl: line 2: not JSON"),
    (METRICS, GOOD + "{\n", "metrics.jsonl: line 2: not JSON"),
    (METRICS, GOOD + "[1]\n", "metrics.jsonl: line 2: expected an object, found [1]"),
    (METRICS, GOOD + "[" * 100_000 + "\n", "metrics.jsonl: line 2: not JSON"),
    (METRICS, GOOD + "\udcff\n", "metrics.jsonl: line 2: not JSON"),
    (METRICS, GOOD + json.dumps(line(9, loss="0.1")), 'line 2: loss: expected a number or null, found "0.1"'),
    (METRICS, json.dumps(line(9, soft_loss=True)), "line 1: soft_loss: expected a number or null, found true"),
    (METRICS, '{"loss": 1}\n', "line 1: step: expected a number, found null"),
    (METRICS, '{"step": NaN}\n', "line 1: step: expected a number, found null"),
    (METRICS, json.dumps(line(1, layer_noise_to_signal=2)), "layer_noise_to_signal: expected an object, found 2"),
    (METRICS, json.dumps(line(1, layer_noise_to_signal={"3": []})), "layer_noise_to_signal: 3: expected a number"),
    ("eval_metrics.jsonl", '{"step": 1, "eval_ce_loss": "x"}\n', "eval_metrics.jsonl: line 1: eval_ce_loss: expected"),
    (SNR, "{", "layer_snr.json: not JSON"),
    (SNR, "{}", "layer_snr.json: snr: expected a list, found null"),
    (SNR, '{"snr": [1, "2"], "selected": []}', 'layer_snr.json: snr[1]: expected a number or null, found "2"'),
    (SNR, '{"snr": [1], "selected": [1]}', "layer_snr.json: snr has 1 layers, and none of index 1"),
    (SNR, '{"snr": [1], "selected": [true]}', "selected[0]: expected a layer's index, found true"),
    (POLICY, json.dumps(policy() | {"layers": [3]}), "layers[0]: expected an object, found 3"),
    (POLICY, json.dumps(policy()).replace('"kl": 2.05', '"kl": "x"'), "layers[0]: grid[0]: kl: expected a number"),
    (POLICY, json.dumps(policy()).replace('"layer": 3', '"layer": 30'), "and none of index 30"),
    ("noisefit_config.json", "full", "noisefit_config.json: not JSON"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_a_file_that_cannot_be_used_ends_in_one_line(tmp_path, capsys, name, content, message):
    folder = write_run(tmp_path / "a")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "out").mkdir()
    status, lines = run_main(write_run(tmp_path / "b"), folder, "--output", tmp_path / "out" / "r", capsys=capsys)
    assert status == 2 and len(lines) == 1 and message in lines[0] and str(folder) in lines[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_arguments_that_cannot_be_used_end_in_one_line(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "a", [SMALL])
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.html").mkdir()
    monkeypatch.chdir(tmp_path)
    for words, message in [
        (["missing"], "missing: no such folder"),
        ([run / "metrics.jsonl"], "metrics.jsonl: a file, expected the output folder of a run"),
        (["empty"], "empty: it has no metrics.jsonl"),
        ([], "the following arguments are required: RUN"),
        (["missing", "--output", "no/where/r"], "--output no/where/r: there is no folder no/where"),
        ([run, "--output", run / "metrics.jsonl" / "r"], "there is no folder"),
        ([run, "--output", ""], "expected a file's name"),
        ([run, "--output", ".."], "expected a file's name"),
        ([run, "--output", "empty/"], "expected a file's name"),
        ([run, "--output", "taken"], "taken.html is a folder"),
        ([run, "--output", "n" * 300], "cannot be written: File name too long"),
        ([run, "--outptu", "r"], "did you mean --output?"),
    ]:
        status, lines = run_main(*words, capsys=capsys)
        assert status == 2 and len(lines) == 1 and message in lines[0], (words, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "taken.html"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_main(run, capsys=capsys)[1][0].endswith("not installed: pip install matplotlib")
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)  # a superuser may write anywhere
    assert "--output report: no permission to write in" in run_main("missing", capsys=capsys)[1][0]


def test_what_was_there_stays_where_the_page_cannot_be_written(tmp_path, capsys):
    (tmp_path / "r.png").write_text("of before")
    (tmp_path / "r.html.tmp").mkdir()  # in the way of the second file
    status, lines = run_main(write_run(tmp_path / "a", [SMALL]), "--output", tmp_path / "r", capsys=capsys)
    assert status == 2 and "r.html: cannot be written" in lines[0]
    assert (tmp_path / "r.png").read_text() == "of before" and not (tmp_path / "r.png.tmp").exists()


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    run = write_run(tmp_path / "a", eval_metrics=evaluations((5, 1.0)) + '{"step": 10, "ev')
    whole = read_runs([str(run)])[0]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(GOOD[:-40])
    assert read_runs([str(run)])[0].steps == whole.steps == [5, 10, 15] and whole.evaluation == ([5], [1.0])


def test_records_of_an_older_run_and_of_a_real_one_are_read(tmp_path, llama_folder, questions):
    newer = ("rdrop_loss", "layer_noise_to_signal", "peak_memory_gib", "skipped_steps")
    older = [{key: value for key, value in line(step).items() if key not in newer} for step in (5, 10)]
    axes, _ = draw_folders(write_run(tmp_path / "old", older))
    assert list(axes) == [*LOSSES, "noise_to_signal", "tokens_per_second"]
    assert list(lines_of(axes["noise_to_signal"])) == ["old"]
    from running import run  # here, as it imports the trainer

    flags = dict(max_steps=4, logging_steps=1, save_steps=0, eval_data=questions)
    logged = run(llama_folder, questions, tmp_path / "auto", noise_policy="auto", **flags)
    axes, _ = draw_folders(tmp_path / "auto")
    assert set(axes) == {*LOSSES, "snr", "kl", "noise_to_signal", "tokens_per_second", "peak_memory_gib"}
    assert list(lines_of(axes["loss"])["auto"].get_ydata()) == [entry["loss"] for entry in logged]
    assert "auto: evaluation" in lines_of(axes["ce_loss"])
    selected = json.loads((tmp_path / "auto" / "noise_policy.json").read_text())["selected"]
    assert marks(axes["kl"], "auto")[0] == selected == [int(name) for name in lines_of(axes["noise_to_signal"])]


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


def test_the_program_is_light_and_works_as_one(tmp_path):
    def python(*words):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    light = "import sys, noisefit.report; print({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    assert python("-c", light) == (0, "set()\n", "")
    report, run = ("-m", "noisefit.report"), write_run(tmp_path / "a", [SMALL])
    written = f"{tmp_path / 'r.png'}\n{tmp_path / 'r.html'}\n"
    assert python(*report, run, "--output", tmp_path / "r.PNG") == (0, written, "")
    missing = tmp_path / "b"
    assert python(*report, missing) == (2, "", f"noisefit.report: error: {missing}: no such folder\n")
