"""Figures of outcomes and confidences against brute force and sampling; the table of prompts; the picture."""

import csv
import io
import json
import math
import sys
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from running import call
from sklearn.metrics import brier_score_loss, roc_auc_score

from noisefit.answers.figures import RATES, auroc, differences, figures, risk_at, with_intervals
from noisefit.answers.outcomes import NOT_ATTEMPTED, RIGHT, WRONG, Assessed
from noisefit.answers.pictures import curve, draw
from noisefit.answers.scoring import Prompt
from noisefit.base.errors import InputError
from noisefit.score import main, score

LETTERS = {"r": RIGHT, "w": WRONG, "n": NOT_ATTEMPTED}


def assessed_of(*prompts: tuple[str, list[float] | None], entropies: list[float] | None = None) -> list[Assessed]:
    """Prompts by the letters of their outcomes and their confidences."""
    return [
        Assessed(
            Prompt(f"q{i}", "r", tuple(letters), logprobs=None if values is None else tuple(map(math.log, values))),
            tuple(LETTERS[letter] for letter in letters),
            None if entropies is None else entropies[i],
        )
        for i, (letters, values) in enumerate(prompts)
    ]


def drawn(seed: int, prompts: int = 40, rounds: int = 3, levels: int = 8) -> list[Assessed]:
    """Random outcomes with few levels of confidence, so that many are equal."""
    rng = np.random.default_rng(seed)
    return assessed_of(*(
        ("".join(rng.choice(list("rwn"), rounds, p=[0.5, 0.35, 0.15])), list(rng.integers(1, levels, rounds) / levels))
        for _ in range(prompts)
    ), entropies=list(rng.random(prompts).round(1)))  # fmt: skip


def once(assessed: list[Assessed]) -> dict[str, float]:
    return {name: value for name, [value] in figures(assessed, np.ones((1, len(assessed)), int)).items()}


def flat(assessed: list[Assessed], counts: list[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, right, entropy of each attempted answer, prompts repeated by their counts."""
    listed = [
        (math.exp(p), o == RIGHT, item.entropy)
        for item, count in zip(assessed, counts or [1] * len(assessed), strict=True)
        for _ in range(count)
        for o, p in zip(item.outcomes, item.prompt.logprobs, strict=True)
        if o != NOT_ATTEMPTED
    ]
    confidence, right, entropy = zip(*listed, strict=True)
    return np.array(confidence), np.array(right), np.array(entropy, float)


def mean_over_orders(confidence: np.ndarray, right: np.ndarray, figure) -> float:
    """The mean of a figure over all orders of the answers in which no more confident one comes later."""
    orders = [o for o in permutations(range(len(right))) if all(np.diff(confidence[list(o)]) <= 0)]
    return float(np.mean([figure([not right[i] for i in order]) for order in orders]))


def test_rates_are_means_over_prompts():
    found = once(assessed_of(("rrn", None), ("www", None), ("nnn", None), ("rwn", None)))
    assert found["right_rate"] == pytest.approx((2 / 3 + 1 / 3) / 4) and found["wrong_rate"] == pytest.approx(4 / 12)
    assert found["not_attempted_rate"] == pytest.approx(5 / 12) and found["attempted_rate"] == pytest.approx(7 / 12)
    assert found["right_given_attempted"] == pytest.approx(3 / 7) and set(found) == set(RATES)


@pytest.mark.parametrize("seed", range(3))
def test_each_figure_is_that_of_its_definition(seed):
    assessed = drawn(seed)
    confidence, right, entropy = flat(assessed)
    found = with_intervals(assessed)
    assert found["auroc"] == pytest.approx(roc_auc_score(right, confidence))
    pairs = list(product(confidence[right], confidence[~right]))
    assert found["auroc"] == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))
    assert found["brier"] == pytest.approx(np.mean((confidence - right) ** 2))
    edges = np.linspace(0, 1, 11)
    error = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low - 1e-12) & ((confidence < high - 1e-12) | (high == 1))
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert found["ece"] == pytest.approx(error)
    assert found["semantic_entropy"] == pytest.approx(np.mean([item.entropy for item in assessed]))
    assert found["semantic_entropy_auroc"] == pytest.approx(roc_auc_score(~right, entropy))
    assert found["wrong_at_100"] == pytest.approx(1 - right.mean())
    # What is resampled, for speed without scikit-learn, is the same.
    assert once(assessed) == pytest.approx({name: found[name] for name in once(assessed)})


def test_risk_and_coverage_where_confidences_are_equal():
    assessed = assessed_of(("rw", [0.9, 0.9]), ("wr", [0.9, 0.5]), ("nr", [0.99, 0.5]), ("w", [0.2]), ("r", [0.2]))
    confidence, right, _ = flat(assessed)
    found = once(assessed)
    area = mean_over_orders(confidence, right, lambda wrong: np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))
    assert found["aurc"] == pytest.approx(area)
    for percent in (10, 30, 50, 80, 100):
        kept = math.ceil(percent * 7 / 100 - 1e-9)
        assert found[f"wrong_at_{percent}"] == pytest.approx(
            mean_over_orders(confidence, right, lambda wrong, kept=kept: np.mean(wrong[:kept]))
        )
    # Of 100 answers seven percent are seven, not eight, whatever 0.07 is in a float.
    hundred = np.linspace(1, 0.1, 100)
    assert risk_at(hundred, np.arange(100) == 7, np.ones((1, 100), int), [7])[0, 0] == 0
    # And certainty is in the last bin.
    assert once(assessed_of(("rw", [1.0, 1.0]), ("ww", [1.0, 0.95])))["ece"] == pytest.approx(2.95 / 4)


def test_a_prompt_counted_twice_is_as_two_prompts():
    assessed, counts = drawn(5, prompts=12), [0, 1, 2, 3, 0, 1, 1, 4, 0, 1, 2, 1]
    repeated = [item for item, count in zip(assessed, counts, strict=True) for _ in range(count)]
    weighted = {name: value for name, [value] in figures(assessed, np.array([counts])).items()}
    assert weighted.keys() == once(repeated).keys()
    for name, value in once(repeated).items():
        assert weighted[name] == pytest.approx(value), name
    confidence, right, _ = flat(assessed, counts)
    assert weighted["auroc"] == pytest.approx(roc_auc_score(right, confidence))
    assert weighted["brier"] == pytest.approx(brier_score_loss(right, confidence))


@pytest.mark.slow
def test_intervals_are_those_of_prompts_drawn_again():
    assessed = drawn(7, prompts=60)
    found = with_intervals(assessed)
    rng = np.random.default_rng(1)
    values: dict[str, list[float]] = {}
    for _ in range(500):
        for name, value in once([assessed[i] for i in rng.integers(0, 60, 60)]).items():
            values.setdefault(name, []).append(value)
    for name, sample in values.items():
        low, high = np.percentile(sample, (2.5, 97.5))
        width = high - low
        assert found[f"{name}_ci"] == pytest.approx([low, high], abs=0.2 * width), name
        assert width > 0


def test_a_figure_that_is_not_defined_is_null():
    found = with_intervals(assessed_of(("rr", [0.5, 0.5]), ("rn", [0.5, 0.5])))
    assert found["auroc"] is None and found["auroc_ci"] is None and found["aurc"] == 0 and found["brier"] == 0.25
    found = with_intervals(assessed_of(("nn", [0.5, 0.5])))
    assert all(
        found[name] is None for name in ("right_given_attempted", "auroc", "brier", "ece", "aurc", "wrong_at_50")
    )
    assert "auroc" not in with_intervals(assessed_of(("rw", None)))
    lone = auroc(np.zeros(0), np.zeros(0, bool), np.zeros((2, 0), int))
    assert np.isnan(lone).all() and len(lone) == 2


def test_differences_are_paired_by_the_prompt():
    first = drawn(3)
    assert all(pair["difference"] == 0 and pair["p_value"] == 1 for pair in differences(first, first[::-1]).values())
    better = assessed_of(*(("r" * 3, [math.exp(p) for p in item.prompt.logprobs]) for item in first))
    found = differences(first, better)
    assert "semantic_entropy" not in found  # one of the two has none
    assert found["right_rate"]["difference"] == pytest.approx(1 - once(first)["right_rate"])
    low, high = found["right_rate"]["difference_ci"]
    assert low < found["right_rate"]["difference"] < high and found["right_rate"]["p_value"] < 0.001
    assert found["auroc"] == {"difference": None, "difference_ci": None, "p_value": None}
    # Of the 2 x 2 ways to exchange two files' answers to two prompts, half are as large.
    two = assessed_of(("r", None), ("r", None)), assessed_of(("w", None), ("w", None))
    assert differences(*two)["wrong_rate"]["p_value"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_two_files_that_differ_by_chance_are_rarely_told_apart():
    chances = [differences(drawn(seed, 20), drawn(seed + 500, 20))["aurc"]["p_value"] for seed in range(60)]
    assert np.mean(np.array(chances) < 0.1) < 0.25 and 0.35 < np.mean(chances) < 0.65


HEADER = ("prompt", "response", "kind", "generated_response", "round", "logprob")
ROWS = [
    ("Who wrote Emma?", "Jane Austen wrote Emma.", "book", "Jane Austen.", 1, -0.1),
    ("Who wrote Emma?", "Jane Austen wrote Emma.", "book", "Mary Shelley.", 2, -2.0),
    ("By whom, and when?", "In 1946, by J. Eckert.", "thing", "In 1946, by Edison", 1, -1.0),
    ("By whom, and when?", "In 1946, by J. Eckert.", "thing", "I don't know, $1", 2, "-3.5"),
    ("What is it?", "I do not know.", "thing", "I'm not sure.", 1, -0.5),
    ("What is it?", "I do not know.", "thing", "A cat", 2, 0),
]


def write(path, rows=ROWS, header=HEADER) -> str:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([header, *rows])
    path.write_text(file.getvalue())
    return str(path)


def test_the_command_line_has_all_figures(tmp_path):
    first = write(tmp_path / "a.csv")
    second = write(
        tmp_path / "b.csv", [(*row[:3], row[3].replace("Mary Shelley", "Jane Austen"), *row[4:]) for row in ROWS]
    )
    done = call(main, first, second, "--by", "kind", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    confidence = np.exp([-0.1, -2, -1, -3.5, -0.5, 0])
    right = np.array([1, 0, 0, 0, 1, 0])
    assert found["auroc"] == pytest.approx(roc_auc_score(right, confidence))
    assert found["brier"] == pytest.approx(np.mean((confidence - right) ** 2))
    assert found["by"]["kind"]["book"]["auroc"] == 1 and found["by"]["kind"]["thing"]["right_rate"] == 0.25
    pair = found["others"][0]["compared_with_first"]
    assert pair["difference"] == pytest.approx(-1 / 6)
    assert pair["figures"]["right_rate"]["difference"] == pytest.approx(1 / 6)
    assert pair["figures"]["brier"]["difference"] == pytest.approx(((1 - math.exp(-2)) ** 2 - math.exp(-2) ** 2) / 6)
    said = call(main, first, second, "--by", "kind").stdout
    for text in (
        "auroc",
        "wrong of the surest   10%: ",
        "its auroc",
        "right rate: +16.7 points",
        "right rate 25.0%, wrong rate 75.0%",
    ):
        assert text in said, text
    without = write(tmp_path / "c.csv", [(*row[:5], " ") for row in ROWS])
    found = json.loads(call(main, without, "--json").stdout)
    assert "auroc" not in found and "brier" not in found and "right_rate" in found


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", "row 2: no logprob, which other rows have"),
        ("much", "row 2: logprob is 'much', expected a number that is at most 0"),
        ("0.5", "row 2: logprob is '0.5', expected a number that is at most 0"),
        ("nan", "row 2: logprob is 'nan'"),
        ("-inf", "row 2: logprob is '-inf'"),
    ],
)
def test_a_confidence_that_is_none_is_refused(tmp_path, cell, message):
    rows = [row if number != 1 else (*row[:5], cell) for number, row in enumerate(ROWS)]
    with pytest.raises(InputError, match=message):
        score([write(tmp_path / "a.csv", rows)], None)


def test_the_table_of_prompts_says_what_decided(tmp_path):
    first, table = write(tmp_path / "a.csv"), tmp_path / "prompts.csv"
    done = call(main, first, "--per_prompt", table)
    assert done.returncode == 0 and str(table) in done.stderr
    rows = list(csv.DictReader(table.open(newline="")))
    assert [row["verdict"] for row in rows] == ["mixed", "wrong", "mixed"]
    lists = [{name: json.loads(row[name]) for name in ("outcomes", "decisive", "found", "missing")} for row in rows]
    assert lists[0]["decisive"] == ["jane austen"] and lists[0]["found"] == [["jane austen"], []]
    assert lists[1]["decisive"] == ["1946", "j eckert"] and lists[1]["found"] == [["1946"], []]
    assert lists[1]["missing"] == [["j eckert"], ["1946", "j eckert"]]
    assert lists[2]["decisive"] == ["a refusal"] and lists[2]["missing"] == [[], ["a refusal"]]
    assert lists[0]["outcomes"] == ["right", "wrong"] and json.loads(rows[0]["answers"])[1] == "Mary Shelley."
    assert float(rows[0]["right_rate"]) == 0.5 and float(rows[0]["right_given_attempted"]) == 0.5
    assert float(rows[0]["confidence"]) == pytest.approx((math.exp(-0.1) + math.exp(-2)) / 2)
    assert float(rows[0]["semantic_entropy"]) == pytest.approx(math.log(2))
    before = table.read_bytes()
    for arguments, why in [
        (("--per_prompt", table), "exists; choose another name, or give --overwrite_output"),
        (("--per_prompt", first, "--overwrite_output"), "is the input itself"),
        (("--per_prompt", tmp_path / "x.txt"), "expected a name that ends in .csv"),
        (("--per_prompt", tmp_path / "none" / "x.csv"), "no folder"),
        (("--picture", tmp_path / "x.csv"), "expected a name that ends in .png"),
    ]:
        done = call(main, first, *arguments)
        assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert table.read_bytes() == before
    assert call(main, first, first, "--per_prompt", table, "--overwrite_output").returncode == 0
    assert len(list(csv.DictReader(table.open(newline="")))) == 6


def test_the_words_found_are_of_the_truth_that_fits_best(tmp_path):
    row = ("Who?", "It was Tom Jones in Rome.", "Tom Jones in Paris", 1, '["Tom Smith", "Jones"]')
    header = ("prompt", "response", "generated_response", "round", "answers")
    call(main, write(tmp_path / "a.csv", [row], header), "--per_prompt", tmp_path / "p.csv")
    [found] = csv.DictReader((tmp_path / "p.csv").open(newline=""))
    assert found["verdict"] == "right" and json.loads(found["found"]) == [["jones"]]
    assert json.loads(found["decisive"]) == [["tom jones", "rome"], ["tom smith"], ["jones"]]
    call(
        main,
        write(tmp_path / "b.csv", [(*row[:4], "")], header),
        "--per_prompt",
        tmp_path / "p.csv",
        "--overwrite_output",
    )
    [found] = csv.DictReader((tmp_path / "p.csv").open(newline=""))
    assert found["verdict"] == "wrong"
    assert json.loads(found["found"]) == [["tom jones"]] and json.loads(found["missing"]) == [["rome"]]
    # What is said in the refusal itself is not found.
    refused = (*row[:2], "I don't know if Tom Jones was in Rome. Perhaps Smith.", 1, "")
    call(main, write(tmp_path / "c.csv", [refused], header), "--per_prompt", tmp_path / "q.csv")
    [found] = csv.DictReader((tmp_path / "q.csv").open(newline=""))
    assert found["verdict"] == "wrong" and json.loads(found["found"]) == [[]]


@pytest.mark.slow
def test_the_picture_is_the_curve(tmp_path):
    assessed = drawn(1, prompts=50)
    risk, (low, high) = curve(assessed)
    found = with_intervals(assessed)
    for percent in (10, 50, 100):
        assert risk[percent - 1] == pytest.approx(found[f"wrong_at_{percent}"])
        assert low[percent - 1] == pytest.approx(found[f"wrong_at_{percent}_ci"][0], abs=0.06)
        assert high[percent - 1] == pytest.approx(found[f"wrong_at_{percent}_ci"][1], abs=0.06)
    figure = draw({"a $x.csv": assessed, "b.csv": drawn(2)})
    lines = {line.get_gid(): line for line in figure.axes[0].lines}
    assert list(lines) == ["a $x.csv", "b.csv"]
    assert lines["a $x.csv"].get_ydata() == pytest.approx(risk) and list(lines["b.csv"].get_xdata()) == [*range(1, 101)]
    assert figure.axes[0].get_ylim()[1] >= high.max()
    done = call(main, write(tmp_path / "a.csv"), "--picture", tmp_path / "p.png")
    assert done.returncode == 0 and (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for rows, why in [
        ([(*row[:5], "") for row in ROWS], "no column 'logprob' with a value in it"),
        ([(*row[:3], "", *row[4:]) for row in ROWS], "no answer is an attempt"),
    ]:
        done = call(
            main, write(tmp_path / "b.csv", rows), "--picture", tmp_path / "q.png", "--per_prompt", tmp_path / "q.csv"
        )
        assert done.returncode == 2 and why in done.stderr and not list(tmp_path.glob("*q*"))


def test_without_matplotlib_the_picture_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = call(main, write(tmp_path / "a.csv"), "--picture", tmp_path / "p.png", "--per_prompt", tmp_path / "p.csv")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "pip install matplotlib" in done.stderr
    assert not list(tmp_path.glob("p.*")) and not done.stdout
