"""What a micro-batch keeps in memory over the weights, told before the first step.

It is measured and not modelled: a few tokens go through the run's own model, wherever that stands and whatever its
kernels keep, and what autograd saves is counted block by block and scaled to the longest rows. So it holds for any
architecture, dtype, adapter and attention. `benchmarks/plan.py` does the same with models that exist in shape alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from noisefit.fork.branches import CLEAN, DROPOUT, NOISY, Branch
from noisefit.fork.decoder import block_hidden_states, find_causal_lm, find_decoder_layers
from noisefit.fork.hooks import Noise, NoiseFunction, pop_noise_sizes
from noisefit.fork.packing import Packing

UNIT = 32  # tokens; rows of one, two and three times as many are measured
# Times the float32 logits of a chunk, all branches: what the head and the losses hold at their peak, see `head`.
LOGIT_COPIES = {1: 3.0, 2: 3.0, 3: 2.5}
COMPILED_COPIES = 2  # where the losses are compiled, in the logits' own dtype: they and their gradient (docs/gpu.md)
BACKWARD = 1.25  # times what a block keeps: what its backward holds at its peak, where the block is computed again
OUTSIDE = -1  # of the blocks: embedding and final norm


@dataclass(frozen=True)
class Amount:
    """Of rows of `L` tokens each: `fixed + rows * (per_token * L + per_pair * L^2)`, in bytes (or FLOPs)."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0

    def of(self, rows: float, length: int) -> float:
        return self.fixed + rows * (self.per_token * length + self.per_pair * length**2)

    @classmethod
    def through(cls, unit: int, once: float, twice: float, thrice: float) -> Amount:
        """The one that has these values for a row of one, two and three times `unit` tokens."""
        per_pair = (thrice - 2 * twice + once) / (2 * unit**2)
        per_token = (twice - once) / unit - 3 * unit * per_pair
        return cls(once - per_token * unit - per_pair * unit**2, per_token, per_pair)


@dataclass(frozen=True)
class Way:
    """How a micro-batch is computed.

    Attributes:
        branches: the kind of each.
        noisy: the layers with noise, ascending, or `EMBEDDING`; without any the branches are one.
        strategy: of `BranchedModel.forward`.
        checkpointing: whether blocks are computed again in backward.
        loss_chunk_size: supervised tokens whose logits are in memory at a time.
        logit_bytes: of a logit where the losses are compiled, as on a GPU; 0 where they are not.
    """

    branches: tuple[Branch, ...]
    noisy: tuple[int, ...] = ()
    strategy: str = "fork"
    checkpointing: bool = False
    loss_chunk_size: int = 256
    logit_bytes: int = 0

    @property
    def count(self) -> int:
        """Branches that are computed."""
        return len(self.branches) if self.noisy or DROPOUT in self.branches else 1

    def copies(self, layer: int) -> int:
        """Branches that a layer's own computation has, which has none of the noise that its output gets."""
        apart = self.strategy != "fork" or DROPOUT in self.branches or not self.noisy or layer > self.noisy[0]
        return self.count if apart else 1


@dataclass(frozen=True)
class Footprint:
    """What autograd keeps of a forward pass in training mode, without checkpointing.

    Attributes:
        blocks: of each decoder block, for one branch.
        outside: of what is computed before and after the blocks, for one branch.
        noisy: what one draw of noise adds (nothing, but under --noise_gradient).
        dropped: what the dropout of a `DROPOUT` branch adds in one block.
        hidden: bytes of a token's hidden states between blocks.
        vocabulary: logits a token.
    """

    blocks: tuple[Amount, ...]
    outside: Amount
    noisy: Amount
    dropped: Amount
    hidden: float
    vocabulary: int

    def kept(self, way: Way, rows: int, length: int) -> float:
        """Bytes that are kept until backward needs them."""
        copies = [way.copies(layer) for layer in range(len(self.blocks))]
        extra = self.noisy.of(rows, length) * way.branches.count(NOISY) * len(way.noisy)
        extra += self.dropped.of(rows, length) * way.branches.count(DROPOUT) * len(copies)
        extra += self.outside.of(rows * way.count, length)
        if way.checkpointing:
            return extra + sum(copies) * rows * length * self.hidden
        return extra + sum(block.of(rows * n, length) for block, n in zip(self.blocks, copies, strict=True))

    def again(self, way: Way, rows: int, length: int) -> float:
        """Bytes of the block that is computed again in backward, the largest of them, with its gradients; 0 without
        checkpointing."""
        if not way.checkpointing:
            return 0.0
        gradient = 2 * way.count * rows * length * self.hidden
        # Separate passes are computed again one by one.
        copies = [1 if way.strategy != "fork" else way.copies(layer) for layer in range(len(self.blocks))]
        largest = max(block.of(rows * n, length) for block, n in zip(self.blocks, copies, strict=True))
        return BACKWARD * largest + gradient

    def head(self, way: Way, rows: int, length: int, supervised: int | None = None) -> float:
        """Bytes of the logits, the losses and their gradients at their peak, and of the hidden states that they are
        formed of and their gradient.

        Args:
            way: how the micro-batch is computed.
            rows, length: of the micro-batch.
            supervised: tokens; `None`: all.
        """
        tokens = rows * length if supervised is None else supervised
        states = 2 * way.count * tokens * self.hidden
        if way.strategy == "full_logits":
            states += 2 * way.count * rows * length * self.vocabulary * 4
        chunk = min(way.loss_chunk_size, tokens)
        each = COMPILED_COPIES * way.logit_bytes or LOGIT_COPIES[way.count] * 4
        return states + each * way.count * chunk * self.vocabulary

    def peak(self, way: Way, rows: int, length: int, supervised: int | None = None) -> float:
        """Bytes over the weights, their gradients and the optimizer: forward's end or backward's first block."""
        head, again = self.head(way, rows, length, supervised), self.again(way, rows, length)
        return self.kept(way, rows, length) + max(head, again)


class _Saved:
    """While its hooks are on, the storages that autograd saves, each once, by the block that it was saved in."""

    def __init__(self, model: nn.Module):
        held = [*model.parameters(), *model.buffers()]
        self.weights = {_storage(tensor)._cdata for tensor in held}
        self.place, self.hidden = OUTSIDE, 0.0
        self.found: dict[int, tuple[int, Any]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in self.weights:
            self.found.setdefault(storage._cdata, (self.place, storage))  # kept, so that no other gets its address
        return tensor

    def by_place(self, layers: int) -> list[int]:
        """Bytes of each layer, then of what is outside."""
        sizes = [0] * (layers + 1)
        for place, storage in self.found.values():
            sizes[place] += storage.nbytes()  # 0 of gathered weights, which FSDP has let go of
        return sizes

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(find_decoder_layers(model)):
            handles.append(layer.register_forward_pre_hook(lambda *_, index=index: setattr(self, "place", index)))
            handles.append(layer.register_forward_hook(self._leave))
        try:
            with torch.enable_grad(), saved_tensors_hooks(self.pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        hidden = block_hidden_states(output)
        self.place, self.hidden = OUTSIDE, hidden.nbytes / hidden.shape[:-1].numel()


def _storage(tensor: Tensor) -> Any:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


@contextmanager
def training_whole(model: nn.Module) -> Iterator[None]:
    """In training mode, with no block computed again in backward."""
    was_training = model.training
    again = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    model.train()
    for module in again:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in again:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        model.train(was_training)


def measure(
    model: nn.Module, token_ids: Tensor, longest: int, noise: Mapping[int, Noise | NoiseFunction] | None = None,
    branches: Sequence[Branch] = (CLEAN,), packing: bool = False,
) -> Footprint:  # fmt: skip
    """Count what the forward pass keeps, on a row of at most `3 * UNIT` tokens.

    It draws dropout and noise; nothing else of the model changes. Of a launch all processes call it.

    Args:
        model: a `BranchedModel`, wrapped or not.
        token_ids: `[L]`, any.
        longest: tokens of the longest row that the model is to see; no longer one is tried.
        noise: of the run; measured only where its gradient is kept.
        branches: the kinds of the run.
        packing: whether a row is a packed batch, for which attention may keep a mask of all pairs of tokens.
    """
    unit, layers = max(1, min(UNIT, longest // 3)), len(find_decoder_layers(model))
    ids = token_ids.repeat(math.ceil(3 * unit / len(token_ids)))

    def amounts(kind: Branch) -> tuple[list[Amount], float]:
        sizes, hidden = [], 0.0
        for length in (unit, 2 * unit, 3 * unit):
            saved, row = _Saved(model), ids[:length].unsqueeze(0)
            mask = torch.ones_like(row)
            # One position, of which no loss is made: the head's own share is counted apart.
            how: dict[str, Any] = {"branches": (kind,), "noise": noise, "strategy": "separate"}
            if packing:  # of two rows, as of one there is no mask
                first = max(1, length // 2)
                mask[:, first:] = 2
                how["packing"] = Packing.of(mask.flatten().bincount()[1:])
            with saved.watching(model):
                one = row.new_zeros(1)
                model(row, mask, one, one, **how, chunk_losses=lambda *_: {})
            sizes.append(saved.by_place(layers))
            hidden = saved.hidden
        return [Amount.through(unit, *values) for values in zip(*sizes, strict=True)], hidden

    with training_whole(model):
        (*blocks, outside), hidden = amounts(CLEAN)
        kept = {kind: Amount() for kind in Branch}
        if noise and NOISY in branches and any(getattr(one, "gradient", True) for one in noise.values()):
            kept[NOISY] = _mean_difference(amounts(NOISY)[0], [*blocks, outside], len(noise))
        if DROPOUT in branches:
            kept[DROPOUT] = _mean_difference(amounts(DROPOUT)[0], [*blocks, outside], layers)
    pop_noise_sizes(model)
    vocabulary = find_causal_lm(model).config.get_text_config(decoder=True).vocab_size
    return Footprint(tuple(blocks), replace(outside, fixed=0.0), kept[NOISY], kept[DROPOUT], hidden, vocabulary)


def _mean_difference(more: Sequence[Amount], less: Sequence[Amount], count: int) -> Amount:
    def mean(of: Callable[[Amount], float]) -> float:
        return (sum(map(of, more)) - sum(map(of, less))) / count

    return Amount(mean(lambda a: a.fixed), mean(lambda a: a.per_token), mean(lambda a: a.per_pair))
