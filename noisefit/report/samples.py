"""What the page says of the answers that a run drew while it trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from noisefit.report.html import card, details, section
from noisefit.report.records import Sample
from noisefit.report.runs import Run

MOST = 12  # different answers to a prompt: the first, and the last ones


def samples_section(runs: Sequence[Run]) -> str:
    """The answers to each sampled prompt, one step below the other; nothing where no run has any."""
    with_samples = [run for run in runs if run.samples]
    if not with_samples:
        return ""
    parts = ["<p>Greedy answers to the same prompts as the training went on. Steps whose answer is the same stand "
             "together; how sure the model was is the probability that it gave the whole answer, at the last of "
             "them.</p>"]  # fmt: skip
    for run in with_samples:
        by_prompt: dict[tuple[str, str], list[Sample]] = {}
        for sample in run.samples:
            by_prompt.setdefault((sample.prompt, sample.reference), []).append(sample)
        cards = [card(prompt, reference, "Step", _rows(samples)) for (prompt, reference), samples in by_prompt.items()]
        parts += cards if len(runs) == 1 else [details(run.name, *cards)]
    return section("samples", "Samples while training", *parts)


def _rows(samples: Sequence[Sample]) -> list[tuple[str, str, float, str]]:
    """A row for each answer that is another one than at the step before."""
    rows = []
    for (answer, outcome), some in groupby(samples, key=lambda sample: (sample.answer, sample.outcome)):
        same = list(some)
        steps = f"{same[0].step:g}" if len(same) == 1 else f"{same[0].step:g}–{same[-1].step:g}"
        rows.append((steps, answer, math.exp(same[-1].logprob), outcome))
    if len(rows) <= MOST:
        return rows
    return [rows[0], ("…", f"({len(rows) - MOST} other answers are not shown)", math.nan, ""), *rows[1 - MOST :]]
