"""Cross-entropy on held-out rows, without noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from noisefit.fork.branches import CLEAN, Logits, Losses
from noisefit.inputs.batches import collate, count_targets, cut_step
from noisefit.inputs.prompts import Example
from noisefit.method.losses import cross_entropy


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

    def clean_cross_entropy(logits: Logits, target_tokens: Tensor) -> Losses:
        [clean] = logits[CLEAN]
        return {"ce": cross_entropy(clean, target_tokens)}

    total = torch.zeros(1, device=accelerator.device)
    was_training = model.training
    model.eval()
    for rows in cut_step(examples, batch_size, accelerator.num_processes, accelerator.process_index):
        batch = collate(rows, pad_token_id, accelerator.device)
        losses = model(**batch, branches=(CLEAN,), strategy=strategy, chunk_losses=clean_cross_entropy)
        total += losses["ce"]
    model.train(was_training)
    return accelerator.reduce(total, "sum").item() / count_targets(examples)
