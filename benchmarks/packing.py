"""An optimizer step of rows of mixed lengths, padded and packed, as a ratio from one run.

    python benchmarks/packing.py [--longest 512] [--rounds 5] [--attention sdpa]

16 rows in 4 micro-batches, cut as `train_loop.py` cuts them: padded rows by length, packed ones by tokens. Lengths are
log-normal: half of the rows have less than a sixth of the longest. Memory is the step's peak over weights. Times are of
forward and backward passes, by turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from step_cost import Costs
from ways import NOISE_STD, SIZES, Steps, noisefit_losses, plain_losses

from noisefit.base.compiling import chunk_size_on
from noisefit.fork.branches import CLEAN, BranchedModel
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.inputs.batches import Batch, collate, count_tokens, cut_step
from noisefit.inputs.prompts import Example
from noisefit.method.noise import TokenScaledNoise

ROWS, MICRO_BATCH = 16, 4
PADDED, PACKED = "{}, padded", "{}, packed"
KINDS = {"plain": (), "fork, noise in the first layers": (0, 1, 2)}


def mixed_rows(longest: int, vocabulary: int) -> list[Example]:
    """Rows of log-normal lengths, the longest one among them; the last third of each is supervised."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(ROWS, generator=generator).exp() * longest / 6).int().clamp(8, longest)
    lengths[0] = longest
    rows = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths.tolist()]
    return [Example(ids, len(ids) * 2 // 3) for ids in rows]


def step(model: BranchedModel, batches: Sequence[Batch], layers: Sequence[int]) -> None:
    """Forward and backward over the micro-batches."""
    noise = {layer: TokenScaledNoise(NOISE_STD) for layer in layers}
    how = {"chunk_losses": noisefit_losses} if noise else {"chunk_losses": plain_losses, "branches": (CLEAN,)}
    for batch in batches:
        sum(model(**batch, noise=noise, **how).values()).backward()
    model.zero_grad()
    pop_noise_sizes(model)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="two at least")
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[options.size]
    config = type(size.config)(**size.config.to_dict() | {"max_position_embeddings": options.longest})
    config._attn_implementation = options.attention
    model = BranchedModel(Steps(replace(size, config=config, rows=1, length=8, supervised=4), device).model,
                          chunk_size_on(device))  # fmt: skip
    rows = mixed_rows(options.longest, config.vocab_size)
    costs = Costs(device)

    def batches(packing: bool) -> list[Batch]:
        return [collate(part, 0, device, packing=packing) for part in cut_step(rows, MICRO_BATCH, packing=packing)]

    padded, packed = batches(False), batches(True)
    ways = {PADDED.format(kind): partial(step, model, padded, layers) for kind, layers in KINDS.items()}
    ways |= {PACKED.format(kind): partial(step, model, packed, layers) for kind, layers in KINDS.items()}
    for measure in (costs.weighed, *[costs.timed] * options.rounds):
        for name, run in ways.items():
            with measure(name):
                run()
    padding = 1 - count_tokens(rows) / sum(batch["input_ids"].numel() for batch in padded)
    shortest = min(len(row.input_ids) for row in rows)
    print(f"{ROWS} rows of {shortest} to {options.longest} tokens; {padding:.0%} of the padded step is padding; "
          f"{options.attention}, {device}; packed to padded:")  # fmt: skip
    for kind in KINDS:
        to, name = PADDED.format(kind), PACKED.format(kind)
        low, *_, high = costs.ratios(name, to)
        memory = costs.memory[name] / costs.memory[to]
        print(f"  {kind:32} time {costs.ratio(name, to):.2f} ({low:.2f} to {high:.2f}), memory {memory:.2f}")


if __name__ == "__main__":
    main()
