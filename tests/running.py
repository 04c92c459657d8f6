"""Running `train_loop.py`: in this process for speed, in processes of its own that can be killed, or as a user does."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil  # accelerate needs it, so it is there
from accelerate.state import AcceleratorState, GradientState

import generate
import train_loop
from noisefit.answers.settings import parse_arguments as parse_answer_arguments
from noisefit.base.errors import one_line_errors
from noisefit.run.settings import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "accelerate"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
MARK = "NOISEFIT_TEST_LAUNCH"
MEASURED = ("tokens_per_second", "peak_memory_gib")  # what differs between two runs that are the same

# What the process has imported that the others are forked from; of modules that may be lacking, those that are here.
PREPARED = ("pytest", "train_loop", "generate", "noisefit.probe", "peft", "transformers.models.llama.modeling_llama",
            "running", "tiny_folder", "tiny_models")  # fmt: skip
WHERE_USED = ("compare", "runs", "rows", "measures", "pretrain", "fsdp_program", "plan_program", "sklearn.metrics")


class Forked(ForkServerProcess):
    """A real process in a moment, forked from one that has imported everything."""

    def start(self) -> None:
        start_forking()
        super().start()


class _Forking(ForkServerContext):
    Process = Forked


PROCESSES = _Forking()


def start_forking() -> None:
    """Start the process that others are forked from, unless it runs; for programs that fork processes themselves."""
    before = os.environ.get("PYTHONPATH", "")
    # Without its path it would find none of our modules, say nothing, and each process would import them for itself.
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NOISEFIT_TEST_PYTHONPATH": before}
    try:
        used = [name for name in WHERE_USED if name in sys.modules]
        forkserver.set_forkserver_preload([*PREPARED, *used, "prepared"])
        forkserver.ensure_running()
    finally:
        del os.environ["NOISEFIT_TEST_PYTHONPATH"]
        if before:
            os.environ["PYTHONPATH"] = before
        else:
            del os.environ["PYTHONPATH"]


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
    environment: dict[str, str] | None = None, target: Callable[[list[str]], object] | None = None, **flags: object,
) -> list[BaseProcess]:  # fmt: skip
    """Start `train_loop.py` on processes that meet as those of a launch do; what they say goes to OUTPUT.log.

    `target` runs in its place, with the words of its command line.
    """
    argv = words(model=model, train_data=data, output_model=output, **flags)
    return start_program(target or train, argv, log or Path(f"{output}.log"), processes, environment)


def start_program(
    target: Callable[[list[str]], object], argv: list[str], log: Path, processes: int = 1,
    environment: dict[str, str] | None = None,
) -> list[BaseProcess]:  # fmt: skip
    """Start a program on processes that meet as those of a launch do; what they say is added to `log`."""
    port = free_port()
    started = []
    for rank in range(processes):
        own = {"ACCELERATE_USE_CPU": "true", "RANK": str(rank)} | (environment or {})
        if processes > 1:
            own |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
            own |= {"MASTER_PORT": port}
        started.append(PROCESSES.Process(target=in_process, args=(target, argv, own, str(log))))
        started[-1].start()
    return started


def wait(processes: list[BaseProcess], seconds: float = 280) -> list[int | None]:
    """Their exit statuses; a process that does not end in time is killed, and its status is -9."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def in_process(target: Callable[..., object], argument: object, environment: dict[str, str], log: str) -> None:
    """What a process of `start` does first: its environment, and both its outputs into a file."""
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(argument)


def train(argv: list[str]) -> None:
    with one_line_errors("train_loop.py"):
        train_loop.train(parse_arguments(argv))


def run_generate(argv: list[str]) -> None:
    with one_line_errors("generate.py"):
        generate.generate(parse_answer_arguments(argv))


def call(main: Callable[[list[str]], object], *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program's `main` in this process, where a process of its own would do nothing but import for seconds."""
    argv = [str(argument) for argument in arguments]
    status: object = 0
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as told:
        try:
            with one_line_errors(main.__module__):
                status = main(argv)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(argv, status if isinstance(status, int) else 0, said.getvalue(), told.getvalue())


def launch(*arguments: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch ...` from the project's root."""
    return run_command(launch_command(*arguments, processes=processes), **environment)


def launch_command(*arguments: str, processes: int = 1) -> list[str]:
    """The words of a launch. Two processes on a CPU need just these, and ACCELERATE_USE_CPU."""
    options = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1"]
    options += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*LAUNCHER, *options, *arguments]


def config_command(name: str, *arguments: str) -> list[str]:
    """The words of a launch with a file of configs/accelerate; options that go over the file come first."""
    return [*LAUNCHER, "--config_file", str(CONFIGS / name), *arguments]


def run_command(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command from the project's root, to its end."""
    mark = uuid.uuid4().hex
    env = _environment(environment, mark)
    try:
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    finally:
        _kill_marked(mark)


@contextmanager
def started(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A command in the background, both its streams in `log`. Nothing of it is left behind."""
    mark = uuid.uuid4().hex
    with log.open("w") as stream:
        # A process group of its own, as a shell makes for a command: Ctrl-C is a signal to all of it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(environment, mark), stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            _kill_marked(mark)
            process.wait()


def worker(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of a running launch that has this rank."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK", "0") == str(rank):
            return process
    raise AssertionError(f"the launch has no process of rank {rank}")


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Poll until the condition holds; an `AssertionError` if that takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.02)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ...` from the project's root."""
    return run_command([sys.executable, *arguments], **environment)


def _environment(environment: dict[str, str], mark: str) -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true", MARK: mark} | environment


def _kill_marked(mark: str) -> None:
    """Kill what a command left running.

    Found by the mark in its environment: a launcher's workers are sessions of their own, which no signal to a process
    group reaches, and those of a launcher that died are nobody's children.
    """
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                process.kill()
        except psutil.Error:  # another user's, or gone by now
            continue
