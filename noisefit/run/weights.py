"""Weights and optimizer state of a model that may be sharded over processes: gathered, written, given back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from noisefit.base.files import give_usual_mode

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be in shards. All processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_weights(accelerator: Accelerator, model: nn.Module, adapter_only: bool) -> dict[str, Tensor]:
    """The weights of the model inside a prepared `BranchedModel`, whole, under its own names. All processes call it.

    Args:
        accelerator: of the run.
        model: the prepared `BranchedModel`.
        adapter_only: a sharded model's frozen weights are not wanted, so they need not be gathered.

    Returns:
        Name to weight, on the main process; what the others get may be empty.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter_only)
        state = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
        # Gathered from shards, a tied weight comes twice and is no longer seen to be one.
        once = dict(model.named_parameters())
        tied = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in once]
        state = {name: tensor for name, tensor in state.items() if name not in tied}
    else:
        state = accelerator.get_state_dict(model)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}  # the attribute of BranchedModel


def write_model(folder: Path, model: Any, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write adapter (or model), its configuration and the tokenizer to `folder`, as PEFT and transformers read them.

    The weights are for all who may read the folder: safetensors makes them their owner's alone.
    """
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    # Embeddings are never resized. Left to itself, PEFT asks the hub at each save whether they were.
    how = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    folder.mkdir(exist_ok=True)
    # PEFT adds to a card that is there, and makes one of a template otherwise, which takes longer than a small adapter.
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n", encoding="utf-8")
    model.save_pretrained(folder, state_dict=state, **how)
    (folder / "README.md").unlink(missing_ok=True)  # ours is written by `save_model`
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        give_usual_mode(path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, with the permissions of any other file."""
    save_file(tensors, path)
    give_usual_mode(path)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, whole, as `PARAMETER.KEY`; on the main process. All processes call it."""
    if not optimizer.state:  # before the first step; torch would take one to make a state
        return {}
    gathered = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=WHOLE))
    state = gathered.get("state", {})  # nothing at all on the other processes
    return {f"{name}.{key}": tensor for name, held in state.items() for key, tensor in held.items()}


def check_optimizer(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` where a tensor of the optimizer's is not finite, is of no trained parameter of the model, or
    has another shape than it."""
    shapes = {name.removeprefix("module."): p.shape for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in tensors.items():
        fits = tensor.dim() == 0 or tensor.shape == shapes.get(name.rpartition(".")[0])
        if not fits or name.rpartition(".")[0] not in shapes or not tensor.isfinite().all():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not of this model, or not finite")


def restore_optimizer(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimizer the tensors that `gather_optimizer` returned. All processes call it; those that the main one
    has are sent to the others.

    Learning rate and the other numbers of its groups are left as they are.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(parameter, {})[key] = tensor
    [known] = broadcast_object_list([set(state)])
    if not known:
        return
    groups: Any = get_optimizer_state_dict(model, optimizer, options=StateDictOptions())["param_groups"]
    whole: Any = {"state": state, "param_groups": groups} if accelerator.is_main_process else {}
    sent = accelerator.num_processes > 1
    options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=sent)
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    for name, weight in model.named_parameters():
        if name.removeprefix("module.") not in known:  # it never had a gradient; torch has made a state for it
            optimizer.state.pop(weight, None)
