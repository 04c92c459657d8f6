"""What goes wrong on a bad day, brought about for real: numbers that overflow, memory and disks that are full, files
that change or are tampered with, a tracker that dies."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import metrics_of, python, run, start, wait, wait_until, words
from safetensors.torch import load_file, save_file
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from noisefit.batches import epoch_steps
from noisefit.branches import BranchedModel
from noisefit.errors import InputError
from noisefit.resuming import fingerprint, list_checkpoints

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
            assert all(value is not None and abs(value) < 1e9 for value in line.values()), line
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


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux limits a running process's memory so")
def test_out_of_memory_is_one_line_with_what_helps_and_a_whole_checkpoint(llama_folder, tmp_path):
    data, out = tmp_path / "data.csv", tmp_path / "out"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,{'It is so. ' * 12}\n" for i in range(512)))
    flags = FAST | dict(num_noise_layers=1, max_length=64, max_steps=40, epochs=40, save_steps=1)
    large = flags | dict(batch_size=256, gradient_accumulation_steps=2)
    [running] = start(llama_folder, data, out, **large)
    wait_until(lambda: list_checkpoints(out))
    [pages, *_] = Path(f"/proc/{running.pid}/statm").read_text().split()
    limit = int(pages) * os.sysconf("SC_PAGE_SIZE")  # what it has now, and no more
    resource.prlimit(running.pid, resource.RLIMIT_AS, (limit, limit))
    assert wait([running]) == [2], log_of(out)
    line = error_of(out)
    [step] = re.findall(r"step (\d+): out of memory with 256 rows of 64 tokens in a micro-batch, \d{4} of them", line)
    assert "--gradient_checkpointing, --batch_size 128 --gradient_accumulation_steps 4, --loss_chunk_size 64" in line
    assert f"--resume_from_checkpoint latest goes on from checkpoint-{int(step) - 1}" in line
    # The advice is good: the same rows a step in smaller pieces go on from there.
    small = flags | dict(batch_size=16, gradient_accumulation_steps=32, max_steps=int(step), epochs=int(step))
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
    held = [path for path in out.rglob("adapter_model.safetensors") if path.read_bytes() == before]
    assert held == [out / "previous_run" / "adapter_model.safetensors"]
    assert {path.name for path in held[0].parent.iterdir()} >= {"tokenizer.json", "chat_template.jinja", "README.md"}
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


# --- Resuming what is not the same run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(llama_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A run of three steps with a checkpoint after each, and its data."""
    folder = tmp_path_factory.mktemp("finished")
    data = folder / "data.csv"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}.\n" for i in range(12)))
    run(llama_folder, data, folder / "out", **FAST, max_steps=3, save_steps=1, save_total_limit=0)
    return folder / "out", data


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    shutil.copytree(finished[0], tmp_path / "out")
    shutil.copyfile(finished[1], tmp_path / "data.csv")
    return tmp_path / "out", tmp_path / "data.csv"


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(seed=1), "seed was 42 and is 1"),
        (dict(noise_std=0.2, num_noise_layers=2), "noise_std was 0.1 and is 0.2; num_noise_layers was 3 and is 2"),
        (dict(batch_size=4), "rows an optimizer step was 4 and is 8"),
        (dict(learning_rate=1e-3), "learning_rate was 0.01 and is 0.001"),
        (dict(max_steps=2), "stands after step 3, but --max_steps or --epochs end the run at step 2"),
    ],
    ids=str,
)
def test_other_settings_are_refused_with_what_differs(flags, message, copied, llama_folder):
    out, data = copied
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        run(llama_folder, data, out, **FAST | dict(max_steps=5) | flags, resume_from_checkpoint="latest")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_rows_or_another_model_are_refused(copied, llama_folder, tmp_path):
    out, data = copied
    flags = FAST | dict(max_steps=5, resume_from_checkpoint="auto")
    other = tiny_folder(tmp_path / "other")
    weights = AutoModelForCausalLM.from_pretrained(other)
    weights.lm_head.weight.data[0, 0] += 1
    weights.save_pretrained(other)
    with pytest.raises(InputError, match=r"the files of --model have changed\. Resume it with its own, or start"):
        run(other, data, out, **flags)
    data.write_text(data.read_text().replace("It is 7.", "It is 8."))
    with pytest.raises(InputError, match=r"checkpoint-3 is of a run .*the rows of --train_data have changed"):
        run(llama_folder, data, out, **flags)


def test_more_steps_other_records_and_another_cut_or_place_are_fine(copied, llama_folder, tmp_path, capsys):
    out, data = copied
    moved = shutil.copytree(llama_folder, tmp_path / "moved")
    flags = FAST | dict(max_steps=8, logging_steps=2, batch_size=1, gradient_accumulation_steps=4, save_steps=0)
    lines = run(moved, data.rename(tmp_path / "renamed.csv"), out, **flags, resume_from_checkpoint="latest")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6, 8]
    said = capsys.readouterr().err
    assert "going on from" in said and "now follows a schedule of 8 steps instead of 3" in said
    # The learning rate follows the schedule of the run as it is now: at its end, not at that of the first part.
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) * 1e-2 for step in (5, 7)]
    assert [line["learning_rate"] for line in lines[-2:]] == pytest.approx(cosine)


def test_a_run_goes_on_in_another_folder_and_leaves_the_first_alone(finished, llama_folder, tmp_path):
    out, data = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flags = FAST | dict(max_steps=3, resume_from_checkpoint=out / "checkpoint-2")
    lines = run(llama_folder, data, tmp_path / "other", **flags)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() == before[out / "adapter_model.safetensors"]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics_of(out)]


def test_latest_is_the_one_saved_last_after_going_back(copied, llama_folder):
    out, data = copied
    flags = FAST | dict(max_steps=2, save_steps=1, save_total_limit=2)
    run(llama_folder, data, out, **flags, resume_from_checkpoint=out / "checkpoint-1")
    assert [folder.name for folder in list_checkpoints(out)] == ["checkpoint-3", "checkpoint-2"]
    lines = run(llama_folder, data, out, **flags | dict(max_steps=3), resume_from_checkpoint="latest")
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_weight_that_never_had_a_gradient_is_no_reason_to_refuse(llama_folder, questions, tmp_path, monkeypatch):
    """As an adapter on a vision tower has none in training on text: here that of the last layer."""
    whole_forward = BranchedModel.forward

    def forward(self, *args, **kwargs):
        for name, parameter in self.named_parameters():
            if "layers.3" in name:
                parameter.requires_grad_(False)
        return whole_forward(self, *args, **kwargs)

    monkeypatch.setattr(BranchedModel, "forward", forward)
    flags = FAST | dict(save_steps=2, max_steps=4, save_total_limit=0)
    run(llama_folder, questions, tmp_path / "whole", **flags)
    resume = tmp_path / "whole" / "checkpoint-2"
    run(llama_folder, questions, tmp_path / "resumed", **flags, resume_from_checkpoint=resume)
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_fine_tuning_resumes_as_the_same_run(checkpointing, llama_folder, questions, tmp_path):
    flags = FAST | dict(save_steps=2, max_steps=4, save_total_limit=0, full_finetune=True)
    flags |= dict(gradient_checkpointing=True) if checkpointing else {}
    run(llama_folder, questions, tmp_path / "whole", **flags)
    resume = tmp_path / "whole" / "checkpoint-2"
    run(llama_folder, questions, tmp_path / "resumed", **flags, resume_from_checkpoint=resume)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


def test_latest_needs_a_checkpoint_and_auto_does_not(llama_folder, questions, tmp_path):
    with pytest.raises(InputError, match=r"latest: no checkpoint in .*out; auto starts afresh where there is none"):
        run(llama_folder, questions, tmp_path / "out", **FAST, max_steps=1, resume_from_checkpoint="latest")
    assert not (tmp_path / "out").exists()
    assert len(run(llama_folder, questions, tmp_path / "out", **FAST, max_steps=1, resume_from_checkpoint="auto")) == 1


# --- Checkpoints that are damaged or tampered with --------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(path: Path, evil: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path, evil: Path) -> None:
    path.unlink()


def pickle_of_the_same_size(path: Path, evil: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(pickle.dumps(Evil(evil)).ljust(size, b"\0"))


DAMAGES = [
    ("adapter_model.safetensors", cut, "is not a safetensors file"),
    ("metrics.jsonl", cut, "metrics.jsonl has \\d+ bytes instead of \\d+"),
    ("optimizer.safetensors", remove, "optimizer.safetensors is missing"),
    ("checkpoint.json", remove, "no checkpoint.json in it"),
    ("checkpoint.json", pickle_of_the_same_size, "checkpoint.json is not readable as one of a checkpoint"),
    ("adapter_model.safetensors", pickle_of_the_same_size, "is not a safetensors file; nothing else is loaded"),
    ("processes.safetensors", pickle_of_the_same_size, "is not a safetensors file; nothing else is loaded"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_checkpoint_that_is_not_whole_is_passed_over_or_refused(
    name, damage, message, copied, llama_folder, tmp_path, capsys
):
    out, data = copied
    adapter = (out / "adapter_model.safetensors").read_bytes()
    evil = tmp_path / "evil"
    damage(out / "checkpoint-3" / name, evil)
    flags = FAST | dict(max_steps=3)
    with pytest.raises(InputError, match=message):
        run(llama_folder, data, out, **flags, resume_from_checkpoint=out / "checkpoint-3")
    run(llama_folder, data, out, **flags, resume_from_checkpoint="latest")
    assert f"{out}/checkpoint-3 is passed over: " in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert not evil.exists()


EDITS = {
    "loop": dict(
        step=["8", 8.5, -3, True, 4], layers=[[99], [-1], ["0"], "012", None, [0, 0]], snr=["x", None, [[1.0]], [1.0]],
        seen_targets=["x", None, -1], bad_steps=["x", 99], strategy=["nope", 3, None],
    ),
    "metrics": dict(steps=["1", -1], targets=[0.5], seconds=[-1, float("inf")]),
    "schedule": dict(last_epoch=["3", -5, 10**30]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [(part, name, value) for part, names in EDITS.items() for name, values in names.items() for value in values],
)
def test_an_edited_checkpoint_is_refused_in_a_line(part, name, value, copied, llama_folder):
    out, data = copied
    path = out / "checkpoint-3" / "checkpoint.json"
    state = json.loads(path.read_text())
    state[part][name] = value
    path.write_text(json.dumps(state))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"checkpoint-3|--max_steps"):
        run(llama_folder, data, out, **FAST, max_steps=3, resume_from_checkpoint=out / "checkpoint-3")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "null", '{"saved_at": Infinity}'], ids=lambda text: text[:9])
def test_a_checkpoint_json_of_something_else_is_passed_over(text, copied, llama_folder, capsys):
    out, data = copied
    (out / "checkpoint-3" / "checkpoint.json").write_text(text)
    run(llama_folder, data, out, **FAST, max_steps=3, resume_from_checkpoint="latest")
    assert f"{out}/checkpoint-3 is passed over: checkpoint.json is not readable" in capsys.readouterr().err


def replace_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a file's tensors and make its checkpoint agree, so that only what they are can tell."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    state = json.loads((path.parent / "checkpoint.json").read_text())
    state["files"][path.name] = fingerprint(path)
    (path.parent / "checkpoint.json").write_text(json.dumps(state))


TENSORS = {
    "not finite": ("optimizer.safetensors", lambda t: next(iter(t.values())).fill_(float("nan"))),
    "another shape": ("optimizer.safetensors", lambda t: t.update({max(t): torch.zeros(3)})),
    "of no parameter": ("optimizer.safetensors", lambda t: t.update({"model.head.exp_avg": torch.zeros(3)})),
    "no random state": ("processes.safetensors", lambda t: t.pop("0.random.torch")),
    "adapter not finite": ("adapter_model.safetensors", lambda t: next(iter(t.values())).fill_(float("inf"))),
    "adapter lacking": ("adapter_model.safetensors", lambda t: t.popitem()),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_checkpoint_with_other_tensors_than_the_run_has_is_refused(case, copied, llama_folder):
    out, data = copied
    name, change = TENSORS[case]
    replace_tensors(out / "checkpoint-3" / name, change)
    with pytest.raises(InputError, match=r"checkpoint-3: (its files do not fit|not to be loaded)"):
        run(llama_folder, data, out, **FAST, max_steps=5, resume_from_checkpoint=out / "checkpoint-3")


def test_a_full_model_whose_weights_are_lacking_is_refused(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    flags = FAST | dict(full_finetune=True, save_steps=1, max_steps=1)
    run(llama_folder, questions, out, **flags)
    replace_tensors(out / "checkpoint-1" / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"checkpoint-1: not to be loaded.*up_proj.weight is missing"):
        run(llama_folder, questions, out, **flags | dict(max_steps=2), resume_from_checkpoint="latest")


def test_auto_does_not_start_afresh_over_checkpoints_that_are_all_damaged(copied, llama_folder):
    out, data = copied
    for folder in list_checkpoints(out):
        (folder / "processes.safetensors").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"auto: no checkpoint in .*out is whole; remove them"):
        run(llama_folder, data, out, **FAST, max_steps=5, resume_from_checkpoint="auto")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_checkpoints_moved_to_another_disk_behind_links_go_on(copied, llama_folder, tmp_path):
    out, data = copied
    for name in ("checkpoint-1", "checkpoint-3"):
        shutil.move(out / name, tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    (out / "checkpoint-7").symlink_to(tmp_path / "nowhere")
    (out / "checkpoint-8").write_text("a file")
    (out / "checkpoint-notes.tmp").write_text("mine")
    flags = FAST | dict(max_steps=4, save_steps=1, save_total_limit=1, resume_from_checkpoint="latest")
    assert [line["step"] for line in run(llama_folder, data, out, **flags)] == [1, 2, 3, 4]
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4"]
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-3"]
    assert (out / "checkpoint-notes.tmp").read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["", "~nobody-of-that-name/x", "x" * 5000, "a\0b"], ids=["empty", "home", "long", "nul"]
)
def test_a_path_that_is_none_is_refused_in_a_line(path, llama_folder, questions, tmp_path):
    with pytest.raises(InputError, match="--resume_from_checkpoint"):
        run(llama_folder, questions, tmp_path / "out", resume_from_checkpoint=path)


def test_two_runs_do_not_write_to_one_folder(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    [first] = start(llama_folder, questions, out, **FAST | dict(epochs=1000), max_steps=-1)
    wait_until((out / "metrics.jsonl").exists)
    [second] = start(llama_folder, questions, out, **FAST, max_steps=1, seed=1, log=tmp_path / "second.log")
    assert wait([second]) == [2]
    assert "another run is writing there" in (tmp_path / "second.log").read_text()
    os.kill(first.pid, signal.SIGTERM)
    assert wait([first]) == [75]
    steps = [line["step"] for line in metrics_of(out)]
    assert steps == list(range(1, len(steps) + 1))


def test_other_rows_to_evaluate_on_are_said(copied, llama_folder, tmp_path, capsys):
    out, data = copied
    flags = FAST | dict(max_steps=4, resume_from_checkpoint="latest", eval_data=data)
    assert len(run(llama_folder, data, out, **flags)) == 4
    assert "the rows of --eval_data are not those that checkpoint-3 was saved with" in capsys.readouterr().err


def test_generate_refuses_a_pickle_in_place_of_an_adapter(copied, tmp_path):
    out, data = copied
    evil = tmp_path / "evil"
    pickle_of_the_same_size(out / "adapter_model.safetensors", evil)
    done = python("generate.py", *words(model_path=out, input_csv=data, output_csv=tmp_path / "a.csv"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "generate.py: error: --model_path" in done.stderr and not evil.exists()


def test_a_checkpoint_is_an_adapter_to_answer_with(finished, questions, tmp_path):
    answers = tmp_path / "answers.csv"
    flags = words(model_path=finished[0] / "checkpoint-2", input_csv=questions, output_csv=answers, rounds=1)
    done = python("generate.py", *flags, "--max_new_tokens", "4")
    assert done.returncode == 0 and answers.exists(), done.stderr


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
    assert log_of(out).count("the tracker failed at step") == 1
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 61))
