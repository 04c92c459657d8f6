"""What the page says of files of answers: their rates, the answers themselves, and curves of risk and coverage."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisefit.answers.entropy import same_by_words, with_entropy
from noisefit.answers.figures import COVERAGES, attempted, confidences, with_intervals
from noisefit.answers.outcomes import NOT_ATTEMPTED, OUTCOMES, WRONG, Assessed, assess
from noisefit.answers.reading import read_answers
from noisefit.answers.reading import read_phrases as read_phrases  # for the program
from noisefit.answers.scoring import summarize
from noisefit.report.drawing import as_png
from noisefit.report.files import or_noted
from noisefit.report.html import card, details, picture, section, table, text
from noisefit.report.records import read_drawing
from noisefit.report.runs import short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 20  # prompts, under which a bootstrap interval holds less than it says
SHARES = {  # figures, in percent
    "hallucination_rate": "Hallucination rate",
    "right_rate": "Right",
    "wrong_rate": "Wrong",
    "not_attempted_rate": "Not attempted",
    "right_given_attempted": "Right if attempted",
    "self_consistency": "Self-consistency",
}
PLAIN = {"auroc": "AUROC of confidence", "brier": "Brier score", "ece": "Calibration error (ECE)", "aurc": "AURC",
         "semantic_entropy": "Semantic entropy, nats"}  # fmt: skip


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers: what tells it from the others, its prompts with their outcomes, all figures with their
    intervals, and what is recorded beside it, where that is there: the settings, and the rows without a prompt; and
    sentences on why it could not be read."""

    name: str
    assessed: list[Assessed]
    figures: dict[str, Any]
    drawing: tuple[dict[str, str], tuple[int, list[int]]] | None
    not_read: list[str]

    @property
    def has_curve(self) -> bool:
        """Whether it has confidences, and attempts that they are of."""
        return confidences(self.assessed) is not None and len(attempted(self.assessed)[0]) > 0


def read_answer_files(paths: Sequence[str], more: Sequence[str] = ()) -> list[AnswerFile]:
    """Files of `generate.py`, each once.

    Args:
        paths: CSV or JSON Lines.
        more: further phrases that refuse.

    Raises:
        InputError: as `read_answers`.
    """
    different = list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]
    found = []
    for path, name in zip(different, short_names([Path(path) for path in different], keep_last=True), strict=True):
        assessed = with_entropy(assess(read_answers(path, None), more), same_by_words(more))
        figures = dict(summarize([item.prompt for item in assessed])) | with_intervals(assessed)
        figures |= {kind: sum(item.outcomes.count(kind) for item in assessed) for kind in OUTCOMES}
        notes: list[str] = []
        beside = Path(f"{os.path.realpath(path)}.settings.json")
        drawing = or_noted(partial(read_drawing, beside), "how the answers were drawn", notes)
        found.append(AnswerFile(name, assessed, figures, drawing, notes))
    return found


def answers_section(files: Sequence[AnswerFile], most: int) -> str:
    """Rates with their intervals, and of each file at most so many prompts, those with wrong answers first."""
    if not files:
        return ""
    rows = [[label, *(_share(file.figures, name) for file in files)] for name, label in SHARES.items()]
    rows += [[label, *(_plain(file.figures, name) for file in files)] for name, label in PLAIN.items()
             if any(file.figures.get(name) is not None for file in files)]  # fmt: skip
    parts = [
        "<p>Means over prompts with their 95% intervals, by the word rule, as noisefit.score has them. How sure the "
        "model was of an answer is the probability that it gives the whole of it.</p>",
        table(["Figure", *(file.name for file in files)], rows),
    ]
    if any(len(file.assessed) < FEW for file in files):
        parts.append(f"<p>With fewer than {FEW} prompts the intervals are too narrow.</p>")
    for file in files:
        shown = ranked(file.assessed)[:most]
        counts = ", ".join(f"{file.figures[kind]} {kind.replace('_', ' ')}" for kind in OUTCOMES)
        said = f"{file.figures['answers']} answers to {len(file.assessed)} prompts: {counts}."
        inside = [f"<p>{text(said)} {text(_not_shown(file.assessed, shown))}</p>"]
        if file.drawing:
            inside.append(details("How they were drawn", table(["Setting", "Value"], list(file.drawing[0].items())),
                                  is_open=False))  # fmt: skip
        inside += [card(item.prompt.prompt, item.prompt.reference, "Rounds", _rows(item)) for item in shown]
        parts.append(details(file.name, *inside, is_open=len(files) == 1))
    return section("answers", "Answers", *parts)


def ranked(assessed: Sequence[Assessed]) -> list[Assessed]:
    """The prompts with the largest share of wrong answers first, of equal ones the surest wrong answer; then those with
    most answers that are no attempt; then the order of the file."""

    def key(item: Assessed) -> tuple[float, float, float]:
        logprobs = item.prompt.logprobs or (0.0,) * len(item.outcomes)
        surest = max((p for p, kind in zip(logprobs, item.outcomes, strict=True) if kind == WRONG), default=-math.inf)
        share = {kind: item.outcomes.count(kind) / len(item.outcomes) for kind in OUTCOMES}
        return -share[WRONG], -surest, -share[NOT_ATTEMPTED]

    return sorted(assessed, key=key)


def _not_shown(assessed: Sequence[Assessed], shown: Sequence[Assessed]) -> str:
    left = len(assessed) - len(shown)
    if not left:
        return "Those with wrong answers come first."
    wrong = sum(WRONG in item.outcomes for item in assessed) - sum(WRONG in item.outcomes for item in shown)
    return (f"Those with wrong answers come first. {len(shown)} prompts are shown; {left} are left out, {wrong} of "
            "which have wrong answers (--show N shows more).")  # fmt: skip


def _rows(item: Assessed) -> list[tuple[str, str, float, str]]:
    """A row for each different answer, with the rounds that gave it."""
    logprobs = item.prompt.logprobs or (math.nan,) * len(item.outcomes)
    times = Counter(item.prompt.answers)
    kinds = dict(zip(item.prompt.answers, item.outcomes, strict=True))
    sure = {
        answer: max(p for a, p in zip(item.prompt.answers, logprobs, strict=True) if a == answer) for answer in kinds
    }
    return [(f"{times[answer]} of {len(logprobs)}", answer, math.exp(sure[answer]), kind)
            for answer, kind in sorted(kinds.items(), key=lambda pair: -times[pair[0]])]  # fmt: skip


def confidence_section(files: Sequence[AnswerFile]) -> str:
    """How many of the surest answers are wrong, by how many are kept; nothing where no file has confidences."""
    drawn = [file for file in files if file.has_curve]
    if not drawn:
        return ""
    alt = f"Risk and coverage of {', '.join(file.name for file in drawn)}; the table below has its points."
    header = ["Wrong among the surest", *(file.name for file in drawn)]
    rows = [[f"{percent}%", *(_share(file.figures, f"wrong_at_{percent}") for file in drawn)] for percent in COVERAGES]
    return section(
        "confidence", "Confidence",
        "<p>Attempted answers from the surest on: how many of those that are kept are wrong. A model that knows what "
        "it knows has a curve that begins low.</p>",
        picture(alt, curves_picture(drawn), curves_picture(drawn, narrow=True), "curve"),
        table(header, rows),
    )  # fmt: skip


def curves_picture(files: Sequence[AnswerFile], narrow: bool = False) -> bytes:
    """The curves of the files that have one, as a PNG."""
    from noisefit.answers.pictures import draw  # here, as it imports matplotlib: seconds

    def figure() -> Figure:
        return draw({file.name: file.assessed for file in files}, (4.2, 3.9) if narrow else (7, 4.6))

    return as_png(figure)


def lacking(files: Sequence[AnswerFile]) -> Mapping[str, list[str]]:
    """What the page does not show of each file: sentences."""
    found: dict[str, list[str]] = {}
    for file in files:
        lines = found.setdefault(file.name, [])
        if not file.has_curve:
            without = confidences(file.assessed) is None
            why = "there is no column logprob, so no confidence" if without else "no answer is an attempt"
            lines.append(f"No curve of risk and coverage: {why}.")
        lines += file.not_read
        if file.drawing is None and not file.not_read:
            lines.append("No settings are recorded beside it, so the page does not say how the answers were drawn.")
        elif file.drawing is not None and file.drawing[1][0]:
            number, first = file.drawing[1]
            rows = "1 row of its input has" if number == 1 else f"{number:,} rows of its input have"
            lines.append(
                f"{rows} no prompt, so no answer (row {', '.join(map(str, first))}{', …' * (len(first) < number)})."
            )
    return found


def _share(figures: Mapping[str, Any], name: str) -> str:
    if figures.get(name) is None:
        return "–"
    low, high = figures[f"{name}_ci"]
    return f"{figures[name]:.1%} ({low:.1%} to {high:.1%})"


def _plain(figures: Mapping[str, Any], name: str) -> str:
    if figures.get(name) is None:
        return "–"
    low, high = figures[f"{name}_ci"]
    return f"{figures[name]:.3f} ({low:.3f} to {high:.3f})"
