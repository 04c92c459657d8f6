"""The head and the losses: of the three branches by chunk, compiled and as they are; and where the cross-entropy alone
is wanted, against torch's and Liger's fused ones and all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from sizes import LLAMA_1B, LLAMA_7B, TINY, Size
from step_cost import Costs
from torch import Tensor
from ways import Steps, noisefit_losses, plain_losses

from gpu_parts.material import GIB, Row, forget, installed, is_full, milliseconds, one_line
from noisefit.base import compiling
from noisefit.fork.branches import CLEAN
from noisefit.fork.decoder import find_causal_lm

CHUNKS = (1024, 256)  # tokens; the first is the default of --loss_chunk_size on a GPU
Loss = Callable[[Tensor], Tensor]
"""`[N, H]` hidden states to the summed cross-entropy."""


def head(device: str, size: str) -> Iterator[Row]:
    """Forward and backward pass of a frozen head, to the gradient of the hidden states."""
    for of in (LLAMA_7B, LLAMA_1B) if is_full(size) else (TINY,):
        tokens = of.rows * of.length
        yield from compare(device, of, tokens, CHUNKS if is_full(size) else (32,), 10 if is_full(size) else 2)
        forget(device)


def losses(device: str, size: str) -> Iterator[Row]:
    """The same for the three losses of three branches, the loss functions compiled and as they are."""
    chunks, repeats = ((256, 1024, 4096), 10) if is_full(size) else ((32,), 2)
    for of in (LLAMA_7B, LLAMA_1B) if is_full(size) else (TINY,):
        steps, states, targets, shape = one_layer(device, of, of.rows * of.length)
        apart = [states, *(states + 0.3 * torch.randn_like(states) for _ in range(2))]

        def ours(branches: Tensor, chunk: int, steps: Steps = steps, targets: Tensor = targets) -> Tensor:
            steps.branched.loss_chunk_size = chunk
            return sum(
                steps.branched.sum_losses(branches, targets, noisefit_losses).values(),
                start=torch.zeros((), device=branches.device),
            )

        expected = None
        for compiled in (False, True) if device == "cuda" else (False,):
            how = "compiled" if compiled else "as they are"
            with compiling_on((device,) if compiled else ()):
                found = {f"chunks of {n}, {how}": (lambda h, n=n, of=ours: of(h, n)) for n in chunks}
                expected = yield from rows_of(device, shape, found, torch.stack(apart), repeats, expected)
        del steps, states, apart, expected
        forget(device)


@contextmanager
def compiling_on(devices: tuple[str, ...]) -> Iterator[None]:
    """On these kinds of devices `fused` functions are compiled."""
    before, compiling.DEVICES = compiling.DEVICES, devices
    try:
        yield
    finally:
        compiling.DEVICES = before


def compare(device: str, of: Size, tokens: int, chunks: tuple[int, ...], repeats: int) -> Iterator[Row]:
    steps, states, targets, shape = one_layer(device, of, tokens)
    yield from rows_of(device, shape, ways(steps, lm_head(steps), targets, chunks), states, repeats)


def one_layer(device: str, of: Size, tokens: int) -> tuple[Steps, Tensor, Tensor, str]:
    """A model of this shape and of one layer, hidden states and targets for its head, and what they are in words."""
    config = type(of.config)(**of.config.to_dict() | {"num_hidden_layers": 1})
    steps = Steps(replace(of, config=config), device)
    vocabulary, width = config.vocab_size, config.hidden_size
    states = torch.randn(tokens, width, dtype=of.dtype, device=device)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    shape = f"{tokens} x {width}, vocabulary {vocabulary:,}, {str(of.dtype).removeprefix('torch.')}"
    return steps, states, targets, shape


def rows_of(
    device: str, shape: str, found: dict[str, Loss], states: Tensor, repeats: int, expected: Tensor | None = None
) -> Generator[Row, None, Tensor | None]:
    """A row for each way; returns the gradient that the others are compared with, by default that of the first."""
    for name, loss in found.items():
        row: Row = {"states": shape, "head": name}
        try:
            value, gradient = run(loss, states)
            expected = gradient if expected is None else expected
            off = ((gradient - expected).float().norm() / expected.float().norm()).item()
            del gradient
            costs = Costs(device)
            with costs.weighed(name):
                run(loss, states)
            # On a CPU tensors are counted, and what an operation makes and frees within itself is not seen.
            row |= {"ms": milliseconds(lambda loss=loss: run(loss, states), device, repeats)}
            row |= {"GiB over states": costs.memory[name] / GIB, "loss a token": value / states.shape[-2]}
            row |= {"gradient differs by": off}
        except Exception as error:  # a library's own, or memory that ran out
            row |= {"ms": one_line(error)}
        forget(device)
        yield row
    return expected


def run(loss: Loss, states: Tensor) -> tuple[float, Tensor]:
    own = states.detach().requires_grad_()
    total = loss(own)
    (total / own.shape[-2]).backward()
    assert own.grad is not None
    return total.item(), own.grad


def ways(steps: Steps, weight: Tensor, targets: Tensor, chunks: tuple[int, ...]) -> dict[str, Loss]:
    """The first is the one that the others are compared with."""

    def ours(states: Tensor, chunk: int) -> Tensor:
        steps.branched.loss_chunk_size = chunk
        return steps.branched.sum_losses(states.unsqueeze(0), targets, plain_losses, (CLEAN,))["ce"]

    def at_once(states: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum")

    found: dict[str, Loss] = {f"ours, chunks of {chunk}": lambda h, c=chunk: ours(h, c) for chunk in chunks}
    found["all logits at once"] = at_once
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for chunk in chunks:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
            found[f"torch's linear_cross_entropy, chunks of {chunk}"] = lambda h, o=options: F.linear_cross_entropy(
                h, weight, targets, reduction="sum", options=o
            )
    if installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger's fused linear cross-entropy"] = lambda h: liger(weight, h, targets)
    return found


def lm_head(steps: Steps) -> Tensor:
    """Its weights, `[V, H]`, frozen."""
    return find_causal_lm(steps.model).get_output_embeddings().weight
