"""Training from another teacher: what is refused, resumed and saved, and on two processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import MEASURED, metrics_of, run, start, wait
from safetensors.torch import load_file, save_file
from test_processes import train_with_given_noise

from noisefit.base.errors import InputError
from noisefit.run.contradictions import without_effect
from noisefit.run.settings import Settings

FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, logging_steps=1, noise_std=0.5, epochs=1,
            num_noise_layers=2)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "q.csv"
    path.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}{' or so' * (i % 3)}.\n" for i in range(18)))
    return path


def settings(**flags):
    return Settings(model="m", train_data="t", **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(loss_mode="ce_teacher"), "ce_teacher has nobody to learn from under --teacher self.*give --teacher base"),
        *(
            (dict(loss_mode=mode, teacher="base"), f"of the soft term, which --loss_mode {mode} does not have; leave")
            for mode in ("basefit", "ce_noisy", "consistency_only", "neftune", "rdrop")
        ),
        (dict(teacher="base", full_finetune=True), "base is the model with its adapter off, and --full_finetune"),
        (dict(teacher="ema", full_finetune=True), "ema is an average of the adapter, and --full_finetune trains"),
        (dict(loss_mode="kl_only", teacher="base", noise_std=0), "--noise_std 0 leaves --loss_mode kl_only nothing to"),
        (dict(teacher="old"), "--teacher: invalid choice"),
        (dict(teacher="ema", teacher_decay=1.1), "--teacher_decay: '1.1' is not a number from 0 to 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_line(flags, message):
    with pytest.raises(InputError, match=message) as caught:
        settings(**flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (dict(teacher="base"), None),
        (dict(teacher="ema", teacher_decay=0.9), None),
        (dict(teacher="base", teacher_decay=0.9), "--teacher_decay"),
        (dict(teacher_decay=0.9), "--teacher_decay"),
        (dict(teacher="base", teacher_gradient=True), None),  # the consistency term has one
        (dict(teacher="base", teacher_gradient=True, loss_mode="ce_kl"), "--teacher_gradient"),
        (dict(teacher="base", loss_mode="ce_teacher", temperature=2, temperature_on="teacher"), None),
        (dict(teacher="base", loss_mode="ce_teacher", noise_std=0.3, branches="fork"), "--noise_std, --branches"),
        (dict(teacher="base", num_noise_layers=0, temperature=2, temperature_on="teacher"), None),
    ],
    ids=str,
)
def test_flags_that_change_nothing_are_named(flags, idle):
    said = without_effect(settings(**flags))
    assert (said is None) == (idle is None) and (idle is None or said.endswith(f": {idle}"))


def test_a_run_without_noise_is_ce_teacher(llama_folder, data, tmp_path, capsys):
    flags = FAST | dict(teacher="base", temperature=1.5, lambda_consistency=3, max_steps=3, lora_dropout=0)
    one = run(llama_folder, data, tmp_path / "one", **flags, loss_mode="ce_teacher")
    said = capsys.readouterr().err
    assert "branches: clean; counting layers, a step costs 1.00 times plain fine-tuning, and a forward pass of" in said
    two = run(llama_folder, data, tmp_path / "two", **flags | dict(num_noise_layers=0))
    three = run(llama_folder, data, tmp_path / "three", **flags | dict(noise_std=0))
    for line, other, third in zip(one, two, three, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7) == pytest.approx(third[name], rel=1e-3,
                                                                                                  abs=1e-7)  # fmt: skip
        assert line["consistency_loss"] is None and other["consistency_loss"] == 0
    assert one[0]["soft_loss"] == pytest.approx(0, abs=1e-6) and one[2]["soft_loss"] > 1e-4  # it begins as the base
    assert "--loss_mode ce_teacher" in (tmp_path / "one" / "README.md").read_text()


def test_weights_of_rows_are_of_the_cross_entropy_alone(llama_folder, data, tmp_path):
    """With a weight of 0 for every row, what is left is the teacher's."""
    flags = FAST | dict(teacher="base", loss_mode="ce_kl", max_steps=2, unknown_rows="weight", unknown_below=0)
    for line in run(llama_folder, data, tmp_path / "out", **flags, unknown_weight=0):
        assert line["ce_loss"] == 0 and line["loss"] == pytest.approx(0.5 * line["soft_loss"], rel=1e-5)
        assert line["soft_loss"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        dict(teacher="ema", teacher_decay=0.7, gradient_checkpointing=True),
        dict(teacher="base", loss_mode="ce_kl", branches="separate"),
        dict(teacher="ema", loss_mode="ce_teacher"),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_run_that_was_not(flags, llama_folder, data, tmp_path):
    flags = FAST | flags | dict(save_steps=2, save_total_limit=0, max_steps=4)
    run(llama_folder, data, tmp_path / "whole", **flags)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "teacher.safetensors").exists() == (flags["teacher"] == "ema")
    run(llama_folder, data, tmp_path / "resumed", **flags, resume_from_checkpoint=checkpoint)
    whole, resumed = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_of(tmp_path / name)]
        for name in ("whole", "resumed")
    )
    assert whole == resumed
    names = [path.name for path in (tmp_path / "whole" / "checkpoint-4").glob("*.safetensors")]
    assert len(names) == (4 if flags["teacher"] == "ema" else 3)
    for name in names:
        one, other = (tmp_path / run / "checkpoint-4" / name for run in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes(), name
    if flags["teacher"] == "ema":
        average = load_file(tmp_path / "whole" / "checkpoint-4" / "teacher.safetensors")
        adapter = load_file(tmp_path / "whole" / "adapter_model.safetensors")
        assert len(average) == len(adapter) and "teacher.safetensors" not in names_of(tmp_path / "whole")


def names_of(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_another_teacher_or_a_damaged_one_is_refused(llama_folder, data, tmp_path):
    flags = FAST | dict(teacher="ema", max_steps=2, save_steps=1)
    run(llama_folder, data, tmp_path / "out", **flags)
    assert json.loads((tmp_path / "out" / "noisefit_config.json").read_text())["teacher"] == "ema"
    for change, message in [
        (dict(teacher="base"), "teacher was ema and is base"),
        (dict(teacher_decay=0.5), "teacher_decay was 0.99 and is 0.5"),
    ]:
        with pytest.raises(InputError, match=message):
            run(llama_folder, data, tmp_path / "out", **flags | change, resume_from_checkpoint="latest")
    path = tmp_path / "out" / "checkpoint-2" / "teacher.safetensors"
    tensors = load_file(path)
    save_file(tensors | {max(tensors): tensors[max(tensors)] * torch.nan}, path)
    with pytest.raises(InputError, match=r"its files do not fit this run \(ValueError: the teacher's .* or finite"):
        run(llama_folder, data, tmp_path / "out", **flags | dict(max_steps=3), resume_from_checkpoint=path.parent)
    path.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        run(llama_folder, data, tmp_path / "out", **flags | dict(max_steps=3), resume_from_checkpoint="latest")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [dict(teacher="base"), dict(teacher="ema", teacher_decay=0.5, loss_mode="ce_teacher")], ids=str
)
def test_two_processes_take_the_steps_of_one(flags, llama_folder, tmp_path):
    """9 rows in steps of 8: in the second step a process has none."""
    data = tmp_path / "data.csv"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}{' or so' * i}.\n" for i in range(9)))
    flags = FAST | flags | dict(lora_dropout=0, epochs=2, save_steps=4)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        own = flags | dict(batch_size=4 // processes, target=train_with_given_noise)
        done = wait(start(llama_folder, data, out, processes, **own))
        assert done == [0] * processes, Path(f"{out}.log").read_text()
        assert f"processes: {processes}" in Path(f"{out}.log").read_text()
    one, two = (metrics_of(tmp_path / name) for name in ("1", "2"))
    assert len(one) == 4 and one[-1]["soft_loss"] > 1e-3
    for line, other in zip(one, two, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "consistency_loss", "grad_norm"):
            close = None if line[name] is None else pytest.approx(line[name], rel=1e-4, abs=1e-8)
            assert other[name] == close, (line["step"], name)
    for name in ("adapter_model", "teacher") if flags["teacher"] == "ema" else ("adapter_model",):
        weights = [load_file(tmp_path / run / "checkpoint-4" / f"{name}.safetensors") for run in ("1", "2")]
        for key, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
