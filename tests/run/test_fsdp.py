"""FSDP: sharding changes where the weights are, and nothing else. Two processes of a CPU stand for the GPUs."""

import json
import os
from types import SimpleNamespace

import fsdp_program
import pytest
import torch
from accelerate.commands import launch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from running import CONFIGS, MEASURED, ROOT, config_command, metrics_of, run, run_command, start_program, wait, words
from safetensors.torch import load_file, save_file
from tiny_folder import tiny_folder
from tiny_models import tiny_model

from noisefit.base.precision import keep_float32_when_sharded
from noisefit.fork.branches import BranchedModel

pytestmark = pytest.mark.slow

SETTINGS = dict(
    learning_rate=1e-2, max_steps=4, logging_steps=1, lora_dropout=0, noise_std=0, gradient_checkpointing=True,
    gradient_accumulation_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def questions(folder):
    lines = [f"What is {'very ' * (i % 5)}{i} plus {i}?,It is {i + i}{' as is known' * (i % 3)}." for i in range(24)]
    path = folder / "questions.csv"
    path.write_text("\n".join(["prompt,response", *lines]) + "\n", encoding="utf-8")
    return path


def launch_sharded(results, model, data, output, **flags):
    """`fsdp_program.py` on two processes, as a user launches a program."""
    flags = words(model=model, train_data=data, eval_data=data, output_model=output, **SETTINGS | flags)
    # In float32, as what is compared is exact; the file's bf16 is looked at below.
    program = ["--num_processes", "2", "--mixed_precision", "no", "tests/fsdp_program.py", str(results), *flags]
    # Without a GPU in sight `fully_shard` takes the CPU.
    return run_command(config_command("fsdp.yaml", *program), PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")


def environment_of(configuration: str, *options: str) -> dict[str, str]:
    """What a launch with a file of configs/accelerate sets for its processes."""
    words_of_launch = ["--config_file", str(CONFIGS / configuration), "--num_processes", "2", *options, "program.py"]
    arguments, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words_of_launch))
    set_now = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in set_now.items() if os.environ.get(name) != value}


def train_sharded(model, data, output, **flags):
    """What the launch does after its first half minute of imports: two processes; what they said."""
    flags = words(model=model, train_data=data, eval_data=data, output_model=output, **SETTINGS | flags)
    log = output.with_name(output.name + ".log")
    environment = environment_of("fsdp.yaml", "--mixed_precision", "no") | {"CUDA_VISIBLE_DEVICES": ""}
    statuses = wait(start_program(fsdp_program.main, ["none", *flags], log, 2, environment))
    assert statuses == [0, 0], log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def launched(folder, llama_folder, questions):
    """One launch for several tests, as most of its time goes into starting."""
    flags = dict(batch_size=2, save_steps=2)
    return launch_sharded(folder / "results.json", llama_folder, questions, folder / "two", **flags)


def test_sharded_losses_and_gradients_are_the_plain_ones(launched, folder):
    assert (folder / "results.json").exists(), launched.stderr
    compared = json.loads((folder / "results.json").read_text())
    assert compared["processes"] == 2 and len(compared["cases"]) == 7
    for line in compared["cases"]:
        first, second = line["of_processes"]
        assert first["target_tokens"] == 15 and second["target_tokens"] == (0 if line["case"]["empty"] else 3)
        names = first["gathered"]  # on the main process; a tied weight once
        tied = line["case"]["kind"] == "tied"
        assert ("lm_head.weight" in names, "model.embed_tokens.weight" in names) == (False, tied)
        assert all("lora" in name for name in names) == (not tied) and names
        for process in (first, second):
            assert process["losses"] < 1e-9 and process["gradients"] < 1e-9, line
            assert process["smallest_gradient"] > 1e-3, line  # every trained tensor has one to compare


def test_gradients_are_reduced_at_each_micro_batch_and_none_is_kept_whole(launched, folder):
    ours, theirs = json.loads((folder / "results.json").read_text())["accumulated"]
    assert ours["gradients"] < 1e-9 and theirs["gradients"] < 1e-9
    assert ours["kept"] == 0 and theirs["kept"] == theirs["of"]  # as in accelerate's `no_sync`


def read_by(said: str) -> list[list[str]]:
    """The safetensors files that each process of a run took tensors from."""
    lines = [line.partition(": ") for line in said.splitlines() if line.startswith("read by ")]
    return [json.loads(files) for _, _, files in sorted(lines)]


def test_the_loop_trains_sharded_as_it_does_on_one_process(launched, folder, llama_folder, questions):
    assert launched.returncode == 0, launched.stderr
    assert "processes: 2" in launched.stderr and "branches: clean, noisy, noisy (fork)" in launched.stderr
    [groups] = [json.loads(line[7:]) for line in launched.stdout.splitlines() if line.startswith("groups:")]
    assert groups == ["", *(f"model.base_model.model.model.layers.{layer}" for layer in range(4))]
    assert read_by(launched.stdout) == [["model.safetensors"], []]

    expected = run(llama_folder, questions, folder / "one", **SETTINGS, batch_size=4, eval_data=questions)
    for line, one in zip(metrics_of(folder / "two"), expected, strict=True):
        for name in ("step", "loss", "ce_loss", "grad_norm", "learning_rate", "target_tokens", "epoch"):
            assert line[name] == pytest.approx(one[name], rel=1e-4, abs=1e-9), name
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    one, two = (
        json.loads((folder / name / "eval_metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")
    )
    assert two["eval_ce_loss"] == pytest.approx(one["eval_ce_loss"], rel=1e-4)


def test_a_sharded_run_resumed_is_the_same_run(launched, folder, llama_folder, questions):
    assert launched.returncode == 0, launched.stderr
    flags = dict(batch_size=2, save_steps=2, resume_from_checkpoint=folder / "two" / "checkpoint-2")
    said = train_sharded(llama_folder, questions, folder / "resumed", **flags)
    assert "going on from" in said
    both = ["processes.safetensors"]  # the state of its own, which is small
    assert read_by(said) == [["adapter_model.safetensors", "model.safetensors", "optimizer.safetensors", *both], both]
    two, resumed = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_of(folder / name)]
        for name in ("two", "resumed")
    )
    assert resumed == two
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "processes.safetensors"):
        one, other = (folder / run / "checkpoint-4" / name for run in ("two", "resumed"))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_sharded_run_calibrates_as_one_process_does(llama_folder, tmp_path, monkeypatch):
    """All rows alike, and noise that is no draw: then it does not matter which process has which row."""
    data = tmp_path / "alike.csv"
    data.write_text("prompt,response\n" + "What is one plus one?,It is two.\n" * 8)
    flags = dict(noise_policy="auto", max_steps=1)
    train_sharded(llama_folder, data, tmp_path / "two", batch_size=2, **flags)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    run(llama_folder, data, tmp_path / "one", **SETTINGS | flags, batch_size=4)
    one, two = (json.loads((tmp_path / name / "noise_policy.json").read_text()) for name in ("one", "two"))
    assert two["selected"] == one["selected"] and two["scales"] == one["scales"] and two["tokens"] == one["tokens"]
    for sharded, plain in zip(two["layers"], one["layers"], strict=True):
        for cell, expected in zip(sharded["grid"], plain["grid"], strict=True):
            assert cell["kl"] == pytest.approx(expected["kl"], rel=1e-3) and cell["kl"] > 1e-6
            assert cell["ce_change"] == pytest.approx(expected["ce_change"], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        dict(noise_scale="frozen", noise_std=0.5, noise_gradient=True, full_finetune=True, save_steps=2),
        dict(noise_scale="relative", noise_policy="auto"),
    ],
    ids=str,
)
def test_a_sharded_run_has_the_noise_of_one_process(flags, llama_folder, tmp_path, monkeypatch):
    """All rows alike and noise that is no draw, as above; the second branch has the noise of the first.

    All weights of a model are trained that has whatever makes loading hard: tied ones, and buffers in its files.
    """
    model, whole = llama_folder, "full_finetune" in flags
    if whole:
        model = tiny_folder(tmp_path / "model", "glm4_moe", tie_word_embeddings=True)
        files = load_file(model / "model.safetensors")
        [*buffers] = [name for name in files if "e_score_correction_bias" in name]
        assert len(buffers) == 3 and "lm_head.weight" not in files
        files |= {name: torch.tensor([0.1, 0.3, 0.0, 0.2]) for name in buffers}
        save_file(files, model / "model.safetensors", {"format": "pt"})
    data = tmp_path / "alike.csv"
    data.write_text("prompt,response\n" + "What is one plus one?,It is two.\n" * 8)
    flags = flags | dict(max_steps=3, teacher_gradient=True)
    train_sharded(model, data, tmp_path / "two", batch_size=2, **flags)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    run(model, data, tmp_path / "one", **SETTINGS | flags, batch_size=4)
    one, two = (json.loads((tmp_path / name / "layer_snr.json").read_text()) for name in ("one", "two"))
    assert two["selected"] == one["selected"] and ("base_stds" in one) == (flags["noise_scale"] == "frozen")
    assert two.get("base_stds", []) == pytest.approx(one.get("base_stds", []), rel=1e-3)
    for sharded, plain in zip(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), strict=True):
        assert plain["soft_loss"] > 1e-4
        for name in ("loss", "soft_loss", "grad_norm", "noise_to_signal", "layer_noise_to_signal", "hidden_rms"):
            assert sharded[name] == pytest.approx(plain[name], rel=1e-3), name
    if not whole:
        return
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() == files.keys()
    for name, tensor in one.items():  # on average: Adam makes a step of a gradient that is nothing but rounding
        assert (two[name] - tensor).abs().mean() < 1e-5, name
        assert torch.equal(tensor, files[name]) == torch.equal(two[name], files[name]) == (name in buffers), name
    flags |= dict(batch_size=2, resume_from_checkpoint=tmp_path / "two" / "checkpoint-2")
    said = train_sharded(model, data, tmp_path / "again", **flags)
    assert "going on from" in said and read_by(said)[1] == ["processes.safetensors"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        again, two = (tmp_path / run / "checkpoint-3" / name for run in ("again", "two"))
        assert again.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("teacher", ["base", "ema"])
def test_a_sharded_run_has_the_teacher_of_one_process(teacher, folder, llama_folder, questions):
    flags = dict(loss_mode="ce_teacher", teacher=teacher, teacher_decay=0.5, save_steps=2, temperature=2, epochs=2)
    out = folder / f"{teacher}-two"
    train_sharded(llama_folder, questions, out, batch_size=2, **flags)
    expected = run(llama_folder, questions, folder / f"{teacher}-one", **SETTINGS | flags, batch_size=4)
    for line, one in zip(metrics_of(out), expected, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "grad_norm"):
            assert line[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name
    assert expected[-1]["soft_loss"] > 1e-3
    if teacher == "base":
        return
    one, two = (load_file(folder / f"ema-{name}" / "checkpoint-4" / "teacher.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    flags |= dict(batch_size=2, resume_from_checkpoint=out / "checkpoint-2")
    assert "going on from" in train_sharded(llama_folder, questions, folder / "ema-resumed", **flags)
    for name in ("adapter_model.safetensors", "teacher.safetensors"):
        again = folder / "ema-resumed" / "checkpoint-4" / name
        assert again.read_bytes() == (out / "checkpoint-4" / name).read_bytes(), name


def test_in_16_bits_gradients_are_reduced_and_losses_returned_in_float32():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    keep_float32_when_sharded(accelerator)
    assert plugin.mixed_precision_policy is None  # no mixed precision, nothing to keep
    plugin.set_mixed_precision("bf16")
    keep_float32_when_sharded(accelerator)
    assert environment_of("fsdp.yaml")["ACCELERATE_MIXED_PRECISION"] == "bf16"
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_tied_weights_are_tied_again_after_accelerate_made_new_ones():
    model = BranchedModel(tiny_model(tie_word_embeddings=True), loss_chunk_size=8).to("meta")
    head, embedding = model.model.lm_head, model.model.model.embed_tokens
    assert head.weight is not embedding.weight
    model.tie_weights()
    assert head.weight is embedding.weight
