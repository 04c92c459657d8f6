"""The experiment's statistics against independent computations, and its pictures."""

import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import ROOT, call

WORLD_FOLDER = ROOT / "examples" / "world"
sys.path.insert(0, str(WORLD_FOLDER))

import paired  # noqa: E402
import pictures  # noqa: E402
import results  # noqa: E402
import summary  # noqa: E402

pytestmark = pytest.mark.slow


def write(path: Path, runs: dict[str, dict[int, float]], **others: object) -> Path:
    """A results file of these hallucination rates, by method and seed; all other measures are 0.5 or as given."""
    rows = []
    for method, rates in runs.items():
        for seed, rate in rates.items():
            row = dict.fromkeys(results.FIELDS, "0.5") | {name: str(value) for name, value in others.items()}
            row |= {"asked": "10", "wrong_by_right": "0 1"}
            rows.append(row | {"size": "standard", "seed": str(seed), "method": method, "flags": f"--{method}"}
                        | {"hallucination_rate": str(rate)})  # fmt: skip
    np.random.default_rng(0).shuffle(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def program(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return call({"summary.py": summary.main, "pictures.py": pictures.main}[name], *arguments)


def summary_of(path: Path, *arguments: object) -> dict[tuple[str, str], dict[str, float]]:
    done = program("summary.py", path, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {(row["measure"], row["method"]): row for row in json.loads(done.stdout)}


# --- The statistics --------------------------------------------------------------------------------------------------


def test_the_interval_of_ten_values_by_students_table():
    values = [0.31, 0.29, 0.35, 0.30, 0.28, 0.33, 0.36, 0.27, 0.32, 0.30]
    mean = math.fsum(values) / 10
    half = 2.262157 * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / 9 / 10)
    assert paired.t_interval(values) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
    wider = 3.249836 * half / 2.262157  # 99%
    assert paired.t_interval(values, 0.99)[2] == pytest.approx(mean + wider, rel=1e-6)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_the_sign_flip_test_counts_every_pattern_of_signs(count):
    differences = np.random.default_rng(count).normal(0.02, 0.03, count)
    patterns = list(itertools.product((-1, 1), repeat=count))
    observed = abs(differences.sum())
    as_large = sum(abs(np.dot(signs, differences)) >= observed - 1e-12 for signs in patterns)
    assert paired.sign_flip_p(differences) == pytest.approx(as_large / len(patterns))


def test_ties_and_no_difference_are_no_evidence():
    assert paired.sign_flip_p([0.0, 0.0, 0.0]) == 1
    assert paired.sign_flip_p([0.1, -0.1]) == 1
    # 0.1 + 0.2 is not 0.3 in floating point, and yet these patterns tie.
    assert paired.sign_flip_p([0.1, 0.2, -0.3]) == 1
    assert paired.sign_flip_p([0.1] * 10) == 2 / 2**10
    # Shares of 240 questions with the six digits of a results file tie where the whole numbers do.
    for seed in range(20):
        counts = np.random.default_rng(seed).integers(0, 30, (2, 10))
        written = [[float(f"{count / 240:.6g}") for count in method] for method in counts]
        whole = (counts[0] - counts[1]).tolist()
        patterns = itertools.product((1, -1), repeat=len(whole))
        as_large = sum(abs(np.dot(signs, whole)) >= abs(sum(whole)) for signs in patterns)
        assert paired.sign_flip_p(np.subtract(*written)) == as_large / 2 ** len(whole)


def test_many_pairs_are_sampled_and_the_p_value_is_never_nought():
    p = paired.sign_flip_p([0.1] * 40)
    assert 0 < p < 1e-3 and p == paired.sign_flip_p([0.1] * 40)


def test_holm_on_a_worked_example():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, 1 x 0.04 raised to what stands before it
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1, 1]


# --- From the file to the figures -------------------------------------------------------------------------------------


def test_pairs_are_of_the_same_seed_and_only_of_seeds_that_both_have(tmp_path):
    path = write(
        tmp_path / "r.csv",
        {"basefit": {0: 0.30, 1: 0.40, 2: 0.50}, "auto": {2: 0.45, 0: 0.28, 7: 0.9}, "rdrop": {1: 0.1}},
    )
    found = summary_of(path)
    auto = found["hallucination_rate", "auto"]
    differences = [0.28 - 0.30, 0.45 - 0.50]
    assert auto["pairs"] == 2 and auto["seeds"] == 3 and auto["mean"] == pytest.approx((0.45 + 0.28 + 0.9) / 3)
    assert auto["difference"] == pytest.approx(np.mean(differences))
    half = 12.7062047 * np.std(differences, ddof=1) / math.sqrt(2)
    # A method with a single pair is no comparison: one method is left, whose interval needs no widening.
    assert auto["simultaneous_high"] == pytest.approx(np.mean(differences) + half, rel=1e-5)
    assert auto["p"] == auto["holm_p"] == 0.5
    rdrop = found["hallucination_rate", "rdrop"]
    assert rdrop["pairs"] == 1 and rdrop["difference"] is None and rdrop["holm_p"] is None


def test_intervals_of_several_methods_hold_together_and_time_is_a_ratio(tmp_path):
    base, other = {0: 0.3, 1: 0.4, 2: 0.5}, {0: 0.2, 1: 0.35, 2: 0.42}
    path = write(tmp_path / "r.csv", {"basefit": base, "auto": other, "rdrop": other})
    rows = list(csv.DictReader(path.open()))
    for row in rows:
        row["train_seconds"] = {"basefit": "10", "auto": "25", "rdrop": "20"}[row["method"]]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    found = summary_of(path)
    auto = found["hallucination_rate", "auto"]
    differences = np.array([-0.1, -0.05, -0.08])
    half = 6.205347 * differences.std(ddof=1) / math.sqrt(3)  # two degrees of freedom, 97.5% for each of two methods
    assert auto["simultaneous_low"] == pytest.approx(differences.mean() - half, rel=1e-5)
    assert auto["p"] == 0.25 and auto["holm_p"] == 0.5
    assert found["train_seconds", "auto"]["difference"] == pytest.approx(2.5)
    assert found["train_seconds", "rdrop"]["difference"] == pytest.approx(2.0)


def test_a_measure_without_questions_is_left_out(tmp_path):
    path = write(tmp_path / "r.csv", {"basefit": {0: 0.3, 1: 0.4}, "auto": {0: 0.2, 1: 0.3}},
                 hallucination_rate_famous="nan")  # fmt: skip
    found = summary_of(path)
    assert found["hallucination_rate_famous", "auto"]["pairs"] == 0
    assert found["hallucination_rate", "auto"]["pairs"] == 2
    assert "[0]" in program("summary.py", path).stdout


def test_methods_stand_in_their_order_and_a_sweep_in_that_of_its_rates(tmp_path):
    rates = {"rdrop": 0.1, "auto:lora_r=4": 0.2, "basefit": 0.3, "auto": 0.4}
    path = write(tmp_path / "r.csv", {name: {0: rate, 1: rate} for name, rate in rates.items()})

    def order(*flags: str) -> list[str]:
        done = program("summary.py", path, "--markdown", *flags)
        assert done.returncode == 0, done.stderr
        cells = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
        return list(dict.fromkeys(cell for cell in cells if cell in rates))

    assert order() == ["basefit", "rdrop", "auto", "auto:lora_r=4"]
    assert order("--sweep") == ["rdrop", "auto:lora_r=4", "basefit", "auto"]


@pytest.mark.parametrize(
    ("runs", "flags", "said"),
    [
        (None, [], "no such file"),
        ({}, [], "no runs of size standard"),
        ({"auto": {0: 0.3, 1: 0.4}}, [], "there are no runs of 'basefit'; there are those of auto"),
        ({"basefit": {0: 0.3}, "auto": {0: 0.3}}, [], "no method has two seeds in common with basefit"),
        ({"basefit": {0: 0.3}}, ["--methods", "magic"], "there are no runs of 'magic'"),
        ({"basefit": {0: "many"}}, [], "row 1 is damaged"),
    ],
)
def test_results_that_cannot_be_compared_are_one_line(tmp_path, runs, flags, said):
    path = tmp_path / "r.csv"
    if runs is not None:
        write(path, runs)
    for name in ("summary.py", "pictures.py"):
        output = ["--output", tmp_path / "out"] if name == "pictures.py" else []
        done = program(name, path, *output, *flags)
        assert done.returncode == 2 and said in done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
        assert not (tmp_path / "out").exists()


def test_the_tables_of_the_page_are_what_the_program_prints():
    page = (ROOT / "docs" / "first_world.md").read_text().partition("<!-- tables -->")[2]
    done = program("summary.py", ROOT / "docs" / "experiment" / "results.csv", "--markdown")
    assert done.stdout.strip() == page.partition("<!-- end of tables -->")[0].strip()


# --- The pictures ----------------------------------------------------------------------------------------------------


def test_a_swept_method_knows_its_place():
    assert pictures.swept("snr_largest:noise_std=0.3:num_noise_layers=1") == ("noise_std", "snr_largest, 1 layer", 0.3)
    assert pictures.swept("snr_lowest") == ("noise_std", "snr_lowest, 3 layers", 0.1)
    assert pictures.swept("auto:auto_scale_factors=2") == ("auto_scale_factors", "auto", 2.0)
    assert pictures.swept("auto") == ("auto_scale_factors", "auto, factors as by default", None)
    assert pictures.swept("basefit:epochs=7") is None


def test_the_pictures_are_drawn_and_the_same_results_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(1)
    names = ["basefit", "rdrop", "auto", "snr_largest:noise_std=0.3"]
    path = write(tmp_path / "r.csv", {name: dict(enumerate(rng.uniform(0.2, 0.4, 4))) for name in names})
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        done = program("pictures.py", path, "--output", folder, "--sweep", path)
        assert done.returncode == 0, done.stderr
    drawn = sorted(file.name for file in first.iterdir())
    assert drawn == [f"{name}.png" for name in ("calibration_consistency", "differences", "fame", "refusals", "sweep")]
    for name in drawn:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).stat().st_size > 10_000
