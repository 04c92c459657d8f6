"""The optimizers of `--optim`: names of transformers' `OptimizerNames`, classes and options that they stand for there.

Those are here whose class is torch's, transformers' own or bitsandbytes'. Each changes nothing where there is no
gradient, which is how a step whose numbers are none is skipped, and each one's state is tensors and numbers that a
checkpoint keeps: `tests/run/test_optimizer.py` holds them to both.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from noisefit.base.errors import InputError, in_a_line, is_out_of_memory
from noisefit.base.key_values import Kind, as_words, converted, count, did_you_mean, key_values, list_of, number, truth

TORCH, TRANSFORMERS, BITSANDBYTES = "torch.optim", "transformers", "bitsandbytes.optim"


@dataclass(frozen=True)
class Optimizer:
    """What a name stands for.

    Attributes:
        library, name: of its class.
        kept: bytes of its state for each float32 weight of a matrix, for the memory that a run is told to take.
        options: of the class, which the name fixes.
        defaults: of the class, which `--optim_args` may change.
    """

    library: str
    name: str
    kept: float
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _bits(name: str, kept: float, bits: int, paged: bool | None = False, **defaults: Any) -> Optimizer:
    """Of bitsandbytes; paged ones lie in memory that the GPU shares with the CPU, and are not counted as the GPU's."""
    options = {"optim_bits": bits} | ({} if paged is None else {"is_paged": paged})
    return Optimizer(BITSANDBYTES, name, 0 if paged else kept * bits / 32, options, defaults)


# transformers passes them, and Lion's own are others.
_BETAS = (0.9, 0.999)
_THREE: dict[str, Any] = {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0}
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(TORCH, "AdamW", 8),
    "adamw_torch_fused": Optimizer(TORCH, "AdamW", 8, {"fused": True}),
    "adafactor": Optimizer(TRANSFORMERS, "Adafactor", 0, {"scale_parameter": False, "relative_step": False}),
    "sgd": Optimizer(TORCH, "SGD", 0),
    "adagrad": Optimizer(TORCH, "Adagrad", 4),
    "rmsprop": Optimizer(TORCH, "RMSprop", 4),
    "adamw_8bit": _bits("AdamW", 8, 8),
    "adamw_bnb_8bit": _bits("AdamW", 8, 8),
    "paged_adamw_8bit": _bits("AdamW", 8, 8, True),
    "paged_adamw_32bit": _bits("AdamW", 8, 32, True),
    "lion_8bit": _bits("Lion", 4, 8, betas=_BETAS),
    "lion_32bit": _bits("Lion", 4, 32, betas=_BETAS),
    "paged_lion_8bit": _bits("Lion", 4, 8, True, betas=_BETAS),
    "paged_lion_32bit": _bits("Lion", 4, 32, True, betas=_BETAS),
    "ademamix": _bits("AdEMAMix", 12, 32, **_THREE),
    "ademamix_8bit": _bits("AdEMAMix", 12, 8, **_THREE),
    "paged_ademamix_8bit": _bits("AdEMAMix", 12, 8, True, **_THREE),
    "paged_ademamix_32bit": _bits("AdEMAMix", 12, 32, True, **_THREE),
    "rmsprop_bnb": _bits("RMSprop", 4, 32, None),
    "rmsprop_bnb_8bit": _bits("RMSprop", 4, 8, None),
    "rmsprop_bnb_32bit": _bits("RMSprop", 4, 32, None),
}
SHARDED = ("adamw_torch", "adamw_torch_fused")  # those that are tried with FSDP


def _numbers(value: Any) -> float | tuple[float, ...]:
    found = list_of(number)(value)
    return tuple(found) if isinstance(value, (list, str)) and len(found) > 1 else found[0]


# What `--optim_args` may say, of the classes that have it.
ARGUMENTS: dict[str, Kind] = {
    "betas": _numbers,
    "eps": _numbers,
    **dict.fromkeys(("momentum", "dampening", "alpha", "lr_decay", "initial_accumulator_value"), number),
    **dict.fromkeys(("clip_threshold", "decay_rate", "beta1"), number),
    **dict.fromkeys(("nesterov", "centered", "amsgrad"), truth),
    **dict.fromkeys(("t_alpha", "t_beta3", "min_8bit_size"), count(0)),
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of a name of `OPTIMIZERS`. Raises `InputError` where its library is not installed."""
    kind = OPTIMIZERS[name]
    package = kind.library.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--optim {name} needs {package}: pip install {package}")
    try:
        found: type[torch.optim.Optimizer] = getattr(importlib.import_module(kind.library), kind.name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        reason = in_a_line(error)
        raise InputError(f"--optim {name}: {package} has no {kind.name} that works here ({reason})") from None
    return found


def optimizer_arguments(words: Sequence[str] | None) -> dict[str, Any]:
    """The values of `--optim_args`. Raises `InputError` where an argument is unknown, or has an impossible value."""
    found = key_values("--optim_args", words or ())
    flags = {"lr": "--learning_rate", "learning_rate": "--learning_rate", "weight_decay": "--weight_decay"}
    for key in found:
        if key in flags:
            raise InputError(f"--optim_args {key}: give {flags[key]} instead")
        if key not in ARGUMENTS:
            raise InputError(f"--optim_args {key}: no such argument; {did_you_mean(key, ARGUMENTS)}")
    return {key: converted("--optim_args", key, value, ARGUMENTS[key]) for key, value in found.items()}


def optimizer_words(words: Sequence[str] | None) -> list[str] | None:
    """`--optim_args` written in one way; `None` where there are none. Errors of `optimizer_arguments`."""
    return as_words(optimizer_arguments(words)) or None


def build_optimizer(settings: Any, trained: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `--optim` over these weights. Raises `InputError` where it is not installed, or has no such
    argument; its class raises what it likes over their values."""
    name = settings.optim
    cls, kind, own = optimizer_class(name), OPTIMIZERS[name], optimizer_arguments(settings.optim_args)
    taken = inspect.signature(cls.__init__).parameters
    if unknown := [key for key in own if key not in taken]:
        having = [key for key in ARGUMENTS if key in taken]
        raise InputError(f"--optim_args {unknown[0]}: --optim {name} has none; it has {', '.join(having)}")
    arguments: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if name == "adamw_torch":
        # On CUDA in one kernel for many weights, which leaves the same state.
        arguments["fused"] = True if device.type == "cuda" else None
    return cls(trained, **arguments | dict(kind.defaults) | own | dict(kind.options))


def try_optimizer(settings: Any, device: torch.device, sharded: bool) -> None:
    """Take a step with a small weight, before the model is loaded.

    Args:
        settings: of the run.
        device: that it computes on.
        sharded: whether the model will be.

    Raises:
        InputError: the optimizer is not installed, does not work on this device or sharded, or refuses its arguments.
    """
    name = settings.optim
    if sharded and name not in SHARDED:
        raise InputError(f"--optim {name} does not go with FSDP; give {' or '.join(SHARDED)}")
    weight = nn.Parameter(torch.zeros(64, 128, device=device))
    try:
        optimizer = build_optimizer(settings, [weight], device)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    except InputError:
        raise
    except Exception as error:  # of torch, or of a library with kernels of its own
        if is_out_of_memory(error):
            raise
        given = f", --optim_args {' '.join(settings.optim_args)}" if settings.optim_args else ""
        reason = in_a_line(error, 300)
        raise InputError(f"--optim {name}{given}: it does not work on {device.type}: {reason}") from None


def bytes_kept(settings: Any) -> float:
    """Bytes of the optimizer's state for each byte of trained weights."""
    own = optimizer_arguments(settings.optim_args)
    more = sum(bool(own.get(name)) for name in ("momentum", "centered", "amsgrad", "beta1"))  # another number each
    return OPTIMIZERS[settings.optim].kept / 4 + (0 if OPTIMIZERS[settings.optim].library == BITSANDBYTES else more)
