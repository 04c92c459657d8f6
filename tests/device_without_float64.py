"""A device of its own, as Apple's: it refuses float64, and its tensors meet those of the CPU nowhere but in a copy.

Its tensors are wrappers around ones on the CPU, whose kernels compute; autograd, modules and optimizers see another
device. It is registered with torch for the life of a process, so only a process of a test's own imports this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "apple"
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
counted: list[str] = []  # the operations on the device


class _Module(_DummyBackendModule):
    """`torch.apple`: it draws from the CPU's generator, which is told apart nowhere here."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)
torch.__future__.set_swap_module_params_on_conversion(True)  # so that `module.to(DEVICE)` keeps its parameters


class OnDevice(torch.Tensor):
    """A tensor there."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> OnDevice:
        if held.dtype == torch.float64:
            raise TypeError(f"{NAME} tensors cannot be float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor, requires_grad: bool = False):
        self.held = held

    def tolist(self) -> Any:
        return self.held.tolist()  # torch has none for a subclass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **options: Any) -> torch.Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    plain = [tensor.held if isinstance(tensor, OnDevice) else tensor for tensor in (source, target)]
    plain[1].copy_(plain[0])
    return target


# What `torch.tensor(..., device=DEVICE)` does, out of reach of a mode.
KERNELS = torch.library.Library("aten", "IMPL")
KERNELS.impl("empty_strided", _empty_strided, "PrivateUse1")
KERNELS.impl("_copy_from", _copy_from, "PrivateUse1")


class Registered(TorchDispatchMode):
    """Within it tensors can be made on the device, and copied there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    here: list[bool] = []

    def inner(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and (isinstance(value, OnDevice) or value.dim()):  # a CPU's scalar may mix
            here.append(isinstance(value, OnDevice))
        return value.held if isinstance(value, OnDevice) else value

    plain_args, plain = tree_map(inner, args), tree_map(inner, kwargs)
    if any(here) and not all(here) and func not in COPIES:
        raise RuntimeError(f"{func}: some of its tensors are on the CPU, some are not")
    to = any(here)
    if plain.get("device") is not None:
        to, plain["device"] = torch.device(plain["device"]).type == NAME, torch.device("cpu")
    found = func(*plain_args, **plain)
    if to:
        counted.append(str(func))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not to:
        return found
    wrapped = tree_map(lambda value: OnDevice(value) if isinstance(value, torch.Tensor) else value, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)
