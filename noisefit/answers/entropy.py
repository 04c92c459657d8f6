"""Semantic entropy: how many meanings the rounds of a prompt have (Farquhar et al., Nature 630, 2024).

The rounds are clustered by meaning, and the entropy is that of the clusters' shares: the paper's discrete estimator.
Two answers mean the same if each follows from the other. By the word rule an answer follows from another that holds its
decisive parts, what it says beyond the question; all refusals mean the same, and all empty answers. Or an entailment
model says what follows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from noisefit.answers.outcomes import Assessed
from noisefit.answers.refusals import is_refusal
from noisefit.answers.scoring import Prompt, decisive_parts, holds
from noisefit.base.errors import InputError

PAIRS_AT_ONCE = 32

SameMeaning = Callable[[Prompt, str, str], bool]
"""Whether two answers to a prompt mean the same."""


def with_entropy(assessed: Sequence[Assessed], same: SameMeaning) -> list[Assessed]:
    """The same prompts with the entropy of their rounds; as they are where one has a single round, which has none."""
    if any(len(item.prompt.answers) < 2 for item in assessed):
        return list(assessed)
    return [replace(item, entropy=entropy(clusters(item.prompt, same))) for item in assessed]


def clusters(prompt: Prompt, same: SameMeaning) -> list[int]:
    """The number of each round's cluster: an answer joins the first cluster whose first answer means the same."""
    first: list[str] = []
    found = []
    for answer in prompt.answers:
        places = (i for i, other in enumerate(first) if answer == other or same(prompt, other, answer))
        place = next(places, len(first))
        if place == len(first):
            first.append(answer)
        found.append(place)
    return found


def entropy(labels: Sequence[int]) -> float:
    """The entropy of the labels' shares, in nats: 0 where all are one, log n where n are all different."""
    shares = [count / len(labels) for count in Counter(labels).values()]
    return -sum(share * math.log(share) for share in shares) + 0.0


def same_by_words(more: Sequence[str] = ()) -> SameMeaning:
    """The word rule; `more` are further phrases that refuse."""

    def same(prompt: Prompt, first: str, second: str) -> bool:
        question = prompt.question or prompt.prompt
        refusals = [is_refusal(answer, more, question) for answer in (first, second)]
        if any(refusals) or not first.strip() or not second.strip():
            return all(refusals) or not (first.strip() or second.strip())
        return all(holds(holder, decisive_parts(question, held)) for holder, held in ((first, second), (second, first)))

    return same


def same_by_model(name: str, prompts: Iterable[Prompt]) -> SameMeaning:
    """By an entailment model: each answer, after the question, is entailed by the other (Farquhar et al.).

    Args:
        name: folder, or name on the hub, of a sequence classification model one of whose labels is `entailment`.
        prompts: those that will be asked about; the model sees all their pairs here, in batches.

    Raises:
        InputError: there is no such model, or it has no such label.
    """
    tokenizer, model, label = _load(name)
    pairs: dict[tuple[str, str], bool] = {}
    for prompt in prompts:
        texts = list(dict.fromkeys(_in_context(prompt, answer) for answer in prompt.answers))
        pairs |= {(a, b): False for a in texts for b in texts if a != b}
    # Long ones together, so that little is padding.
    wanted = sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    for start in range(0, len(wanted), PAIRS_AT_ONCE):
        batch = wanted[start : start + PAIRS_AT_ONCE]
        pairs |= dict(zip(batch, _entailed(tokenizer, model, label, batch), strict=True))

    def same(prompt: Prompt, first: str, second: str) -> bool:
        one, other = _in_context(prompt, first), _in_context(prompt, second)
        return one == other or (pairs[one, other] and pairs[other, one])

    return same


def _in_context(prompt: Prompt, answer: str) -> str:
    return f"{prompt.question or prompt.prompt} {answer.strip()}"


def _load(name: str) -> tuple[Any, Any, int]:
    import torch  # here, as it takes seconds, and the word rule needs none of it
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from noisefit.inputs.model_checks import check_model_name, check_weights, loading

    flag = "--entailment_model"
    check_model_name(flag, name)
    with loading(flag, name, "a sequence classification model in safetensors, with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        model, report = loaded
        check_weights(report, Path(name).name)
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer has no padding token")
    labels = {str(label).lower(): int(number) for number, label in model.config.id2label.items()}
    if "entailment" not in labels:
        raise InputError(f"{flag} {name}: its labels are {', '.join(sorted(labels))}; expected one that is entailment")
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), labels["entailment"]


def _entailed(tokenizer: Any, model: Any, label: int, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the second text of each pair follows from the first: `entailment` is the likeliest label."""
    import torch

    premises, hypotheses = (list(texts) for texts in zip(*pairs, strict=True))
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**6)
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    batch = tokenizer(premises, hypotheses, **options).to(model.device)
    with torch.inference_mode():
        return [int(found) == label for found in model(**batch).logits.argmax(-1)]
