"""What the tasks of this folder ask of a world and how they score it, for lm-evaluation-harness.

The world is the folder that `--metadata world=FOLDER` names, else the environment variable NOISEFIT_WORLD, else
build/world of this repository.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

# The program `lm_eval` does not look for modules in the current directory.
sys.path.append(str(Path(__file__).resolve().parents[3]))

from noisefit.answers.scoring import Prompt, score_prompt
from noisefit.base.errors import InputError
from noisefit.inputs.tables import read_records

DEFAULT_WORLD = Path(__file__).resolve().parents[3] / "build" / "world"
WRONG_CHOICES = 3


def held_out_questions(world: str | None = None, **_: object) -> dict[str, Dataset]:
    """The split `test`: the rows of the world's test.csv, all cells text.

    Args:
        world: the world's folder; relative paths start at the current directory.
        _: the rest of the harness's metadata, such as the arguments of the model.

    Raises:
        InputError: there is no such world, or its test.csv cannot be used.
    """
    return {"test": Dataset.from_list(_read_test(world, ("prompt", "response")))}


def choice_questions(world: str | None = None, **_: object) -> dict[str, Dataset]:
    """As `held_out_questions`, with `choices`, four responses, and `gold`, the index of the true one.

    The wrong ones are the true response with the answer of another country to the same relation. Which ones, and in
    what order, is a function of the questions alone. Questions that are to be refused are left out.

    Raises:
        InputError: as `held_out_questions`; or a relation has too few answers to choose from.
    """
    rows = _read_test(world, ("prompt", "response", "country", "relation", "answer"))
    rows = [row for row in rows if row.get("kind", "known") == "known"]
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row["relation"], set()).add(row["answer"])
    asked = []
    for row in rows:
        others = sorted(answers[row["relation"]] - {row["answer"]})
        if len(others) < WRONG_CHOICES:
            raise InputError(
                f"{row['prompt']} has {len(others)} wrong answers to choose from, not {WRONG_CHOICES}: "
                "noisefit_world_mc needs a world of more countries"
            )
        rng = random.Random(row["prompt"])
        choices = [row["answer"], *rng.sample(others, WRONG_CHOICES)]
        rng.shuffle(choices)
        sentences = [row["response"].replace(row["answer"], choice) for choice in choices]
        asked.append(row | {"choices": sentences, "gold": choices.index(row["answer"])})
    return {"test": Dataset.from_list(asked)}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What `python -m noisefit.score` says of one answer, 0 or 1 each.

    Args:
        doc: a row with `prompt`, `response` and, where the decisive part is named, `answer`.
        results: the answer, alone in a list.
    """
    scores = score_prompt(Prompt(doc["prompt"], doc["response"], tuple(results), doc.get("answer")))
    return {name: scores[name] for name in ("contains_truth", "exact_match")}


def _read_test(world: str | None, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    folder = Path(world or os.environ.get("NOISEFIT_WORLD") or DEFAULT_WORLD)
    if not folder.is_dir():
        raise InputError(f"{folder}: no world there; `make demo` builds one, --metadata world=FOLDER names another")
    rows = [row for _, row in read_records(folder / "test.csv", columns)]
    if not rows:
        raise InputError(f"{folder / 'test.csv'}: it has no rows")
    return rows
