"""What is compared, as flags of train_loop.py, and on which rows."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.answers.scoring import normalize, words
from noisefit.base.command_line import canonical
from noisefit.base.errors import InputError
from noisefit.method.modes import part
from noisefit.run.settings import Settings, parse_arguments

PLAIN, BEFORE = "plain", "before"  # what the others are compared with; the base model as it is, which is not trained
TEACHER = {"loss_mode": "ce_teacher", "teacher": "base"}
# What is compared, by the flags of train_loop.py. A line more is a method more.
METHODS: dict[str, dict[str, str]] = {
    BEFORE: {},
    PLAIN: {"loss_mode": "basefit"},
    "noisefit": {},  # as published
    "relative": {"noise_scale": "relative", "noise_std": "0.2"},
    "neftune": {"loss_mode": "neftune"},
    "rdrop": {"loss_mode": "rdrop"},
    "teacher": {**TEACHER, "hybrid_loss_alpha": "0.8"},
    "teacher_and_noise": {
        "teacher": "base",
        "noise_scale": "relative",
        "noise_std": "0.2",
    },  # configs/base_teacher.yaml
    "weight": {"loss_mode": "basefit", "unknown_rows": "weight"},
    "drop": {"loss_mode": "basefit", "unknown_rows": "drop"},
    "refuse": {"loss_mode": "basefit", "unknown_rows": "refuse"},
    "hold": {**TEACHER, "unknown_rows": "weight", "unknown_weight": "0"},
}
# What this program gives to each training itself; a token would end in the results.
RESERVED = {
    "model", "train_data", "output_model", "seed", "resume_from_checkpoint", "overwrite_output", "save_steps",
    "save_total_limit", "trust_remote_code", "chat_template", "prompt_date", "config", "hf_token",
    "push_to_hub", "hub_private", "help",
}  # fmt: skip
Question = dict[str, str]


@dataclass(frozen=True)
class Run:
    """A row of the results: a method, with any flags of train_loop.py as in `plain:epochs=3`, and a training's seed."""

    method: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of its folder, another one for each run."""
        return f"{quote(self.method, safe='=').replace('%3A', ',')}-{self.seed}"

    @property
    def is_trained(self) -> bool:
        return self.method != BEFORE

    def flags(self, common: Sequence[str]) -> dict[str, str | bool]:
        """Of train_loop.py, but for those of `RESERVED`.

        Args:
            common: `FLAG=VALUE` for all methods; a method's own go over them.

        Raises:
            InputError: there is no such method, or a flag is not to be given.
        """
        name, *own = self.method.split(":")
        if name not in METHODS or (name == BEFORE and own):
            what = f"{BEFORE} is not trained, so it has no flags" if name in METHODS else f"{name!r} is no method"
            raise InputError(f"--methods: {what}; there are {', '.join(METHODS)}")
        return _parsed("--train_flags", common) | METHODS[name] | _parsed(f"--methods {self.method}", own)


def _parsed(where: str, flags: Sequence[str]) -> dict[str, str | bool]:
    found: dict[str, str | bool] = {}
    for text in flags:
        flag, equals, value = text.partition("=")
        if not flag or bool(equals) != bool(value):
            raise InputError(f"{where}: {text!r} is neither FLAG=VALUE nor FLAG")
        if canonical(flag) in RESERVED:
            raise InputError(f"{where}: {flag} is not for a method; see --help for what all have in common")
        found[flag] = value or True
    return found


def as_words(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line has them, without those that are off."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()
            if value is not None and value is not False]  # fmt: skip


def settings_of(run: Run, common: Sequence[str], model: str) -> Settings:
    """Its flags, checked. Raises `InputError` where train_loop.py would refuse them; the line names the method."""
    words = as_words({"model": model, "train_data": "train.csv"} | run.flags(common))
    try:
        return parse_arguments(words)
    except InputError as error:
        raise InputError(f"--methods {run.method}: {error}") from None


def split(source: str, questions: Sequence[Question], train: int, test: int, seed: int, pool: int = 1) -> tuple[
    list[Question], list[Question]
]:  # fmt: skip
    """Questions to train on and questions to answer, in an order of the seed.

    No question is in both, whatever its case and punctuation, and no true answer is, so that none can be learnt by
    heart for the other.

    Args:
        source: their file, for the line.
        questions: as `read_questions` makes them.
        train, test: so many are wanted.
        seed: of the order.
        pool: so many times `train` are taken, where there are as many, to choose from.

    Raises:
        InputError: there are too few.
    """
    order = list({" ".join(words(question["prompt"])): question for question in questions}.values())
    random.Random(f"split {seed}").shuffle(order)
    asked, taken = order[:test], {answer for question in order[:test] for answer in true_answers(question)}
    left = [question for question in order[test:] if not true_answers(question) & taken]
    if len(asked) < test or len(left) < train:
        raise InputError(f"{source}: of {len(order)} questions {len(asked)} are to be answered, and {len(left)} more "
                         f"have none of their answers; expected --test_rows {test} and --train_rows {train}; give "
                         "smaller numbers")  # fmt: skip
    with_answer = [[question | {"answer": question["response"]} for question in part]
                   for part in (left[: train * pool], asked)]  # fmt: skip
    return with_answer[0], with_answer[1]


def true_answers(question: Question) -> set[str]:
    """The normalised true answers of a question."""
    return {text for answer in json.loads(question["answers"]) if (text := normalize(answer))}


def unknown_below(scores: Sequence[float], given: float | None) -> tuple[float, str]:
    """The score under which a row is taken for unknown, and how it was found, in a few words.

    As given; or where the scores part in two; or, where they do not, their median: so a run of days does not end there.
    """
    if given is not None:
        return given, "as given"
    parting = part(np.array(scores))
    if parting.threshold is not None:
        return parting.threshold, "where the rows to train on part in two"
    return float(np.median(scores)), f"the median, as the rows to train on do not part in two: {parting.why}"


def choose(rows: Sequence[Question], known: Sequence[bool], wanted: int, share: float | None) -> list[Question]:
    """The first of the rows, so many; with the share of unknown ones, where it is given.

    Raises:
        InputError: there are too few of one kind.
    """
    if share is None:
        return list(rows[:wanted])
    need = {False: round(wanted * share), True: wanted - round(wanted * share)}
    for kind, name in ((False, "unknown"), (True, "known")):
        if (there := list(known).count(kind)) < need[kind]:
            raise InputError(f"--unknown_share {share:g}: {need[kind]} of {wanted} rows would be {name}, and of "
                             f"{len(rows)} that were probed {there} are; give another share, or fewer --train_rows, "
                             "and another --output")  # fmt: skip
    chosen = []
    for row, kind in zip(rows, known, strict=True):
        if need[kind]:
            need[kind] -= 1
            chosen.append(row)
    return chosen
