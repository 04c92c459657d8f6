"""Trainings on the demo world for the benchmarks of noise, each made once: a run that is finished is read again.

A run is a training as `make demo` makes it, with other flags, and then the greedy answers to the questions that the
world keeps back. One that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # as `make demo` does
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.state import AcceleratorState, GradientState

import generate
import train_loop
from noisefit.answers.settings import parse_arguments as parse_answer_arguments
from noisefit.base.errors import InputError, notice
from noisefit.base.files import write_json
from noisefit.run.settings import parse_arguments
from noisefit.score import score

BUILD = Path(__file__).resolve().parent.parent / "build"
FINETUNE = {"learning_rate": 3e-3, "epochs": 20, "logging_steps": 4}  # as in the Makefile, with more lines


@dataclass(frozen=True)
class WorldRun:
    """What came of a run.

    Attributes:
        folder: where it is; its `adapter` is the training's output folder.
        lines: of metrics.jsonl.
        layers: with noise.
        wrong: the share of the answers that are wrong.
    """

    folder: Path
    lines: list[dict]
    layers: list[int]
    wrong: float


def world_run(folder: Path, world: Path, flags: Mapping[str, object]) -> WorldRun:
    """The run of a folder, made unless it is there.

    Args:
        folder: its own.
        world: with `model`, `train.csv` and `test.csv`.
        flags: of `train_loop.py`, besides `FINETUNE`.

    Raises:
        InputError: the folder has a run with other flags.
    """
    adapter, answers, record = folder / "adapter", folder / "answers.csv", folder / "run.json"
    world = world.resolve()
    given = {"model": world / "model", "train_data": world / "train.csv"} | FINETUNE | flags
    command, found = words(given), json.loads(record.read_text()) if record.exists() else None
    if found is None:
        torch.set_num_threads(1)  # so that the numbers do not depend on how many cores there are
        _afresh()
        more = {"output_model": adapter, "resume_from_checkpoint": "auto"}
        train_loop.train(parse_arguments([*command, *words(more)]))
        _afresh()
        asked = {"model_path": adapter, "input_csv": world / "test.csv", "output_csv": answers, "rounds": 1}
        how: dict[str, object] = {"greedy": True, "overwrite_output": True}
        generate.generate(parse_answer_arguments(words(asked | how)))
        found = {"command": command, "wrong": score([str(answers)], None)["hallucination_rate"]}
        write_json(record, found)
    elif found["command"] != command:
        raise InputError(f"{folder}: its run had other flags; remove it, or choose another --output")
    else:
        notice(f"{folder} has its run")
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    layers = json.loads((adapter / "layer_snr.json").read_text())["selected"]
    return WorldRun(folder, lines, layers, found["wrong"])


def words(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line has them; `True` is a bare one."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


def _afresh() -> None:
    """Let accelerate forget the program that ran before in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def add_world_flags(parser: argparse.ArgumentParser, output: str) -> None:
    """The flags of a program that makes runs; `output` is the default of `--output`."""
    parser.add_argument("--world", type=Path, default=BUILD / "world", metavar="DIR", help="as build.py made it")
    parser.add_argument("--output", type=Path, default=BUILD / output, metavar="DIR", help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--epochs", type=int, default=FINETUNE["epochs"], help="fewer are for trying this out")


def check_world_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program in a line where there is no world, or nothing to do."""
    if not (args.world / "test.csv").is_file():
        parser.error(f"--world: {args.world} is no world; this builds one: make build/world/facts.json")
    for name in ("seeds", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more")
