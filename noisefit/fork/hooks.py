"""Hooks on a model's embedding and decoder blocks: where the branches of a batch part, and get noise or dropout.

Nothing here knows an architecture. The hooks are registered once, for the model's life, and idle except during a pass
of `noisefit.fork.branches`: gradient checkpointing runs some of them again during backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisefit.base.precision import DROPPED_BITS, EPS, add_noise, mean_change, mean_magnitude, root_mean_square
from noisefit.fork.decoder import block_hidden_states, find_causal_lm, find_decoder, find_decoder_layers
from noisefit.fork.packing import BORDERS, repeat_borders

EMBEDDING = -1  # the index of the token embedding, among those of the layers
INPUT = -2  # the branches have rows of their own from the token ids on


class Noise(Protocol):
    """Noise whose size at each element is known before it is drawn, see `noisefit.method.noise`.

    `hidden_states`, scale and noise are `[B, L, H]`; `mask` is `[B, L]`, non-zero at real tokens (1, or the number of
    their row where rows are packed), or `None`. Where `gradient` is false, the hidden states that it sees have none.
    """

    gradient: bool

    def scale(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor: ...

    def capped(self, scale: Tensor, hidden_states: Tensor, mask: Tensor | None) -> Tensor: ...

    def draw(self, scale: Tensor) -> Tensor: ...

    def mean_size(self, scale: Tensor, mask: Tensor | None) -> Tensor: ...


NoiseFunction = Callable[[Tensor, int, Tensor | None], Tensor]
"""`(hidden_states [B, L, H], branch from 1, mask [B, L], 1 at real tokens) -> noise [B, L, H]`."""


@dataclass(frozen=True)
class Pass:
    """What the hooks do during one pass through the model.

    Attributes:
        noise: a layer's index, or `EMBEDDING`, to the noise that its output gets.
        branches: the number of each branch that takes part; 0 gets no noise, the others are told apart by it.
        batch_size: rows of a branch.
        mask: `[B, L]`, non-zero at real tokens; `None` where all are real.
        fork_layer: at whose output one row becomes a row of each branch, or `INPUT`.
        dropout: for each branch, the share dropped of the elements that a block adds to the hidden states.
    """

    noise: Mapping[int, Noise | NoiseFunction]
    branches: tuple[int, ...]
    batch_size: int
    mask: Tensor | None = None
    fork_layer: int = INPUT
    dropout: tuple[float, ...] = ()


class LayerHooks:
    """The hooks of one model, idle except inside `applying`.

    Attributes:
        sizes: of every draw in training mode, by layer, `[2]`: `mean(|noise|) / mean(|hidden states|)`, and the root
            mean square of the hidden states that got it.
    """

    def __init__(self, model: nn.Module):
        self.sizes: dict[int, list[Tensor]] = {}
        layers = find_decoder_layers(model)
        self.num_layers = len(layers)
        self.current: Pass | None = None
        embedding = find_causal_lm(model).get_input_embeddings()
        embedding.register_forward_hook(functools.partial(self._after, EMBEDDING), with_kwargs=True)
        for index, layer in enumerate(layers):
            self.register(index, layer)

    def register(self, index: int, layer: nn.Module) -> None:
        """Let a module be the decoder block of this index."""
        layer.register_forward_pre_hook(functools.partial(self._before, index), with_kwargs=True)
        layer.register_forward_hook(functools.partial(self._after, index), with_kwargs=True)

    @contextmanager
    def applying(self, this_pass: Pass | None) -> Iterator[None]:
        previous, self.current = self.current, this_pass
        try:
            yield
        finally:
            self.current = previous

    def _before(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        this_pass = self.current
        if this_pass is None or this_pass.fork_layer == INPUT or index <= this_pass.fork_layer:
            return None
        copies = len(this_pass.branches)
        return tuple(_repeat(value, this_pass.batch_size, copies) for value in (args, kwargs))

    def _after(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        this_pass = self.current
        if this_pass is None:
            return None
        noise = this_pass.noise.get(index) if any(this_pass.branches) else None
        drops = any(this_pass.dropout) and index != EMBEDDING
        if noise is None and not drops:
            return None
        hidden, count = block_hidden_states(output), len(this_pass.branches)
        # Each branch draws from its own rows alone: the noise's statistics are those of a branch.
        rows = [hidden] * count if index == this_pass.fork_layer else list(hidden.chunk(count))
        if drops:
            before = (args[0] if args else kwargs["hidden_states"]).chunk(count)
            for i, share in enumerate(this_pass.dropout):
                rows[i] = before[i] + F.dropout(rows[i] - before[i], share, module.training) if share else rows[i]
        if noise is not None:
            sizes = self.sizes.setdefault(index, []) if module.training else None
            rows = _with_noise(noise, rows, this_pass.branches, this_pass.mask, sizes)
        hidden = torch.cat(rows) if count > 1 else rows[0]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _with_noise(
    noise: Noise | NoiseFunction, rows: Sequence[Tensor], branches: Sequence[int], mask: Tensor | None,
    sizes: list[Tensor] | None,
) -> list[Tensor]:  # fmt: skip
    """The rows of each branch with noise of its own; how large it is, and they are, is added to `sizes`."""
    noisy, known, scale, meant, signal = list(rows), None, None, None, None
    for i, (hidden, branch) in enumerate(zip(rows, branches, strict=True)):
        if not branch:
            continue
        is_new, known = hidden is not known, hidden  # where the fork is, all branches start from one tensor
        if callable(noise):
            drawn = noise(hidden, branch, None if mask is None else mask.clamp(max=1))
        else:
            if is_new or scale is None:
                seen = hidden if noise.gradient else hidden.detach()
                scale = noise.capped(noise.scale(seen, mask), hidden, mask)
                measured = sizes is not None and hidden.dtype not in DROPPED_BITS  # there it is what arrives
                meant = noise.mean_size(scale.detach(), mask) if measured else None
            drawn = noise.draw(scale)
        noisy[i] = add_noise(hidden, drawn)
        if sizes is not None:
            with torch.no_grad():
                if is_new or signal is None:
                    signal = mean_magnitude(hidden, mask) + EPS, root_mean_square(hidden, mask)
                size = _arrived(hidden, noisy[i], drawn, meant, mask)
                sizes.append(torch.stack([size / signal[0], signal[1]]))  # on the device: `.item()` would stall a GPU
    return noisy


def _arrived(hidden: Tensor, noisy: Tensor, drawn: Tensor, meant: Tensor | None, mask: Tensor | None) -> Tensor:
    """`mean(|noise|)`: of what arrived in 16 bits; in 32 all does, and its mean over all draws may be known."""
    if hidden.dtype in DROPPED_BITS:
        return mean_change(hidden, noisy, mask)
    return mean_magnitude(drawn, mask) if meant is None else meant


def pop_noise_sizes(model: nn.Module) -> dict[int, Tensor]:
    """Of each layer with noise the mean of `LayerHooks.sizes` over its draws since the last call, `[2]`."""
    hooks = layer_hooks(model)
    sizes, hooks.sizes = hooks.sizes, {}
    return {layer: torch.stack(values).mean(dim=0) for layer, values in sizes.items() if values}


def layer_hooks(model: nn.Module) -> LayerHooks:
    """The hooks of this model, registered at the first call; and every checkpointing function bound to its pass."""
    decoder = find_decoder(model)
    if "_noisefit_hooks" not in vars(decoder):
        vars(decoder)["_noisefit_hooks"] = LayerHooks(model)
    hooks: LayerHooks = vars(decoder)["_noisefit_hooks"]
    for module in decoder.modules():
        checkpointing = vars(module).get("_gradient_checkpointing_func")
        if checkpointing is not None and getattr(checkpointing, "func", None) is not _checkpoint_in_its_pass:
            bound = functools.partial(_checkpoint_in_its_pass, hooks, checkpointing)
            vars(module)["_gradient_checkpointing_func"] = bound
    return hooks


def _checkpoint_in_its_pass(hooks: LayerHooks, checkpointing: Callable, function: Callable, *args: Any) -> Any:
    """Gradient checkpointing runs a block again during backward, with its hooks where transformers checkpoints the
    block's `__call__` (up to 5.17 and some later; newer ones checkpoint `forward`, inside the hooks). The
    second run must see the pass of the first one, not whichever pass came last."""
    this_pass = hooks.current

    def function_in_its_pass(*args: Any) -> Any:
        with hooks.applying(this_pass):
            return function(*args)

    return checkpointing(function_in_its_pass, *args)


def _repeat(value: Any, batch_size: int, copies: int) -> Any:
    """Repeat for the branches every tensor of the batch, at any nesting: `[B, ...]` of two dimensions or more."""
    if isinstance(value, Tensor):
        if value.dim() < 2 or value.shape[0] != batch_size:
            return value
        # One row needs no copies: of a packed batch, the mask is the largest of all.
        of_one = value.expand if batch_size == 1 else value.repeat
        return of_one(copies, *[-1 if batch_size == 1 else 1] * (value.dim() - 1))
    if isinstance(value, dict):
        borders = {key: repeat_borders(value[key], copies) for key in BORDERS if value.get(key) is not None}
        return {key: _repeat(item, batch_size, copies) for key, item in value.items()} | borders
    if type(value) in (tuple, list):
        return type(value)(_repeat(item, batch_size, copies) for item in value)
    return value
