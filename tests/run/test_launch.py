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
    "single_gpu.yaml": ([], 1),
    "multi_gpu.yaml": (["--num_processes", "2"], 2),
}
ELSEWHERE = {
    "cpu.yaml": "test_accelerate_launch_with_wandb_offline_and_a_token_that_is_nowhere, of test_train_loop.py",
    "cpu_two_processes.yaml": "test_the_death_of_one_process_ends_the_launch",
    "multi_node.yaml": "test_the_slurm_script_trains_on_two_machines_together_and_the_first_one_writes",
    "fsdp.yaml": "Accelerate does no FSDP on a CPU, so it has tests of its own",
}


def test_every_launch_file_is_under_test():
    assert {path.name for path in CONFIGS.iterdir()} <= ONE_OR_TWO.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", ONE_OR_TWO)
def test_a_launch_file_trains_with_the_processes_that_it_is_for_and_one_speaks(name, llama_folder, questions, tmp_path):
    """Each line for the user, and each progress bar, comes once."""
    options, processes = ONE_OR_TWO[name]
    with questions.open("a") as file:
        file.write('"What has no answer?",\n')
    flags = words(model=llama_folder, train_data=questions, output_model=tmp_path / "out", **SHORT)
    done = run_command(config_command(name, *options, "train_loop.py", *flags))
    assert done.returncode == 0, done.stderr
    # The script's own word: several processes that do not know of each other would each say 1.
    assert f"steps of {16 * processes} rows; processes: {processes}\n" in done.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()

    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    bars = Counter(line.partition(":")[0] for line in lines if re.search(r":\s+0%\|", line))
    assert bars == {"training": 1, "Loading weights": 1}
    notices = Counter(line for line in lines if "%|" not in line)
    assert set(notices.values()) == {1}, notices
    for part in ("skipped 1 row", "noise in layers: ", "processes: ", "holds the adapter"):
        assert sum(part in line for line in notices) == 1, part


# --- Several machines ------------------------------------------------------------------------------------------------

STEPS_OF_ONE = dict(learning_rate=1e-2, max_steps=3, logging_steps=1, lora_dropout=0, noise_std=0)
SRUN = """#!/bin/bash
# In place of srun: a task for each node, in the background, each with a disk of its own.
while [[ $1 == --* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NNODES - 1))); do
    (cd "$LOGS/$rank" && SLURM_PROCID=$rank exec "$@") > "$LOGS/$rank.log" 2>&1 &
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


def node_of(folder: Path) -> Path:
    """What the script finds where a node begins: the program, and the launch file, for float32 that can be compared."""
    (folder / "configs" / "accelerate").mkdir(parents=True)
    (folder / "train_loop.py").symlink_to(ROOT / "train_loop.py")
    said = (CONFIGS / "multi_node.yaml").read_text()
    assert said.count("\nmixed_precision: bf16\n") == 1
    exact = said.replace("\nmixed_precision: bf16\n", '\nmixed_precision: "no"\n')
    (folder / "configs" / "accelerate" / "multi_node.yaml").write_text(exact)
    return folder


def test_the_slurm_script_trains_on_two_machines_together_and_the_first_one_writes(llama_folder, questions, tmp_path):
    nodes = [node_of(tmp_path / str(rank)) for rank in (0, 1)]
    flags = words(**STEPS_OF_ONE, model=llama_folder, train_data=questions, output_model="out", batch_size=2)
    done = sbatch(tmp_path, *flags, seconds_left=3600)
    said = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert done.returncode == 0, (done.stderr, said)
    assert "processes: 2\n" in said[0] and "processes:" not in said[1]
    assert (nodes[0] / "out" / "adapter_model.safetensors").exists() and not (nodes[1] / "out").exists()
    assert not (tmp_path / "asked").exists()
    found, expected = metrics_of(nodes[0] / "out"), run(llama_folder, questions, tmp_path / "one", **STEPS_OF_ONE)
    assert [line["step"] for line in found] == [1, 2, 3]
    for line, one in zip(found, expected, strict=True):
        for name in ("loss", "ce_loss", "grad_norm", "learning_rate", "target_tokens", "epoch"):
            assert line[name] == pytest.approx(one[name], rel=1e-4, abs=1e-9), name


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
        assert launcher.poll() is None and "processes: 2\n" in log.read_text(), log.read_text()
        survivor = worker(launcher, 0)
        worker(launcher, 1).send_signal(signal.SIGKILL)
        # The launcher gives the other process 30 seconds; one that waits on the dead one over NCCL needs them.
        assert launcher.wait(timeout=120) != 0
        assert not survivor.is_running()
    assert "SIGKILL" in log.read_text()
