"""An adapter merged into its base model: the same logits, the same answers, or nothing at all."""

import csv
import gc
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from running import call, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import generate
import noisefit.answers.merging as merging
from noisefit import merge as program
from noisefit.answers.settings import parse_arguments
from noisefit.base.errors import InputError
from noisefit.merge import empty_folder
from noisefit.run.card import card_data
from noisefit.run.output_folder import SCRATCH, OutputFolder

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 17, 40, 99, 3, 64, 201, 33, 7]])


def adapter_of(base: Path, folder: Path, size: float = 0.05, config=LoraConfig, vocabulary: int = 0, **options) -> Path:
    """An adapter as if it had been trained: each of its weights is `size` away from where it began."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    model = get_peft_model(model, config(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def merged(adapter: Path, output: Path, *words: str) -> str:
    done = call(program.main, adapter, "--output", output, *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def refused(adapter: Path, output: Path, *words: str) -> str:
    """The line of a merge that is refused, after which nothing is left."""
    before = sorted(output.iterdir()) if output.is_dir() else None
    done = call(program.main, adapter, "--output", output, *words)
    said = [line for line in done.stderr.splitlines() if line.startswith("noisefit.merge: error: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert (sorted(output.iterdir()) if output.is_dir() else None) == before
    return said[0].removeprefix("noisefit.merge: error: ")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def beside(base: Path, adapter: Path, vocabulary: int = 0) -> torch.Tensor:
    """What the adapter does beside its base, by PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    return logits(PeftModel.from_pretrained(model, adapter))


def alone(folder: Path, **options) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, **options))


@pytest.fixture(scope="module")
def small(llama_folder, tmp_path_factory) -> Path:
    return adapter_of(llama_folder, tmp_path_factory.mktemp("adapters") / "small", size=0.002)


# --- It is the same ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(llama_folder, tmp_path_factory) -> Path:
    """The output of a training."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "q.csv").write_text("prompt,response\n" + "".join(f"{i}?,It is {i}.\n" for i in range(8)))
    flags = dict(max_steps=4, learning_rate=0.05, batch_size=2, eval_data=folder / "q.csv", save_steps=0)
    run(llama_folder, folder / "q.csv", folder / "out", gradient_accumulation_steps=1, **flags)
    return folder / "out"


def test_a_trained_adapter_becomes_a_model_that_answers_the_same(trained, llama_folder, tmp_path):
    out, model, questions = trained, tmp_path / "model", trained.parent / "q.csv"
    said = merged(out, model)
    assert "merged in float32: logits differ from the adapter's by " in said and "rounded" not in said
    torch.testing.assert_close(alone(model), beside(llama_folder, out), rtol=0, atol=2e-4)
    assert (alone(model) - alone(llama_folder)).abs().max() > 0.05  # and it is not the base

    for flag, folder in (("model_id", model), ("model_path", out)):
        generate.generate(parse_arguments([f"--{flag}={folder}", f"--input_csv={questions}", "--rounds=2",
                                           f"--output_csv={tmp_path / flag}.csv", "--max_new_tokens=6"]))  # fmt: skip
    answers = [(tmp_path / f"{flag}.csv").read_text() for flag in ("model_id", "model_path")]
    assert [row["generated_response"] for row in csv.DictReader(answers[0].splitlines())]
    assert answers[0] == answers[1]

    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (model, out)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template != AutoTokenizer.from_pretrained(llama_folder)
    assert tokenizers[0]("Who?") == tokenizers[1]("Who?")
    assert (model / "noisefit_config.json").read_bytes() == (out / "noisefit_config.json").read_bytes()
    assert (model / "generation_config.json").is_file()
    assert {path.name for path in model.iterdir() if path.name not in OutputFolder(model).files()} == {
        "noisefit_files.json"
    }
    assert all(path.stat().st_mode & stat.S_IROTH for path in model.iterdir())


def test_the_card_says_what_it_is_and_keeps_the_evaluation(trained, tmp_path):
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(trained, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "README.md").write_text((out / "README.md").read_text().replace("---\n", "---\nlicense: mit\n", 1))
    merged(out, model)
    card, own = ModelCard.load(model / "README.md"), ModelCard.load(out / "README.md")
    assert card.data.eval_results == own.data.eval_results and card.data.eval_results
    assert card.data.model_name == "model" and card.data.license == "mit" and card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder of this machine
    assert config["base_model_name_or_path"] in card.text and "with the adapter `out` merged into" in card.text
    assert "- Merged in float32: logits differ" in card.text and "noisefit_config.json" in card.text


@pytest.mark.parametrize(
    ("metadata", "left"),
    [("license: mit\nmodel-index: 5", {"license": "mit"}), ("license: [mit", {}), ("- a", {}), ("license: mit", None)],
)
def test_what_cannot_be_read_of_an_adapter_s_card_is_told(metadata, left, tmp_path, capsys):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\nMine.\n")
    found = card_data(tmp_path)
    assert (found.to_dict() if found else {}) == (left if left is not None else {"license": "mit"})
    said = [line for line in capsys.readouterr().err.splitlines() if str(tmp_path) in line]
    assert len(said) == (left is not None) and all("the new card goes without" in line for line in said)


KINDS = {
    "dora": ("llama", dict(use_dora=True)),
    "ranks": ("llama", dict(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 32}, use_rslora=True)),
    "tied, embedding saved": ("gemma2", dict(modules_to_save=["embed_tokens"])),
    "tied, adapter on the head": ("gemma2", dict(target_modules=["q_proj", "lm_head"])),
    "tied, adapter on the embedding": ("gemma2", dict(target_modules=["q_proj", "embed_tokens"])),
    "tied, some tokens": ("gemma2", dict(trainable_token_indices=[3, 5])),
    "biases": ("opt", dict(bias="lora_only", target_modules=["q_proj"])),
    "transposed": ("gpt2", dict(fan_in_fan_out=True)),
    "experts": ("mixtral", dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
    "ia3": ("llama", dict(config=IA3Config, size=0.2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_the_same_in_plain_transformers(kind, tmp_path):
    model_type, options = KINDS[kind]
    base = tiny_folder(tmp_path / "base", model_type)
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    merged(adapter, tmp_path / "model")
    found, expected = alone(tmp_path / "model"), beside(base, adapter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert (found - alone(base)).abs().max() > 0.1


def test_tokens_that_were_added_come_along(llama_folder, tmp_path):
    more = len(AutoTokenizer.from_pretrained(llama_folder)) + 8
    adapter = adapter_of(
        llama_folder, tmp_path / "adapter", vocabulary=more, modules_to_save=["embed_tokens", "lm_head"]
    )
    merged(adapter, tmp_path / "model")
    found = alone(tmp_path / "model")
    assert found.shape[-1] == more
    torch.testing.assert_close(found, beside(llama_folder, adapter, more), rtol=1e-4, atol=2e-4)


# --- 16 bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_weight_is_the_sum_in_float32_rounded_once(dtype, llama_folder, tmp_path):
    adapter = adapter_of(llama_folder, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"])
    merged(adapter, tmp_path / "model", f"--dtype={str(dtype).removeprefix('torch.')}")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    base, delta = load_file(llama_folder / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (delta[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        exact = base[f"{name}.weight"].double() + 2 * b @ a
        assert ((weights[f"{name}.weight"].double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51).all()
    assert torch.equal(weights["lm_head.weight"], base["lm_head.weight"].to(dtype))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == dtype


def test_what_is_lost_is_what_is_lost(llama_folder, small, tmp_path, monkeypatch):
    """The share of the line, from the files and plain transformers."""
    monkeypatch.setattr(merging, "QUESTIONS", ())
    said = merged(small, tmp_path / "model", "--dtype=bfloat16")
    rows = torch.stack(merging.probes(AutoTokenizer.from_pretrained(llama_folder), 259, 128))

    def all_logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=rows).logits.double()

    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    without = all_logits(base)
    with_it = all_logits(PeftModel.from_pretrained(base, small))
    off = all_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)) - with_it
    share = off.norm() / (with_it - without).norm()
    assert share > 0.4 and f", {share:.1%} of what the adapter does" in said
    assert f"rounded to bfloat16: logits differ from the adapter's by {off.abs().max():.2g} at most" in said
    assert "much of it is lost; --dtype float32 keeps it" in said


def test_by_default_nothing_is_saved_that_would_hardly_be_the_adapter(llama_folder, tmp_path):
    small = adapter_of(llama_folder, tmp_path / "small", size=0.001)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(base)
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "model", tmp_path / "empty"):
        said = refused(small, output, f"--model_id={base}")
        assert "rounded to bfloat16" in said and "it would hardly be this adapter; give --dtype float32" in said
    merged(small, tmp_path / "model", f"--model_id={base}", "--dtype=float32")
    torch.testing.assert_close(alone(tmp_path / "model"), beside(base, small), rtol=1e-4, atol=2e-4)
    large = adapter_of(llama_folder, tmp_path / "large")
    said = merged(large, tmp_path / "other", f"--model_id={base}")
    assert "rounded to bfloat16" in said and "lost" not in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "other").dtype == torch.bfloat16


def test_a_weight_that_float16_has_no_number_for(llama_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama_folder, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_of(base, tmp_path / "adapter")
    said = refused(adapter, tmp_path / "model", "--dtype=float16")
    assert said == "model.norm.weight has weights that float16 has no numbers for; give another --dtype"
    merged(adapter, tmp_path / "model", "--dtype=bfloat16")


# --- Where it is not the same, nothing is left -----------------------------------------------------------------------


def test_a_merge_that_is_wrong_is_found(llama_folder, tmp_path):
    """Layers that are used twice share their weights, and adapters of their own are beside each use."""
    options = dict(target_modules=["q_proj"], layer_replication=[[0, 3], [1, 4]])
    adapter = adapter_of(llama_folder, tmp_path / "adapter", **options)
    said = refused(adapter, tmp_path / "model")
    assert "merged, logits differ by up to" in said and said.endswith("keep it beside them")


@pytest.mark.parametrize("change", ["weights", "dtype", "template", "lacking"])
def test_what_is_loaded_back_is_compared(change, llama_folder, tmp_path, monkeypatch):
    def broken(folder, model, tokenizer, shard):
        merging.write_merged(folder, model, tokenizer, shard)
        weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        if change == "weights":
            weights["model.layers.2.mlp.up_proj.weight"][5] *= 1.01
        elif change == "lacking":
            del weights["model.norm.weight"]
        elif change == "dtype":
            config["dtype"] = "float16"
        else:
            (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(program, "write_merged", broken)
    adapter = adapter_of(llama_folder, tmp_path / "adapter")
    said = refused(adapter, tmp_path / "model", "--dtype=bfloat16")
    expected = {"weights": "loaded back, the model's logits differ by up to", "lacking": "its files lack model.norm",
                "dtype": "has the dtype torch.float16", "template": "its tokenizer is another one"}  # fmt: skip
    assert expected[change] in said and said.endswith("nothing is left there")


def test_the_weights_are_in_memory_once(llama_folder, tmp_path, monkeypatch):
    """When the saved model is loaded, the one that was merged is gone."""
    held = []

    def reading(*arguments):
        gc.collect()
        held.append([model for model in gc.get_objects() if isinstance(model, PreTrainedModel)])
        return read(*arguments)

    gc.unfreeze()  # the tests' own models, which are of no interest
    others = {id(model) for model in gc.get_objects() if isinstance(model, PreTrainedModel)}
    read = merging.read_merged
    monkeypatch.setattr(merging, "read_merged", reading)
    merged(adapter_of(llama_folder, tmp_path / "adapter"), tmp_path / "model")
    assert len(held) == 1 and not [model for model in held[0] if id(model) not in others]


# --- The output folder, and bad input ----------------------------------------------------------------------------


def test_weights_are_split_as_asked(llama_folder, small, tmp_path):
    merged(small, tmp_path / "model", "--max_shard_size=30KB")
    shards = sorted(tmp_path.glob("model/*.safetensors"))
    assert len(shards) > 2 and shards[0].name.startswith("model-00001-of-")
    assert json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    torch.testing.assert_close(alone(tmp_path / "model"), beside(llama_folder, small), rtol=1e-4, atol=2e-4)


def test_only_a_new_or_empty_folder_is_written_to(llama_folder, small, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    assert refused(small, kept) == f"--output {kept}: holds notes.txt; expected a new or an empty folder"
    assert refused(small, small).endswith("holds README.md; expected a new or an empty folder")
    assert refused(small, kept / "notes.txt") == f"--output {kept / 'notes.txt'}: a file, expected a folder"
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "a link to a folder that does not exist" in refused(small, tmp_path / "link")
    (tmp_path / "model" / SCRATCH / "notes").mkdir(parents=True)  # no merge made it
    assert f"holds {SCRATCH}" in refused(small, tmp_path / "model")


def test_a_record_that_is_somebody_else_s_is_not_removed(tmp_path):
    theirs = tmp_path / "out" / "noisefit_files.json"
    theirs.parent.mkdir()
    theirs.write_text("my own list")
    with pytest.raises(InputError, match="this is none"), empty_folder(theirs.parent):
        pass
    assert theirs.read_text() == "my own list"


def test_what_a_killed_merge_left_is_removed(llama_folder, small, tmp_path):
    output = OutputFolder(tmp_path)
    output.start()
    (tmp_path / SCRATCH / "model").mkdir(parents=True)
    (tmp_path / SCRATCH / "model" / "model.safetensors").write_text("half")
    assert (tmp_path / "noisefit_files.json").is_file()
    merged(small, tmp_path)
    assert not (tmp_path / SCRATCH).exists() and (tmp_path / "model.safetensors").is_file()
    assert refused(small, tmp_path).endswith("expected a new or an empty folder")


def test_bad_input_is_one_line_before_the_model_is_loaded(llama_folder, small, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "load_answer_model", None)  # to be called by none of them
    out = tmp_path / "model"
    assert refused(tmp_path / "none", out) == f"{tmp_path / 'none'}: no such folder; expected an adapter's"
    whole = f"{llama_folder}: a whole model, as --full_finetune leaves it: there is nothing to merge, use it as it is"
    assert refused(llama_folder, out) == whole
    (tmp_path / "bare").mkdir()
    assert refused(tmp_path / "bare", out).startswith(f"{tmp_path / 'bare'}: no adapter_config.json in it")
    (tmp_path / "bare" / "adapter_config.json").write_text("{}")
    assert "no adapter_model.safetensors (pickles are not loaded)" in refused(tmp_path / "bare", out)
    shutil.copyfile(small / "adapter_model.safetensors", tmp_path / "bare" / "adapter_model.safetensors")
    assert "names no base model; give it as --model_id" in refused(tmp_path / "bare", out)
    assert "no such folder" in refused(small, out, f"--model_id={tmp_path / 'gone'}")
    assert "--max_shard_size: '5' is no size; expected one as 5GB" in refused(small, out, "--max_shard_size=5")
    assert "invalid choice: 'int8'" in refused(small, out, "--dtype=int8")
    assert "--push_to_hub: no name of a repository" in refused(small, out, "--push_to_hub=a/b/c")
    assert "HF_HUB_OFFLINE is set" in refused(small, out, "--push_to_hub=ada/mine")
    done = call(program.main, small)
    assert done.returncode == 2 and "--output is required" in done.stderr
    quantized = tmp_path / "quantized"
    shutil.copytree(llama_folder, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "is quantized, and nothing can be added to its weights" in refused(small, out, f"--model_id={quantized}")


def test_bad_weights_and_other_models_are_one_line(llama_folder, small, tmp_path):
    def spoilt(name: str, change) -> Path:
        folder = tmp_path / name
        shutil.copytree(small, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    out = tmp_path / "model"
    first = next(iter(load_file(small / "adapter_model.safetensors")))
    assert "not finite" in refused(spoilt("nan", lambda weights: weights[first].fill_(torch.nan)), out)
    said = refused(spoilt("lacking", lambda weights: weights.pop(first)), out)
    assert said.startswith(f"{tmp_path / 'lacking'}: does not fit {llama_folder}") and "1 tensors are in one" in said
    other = tiny_folder(tmp_path / "other", "gpt2")
    assert f"does not fit {other}; it was trained on {llama_folder}" in refused(small, out, f"--model_id={other}")
    prompts = adapter_of(llama_folder, tmp_path / "prompts", config=PromptTuningConfig, num_virtual_tokens=3)
    assert refused(prompts, out).endswith(
        "of the kind PROMPT_TUNING adds nothing to the weights, so it cannot be merged"
    )


def test_an_adapter_of_quantized_weights_is_said_to_be_one(llama_folder, tmp_path):
    adapter = adapter_of(llama_folder, tmp_path / "adapter")
    (adapter / "noisefit_config.json").write_text('{"quantization": "4bit"}')
    assert f"{adapter}: trained with --quantization 4bit; it is merged into the weights" in merged(
        adapter, tmp_path / "m"
    )
    for text in ('{"quantization": "none"}', "{", "[]"):
        (adapter / "noisefit_config.json").write_text(text)
        assert program.trained_beside(adapter) is None


def test_an_adapter_that_changes_nothing_is_merged_too(llama_folder, tmp_path):
    adapter = adapter_of(llama_folder, tmp_path / "adapter", size=0.0)
    said = merged(adapter, tmp_path / "model")
    assert "it changes the base model's by up to 0" in said
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as one:
        weights = load_file(llama_folder / "model.safetensors")
        assert all(torch.equal(one.get_tensor(name), tensor) for name, tensor in weights.items())
