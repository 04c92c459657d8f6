"""The whole program: what it learns, what it writes, what it refuses, and that it runs as its users run it."""

import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from running import config_command, metrics_of, python, run, run_command, words
from safetensors.torch import load_file
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from noisefit.base.errors import InputError
from noisefit.inputs.prompts import prompt_ids

FAST = dict(learning_rate=1e-2, logging_steps=2, max_steps=6)
THREE = dict(learning_rate=1e-2, logging_steps=1, max_steps=3)  # over the end of the first epoch


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


# --- What it writes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_data_the_losses_fall_and_the_adapter_loads(llama_folder, real_data, tmp_path):
    lines = run(
        llama_folder,
        real_data / "train.csv",
        tmp_path / "out",
        learning_rate=5e-3,
        max_steps=40,
        target_modules="all-linear",
    )
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    assert lines[-1]["ce_loss"] < 0.8 * lines[0]["ce_loss"]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([prompt_ids(tokenizer, "Who painted it?")])
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits
    integrated = AutoModelForCausalLM.from_pretrained(llama_folder)
    integrated.load_adapter(str(tmp_path / "out"))
    torch.testing.assert_close(integrated(ids).logits, adapted)
    assert not torch.allclose(before, adapted, atol=1e-2)


def test_the_output_folder(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    lines = run(llama_folder, questions, out, **FAST, eval_data=questions, epochs=2)
    expected = {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "noisefit_config.json", "layer_snr.json", "metrics.jsonl", "eval_metrics.jsonl",
        "README.md", "checkpoint-4", "noisefit_files.json", "rows.json",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == expected
    snr = json.loads((out / "layer_snr.json").read_text())
    assert len(snr["snr"]) == 4 and len(snr["selected"]) == 3
    assert min(snr["snr"][i] for i in snr["selected"]) >= max(
        x for i, x in enumerate(snr["snr"]) if i not in snr["selected"]
    )
    assert list(lines[0]) == [
        "step", "epoch", "loss", "ce_loss", "soft_loss", "consistency_loss", "rdrop_loss", "token_accuracy",
        "entropy", "learning_rate", "grad_norm", "target_tokens", "tokens_per_second", "noise_to_signal",
        "layer_noise_to_signal", "hidden_rms", "peak_memory_gib", "skipped_steps",
    ]  # fmt: skip
    # 24 rows in steps of 16: two steps an epoch, two epochs.
    assert [line["step"] for line in lines] == [2, 4] and lines[-1]["epoch"] == 2.0
    for line in lines:
        whole = 0.5 * line["ce_loss"] + 0.5 * line["soft_loss"] + 0.1 * line["consistency_loss"]
        assert line["loss"] == pytest.approx(whole, rel=1e-6)  # added up in float32
        by_layer = line["layer_noise_to_signal"]
        assert by_layer == pytest.approx({str(i): 1 / snr["snr"][i] for i in snr["selected"]}, rel=0.3)
        assert line["noise_to_signal"] == pytest.approx(sum(by_layer.values()) / 3) and line["peak_memory_gib"] > 0.1
        assert len(line["hidden_rms"]) == 3 and line["hidden_rms"] == sorted(
            line["hidden_rms"]
        )  # deeper ones are larger
    assert lines[0]["target_tokens"] == lines[1]["target_tokens"]  # each line is an epoch
    evaluations = [json.loads(line) for line in (out / "eval_metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert evaluations[0]["eval_target_tokens"] == lines[0]["target_tokens"]
    settings = json.loads((out / "noisefit_config.json").read_text())
    assert settings["learning_rate"] == 1e-2 and settings["train_data"] == str(questions)
    card = (out / "README.md").read_text()
    assert (
        str(llama_folder) in card
        and "questions.csv" in card
        and "NoiseFiT" in card
        and "is 0.5 ce + 0.5 soft + 0.1 consistency" in card
        and "`noise_std` | `0.1`" in card
    )


def test_a_relative_model_path_is_recorded_so_that_it_is_found_from_anywhere(
    llama_folder, questions, tmp_path, monkeypatch
):
    monkeypatch.chdir(llama_folder.parent)
    run(llama_folder.name, questions, tmp_path / "out", max_steps=1)
    recorded = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(llama_folder)


@pytest.mark.slow
def test_full_finetuning_saves_a_whole_model(llama_folder, questions, tmp_path):
    run(llama_folder, questions, tmp_path / "out", **FAST, full_finetune=True)
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (llama_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


# --- What the settings do --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "bloom"])
def test_other_architectures_train_with_pefts_own_targets(model_type, questions, tmp_path, capsys):
    lines = run(tiny_folder(tmp_path / model_type, model_type), questions, tmp_path / "out", **FAST)
    assert lines[-1]["ce_loss"] < lines[0]["ce_loss"] and lines[-1]["soft_loss"] > 0
    said = capsys.readouterr().err
    assert ("separate passes" in said) == (model_type == "bloom")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(llama_folder, questions, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(llama_folder, questions, tmp_path / name, **THREE, seed=seed)
    first = adapter(tmp_path / "a")
    assert all(torch.equal(tensor, adapter(tmp_path / "b")[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, adapter(tmp_path / "c")[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_a_run_is_the_same_cut_into_1_2_or_4_micro_batches(llama_folder, questions, tmp_path):
    results = []
    for batch_size in (16, 8, 4):
        lines = run(
            llama_folder, questions, tmp_path / str(batch_size), **THREE, batch_size=batch_size, lora_dropout=0,
            gradient_accumulation_steps=16 // batch_size, noise_std=0, hybrid_loss_alpha=1,
        )  # fmt: skip
        results.append((lines, adapter(tmp_path / str(batch_size))))
    for lines, weights in results[1:]:
        for line, expected in zip(lines, results[0][0], strict=True):
            for name in ("ce_loss", "grad_norm", "learning_rate", "target_tokens"):
                assert line[name] == pytest.approx(expected[name], rel=1e-4), name
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_and_separate_passes_change_the_cost_alone(llama_folder, questions, tmp_path):
    settings = THREE | dict(lora_dropout=0, noise_std=0, target_modules="all-linear")
    expected = run(llama_folder, questions, tmp_path / "plain", **settings)
    for name, flags in {
        "checkpointing": dict(gradient_checkpointing=True),
        "separate": dict(branches="separate"),
        "both": dict(branches="separate", gradient_checkpointing=True),
        "chunks": dict(loss_chunk_size=7),
    }.items():
        for line, plain in zip(
            run(llama_folder, questions, tmp_path / name, **settings, **flags), expected, strict=True
        ):
            assert line["ce_loss"] == pytest.approx(plain["ce_loss"], rel=1e-4), name
            assert line["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3), name


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an optional install")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_base_models_train(bits, questions, tmp_path, capsys):
    sizes = dict(hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)  # it packs blocks of 64
    model = tiny_folder(tmp_path / "model", **sizes)
    if bits == "4bit" and not torch.cuda.is_available():
        with pytest.raises(InputError, match="does not train 4-bit models on a CPU"):
            run(model, questions, tmp_path / "out", quantization=bits)
        return
    lines = run(model, questions, tmp_path / "out", **FAST | dict(max_steps=20), quantization=bits, epochs=10)
    assert lines[-1]["ce_loss"] < 0.95 * lines[0]["ce_loss"] and lines[-1]["soft_loss"] > 0
    assert "(fork); counting layers" in capsys.readouterr().err


def test_quantization_without_bitsandbytes_or_its_device_is_refused(llama_folder, questions, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="needs bitsandbytes: pip install"):
        patch.setattr("importlib.util.find_spec", lambda name: None)
        run(llama_folder, questions, tmp_path / "out", quantization="4bit")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional install")  # from here on
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"xpu"})
    with pytest.raises(InputError, match="works on xpu, this machine has"):
        run(llama_folder, questions, tmp_path / "out", quantization="8bit")


def test_no_noisy_layers_is_plain_fine_tuning(llama_folder, questions, tmp_path):
    lines = run(llama_folder, questions, tmp_path / "out", **FAST, num_noise_layers=0)
    assert all(line["soft_loss"] == line["consistency_loss"] == line["noise_to_signal"] == 0 for line in lines)
    assert json.loads((tmp_path / "out" / "layer_snr.json").read_text())["selected"] == []


@pytest.mark.slow
def test_lowest_chooses_other_layers_and_snr_every_measures_again(llama_folder, questions, tmp_path, capsys):
    run(
        llama_folder,
        questions,
        tmp_path / "out",
        **FAST,
        num_noise_layers=1,
        snr_format="Lowest",
        snr_every=2,
        epochs=3,
    )
    snr = json.loads((tmp_path / "out" / "layer_snr.json").read_text())
    assert snr["snr"][snr["selected"][0]] == min(snr["snr"])
    assert capsys.readouterr().err.count("noise in layers") == 3


def test_negligible_noise_is_said(llama_folder, questions, tmp_path, capsys):
    run(llama_folder, questions, tmp_path / "out", max_steps=1, noise_std=0.001)
    assert "does nearly nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_learning_rate_follows_its_schedule(llama_folder, questions, tmp_path):
    lines = run(
        llama_folder, questions, tmp_path / "out", learning_rate=1e-3, max_steps=4, logging_steps=1, warmup_ratio=0.5,
        lr_scheduler_type="linear",
    )  # fmt: skip
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


# --- As its users run it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_launch_with_wandb_offline_and_a_token_that_is_nowhere(llama_folder, questions, tmp_path):
    out, token = tmp_path / "out", "hf_AbCdEfGhIjKlMnOpQrStUvWx"
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {llama_folder}\ntrain_data: {questions}\nmax_steps: 2\nlogging_steps: 1\n")
    flags = words(config=config, output_model=out, report_to="wandb", run_name="a-name")
    out.mkdir()
    command = config_command("cpu.yaml", "train_loop.py", *flags, "--hf_token", token)
    done = run_command(command, WANDB_MODE="offline", WANDB_DIR=str(out))
    assert done.returncode == 0, done.stderr
    [recording] = out.glob("wandb/offline-run-*/run-*.wandb")
    content = recording.read_bytes()
    assert b"soft_loss" in content and b"a-name" in content
    for path in out.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path
    assert token not in done.stdout + done.stderr
    assert str(out) in done.stderr and "metrics.jsonl" in done.stderr  # where things are


def test_tensorboard(llama_folder, questions, tmp_path):
    run(llama_folder, questions, tmp_path / "out", max_steps=1, report_to="tensorboard")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_bad_input_ends_in_one_line_and_status_2_and_needs_no_data_library(llama_folder, tmp_path):
    flags = words(model=llama_folder, train_data=tmp_path / "missing.csv", output_model=tmp_path / "out")
    done = python("-X", "importtime", "train_loop.py", *flags)
    imports, said = [], []
    for line in done.stderr.splitlines(keepends=True):
        (imports if line.startswith("import time:") else said).append(line)
    assert done.returncode == 2
    assert said == [f"train_loop.py: error: {tmp_path}/missing.csv: no such file\n"]
    assert done.stdout == "" and not (tmp_path / "out").exists()
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert "torch" in imported and not imported & {"datasets", "wandb"}


# --- What it refuses -------------------------------------------------------------------------------------------------


def no_decoder_layers(folder):
    return tiny_folder(folder / "model", num_hidden_layers=0)


def pickled_weights(folder):
    model = tiny_folder(folder / "model")
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    return model


def no_tokenizer(folder):
    model = tiny_folder(folder / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    return model


def not_a_language_model(folder):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "vit"}')
    return folder / "model"


def bloom(folder):
    return tiny_folder(folder / "model", "bloom")


REFUSED = {
    "missing model": (dict(model="./missing"), "--model ./missing: no such folder"),
    "model is a file": (dict(model=__file__), "expected a folder"),
    "hub unreachable": (dict(model="nobody/nothing"), "--model nobody/nothing: not to be loaded"),
    "empty model folder": (dict(model=lambda folder: folder), "not to be loaded"),
    "no decoder layers": (dict(model=no_decoder_layers), "no decoder layers found"),
    "weights as a pickle": (dict(model=pickled_weights), "not to be loaded as weights as safetensors"),
    "no tokenizer": (dict(model=no_tokenizer), "not to be loaded as a tokenizer"),
    "not a language model": (dict(model=not_a_language_model), "not to be loaded as"),
    "too many noisy layers": (dict(num_noise_layers=5), "--num_noise_layers 5: .* has 4 layers"),
    "no such modules": (dict(target_modules="query"), "--target_modules query: .*linear modules found: .*q_proj"),
    "missing data": (dict(train_data="missing.csv"), "missing.csv: no such file"),
    "missing evaluation data": (dict(eval_data="missing.csv"), "missing.csv: no such file"),
    "rows too long": (dict(max_length=8), "no row has an answer within --max_length 8"),
    "unknown template": (dict(chat_template="chatlm"), "--chat_template chatlm"),
    "fork impossible": (dict(model=bloom, branches="fork"), "--branches fork: the forked"),
    "no output": (dict(output_model=""), "--output_model is empty"),
    "a misspelt module": (dict(target_modules="q_proj,v_porj"), "no module is called v_porj"),
    "output name too long": (dict(output_model="x" * 300), "name too long"),
    "output is a file": (dict(output_model=__file__), "is a file, expected a folder"),
    "unknown attention": (dict(attn_implementation="flash_attention_9"), "not to be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_nothing_is_written(case, llama_folder, questions, tmp_path):
    flags, message = REFUSED[case]
    settings = dict(model=llama_folder, train_data=questions, output_model=tmp_path / "out") | flags
    if callable(settings["model"]):
        settings["model"] = settings["model"](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        run(settings.pop("model"), settings.pop("train_data"), settings.pop("output_model"), **settings)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_another_runs_adapter_is_not_overwritten_unless_asked(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    run(llama_folder, questions, out, max_steps=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"already holds .* --overwrite_output"):
        run(llama_folder, questions, out, max_steps=1, seed=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run(llama_folder, questions, out, max_steps=1, seed=1, overwrite_output=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before[out / "adapter_model.safetensors"]
    assert len(metrics_of(out)) == 1 and not (out / "previous_run").exists()


def test_a_folder_of_something_else_is_left_alone(llama_folder, questions, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"holds a README.md that is not of such a run"):
        run(llama_folder, questions, tmp_path / "mine", max_steps=1, overwrite_output=True)
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(learning_rate=1e6), dict(noise_std=1e6)], ids=str)
def test_training_that_diverges_ends_in_one_line_and_without_an_adapter(flags, llama_folder, questions, tmp_path):
    settings = dict(epochs=20, logging_steps=1, max_grad_norm=0, lora_alpha=1e6) | flags
    with pytest.raises(InputError, match=r"step \d+: the loss or its gradient is not a finite number, 10 steps in "):
        run(llama_folder, questions, tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    written = tmp_path / "out" / "metrics.jsonl"
    for line in written.read_text().splitlines() if written.exists() else []:
        assert "NaN" not in line and "Infinity" not in line


def test_the_base_models_own_folder_is_no_output(llama_folder, questions, tmp_path):
    model = tiny_folder(tmp_path / "model")
    with pytest.raises(InputError, match="own folder"):
        run(model, questions, model, overwrite_output=True)


def test_a_model_that_cannot_be_packed_trains_as_without_packing(questions, tmp_path, capfd):
    model = tiny_folder(tmp_path / "opt", "opt")
    flags = dict(max_steps=2, logging_steps=1, max_length=100)
    packed, padded = (run(model, questions, tmp_path / name, **flags, **how)
                      for name, how in {"packed": dict(packing=True), "padded": {}}.items())  # fmt: skip
    assert "--packing: rows are padded, as packed ones are not exact for this model (logits" in capfd.readouterr().err
    assert [line["loss"] for line in packed] == [line["loss"] for line in padded]
