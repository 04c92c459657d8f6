"""What goes wrong on a bad day, brought about for real: numbers that overflow, memory and disks that are full, files
that change or are tampered with, a tracker that dies."""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from running import metrics_of, run, start, train, wait, wait_until
from safetensors.torch import load_file
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from noisefit.base.errors import InputError
from noisefit.inputs.batches import epoch_steps
from noisefit.run.checkpoint_files import list_checkpoints

pytestmark = pytest.mark.slow

FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, epochs=9, logging_steps=1)


def log_of(out: Path) -> str:
    return Path(f"{out}.log").read_text()


def error_of(out: Path) -> str:
    """The one line that a failed run ends with."""
    assert "Traceback" not in log_of(out), log_of(out)
    [line] = [line for line in log_of(out).replace("\r", "\n").splitlines() if "error: " in line]
    return line


# --- Numbers that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tmp_path) -> Path:
    """A model to which one letter, Z, is infinite."""
    folder = tiny_folder(tmp_path / "poisoned")
    model = AutoModelForCausalLM.from_pretrained(folder)
    letter = AutoTokenizer.from_pretrained(folder)("Z")["input_ids"][-1]
    model.get_input_embeddings().weight.data[letter] = float("inf")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_that_are_not_finite_are_skipped_named_and_counted(processes, poisoned, tmp_path):
    data, out = tmp_path / "data.csv", tmp_path / "out"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {'Z' if i == 11 else i}.\n" for i in range(24)))
    flags = FAST | dict(gradient_accumulation_steps=2 // processes, snr_batches=1, epochs=2, save_steps=12, seed=3)
    assert wait(start(poisoned, data, out, processes, **flags)) == [0] * processes, log_of(out)
    lines = metrics_of(out)
    skipped = [line["step"] for line in lines if line["skipped_steps"]]
    # The row comes once in each epoch of 6 steps; on two processes it is in the batch of one of them.
    assert len(skipped) == 2 and skipped[0] <= 6 < skipped[1] and len(lines) == 12
    for line in lines:
        if line["step"] in skipped:
            assert line["loss"] is line["ce_loss"] is line["grad_norm"] is line["noise_to_signal"] is None
            assert f"step {line['step']}: the loss or its gradient is not a finite number; the step is sk" in log_of(
                out
            )
        else:
            numbers = [*line.pop("layer_noise_to_signal").values(), *line.pop("hidden_rms"), *line.values()]
            assert line.pop("rdrop_loss") is None  # which the objective does not have
            assert numbers.count(None) == 1 and all(value is None or abs(value) < 1e9 for value in numbers), line
        following = [later["learning_rate"] for later in lines if later["step"] == line["step"] + 1]
        assert (following == [line["learning_rate"]]) == (line["step"] in skipped)  # the schedule waited too
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert tensor.isfinite().all(), name
    optimizer = load_file(out / "checkpoint-12" / "optimizer.safetensors")
    assert {tensor.item() for name, tensor in optimizer.items() if name.endswith(".step")} == {10.0}
    assert all(tensor.isfinite().all() for tensor in optimizer.values())


def test_too_many_bad_steps_in_a_row_end_the_run_and_a_good_checkpoint_stays(poisoned, tmp_path, capsys):
    order = [i for rows in epoch_steps(range(24), 4, seed=2, epoch=0) for i in rows]
    data, out = tmp_path / "data.csv", tmp_path / "out"
    data.write_text(
        "prompt,response\n" + "".join(f"Is it {i}?,It is {'Z' if i in order[8:] else i}.\n" for i in range(24))
    )
    with pytest.raises(InputError, match=r"step 5: .* finite number, 3 steps in a row .*; lower --learning_rate"):
        run(poisoned, data, out, **FAST, save_steps=1, max_bad_steps=3, snr_batches=1, seed=2)
    said = capsys.readouterr().err
    assert "step 3: " in said and "(1 in a row, the run ends at 3)" in said and "(2 in a row, the run" in said
    assert not (out / "adapter_model.safetensors").exists()
    with pytest.raises(InputError, match=r"step 5: .* 3 steps in a row"):  # the count goes on where it stood
        run(poisoned, data, out, **FAST, save_steps=1, max_bad_steps=3, snr_batches=1, seed=2,
            resume_from_checkpoint="latest")  # fmt: skip
    good, last = (load_file(out / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (3, 4))
    assert all(torch.equal(tensor, last[name]) and tensor.isfinite().all() for name, tensor in good.items())


def test_a_gradient_that_overflows_under_a_finite_loss_is_a_bad_step(llama_folder, questions, tmp_path, capsys):
    """Hidden states of 1e30 whose projections shrink them again: the adapter's gradient is as large, squared it is
    infinite."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    block = model.model.layers[3]
    block.input_layernorm.weight.data *= 1e30
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(block.self_attn, name).weight.data *= 1e-30
    shutil.copytree(llama_folder, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    flags = FAST | dict(max_bad_steps=2, eval_data=questions, eval_steps=1)
    with pytest.raises(InputError, match=r"step 2: .* 2 steps in a row"):
        run(tmp_path / "model", questions, tmp_path / "out", **flags)
    line = json.loads((tmp_path / "out" / "eval_metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["eval_ce_loss"] < 100  # the loss alone would not have told


# --- Memory -----------------------------------------------------------------------------------------------------------


def train_giving_memory_back(argv: list[str]) -> None:
    """Train with the C library told to give back what is freed: between two steps the process is small."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    train(argv)


def size_of(pid: int) -> int:
    """The process's address space, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux limits a running process's memory so")
def test_out_of_memory_is_one_line_with_what_helps_and_a_whole_checkpoint(llama_folder, tmp_path):
    data, out = tmp_path / "data.csv", tmp_path / "out"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,{'It is so. ' * 12}\n" for i in range(256)))
    flags = FAST | dict(num_noise_layers=1, max_length=64, long_rows="cut", max_steps=40, epochs=40,
                        save_steps=1)  # fmt: skip
    large = flags | dict(batch_size=128, gradient_accumulation_steps=2)
    [running] = start(llama_folder, data, out, target=train_giving_memory_back, **large)
    sizes: list[int] = []
    wait_until(lambda: list_checkpoints(out))
    first = list_checkpoints(out)[-1]
    wait_until(lambda: sizes.append(size_of(running.pid)) or list_checkpoints(out)[-1] != first)  # over a whole step
    limit = min(sizes) + 2**22  # what it has between two steps, and hardly more
    resource.prlimit(running.pid, resource.RLIMIT_AS, (limit, limit))
    assert wait([running]) == [2], log_of(out)
    line = error_of(out)
    [step] = re.findall(r"step (\d+): out of memory with 128 rows of 64 tokens in a micro-batch, \d{3} of them", line)
    assert "--gradient_checkpointing, --batch_size 64 --gradient_accumulation_steps 4, --loss_chunk_size 64" in line
    assert f"--resume_from_checkpoint latest goes on from checkpoint-{int(step) - 1}" in line
    # The advice is good: the same rows a step in smaller pieces go on from there.
    small = flags | dict(batch_size=16, gradient_accumulation_steps=16, max_steps=int(step), epochs=int(step))
    [resumed] = start(llama_folder, data, out, **small, resume_from_checkpoint="latest")
    assert wait([resumed]) == [0], log_of(out)
    assert [line["step"] for line in metrics_of(out)] == list(range(1, int(step) + 1))


# --- Disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A real small filesystem: `disk(options)` mounts it or changes its options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0

    if not mount("size=64m"):
        pytest.skip("mounting a small filesystem needs root")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all of a disk but so many bytes."""
    filler, free = folder / "filler", shutil.disk_usage(folder).free
    filler.write_bytes(b"\0" * (free - leave))
    return filler


def test_a_disk_that_fills_up_costs_a_line_and_the_run_goes_on_from_its_checkpoint(
    disk, llama_folder, questions, tmp_path
):
    """The disk is full at one time or another, down to the moment; freed, the run ends as the one that had room."""
    folder, _ = disk
    flags = FAST | dict(max_steps=4, save_steps=1, eval_data=questions, eval_steps=1)
    expected, out = tmp_path / "expected", folder / "out"
    assert wait(start(llama_folder, questions, expected, **flags)) == [0]
    size = sum(path.stat().st_size for path in expected.rglob("*") if path.is_file())
    places = set()
    for tenths in (0, 1, 2, 4, 6, 8, 9):
        shutil.rmtree(out, ignore_errors=True)
        Path(f"{out}.log").unlink(missing_ok=True)
        filler = fill(folder, 4096 * 4 + size * tenths // 10)
        log = tmp_path / "log"
        running = start(llama_folder, questions, out, **flags, log=log)
        status = wait(running)
        checkpoints = list_checkpoints(out)
        filler.unlink()
        if status == [0]:
            continue
        said = log.read_text()
        log.unlink()
        assert status == [2] and "Traceback" not in said, said[-3000:]
        [line] = [line for line in said.replace("\r", "\n").splitlines() if "error: " in line]
        assert "cannot be written: No space left on device" in line
        places.add(line.partition(": cannot")[0].rpartition("/")[2])
        if checkpoints and "/checkpoint-" in line:
            assert f"; {checkpoints[-1].name} is whole: free some space, and --resume_from_checkpoint" in line
        resumed = start(llama_folder, questions, out, **flags, resume_from_checkpoint="auto", log=log)
        assert wait(resumed) == [0], log.read_text()
        assert (out / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()
        assert [line["loss"] for line in metrics_of(out)] == [line["loss"] for line in metrics_of(expected)]
        assert (out / "eval_metrics.jsonl").read_bytes() == (expected / "eval_metrics.jsonl").read_bytes()
        assert not [path for path in out.rglob("*.tmp*")]
    # A checkpoint, a line of metrics, the model itself, ...
    assert len(places) >= 2 and any(place.startswith("checkpoint-") for place in places), places


def test_on_a_full_disk_overwriting_loses_nothing(disk, llama_folder, questions, tmp_path):
    folder, _ = disk
    out, log = folder / "out", tmp_path / "log"
    assert wait(start(llama_folder, questions, out, **FAST, max_steps=1, log=log)) == [0]
    before = (out / "adapter_model.safetensors").read_bytes()
    fill(folder, 0)
    running = start(llama_folder, questions, out, **FAST, max_steps=1, overwrite_output=True, seed=1, log=log)
    assert wait(running) == [2]
    assert "No space left on device" in log.read_text() and "Traceback" not in log.read_text()
    # There was no room even for the note that it is moved.
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert {path.name for path in out.iterdir()} >= {"tokenizer.json", "chat_template.jinja", "README.md"}
    (folder / "filler").unlink()
    assert wait(start(llama_folder, questions, out, **FAST, max_steps=1, overwrite_output=True, seed=1, log=log)) == [0]
    assert (out / "adapter_model.safetensors").read_bytes() != before and not (out / "previous_run").exists()


def test_a_disk_that_is_read_only_from_the_start_or_from_some_moment_on(disk, llama_folder, questions, tmp_path):
    folder, remount = disk
    out, log = folder / "out", tmp_path / "log"
    remount("ro")
    assert wait(start(llama_folder, questions, out, **FAST, max_steps=1, log=log)) == [2]
    assert "no permission to write in" in log.read_text()
    remount("rw")
    log.unlink()
    running = start(llama_folder, questions, out, **FAST | dict(epochs=50), save_steps=5, log=log)
    wait_until(lambda: list_checkpoints(out))
    wait_until(lambda: remount("ro"))  # refused while a file is being written
    assert wait(running) == [2]
    said = log.read_text()
    assert "cannot be written: Read-only file system" in said and "Traceback" not in said
    remount("rw")
    flags = FAST | dict(epochs=50, save_steps=5, resume_from_checkpoint="latest", max_steps=60)
    assert wait(start(llama_folder, questions, out, **flags, log=log)) == [0], log.read_text()
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 61))


# --- Trackers ---------------------------------------------------------------------------------------------------------


def test_wandb_that_cannot_be_reached_costs_one_warning(llama_folder, questions, tmp_path):
    pytest.importorskip("wandb")
    settings = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "3"}
    settings |= {"WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    out = tmp_path / "out"
    [running] = start(llama_folder, questions, out, **FAST, max_steps=2, report_to="wandb", environment=settings)
    assert wait([running]) == [0], log_of(out)
    assert log_of(out).count("goes on without it") == 1 and len(metrics_of(out)) == 2


def test_wandb_that_dies_in_the_middle_costs_one_warning(llama_folder, questions, tmp_path):
    pytest.importorskip("wandb")
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    out = tmp_path / "out"
    [running] = start(
        llama_folder, questions, out, **FAST | dict(epochs=20), max_steps=60, report_to="wandb", environment=settings
    )
    wait_until((out / "metrics.jsonl").exists)
    for child in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)  # wandb's own process
    assert wait([running]) == [0], log_of(out)
    assert log_of(out).count("--report_to wandb failed at step") == 1
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 61))
