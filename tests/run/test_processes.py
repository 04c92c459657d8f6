"""One process and two take the same steps: losses, gradient norms, learning rates and weights."""

import json
import os
import platform
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from running import metrics_of, start, train, wait
from safetensors.torch import load_file
from test_loop_exact import fix_the_noise

import train_loop
from noisefit.base.errors import LocalError, one_line_errors
from noisefit.base.meeting import apart
from noisefit.inputs.batches import collate
from noisefit.inputs.prompts import Example
from noisefit.method.snr import average_snr, layer_snr
from noisefit.run.processes import PATIENCE, finish, on_any_process, start_accelerator

pytestmark = pytest.mark.slow

SETTINGS = dict(
    learning_rate=1e-2, weight_decay=0.01, logging_steps=1, lora_dropout=0, gradient_accumulation_steps=2,
    num_noise_layers=2, snr_batches=2, snr_every=2, epochs=2, lambda_consistency=0.7, temperature=1.5, save_steps=0,
    long_rows="cut",
)  # fmt: skip


def train_with_given_noise(argv: list[str]) -> None:
    train_loop.make_noise = fix_the_noise
    train(argv)


# Steps of 8 rows. 11 rows: the second step has one micro-batch a process instead of two, of one row and of two. 9 rows:
# it has one row, and one of the processes none. The rows have 6 to 60 supervised tokens, so no two shares are equal.
@pytest.mark.parametrize("rows", [11, 9])
@pytest.mark.parametrize("plain", [True, False], ids=["cross-entropy", "noise given"])
def test_two_processes_take_the_steps_of_one(plain, rows, llama_folder, tmp_path):
    data = tmp_path / "data.csv"
    lines = [f"Is it {i}?,It is {i}{' or so' * (i % 5) ** 2}.\n" for i in range(rows)]
    data.write_text("prompt,response\n" + "".join(lines))
    settings = SETTINGS | (dict(hybrid_loss_alpha=1, lambda_consistency=0, noise_std=0) if plain else {})
    for processes in (1, 2):
        out = tmp_path / str(processes)
        target = None if plain else train_with_given_noise
        running = start(llama_folder, data, out, processes, batch_size=4 // processes, target=target, **settings)
        assert wait(running) == [0] * processes, Path(f"{out}.log").read_text()
        assert f"4 steps of 8 rows; processes: {processes}" in Path(f"{out}.log").read_text()
    one, two = (metrics_of(tmp_path / name) for name in ("1", "2"))
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 3, 4]
    for line, expected in zip(two, one, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "consistency_loss", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), (line["step"], name)
        for name in ("learning_rate", "target_tokens", "epoch"):
            assert line[name] == expected[name], name
        assert (line["soft_loss"] == 0) == plain
        # That of the given noise, however the rows are cut, also where a process has none.
        given = dict.fromkeys(expected["layer_noise_to_signal"], pytest.approx(0.3, rel=1e-3))
        assert plain or (line["layer_noise_to_signal"] == given and expected["layer_noise_to_signal"] == given)
    chosen = [json.loads((tmp_path / name / "layer_snr.json").read_text())["selected"] for name in ("1", "2")]
    assert chosen[0] == chosen[1]
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["kl_only", "neftune", "rdrop"])
def test_so_they_do_with_other_objectives(mode, llama_folder, tmp_path):
    """Of other branches, without a cross-entropy, with noise on the embedding; and where a process has no row."""
    data = tmp_path / "data.csv"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}{' or so' * i}.\n" for i in range(9)))
    settings = SETTINGS | dict(loss_mode=mode, rdrop_dropout=0, epochs=1)
    for processes in (1, 2):
        flags = settings | dict(batch_size=4 // processes, target=train_with_given_noise)
        out = tmp_path / str(processes)
        assert wait(start(llama_folder, data, out, processes, **flags)) == [0] * processes, Path(
            f"{out}.log"
        ).read_text()
    one, two = (metrics_of(tmp_path / name) for name in ("1", "2"))
    assert len(one) == len(two) == 2
    for line, expected in zip(two, one, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "rdrop_loss", "grad_norm"):
            close = None if expected[name] is None else pytest.approx(expected[name], rel=1e-4, abs=1e-9)
            assert line[name] == close, (line["step"], name)


SECONDS = 3  # of a collective's patience; the main process's file takes longer


@one_line_errors("program")
def meet(argv: list[str]) -> None:
    accelerator = start_accelerator()
    group = torch.distributed.group.WORLD
    found = {"patience": group._get_backend(torch.device("cpu")).options._timeout.total_seconds(), "errors": []}
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=SECONDS), group)  # now that they have met
    second, output = accelerator.process_index == 1, Path(argv[-1].partition("=")[2])
    found["votes"] = on_any_process(accelerator, second, False, torch.tensor(not second), True)
    with apart("writing a file") as is_main:
        if is_main:
            time.sleep(SECONDS + 1)
            output.write_text("whole")
    found["seen"] = output.exists()
    for failing, error in ((0, LocalError("the disk is full")), (1, OSError("no such device"))):
        try:
            with apart("reading a file"):
                if accelerator.process_index == failing:
                    raise error
        except Exception as raised:
            found["errors"].append([type(raised).__name__, str(raised)])
    found["votes"] += on_any_process(accelerator, second)  # they are still together
    Path(f"{output}.{int(second)}").write_text(json.dumps(found))
    with apart("reading a file") as is_main:
        if is_main:
            os._exit(9)


def test_they_agree_and_wait_for_each_others_files_longer_than_in_a_collective_and_end_together(llama_folder, tmp_path):
    out = tmp_path / "out"
    assert wait(start(llama_folder, tmp_path, out, 2, target=meet)) == [9, 2], Path(f"{out}.log").read_text()
    first, second = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1))
    assert first["votes"] == second["votes"] == [True, False, True, True, True]
    assert first["seen"] and second["seen"] and first["patience"] == PATIENCE.total_seconds()
    of_the_second = f"process 1, on {platform.node()}: reading a file: OSError no such device"
    assert first["errors"] == [["LocalError", "the disk is full"], ["InputError", of_the_second]]
    assert second["errors"] == [["InputError", "the disk is full"], ["OSError", "no such device"]]
    assert "error: reading a file: the process that holds the launch together is gone" in Path(f"{out}.log").read_text()


def measure(argv: list[str]) -> None:
    """What each process measures of its own batch, and what all of them then agree on."""
    from accelerate import Accelerator
    from tiny_models import tiny_model

    accelerator = Accelerator()
    rank = accelerator.process_index
    batch = collate([Example(list(range(3, 15 + 40 * rank)), target_start=3)], 0)
    model = tiny_model(dtype=torch.float32)
    own, agreed = layer_snr(model, batch, 0.3).double(), average_snr(model, [batch], 0.3)
    output = argv[-1].partition("=")[2]
    Path(f"{output}.{rank}").write_text(json.dumps([agreed.tolist(), own.tolist()]))
    finish(accelerator)


def test_all_processes_agree_on_the_snr(llama_folder, tmp_path):
    out = tmp_path / "out"
    assert wait(start(llama_folder, tmp_path, out, 2, target=measure)) == [0, 0], Path(f"{out}.log").read_text()
    (agreed, own_0), (agreed_1, own_1) = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1))
    assert agreed == agreed_1 and own_0 != own_1
    assert agreed == pytest.approx([(a + b) / 2 for a, b in zip(own_0, own_1, strict=True)])
