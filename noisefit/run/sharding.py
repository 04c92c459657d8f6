"""Loading a model that is sharded over the processes (FSDP2): one of them reads it, and sends the others their shards.

A model of 70B parameters has 140 GB in 16 bits, and a node of eight processes no memory for eight of them. So the main
process loads it as one process alone would, with all checks. The others build it without weights: their tensors take
addresses, and no memory, until accelerate has sharded the model and sent out the main process's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedConfig

from noisefit.base.meeting import apart
from noisefit.fork.decoder import find_causal_lm
from noisefit.inputs import models
from noisefit.inputs.models import ModelSettings


@dataclass(frozen=True)
class Outline:
    """What a process must know of the model that another one has loaded, besides its configuration.

    Attributes:
        dtypes: of the parameters, by their names; some stay float32 in a model of 16 bits.
        buffers: by their names. They are small, and accelerate sends none of them.
        tied: the names of tied weights, as transformers has them: by the files, and not the configuration alone.
    """

    dtypes: dict[str, torch.dtype]
    buffers: dict[str, Tensor]
    tied: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Outline:
        return cls(
            {name: parameter.dtype for name, parameter in model.named_parameters()},
            dict(model.named_buffers(remove_duplicate=False)),
            dict(find_causal_lm(model).all_tied_weights_keys),
        )


def load_model(
    settings: ModelSettings, name: str, accelerator: Accelerator, checkpoint: Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:  # fmt: skip
    """`noisefit.inputs.models.load_model` on all processes, which wait for each other; all call it.

    Where the model is to be sharded, the main process alone reads weights, and on the others they are not set: give it
    to `prepare_model`.

    Raises:
        InputError: on all processes, where one of them has it.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    model = None
    with apart("loading the model") as is_main:
        if is_main or not sharded:
            model = models.load_model(settings, name, accelerator, checkpoint, trust_remote_code)
    if sharded:
        [outline] = broadcast_object_list([None if model is None else Outline.of(model)])
        with apart("building the model"):
            if model is None:
                folder = str(checkpoint) if checkpoint is not None and settings.full_finetune else name
                config, how = _config(settings, folder, trust_remote_code), models.attention_options(settings)
                empty = models.build_empty(settings, folder, config, trust_remote_code, **how)
                model = _without_weights(models.make_trainable(settings, empty, name, resumed=True), outline)
    assert model is not None
    return model


def _config(settings: ModelSettings, folder: str, trust_remote_code: bool) -> PreTrainedConfig:
    revision = None if Path(folder).is_dir() else settings.model_revision
    return models.load_config(folder, trust_remote_code, revision)


def _without_weights(model: nn.Module, outline: Outline) -> nn.Module:
    """The model, from the `meta` device, with the outline's buffers, and parameters that are in no memory yet."""
    model.to_empty(device="cpu")
    causal_lm = find_causal_lm(model)
    causal_lm.all_tied_weights_keys = dict(outline.tied)
    causal_lm.tie_weights(recompute_mapping=False)
    for name, parameter in model.named_parameters():
        parameter.data = torch.empty_like(parameter, dtype=outline.dtypes[name])
    for name, value in outline.buffers.items():
        module, _, own_name = name.rpartition(".")
        model.get_submodule(module)._buffers[own_name] = value
    return model


def prepare_model(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """`accelerator.prepare`, after which a sharded model has the weights of the main process's on all of them."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(model, optimizer)
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True
    # accelerate takes each tensor of a state dict for a shard; buffers that are not in one it keeps as they are.
    kept = [(module, name) for module in model.modules() for name in module._buffers
            if name not in module._non_persistent_buffers_set]  # fmt: skip
    for module, name in kept:
        module._non_persistent_buffers_set.add(name)
    try:
        return accelerator.prepare(model, optimizer)
    finally:
        for module, name in kept:
            module._non_persistent_buffers_set.discard(name)
