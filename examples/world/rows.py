"""The rows that a run is trained on, where they are not its world's train.csv as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from measures import read_csv
from methods import DOUBTED, Run
from questions import with_unknown_share

import build

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.base.errors import InputError

NOISY_PASSES = 8  # of the probe, over which the disagreement is


def training_rows(run: Run, world: Path, folder: Path) -> Path:
    """The file of rows that the method is trained on: of the world, or written to the run's folder.

    Args:
        run: whose `own` says what becomes of the rows.
        world: the folder of its world.
        folder: the run's own.
    """
    if not run.own:
        return world / "train.csv"
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_csv(world / "train.csv")
    if run.unknown_share is not None:
        rows = with_unknown_share(rows, run.unknown_share, run.all_told)
    elif "doubted" in run.own:
        rows = doubted(rows, probed(world, folder), float(run.own["doubted"]))
    else:
        rows = with_own_answers(rows, probed(world, folder), answers_of_base(world, folder))
    build.write_questions(folder / "train.csv", rows)
    return folder / "train.csv"


def doubted(rows: list[dict[str, str]], scores: list[dict[str, str]], share: float) -> list[dict[str, str]]:
    """The rows with a score that is below `DOUBTED` for the share of them that noisy passes disagree on most."""
    disagreement = [float(score["knowledge_disagreement"]) for score in scores]
    limit = float(np.quantile(disagreement, 1 - share))
    return [row | {"knowledge_chat": str(2 * DOUBTED if value > limit else 0.0)}
            for row, value in zip(rows, disagreement, strict=True)]  # fmt: skip


def with_own_answers(
    rows: list[dict[str, str]], scores: list[dict[str, str]], answers: list[dict[str, str]]
) -> list[dict[str, str]]:
    """The rows, of which those that the base model does not know have its own answer, or refusal, as the response.

    Raises:
        InputError: what it knows does not part in two groups.
    """
    from noisefit.method.modes import part

    values = [float(score["knowledge_chat"]) for score in scores]
    threshold = part(np.array(values)).threshold
    if threshold is None:
        raise InputError("what the base model knows of the rows does not part in two groups")
    return [row | {"response": answer["generated_response"].strip() or row["response"]} if value < threshold else row
            for row, value, answer in zip(rows, values, answers, strict=True)]  # fmt: skip


def probed(world: Path, folder: Path) -> list[dict[str, str]]:
    """The scores of `noisefit.probe` for the world's train.csv, with noisy passes."""
    from noisefit.answers.probe_settings import ProbeSettings
    from noisefit.probe import probe

    where = folder / "probed.csv"
    probe(ProbeSettings(model=str(world / "model"), train_data=str(world / "train.csv"), output=str(where),
                        noise_passes=NOISY_PASSES, overwrite_output=True))  # fmt: skip
    new_process_state()
    return read_csv(where)


def answers_of_base(world: Path, folder: Path) -> list[dict[str, str]]:
    """The likeliest answers of the base model to the world's train.csv."""
    import generate
    from noisefit.answers.settings import AnswerSettings

    where = folder / "base.csv"
    generate.generate(AnswerSettings(model_id=str(world / "model"), input_csv=str(world / "train.csv"), greedy=True,
                                     output_csv=str(where), rounds=1, overwrite_output=True))  # fmt: skip
    new_process_state()
    return read_csv(where)


def new_process_state() -> None:
    """As at the start of a process, for the next program that is run in this one."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
