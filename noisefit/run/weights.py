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
from noisefit.inputs.adapters import ADAPTER, as_saved

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
    folder.mkdir(exist_ok=True)
    # PEFT adds to a card that is there, and makes one of a template otherwise, which takes longer than a small adapter.
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n", encoding="utf-8")
    if isinstance(model, PeftModel):
        own = model.peft_config[ADAPTER]
        weights, model.peft_config[ADAPTER] = as_saved(model, weights)
        state = {name: tensor.contiguous() for name, tensor in weights.items()}
        # Embeddings are never resized. Left to itself, PEFT asks the hub at each save whether they were.
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        model.peft_config[ADAPTER] = own
    else:
        model.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in weights.items()})
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
    if not isinstance(optimizer, torch.optim.AdamW):  # none of which is sharded
        named: dict[Any, str] = {weight: name.removeprefix("module.") for name, weight in model.named_parameters()}
        return {f"{named[weight]}.{key}": torch.as_tensor(held).detach().cpu()
                for weight, state in optimizer.state.items() for key, held in state.items()}  # fmt: skip
    gathered = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=WHOLE))
    state = gathered.get("state", {})  # nothing at all on the other processes
    return {f"{name}.{key}": tensor for name, held in state.items() for key, tensor in held.items()}


def check_optimizer(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` where a tensor of the optimizer's is not finite, is of no trained parameter of the model, or
    has another shape than one about it has."""
    shapes = {name.removeprefix("module."): p.shape for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in tensors.items():
        weight, _, key = name.rpartition(".")
        fits = weight in shapes and (tensor.dim() == 0 or tensor.shape in _state_shapes(key, shapes[weight], tensor))
        if not fits or not tensor.isfinite().all():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not of this model, or not finite")


def _state_shapes(key: str, shape: torch.Size, tensor: Tensor) -> tuple[torch.Size, ...]:
    if key == "exp_avg_sq_row":  # Adafactor's sums
        return (shape[:-1],)
    if key == "exp_avg_sq_col":
        return (shape[:-2] + shape[-1:],)
    if key.startswith(("qmap", "absmax")):  # of bitsandbytes' blocks, as many as there are
        return (tensor.shape,) if tensor.numel() <= max(shape.numel(), 256) else ()
    return shape, torch.Size([2, *shape])  # AdEMAMix has two averages in one


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
    if not isinstance(optimizer, torch.optim.AdamW):
        for name, weight in model.named_parameters():
            [held] = broadcast_object_list([state.get(name.removeprefix("module."))])  # one at a time
            if held is not None:
                optimizer.state[weight] = {key: _as_kept(optimizer, weight, key, part) for key, part in held.items()}
        optimizer._opt_called = True  # type: ignore[attr-defined]  # else the schedule warns that it comes first
        return
    groups: Any = get_optimizer_state_dict(model, optimizer, options=StateDictOptions())["param_groups"]
    whole: Any = {"state": state, "param_groups": groups} if accelerator.is_main_process else {}
    sent = accelerator.num_processes > 1
    options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=sent)
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    for name, weight in model.named_parameters():
        if name.removeprefix("module.") not in known:  # it never had a gradient; torch has made a state for it
            optimizer.state.pop(weight, None)


def _as_kept(optimizer: Any, weight: Tensor, key: str, saved: Tensor) -> Any:
    """A tensor of a checkpoint as the optimizer had it: a number, or a tensor beside its weight."""
    if saved.dim() == 0:
        return saved.item() if saved.dtype == torch.int64 else saved  # torch's own counters are tensors on the CPU
    if key in ("state1", "state2") and getattr(optimizer, "is_paged", False):  # memory that the GPU shares with the CPU
        double = saved.shape != weight.shape
        make = optimizer._get_state_double_buffer if double else optimizer.get_state_buffer
        return make(weight, dtype=saved.dtype).copy_(saved)
    return saved.to(weight.device)
