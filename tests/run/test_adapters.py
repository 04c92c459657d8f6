"""Each option of `--lora` through the loop: it goes on from a checkpoint bit for bit, PEFT alone loads what was
trained, and `generate.py` answers with it."""

import csv
import json

import pytest
import torch
from peft import PeftModel
from running import call, run, run_generate
from safetensors.torch import load_file
from tiny_folder import tiny_folder
from tiny_models import tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

import train_loop
from noisefit.base.errors import InputError
from noisefit.fork.branches import BranchedModel
from noisefit.inputs.adapters import add_adapter
from noisefit.inputs.models import ModelSettings
from noisefit.method.teacher import BaseModel, MovingAverage

FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=1, max_steps=4, logging_steps=1, save_steps=2)
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind: str):
        if kind not in made:
            overrides = {"tie_word_embeddings": True} if kind.startswith("tied") else {}
            made[kind] = tiny_folder(tmp_path_factory.mktemp(kind), kind.removeprefix("tied "), **overrides)
        return made[kind]

    return folder


@pytest.fixture
def trained(monkeypatch):
    """The model of the last run, as it was trained."""
    kept, save = {}, train_loop.save_model

    def save_model(accelerator, model, *more):
        kept["model"] = accelerator.unwrap_model(model).model
        save(accelerator, model, *more)

    monkeypatch.setattr(train_loop, "save_model", save_model)
    return kept


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.double()


CASES = [
    ("llama", "use_dora=true use_rslora=true layers_to_transform=1,2 init_lora_weights=gaussian", {}),
    ("llama", "rank_pattern={q_proj:_4} alpha_pattern={v_proj:_32} init_lora_weights=false", dict(teacher="base")),
    ("llama", "init_lora_weights=pissa use_dora=true rank_pattern={q_proj:_4}", dict(gradient_checkpointing=True)),
    ("llama", "init_lora_weights=olora use_rslora=true", dict(teacher="ema")),
    ("gpt2", "init_lora_weights=pissa_niter_4", {}),
    ("gpt2", "bias=all lora_bias=true", {}),
    ("gpt2", "bias=lora_only use_dora=true", {}),
    ("tied llama", "modules_to_save=embed_tokens ensure_weight_tying=true exclude_modules=v_proj", {}),
    ("tied llama", "modules_to_save=lm_head init_lora_weights=orthogonal", {}),
    ("llama", "modules_to_save=embed_tokens,norm use_dora=true", dict(teacher="base", gradient_checkpointing=True)),
    ("tied llama", "trainable_token_indices=[40,50,60]", {}),
    ("llama", "trainable_token_indices={embed_tokens:_[40]}", dict(teacher="base")),
    ("mixtral", "target_parameters=experts.gate_up_proj", dict(lora_dropout=0)),
    ("llama", "init_lora_weights=pissa modules_to_save=embed_tokens,lm_head", dict(precision="bf16")),
    ("gpt2", "bias=all modules_to_save=wte", dict(precision="bf16")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options", "flags"), CASES, ids=lambda value: str(value)[:60])
def test_it_resumes_bit_for_bit_and_peft_loads_what_was_trained(
    kind, options, flags, folders, questions, tmp_path, trained, monkeypatch
):
    flags, model = dict(flags), folders(kind)
    low = flags.pop("precision", "no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", low)
    config = tmp_path / "run.yaml"
    words = [word.replace(":_", ": ") for word in options.split()]
    config.write_text("lora:\n" + "".join(f"  - '{word}'\n" for word in words))
    run(model, questions, tmp_path / "whole", **FAST, **flags, config=config)
    own = trained["model"]
    for parameter in own.parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32
    more = dict(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    run(model, questions, tmp_path / "parts", **FAST, **flags, config=config, **more)
    for name in ("adapter_model.safetensors", "checkpoint-4/optimizer.safetensors"):
        one, other = (load_file(tmp_path / part / name) for part in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name

    # What is rounded in computing is not rounded here: only the weights are to differ. Experts have no such products.
    dtype = torch.float32 if kind == "mixtral" else torch.float64
    base, own = AutoModelForCausalLM.from_pretrained(model).to(dtype), own.to(dtype)
    before, expected, tolerance = logits(base), logits(own), 0.3 if low == "bf16" else 2e-5
    loaded = PeftModel.from_pretrained(base, tmp_path / "whole").to(dtype)
    assert (expected - before).abs().max() > 0.5  # it has learnt
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=tolerance)
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    begun = "pissa" in options or "olora" in options
    assert config["r"] == (16 if begun else 8) and (config["init_lora_weights"] is True or not begun)


def test_generate_answers_with_it(folders, questions, tmp_path):
    flags = ["--input_csv", questions, "--greedy", "--rounds", 1, "--max_new_tokens", 4]

    def answers(name, *more):
        done = call(run_generate, *flags, "--output_csv", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        with (tmp_path / name).open(newline="") as file:
            return [(row["generated_response"], float(row["logprob"])) for row in csv.DictReader(file)]

    base = answers("base.csv", "--model_id", folders("tied llama"))
    config = tmp_path / "run.yaml"
    config.write_text("lora: [use_dora=true, init_lora_weights=pissa, 'modules_to_save=lm_head,embed_tokens']\n")
    run(folders("tied llama"), questions, tmp_path / "out", **FAST, config=config)
    ways = "--no_no_merge", "--no_merge"
    merged, apart = (answers(f"{way}.csv", "--model_path", tmp_path / "out", way) for way in ways)
    assert [text for text, _ in merged] == [text for text, _ in apart] and merged != base
    assert [score for _, score in merged] == pytest.approx([score for _, score in apart], abs=1e-4)


WHOLE = ["modules_to_save=embed_tokens,norm", "trainable_token_indices=[5,6,7]"]


@pytest.mark.parametrize("word", [*WHOLE, "use_dora=true", "init_lora_weights=orthogonal", "bias=none"])
def test_teachers_are_right_whatever_is_trained(word):
    base = tiny_model("llama", torch.float32).eval()
    settings = ModelSettings(lora=[word], target_modules=["q_proj"])
    branched = BranchedModel(add_adapter(settings, tiny_model("llama", torch.float32), "m"), 7).eval()
    batch = tiny_batch((11, 11))

    def states():
        with torch.no_grad():
            return branched(**batch)

    average, begun = MovingAverage(branched, decay=0.5), states()
    with torch.no_grad():
        expected = base.model(**batch).last_hidden_state
        for parameter in branched.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    moved = states()
    assert (moved - expected).abs().max() > 0.01
    with BaseModel(branched).in_place():
        torch.testing.assert_close(states(), expected, rtol=1e-5, atol=1e-5)
    with average.in_place():
        assert torch.equal(states(), begun)
    assert torch.equal(states(), moved)


def test_a_trained_head_and_a_teacher_are_refused(folders, questions, tmp_path):
    with pytest.raises(InputError, match="--target_modules or --lora trains the model's head"):
        run(folders("llama"), questions, tmp_path / "out", **FAST, teacher="ema", lora="modules_to_save=lm_head")
