"""The threshold on confidence: the smallest that conformal risk control allows, and its promise by simulation."""

import csv
import io
import json
import math

import numpy as np
import pytest
from running import call

from noisefit.answers.conformal import shortest_between, threshold_for
from noisefit.answers.outcomes import NOT_ATTEMPTED, RIGHT, WRONG, Assessed
from noisefit.answers.scoring import Prompt
from noisefit.threshold import find_threshold, main


def sample(rng: np.random.Generator, prompts: int, rounds: int, levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and outcomes of a model that is overconfident, `[prompts, rounds]`; `levels` makes many equal."""
    knows = rng.random((prompts, 1)) < 0.5
    confidence = np.where(knows, rng.beta(5, 2, (prompts, rounds)), rng.beta(2, 3, (prompts, rounds)))
    if levels:
        confidence = np.ceil(confidence * levels) / levels
    wrong = rng.random((prompts, rounds)) > np.where(knows, 0.9, 0.3)
    outcomes = np.where(wrong, WRONG, RIGHT).astype(object)
    return confidence, np.where(rng.random((prompts, rounds)) < 0.1, NOT_ATTEMPTED, outcomes)


def assessed_of(confidence: np.ndarray, outcomes: np.ndarray) -> list[Assessed]:
    return [
        Assessed(Prompt(f"q{i}", "r", ("",) * len(o), logprobs=tuple(map(math.log, c))), tuple(o))
        for i, (c, o) in enumerate(zip(confidence, outcomes, strict=True))
    ]


def losses(confidence: np.ndarray, outcomes: np.ndarray, threshold: float) -> np.ndarray:
    """Of each prompt the share of rounds that are answered and wrong."""
    return ((outcomes == WRONG) & (np.exp(np.log(confidence)) >= threshold)).mean(1)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("levels", [None, 12])
@pytest.mark.parametrize("target", [0.03, 0.1, 0.35])
def test_it_is_the_smallest_that_the_bound_allows(rounds, levels, target):
    for seed in range(20):
        confidence, outcomes = sample(np.random.default_rng(seed), 60, rounds, levels)
        found = threshold_for(assessed_of(confidence, outcomes), target)

        def allowed(threshold, confidence=confidence, outcomes=outcomes):
            return losses(confidence, outcomes, threshold).sum() + 1 <= 61 * target + 1e-7

        candidates = np.unique(np.exp(np.log(confidence[outcomes != NOT_ATTEMPTED])))
        good = [level for level in candidates if allowed(level)]
        if not good:
            assert found is None
            continue
        assert found is not None and allowed(found)
        # It lets through what the smallest good level does: no less, no more.
        attempted = np.exp(np.log(confidence))[outcomes != NOT_ATTEMPTED]
        assert (attempted >= found).tolist() == (attempted >= min(good)).tolist()
        assert len(repr(found)) < 12 or levels is None


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "rounds", "levels", "target"),
                         [(30, 1, None, 0.1), (100, 1, 12, 0.05), (40, 3, None, 0.08)])  # fmt: skip
def test_the_promise_holds_on_average_over_sets_of_prompts(prompts, rounds, levels, target):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(1500):
        confidence, outcomes = sample(rng, prompts + 40, rounds, levels)  # the last are those to come
        threshold = threshold_for(assessed_of(confidence[:prompts], outcomes[:prompts]), target)
        later = losses(confidence[prompts:], outcomes[prompts:], math.inf if threshold is None else threshold)
        found.append(later.mean())
    error = np.std(found) / math.sqrt(len(found))
    assert np.mean(found) <= target + 3 * error
    # And it is not kept by refusing more than it must: the paper's lower bound, for losses that do not jump.
    if levels is None:
        assert np.mean(found) >= target - 2 / (prompts + 1) - 3 * error


def test_where_all_may_be_answered_and_where_none_may():
    right = assessed_of(np.full((30, 1), 0.5), np.full((30, 1), RIGHT, object))
    assert threshold_for(right, 0.05) == 0 and threshold_for(right, 0.03) is None  # of 30 prompts: 1 / 31
    assert threshold_for(right[:19], 0.05) == 0 and threshold_for(right[:18], 0.05) is None
    worst = assessed_of(np.full((30, 1), 0.5), np.array([[WRONG]] * 10 + [[RIGHT]] * 20, object))
    assert threshold_for(worst, 0.05) is None  # all are equally confident


@pytest.mark.parametrize(
    ("low", "high", "number"),
    [(0.31, 0.32, 0.32), (0.314, 0.327, 0.32), (0.09, 0.95, 0.1), (0.3, 0.4, 0.4), (0.5, 0.5000001, 0.5000001)],
)
def test_the_shortest_number_between(low, high, number):
    assert shortest_between(low, high) == pytest.approx(number, abs=1e-12) and low < shortest_between(low, high) <= high
    above = math.nextafter(low, 1)
    assert shortest_between(low, above) == above


def write(path, confidence, outcomes, logprob=True) -> str:
    said = {RIGHT: "X", WRONG: "Y", NOT_ATTEMPTED: "I don't know."}
    file = io.StringIO(newline="")
    rows = [
        (f"q{i}", "It is X.", said[o], r + 1, math.log(c) if logprob else "")
        for i, pair in enumerate(zip(confidence, outcomes, strict=True))
        for r, (c, o) in enumerate(zip(*pair, strict=True))
    ]
    csv.writer(file).writerows([("prompt", "response", "generated_response", "round", "logprob"), *rows])
    path.write_text(file.getvalue())
    return str(path)


def test_the_command_line(tmp_path):
    confidence, outcomes = sample(np.random.default_rng(0), 100, 2, None)
    answers = write(tmp_path / "a.csv", confidence, outcomes)
    found = json.loads(call(main, answers, "--target_wrong", "0.1", "--json").stdout)
    assert found == find_threshold(answers, 0.1) and found["target_wrong"] == 0.1 and found["prompts"] == 100
    assert found["threshold"] == threshold_for(assessed_of(confidence, outcomes), 0.1)
    answered = (confidence >= found["threshold"]) & (outcomes != NOT_ATTEMPTED)
    assert found["answered_rate"] == pytest.approx(answered.mean())
    assert found["wrong_rate"] == pytest.approx((answered & (outcomes == WRONG)).mean()) and found["wrong_rate"] <= 0.1
    assert found["right_rate"] == pytest.approx((answered & (outcomes == RIGHT)).mean())
    assert found["wrong_given_answered"] == pytest.approx(found["wrong_rate"] / found["answered_rate"])
    said = call(main, answers, "--target_wrong=0.1").stdout
    assert f"at least {found['threshold']!r}\n" in said and f"--abstain_below {found['threshold']!r}" in said
    refused = json.loads(call(main, answers, "--target_wrong", "0.005", "--json").stdout)
    assert refused["threshold"] is None and refused["answered_rate"] == refused["wrong_rate"] == 0
    assert "needs 199 prompts at least" in refused["reason"]
    said = call(main, answers, "--target_wrong", "0.005")
    assert said.returncode == 0 and "refuse all" in said.stdout
    # A phrase that refuses is no wrong answer.
    (tmp_path / "refusals.txt").write_text("Y\n")
    none_wrong = call(main, answers, "--target_wrong", "0.05", "--refusals", tmp_path / "refusals.txt", "--json").stdout
    assert json.loads(none_wrong)["threshold"] == 0 and json.loads(none_wrong)["wrong_rate"] == 0


def test_answers_that_were_replaced_count_as_they_were(tmp_path):
    """A refusal that `--abstain_below` put in the place of a wrong answer does not say that it may be given."""
    answers = write(tmp_path / "a.csv", *sample(np.random.default_rng(0), 100, 2, None))
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = [row | {"answer_before_abstaining": row["generated_response"]} for row in csv.DictReader(file)]
    for row in rows:
        if float(row["logprob"]) < math.log(0.7):
            row["generated_response"] = "I do not know."
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.DictWriter(file, rows[0]).writerows([{name: name for name in rows[0]}, *rows])
    found, expected = find_threshold(str(tmp_path / "b.csv"), 0.2), find_threshold(answers, 0.2)
    assert found == expected | {"file": found["file"]} and 0.1 < found["threshold"] < 0.7


def test_what_cannot_be_used_is_refused_in_a_line(tmp_path):
    answers = write(tmp_path / "a.csv", *sample(np.random.default_rng(0), 9, 1, None), logprob=False)
    for target in ("0", "1", "-0.1", "1.5", "nan", "much"):
        done = call(main, answers, f"--target_wrong={target}")
        assert done.returncode == 2 and f"'{target}' is not a number between 0 and 1" in done.stderr
    done = call(main, answers, "--target_wrong", "0.1")
    assert done.returncode == 2 and "no column 'logprob' with a value in it" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert call(main, answers).returncode == 2
