"""Signals as they reach a run behind `accelerate launch`, which passes on some of them and dies of others."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from running import LAUNCHER, ROOT, config_command, run_command, started, wait_until, words, worker

from noisefit.run.checkpoints import list_checkpoints
from noisefit.run.signals import ORPHANED, StopSignals

pytestmark = pytest.mark.slow


def to_the_launcher(launcher: subprocess.Popen) -> None:
    launcher.terminate()


def to_its_process_group(launcher: subprocess.Popen) -> None:
    """What Ctrl-C in a terminal does."""
    os.killpg(launcher.pid, signal.SIGINT)


def to_every_process(launcher: subprocess.Popen) -> None:
    """What a scheduler may do."""
    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("config", "send"),
    [
        ("cpu.yaml", to_the_launcher),
        ("cpu.yaml", to_its_process_group),
        ("cpu_two_processes.yaml", to_every_process),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_stopped_launch_leaves_a_checkpoint(config, send, llama_folder, questions, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = words(model=llama_folder, train_data=questions, output_model=out, epochs=10**6, max_steps=-1)
    command = config_command(config, "train_loop.py", *flags, "--logging_steps=1", "--save_steps=0")
    with started(command, log) as launcher:
        wait_until(lambda: (out / "metrics.jsonl").exists() or launcher.poll() is not None)
        assert launcher.poll() is None, log.read_text()
        trainer = worker(launcher, 0)
        send(launcher)
        trainer.wait(120)
        assert launcher.wait(120) != 0
    [checkpoint] = list_checkpoints(out)
    said = log.read_text()
    [step] = re.findall(r"stopped after step (\d+) of \d+; the same command with --resume_from_checkpoint latest", said)
    assert checkpoint.name == f"checkpoint-{step}"
    assert said.count("ending after this step") == 1


def test_processes_that_do_not_know_of_each_other_are_refused(llama_folder, questions, tmp_path):
    """Without ACCELERATE_USE_CPU a launch for GPUs starts two runs on this machine, into one folder."""
    flags = words(model=llama_folder, train_data=questions, output_model=tmp_path / "out", max_steps=1)
    command = [*LAUNCHER, "--config_file", str(ROOT / "configs/accelerate/cpu_two_processes.yaml")]
    done = run_command([*command, "train_loop.py", *flags], ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "the launch started 2 processes, but each is alone: on a CPU, set ACCELERATE_USE_CPU=true" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_launchers_end_is_a_first_signal_and_never_a_second():
    told = StopSignals()
    told._note(signal.SIGINT, None)
    told._note(ORPHANED, None)  # as after Ctrl-C: were it a second one, this process would end here
    assert told.received == "SIGINT"
    alone = StopSignals()
    alone._note(ORPHANED, None)
    assert alone.received is not None


def test_a_signal_that_comes_while_another_is_handled_is_a_second_one(monkeypatch, capfd):
    """As when a scheduler and the launcher signal in the same instant."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    to_come = [signal.SIGTERM]

    def clock() -> float:
        if to_come:
            signal.raise_signal(to_come.pop())
        return clock_before()

    clock_before = time.monotonic
    monkeypatch.setattr(time, "monotonic", clock)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.received == "SIGTERM" and not to_come
    assert capfd.readouterr().err.count("ending after this step") == 1


def test_a_launch_that_is_ended_while_it_loads_leaves_no_run_behind(llama_folder, questions, tmp_path):
    log = tmp_path / "log"
    flags = words(model=llama_folder, train_data=questions, output_model=tmp_path / "out", epochs=10**6, max_steps=-1)
    with started(config_command("cpu.yaml", "train_loop.py", *flags), log) as launcher:
        wait_until(lambda: "rows have up to" in log.read_text())  # said before the model is loaded
        trainer = worker(launcher, 0)
        launcher.terminate()
        trainer.wait(120)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_handlers_are_put_back_and_threads_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before and stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
    problems = []

    def enter() -> None:
        try:
            with StopSignals():
                pass
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert problems == []


SHELL = """
import os, subprocess, sys
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
child = subprocess.Popen([sys.executable, "-c", '''
import time
from noisefit.run.signals import ORPHANED, StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    time.sleep(3)
print(stop.received, flush=True)
'''])
child_ready = sys.stdin.readline()
"""


def test_a_run_without_a_launcher_outlives_its_shell(tmp_path):
    """As under nohup: only the end of `accelerate launch` is taken for a signal."""
    log = tmp_path / "log"
    with log.open("w") as stream:
        shell = subprocess.Popen([sys.executable, "-c", SHELL], cwd=ROOT, stdin=subprocess.PIPE, stdout=stream)
    wait_until(lambda: "ready" in log.read_text())
    assert shell.stdin is not None
    shell.stdin.close()
    assert shell.wait(10) == 0
    wait_until(lambda: log.read_text().endswith("None\n"), seconds=60)
    assert Path(log).read_text() == "ready\nNone\n"
