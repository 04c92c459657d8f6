"""What of a model is trained, in which dtype, and that nobody is asked over the network for it."""

import socket

import huggingface_hub
import peft
import pytest
import torch
from accelerate import Accelerator
from tiny_folder import byte_tokenizer
from tiny_models import supervise, tiny_batch, tiny_model

from noisefit.base.errors import InputError
from noisefit.fork.branches import CLEAN, BranchedModel
from noisefit.inputs import adapters, model_checks, models
from noisefit.inputs.adapters import add_adapter, check_adapter_names
from noisefit.inputs.models import ModelSettings, load_model
from noisefit.method.losses import cross_entropy
from noisefit.run.weights import gather_weights, write_model

TARGETS = ["q_proj", "v_proj"]


def clean_ce(logits, target_tokens):
    return {"ce": cross_entropy(logits[CLEAN][0], target_tokens)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_not_quantized_keeps_its_dtype_and_only_the_adapter_is_trained(checkpointing, monkeypatch):
    monkeypatch.setattr(models, "load_base", lambda *arguments, **options: tiny_model("llama", torch.bfloat16))
    settings = ModelSettings(quantization="8bit", target_modules=TARGETS, gradient_checkpointing=checkpointing)
    model = load_model(settings, "m", Accelerator(cpu=True)).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name} and len(trained) == 16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
    with torch.autocast("cpu", torch.bfloat16):
        sums = BranchedModel(model, 7)(**supervise(tiny_batch()), chunk_losses=clean_ce)
    sums["ce"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == trained
    # The other factor begins as zero, so the first one has no gradient yet.
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "lora_B" in name)


@pytest.fixture
def online(monkeypatch):
    """The hub's clients are told that there is a network; what they then try is counted and goes nowhere."""
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_saving_and_restoring_an_adapter_asks_no_hub(online, tmp_path):
    accelerator, tokenizer = Accelerator(cpu=True), byte_tokenizer()
    base = tiny_model("llama", torch.float32)
    base.name_or_path = "somebody/model"
    model = add_adapter(ModelSettings(target_modules=TARGETS), base, base.name_or_path)
    with pytest.warns(UserWarning):
        peft.get_peft_model_state_dict(model)  # what PEFT does by itself
    assert online
    online.clear()
    branched = BranchedModel(model, 7)
    for name in ("checkpoint-1", "checkpoint-2"):
        write_model(tmp_path / name, model, gather_weights(accelerator, branched, adapter_only=True), tokenizer)
        adapters.restore_adapter(model, tmp_path / name)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists() and not online


def test_an_adapter_that_was_saved_with_embeddings_fits_its_model():
    targets = [*TARGETS, "lm_head"]
    model = add_adapter(ModelSettings(target_modules=targets), tiny_model("llama", torch.float32), "somebody/model")
    alone, whole = (peft.get_peft_model_state_dict(model, save_embedding_layers=what).keys() for what in (False, True))
    assert alone < whole
    for names in (alone, whole):
        check_adapter_names(model, names)
        for wrong in (names | {"more"}, names - {min(alone)}):
            with pytest.raises(ValueError, match="in one of the two only"):
                check_adapter_names(model, wrong)


def test_checkpointing_is_refused_where_a_block_would_not_draw_the_same_again():
    for device in ("cpu", "cuda", "xpu"):
        model_checks.check_checkpointing(True, torch.device(device))
    model_checks.check_checkpointing(False, torch.device("mps"))
    with pytest.raises(InputError, match="--gradient_checkpointing: on mps torch does not draw the same noise"):
        model_checks.check_checkpointing(True, torch.device("mps"))
