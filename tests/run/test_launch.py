"""Every way to launch it: each file of configs/accelerate, two machines, what only the main process does, a death.

There is no GPU in these tests. ACCELERATE_USE_CPU makes each process of a launch for GPUs one on the CPU.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from running import (
    CONFIGS,
    ROOT,
    config_command,
    free_port,
    metrics_of,
    run,
    run_command,
    started,
    wait_until,
    words,
    worker,
)

pytestmark = pytest.mark.slow

SHORT = dict(max_steps=2, logging_steps=1)
ONE_OR_TWO = {  # file: (options that go over it, processes that must then train together)
    "cpu.yaml": ([], 1),
    "single_gpu.yaml": ([], 1),
    "multi_gpu.yaml": (["--num_processes", "2"], 2),
}
ELSEWHERE = {
    "cpu_two_processes.yaml": "test_of_two_processes_one_speaks",
    "multi_node.yaml": "test_two_machines_train_together_and_the_first_one_writes",
    "fsdp.yaml": "Accelerate does no FSDP on a CPU, so it has tests of its own",
}


def test_every_launch_file_is_under_test():
    assert {path.name for path in CONFIGS.iterdir()} <= ONE_OR_TWO.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", ONE_OR_TWO)
def test_a_launch_file_trains_with_the_processes_that_it_is_for(name, llama_folder, questions, tmp_path):
    options, processes = ONE_OR_TWO[name]
    flags = words(model=llama_folder, train_data=questions, output_model=tmp_path / "out", **SHORT)
    done = run_command(config_command(name, *options, "train_loop.py", *flags))
    assert done.returncode == 0, done.stderr
    # The script's own word: several processes that do not know of each other would each say 1.
    assert f"steps of {16 * processes} rows; processes: {processes}\n" in done.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_of_two_processes_one_speaks(llama_folder, questions, tmp_path):
    """Each line for the user, and each progress bar, comes once."""
    with questions.open("a") as file:
        file.write('"What has no answer?",\n')
    flags = words(model=llama_folder, train_data=questions, output_model=tmp_path / "out", **SHORT)
    done = run_command(config_command("cpu_two_processes.yaml", "train_loop.py", *flags))
    assert done.returncode == 0, done.stderr
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    bars = Counter(line.partition(":")[0] for line in lines if re.search(r":\s+0%\|", line))
    assert bars == {"training": 1, "Loading weights": 1}
    notices = Counter(line for line in lines if "%|" not in line)
    assert set(notices.values()) == {1}, notices
    for part in ("skipped 1 row", "noise in layers: ", "processes: 2", "holds the adapter"):
        assert sum(part in line for line in notices) == 1, part


# --- Several machines ------------------------------------------------------------------------------------------------

STEPS_OF_ONE = dict(learning_rate=1e-2, max_steps=3, logging_steps=1, lora_dropout=0, noise_std=0)


def test_two_machines_train_together_and_the_first_one_writes(llama_folder, questions, tmp_path):
    port, outputs = free_port(), [tmp_path / "machine0", tmp_path / "machine1"]
    settings = STEPS_OF_ONE | dict(model=llama_folder, train_data=questions, batch_size=2)
    commands = []
    for rank, output in enumerate(outputs):
        options = ["--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2"]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--mixed_precision", "no"]
        flags = words(**settings, output_model=output)
        commands.append(config_command("multi_node.yaml", *options, "train_loop.py", *flags))
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    with started(commands[0], logs[0]) as first, started(commands[1], logs[1]) as second:
        statuses = [machine.wait(timeout=280) for machine in (first, second)]
    said = [log.read_text() for log in logs]
    assert statuses == [0, 0], said
    assert "processes: 2\n" in said[0] and "processes:" not in said[1]
    assert not outputs[1].exists()
    found, expected = metrics_of(outputs[0]), run(llama_folder, questions, tmp_path / "one", **STEPS_OF_ONE)
    assert [line["step"] for line in found] == [1, 2, 3]
    for line, one in zip(found, expected, strict=True):
        for name in ("loss", "ce_loss", "grad_norm", "learning_rate", "target_tokens", "epoch"):
            assert line[name] == pytest.approx(one[name], rel=1e-4, abs=1e-9), name


SRUN = """#!/bin/bash
# In place of srun: a task for each node, in the background.
while [[ $1 == --* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_PROCID=$rank "$@" > "$LOGS/$rank.log" 2>&1 &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SCONTROL = """#!/bin/bash
# In place of scontrol: it names the nodes, and notes all else that is asked of it.
case $1 in show) printf 'localhost\\nlocalhost\\n' ;; *) echo "$@" >> "$LOGS/asked" ;; esac
"""


def sbatch(folder: Path, *flags: str, seconds_left: int, srun: str = SRUN) -> subprocess.CompletedProcess[str]:
    """Run the script of docs/launching.md as a job of two nodes with a GPU each would, with stand-ins for SLURM."""
    [script] = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", (ROOT / "docs/launching.md").read_text(), re.DOTALL
    )
    for name, text in {"train.sbatch": script, "bin/srun": srun, "bin/scontrol": SCONTROL}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return run_command(
        ["bash", str(folder / "train.sbatch"), *flags],
        PATH=f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        LOGS=str(folder),
        SLURM_JOB_ID="4711",
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_CPUS_PER_TASK="16",
        SLURM_JOB_END_TIME=str(int(time.time()) + seconds_left),
    )


def test_the_slurm_script_trains_on_two_nodes(llama_folder, questions, tmp_path):
    flags = words(**SHORT, model=llama_folder, train_data=questions, output_model=tmp_path / "out")
    done = sbatch(tmp_path, *flags, seconds_left=3600)
    said = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert done.returncode == 0, (done.stderr, said)
    assert "processes: 2\n" in said[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("seconds_left", "asked"), [(100, "requeue 4711\n"), (3600, None)])
def test_the_slurm_script_requeues_what_its_time_limit_stopped_and_no_failure(seconds_left, asked, tmp_path):
    done = sbatch(tmp_path, seconds_left=seconds_left, srun="#!/bin/bash\nexit 1\n")
    assert done.returncode == 1
    assert (tmp_path / "asked").exists() == bool(asked)
    assert not asked or (tmp_path / "asked").read_text() == asked


# --- When a process dies ---------------------------------------------------------------------------------------------


def test_the_death_of_one_process_ends_the_launch(llama_folder, questions, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = words(model=llama_folder, train_data=questions, output_model=out, epochs=10**6, max_steps=-1)
    command = config_command("cpu_two_processes.yaml", "train_loop.py", *flags, "--logging_steps", "1")
    with started(command, log) as launcher:
        wait_until(lambda: (out / "metrics.jsonl").exists() or launcher.poll() is not None)
        assert launcher.poll() is None, log.read_text()
        survivor = worker(launcher, 0)
        worker(launcher, 1).send_signal(signal.SIGKILL)
        # The launcher gives the other process 30 seconds; one that waits on the dead one over NCCL needs them.
        assert launcher.wait(timeout=120) != 0
        assert not survivor.is_running()
    assert "SIGKILL" in log.read_text()
