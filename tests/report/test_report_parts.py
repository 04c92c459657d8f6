"""What the page says of samples, of answers and of what was left out, against figures that are worked out here."""

import html
import json
import re

import numpy as np
import pytest
from report_files import answer_lines, json_lines, sample
from report_runs import SMALL, line, write_run
from running import call

from noisefit.answers.pictures import curve
from noisefit.inputs.tables import SomeRows
from noisefit.report.__main__ import report
from noisefit.report.answers import (
    answers_section,
    confidence_section,
    curves_picture,
    lacking,
    ranked,
    read_answer_files,
)
from noisefit.report.html import card, outcome, table, text
from noisefit.report.left_out import left_out_section
from noisefit.report.records import read_rows_record
from noisefit.report.runs import read_runs
from noisefit.report.samples import samples_section
from noisefit.run.left_out import ROWS, LeftOut
from noisefit.score import score


def words_of(page):
    """The text of a piece of HTML, a line each."""
    return [html.unescape(word).strip() for word in re.split(r"<[^>]*>", page) if word.strip()]


def rows_of(page):
    """The cells of each row of its tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [["".join(words_of(cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def test_samples_of_one_answer_stand_together_and_the_middle_of_many_is_counted(tmp_path):
    same = [sample(step, "Who?", "Ada.", "Ada." if step > 20 else "No.", "right" if step > 20 else "wrong", -0.1 * step)
            for step in (10, 20, 30)]  # fmt: skip
    many = [sample(step, "When?", "In 1.", f"In {step}.") for step in range(1, 21)]
    run = write_run(tmp_path / "a", [line(5)])
    (run / "samples.jsonl").write_text(json_lines([*same, *many]))
    [found] = read_runs([str(run)])
    assert len(found.samples) == 23
    rows = rows_of(samples_section([found]))
    assert rows[:3] == [["Step", "Answer", "Sure", "Outcome"], ["10–20", "No.", "14%", "✗ wrong"],
                        ["30", "Ada.", "5%", "✓ right"]]  # fmt: skip
    assert [row[0] for row in rows[4:]] == ["1", "…", *map(str, range(10, 21))]
    assert rows[5][1] == "(8 other answers are not shown)"
    assert samples_section(read_runs([str(write_run(tmp_path / "b", [line(5)]))])) == ""


def test_samples_that_are_none_are_counted_and_a_torn_one_is_told(tmp_path):
    run, good = write_run(tmp_path / "a", [line(5)]), json.dumps(sample(5, "Who?", "Ada.", "Ada."))
    (run / "samples.jsonl").write_text(f"{good}\n{{}}\n[1]\n{'[' * 10**5}\nnone\n{good[:-5]}")
    [found] = read_runs([str(run)])
    assert len(found.samples) == 1
    assert "samples.jsonl: left out as no samples: 4 lines (line 2, 3, 4, 5)." in found.not_shown
    assert any("The last line of samples.jsonl is not whole" in sentence for sentence in found.not_shown)
    null = sample(5, "Who?", None, "", None, None)
    (run / "samples.jsonl").write_text(json.dumps(null) + "\n")
    [found] = read_runs([str(run)])
    assert rows_of(samples_section([found]))[1] == ["5", "(nothing)", "–", "–"]


def test_rows_that_a_run_left_out_are_told_as_it_recorded_them(tmp_path):
    run, left_out = write_run(tmp_path / "a", [line(5)]), LeftOut()
    left_out.note("train", "q.csv", skipped=[1])
    left_out.note(
        "train", "q.csv", skipped=[4, 9, 12, 15, 16, 17], cut=np.array([2]), dropped=[], other_kind=SomeRows(1, [1])
    )
    left_out.note_unknown("refuse", -0.7123, [3, 8], unscored=2)
    record = left_out.record({"q.csv": 812}, {"q.csv (5% held out)": np.int64(43)})
    (run / ROWS).write_text(json.dumps(record))
    found = read_rows_record(run / ROWS)
    assert found.train[0].others == {"skipped": (6, [4, 9, 12, 15, 16]), "cut": (1, [2]), "other_kind": (1, [1])}
    said = left_out_section(read_runs([str(run)]), {})
    assert rows_of(said) == [["Source", "For", "Rows"], ["q.csv", "training", "812"],
                             ["q.csv (5% held out)", "evaluation", "43"]]  # fmt: skip
    for sentence in (
        "q.csv, training: 6 rows are left out, as a cell is empty or missing (row 4, 9, 12, 15, 16, …)",
        "q.csv, training: 1 row is taken without the end of the answer, which --max_length cuts (row 2)",
        "q.csv, training: 1 row is other kind (row 1)",
        "2 rows that the base model does not know (below -0.7123) are trained with a refusal for an answer (row 3, 8)",
        "2 rows could not be told known or unknown, as nothing decisive was within --max_length, and stayed",
        "There is no samples.jsonl: the page does not show samples (--sample_steps of train_loop.py has a run draw "
        "them).",
    ):
        assert sentence in words_of(said)
    (run / ROWS).write_text(json.dumps(LeftOut().record({"q.csv": 5}, {})))
    assert "All rows were taken whole." in words_of(left_out_section(read_runs([str(run)]), {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "rows.json: not JSON"),
        ('{"eval": []}', "rows.json: it lacks 'train'"),
        ('{"train": [{"source": "a", "rows": -1}]}', "train[0]: rows: expected a whole number from 0, found -1"),
        ('{"train": [{"source": "a", "rows": 1, "cut": {"number": 1}}]}', "train[0]: cut: it lacks 'first'"),
        ('{"train": [], "unknown": {"treatment": "drop"}}', "rows.json: unknown: it lacks"),
    ],
)
def test_a_record_of_rows_that_is_none_is_noted(tmp_path, content, message):
    run = write_run(tmp_path / "a", [line(5)])
    (run / "rows.json").write_text(content)
    (run / "noisefit_config.json").write_text("full")
    assert call(report, run, "--output", tmp_path / "r").returncode == 0
    said = words_of((tmp_path / "r.html").read_text())
    assert [s for s in said if message in s and s.endswith("; the page does not show which rows were left out.")]
    assert [s for s in said if s.endswith("noisefit_config.json: not JSON; the page does not show its settings.")]


PROMPTS = [(f"Where is {name}?", f"It is in {name}land.") for name in ("Ada", "Bea", "Cia", "Dea")]
ROUNDS = [["It is in Adaland.", "Bealand"], ["Cialand", "Dealand"], ["I do not know.", "I do not know."],
          ["It is in Ada.", "It is in Ada."]]  # fmt: skip


def write_answers(path, **options):
    path.write_text(json_lines(answer_lines(PROMPTS, ROUNDS, **options)))
    return str(path)


def test_rates_are_those_of_the_score_and_wrong_answers_come_first(tmp_path):
    path = write_answers(tmp_path / "a.jsonl")
    files, figures = read_answer_files([path, str(tmp_path / "." / "a.jsonl")]), score([path], None)
    assert [file.name for file in files] == ["a.jsonl"]
    section = answers_section(files, most=50)
    rates = dict(rows_of(section)[1:12])
    for label, name in (("Right", "right_rate"), ("Wrong", "wrong_rate"), ("Not attempted", "not_attempted_rate")):
        low, high = figures[f"{name}_ci"]
        assert rates[label] == f"{figures[name]:.1%} ({low:.1%} to {high:.1%})"
    assert rates["Wrong"].startswith("62.5%") and rates["AUROC of confidence"].startswith(f"{figures['auroc']:.3f}")
    # All wrong, and of these the surer answer first; then half wrong; then no attempt.
    assert [item.prompt.prompt for item in ranked(files[0].assessed)] == [PROMPTS[i][0] for i in (1, 3, 0, 2)]
    rows = rows_of(section)[-10:]
    sure = [f"{np.exp(-0.25 * (1 + place + number)):.0%}" for place, number in ((1, 1), (1, 2), (3, 1))]
    assert rows[0] == ["Rounds", "Answer", "Sure", "Outcome"]
    assert rows[1:3] == [["1 of 2", "Cialand", sure[0], "✗ wrong"], ["1 of 2", "Dealand", sure[1], "✗ wrong"]]
    assert rows[4] == ["2 of 2", "It is in Ada.", sure[2], "✗ wrong"]
    assert rows[9] == ["2 of 2", "I do not know.", f"{np.exp(-1.0):.0%}", "– not attempted"]


def test_what_is_not_shown_is_counted(tmp_path):
    files = read_answer_files([write_answers(tmp_path / "a.jsonl")])
    said = words_of(answers_section(files, most=1))
    counts = "8 answers to 4 prompts: 1 right, 5 wrong, 2 not attempted."
    first, left = "Those with wrong answers come first.", "1 prompts are shown; 3 are left out, 2 of which have wrong"
    assert f"{counts} {first} {left} answers (--show N shows more)." in said
    assert PROMPTS[1][0] in said and PROMPTS[3][0] not in said
    assert "With fewer than 20 prompts the intervals are too narrow." in said
    assert words_of(answers_section(files, most=4)).count(f"{counts} {first}") == 1


def test_curves_are_those_of_the_score_and_a_file_without_confidence_is_named(tmp_path):
    sure, unsure = write_answers(tmp_path / "a.jsonl"), write_answers(tmp_path / "b.jsonl", logprob=None)
    files = read_answer_files([sure, unsure])
    rows = rows_of(confidence_section(files))
    assert rows[0] == ["Wrong among the surest", "a.jsonl"] and [row[0] for row in rows[1:]] == [
        "10%", "30%", "50%", "80%", "100%",
    ]  # fmt: skip
    risk, _ = curve(files[0].assessed)
    assert [row[1].partition(" ")[0] for row in rows[1:]] == [f"{risk[p - 1]:.1%}" for p in (10, 30, 50, 80, 100)]
    assert curves_picture(files[:1]).startswith(b"\x89PNG") and confidence_section(files[1:]) == ""
    assert lacking(files)["b.jsonl"][0] == (
        "No curve of risk and coverage: there is no column logprob, so no confidence."
    )
    refused = json_lines(answer_lines(PROMPTS[:1], [["I do not know.", ""]]))
    (tmp_path / "c.jsonl").write_text(refused)
    [file] = read_answer_files([str(tmp_path / "c.jsonl")])
    assert "no answer is an attempt" in lacking([file])["c.jsonl"][0] and not file.has_curve


def test_answers_alone_have_a_page_and_an_older_picture_goes(tmp_path):
    path = write_answers(tmp_path / "a.jsonl", logprob=None)
    done = call(report, write_run(tmp_path / "run", [SMALL]), "--answers", path, "--output", tmp_path / "r")
    assert done.stdout.split() == [str(tmp_path / "r.png"), str(tmp_path / "r.html")], done.stderr
    done = call(report, "--answers", path, "--output", tmp_path / "r")
    assert done.stdout.split() == [str(tmp_path / "r.html")] and not (tmp_path / "r.png").exists()
    page = (tmp_path / "r.html").read_text()
    assert "<h1>Answers to prompts</h1>" in page and "<img" not in page and 'id="answers"' in page
    done = call(report, "--answers", write_answers(tmp_path / "b.jsonl"), "--output", tmp_path / "r")
    assert done.returncode == 0 and (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("It is in Ada\n")
    assert call(report, "--answers", path, "--refusals", phrases, "--output", tmp_path / "r").returncode == 0
    assert "1 right, 3 wrong, 4 not attempted" in (tmp_path / "r.html").read_text()


def test_answers_that_cannot_be_used_end_in_one_line(tmp_path):
    (tmp_path / "no.csv").write_text("prompt,generated_response\nWho?,Ada\n")
    good = write_answers(tmp_path / "a.jsonl")
    for words, message in [
        (["--answers", tmp_path / "no.csv"], "no column 'response'"),
        (["--answers", tmp_path / "none.csv"], "none.csv: no such file"),
        (["--answers", good, "--show", "-1"], "--show: '-1' is not a whole number from 0"),
        ([good], "a file, expected the output folder of a run; a file of answers goes behind --answers"),
        (["--answers", good, "--refusals", tmp_path / "x"], "--refusals"),
    ]:
        done = call(report, *words, "--output", tmp_path / "r")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, (words, done.stderr)
    (tmp_path / "a.jsonl.settings.json").write_text('{"mine": 1}')
    assert not (tmp_path / "r.html").exists()


def test_settings_of_answers_that_are_none_are_noted(tmp_path):
    good = write_answers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.settings.json").write_text('{"mine": 1}')
    [why, *others] = lacking(read_answer_files([good]))["a.jsonl"]
    assert why.endswith("settings.json: it lacks 'about'; the page does not show how the answers were drawn.")
    assert others == []


def test_text_is_cut_and_escaped_and_an_unknown_outcome_is_a_word():
    assert text("<a & 'b'>\x00\n") == "&lt;a &amp; &#x27;b&#x27;&gt;\ufffd\n"
    assert text("a\r\nb\u2028c\u2029d\re\x85f") == "a\nb\nc\nd\ne\nf"
    assert text("abcdef", 4) == "abcd … (2 more letters)" and text("abcd", 4) == "abcd"
    assert words_of(outcome("odd<")) == ["odd<"]
    assert rows_of(card("p", "", "Step", [("1", "", 0.001, "right")]))[1] == ["1", "(nothing)", "<1%", "✓ right"]
    assert '<td class="number">8.003e-05</td>' in table(["a", "b"], [["x", 8.003e-05]])
    assert rows_of(table(["a", "b"], [["x", float("nan")]])) == [["a"], ["x"]] and table(["a"], []) == "<p>none</p>"
