"""What it costs that noise arrives in 16 bits: `add_noise`, which rounds by chance, against an addition that rounds.

    python benchmarks/low_precision.py [--rounds 7] [--size small]

A step in bfloat16 with the one and with the other, in turns within one process; each ratio is formed within a turn.
Then the additions by themselves, against a step in float32: where bfloat16 is slow, as on most CPUs, nothing would show
in a step of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from step_cost import NOISY, Costs
from torch import Tensor
from ways import SIZES, Size, Steps

from noisefit.base.precision import add_noise
from noisefit.fork import hooks

CHANCE, PLAIN, FLOAT32 = "rounded by chance", "plain addition", "float32"
NOISY_BRANCHES = 2


def plain_addition(hidden_states: Tensor, noise: Tensor) -> Tensor:
    """`hidden_states + noise`, rounded to the nearest: what most of the noise does not survive."""
    return hidden_states + noise.to(hidden_states.dtype)


ADDITIONS = {PLAIN: plain_addition, CHANCE: add_noise}


@contextmanager
def adding(addition: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let the hooks add noise in this way."""
    usual, hooks.add_noise = hooks.add_noise, addition
    try:
        yield
    finally:
        hooks.add_noise = usual


def time_steps(size: Size, costs: Costs, layers: Sequence[int], rounds: int) -> None:
    """Steps in bfloat16 with either addition, and in float32, in turns; the first round warms up and is not timed."""
    exact = Steps(replace(size, dtype=torch.float32), costs.device)
    steps = Steps(replace(size, dtype=torch.bfloat16), costs.device)
    names = list(ADDITIONS)
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):  # neither is always the first
            with adding(ADDITIONS[name]), costs.timed(name):
                steps.ours(layers)
        with costs.timed(FLOAT32):
            exact.ours(layers)
    for seconds in costs.seconds.values():
        del seconds[0]


def time_additions(size: Size, costs: Costs, repeats: int = 60) -> dict[str, float]:
    """Milliseconds of one addition in a step, a median; they take turns as well."""
    shape = (size.rows, size.length, size.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(costs.device, torch.bfloat16).requires_grad_()
    noise = torch.randn(shape, generator=generator).to(costs.device) / 1000
    alone = Costs(costs.device)
    for _ in range(repeats):
        for name, addition in ADDITIONS.items():
            with alone.timed(name):
                addition(hidden, noise)
    return {name: 1000 * statistics.median(seconds[repeats // 6 :]) for name, seconds in alone.seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="times that every step is timed")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="as for step_cost.py")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, costs = SIZES[args.size], Costs(device)
    first = size.layers - size.layers // 4
    layers = list(range(first, min(first + NOISY, size.layers)))
    count = NOISY_BRANCHES * len(layers)

    time_steps(size, costs, layers, args.rounds)
    alone = time_additions(size, costs)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{replace(size, dtype=torch.bfloat16)}; noise in layers {layers[0]}-{layers[-1]}, {count} additions a step")
    print(f"on {where}, torch {torch.__version__}, {args.rounds} rounds\n")
    print(f"{'':<24}{'ms a step':>12}{'ms an addition':>18}")
    for name in (PLAIN, CHANCE, FLOAT32):
        step = 1000 * statistics.median(costs.seconds[name])
        print(f"{name:<24}{step:>12.1f}" + (f"{alone[name]:>18.3f}" if name in alone else ""))
    ratios = costs.ratios(CHANCE, PLAIN)
    print(
        f"\na step with {CHANCE}, over one with {PLAIN}: {statistics.median(ratios):.4f} "
        f"({ratios[0]:.4f} to {ratios[-1]:.4f})"
    )
    more = count * (alone[CHANCE] - alone[PLAIN])
    for dtype, name in (("bfloat16", PLAIN), (FLOAT32, FLOAT32)):
        share = more / 1000 / statistics.median(costs.seconds[name])
        print(f"what the additions of a step take more, {more:.2f} ms, over a step in {dtype}: {share:.2%}")


if __name__ == "__main__":
    main()
