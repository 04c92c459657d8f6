"""Packed batches: rows one after another in one sequence, without padding, that do not see each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noisefit.fork.decoder import find_decoder

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")  # transformers' names for them, as its flash attention takes them


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed batch `[1, T]` lie.

    Attributes:
        position_ids: `[1, T]` int64, from 0 on in each row. Where they start again transformers' masks part the rows.
        borders: `[rows + 1]` int32, where each row begins, and the end.
        longest: tokens of the longest row.
    """

    position_ids: Tensor
    borders: Tensor
    longest: int

    @staticmethod
    def of(lengths: Tensor) -> Packing:
        """Of rows of these lengths, `[rows]` int64."""
        ends = lengths.cumsum(0)
        positions = torch.arange(int(ends[-1]), device=lengths.device) - (ends - lengths).repeat_interleave(lengths)
        borders = torch.cat([ends.new_zeros(1), ends]).int()
        return Packing(positions.unsqueeze(0), borders, int(lengths.max()))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """The same on another device."""
        position_ids, borders = (
            part.to(device, non_blocking=non_blocking) for part in (self.position_ids, self.borders)
        )
        return Packing(position_ids, borders, self.longest)

    def inputs(self, model: nn.Module, copies: int = 1) -> dict[str, Any]:
        """What a model is told in place of an attention mask, where `copies` of the batch go in as its rows."""
        told = {"attention_mask": None, "position_ids": self.position_ids.repeat(copies, 1)}
        if "flash" not in (find_decoder(model).config.get_text_config(decoder=True)._attn_implementation or ""):
            return told
        # By itself flash attention looks for rows in a batch of one alone, and a fork makes that three.
        longest = {"max_length_q": self.longest, "max_length_k": self.longest}
        return told | longest | dict.fromkeys(BORDERS, repeat_borders(self.borders, copies))


def pack(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A padded batch as one row, `[1, T]`, of its rows without their padding, one behind the other.

    Masks then have the number of a token's row, from 1, where they had 1. `packing` says where the rows lie.

    Args:
        batch: as `noisefit.inputs.batches.collate` makes it; on the CPU, as a device would be waited for.
    """
    real = batch["attention_mask"].bool()
    numbers = torch.arange(1, len(real) + 1, device=real.device).unsqueeze(1)
    packed = dict(batch, input_ids=batch["input_ids"][real].unsqueeze(0), packing=Packing.of(real.sum(dim=1)))
    for name in {"attention_mask", "noise_mask"} & batch.keys():
        packed[name] = (batch[name] * numbers)[real].unsqueeze(0)
    packed["target_positions"] = (real.flatten().cumsum(0) - 1)[batch["target_positions"]]
    return packed


def repeat_borders(borders: Tensor, copies: int) -> Tensor:
    """The borders of the rows in `copies` of a packed batch, one behind the other: `[copies * rows + 1]`."""
    return torch.cat([borders[:1], *(borders[1:] + i * borders[-1] for i in range(copies))])
