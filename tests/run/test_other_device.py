"""A device that is no GPU of NVIDIA's: all that a run and its answers compute goes there, and none of it in float64."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from running import metrics_of, run, run_generate, start_program, wait, words
from tiny_folder import tiny_folder

pytestmark = pytest.mark.slow

FLAGS = dict(noise_policy="auto", auto_calib_batches=1, snr_batches=1, max_steps=1, batch_size=2, lora_dropout=0,
             gradient_accumulation_steps=1, loss_chunk_size=16)  # fmt: skip
ANSWERS = dict(rounds=2, max_new_tokens=3, noise_passes=2, repetition_penalty=1.1)


def train_and_answer(argv: list[str]) -> None:
    """The same on the CPU and on the device, in a process of its own."""
    import device_without_float64 as other
    from accelerate.state import AcceleratorState, GradientState, PartialState

    import generate
    from noisefit.run import checkpoints, output, preparation

    start, gather = preparation.start_accelerator, output.gather_weights
    os.environ.pop("ACCELERATE_USE_CPU")  # with which accelerate's states allow no other device
    model, data, folder = Path(argv[0]), Path(argv[1]), Path(argv[2])
    devices = []

    def start_there(**options):
        accelerator = start(**options)
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = devices[-1]
        assert accelerator.device == devices[-1]
        return accelerator

    def gather_from_there(*arguments, **options):  # wrappers have no memory that safetensors could write
        return {name: tensor.cpu() for name, tensor in gather(*arguments, **options).items()}

    preparation.start_accelerator = generate.start_accelerator = start_there
    checkpoints.gather_weights = output.gather_weights = gather_from_there
    with other.Registered():
        for device, name in ((torch.device("cpu"), "cpu"), (other.DEVICE, "there")):
            devices.append(device)
            run(model, data, folder / name, **FLAGS)
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            files = dict(model_path=folder / "cpu", input_csv=data, output_csv=folder / f"{name}.csv")
            run_generate(words(**files, **ANSWERS))
    assert len(other.counted) > 1000


def test_training_and_answers_need_no_float64_on_the_device(tmp_path):
    model, data, log = tiny_folder(tmp_path / "model", num_hidden_layers=3), tmp_path / "data.csv", tmp_path / "log"
    data.write_text("prompt,response\nWho?,It is he.\nWhat is it?,A thing.\n")
    assert wait(start_program(train_and_answer, [str(model), str(data), str(tmp_path)], log)) == [0], log.read_text()
    [expected], [found] = (metrics_of(tmp_path / name) for name in ("cpu", "there"))
    for name in ("loss", "ce_loss", "soft_loss", "consistency_loss", "grad_norm", "noise_to_signal"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name
    expected, found = (json.loads((tmp_path / name / "noise_policy.json").read_text()) for name in ("cpu", "there"))
    assert found["snr"] == pytest.approx(expected["snr"], rel=1e-4) and found["selected"] == expected["selected"]
    for one, other in zip(expected["layers"], found["layers"], strict=True):
        kl = [[cell["kl"] for cell in of_layer["grid"]] for of_layer in (one, other)]
        assert kl[1] == pytest.approx(kl[0], rel=1e-3)
    expected, found = (list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("cpu", "there"))
    assert len(found) == len(expected) == 4
    for one, other in zip(expected, found, strict=True):
        assert other["generated_response"] == one["generated_response"]
        for name in ("logprob", "tokens", "noise_logprob_mean", "noise_logprob_spread"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-2, abs=2e-3), name
