"""Running `train_loop.py`: in this process for speed, in processes of its own that can be killed, or as a user does."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

import train_loop
from noisefit.arguments import parse_arguments
from noisefit.errors import one_line_errors

ROOT = Path(__file__).resolve().parent.parent

# Its processes are forked from one that has imported everything: a real process of its own in a moment.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["running", "tiny_folder", "peft", "transformers.models.llama.modeling_llama"])


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


def start(
    model: Path, data: Path, output: Path, processes: int = 1, log: Path | None = None,
    environment: dict[str, str] | None = None, **flags: object,
) -> list[BaseProcess]:  # fmt: skip
    """Start `train_loop.py` on processes that meet as those of a launch do; what they say goes to OUTPUT.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = words(model=model, train_data=data, output_model=output, **flags)
    started = []
    for rank in range(processes):
        own = {"ACCELERATE_USE_CPU": "true", "RANK": str(rank)} | (environment or {})
        if processes > 1:
            own |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
            own |= {"MASTER_PORT": str(port)}
        started.append(PROCESSES.Process(target=in_process, args=(train, argv, own, str(log or f"{output}.log"))))
        started[-1].start()
    return started


def wait(processes: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Their exit statuses; a process that does not end in time is killed, and its status is -9."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def in_process(target: Callable[..., object], argument: object, environment: dict[str, str], log: str) -> None:
    """What a process of `start` does first: its environment, and both its outputs into a file."""
    os.environ |= environment
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(argument)


def train(argv: list[str]) -> None:
    with one_line_errors("train_loop.py"):
        train_loop.train(parse_arguments(argv))


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
