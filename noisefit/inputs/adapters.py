"""Putting a LoRA adapter on a model, and giving one back the weights that were saved.

PiSSA and OLoRA begin with a part of the base model's weights and leave them the rest. Such an adapter is saved as one
of twice the rank, which holds what was learnt over the base model as it is: `W' + BA = W + BA - B0 A0`. As all four
factors are in it, the training goes on from it as well.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, transpose
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from noisefit.base.errors import InputError, in_a_line, is_out_of_memory, notice
from noisefit.fork.decoder import find_decoder_layers
from noisefit.inputs.lora import FLAG, lora_options, moves_base
from noisefit.inputs.model_checks import loading

if TYPE_CHECKING:
    from noisefit.inputs.models import ModelSettings

ADAPTER = "default"  # PEFT's name of a model's only adapter


def add_adapter(
    settings: ModelSettings, model: PreTrainedModel, name: str, resumed: bool = False, told: bool = False
) -> nn.Module:
    """Put a LoRA adapter on the model, which is found again under `name` from whatever folder the adapter is loaded.

    What it trains is float32, as an update is too small a change for 16 bits.

    Args:
        settings: `--lora` and the flags beside it.
        model: without an adapter.
        name: of the base model, or its folder.
        resumed: its weights are to be restored, or there are none, so that no part of the base model's is taken.
        told: whether what PEFT warns of is said.

    Raises:
        InputError: `--target_modules` matches nothing, none is given and PEFT knows none for the architecture, or
            `--lora` asks for what this model cannot have.
    """
    wanted, alpha = settings.target_modules, settings.lora_alpha
    options = lora_options(settings.lora)
    begins_with_base = moves_base(options)
    start = {"init_lora_weights": True} if begins_with_base and resumed else {}
    linear = sorted({module.rpartition(".")[2] for module, m in model.named_modules() if isinstance(m, nn.Linear)})
    what = f"--target_modules {' '.join(wanted)}" if wanted else "no adapter can be put on the model"
    try:
        _check_names(model, wanted if wanted != ["all-linear"] else None, options)
        # PEFT rounds what it takes to the model's dtype once it has left the rest: that is taken again below.
        kept = {module: module.weight.data for module in model.modules() if begins_with_base and _is_linear(module)}
        with _peft_warnings(told and bool(options)):
            arguments: dict[str, Any] = {
                "task_type": "CAUSAL_LM",
                "r": settings.lora_r,
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # as most configurations have it
                "lora_dropout": settings.lora_dropout,
                "target_modules": "all-linear" if wanted == ["all-linear"] else wanted,
            }
            adapted: Any = get_peft_model(model, LoraConfig(**arguments | options | start))
        _check_layers(adapted, options, begins_with_base)
    except Exception as error:  # whatever PEFT makes of options that do not go with the model or with each other
        if isinstance(error, InputError):
            raise
        if is_out_of_memory(error):
            raise InputError(f"--lora_r {settings.lora_r}: no memory for an adapter of that rank") from None
        if "specify `target_modules`" in str(error):
            what = f"PEFT has no default target modules for {model.config.model_type}, give --target_modules"
        elif options:
            what += f", {FLAG} {' '.join(settings.lora or ())}"
        reason = in_a_line(error)
        raise InputError(f"{what}: {reason}; linear modules found: {', '.join(linear)}") from None
    _make_trained_float32(adapted)
    taken = _factors(adapted) if begins_with_base and not resumed else {}
    if taken and model.dtype != torch.float32:
        for module, weight in kept.items():
            module.weight.data = weight
        _leave_the_rest(adapted, taken)
    _measure_magnitudes(adapted)
    if told:
        notice(_trained_whole(adapted))
    config = adapted.peft_config[ADAPTER]
    if os.path.isdir(name):
        config.base_model_name_or_path = os.path.abspath(name)
    else:  # the very files, whatever becomes of the branch or tag
        config.revision = settings.model_revision
    if begins_with_base:
        config.init_lora_weights = True  # as it is saved
        adapted.taken_from_base = taken
    return adapted


@contextmanager
def _peft_warnings(told: bool) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    # What is between PEFT and transformers is nothing to the user, and `fan_in_fan_out` PEFT corrects by itself.
    own = [warning for warning in caught if not issubclass(warning.category, (FutureWarning, DeprecationWarning))]
    for text in dict.fromkeys(" ".join(str(warning.message).split()) for warning in own):
        if told and "fan_in_fan_out" not in text:
            notice(f"{FLAG}: PEFT says: {text}")


def _check_names(model: PreTrainedModel, targets: list[str] | None, options: Mapping[str, Any]) -> None:
    """Of several names, PEFT passes over those that match nothing. Raises `ValueError`."""
    modules = [module for module, _ in model.named_modules()]
    parameters = [parameter for parameter, _ in model.named_parameters()]
    tokens = options.get("trainable_token_indices")
    asked = [("", name, modules) for name in targets or ()]
    for key in ("modules_to_save", "exclude_modules"):
        asked += [(f"{key}: ", name, modules) for name in options.get(key, ())]
    asked += [("target_parameters: ", name, parameters) for name in options.get("target_parameters", ())]
    asked += [("trainable_token_indices: ", name, modules) for name in (tokens if isinstance(tokens, dict) else ())]
    for key, name, known in asked:
        if not any(other == name or other.endswith(f".{name}") for other in known):
            raise ValueError(f"{key}no {'parameter' if known is parameters else 'module'} is called {name}")
    layers = len(find_decoder_layers(model))
    if beyond := [layer for layer in options.get("layers_to_transform", ()) if layer >= layers]:
        raise ValueError(f"layers_to_transform: there is no layer {beyond[0]}, the model's are 0 to {layers - 1}")
    if tokens is not None:
        rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        largest = max(token for some in (tokens.values() if isinstance(tokens, dict) else [tokens]) for token in some)
        if largest >= rows:
            raise ValueError(f"trainable_token_indices: there is no token {largest}, the model has {rows}")


def _check_layers(adapted: nn.Module, options: Mapping[str, Any], begins_with_base: bool) -> None:
    """What options say of layers that the adapter does not have, or not as they need it. Raises `ValueError`."""
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in options.get(key, ()):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in layers):
                raise ValueError(f"{key}: no module with an adapter matches {pattern}")
    if options.get("lora_bias") and any(getattr(m.get_base_layer(), "bias", None) is None for m in layers.values()):
        raise ValueError("lora_bias: a module has no bias itself, so that the adapter could not be merged into it")
    for name, module in layers.items() if begins_with_base else ():
        ranks, base = module.r[ADAPTER], module.get_base_layer()
        if not _is_linear(base):
            raise ValueError(f"init_lora_weights: {name} is a {type(base).__name__}, and this one is for linear layers")
        if isinstance(base, Conv1D) and options["init_lora_weights"] == "olora":
            raise ValueError(f"init_lora_weights: PEFT's olora is not right for a Conv1D such as {name}; take pissa")
        shape = tuple(cast(Tensor, base.weight).shape)
        if ranks > min(shape):
            raise ValueError(f"init_lora_weights: a rank of {ranks} is more than {name} of shape {shape} has")
    for name, module in adapted.named_modules():
        kept = module.original_module.parameters() if isinstance(module, ModulesToSaveWrapper) else ()
        if any(not parameter.is_floating_point() for parameter in kept):
            raise ValueError(f"modules_to_save: {name} is quantized, so it cannot be trained")


def _make_trained_float32(adapted: nn.Module) -> None:
    """PEFT has done so with the adapter's own weights, and not with what else is trained. A module of its own
    (`modules_to_save`) gives the others what it gave them in the model's dtype."""
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtype = next((p.dtype for p in module.original_module.parameters()), torch.float32)
            if dtype != torch.float32:
                module.modules_to_save[ADAPTER].register_forward_hook(_in_dtype(dtype))
        if isinstance(module, nn.LayerNorm) and module.bias is not None and module.bias.requires_grad:
            module.weight.data = module.weight.data.float()  # both are of one dtype
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _measure_magnitudes(adapted: nn.Module) -> None:
    """DoRA begins as the base model: with the norms of its weights, which PEFT has rounded to their dtype."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module) and ADAPTER in module.lora_magnitude_vector:
            base, magnitude = module.get_base_layer(), module.lora_magnitude_vector[ADAPTER]
            if _is_linear(base) and cast(Tensor, base.weight).dtype in (torch.bfloat16, torch.float16):
                a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
                cast(Any, magnitude).update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=module.scaling[ADAPTER])


def _trained_whole(adapted: nn.Module) -> str | None:
    """A line about the modules that `modules_to_save` means: PEFT takes all whose names end so."""
    found = {name.removeprefix("base_model.model."): sum(p.numel() for p in module.modules_to_save.parameters())
             for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)}  # fmt: skip
    if not found:
        return None
    names = list(found)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (f"{FLAG} modules_to_save trains {', '.join(names[:3])}{more} whole: {sum(found.values()):,} weights in "
            "float32")  # fmt: skip


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _in_dtype(dtype: torch.dtype) -> Any:
    def convert(module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    return convert


def _factors(adapted: nn.Module) -> dict[str, Tensor]:
    """Both factors of each layer, by their names in the model, as copies on the CPU."""
    named = [
        (n, p) for n, p in adapted.named_parameters() if n.endswith((f"_A.{ADAPTER}.weight", f"_B.{ADAPTER}.weight"))
    ]
    return {name: factor.detach().to("cpu", copy=True) for name, factor in named if not factor.is_meta}


def as_saved(adapted: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter's weights and configuration as they go to a file: over the base model as it is.

    Args:
        adapted: as `add_adapter` gave it.
        weights: of it, whole, by their names in it.

    Returns:
        The weights as they are, but for an adapter that began with a part of the base model; a copy of its
        configuration, in which names stand in order: PEFT's sets of them have another one in each process.
    """
    config, taken = copy.deepcopy(adapted.peft_config[ADAPTER]), getattr(adapted, "taken_from_base", None)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    if taken is None:
        return weights, config
    weights = dict(weights)
    for name, begun in taken.items():
        is_a = name.endswith(f".lora_A.{ADAPTER}.weight")
        weights[name] = torch.cat([weights[name].cpu(), begun if is_a else -begun], dim=0 if is_a else 1)
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # so that its scale is the same
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    return weights, config


def restore_adapter(model: Any, checkpoint: Path) -> None:
    """Give an adapter the weights that a checkpoint holds, as `as_saved` gave them. Raises `InputError`."""
    with loading("--resume_from_checkpoint", str(checkpoint), "this model's adapter"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        check_adapter_names(model, weights.keys())
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{bad[0]} is not finite")
        if getattr(model, "taken_from_base", None) is not None:
            weights = _take_again(model, weights)
        set_peft_model_state_dict(model, weights)


def _take_again(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the same part of the base model's weights as at the run's start; the factors that were trained since."""
    trained, taken = dict(weights), {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for letter, dim in (("A", 0), ("B", 1)):
            key = f"{name}.lora_{letter}"
            trained[f"{key}.weight"], begun = weights[f"{key}.weight"].chunk(2, dim=dim)
            taken[f"{key}.{ADAPTER}.weight"] = (begun if letter == "A" else -begun).contiguous()
    _leave_the_rest(model, taken)
    model.taken_from_base = taken
    return {name: tensor.contiguous() for name, tensor in trained.items()}


def _leave_the_rest(model: nn.Module, taken: Mapping[str, Tensor]) -> None:
    """Subtract the factors that the adapter begins with from the base model's weights, in PEFT's way."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base, turned = cast(Tensor, module.get_base_layer().weight), bool(getattr(module, "fan_in_fan_out", False))
            a, b = (taken[f"{name}.lora_{letter}.{ADAPTER}.weight"].to(base.device) for letter in "AB")
            rest = transpose(base.data.to(torch.float32), turned) - module.scaling[ADAPTER] * b @ a
            base.data = transpose(rest.to(base.dtype), turned)


def check_adapter_names(model: Any, names: Set[str]) -> None:
    """Raise `ValueError` where these names of an adapter's tensors are not those of the adapter on the model."""
    # Other programs save embeddings with an adapter. Left to itself, PEFT asks the hub whether they were resized.
    for with_embeddings in (False, True):
        own = get_peft_model_state_dict(model, save_embedding_layers=with_embeddings).keys()
        if names <= own:
            break
    if unmatched := names ^ own:  # of layers that only one of the two has
        raise ValueError(f"{len(unmatched)} tensors are in one of the two only, {min(unmatched)} for one")
