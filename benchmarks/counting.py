"""What is counted of a model that exists in shape alone: its weights, what autograd keeps of it, its FLOPs.

Layers that are alike are counted and measured on a model of few of them, which stands for all.
"""

from __future__ import annotations

import copy
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from shapes import branched_shape, in_shape_alone, shape_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from noisefit.base.compiling import chunk_size_on
from noisefit.fork.branches import BranchedModel
from noisefit.fork.decoder import find_causal_lm, find_decoder_layers
from noisefit.method.losses import cross_entropy
from noisefit.method.policy import NoisePolicy, make_noise
from noisefit.run.footprint import UNIT, Amount, Footprint, measure, training_whole
from noisefit.run.settings import Settings

# Bytes a weight of a linear layer. nf4: a scale of 8 bits for every 64, and one of 32 for every 256 of those.
QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
FEW = 3  # layers where all are alike: backward ends at the first, so that it differs from the others


@dataclass(frozen=True)
class Weights:
    """Numbers of weights. `trained` ones are float32; `quantized` is the share of the frozen ones that can be.

    Attributes:
        frozen, trained: of a block, or outside of the blocks.
        quantized: of the frozen ones, those of linear layers other than the head.
    """

    frozen: int
    trained: int
    quantized: int

    def held(self, frozen_bytes: float, quantization: str) -> float:
        """Bytes."""
        small = QUANTIZED.get(quantization, frozen_bytes)
        return (self.frozen - self.quantized) * frozen_bytes + self.quantized * small + self.trained * 4


@dataclass(frozen=True)
class Flops:
    """Of one branch: forward and backward of each block, what backward computes again of it under
    --gradient_checkpointing, and forward and backward of the head for a token."""

    forward: tuple[Amount, ...]
    backward: tuple[Amount, ...]
    again: tuple[Amount, ...]
    head: float
    head_backward: float


@dataclass(frozen=True)
class Model:
    """All that is known of a model and what is trained of it."""

    blocks: tuple[Weights, ...]
    outside: Weights
    footprint: Footprint
    flops: Flops

    def sum(self, name: str) -> int:
        return sum(getattr(part, name) for part in (*self.blocks, self.outside))


def model_of(config: PreTrainedConfig, settings: Settings, precision: str, as_on_gpu: bool = True) -> Model:
    """Count and measure a model of this configuration, as the loop would have it."""
    frozen = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    with torch.device("meta"):
        layers = find_decoder_layers(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
    count = len(layers)
    alike = count > FEW and len(set(map(_signature, layers))) == 1
    measured = _with_layers(config, FEW) if alike else config

    blocks, outside = weights_by_part(shape_of(measured, settings, frozen), settings)
    with in_shape_alone(as_on_gpu):
        chunk, dropout = settings.loss_chunk_size or chunk_size_on("cuda"), settings.rdrop_dropout
        model = branched_shape(measured, settings, frozen, chunk, precision, dropout)
        noise = make_noise(settings, NoisePolicy(layers=[0]))
        footprint = measure(model, torch.zeros(1, dtype=torch.long), 3 * UNIT, noise, settings.objective.branches)
        flops = measure_flops(model)
    footprint = replace(footprint, blocks=_all(footprint.blocks, count))
    of_blocks = (flops.forward, flops.backward, flops.again)
    forward, backward, again = (_all(amounts, count) for amounts in of_blocks)
    flops = replace(flops, forward=forward, backward=backward, again=again)
    return Model(_all(blocks, count), outside, footprint, flops)


def weights_by_part(model: nn.Module, settings: Settings) -> tuple[tuple[Weights, ...], Weights]:
    """Of each block, and of what is outside of them."""
    layers = find_decoder_layers(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return tuple(weights_of(layer, settings) for layer in layers), weights_of(model, settings, leaving_out=inside)


def weights_of(module: nn.Module, settings: Settings, leaving_out: Set[int] = frozenset()) -> Weights:
    """The weights of a module, each once."""
    counts, seen = {"frozen": 0, "trained": 0, "quantized": 0}, set(leaving_out)
    head = find_causal_lm(module).get_output_embeddings() if leaving_out else None
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
            small = isinstance(part, nn.Linear) and part is not head and parameter.dim() == 2
            if small and not parameter.requires_grad and settings.quantization != "none":
                counts["quantized"] += parameter.numel()
    return Weights(**counts)


def _signature(layer: nn.Module) -> tuple:
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    few = copy.deepcopy(config)
    few.num_hidden_layers = count
    if getattr(few, "layer_types", None):
        few.layer_types = few.layer_types[:count]
    return few


def _all(measured: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Of `count` layers, what was measured of fewer: the second stands for those that are missing."""
    return (measured[0], *[measured[1]] * (count - len(measured)), *measured[1:])


def measure_flops(model: BranchedModel) -> Flops:
    """FLOPs of a model in training mode, as torch counts them: of an attention kernel all queries with all keys, of
    which it skips half."""
    lengths = (UNIT, 2 * UNIT)
    with training_whole(model):
        runs = [flops_of_blocks(model, length) for length in lengths]
        head, head_backward = _flops_of_head(model)
    forward, backward = _amounts([run[0] for run in runs]), _amounts([run[1] for run in runs])
    again = (Amount(),) * len(backward)
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        model.train()
        with_it = _amounts([flops_of_blocks(model, length)[1] for length in lengths])
        again = tuple(map(_minus, with_it, backward))
    return Flops(forward, backward, again, head, head_backward)


def _amounts(of_lengths: list[list[float]]) -> tuple[Amount, ...]:
    """Of what `UNIT` tokens and twice as many have, where no tokens have nothing."""
    amounts = []
    for once, twice in zip(*of_lengths, strict=True):
        pairs = (twice - 2 * once) / 2
        amounts.append(Amount(0.0, (once - pairs) / UNIT, pairs / UNIT**2))
    return tuple(amounts)


def _minus(more: Amount, less: Amount) -> Amount:
    return Amount(more.fixed - less.fixed, more.per_token - less.per_token, more.per_pair - less.per_pair)


def flops_of_blocks(model: BranchedModel, length: int) -> tuple[list[float], list[float]]:
    """Forward and backward FLOPs of each block for one row; what backward computes again counts as backward."""
    names = {id(module): name for name, module in model.named_modules()}
    keys = [f"{type(model).__name__}.{names[id(layer)]}" for layer in find_decoder_layers(model)]

    def counts() -> list[float]:
        return [float(sum(counter.get_flop_counts()[key].values())) for key in keys]

    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        states = model(ids, torch.ones_like(ids))
        forward = counts()
        states.sum().backward()
        return forward, [both - before for both, before in zip(counts(), forward, strict=True)]


def _flops_of_head(model: BranchedModel) -> tuple[float, float]:
    """Forward and backward FLOPs of a token's logits."""
    width = find_causal_lm(model).config.get_text_config(decoder=True).hidden_size
    tokens = min(UNIT, model.loss_chunk_size)  # one chunk, of which nothing is computed again
    states = torch.zeros(1, tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = model.sum_losses(states, torch.zeros(tokens, dtype=torch.long), _cross_entropy)["ce"]
        forward = counter.get_total_flops()
        loss.backward()
        both = counter.get_total_flops()
    return forward / tokens, (both - forward) / tokens


def _cross_entropy(logits: dict, targets: Tensor) -> dict:
    [clean] = next(part for part in logits.values() if part)
    return {"ce": cross_entropy(clean, targets)}
