"""What is done in processes of their own: probing, training, answering. A process's end gives all of the GPU back."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "world"))

from noisefit.base.errors import one_line_errors
from noisefit.base.files import write_json

PACKAGES = ("torch", "transformers", "accelerate", "peft")
GRACE = 300  # seconds that a training has to write a checkpoint, when it is asked to stop
KNOWN, UNKNOWN = "known", "unknown"
# Begun afresh and not forked: a process that is forked from one that has looked at the GPU cannot use it.
PROCESSES = multiprocessing.get_context("spawn")

Apart = Callable[[Callable[..., None], tuple[Any, ...], Path, dict[str, str]], "str | None"]


def apart(
    target: Callable[..., None], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]
) -> str | None:
    """Runs `target` in a process of its own, which ends with this one.

    Args:
        target: a function of this module.
        arguments: for it.
        log: a file for both its outputs, which are added to it.
        environment: what the process has there besides this one's.

    Returns:
        Why it failed; `None` if it did not.
    """
    process = PROCESSES.Process(target=_begin, args=(str(log), environment, target, arguments), daemon=True)
    process.start()
    try:
        process.join()
    except BaseException:  # Ctrl-C, a polite kill
        # Told once, a training writes a checkpoint; told twice, it would end at once.
        process.terminate()
        process.join(GRACE)
        raise
    finally:
        process.kill()
    if process.exitcode == 0:
        return None
    said = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines() or ["it said nothing"]
    return f"status {process.exitcode}: {said[-1]} ({log})"


def _begin(log: str, environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def end_with_it() -> None:
        main_process.join()
        os._exit(1)

    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the main process alone, which passes it on
    threading.Thread(target=end_with_it, daemon=True).start()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    with one_line_errors("compare.py"):
        target(*arguments)


def probe(words: Sequence[str]) -> None:
    """noisefit.probe with these flags."""
    from noisefit.answers.probe_settings import parse_arguments
    from noisefit.probe import probe as probe_file

    probe_file(parse_arguments(words))


def train(words: Sequence[str], result: Path) -> None:
    """train_loop.py with these flags, going on from a checkpoint where there is one.

    What it took goes to `result`: `train_seconds`, not a number where it was interrupted, `peak_memory_gib` and, on
    average, `noise_to_signal`.
    """
    import train_loop
    from noisefit.run.checkpoint_files import list_checkpoints
    from noisefit.run.settings import parse_arguments

    settings = parse_arguments(words)
    resumed = bool(list_checkpoints(Path(settings.output_model)))
    began = time.perf_counter()
    train_loop.train(settings)
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (Path(settings.output_model) / "metrics.jsonl").read_text().splitlines()]

    def known(name: str) -> list[float]:
        return [line[name] for line in lines if line[name] is not None]

    ratios = known("noise_to_signal")
    write_json(result, {
        "train_seconds": math.nan if resumed else seconds,
        "peak_memory_gib": max(known("peak_memory_gib"), default=math.nan),
        "noise_to_signal": sum(ratios) / len(ratios) if ratios else math.nan,
    })  # fmt: skip


def answer(words: Sequence[str], refusal: str, result: Path) -> None:
    """generate.py with these flags; what the answers are worth goes to `result`, see `measure`."""
    import generate
    from noisefit.answers.settings import parse_arguments

    settings = parse_arguments(words)
    output = Path(str(settings.output_csv))
    began, resumed = time.perf_counter(), output.exists() or output.with_name(f"{output.name}.partial").exists()
    if not output.exists():
        generate.generate(settings)
    seconds = math.nan if resumed else time.perf_counter() - began
    origin = {"machine": machine(), "versions": " ".join(f"{name} {version(name)}" for name in PACKAGES)}
    write_json(result, measure(output, refusal) | {"answer_seconds": seconds} | origin)


def measure(answers: Path, refusal: str) -> dict[str, float | str]:
    """What answers are worth: rates of all questions, of known and of unknown ones; confidence; risk and coverage.

    Args:
        answers: generate.py's file of one round, with a column `known`.
        refusal: a phrase that is taken for a refusal, besides the usual ones.
    """
    import numpy as np
    from risk import Attempt, best_right_minus_wrong, wrong_by_right

    from noisefit.answers.figures import figures
    from noisefit.answers.outcomes import NOT_ATTEMPTED, RIGHT, assess
    from noisefit.answers.reading import read_answers
    from noisefit.answers.refusals import is_refusal

    assessed = assess(read_answers(str(answers), by="known"), () if is_refusal(refusal) else (refusal,))
    found: dict[str, float | str] = {}
    for prefix in ("", KNOWN, UNKNOWN):
        part = [item for item in assessed if prefix in ("", item.prompt.group)]
        own = figures(part, np.ones((1, len(part)), int)) if part else {}
        for name in ("right", "wrong", "not_attempted"):
            key = f"{prefix}_{name}_rate".lstrip("_").replace("not_attempted", "refused")
            found[key] = float(own[f"{name}_rate"][0]) if part else math.nan
        found[f"asked_{prefix}".rstrip("_")] = len(part)
        if not prefix:
            found |= {name: float(own[name][0]) for name in ("auroc", "aurc")}
    attempts = [Attempt(logprob, outcome == RIGHT)  # its exponential would be 0 for long answers
                for item in assessed for outcome, logprob in zip(item.outcomes, item.prompt.logprobs or (), strict=True)
                if outcome != NOT_ATTEMPTED]  # fmt: skip
    curve = wrong_by_right(attempts)
    found["best_right_minus_wrong"] = best_right_minus_wrong(curve, len(assessed))
    return found | {"wrong_by_right": " ".join(map(str, curve))}


def machine() -> str:
    """The GPU, or the processor."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
