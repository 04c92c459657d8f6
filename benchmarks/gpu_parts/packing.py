"""Rows of mixed lengths, padded and packed, by `train_loop.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_parts.material import Row, difference, installed, is_full, one_line, scratch, speed, train
from gpu_parts.training import flags


def packing(device: str, size: str) -> Iterator[Row]:
    """The same training with and without `--packing`, by each attention that is there."""
    precision = "bf16" if device == "cuda" else "no"
    with scratch() as folder:
        settings = flags(folder, size) | {"save_steps": 0, "lora_dropout": 0.0, "loss_mode": "basefit"}
        settings |= {"batch_size": 16 if is_full(size) else 4, "max_steps": 12 if is_full(size) else 4}
        for attention in ("sdpa", *["flash_attention_2"] * (device == "cuda" and installed("flash_attn"))):
            padded: list[dict[str, Any]] = []
            for packed in (False, True):
                row: Row = {"attention": attention, "rows": "packed" if packed else "padded"}
                output = str(folder / f"{attention}-{packed}")
                how = settings | {"attn_implementation": attention, "packing": packed, "output_model": output}
                try:
                    lines = train(device, precision, **how)
                    row |= {"tokens a second": speed(lines)}
                    row |= {"peak GiB": lines[-1]["peak_memory_gib"], "last loss": lines[-1]["loss"]}
                    if packed and padded:
                        row["against padded"] = difference(padded, lines)
                    padded = padded or lines
                except Exception as error:  # of an attention that is not for this GPU, or memory that ran out
                    row["tokens a second"] = one_line(error)
                yield row
