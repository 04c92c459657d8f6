"""Which rows make up an optimizer step, how a step is cut into micro-batches, and the tensors of a micro-batch."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from noisefit.fork.packing import pack
from noisefit.inputs.examples import Examples
from noisefit.inputs.prompts import Example
from noisefit.method.policy import ALL, PROMPT
from noisefit.method.top_k import TopK

Batch = dict[str, Any]
"""Tensors by name, what is known of a teacher's predictions, and where the rows of a packed batch lie."""


def steps_per_epoch(num_examples: int, rows_per_step: int) -> int:
    """Optimizer steps an epoch; the last one may have fewer rows."""
    return math.ceil(num_examples / rows_per_step)


def epoch_steps(
    examples: Sequence[Example], rows_per_step: int, seed: int, epoch: int, first_step: int = 0
) -> Iterator[list[Example]]:
    """The rows of each optimizer step of an epoch, every row once, in an order that `seed` and `epoch` determine.

    All processes know the whole step, so its supervised tokens are counted without asking the others, and the order
    does not depend on how many they are.

    Args:
        examples: all rows.
        rows_per_step: rows an optimizer step, over all micro-batches and processes.
        seed, epoch: determine the order.
        first_step: start at this step of the epoch.
    """
    order = epoch_order(len(examples), seed, epoch)
    for start in range(first_step * rows_per_step, len(order), rows_per_step):
        yield [examples[i] for i in order[start : start + rows_per_step].tolist()]


def epoch_order(num_examples: int, seed: int, epoch: int) -> torch.Tensor:
    """In which order an epoch takes the rows: their indices, `[rows]` int64."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_examples, generator=generator)


def row_lengths(rows: Sequence[Example]) -> np.ndarray:
    """Tokens of each row, `[rows]`; where they are known, no row is read for it."""
    return rows.lengths if isinstance(rows, Examples) else np.array([len(row.input_ids) for row in rows])


def cut_step(
    rows: Sequence[Example], batch_size: int, num_processes: int = 1, process_index: int = 0, packing: bool = False
) -> Iterator[list[Example]]:
    """This process's micro-batches of an optimizer step, each made when it is asked for.

    Rows are sorted by length within the step and nowhere else: that saves padding and, as a step's loss does not
    depend on how the step was cut, changes nothing. Every process gets equally many micro-batches of nearly equal
    size; one may be empty where rows are fewer than processes. Where rows are packed there is no padding to save:
    micro-batches, as many, then get nearly equally many tokens.

    Args:
        rows: the rows of the whole step.
        batch_size: rows a micro-batch at the most; where they are packed, on average at the most.
        num_processes, process_index: of the launch.
        packing: whether they are packed.
    """
    lengths = row_lengths(rows)
    order = np.argsort(-lengths, kind="stable").tolist()
    rounds = math.ceil(len(rows) / (batch_size * num_processes))
    parts = rounds * num_processes
    borders = [part * len(rows) // parts for part in range(parts + 1)]
    of_each = [order[start:end] for start, end in itertools.pairwise(borders)]
    if packing:
        of_each = _deal(order, lengths.tolist(), parts)
    # Part i goes to process i % num_processes: neighbours in length run at the same time.
    for part in of_each[process_index::num_processes]:
        yield [rows[i] for i in part]


def _deal(order: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Give rows, longest first, each to the part with the fewest tokens so far; of equal ones to the first."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    tokens = [(0, part) for part in range(parts)]
    for row in order:
        count, part = tokens[0]
        dealt[part].append(row)
        heapq.heapreplace(tokens, (count + lengths[row], part))
    return dealt


def count_targets(rows: Sequence[Example]) -> int:
    """Supervised tokens in these rows: what a step's losses are divided by."""
    if isinstance(rows, Examples):
        return rows.num_targets
    return sum(example.num_targets for example in rows)


def count_tokens(rows: Sequence[Example]) -> int:
    """Real tokens in these rows, prompts included, padding not."""
    return sum(len(example.input_ids) for example in rows)


def collate(
    rows: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu", noise_tokens: str = ALL,
    packing: bool = False,
) -> Batch:  # fmt: skip
    """The tensors of a micro-batch, right-padded, or packed.

    Args:
        rows: may be empty: the batch then is one row of padding without a supervised token.
        pad_token_id: fills padded positions.
        device: where the tensors go.
        noise_tokens: the value of `--noise_tokens`.
        packing: whether to leave the padding out, see `noisefit.fork.packing.pack`.

    Returns:
        `input_ids` and `attention_mask`, `[B, L]` int64; `target_positions` and `target_tokens`, `[N]` int64, see
        `BranchedModel.forward`. The indices are made here, on the CPU, as finding them on a GPU would stall it. Where
        some row's weight is not 1, also `target_weights`, `[N]` float32; and `teacher` where the rows have it; and
        where not all tokens get noise `noise_mask`, `[B, L]` int64.
    """
    length = max((len(example.input_ids) for example in rows), default=1)
    input_ids = torch.full((max(len(rows), 1), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    attention_mask[:, 0] = 1  # holds for every real row; an all-padding row would have nothing to attend to
    positions = [torch.empty(0, dtype=torch.long)]
    tokens = [torch.empty(0, dtype=torch.long)]
    for i, example in enumerate(rows):
        ids, end = torch.tensor(example.input_ids), len(example.input_ids)
        input_ids[i, :end] = ids
        attention_mask[i, :end] = 1
        for first, last in example.spans:
            positions.append(i * length + torch.arange(first - 1, last - 1))
            tokens.append(ids[first:last])
    batch: Batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "target_positions": torch.cat(positions),
        "target_tokens": torch.cat(tokens),
    }
    if any(example.weight != 1 for example in rows):
        counts = torch.tensor([example.num_targets for example in rows])
        batch["target_weights"] = torch.tensor([example.weight for example in rows]).repeat_interleave(counts)
    if noise_tokens != ALL:
        noise_mask = torch.zeros_like(attention_mask)
        noise_mask[:, 0] = not rows  # as above
        for i, example in enumerate(rows):
            noise_mask[i, : len(example.input_ids)] = noise_tokens == PROMPT
            for first, last in example.spans:
                noise_mask[i, first:last] = noise_tokens != PROMPT
        batch["noise_mask"] = noise_mask
    if taught := [example.teacher for example in rows if example.teacher is not None]:
        batch["teacher"] = TopK.joined(taught)
    batch = pack(batch) if packing else batch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
