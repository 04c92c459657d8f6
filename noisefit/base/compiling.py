"""Functions of many small operations, fused where each of them would be a launch of its own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from noisefit.base.errors import is_out_of_memory, notice

DEVICES = ("cuda",)  # kinds of devices; on a CPU an operation costs little to start, and a compiler may be missing
FRAMES = 64  # ways to call a function, past which torch would run it as it is; its own limit of 8 is soon reached
Result = TypeVar("Result")  # a tensor, or several
_failed: list[str] = []  # with what compiling failed


def fused(function: Callable[..., Result], dynamic: bool | None = True) -> Callable[..., Result]:
    """The function as it is, and on a GPU compiled by `torch.compile` at its first call.

    The first tensor among its arguments decides where. It must draw no random numbers: a compiled function draws
    others. Numbers are handed over as tensors, so that another strength is not compiled anew. Fused functions that it
    calls are compiled with it. Where compiling fails, for want of a C compiler say, all such functions go on as they
    are, and a line says so.

    Args:
        function: the first tensor among its arguments decides on the device.
        dynamic: whether all sizes vary, so that another one is not compiled anew; `None`: those that are seen to vary.
    """

    @functools.cache
    def compiled() -> Callable[..., Result]:
        from torch._dynamo import config as dynamo  # here, as it takes a second to import

        dynamo.recompile_limit = max(dynamo.recompile_limit, FRAMES)
        warnings.filterwarnings("ignore", "(?s).*Online softmax is disabled")  # of how a kernel goes over few tokens
        return torch.compile(function, dynamic=dynamic)

    def number(value: Any, like: Tensor) -> Any:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((), value, dtype=dtype, device=like.device) if isinstance(value, float) else value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        first = next(value for value in args if isinstance(value, Tensor))
        if torch.compiler.is_compiling() or first.device.type not in DEVICES or _failed:
            return function(*args, **kwargs)
        try:
            more = {name: number(value, first) for name, value in kwargs.items()}
            return compiled()(*(number(value, first) for value in args), **more)
        except Exception as error:  # of dynamo, inductor, Triton, a C compiler
            if is_out_of_memory(error) or type(error).__module__ == "torch.utils.checkpoint":  # its way to stop early
                raise
            result = function(*args, **kwargs)  # where it fails as well, the input is to blame
            _failed.append(" ".join(str(error).split())[:200] or type(error).__name__)
            notice(f"torch.compile failed, so noise and losses take more and smaller steps on the GPU: {_failed[0]}")
            return result

    return call


def fused_losses(function: Callable[..., Result]) -> Callable[..., Result]:
    """`fused` for the losses of a chunk of tokens: their number varies, and the vocabulary, which does not, makes the
    kernels faster where it is known."""
    return fused(function, dynamic=None)


def chunk_size_on(kind: str) -> int:
    """How many tokens have their logits in memory at a time by default, on this kind of device.

    Compiled, the losses of 1024 tokens take about the memory that those of 400 take as they are, and a GPU is not kept
    waiting for their start.
    """
    return 1024 if kind in DEVICES else 256
