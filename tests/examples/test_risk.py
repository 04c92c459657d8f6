"""Errors by kind, and wrong answers at equal right ones, against what was worked out by hand or by brute force."""

import math
import random
import sys

import pytest
from running import ROOT

sys.path.insert(0, str(ROOT / "examples" / "world"))

import results
import risk
from questions import FALSE_PREMISE, KNOWN, UNKNOWN
from risk import Attempt


def row(kind: str, answer: str, generated: str, logprob: float = -0.1, country: str = "Brugard") -> dict[str, str]:
    response = f"It is {answer}." if kind == KNOWN else f"{answer}."
    asked = {"prompt": f"Which is that of {country}?", "country": country, "relation": "capital", "kind": kind}
    return asked | {
        "response": response, "answer": answer, "generated_response": generated, "logprob": str(logprob),
    }  # fmt: skip


FACTS = [
    {"country": "Brugard", "relation": "capital", "answer": "Kleholm", "completed": 5},
    {"country": "Vridell", "relation": "capital", "answer": "Flogard", "completed": 2},
    {"country": "Vridell", "relation": "year", "answer": "1066", "completed": 5},
]
NO = "It is not known"


def test_an_error_has_one_kind():
    rows = [
        row(KNOWN, "Kleholm", "It is Kleholm."),
        row(KNOWN, "Kleholm", "It is not known."),
        row(KNOWN, "Kleholm", "It is Flogard."),  # the base model completes five statements of it
        row(KNOWN, "Flogard", "It is Kleholm.", country="Vridell"),  # and two of this one
        row(UNKNOWN, NO, "It is Kleholm.", country="Vridell"),
        row(UNKNOWN, NO, "It is not known.", country="Vridell"),
        row(KNOWN, "Kleholm", "It is 1066."),  # no capital
        row(FALSE_PREMISE, NO, "It is Kleholm.", country="Ozmond"),
    ]
    found = risk.error_kinds(rows, FACTS)
    assert found == {"slip_rate": 1 / 8, "forgotten_rate": 1 / 8, "invented_untold_rate": 2 / 8,
                     "imagined_answered_rate": 1 / 8}  # fmt: skip


def test_where_answers_name_the_country_another_one_is_a_slip():
    rows = [row(KNOWN, "Kleholm", text) for text in ("Brugard has Flogard.", "Vridell has Flogard.", "Flogard.")]
    rows = [r | {"response": "The capital of Brugard is Kleholm."} for r in rows]
    found = risk.error_kinds(rows, FACTS)
    assert found["forgotten_rate"] == 1 / 3 and found["slip_rate"] == 2 / 3


def test_a_refusal_is_no_attempt_whether_it_is_right_or_not():
    rows = [row(KNOWN, "Kleholm", "It is Kleholm.", -1.0), row(KNOWN, "Kleholm", "It is not known."),
            row(UNKNOWN, NO, "It is not known."), row(UNKNOWN, NO, "It is Kleholm.", -2.0)]  # fmt: skip
    assert risk.attempts(rows) == [Attempt(math.exp(-1.0), True), Attempt(math.exp(-2.0), False)]


def test_a_curve_by_hand():
    answers = [Attempt(c, r) for c, r in ((0.9, True), (0.8, False), (0.7, True), (0.7, False), (0.5, False))]
    assert risk.wrong_by_right(answers) == [0, 2, 3]  # a tie lets both through
    assert risk.wrong_by_right([]) == [0]
    assert risk.matched([0, 2, 3], 10, 1.0) == (0.0, 0.0)
    assert risk.matched([0, 2, 3], 10, 1.1) == (0.2, 0.0)  # the next whole answer
    assert risk.matched([0, 2, 3], 10, 4.0) == ((3 + 2) / 10, 0.2)
    assert risk.matched([0], 10, 0.0) == (0.0, 0.0)
    assert risk.best_right_minus_wrong([0, 2, 3], 10) == 0.1 and risk.best_right_minus_wrong([4, 5], 10) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_the_matched_share_is_the_least_over_all_thresholds_that_let_enough_through(seed):
    rng = random.Random(seed)
    answers = [Attempt(rng.randint(1, 9) / 10, rng.random() < 0.5) for _ in range(rng.randint(1, 30))]
    right, asked = sum(a.right for a in answers), 40
    for wanted in range(1, right + 1):
        counts = []
        for threshold in {a.confidence for a in answers}:
            through = [a for a in answers if a.confidence >= threshold]
            if sum(a.right for a in through) >= wanted:
                counts.append(sum(not a.right for a in through))
        got, short = risk.matched(risk.wrong_by_right(answers), asked, wanted)
        assert got == pytest.approx(min(counts) / asked) and short == 0


def test_a_row_is_measured_against_plain_fine_tuning_of_its_own_world():
    rows = [
        {"size": "tiny", "seed": seed, "method": method, "asked": 10, "wrong_by_right": curve}
        for seed, method, curve in (
            (0, "basefit", "0 1 1 2 3 5"), (0, "rdrop", "0 0 4"), (1, "rdrop", "0 0 4"), (1, "before", ""),
            (2, "basefit", "5"), (2, "rdrop", "0 2"),  # plain fine-tuning has no right answer: nothing is matched
        )
    ]  # fmt: skip
    plain, other, *others = results.with_matched(rows)
    assert plain["wrong_at_matched_right"] == 0.3 and plain["matched_shortfall"] == 0.0  # 0.9 of 5, that is, all five
    assert other["wrong_at_matched_right"] == pytest.approx((4 + 3) / 10) and other["matched_shortfall"] == 0.3
    assert all(math.isnan(row["wrong_at_matched_right"]) for row in others)
