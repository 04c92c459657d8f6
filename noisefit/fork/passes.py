"""The passes of a batch's branches through a model: what each branch is, and one forked pass or one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from noisefit.fork.decoder import find_causal_lm, find_decoder
from noisefit.fork.hooks import EMBEDDING, INPUT, Noise, NoiseFunction, Pass, layer_hooks
from noisefit.fork.packing import Packing


class Branch(Enum):
    """How a branch of the batch differs from the others."""

    CLEAN = "clean"  # the model as it is
    NOISY = "noisy"  # with noise of its own
    DROPOUT = "dropout"  # with dropout of its own
    TEACHER = "teacher"  # no branch of the batch: predictions from a pass of their own, without gradient


CLEAN, NOISY, DROPOUT, TEACHER = Branch
BRANCHES = (CLEAN, NOISY, NOISY)
STRATEGIES = ("fork", "separate", "full_logits")


def check_branches(branches: Sequence[Branch]) -> None:
    """Raise `ValueError` where a branch is of no known kind."""
    kinds = CLEAN, NOISY, DROPOUT
    if others := [kind for kind in branches if kind not in kinds]:
        raise ValueError(f"a branch is {others[0]!r}, expected one of {', '.join(map(str, kinds))}")


def run_branches(
    model: nn.Module, batch_size: int, noise: Mapping[int, Noise | NoiseFunction], strategy: str,
    run: Callable[[int], Tensor], branches: Sequence[Branch] = BRANCHES, dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Call `run`, which passes a batch of `batch_size` rows through `model`, so that it yields the branches.

    Args:
        model: a causal language model, wrapped or not.
        batch_size: `B`.
        noise: the index of a layer, or `EMBEDDING`, to its noise.
        strategy: `fork` or `separate`.
        run: called with the number of copies of the batch that are to go in as its rows.
        branches: the kind of each branch.
        dropout: of the `DROPOUT` branches.
        mask: `[B, L]`, non-zero at real tokens, for the noise; `None` where all are real.

    Returns:
        `[branches, B, ...]`; `[1, B, ...]` where they are all one, as there is neither noise nor dropout.
    """
    hooks = layer_hooks(model)
    if strategy not in ("fork", "separate"):
        raise ValueError(f"strategy is {strategy!r}, expected 'fork' or 'separate'")
    check_branches(branches)
    if unknown := [layer for layer in noise if layer not in range(EMBEDDING, hooks.num_layers)]:
        raise ValueError(f"noise for layers {unknown}, but the model's are 0 to {hooks.num_layers - 1}")
    if not noise and DROPOUT not in branches:
        return run(1).unsqueeze(0)
    numbers = tuple(branches[: i + 1].count(NOISY) if kind == NOISY else 0 for i, kind in enumerate(branches))
    dropped = tuple(dropout if kind == DROPOUT else 0.0 for kind in branches)
    count = len(branches)
    if strategy == "separate" or count == 1:
        separate = []
        for number, share in zip(numbers, dropped, strict=True):
            with hooks.applying(Pass(noise, (number,), batch_size, mask, dropout=(share,))):
                separate.append(run(1))
        return torch.stack(separate)
    # Dropout and noise on the embedding set the branches apart from the first layer on.
    fork_layer = INPUT if DROPOUT in branches or EMBEDDING in noise else min(noise)
    with hooks.applying(Pass(noise, numbers, batch_size, mask, fork_layer, dropped)):
        return run(count if fork_layer == INPUT else 1).unflatten(0, (count, batch_size))


def decoder_pass(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, packing: Packing | None = None, copies: int = 1
) -> Tensor:
    """Final hidden states `[copies * B, L, H]` of copies of a batch; `packing` is that of a packed one."""
    states: Tensor = find_decoder(model)(**_inputs(model, input_ids, attention_mask, packing, copies)).last_hidden_state
    return states


def full_pass(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, packing: Packing | None = None, copies: int = 1
) -> Tensor:
    """All logits of copies of a batch, `[copies * B, L, V]`, by the model's own forward."""
    logits: Tensor = find_causal_lm(model)(**_inputs(model, input_ids, attention_mask, packing, copies)).logits
    return logits


def _inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, packing: Packing | None, copies: int
) -> dict[str, Any]:
    mask = {"attention_mask": attention_mask.repeat(copies, 1)} if packing is None else packing.inputs(model, copies)
    return {"input_ids": input_ids.repeat(copies, 1), "use_cache": False} | mask
