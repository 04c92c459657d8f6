"""`rows.json`: a run records which rows it has, which it left out, and why; the report tells of them."""

import json

import pytest
from report_runs import write_run
from running import run

from noisefit.inputs import stored
from noisefit.report.left_out import left_out_section
from noisefit.report.runs import read_runs
from noisefit.run.left_out import LeftOut

LONG = "Why is it so? " * 30


def rows_of(folder):
    return json.loads((folder / "rows.json").read_text())


@pytest.fixture
def odd(tmp_path):
    """24 rows, of which some have an empty cell, a long prompt, or a long answer."""
    path = tmp_path / "odd.jsonl"
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(1, 25)]
    for number in (2, 5, 6, 7, 8, 9, 11):
        rows[number - 1]["response"] = ""
    rows[2]["prompt"], rows[3]["response"], rows[9]["response"] = LONG, LONG, LONG
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SKIPPED = {"number": 7, "first": [2, 5, 6, 7, 8]}
FLAGS = dict(max_steps=1, max_length=120, loss_mode="basefit", save_steps=0)


@pytest.mark.parametrize("how, kind, rows", [("drop", "too_long", 14), ("cut", "cut", 16)])
@pytest.mark.parametrize("limit", [None, 0], ids=["listed", "stored"])
def test_a_run_records_the_rows_that_it_left_out(llama_folder, odd, tmp_path, monkeypatch, how, kind, rows, limit):
    if limit is not None:
        monkeypatch.setattr(stored, "LARGE", limit)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run(llama_folder, odd, tmp_path / "a", long_rows=how, **FLAGS)
    [source] = rows_of(tmp_path / "a")["train"]
    assert source == {"source": str(odd), "rows": rows, "skipped": SKIPPED, "dropped": {"number": 1, "first": [3]},
                      kind: {"number": 2, "first": [4, 10]}}  # fmt: skip
    assert rows_of(tmp_path / "a")["eval"] == [] and "unknown" not in rows_of(tmp_path / "a")
    said = left_out_section(read_runs([str(tmp_path / "a")]), {})
    assert "7 rows are left out, as a cell is empty or missing (row 2, 5, 6, 7, 8, …)" in said


def test_held_out_and_unknown_rows_are_recorded(llama_folder, odd, tmp_path):
    run(llama_folder, odd, tmp_path / "a", eval_split=0.25, data_weights=1, **FLAGS)
    [source], [held] = rows_of(tmp_path / "a")["train"], rows_of(tmp_path / "a")["eval"]
    assert held == {"source": f"{odd} (--eval_split 0.25)", "rows": source["held_out"]["number"]}
    assert 0 < held["rows"] < 14 and source["rows"] + held["rows"] == 14
    probed = tmp_path / "probed.csv"
    scores = [-0.1 if i % 4 else -2.0 for i in range(16)]
    lines = [f"What is {i}?,It is {i}.,{score}" for i, score in enumerate(scores)]
    probed.write_text("prompt,response,knowledge_chat\n" + "\n".join(lines) + "\n")
    run(llama_folder, probed, tmp_path / "b", unknown_rows="drop", unknown_below=-1, **FLAGS)
    record = rows_of(tmp_path / "b")
    assert record["train"] == [{"source": str(probed), "rows": 12}]
    assert record["unknown"] == {"treatment": "drop", "below": -1.0, "number": 4, "first": [1, 5, 9, 13], "unscored": 0}


def test_a_rows_record_that_no_run_wrote_is_not_replaced(llama_folder, odd, tmp_path):
    from noisefit.base.errors import InputError

    write_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").unlink()
    (tmp_path / "a" / "rows.json").write_text("mine")
    with pytest.raises(InputError, match=r"holds a rows\.json that is not of such a run"):
        run(llama_folder, odd, tmp_path / "a", **FLAGS)
    assert (tmp_path / "a" / "rows.json").read_text() == "mine"


def test_a_file_that_is_trained_on_and_evaluated_has_its_notes_apart():
    left_out = LeftOut()
    left_out.note("train", "a.csv", skipped=[3], cut=[1, 2])
    left_out.note("eval", "a.csv", skipped=[3], cut=[2])  # as where --unknown_rows left out the other
    assert left_out.record({"a.csv": 5}, {"a.csv": 6}) == {
        "train": [{"source": "a.csv", "rows": 5, "skipped": {"number": 1, "first": [3]},
                   "cut": {"number": 2, "first": [1, 2]}}],
        "eval": [{"source": "a.csv", "rows": 6, "skipped": {"number": 1, "first": [3]},
                  "cut": {"number": 1, "first": [2]}}],
    }  # fmt: skip
