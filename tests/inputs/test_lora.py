"""What `--lora` may say: PEFT's names and kinds of values, and one line for anything else."""

import dataclasses

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_model
from transformers import AutoConfig

from noisefit.base.errors import InputError
from noisefit.inputs.adapters import add_adapter, as_saved
from noisefit.inputs.lora import ACCEPTED, NOT_HERE, OWN_FLAGS, REFUSED, check_sharded, lora_options
from noisefit.inputs.models import ModelSettings
from noisefit.run.settings import Settings, parse_arguments


def settings(*words, **flags):
    return Settings(model="m", train_data="t", lora=list(words), **flags)


def test_values_are_what_peft_takes_and_are_written_in_one_way(tmp_path):
    words = [
        "use_dora=true", "modules_to_save=lm_head, embed_tokens", "layers_to_transform=1,2", "bias=none",
        "rank_pattern={q_proj: 4, v_proj: 16}", "alpha_pattern={v_proj: 1.5}", "init_lora_weights=pissa_niter_16",
    ]  # fmt: skip
    options = lora_options(words)
    assert options == {
        "use_dora": True, "modules_to_save": ["lm_head", "embed_tokens"], "layers_to_transform": [1, 2],
        "bias": "none", "rank_pattern": {"q_proj": 4, "v_proj": 16}, "alpha_pattern": {"v_proj": 1.5},
        "init_lora_weights": "pissa_niter_16",
    }  # fmt: skip
    LoraConfig(**options)
    recorded = settings(*words).record()["lora"]
    assert recorded == settings(*reversed(recorded)).record()["lora"] and lora_options(recorded) == options
    assert Settings(model="m", train_data="t").record()["lora"] is None and settings("bias=none").lora == [
        'bias="none"'
    ]
    # From a command line and a file as from a program.
    argv = ["--model", "m", "--train_data", "t", "--target_modules", "q_proj"]
    assert parse_arguments([*argv, "--lora", *words]).lora == recorded
    file = tmp_path / "run.yaml"
    file.write_text("lora:\n" + "".join(f"  - '{word}'\n" for word in words))
    assert parse_arguments([*argv, "--config", str(file)]).lora == recorded


def test_every_option_of_peft_is_accepted_or_refused_with_a_reason():
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert {"use_rslora", "use_dora", "init_lora_weights", "modules_to_save", "layers_to_transform"} <= ACCEPTED.keys()
    for name in known - ACCEPTED.keys():
        instead = "give --" if name in OWN_FLAGS else "leave it out"
        with pytest.raises(InputError, match=f"^--lora {name}: .*{instead}"):
            lora_options([f"{name}=1"])
    assert not (OWN_FLAGS.keys() | REFUSED.keys()) & ACCEPTED.keys()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["use_dorra=true"], r"--lora use_dorra: PEFT's LoraConfig has no such option; did you mean use_dora\?"),
        (["use_dora"], "--lora use_dora: expected key=value"),
        (["use_dora=maybe"], "--lora use_dora=maybe: expected true or false"),
        (["use_dora=true", "use_dora=false"], "--lora: use_dora is given twice"),
        (["modules_to_save="], "--lora modules_to_save=None: expected text"),
        (["layers_to_transform=-1"], "--lora layers_to_transform=-1: expected a whole number from 0"),
        (["rank_pattern=4"], "--lora rank_pattern=4: expected a mapping such as"),
        (["rank_pattern={q_proj: 0}"], "expected a whole number from 1"),
        (["bias=some"], "--lora bias=some: expected one of none, all, lora_only"),
        (["init_lora_weights=zeros"], "expected one of true, false, gaussian, orthogonal, olora, pissa, or pissa_"),
        (["rank_pattern={q_proj: [1"], "--lora rank_pattern=.*: not YAML"),
        (["r=4"], "--lora r: give --lora_r instead"),
        (["layer_replication=[[0, 2]]"], "it makes other layers than those that the noise is measured in"),
        (["layers_pattern=h"], "layers_pattern is the name of the layers that layers_to_transform counts"),
        (["target_parameters=experts.down_proj"], "has no place for dropout; give --lora_dropout 0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_peft_does_not_know_is_one_line(words, line):
    with pytest.raises(InputError, match=line):
        settings(*words)


@pytest.mark.parametrize("init", NOT_HERE)
def test_initialisations_that_need_more_than_the_model_say_what(init):
    with pytest.raises(InputError, match=f"init_lora_weights={init}: expected one that needs the model alone: {init} "):
        settings(f"init_lora_weights={init}")


@pytest.mark.parametrize(
    ("words", "flags", "line"),
    [
        (["use_dora=true"], dict(full_finetune=True), "--lora is about an adapter, and --full_finetune trains without"),
        (["init_lora_weights=pissa"], dict(quantization="4bit"), "which --quantization 4bit rounds"),
        (["init_lora_weights=olora"], dict(teacher="base"), "not the base model that --teacher base is"),
        (["bias=all"], dict(teacher="base"), "trains biases of the base model"),
        (["init_lora_weights=pissa", "use_rslora=true", "rank_pattern={q_proj: 4}"], {}, "no rank_pattern or alpha_p"),
        (["layers_to_transform=1"], dict(target_modules=["all-linear"]), "name them in --target_modules"),
    ],
    ids=str,
)
def test_what_contradicts_another_flag_is_one_line(words, flags, line):
    with pytest.raises(InputError, match=line):
        settings(*words, **flags)


@pytest.mark.parametrize(
    ("kind", "words", "line"),
    [
        ("llama", ["modules_to_save=head"], "modules_to_save: no module is called head; linear modules found: "),
        ("llama", ["exclude_modules=q"], "exclude_modules: no module is called q"),
        ("llama", ["layers_to_transform=4"], "there is no layer 4, the model's are 0 to 3"),
        ("llama", ["rank_pattern={k_proj: 4}"], "rank_pattern: no module with an adapter matches k_proj"),
        ("llama", ["alpha_pattern={'layers.7.*': 4}"], "alpha_pattern: no module with an adapter matches layers.7"),
        ("llama", ["trainable_token_indices=97"], "there is no token 97, the model has 97"),
        ("llama", ["lora_bias=true"], "a module has no bias itself"),
        ("llama", ["target_parameters=experts"], "target_parameters: no parameter is called experts"),
        ("gpt2", ["init_lora_weights=olora"], "PEFT's olora is not right for a Conv1D"),
        ("llama", ["init_lora_weights=pissa"], "a rank of 64 is more than .* of shape"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_model_cannot_have_is_one_line(kind, words, line):
    own = ModelSettings(
        lora=words, lora_r=64, lora_dropout=0, target_modules=["c_attn" if kind == "gpt2" else "q_proj"]
    )
    with torch.device("meta"), pytest.raises(InputError, match=line):
        add_adapter(own, tiny_model(kind, torch.float32), "m")


@pytest.mark.parametrize("words", [["use_dora=true"], ["init_lora_weights=pissa"], ["init_lora_weights=olora"],
                                   ["init_lora_weights=pissa", "use_dora=true"]], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_begins_as_the_base_model(words, dtype):
    """In 16 bits PEFT alone rounds DoRA's magnitudes and PiSSA's factors, so that another model would begin."""
    base, model = (tiny_model("llama", dtype) for _ in range(2))
    adapted = add_adapter(ModelSettings(lora=words, target_modules=["q_proj", "down_proj"]), model, "m").eval()
    for layer in range(4):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            whole = base.get_submodule(f"model.layers.{layer}.{name}").weight.detach()
            module = adapted.get_submodule(f"base_model.model.model.layers.{layer}.{name}")
            factors = (getattr(module, f"lora_{letter}")["default"].weight.detach() for letter in "AB")
            a, b = (factor.double() for factor in factors)
            part = module.scaling["default"] * b @ a
            begun = "init_lora_weights" in words[0]
            assert (part.abs().max() > 0.1) == begun
            rest = (whole.double() - part).to(dtype)  # rounded once
            rtol = 0.01 if dtype == torch.bfloat16 else 1e-5  # float32 sums in another order
            torch.testing.assert_close(module.base_layer.weight.detach(), rest, rtol=rtol, atol=1e-5)
            if "use_dora=true" in words:
                norms = (module.base_layer.weight.double() + part).norm(dim=1)
                magnitudes = module.lora_magnitude_vector["default"].weight.double()
                torch.testing.assert_close(magnitudes, norms, rtol=1e-5, atol=0)


def test_what_is_trained_is_float32_and_hidden_states_keep_the_dtype_of_the_model():
    words = ["modules_to_save=embed_tokens,norm", "trainable_token_indices={lm_head: [5]}", "use_dora=true"]
    model = add_adapter(ModelSettings(lora=words, target_modules=["q_proj"]), tiny_model("llama", torch.bfloat16), "m")
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    for part in ("embed_tokens", "norm", "magnitude", "lora_A", "token_adapter"):
        assert any(part in name for name in trained), part
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    embedding = model.get_submodule("base_model.model.model.embed_tokens")
    assert embedding(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_what_does_not_go_with_sharding_is_refused():
    apart, tied = (AutoConfig.for_model("llama", tie_word_embeddings=tied) for tied in (False, True))
    for words in (["modules_to_save=lm_head"], ["trainable_token_indices=5"]):
        check_sharded(ModelSettings(lora=words), apart)
        with pytest.raises(InputError, match="does not go with FSDP where embedding and head are one"):
            check_sharded(ModelSettings(lora=words), tied)
    check_sharded(ModelSettings(lora=["use_dora=true", "init_lora_weights=pissa"]), tied)
    check_sharded(ModelSettings(), tied)
    with pytest.raises(InputError, match="target_parameters has not been tried with FSDP"):
        check_sharded(ModelSettings(lora=["target_parameters=experts.down_proj"]), apart)


def test_names_stand_in_order_in_the_saved_configuration():
    """PEFT keeps them as a set, whose order differs from process to process: files of the same run would, too."""
    adapted = add_adapter(ModelSettings(target_modules=["all-linear"]), tiny_model(dtype=torch.float32), "m")
    names = as_saved(adapted, {})[1].to_dict()["target_modules"]
    assert names == sorted(names) and len(names) == 7 and isinstance(adapted.peft_config["default"].target_modules, set)
