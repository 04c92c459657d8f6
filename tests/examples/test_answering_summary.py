"""The second world's tables and pictures against what was worked out by hand, and the file of chosen methods."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from running import ROOT, call

sys.path.insert(0, str(ROOT / "examples" / "world"))

import answering_pictures
import paired
import pictures
import results
import risk
import summary
from answering_pictures import Curve
from chosen import read_chosen
from methods import COMMON, Run
from runs import words

from noisefit.base.errors import InputError
from noisefit.run.settings import parse_arguments

TEACHER = "basefit:loss_mode=ce_teacher:teacher=base:hybrid_loss_alpha"
LABELS = {"teacher": f"{TEACHER}=0.5", "plain": "basefit"}
# Wrong at matched right, by method and seed.
PRIMARY = {
    "basefit": [0.20, 0.30, 0.10, 0.40, 0.25, 0.35],
    f"{TEACHER}=0.5": [0.10, 0.18, 0.02, 0.26, 0.17, 0.25],  # all lower: p is 2 / 2 ** 6
    f"{TEACHER}=0.2": [0.30, 0.20, 0.10, 0.40, 0.25, 0.35],  # one higher, one lower
}


@pytest.fixture
def path(tmp_path) -> Path:
    """Results of six worlds. The teacher has half of plain fine-tuning's wrong answers, in twice its time."""
    rows = []
    for method, values in PRIMARY.items():
        for seed, value in enumerate(values):
            row = dict.fromkeys(results.FIELDS, "0.5") | {"size": "answering", "seed": str(seed), "method": method}
            half = method.endswith("=0.5")
            row |= {"wrong_at_matched_right": str(value), "wrong_rate": str(0.3 if half else 0.6), "auroc": "0.9"}
            row |= {"train_seconds": "20" if half else "10", "hidden_growth": "nan" if method == "basefit" else "1.25"}
            rows.append(row | {"slip_rate": str(0.04 if half else 0.08), "asked": "10", "wrong_by_right": "0 1 1 2 3"})
    path = tmp_path / "r.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def labels(tmp_path) -> Path:
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps(LABELS))
    return path


def tables(path: Path, *flags: object) -> dict[str, list[dict[str, str]]]:
    """The printed tables by title, a row as its cells by their heads."""
    done = call(summary.main, path, "--size", "answering", "--markdown", *flags)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for block in done.stdout.strip().split("\n\n"):
        lines = block.splitlines()
        if not lines[0].startswith("|"):
            found[title := block] = []
            continue
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        found[title] = [dict(zip(head, row, strict=True)) for row in rows]
    return found


# --- The tables ------------------------------------------------------------------------------------------------------


def test_the_primary_figure_of_the_second_world_is_tested_in_pairs(path, labels):
    main, come, kinds, refusals, others = tables(path, "--labels", labels, "--against", "plain").values()
    differences = np.array([-0.10, -0.12, -0.08, -0.14, -0.08, -0.10])
    half = 100 * 2.570582 * differences.std(ddof=1) / math.sqrt(6)  # 95%, five degrees of freedom, one method
    assert [row["method"] for row in main] == ["teacher", "plain"]
    assert main[0]["wrong, %"].startswith("16.3 (") and main[1]["wrong, %"].startswith("26.7 (")
    assert main[0]["against plain, points"] == f"-10.3 ({-10.3333 - half:.1f} to {-10.3333 + half:.1f})"
    assert (main[0]["pairs"], main[0]["Holm p"], main[1]["Holm p"]) == ("6", "0.031", "-")
    assert [row["wrong_rate"] for row in come] == ["-30.0*", "60.0"]
    assert [row["auroc"] for row in come] == ["+0.000", "0.900"]
    assert [row["slip_rate"] for row in kinds] == ["4.0*", "8.0"]
    assert [row["hallucination_rate"] for row in refusals] == ["50.0", "50.0"]
    assert [row["hidden_growth"] for row in others] == ["1.250", "- [0]"]
    assert others[0]["training time, ratio"] == "2.00 (2.00 to 2.00)"


def test_the_family_is_of_the_methods_shown(path):
    [title, *_] = found = tables(path)
    assert "with 6 pairs, no Holm p of 2 methods is under 0.062" in title
    p_values = {row["method"]: row["Holm p"] for row in found[title]}
    assert p_values == {"basefit": "-", f"{TEACHER}=0.2": "1.000", f"{TEACHER}=0.5": "0.062"}


def test_a_family_of_methods_is_swept_by_the_primary_figure(path):
    [(title, rows)] = tables(path, "--sweep", "--methods", f"{TEACHER}*").items()
    assert title == "Means; all methods begin with basefit:loss_mode=ce_teacher:teacher=base:"
    assert [row["method"] for row in rows] == ["hybrid_loss_alpha=0.5", "hybrid_loss_alpha=0.2"]
    assert [row["wrong_at_matched_right"] for row in rows] == ["16.3", "26.7"]
    [(title, rows)] = tables(path, "--sweep").items()
    assert title == "Means:" and rows[0]["method"] == f"{TEACHER}=0.5"


def test_the_other_figure_may_be_asked_for_and_what_is_compared_with_is_always_there(path, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"teacher": f"{TEACHER}=0.5"}))
    [title, *_] = found = tables(path, "--labels", tmp_path / "one.json", "--primary", "hallucination_rate")
    assert title.startswith("Hallucination rate, ")
    assert [row["method"] for row in found[title]] == ["basefit", "teacher"]


# --- The file of chosen methods --------------------------------------------------------------------------------------


def test_the_chosen_methods_keep_their_order(labels):
    assert list(read_chosen(labels).items()) == list(LABELS.items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("label,method\n", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["basefit"]', "expected labels and methods"),
        ('{"plain": {"basefit": "x"}}', "expected labels and methods"),
        ('{"plain": 3}', "expected labels and methods"),
        ("{}", "no methods"),
        ('{"": "basefit"}', "an empty label or method"),
        ('{"plain": "basefit", "plain": "rdrop"}', "the label 'plain' is there twice"),
        ('{"plain": "basefit", "other": "basefit"}', "the method 'basefit' is there twice"),
    ],
)
def test_a_file_that_chooses_nothing_is_one_line(tmp_path, content, said):
    path = tmp_path / "chosen.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said) as raised:
        read_chosen(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_chosen_method_without_runs_is_one_line(path, tmp_path):
    (tmp_path / "c.json").write_text('{"plain": "basefit", "drop": "rdrop"}')
    for main, more in ((summary.main, []), (pictures.main, ["--output", tmp_path / "out"])):
        done = call(main, path, "--size", "answering", "--labels", tmp_path / "c.json", *more)
        assert done.returncode == 2 and "there are no runs of 'rdrop'" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


# --- The pictures ----------------------------------------------------------------------------------------------------


def test_the_curve_of_unknown_shares_is_the_committed_one():
    lines = answering_pictures.unknown_share_lines(
        paired.read_runs(ROOT / "docs" / "experiment" / "answering.csv", "answering")
    )
    assert list(lines) == [5, 20]
    for line in lines.values():
        assert list(line) == [0, 0.1, 0.2, 0.5, "told_only"] and {100, 101} <= set(line.index)
    # Of the page's table "Its controls": 43 and 46%, 14 and 21%, and 1 and 2% by the oracle.
    assert lines[20].loc[[100, 101], [0.5, 0.2, "told_only"]].round().to_numpy().tolist() == [[43, 14, 1], [46, 21, 2]]


def test_a_risk_line_is_the_mean_of_worlds_at_equal_shares_of_plain_right_answers():
    curves = {
        "basefit": {0: Curve((0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 9), 20), 1: Curve((0, 1, 2, 3, 8), 20)},
        "auto": {0: Curve((0, 0, 0, 0, 0, 1, 1, 1, 2, 4, 5), 20), 1: Curve((0, 2, 6), 20), 2: Curve((9,), 20)},
    }  # fmt: skip
    lines, worlds = answering_pictures.risk_lines(curves, {"plain": "basefit", "auto": "auto"})
    plain, auto = lines["plain"], lines["auto"]
    assert worlds == 2 and plain.whole and not auto.whole
    # At 90%, 9 of 10 and 4 of 4 right answers: 4 and 3 wrong ones; of auto 2, and all 6 with two right ones missing.
    assert plain.matched == pytest.approx((100 * (9 + 4) / 2 / 20, 100 * (4 + 3) / 2 / 20))
    assert auto.matched == pytest.approx((32.5, 100 * (2 + 6 + 2) / 2 / 20))
    assert plain.right[0] == plain.wrong[0] == 0
    assert (plain.right[-1], plain.wrong[-1]) == pytest.approx((100 * (10 + 4) / 2 / 20, 100 * (5 + 3) / 2 / 20))
    # Its world 1 ends at two right answers of plain's four: at half of them, with 5 of 10 in world 0.
    assert (auto.right[-1], auto.wrong[-1]) == pytest.approx((100 * (5 + 2) / 2 / 20, 100 * (0 + 2) / 2 / 20))
    for seed, curve in curves["auto"].items():
        if seed < 2:
            wanted = results.MATCHED * curves["basefit"][seed].right
            assert risk.matched(curve.wrong, 20, wanted) == pytest.approx({0: (0.1, 0), 1: (0.4, 0.1)}[seed])
    with pytest.raises(InputError, match="no seed on which basefit and all methods shown"):
        answering_pictures.risk_lines(curves, {"drop": "rdrop"})


def test_the_second_worlds_pictures_are_drawn_and_the_same_results_give_the_same_bytes(path, labels, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        done = call(pictures.main, path, "--size", "answering", "--labels", labels, "--output", folder)
        assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in first.iterdir()) == ["matched.png", "risk_coverage_answering.png"]
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes() and file.stat().st_size > 10_000
    done = call(pictures.main, path, "--size", "answering", "--only", "unknown_share", "--output", first)
    assert done.returncode == 2 and "there are no runs of basefit:unknown_share=" in done.stderr


# --- The page --------------------------------------------------------------------------------------------------------

EXPERIMENT = ROOT / "docs" / "experiment"
PAGE = (ROOT / "docs" / "experiment.md").read_text()


def test_the_page_says_what_the_tuning_found_and_the_best_settings_went_on():
    runs = paired.read_runs(EXPERIMENT / "tuning.csv", "answering")
    means = 100 * runs[["wrong_at_matched_right", "wrong_rate"]].groupby(level="method").mean()
    chosen = read_chosen(EXPERIMENT / "chosen.json").values()
    settings: dict[str, list[str]] = {}
    for label, method in read_chosen(EXPERIMENT / "tuning.json").items():
        assert sorted(runs.loc[method].index) == [100, 101, 102, 103]
        settings.setdefault(label.partition(": ")[0], []).append(method)
        cell = f"{label.partition(': ')[2]}: {means.loc[method].iloc[0]:.1f} ({means.loc[method].iloc[1]:.0f})"
        assert cell in PAGE, cell
    best = {family: min(methods, key=lambda m: (round(means.loc[m].iloc[0], 3), means.loc[m].iloc[1]))
            for family, methods in settings.items()}  # fmt: skip
    for family, methods in settings.items():
        went_on = set(methods) & set(chosen)
        assert went_on <= {best[family]} or family == "as published"


def test_the_tables_of_the_comparison_are_what_the_program_prints():
    tables = PAGE.partition("<!-- tables -->")[2].partition("<!-- end of tables -->")[0]
    chosen = ["--labels", EXPERIMENT / "chosen.json", "--against", "plain", "--markdown"]
    done = call(summary.main, EXPERIMENT / "fresh.csv", "--size", "answering", *chosen)
    assert done.stdout.strip() == tables.strip()


def test_every_method_was_compared_on_twelve_worlds_that_nothing_was_tuned_on():
    runs = paired.read_runs(EXPERIMENT / "fresh.csv", "answering")
    for name in ("chosen", "controls"):
        for method in read_chosen(EXPERIMENT / f"{name}.json").values():
            assert sorted(runs.loc[method].index) == list(range(200, 212))
    for name in ("tuning", "answering"):
        seeds = paired.read_runs(EXPERIMENT / f"{name}.csv", "answering").index.unique("seed")
        assert not set(seeds) & set(range(200, 212))


def test_the_file_of_the_best_noise_is_the_method_of_that_name():
    config = yaml.safe_load((ROOT / "configs" / "base_teacher.yaml").read_text())
    flags = Run("answering", 200, read_chosen(EXPERIMENT / "chosen.json")["teacher and noise"]).flags
    settings = parse_arguments(words({"model": "m", "train_data": "t.csv"} | flags))
    assert {
        name: getattr(settings, name) for name in config
    } == config and flags.keys() - COMMON.keys() <= config.keys()
