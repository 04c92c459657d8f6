"""Model folders that somebody edited, or that are of something else: loaded, or refused in a line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_any_settings import HUGE, SHARES, changed
from tiny_folder import byte_tokenizer, tiny_folder
from transformers import AutoModelForCausalLM

from noisefit.answers.generation import Answerer, Job
from noisefit.answers.loading import context_length, find_base, load_answer_model, load_answer_tokenizer
from noisefit.answers.settings import AnswerSettings
from noisefit.base.errors import InputError
from noisefit.fork.branches import BranchedModel
from noisefit.inputs.model_checks import try_out
from noisefit.inputs.models import load_model
from noisefit.inputs.prompts import prompt_ids
from noisefit.inputs.templates import set_chat_template
from noisefit.run.output import open_output
from noisefit.run.preparation import prepare
from noisefit.run.settings import Settings

pytestmark = pytest.mark.slow

SIZES = [0, -1, 1, 3, 10**9, 2**63, 1.5]
VALUES = st.sampled_from([None, True, [], {}, "", "x", "llama", ["x"], {"x": 1}, *SIZES, *HUGE])
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A model's folder and an adapter's."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_folder(folder / "model", num_hidden_layers=2)
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    tokenizer.save_pretrained(model)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder


def edited(original: Path, name: str, where: list[float], value: object) -> Path:
    folder = original.with_name(f"{original.name}-edited")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = folder / name
    content = json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
    if isinstance(content, str):
        path.write_text(str(value))
    else:
        # The vocabulary is long: mostly something else is to be changed.
        path.write_text(json.dumps(changed(content, where, value)))
    return folder


def prepare_training(model: Path) -> None:
    """What `train_loop.py` does with a model's folder before its first step."""
    data = model.parent / "t.csv"
    data.write_text("prompt,response\nWhy?,So.\n")
    settings = Settings(model=model, train_data=data, output_model=model.parent / "out", max_length=64)
    with open_output(settings) as output:
        prepared = prepare(settings, output)
    trained = BranchedModel(load_model(settings, settings.model, prepared.accelerator), 8)
    ids = torch.tensor([[1, 2]])
    try_out(trained, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "--model", settings.model)


def answer(adapter: Path, base: Path) -> None:
    """What `generate.py` does."""
    settings = AnswerSettings(model_path=adapter, model_id=base, input_csv="q.csv", greedy=True, max_new_tokens=2)
    name = find_base(settings)
    tokenizer = load_answer_tokenizer(settings, name)
    set_chat_template(tokenizer)
    context_length(settings, name)
    model = load_answer_model(settings, name, torch.device("cpu"))
    Answerer(model, tokenizer, settings).answer([Job(0, "Why?", prompt_ids(tokenizer, "Why?"), (1,))])


def refusing(run, *arguments: Path) -> None:
    try:
        run(*arguments)
    except InputError as error:
        assert len(str(error)) < 1500


@given(st.sampled_from(FILES), SHARES, VALUES)
@example("config.json", [0.99], 10**9)
def test_an_edited_model_folder(originals, name, where, value):
    refusing(prepare_training, edited(originals / "model", name, where, value))


@given(st.sampled_from(["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "model_type",
                        "rope_parameters", "rms_norm_eps", "hidden_act", "num_key_value_heads", "head_dim",
                        "architectures", "max_position_embeddings", "torch_dtype", "dtype", "pad_token_id",
                        "tie_word_embeddings", "attention_dropout", "use_cache"]), VALUES)  # fmt: skip
def test_an_edited_configuration(originals, key, value):
    folder = edited(originals / "model", "config.json", [], {})
    content = json.loads((originals / "model" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))
    refusing(prepare_training, folder)
    refusing(answer, originals / "adapter", folder)


@given(st.sampled_from(["adapter_config.json", *FILES[2:]]), SHARES, VALUES)
def test_an_edited_adapter(originals, name, where, value):
    refusing(answer, edited(originals / "adapter", name, where, value), originals / "model")


@given(st.sampled_from(["generation_config.json", "config.json"]), SHARES, VALUES)
def test_an_edited_base_of_an_adapter(originals, name, where, value):
    refusing(answer, originals / "adapter", edited(originals / "model", name, where, value))


@given(st.dictionaries(st.sampled_from(["do_sample", "temperature", "top_p", "num_beams", "eos_token_id", "max_length",
    "repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids", "use_cache", "penalty_alpha",
    "forced_eos_token_id", "cache_implementation", "num_return_sequences", "guidance_scale", "stop_strings"]),
    VALUES))  # fmt: skip
def test_any_generation_settings(originals, settings):
    folder = edited(originals / "model", "generation_config.json", [], {})
    (folder / "generation_config.json").write_text(json.dumps(settings))
    refusing(answer, originals / "adapter", folder)


@pytest.mark.parametrize("name", [*FILES, "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"a":', b"\0" * 100])
def test_a_file_of_something_else(originals, name, content):
    original = originals / ("adapter" if name.startswith("adapter") else "model")
    folder = edited(original, "tokenizer_config.json", [], {})
    shutil.copytree(original, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    if original.name == "adapter":
        refusing(answer, folder, originals / "model")
    else:
        refusing(prepare_training, folder)
        refusing(answer, originals / "adapter", folder)
