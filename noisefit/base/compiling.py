"""Functions of many small operations, fused where each of them would be a launch of its own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from noisefit.base.errors import in_a_line, is_out_of_memory, notice

DEVICES = ("cuda",)  # kinds of devices; on a CPU an operation costs little to start, and a compiler may be missing
BACKEND: Any = "inductor"  # of torch.compile
FRAMES = 64  # ways to call a function, past which torch would run it as it is; its own limit of 8 is soon reached
COMPILERS = ("torch._dynamo", "torch._functorch", "torch._inductor", "torch.utils.checkpoint", "triton")
Result = TypeVar("Result")  # a tensor, or several
_failed: list[str] = []  # with what compiling failed
_wanted: ContextVar[bool | None] = ContextVar("wanted", default=None)  # see `compiling_if`


def fused(function: Callable[..., Result], dynamic: bool | None = True) -> Callable[..., Result]:
    """The function as it is, and on a GPU compiled by `torch.compile` at its first call.

    The first tensor among its arguments decides where. It must draw no random numbers: a compiled function draws
    others. Numbers are handed over as tensors, so that another strength is not compiled anew. Fused functions that it
    calls are compiled with it. Where compiling fails, for want of a C compiler say, all such functions go on as they
    are, and a line says so; but not where that of a backward pass fails, see `failure_of_compiler`.

    Args:
        function: the first tensor among its arguments decides on the device.
        dynamic: whether all sizes vary, so that another one is not compiled anew; `None`: those that are seen to vary.
    """

    @functools.cache  # of its own: what a loop's function knows, a model say, goes with the function
    def compiled(backend: Any) -> Callable[..., Result]:
        from torch._dynamo import config as dynamo  # here, as it takes a second to import

        dynamo.recompile_limit = max(dynamo.recompile_limit, FRAMES)
        warnings.filterwarnings("ignore", "(?s).*Online softmax is disabled")  # of how a kernel goes over few tokens
        return torch.compile(function, dynamic=dynamic, backend=backend)

    def number(value: Any, like: Tensor) -> Any:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((), value, dtype=dtype, device=like.device) if isinstance(value, float) else value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is None or first.device.type not in DEVICES or not _compiles_here():
            return function(*args, **kwargs)
        try:
            more = {name: number(value, first) for name, value in kwargs.items()}
            return compiled(BACKEND)(*(number(value, first) for value in args), **more)
        except Exception as error:  # of dynamo, inductor, Triton, a C compiler
            if is_out_of_memory(error) or type(error).__module__ == "torch.utils.checkpoint":  # its way to stop early
                raise
            result = function(*args, **kwargs)  # where it fails as well, the input is to blame
            if not _failed:
                _failed.append(in_a_line(error))
                notice("torch.compile failed, so noise and losses take more and smaller steps on the GPU, and the "
                       f"losses less memory with --loss_chunk_size 256: {_failed[0]}")  # fmt: skip
            return result

    return call


def are_compiled(kind: str) -> bool:
    """Whether fused functions are compiled on this kind of device: until that fails."""
    return kind in DEVICES and not _failed


@contextmanager
def compiling_if(wanted: bool) -> Iterator[None]:
    """Fused functions are compiled in here or not, whatever becomes known of it meanwhile: what is computed again in
    backward is to be computed as it was in forward."""
    before = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(before)


def _compiles_here() -> bool:
    wanted = _wanted.get()
    return not _failed if wanted is None else wanted


def forget_failures() -> None:
    """A run begins: what failed in another one may have been mended."""
    _failed.clear()


def failure_of_compiler(error: Exception, kind: str) -> str | None:
    """What to do about an error in the midst of a step on this kind of device, if compiling is behind it: of a backward
    pass that could not be compiled, or of one for which other code was compiled than in forward."""
    module = f"{type(error).__module__}."
    is_theirs = module.startswith(tuple(f"{name}." for name in COMPILERS))
    if not is_theirs or kind not in DEVICES or is_out_of_memory(error):
        return None
    return f"torch.compile is at fault ({in_a_line(error)}); TORCHDYNAMO_DISABLE=1 in the environment trains without it"


def fused_losses(function: Callable[..., Result]) -> Callable[..., Result]:
    """`fused` for the losses of a chunk of tokens: their number varies, and the vocabulary, which does not, makes the
    kernels faster where it is known."""
    return fused(function, dynamic=None)


def chunk_size_on(kind: str) -> int:
    """How many tokens have their logits in memory at a time by default, on this kind of device.

    Compiled, the losses of 1024 tokens take about the memory that those of 460 take as they are, and a GPU is not kept
    waiting for their start (docs/gpu.md).
    """
    return 1024 if kind in DEVICES else 256
