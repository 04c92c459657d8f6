"""Models that exist in shape alone, as the loop has them on a GPU: no memory is taken and nothing is computed.

torch's fake tensors know shape, dtype and storage, so that bytes and FLOPs can be counted of what no machine here
holds. Unlike the `meta` device they know autocast. Dropout and attention are those of a GPU: a mask of a byte an
element, and a kernel that keeps no scores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from noisefit.fork.branches import BranchedModel
from noisefit.inputs.models import ModelSettings, make_trainable
from noisefit.method import noise


@contextmanager
def in_shape_alone(as_on_gpu: bool = True) -> Iterator[None]:
    """What is made in here has a shape and no content."""
    usual = F.dropout, noise.lower_median
    noise.lower_median = _median  # on a CPU it is NumPy's, which has to have numbers
    if as_on_gpu:
        F.dropout = _fused_dropout  # not by a mode of torch's, which is not on when blocks are computed again
    try:
        with FakeTensorMode():
            yield
    finally:
        F.dropout, noise.lower_median = usual


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _median(values: Tensor) -> Tensor:
    return values.median(dim=-1, keepdim=True).values


def shape_of(config: PreTrainedConfig, settings: ModelSettings, frozen: torch.dtype) -> nn.Module:
    """The model that `load_model` gives, on `meta`: with its adapter, or all of it trained."""
    config = copy.deepcopy(config)
    if settings.attn_implementation in (None, "sdpa", "flash_attention_2", "flash_attention_3"):
        config._attn_implementation = "as_on_gpu"
    else:
        config._attn_implementation = settings.attn_implementation
    dtype = torch.float32 if settings.full_finetune else frozen
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return make_trainable(settings, model, "shape").train()


def filled(model: nn.Module) -> nn.Module:
    """The model with its tensors on the CPU instead of `meta`: within `in_shape_alone` they still take no memory."""
    known: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if old not in known:
                    known[old] = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        known[old] = nn.Parameter(known[old], old.requires_grad)
                tensors[name] = known[old]
    return model


def in_mixed_precision(model: nn.Module, precision: str) -> nn.Module:
    """Let the model's forward pass run in the launch's mixed precision, as accelerate does."""
    if precision != "no":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        vars(model)["forward"] = torch.autocast("cpu", dtype)(model.forward)
    return model


def branched_shape(
    config: PreTrainedConfig, settings: ModelSettings, frozen: torch.dtype, loss_chunk_size: int, precision: str = "no",
    dropout: float = 0.0,
) -> BranchedModel:  # fmt: skip
    """A `BranchedModel` of this shape; to be called within `in_shape_alone`."""
    model = BranchedModel(filled(shape_of(config, settings, frozen)), loss_chunk_size, dropout)
    in_mixed_precision(model, precision)
    return model


# --- Attention that keeps queries, keys, values, its output and a number a query, as the kernels of a GPU do ---------

torch.library.define("noisefit::attention", "(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)")
torch.library.define(
    "noisefit::attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor sums) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("noisefit::attention")
def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("noisefit::attention_backward")
def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
    return torch.ops.noisefit.attention_backward(gradient, *ctx.saved_tensors)


torch.library.register_autograd("noisefit::attention", _backward, setup_context=_keep)


@register_flop_formula(torch.ops.noisefit.attention)
def _flops(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """Two products of all queries with all keys, as torch counts a kernel's, which skips half of them."""
    rows, heads, length, size = query
    return 2 * 2 * rows * heads * length * key[2] * size


@register_flop_formula(torch.ops.noisefit.attention_backward)
def _flops_backward(gradient: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    return _flops(query, key, value) // 2 * 5  # the scores again, and four gradients


def attention_in_shape_alone(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """For transformers' attention interface: `[B, heads, L, D]` to `[B, L, heads, D]`. Keys may have fewer heads."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
    output, _ = torch.ops.noisefit.attention(query, key, value)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("as_on_gpu", attention_in_shape_alone)
