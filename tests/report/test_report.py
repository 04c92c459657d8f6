"""The report: what it reads of the files of runs, the page that needs nothing else, and bad input."""

import base64
import io
import json
import os
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
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
    policy,
    snr,
    write_run,
)
from running import call

from noisefit.base.errors import InputError, one_line_errors
from noisefit.report.__main__ import report, write_files
from noisefit.report.drawing import draw, make_picture
from noisefit.report.page import make_page
from noisefit.report.runs import read_runs, short_names

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.slow
def test_the_page_holds_all_it_needs(tmp_path, monkeypatch, capsys):
    settings = {"loss_mode": "full", "noise_std": 0.1, "seed": 1, "output_model": "a"}
    write_run(tmp_path / "a", eval_metrics=evaluations((15, 1.25)), noise_policy=policy(), noisefit_config=settings)
    other = settings | {"loss_mode": "basefit", "output_model": "b", "target_modules": ["q", "v"]}
    write_run(tmp_path / "b", [line(5, **NOISELESS, skipped_steps=3)], noisefit_config=other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.html").write_text("of before, by noisefit.report")
    (tmp_path / "kept").hardlink_to(tmp_path / "report.html")  # as whoever reads the file right now has it
    report(["a", "b", "a", str(tmp_path / "b")])
    assert capsys.readouterr().out.split() == ["report.png", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "kept", "report.html", "report.png"]
    assert (tmp_path / "kept").read_text() == "of before, by noisefit.report"
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset") and value[0] != "#"]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    picture = base64.b64decode(sources[1].partition(",")[2], validate=True)
    assert picture == (tmp_path / "report.png").read_bytes()
    Image.open(io.BytesIO(picture)).load()
    assert page.tags.count("details") == 2 and ("open", None) not in page.attributes
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and "url(" not in page.text
    cells = "".join((tmp_path / "report.html").read_text(encoding="utf-8").partition("<h2>Runs")[2])
    cells = cells.replace(' class="number"', "")
    row_a, row_b = (next(row for row in cells.splitlines() if f"</b>{name}</td>" in row) for name in "ab")
    for value in ("15", "0.06667", "0.1333", "1.25", "1,000", "2.5", "4"):
        assert f"<td>{value}</td>" in row_a
    assert "<td>3</td>" in row_b and "<td>none</td>" in row_b
    assert "<tr><td>loss_mode</td><td>full</td><td>basefit</td></tr>" in cells
    assert "<td>–</td><td>[&quot;q&quot;, &quot;v&quot;]</td>" in cells
    assert "noise_std" not in cells and "output_model" not in cells
    assert "<tr><td>4</td><td>●</td><td>24.58</td><td>3</td><td>2</td><td>4.05</td></tr>" in cells
    assert "<tr><td>0</td><td>○</td><td>60</td><td>–</td><td>–</td><td>–</td></tr>" in cells
    assert "<tr><td>noise_std</td><td>0.1</td></tr>" in make_page(read_runs(["a"]), [picture])


@pytest.mark.slow
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
    report([*map(str, runs), "--output", str(tmp_path / "odd")])  # also writes half a character
    for text in (make_page(found[:1], [b""]), (tmp_path / "odd.html").read_text(encoding="utf-8")):
        page = Page(text)
        assert "script" not in page.tags and page.tags.count("img") == 1 and "<script>alert(1)<" in page.text


def run_main(*words, capsys):
    """The status and the lines on stderr, as of a program."""
    with pytest.raises(SystemExit) as end, one_line_errors("noisefit.report"):
        report([str(word) for word in words])
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
    (METRICS, '{"loss": 1}\n', "line 1: it lacks 'step'"),
    (METRICS, '{"step": NaN}\n', "line 1: step: expected a number, found null"),
    (METRICS, json.dumps(line(1, layer_noise_to_signal=2)), "layer_noise_to_signal: expected an object, found 2"),
    (METRICS, json.dumps(line(1, layer_noise_to_signal={"3": []})), "layer_noise_to_signal: 3: expected a number"),
    ("eval_metrics.jsonl", '{"step": 1, "eval_ce_loss": "x"}\n', "eval_metrics.jsonl: line 1: eval_ce_loss: expected"),
    (SNR, "{", "layer_snr.json: not JSON"),
    (SNR, "{}", "layer_snr.json: it lacks 'snr'"),
    (SNR, '{"snr": [1, "2"], "selected": []}', 'layer_snr.json: snr[1]: expected a number or null, found "2"'),
    (SNR, '{"snr": [1], "selected": [1]}', "layer_snr.json: snr has 1 layers, and none of index 1"),
    (SNR, '{"snr": [1], "selected": [true]}', "selected[0]: expected a layer's index, found true"),
    (POLICY, json.dumps(policy() | {"layers": [3]}), "layers[0]: expected an object, found 3"),
    (POLICY, json.dumps(policy()).replace('"kl": 2.05', '"kl": "x"'), "layers[0]: grid[0]: kl: expected a number"),
    (POLICY, json.dumps(policy()).replace('"layer": 3', '"layer": 30'), "and none of index 30"),
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
        ([], "give RUN, the output folder of a training, or --answers FILE, or both"),
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


def test_what_was_there_stays_where_the_page_cannot_be_written(tmp_path):
    (tmp_path / "r.png").write_text("of before")
    page = b"x" * 10**6
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))  # the second file is too large
    try:
        with pytest.raises(InputError, match=r"r\.html: cannot be written: File too large"):
            write_files({tmp_path / "r.png": b"new", tmp_path / "r.html": page})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["r.png"]
    assert (tmp_path / "r.png").read_text() == "of before"


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    run = write_run(tmp_path / "a", eval_metrics=evaluations((5, 1.0)) + '{"step": 10, "ev')
    whole = read_runs([str(run)])[0]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(GOOD[:-40])
    assert read_runs([str(run)])[0].steps == whole.steps == [5, 10, 15] and whole.evaluation == ([5], [1.0])


@pytest.mark.slow
def test_records_of_an_older_run_and_of_a_real_one_are_read(tmp_path, llama_folder, questions):
    newer = ("rdrop_loss", "layer_noise_to_signal", "hidden_rms", "peak_memory_gib", "skipped_steps")
    older = [{key: value for key, value in line(step).items() if key not in newer} for step in (5, 10)]
    axes, _ = draw_folders(write_run(tmp_path / "old", older))
    assert list(axes) == [*LOSSES, "noise_to_signal", "tokens_per_second"]
    assert list(lines_of(axes["noise_to_signal"])) == ["old"]
    from running import run  # here, as it imports the trainer

    flags = dict(max_steps=4, logging_steps=1, save_steps=0, eval_data=questions)
    logged = run(llama_folder, questions, tmp_path / "auto", noise_policy="auto", **flags)
    axes, _ = draw_folders(tmp_path / "auto")
    assert set(axes) - {"token_accuracy", "entropy"} == {
        *LOSSES,
        "snr",
        "kl",
        "noise_to_signal",
        "hidden_rms",
        "tokens_per_second",
        "peak_memory_gib",
    }
    assert list(lines_of(axes["loss"])["auto"].get_ydata()) == [entry["loss"] for entry in logged]
    assert "auto: evaluation" in lines_of(axes["ce_loss"])
    selected = json.loads((tmp_path / "auto" / "noise_policy.json").read_text())["selected"]
    assert marks(axes["kl"], "auto")[0] == selected == [int(name) for name in lines_of(axes["noise_to_signal"])]


@pytest.mark.slow
def test_the_program_is_light_and_works_as_one(tmp_path):
    def python(*words):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    light = "import sys, noisefit.report; print({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    assert python("-c", light) == (0, "set()\n", "")
    program, run = ("-m", "noisefit.report"), write_run(tmp_path / "a", [SMALL])
    written = f"{tmp_path / 'r.png'}\n{tmp_path / 'r.html'}\n"
    assert python(*program, run, "--output", tmp_path / "r.PNG") == (0, written, "")
    again = call(report, run, "--output", tmp_path / "r")
    assert (again.returncode, again.stdout) == (0, written)
    (tmp_path / "r.html").write_text("mine")
    refused = call(report, run, "--output", tmp_path / "r")
    assert refused.returncode == 2 and "r.html is there and no report of ours" in refused.stderr
    assert (tmp_path / "r.html").read_text() == "mine"
    missing = tmp_path / "b"
    assert python(*program, missing) == (2, "", f"noisefit.report: error: {missing}: no such folder\n")


def test_a_loss_that_an_edited_loop_has_is_drawn_too(tmp_path):
    folder = write_run(tmp_path / "a", [line(5) | {"confidence_loss": -1.5}])
    axes, _ = draw_folders(folder)
    assert axes["confidence_loss"].get_title() == "Confidence loss"
    assert list(lines_of(axes["confidence_loss"])["a"].get_ydata()) == [-1.5]
