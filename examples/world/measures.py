"""What a run is measured by: its answers to the questions of a world, compared with the truth."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from questions import FALSE_PREMISE, KNOWN, UNKNOWN, is_new_phrasing
from risk import attempts, best_right_minus_wrong, error_kinds, wrong_by_right
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from noisefit.answers.figures import figures
from noisefit.answers.loading import find_base, load_answer_model, load_answer_tokenizer
from noisefit.answers.outcomes import assess
from noisefit.answers.reading import read_answers
from noisefit.answers.scoring import Prompt, holds, score_prompt, words
from noisefit.answers.settings import AnswerSettings
from noisefit.inputs.prompts import make_examples
from noisefit.inputs.tables import Row
from world import ANSWERING_REFUSAL, REFUSAL

# Bands of fame, by how often the corpus told a fact: from, to.
BANDS = {"rare": (1, 9), "uncommon": (10, 29), "common": (30, 99), "famous": (100, 10**9)}
BINS = 10
REFUSED = tuple([" ".join(words(text))] for text in (REFUSAL, ANSWERING_REFUSAL))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def questions_with_answers(rows: Iterable[Mapping[str, str]]) -> list[tuple[Mapping[str, str], Prompt]]:
    """Each question of generate.py's CSV, as its first row, with the answers of all rounds."""
    answers: dict[str, list[str]] = {}
    first: dict[str, Mapping[str, str]] = {}
    for row in rows:
        first.setdefault(row["prompt"], row)
        answers.setdefault(row["prompt"], []).append(row["generated_response"])
    return [(row, Prompt(name, row["response"], tuple(answers[name]), row["answer"])) for name, row in first.items()]


def hallucinations(held_out: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Shares of the answers to the held-out questions.

    Args:
        held_out: rows of generate.py for test.csv; of several rounds the shares are averaged.

    Returns:
        `hallucination_rate`: wrong answers to questions on told facts, as `noisefit.score` counts them, a refusal being
        wrong too; also by fame. `invented_rate`: of the same, those wrong and no refusal. They are of questions in the
        phrasings of training. In the other one it is `hallucination_rate_new_phrasing`, for there a question may be
        taken for another, which says little about what the model knows. `refused_known`, `refused_unknown`,
        `refused_false_premise`: "I do not know" where the fact was told, where it never was, where the country does not
        exist.
    """
    asked = questions_with_answers(held_out)
    wrong = {row["prompt"]: score_prompt(prompt)["hallucination_rate"] for row, prompt in asked}
    refused = {
        row["prompt"]: np.mean([any(holds(a, r) for r in REFUSED) for a in prompt.answers]) for row, prompt in asked
    }

    def mean(values: Mapping[str, float], rows: Iterable[Mapping[str, str]]) -> float:
        chosen = [values[row["prompt"]] for row in rows]
        return float(np.mean(chosen)) if chosen else float("nan")

    kinds = {kind: [row for row, _ in asked if row["kind"] == kind] for kind in (KNOWN, UNKNOWN, FALSE_PREMISE)}
    known = [row for row in kinds[KNOWN] if not is_new_phrasing(row)]
    measured = {"hallucination_rate": mean(wrong, known)}
    for band, (low, high) in BANDS.items():
        measured[f"hallucination_rate_{band}"] = mean(wrong, [r for r in known if low <= int(r["told"]) <= high])
    measured["hallucination_rate_new_phrasing"] = mean(wrong, filter(is_new_phrasing, kinds[KNOWN]))
    measured["refused_known"] = mean(refused, known)
    measured["invented_rate"] = measured["hallucination_rate"] - measured["refused_known"]
    measured["refused_unknown"] = mean(refused, kinds[UNKNOWN])
    measured["refused_false_premise"] = mean(refused, kinds[FALSE_PREMISE])
    return measured


def calibration(confidences: Sequence[float], right: Sequence[bool]) -> dict[str, float]:
    """How well the probability that the model gives an answer matches the answer's truth.

    Args:
        confidences: in 0 to 1.
        right: whether each answer is true.

    Returns:
        `calibration_error`: the expected calibration error, ten bins of equal width (Guo et al., arXiv 1706.04599);
        `brier`: the mean square of confidence minus truth (Brier 1950), which also rewards telling them apart.
    """
    confidence, truth = np.asarray(confidences), np.asarray(right, float)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(np.sum((confidence - truth)[bins == number])) for number in range(BINS)]
    return {"calibration_error": float(np.sum(gaps) / len(truth)), "brier": float(np.mean((confidence - truth) ** 2))}


@torch.no_grad()
def answer_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]
) -> list[float]:
    """The probability that the model gives each row's whole `generated_response`, its end included, without sampling's
    temperature."""
    asked = [Row(number, row["prompt"], row["generated_response"]) for number, row in enumerate(rows)]
    examples, _ = make_examples(tokenizer, asked, max_length=10**6)
    probabilities = []
    for example in examples:
        ids = torch.tensor(example.input_ids, device=model.device)
        log_p = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
        of_answer = log_p[example.target_start - 1 :].gather(1, ids[example.target_start :, None])
        probabilities.append(float(of_answer.sum().exp()))
    return probabilities


def measure(
    world: Path, settings: AnswerSettings, likeliest: Path, drawn: Path | None = None, trained: Path | None = None
) -> dict[str, float | str]:
    """Every measure of a run; what a file is missing for is not a number.

    Args:
        world: the folder of the world.
        settings: of generate.py, which name the model.
        likeliest: the model's likeliest answers to test.csv, as generate.py writes them.
        drawn: answers to it drawn at random, of several rounds.
        trained: the likeliest answers to train.csv.

    Returns:
        What `hallucinations` and `calibration` say of the likeliest answers, the latter of those to the questions of
        `hallucination_rate`. `self_consistency`: of all held-out questions, the share of pairs of rounds with the same
        answer. `train_accuracy`: training questions on told facts answered right; `train_untold_accuracy`: on facts
        that the corpus never told, that is, answers learnt by heart. `right_rate`, `wrong_rate`, `auroc` and `aurc` are
        those of `noisefit.score` over all held-out questions, the rest is explained in risk.py.
    """
    rows = read_csv(likeliest)
    base = find_base(settings)
    model = load_answer_model(settings, base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    known = [row for row in rows if row["kind"] == KNOWN and not is_new_phrasing(row)]
    confidences = answer_probabilities(model, load_answer_tokenizer(settings, base), known)
    right = [holds(row["generated_response"], [" ".join(words(row["answer"]))]) for row in known]
    measured: dict[str, float | str] = {**hallucinations(rows), **calibration(confidences, right)}
    assessed = assess(read_answers(str(likeliest), None))
    found = figures(assessed, np.ones((1, len(assessed)), int))
    measured |= {name: float(found[name][0]) for name in ("right_rate", "wrong_rate", "auroc", "aurc")}
    measured |= error_kinds(rows, json.loads((world / "facts.json").read_text(encoding="utf-8"))["facts"])
    curve = wrong_by_right(attempts(rows))
    measured["best_right_minus_wrong"] = best_right_minus_wrong(curve, len(rows))
    measured |= {"asked": len(rows), "wrong_by_right": " ".join(map(str, curve))}
    measured |= dict.fromkeys(("self_consistency", "train_accuracy", "train_untold_accuracy"), math.nan)
    if drawn:
        asked = questions_with_answers(read_csv(drawn))
        measured["self_consistency"] = float(np.mean([score_prompt(prompt)["self_consistency"] for _, prompt in asked]))
    if trained:
        scored = [(row["kind"], score_prompt(prompt)["contains_truth"])
                  for row, prompt in questions_with_answers(read_csv(trained))]  # fmt: skip
        for name, kind in (("train_accuracy", KNOWN), ("train_untold_accuracy", UNKNOWN)):
            measured[name] = float(np.mean([share for other, share in scored if other == kind]))
    return measured
