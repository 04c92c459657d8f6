"""Running `train_loop.py`: in this process for speed, or as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

import train_loop
from noisefit.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent


def run(model: Path, data: Path, output: Path, **flags: object) -> list[dict]:
    """Train in this process; returns the lines of metrics.jsonl. `True` is a bare flag."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_loop.train(parse_arguments(words(model=model, train_data=data, output_model=output, **flags)))
    return metrics_of(output)


def words(**flags: object) -> list[str]:
    listed = []
    for name, value in flags.items():
        listed.append(f"--{name}" if value is True else f"--{name}={value}")
    return listed


def metrics_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def launch(*arguments: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch ...` from the project's root."""
    return _run(launch_command(*arguments, processes=processes), environment)


def launch_command(*arguments: str, processes: int = 1) -> list[str]:
    """The words of a launch. Two processes on a CPU need just these, and ACCELERATE_USE_CPU."""
    options = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1"]
    options += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *arguments]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ...` from the project's root."""
    return _run([sys.executable, *arguments], environment)


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
