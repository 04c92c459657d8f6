"""One run of the experiment: its world, its training, its answers, each made in a process of its own."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from methods import Run

import build

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.base.errors import InputError


def words(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line has them."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


def run_folder(run: Run, folder: Path) -> Path:
    """Where a run's files go."""
    return folder / "runs" / run.world_name / run.method.replace(":", ",")


def build_world(run: Run, folder: Path) -> None:
    """The world of a run, unless it is there."""
    world = folder / "worlds" / run.world_name
    found = build.read_settings(world)
    if found not in (None, run.settings):
        raise InputError(f"{world}: it was built with other settings; remove it, or choose another --output")
    if found is None:
        build.build(world, run.settings, required=0.0)
    elif '"completed"' not in (world / "facts.json").read_text(encoding="utf-8"):  # the measures need it
        raise InputError(f"{world}: an earlier version of build.py made it; remove it, or choose another --output")


def train(run: Run, folder: Path) -> dict[str, float | str]:
    """Trains with the method.

    Returns:
        `train_seconds`, the time of all of train_loop.py (on a CPU the processor's, which does not depend on what else
        runs there), `noise_to_signal` on average, `hidden_growth`, how much larger the hidden states of the noisy
        layers are at the end than at the start, and `noise_layers`.
    """
    import torch
    from rows import training_rows

    import train_loop
    from noisefit.run.settings import parse_arguments

    world, adapter = folder / "worlds" / run.world_name, run_folder(run, folder) / "adapter"
    rows = training_rows(run, world, run_folder(run, folder))
    paths = {"model": world / "model", "train_data": rows, "output_model": adapter}
    once = {"save_steps": 0, "overwrite_output": True, "seed": run.seed}
    settings = parse_arguments(words(once | run.flags | paths))
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    train_loop.train(settings)
    seconds = clock() - began
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    sizes = [sum(line["hidden_rms"]) for line in lines if line["hidden_rms"]]
    layers = json.loads((adapter / "layer_snr.json").read_text())["selected"]
    return {
        "train_seconds": seconds,
        "noise_to_signal": sum(line["noise_to_signal"] for line in lines) / len(lines),
        "hidden_growth": sizes[-1] / sizes[0] if sizes else math.nan,
        "noise_layers": " ".join(map(str, layers)),
    }


def ask(run: Run, folder: Path, brief: bool) -> dict[str, float | str]:
    """Lets the trained model answer, and measures the answers: see measures.py; `brief`: without those drawn at random
    and those to the training's questions."""
    import measures
    from rows import new_process_state

    import generate
    from noisefit.answers.settings import parse_arguments

    world, here = folder / "worlds" / run.world_name, run_folder(run, folder)
    common = {"model_path": here / "adapter", "repetition_penalty": 1.0, "overwrite_output": True}
    sheets = {"likeliest": ("test", {"greedy": True, "rounds": 1}), "drawn": ("test", {"rounds": 5}),
              "trained": ("train", {"greedy": True, "rounds": 1})}  # fmt: skip
    sheets = {"likeliest": sheets["likeliest"]} if brief else sheets
    for name, (questions, how) in sheets.items():
        new_process_state()
        paths = {"input_csv": world / f"{questions}.csv", "output_csv": here / f"{name}.csv"}
        settings = parse_arguments(words(common | how | paths))
        generate.generate(settings)
    return measures.measure(world, settings, **{name: here / f"{name}.csv" for name in sheets})


def train_and_ask(run: Run, folder: Path, brief: bool = False) -> None:
    """A whole run; what came of it goes to `measures.json`."""
    result = train(run, folder) | ask(run, folder, brief)
    (run_folder(run, folder) / "measures.json").write_text(json.dumps(result))
