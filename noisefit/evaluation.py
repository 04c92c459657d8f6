"""Cross-entropy on held-out rows, without noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from noisefit import losses
from noisefit.batches import collate, count_targets, cut_step
from noisefit.objectives import CLEAN
from noisefit.prompts import Example


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    strategy: str,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
) -> float:
    """Mean cross-entropy over all supervised tokens of `examples`, each row counted once on any number of processes.

    Args:
        accelerator: of the run. All processes call this.
        model: the prepared `BranchedModel`; evaluated in eval mode and left in its former one.
        strategy: the run's, as `choose_strategy` gave it.
        examples: the held-out rows.
        batch_size: rows a batch, on each device.
        pad_token_id: for `collate`.

    Returns:
        Nats a token.
    """

    def clean_cross_entropy(clean: Sequence[Tensor], noisy: Sequence[Tensor], target_tokens: Tensor) -> Tensor:
        return losses.cross_entropy(clean[0], target_tokens).unsqueeze(0)

    total = torch.zeros(1, device=accelerator.device)
    was_training = model.training
    model.eval()
    for rows in cut_step(examples, batch_size, accelerator.num_processes, accelerator.process_index):
        batch = collate(rows, pad_token_id, accelerator.device)
        total += model(**batch, branches=(CLEAN,), strategy=strategy, chunk_losses=clean_cross_entropy)
    model.train(was_training)
    return accelerator.reduce(total, "sum").item() / count_targets(examples)
