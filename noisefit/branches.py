"""The clean and the two noisy branches of a batch, in one forked forward pass or in three separate ones.

Up to the output of the first noisy layer the branches are identical, so the fork runs that prefix once, turns its
`[B, L, H]` into `[3B, L, H]` and goes on. Nothing here knows an architecture: all of it is hooks on the decoder's
blocks. With no dropout in the prefix the fork equals three separate passes; with dropout, the branches share the
prefix's dropout mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noisefit.decoder import block_hidden_states, find_causal_lm, find_decoder, find_decoder_layers, logits_of

BRANCHES = 3  # clean, noisy 1, noisy 2
STRATEGIES = ("fork", "separate", "full_logits")

Noise = Callable[[Tensor, int], Tensor]
"""`(hidden_states [B, L, H], branch 1 or 2) -> noise [B, L, H]`."""

ChunkLosses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(clean [N, V], noisy_1 [N, V], noisy_2 [N, V], target_tokens [N]) -> sums [K]` of one chunk of tokens."""


class BranchedModel(nn.Module):
    """A causal language model whose forward pass runs the branches and reduces them to the sums of the losses.

    One call of `forward` is one pass through an ordinary module, so DDP and FSDP see nothing unusual. The losses
    themselves are the caller's: `forward` calls `chunk_losses` with the logits of a chunk of supervised tokens at a
    time, so that the memory for logits is `3 x loss_chunk_size x vocabulary` however large the batch.

    Args:
        model: a transformers causal language model, with or without a PEFT adapter.
        loss_chunk_size: supervised tokens a chunk.
    """

    def __init__(self, model: nn.Module, loss_chunk_size: int):
        super().__init__()
        self.model = model
        self.loss_chunk_size = loss_chunk_size
        _layer_hooks(model)  # now, so that they stand before those of whatever wraps this module
        # Here accelerate reads which modules FSDP gathers one at a time; else it gathers the whole model at once.
        self._no_split_modules = sorted({type(layer).__name__ for layer in find_decoder_layers(model)})

    def tie_weights(self) -> None:
        """accelerate calls this where it has made new parameters (FSDP): shared weights must be shared again."""
        find_causal_lm(self.model).tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        target_positions: Tensor | None = None,
        target_tokens: Tensor | None = None,
        *,
        noise: Mapping[int, Callable[..., Tensor]] | None = None,
        strategy: str = "fork",
        chunk_losses: ChunkLosses | None = None,
    ) -> Tensor:
        """Run the branches and sum the losses over the supervised tokens.

        Args:
            input_ids: `[B, L]`, int64, padded on the right.
            attention_mask: `[B, L]`, 1 at real tokens.
            target_positions: `[N]`, int64, the positions that predict a supervised token, as indices into the
                `B * L` positions of the batch.
            target_tokens: `[N]`, int64, the token that each of them predicts. `N` may be 0.
            noise: a layer's index to its noise, called as `(hidden_states, branch, mask=attention_mask)`. Empty:
                there is one branch, and it stands for all three.
            strategy: `fork`, `separate`, or `full_logits` (three separate passes through the model's own forward,
                all logits in memory: for a model whose logits cannot be formed from a chunk of hidden states).
            chunk_losses: forms the sums of one chunk. `None`: no branches and no losses, the clean pass alone.

        Returns:
            `[K]`, the sums of `chunk_losses` over all chunks; without it the final hidden states `[B, L, H]`.
        """
        if chunk_losses is None:
            return _decoder_pass(self.model, input_ids, attention_mask)
        assert target_positions is not None and target_tokens is not None
        run = _full_pass if strategy == "full_logits" else _decoder_pass
        # Attention that looks to the left never sees padding on the right. The fork's is told that there is none: with
        # padding, the mask would be a dense one, which keeps SDPA from its fastest kernels. The noise has the real
        # mask, and `choose_strategy` checks that nothing else changes.
        mask = torch.ones_like(attention_mask) if strategy == "fork" else attention_mask
        states = run_branches(
            self.model,
            len(input_ids),
            {layer: functools.partial(draw, mask=attention_mask) for layer, draw in (noise or {}).items()},
            "fork" if strategy == "fork" else "separate",
            functools.partial(run, self.model, input_ids, mask),
        )
        states = states.flatten(1, 2).index_select(1, target_positions)
        return self.sum_losses(states, target_tokens, chunk_losses, are_logits=strategy == "full_logits")

    def sum_losses(
        self, states: Tensor, target_tokens: Tensor, chunk_losses: ChunkLosses, are_logits: bool = False
    ) -> Tensor:
        """The sums of the losses, a chunk of supervised tokens at a time, all but the last computed again in backward.

        Args:
            states: `[3, N, H]`, final hidden states of the branches at the supervised positions, or `[1, N, H]` where
                the three are one; `[.., N, V]` where they are logits already.
            target_tokens: `[N]`, int64.
            chunk_losses: as for `forward`.
            are_logits: whether `states` are logits.

        Returns:
            `[K]`.
        """
        # Backward begins with the last chunk, so keeping its logits takes no more memory than computing them again. The
        # rest of an uneven division goes first, so that the chunk that is not computed again is a whole one.
        count, size = len(target_tokens), self.loss_chunk_size
        # Without a supervised token there is one empty chunk: its zero is tied to every parameter, which must all take
        # part in the gradient reduction or the other processes hang.
        sizes = [part for part in (count % size, *[size] * (count // size)) if part] or [0]
        chunks = list(zip(states.split(sizes, dim=1), target_tokens.split(sizes), strict=True))
        sums: Any = 0
        for chunk, tokens in chunks[:-1]:
            arguments = (chunk, tokens, chunk_losses, are_logits)
            sums = sums + checkpoint(self._chunk_sums, *arguments, use_reentrant=False)
        return sums + self._chunk_sums(*chunks[-1], chunk_losses, are_logits)

    def _chunk_sums(self, states: Tensor, target_tokens: Tensor, chunk_losses: ChunkLosses, are_logits: bool) -> Tensor:
        logits = states if are_logits else logits_of(self.model, states)
        # Without noise the three are one tensor: views of an expanded one would have three times its gradient.
        clean, noisy_1, noisy_2 = logits if len(logits) == BRANCHES else [logits[0]] * BRANCHES
        return chunk_losses(clean, noisy_1, noisy_2, target_tokens)


def branch_hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, noise: Mapping[int, Noise], strategy: str = "fork"
) -> Tensor:
    """Final hidden states (after the decoder's last norm) of the clean and the two noisy branches.

    Args:
        model: a causal language model, wrapped or not.
        input_ids: `[B, L]`, int64.
        attention_mask: `[B, L]`, 1 at real tokens.
        noise: a layer's index to a function `(hidden_states [B, L, H], branch) -> noise`, `branch` 1 or 2, whose
            result is added to that layer's output.
        strategy: `fork` (one pass, the prefix run once) or `separate` (three passes).

    Returns:
        `[3, B, L, H]`: clean, noisy 1, noisy 2.
    """
    run = functools.partial(_decoder_pass, model, input_ids, attention_mask)
    return run_branches(model, len(input_ids), noise, strategy, run).expand(BRANCHES, -1, -1, -1)


def run_branches(
    model: nn.Module, batch_size: int, noise: Mapping[int, Noise], strategy: str, run: Callable[[], Tensor]
) -> Tensor:
    """Call `run`, which passes a batch of `batch_size` rows through `model`, so that it yields the branches.

    Returns:
        `[3, B, ...]`; `[1, B, ...]` where `noise` is empty, as the three branches are then one.
    """
    hooks = _layer_hooks(model)
    if strategy not in ("fork", "separate"):
        raise ValueError(f"strategy is {strategy!r}, expected 'fork' or 'separate'")
    if unknown := [layer for layer in noise if layer not in range(hooks.num_layers)]:
        raise ValueError(f"noise for layers {unknown}, but the model's are 0 to {hooks.num_layers - 1}")
    if not noise:
        return run().unsqueeze(0)
    if strategy == "fork":
        with hooks.applying(_Pass(noise, fork_layer=min(noise), batch_size=batch_size)):
            return run().unflatten(0, (BRANCHES, batch_size))
    branches = []
    for branch in range(BRANCHES):
        with hooks.applying(_Pass(noise, branch=branch, batch_size=batch_size)):
            branches.append(run())
    return torch.stack(branches)


def _decoder_pass(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    output = find_decoder(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state


def _full_pass(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return find_causal_lm(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@dataclass(frozen=True)
class _Pass:
    """What the hooks do during one pass through the model."""

    noise: Mapping[int, Noise]
    batch_size: int
    fork_layer: int | None = None  # None: a separate pass,
    branch: int = 0  # ... of this branch


class _LayerHooks:
    """Hooks on every decoder block, registered once and idle except inside `applying`."""

    def __init__(self, model: nn.Module):
        layers = find_decoder_layers(model)
        self.num_layers = len(layers)
        self._pass: _Pass | None = None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(self._before_layer, index), with_kwargs=True)
            layer.register_forward_hook(functools.partial(self._after_layer, index))

    @contextmanager
    def applying(self, this_pass: _Pass | None) -> Iterator[None]:
        previous, self._pass = self._pass, this_pass
        try:
            yield
        finally:
            self._pass = previous

    def _before_layer(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        this_pass = self._pass
        if this_pass is None or this_pass.fork_layer is None or index <= this_pass.fork_layer:
            return None
        return _repeat(args, this_pass.batch_size), _repeat(kwargs, this_pass.batch_size)

    def _after_layer(self, index: int, layer: nn.Module, args: Any, output: Any) -> Any:
        this_pass = self._pass
        if this_pass is None or index not in this_pass.noise:
            return None
        hidden, draw = block_hidden_states(output), this_pass.noise[index]
        if this_pass.fork_layer is None:
            if this_pass.branch == 0:
                return None
            hidden = hidden + draw(hidden, this_pass.branch)
        else:
            at_fork = index == this_pass.fork_layer
            clean, *noisy = [hidden] * BRANCHES if at_fork else hidden.chunk(BRANCHES)
            # Each branch draws from its own rows alone: the noise's statistics are those of a branch.
            hidden = torch.cat([clean, *(h + draw(h, branch) for branch, h in enumerate(noisy, start=1))])
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _layer_hooks(model: nn.Module) -> _LayerHooks:
    """The hooks of this model, registered at the first call; and every checkpointing function bound to its pass."""
    decoder = find_decoder(model)
    if "_noisefit_hooks" not in vars(decoder):
        vars(decoder)["_noisefit_hooks"] = _LayerHooks(model)
    hooks: _LayerHooks = vars(decoder)["_noisefit_hooks"]
    for module in decoder.modules():
        checkpointing = vars(module).get("_gradient_checkpointing_func")
        if checkpointing is not None and getattr(checkpointing, "func", None) is not _checkpoint_in_its_pass:
            bound = functools.partial(_checkpoint_in_its_pass, hooks, checkpointing)
            vars(module)["_gradient_checkpointing_func"] = bound
    return hooks


def _checkpoint_in_its_pass(hooks: _LayerHooks, checkpointing: Callable, function: Callable, *args: Any) -> Any:
    """Gradient checkpointing runs a block again during backward, with its hooks where transformers checkpoints the
    block's `__call__` (up to 5.17 and some later; newer ones checkpoint `forward`, inside the hooks). The
    second run must see the pass of the first one, not whichever pass came last."""
    this_pass = hooks._pass

    def function_in_its_pass(*args: Any) -> Any:
        with hooks.applying(this_pass):
            return function(*args)

    return checkpointing(function_in_its_pass, *args)


def _repeat(value: Any, batch_size: int) -> Any:
    """Repeat for the branches every tensor of the batch, at any nesting: `[B, ...]` of two dimensions or more."""
    if isinstance(value, Tensor):
        is_batch = value.dim() >= 2 and value.shape[0] == batch_size
        return value.repeat(BRANCHES, *[1] * (value.dim() - 1)) if is_batch else value
    if isinstance(value, dict):
        return {key: _repeat(item, batch_size) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_repeat(item, batch_size) for item in value)
    return value
