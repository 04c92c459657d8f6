"""Finding the parts of a causal language model, whatever its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from noisefit.base.errors import InputError


def find_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside any wrapping (PEFT, DDP, FSDP, `BranchedModel`)."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise InputError(f"{type(model).__name__} holds no transformers model")


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The stack of decoder blocks with embeddings and final norm: token ids in, final hidden states out."""
    return find_causal_lm(model).get_decoder()


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order.

    Raises:
        InputError: no list of modules in the decoder has as many entries as the configuration has layers.
    """
    decoder = find_decoder(model)
    count = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
    candidates = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count != 0]
    if not candidates:
        raise InputError(
            f"no decoder layers found in {type(decoder).__name__}: NoiseFiT needs a decoder-only language model "
            "whose blocks are one nn.ModuleList"
        )
    if len(candidates) == 1:
        return candidates[0]
    # Other lists can happen to be as long (one rotary table a layer, say); the blocks hold the weights.
    return max(candidates, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def block_hidden_states(output: Tensor | tuple) -> Tensor:
    """The hidden states `[B, L, H]` in what a decoder block returned: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def logits_of(model: nn.Module, hidden_states: Tensor) -> Tensor:
    """The logits that the model itself would form from final hidden states.

    The model's own `forward` runs, with its decoder answering `hidden_states`: so soft-capping (Gemma), logit
    scales (Cohere, Granite), biases and adapters on the head are all in, without code per architecture.

    Args:
        model: a causal language model, wrapped or not.
        hidden_states: `[..., H]`, the decoder's output at any selection of positions.

    Returns:
        `[..., V]`.
    """
    causal_lm = find_causal_lm(model)
    rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
    no_ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
    with answering(causal_lm.get_decoder(), _DecoderAnswer(last_hidden_state=rows)):
        logits = causal_lm(input_ids=no_ids, use_cache=False).logits
    return logits.view(*hidden_states.shape[:-1], logits.shape[-1])


@contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Let a module's forward give `answer` without computing anything; its hooks run as ever."""
    own_forward = vars(module).get("forward")  # accelerate's device hooks set one on the instance
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if own_forward is None:
            del module.forward
        else:
            module.forward = own_forward


class _DecoderAnswer(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states alone: whatever else a model's forward reads of its decoder's output (router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
