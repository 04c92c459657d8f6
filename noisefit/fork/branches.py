"""The branches of a batch, clean and noisy, in one forked forward pass or in separate ones.

Up to the output of the first noisy layer the branches are identical, so the fork runs that prefix once, turns its
`[B, L, H]` into the rows of all branches, `[3B, L, H]` for three, and goes on. Nothing here knows an architecture: all
of it is hooks on the decoder's blocks (`noisefit.fork.hooks`). With no dropout in the prefix the fork equals separate
passes; with dropout, the branches share the prefix's dropout mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noisefit.base.compiling import are_compiled, compiling_if
from noisefit.fork.decoder import find_causal_lm, find_decoder_layers, logits_of
from noisefit.fork.hooks import Noise, NoiseFunction, layer_hooks
from noisefit.fork.packing import Packing
from noisefit.fork.passes import (
    BRANCHES,
    CLEAN,
    DROPOUT,
    NOISY,
    STRATEGIES,
    TEACHER,
    Branch,
    check_branches,
    decoder_pass,
    full_pass,
    run_branches,
)
from noisefit.fork.tally import TokenTally, hits_and_entropy

__all__ = ["BRANCHES", "CLEAN", "DROPOUT", "NOISY", "STRATEGIES", "TEACHER", "Branch", "BranchedModel",
           "branch_hidden_states", "check_branches", "run_branches"]  # fmt: skip

Logits = Mapping[Branch, Sequence[Tensor]]
"""Of each kind the logits `[N, V]` of its branches, in their order; no branch of a kind is an empty sequence."""

Losses = dict[str, Tensor]
"""A loss's name to its sum over tokens, a scalar."""

ChunkLosses = Callable[..., Losses]
"""`(logits, target_tokens [N]) -> losses` of one chunk of tokens; of a batch with weights
`(logits, target_tokens [N], target_weights [N]) -> losses`."""


class BranchedModel(nn.Module):
    """A causal language model whose forward pass runs the branches and reduces them to the sums of the losses.

    One call of `forward` is one pass through an ordinary module, so DDP and FSDP see nothing unusual. The losses
    themselves are the caller's: `forward` calls `chunk_losses` with the logits of a chunk of supervised tokens at a
    time, so that the memory for logits is `branches x loss_chunk_size x vocabulary` however large the batch.

    Args:
        model: a transformers causal language model, with or without a PEFT adapter.
        loss_chunk_size: supervised tokens a chunk.
        dropout: of `DROPOUT` branches: the share of the elements dropped of what each block adds to the hidden
            states, in training mode, besides what the model has of its own.
    """

    def __init__(self, model: nn.Module, loss_chunk_size: int, dropout: float = 0.0):
        super().__init__()
        self.model = model
        self.loss_chunk_size = loss_chunk_size
        self.dropout = dropout
        layer_hooks(model)  # now, so that they stand before those of whatever wraps this module
        # Here accelerate reads which modules FSDP gathers one at a time; else it gathers the whole model at once.
        self._no_split_modules = sorted({type(layer).__name__ for layer in find_decoder_layers(model)})

    def tie_weights(self) -> None:
        """accelerate calls this where it has made new parameters (FSDP): those that were shared must be so again, and
        no others: a model's files may hold two where its configuration says that they are one."""
        find_causal_lm(self.model).tie_weights(recompute_mapping=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        target_positions: Tensor | None = None,
        target_tokens: Tensor | None = None,
        target_weights: Tensor | None = None,
        teacher: Tensor | Any = None,
        noise_mask: Tensor | None = None,
        packing: Packing | None = None,
        *,
        branches: Sequence[Branch] = BRANCHES,
        noise: Mapping[int, Noise | NoiseFunction] | None = None,
        strategy: str = "fork",
        chunk_losses: ChunkLosses | None = None,
        clean_states: Tensor | None = None,
        tally: TokenTally | None = None,
    ) -> Losses | Tensor:
        """Run the branches and sum the losses over the supervised tokens.

        Args:
            input_ids: `[B, L]`, int64, padded on the right.
            attention_mask: `[B, L]`, 1 at real tokens; of a packed batch the number of the token's row, from 1.
            target_positions: `[N]`, int64, the positions that predict a supervised token, as indices into the
                `B * L` positions of the batch.
            target_tokens: `[N]`, int64, the token that each of them predicts. `N` may be 0.
            target_weights: `[N]`, the weights of these tokens, for `chunk_losses`; `None` where all are 1.
            teacher: what this returned of a teacher's pass without `chunk_losses`: its logits are `TEACHER`'s; or what
                is known of its predictions, `[N, ..]` by its `split`, given to `chunk_losses` as it is.
            noise_mask: `[B, L]`, for the noise in place of `attention_mask`: the tokens that get it.
            packing: where the rows of a packed batch lie, `[1, L]` tokens; `None` where each row is one.
            branches: of which kind each one is.
            noise: the index of a layer, or `EMBEDDING`, to its noise: a `Noise`, or a function of hidden states, the
                number of the branch (of the noisy ones, from 1) and the mask. Empty: clean and noisy branches are one,
                which stands for all.
            strategy: `fork`, `separate`, or `full_logits` (separate passes through the model's own forward, all
                logits in memory: for a model whose logits cannot be formed from a chunk of hidden states).
            chunk_losses: forms the sums of one chunk. `None`: no branches and no losses, the clean pass alone.
            clean_states: `[B, L, H]`, the final hidden states of the clean branch, the first, where they are known;
                then it is not run.
            tally: gets how well the clean branch, or else the first, predicts the supervised tokens.

        Returns:
            The sums of `chunk_losses` over all chunks, by name; without it the final hidden states `[B, L, H]`, or
            where there are `target_positions` those at them, `[N, H]` (under `full_logits` the logits, `[N, V]`).

        Raises:
            ValueError: a branch is of no known kind, or a layer or strategy is none.
        """
        check_branches(branches)
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if target_positions is None:
            return decoder_pass(self.model, input_ids, attention_mask, packing)
        # Attention that looks to the left never sees padding on the right. The fork's is told that there is none: with
        # padding, the mask would be a dense one, which keeps SDPA from its fastest kernels. The noise has the real
        # mask, and `choose_strategy` checks that nothing else changes.
        mask = torch.ones_like(attention_mask) if strategy == "fork" else attention_mask
        one_pass = full_pass if strategy == "full_logits" else decoder_pass
        run = functools.partial(one_pass, self.model, input_ids, mask, packing)
        if chunk_losses is None:
            return run().flatten(0, 1).index_select(0, target_positions)
        assert target_tokens is not None
        states = run_branches(
            self.model,
            len(input_ids),
            noise or {},
            "fork" if strategy == "fork" else "separate",
            run,
            branches if clean_states is None else branches[1:],
            self.dropout,
            attention_mask if noise_mask is None else noise_mask,
        )
        if clean_states is not None:
            states = torch.cat([clean_states.unsqueeze(0).to(states), states])
        states = states.flatten(1, 2).index_select(1, target_positions)
        are_logits = strategy == "full_logits"
        arguments = chunk_losses, branches, are_logits, target_weights, teacher, tally
        return self.sum_losses(states, target_tokens, *arguments)

    def sum_losses(
        self,
        states: Tensor,
        target_tokens: Tensor,
        chunk_losses: ChunkLosses,
        branches: Sequence[Branch] = BRANCHES,
        are_logits: bool = False,
        target_weights: Tensor | None = None,
        teacher: Tensor | Any = None,
        tally: TokenTally | None = None,
    ) -> Losses:
        """The sums of the losses, a chunk of supervised tokens at a time, all but the last computed again in backward.

        Args:
            states: `[branches, N, H]`, final hidden states of the branches at the supervised positions, or
                `[1, N, H]` where all are one; `[.., N, V]` where they are logits already.
            target_tokens: `[N]`, int64.
            chunk_losses, branches: as for `forward`.
            are_logits: whether `states` are logits, and `teacher` is.
            target_weights, teacher: `[N]` and `[N, ..]`, or `None`, as for `forward`.
            tally: as for `forward`.
        """
        check_branches(branches)
        # Backward begins with the last chunk, so keeping its logits takes no more memory than computing them again. The
        # rest of an uneven division goes first, so that the chunk that is not computed again is a whole one.
        count, size = len(target_tokens), self.loss_chunk_size
        # Without a supervised token there is one empty chunk: its zero is tied to every parameter, which must all take
        # part in the gradient reduction or the other processes hang.
        sizes = [part for part in (count % size, *[size] * (count // size)) if part] or [0]
        # What `chunk_losses` gets besides the logits.
        targets = [part.split(sizes) for part in (target_tokens, target_weights) if part is not None]
        taught = [None] * len(sizes) if teacher is None else teacher.split(sizes)
        chunks = list(zip(states.split(sizes, dim=1), taught, zip(*targets, strict=True), strict=True))
        sums: Losses = {}
        compiling = are_compiled(states.device.type)
        for number, chunk in enumerate(chunks, 1):
            arguments = (*chunk, chunk_losses, branches, are_logits, tally is not None, compiling)
            if number < len(chunks):
                losses, counted = checkpoint(self._chunk_sums, *arguments, use_reentrant=False)
            else:
                losses, counted = self._chunk_sums(*arguments)
            sums = _added(sums, losses)
            if tally is not None and counted is not None:  # here, and not where a chunk is computed again
                tally.add(counted)
        return sums

    def _chunk_sums(
        self,
        states: Tensor,
        teacher: Tensor | Any,
        targets: tuple[Tensor, ...],
        chunk_losses: ChunkLosses,
        branches: Sequence[Branch],
        are_logits: bool,
        counting: bool,
        compiling: bool,
    ) -> tuple[Losses, Tensor | None]:
        logits = states if are_logits else logits_of(self.model, states)
        # Without noise all are one tensor: views of an expanded one would have three times its gradient.
        each = list(logits) if len(logits) == len(branches) else [logits[0]] * len(branches)
        of_kind: dict[Branch, list[Any]] = {kind: [] for kind in Branch}
        for kind, part in zip(branches, each, strict=True):
            of_kind[kind].append(part)
        if teacher is not None:
            with torch.no_grad():
                is_known = are_logits or not isinstance(teacher, Tensor)
                of_kind[TEACHER] = [teacher if is_known else logits_of(self.model, teacher.to(states))]
        with compiling_if(compiling):
            losses = chunk_losses(of_kind, *targets)
        return losses, hits_and_entropy((of_kind[CLEAN] or each)[0], targets[0]) if counting else None


def _added(sums: Losses, more: Losses) -> Losses:
    return sums | {name: sums[name] + value if name in sums else value for name, value in more.items()}


def branch_hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, noise: Mapping[int, Callable[[Tensor, int], Tensor]],
    strategy: str = "fork",
) -> Tensor:  # fmt: skip
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
    run = functools.partial(decoder_pass, model, input_ids, attention_mask, None)
    functions = {layer: _without_mask(function) for layer, function in noise.items()}
    return run_branches(model, len(input_ids), functions, strategy, run).expand(len(BRANCHES), -1, -1, -1)


def _without_mask(function: Callable[[Tensor, int], Tensor]) -> NoiseFunction:
    return lambda hidden_states, branch, mask: function(hidden_states, branch)
