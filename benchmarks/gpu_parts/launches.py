"""What one draw of noise launches and takes, as it is and compiled; the medians; AdamW fused and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from sizes import LLAMA_1B, TINY
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from ways import NOISE_STD, build_model

from gpu_parts.material import Row, is_full, milliseconds, one_line, synchronize
from noisefit.base import compiling
from noisefit.base.precision import add_noise
from noisefit.method.noise import TokenScaledNoise, lower_median


def noise(device: str, size: str) -> Iterator[Row]:
    """Scale, draw and addition of one noisy layer, apart and together."""
    of = LLAMA_1B if is_full(size) else TINY
    torch.manual_seed(0)
    hidden = torch.randn(of.rows, of.length, of.config.hidden_size, dtype=of.dtype, device=device)
    mask = torch.ones(of.rows, of.length, dtype=torch.long, device=device)
    kind, repeats = TokenScaledNoise(NOISE_STD), 20 if is_full(size) else 3
    sigma = kind.scale(hidden, mask)
    drawn = kind.draw(sigma)
    h = hidden.float()

    def together(hidden: Tensor, mask: Tensor) -> Tensor:
        return add_noise(hidden, kind.draw(kind.scale(hidden, mask)))

    yield {"text": f"One branch of {of.rows} x {of.length} x {of.config.hidden_size}, {hidden.dtype}."}
    eager: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "scale": (kind.scale, (hidden, mask)), "draw": (kind.draw, (sigma,)), "addition": (add_noise, (hidden, drawn)),
        "all three": (together, (hidden, mask)),
    }  # fmt: skip
    for name, (function, arguments) in eager.items():
        with mock.patch.object(compiling, "DEVICES", ()):  # else these are compiled by themselves, piece by piece
            yield as_row(name, function, arguments, device, repeats)
        yield as_row(f"{name}, as in a run", function, arguments, device, repeats)
    for name in ("scale", "addition", "all three"):
        yield compiled_row(name, *eager[name], device, size, repeats)
    middle = (hidden.shape[-1] + 1) // 2
    medians: dict[str, Callable[[], object]] = {
        "the median (of two)": lambda: lower_median(h),
        "by kthvalue": lambda: h.kthvalue(middle, dim=-1, keepdim=True),
        "by sort": lambda: h.sort(dim=-1).values[..., middle - 1],
    }
    for name, call in medians.items():
        yield as_row(name, call, (), device, repeats)


def compiled_row(
    name: str, function: Callable[..., Tensor], arguments: tuple[Tensor, ...], device: str, size: str, repeats: int
) -> Row:  # fmt: skip
    row: Row = {"what": f"{name}, compiled"}
    try:
        torch._dynamo.reset()
        # Inductor takes long to compile; to try this out, on a CPU, what comes before it will do. There the median is
        # numpy's, at which the graph breaks.
        compiled = torch.compile(
            function, backend="inductor" if is_full(size) else "aot_eager", fullgraph=device == "cuda"
        )
        row["ms"] = milliseconds(lambda: compiled(*arguments), device, repeats)
        if device == "cuda":
            row["launches"] = launches(lambda: compiled(*arguments), device)
        if name != "all three":  # whose random numbers are others
            a, b = compiled(*arguments).float(), function(*arguments).float()
            row["differs by"] = ((a - b).norm() / b.norm()).item()
    except Exception as error:  # of dynamo, inductor, Triton, a C compiler
        row["ms"] = one_line(error)
    return row


def as_row(
    name: str, function: Callable[..., object], arguments: tuple[Tensor, ...], device: str, repeats: int
) -> Row:  # fmt: skip
    taken = milliseconds(lambda: function(*arguments), device, repeats)
    return {"what": name, "ms": taken, "launches": launches(lambda: function(*arguments), device)}


def launches(call: Callable[[], object], device: str) -> int:
    """Kernels of a call; on a CPU the operations that it dispatches."""
    if device != "cuda":
        with _Count() as count:
            call()
        return count.operations
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len([e for e in kernels if not e.name.startswith(("Memcpy", "Memset"))])


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.operations += not function.is_view
        return function(*args, **(kwargs or {}))


def adamw(device: str, size: str) -> Iterator[Row]:
    """A step of AdamW over an adapter's weights in float32, each way from the same weights and gradients."""
    of = LLAMA_1B if is_full(size) else TINY
    shapes = [p.shape for p in build_model(of, "meta").parameters() if p.requires_grad]
    yield {"text": f"{len(shapes)} tensors of {sum(s.numel() for s in shapes) / 1e6:.1f} million float32 weights."}
    expected = None
    for name, options in {"as it is": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
        torch.manual_seed(0)
        weights = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = torch.optim.AdamW(weights, lr=1e-4, **options)
        optimizer.step()
        if expected is None:
            expected = [weight.detach().clone() for weight in weights]
        off = max((a - b).abs().max().item() for a, b in zip(weights, expected, strict=True))
        row = as_row(name, optimizer.step, (), device, 20 if is_full(size) else 3)
        yield row | {"weights differ by": off}
