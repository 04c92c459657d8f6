"""The start-up check: does this model allow the fork, and can its logits be formed from a chunk of hidden states?"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from noisefit.base.errors import InputError, notice
from noisefit.base.precision import as_float64, masked_mean, without_tf32
from noisefit.fork.branches import BRANCHES, CLEAN, DROPOUT, NOISY, STRATEGIES, Branch, Logits, Losses
from noisefit.fork.packing import pack

ROWS, TOKENS = 2, 48  # of the first batch; two rows, so that a batch dimension is not mistaken for a broadcast one

# Largest difference that reordered sums explain, as a share of the largest logit. A wrong fork is off by about 1.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
INT8_TOLERANCE = 0.1  # 8-bit layers round their inputs by the outliers of the whole batch


def tolerance_of(model: nn.Module, dtype: torch.dtype) -> float:
    """The largest difference, as a share of the largest logit, that is rounding in this model and not a wrong fork.

    Args:
        model: wrapped or not.
        dtype: of its logits. Layers of fewer bits may compute in another one, and say so (bitsandbytes' of 4 bits have
            a `compute_dtype`): the coarsest decides.
    """
    if any(parameter.dtype == torch.int8 for parameter in model.parameters()):
        return INT8_TOLERANCE
    named = [getattr(module, "compute_dtype", None) for module in model.modules()]
    return max(TOLERANCE[of_some] for of_some in (dtype, *named) if of_some in TOLERANCE)


@torch.no_grad()
@without_tf32()
def choose_strategy(
    model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[int], requested: str,
    branches: Sequence[Branch] = BRANCHES,
) -> tuple[str, str | None]:  # fmt: skip
    """The cheapest way of running the branches that gives the model's own logits, tried on a slice of `batch`.

    The same explicit noise goes through the fork, through separate passes, and through separate passes of the
    model's own forward with all logits; the last is the truth that the others must equal.

    Args:
        model: a `BranchedModel`, wrapped or not.
        batch: `input_ids` and `attention_mask`, `[B, L]`.
        layers: the noisy layers, or `EMBEDDING`.
        requested: `auto`, `fork` or `separate`.
        branches: the kind of each branch.

    Returns:
        A strategy of `BranchedModel.forward`, and one line that says why a cheaper one is not used, or `None`.

    Raises:
        InputError: `requested` is `fork`, and the fork is not exact for this model.
    """
    noise = {layer: functools.partial(_explicit_noise, layer) for layer in layers}
    batch = _slice(batch)
    was_training = model.training
    model.eval()
    try:
        truth, tolerance = _truth(model, batch, noise, branches)
        strategies = STRATEGIES[1:] if requested == "separate" else STRATEGIES
        reason = None
        for strategy in strategies:
            problem = _problem(model, batch, noise, branches, strategy, truth, tolerance)
            if problem is None:
                break
            what = "the forked forward pass" if strategy == "fork" else "forming logits from a chunk of hidden states"
            reason = f"{what} is not exact for this model ({problem})"
    finally:
        model.train(was_training)
    # Every process must run the branches the same way: the most cautious one decides for all.
    strategy, reason = max(gather_object([(strategy, reason)]), key=lambda choice: STRATEGIES.index(choice[0]))
    if requested == "fork" and strategy != "fork":
        raise InputError(f"--branches fork: {reason}; use --branches auto")
    if reason is not None:
        reason += "; training on separate passes" + (", all logits in memory" if strategy == "full_logits" else "")
    return strategy, reason


@torch.no_grad()
@without_tf32()
def can_pack(
    model: nn.Module, batch: Mapping[str, Any], layers: Collection[int], strategy: str,
    branches: Sequence[Branch] = BRANCHES,
) -> bool:  # fmt: skip
    """Whether rows that are packed do not see each other in this model, tried on a slice of `batch`; if not, a line.

    Packed, with the strategy of the run, they must give the logits that the model itself gives them padded.

    Args:
        model, layers, branches: as for `choose_strategy`.
        batch: a padded one, as there.
        strategy: that it chose.
    """
    batch = _slice(batch, neighbours=True)
    real = batch["attention_mask"].bool()
    was_training = model.training
    model.eval()
    try:
        padded = {layer: functools.partial(_explicit_noise, layer) for layer in layers}
        truth, tolerance = _truth(model, batch, padded, branches)
        packed = {layer: functools.partial(_explicit_noise, layer, real=real) for layer in layers}
        problem = _problem(model, pack(batch), packed, branches, strategy, truth, tolerance)
    finally:
        model.train(was_training)
    problems = [found for found in gather_object([problem]) if found is not None]
    if problems:
        notice(f"--packing: rows are padded, as packed ones are not exact for this model ({problems[0]})")
    return not problems


def _slice(batch: Mapping[str, Any], neighbours: bool = False) -> dict[str, Any]:
    """The first tokens of the first rows of a batch, all of them supervised, with some padding."""
    ids, mask = (batch[name][:ROWS, :TOKENS] for name in ("input_ids", "attention_mask"))
    if neighbours and len(ids) == 1:
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    mask = mask.clone()
    if padded := ids.shape[1] // 3:  # the fork is not told which tokens are padding: attention to the right would show
        mask[-1, -padded:] = 0
    positions = mask.flatten().nonzero().flatten()
    targets = {"target_positions": positions, "target_tokens": ids.flatten()[positions]}
    return {"input_ids": ids, "attention_mask": mask} | targets


def _truth(
    model: nn.Module, batch: Mapping[str, Any], noise: Mapping, branches: Sequence[Branch]
) -> tuple[Tensor, float]:
    """The logits of separate passes of the model's own forward, and how far others may be from them."""
    truth, dtype = _logits(model, batch, noise, branches, "full_logits")
    return truth, tolerance_of(model, dtype)


def _problem(
    model: nn.Module, batch: Mapping[str, Tensor], noise: Mapping, branches: Sequence[Branch], strategy: str,
    truth: Tensor, tolerance: float,
) -> str | None:  # fmt: skip
    """What is wrong with this strategy, in a few words; `None` where its logits are the true ones."""
    try:
        logits, _ = _logits(model, batch, noise, branches, strategy)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture's own code runs here on shapes it was not written for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if logits.shape != truth.shape:
        return f"logits of shape {tuple(logits.shape)} instead of {tuple(truth.shape)}"
    difference = ((logits - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()
    return None if difference <= tolerance else f"logits differ by {difference:.1e} of the largest"


def _logits(
    model: nn.Module, batch: Mapping[str, Tensor], noise: Mapping, branches: Sequence[Branch], strategy: str
) -> tuple[Tensor, torch.dtype]:
    """The branches' logits at the slice's real tokens, `[branches, N, V]` float64, and the model's dtype."""
    chunks: list[Tensor] = []

    def collect(logits: Logits, target_tokens: Tensor) -> Losses:
        chunks.append(torch.stack([*logits[CLEAN], *logits[DROPOUT], *logits[NOISY]]))
        return {}

    how: dict[str, Any] = {"branches": branches, "noise": noise, "strategy": strategy}
    model(**batch, **how, chunk_losses=collect)
    return as_float64(torch.cat(chunks, dim=1)), chunks[0].dtype


def _explicit_noise(
    layer: int, hidden: Tensor, branch: int, mask: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Noise `[B, L, H]`, about half as strong as the signal at real tokens (what is at padded ones differs between
    strategies), the same whenever a layer and branch are asked for it; of a packed batch, `real` is the padded mask."""
    shape = hidden.shape if real is None else (*real.shape, hidden.shape[-1])
    wave = torch.sin(torch.arange(math.prod(shape), device=hidden.device) * 0.7 + 3.0 * branch + layer).view(shape)
    wave = wave if real is None else wave[real].unsqueeze(0)
    return (wave * 0.5 * masked_mean(hidden.float().abs(), mask)).to(hidden.dtype)
