"""What a NoiseFiT step costs in time and memory, as a ratio to plain fine-tuning of the same model in the same run.

    python benchmarks/step_cost.py [--rounds 5] [--size small] [--supervised 32] [--picture step_cost.png]

One optimizer step with LoRA: forward, backward, clip, AdamW. The ways take turns, so that a machine whose speed drifts
slows all of them; each ratio is the median over the rounds of the ratio to plain fine-tuning in that round. Memory is
the peak of one step over what was there before it (weights, optimizer): on a GPU the allocator's, on a CPU counted
tensor by tensor. The floor is what the fork must cost by counting, see `ways.floor`. TRL takes part where it is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peak_memory import PeakMemory
from ways import NOISE_STD, SIZES, Size, Steps, check_picture, floor, head_share, other_noise, plain_losses

from noisefit.method import calibration
from noisefit.method.snr import layer_snr

PLAIN, TRL = "plain fine-tuning", "TRL's SFTTrainer"
NOISY = 3  # layers with noise
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)  # scales that a calibration tries


class Costs:
    """Seconds and peak memory of every way, measured piece by piece."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    @contextlib.contextmanager
    def weighed(self, name: str) -> Iterator[None]:
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            yield
            self.memory[name] = torch.cuda.max_memory_allocated() - before
        else:
            with PeakMemory() as memory:
                yield
            self.memory[name] = memory.peak

    def ratios(self, name: str, to: str = PLAIN) -> list[float]:
        """A ratio a round, ascending."""
        return sorted(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))

    def ratio(self, name: str, to: str = PLAIN) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios(name, to))

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(ways: dict[str, Callable[[], object]], size: Size, costs: Costs, rounds: int) -> str | None:
    """Let the ways take turns: one round to warm up, one to weigh them, then `rounds` timed ones.

    Returns:
        TRL's version, where it took part.
    """
    measures = [contextlib.nullcontext, costs.weighed, *[costs.timed] * rounds]
    now = iter(measures)  # TRL's trainer runs the show where it is installed, and our ways go between its steps
    current: list = []

    def begin() -> None:
        current[:] = [next(now)]
        current.append(current[0](TRL))
        current[1].__enter__()

    def end() -> None:
        current[1].__exit__(None, None, None)

    def ours() -> None:
        for name, step in ways.items():
            with current[0](name):
                step()

    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        from trl_steps import train_with_trl

        return train_with_trl(size, costs.device, len(measures), begin, end, ours)
    for kind in measures:
        current[:] = [kind]
        ours()
    return None


def print_kinds(costs: Costs, layers: Sequence[int], live: str, others: Sequence[str]) -> None:
    """The kinds of noise in the same layers; the spread is that of the rounds."""
    title = f"noise in layers {layers[0]}-{layers[-1]}"
    print(f"\n{title:<32}{'time':>8}{'to live':>8}{'memory':>9}{'MB':>8}   to live in every round")
    for name in (live, *others):
        ratios, memory = costs.ratios(name, live), costs.memory[name]
        spread = f"   {ratios[0]:.2f} to {ratios[-1]:.2f}" if name != live else ""
        print(
            f"{'live' if name == live else name:<32}{costs.ratio(name):>8.2f}{statistics.median(ratios):>8.2f}"
            f"{memory / costs.memory[PLAIN]:>9.2f}{memory / 2**20:>8.0f}{spread}"
        )


def draw(path: str, size: Size, costs: Costs, ways: dict[int, str], share: float, where: str) -> None:
    """Cost against the first noisy layer, with its floor and the costs that do not depend on it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    layers = list(ways)
    others = [
        (f"published: three passes, all logits (layers 0-{NOISY - 1})", "published", "tab:red"),
        ("separate passes", "separate", "tab:purple"),
    ]
    for label, name, colour in others:
        found = next(way for way in costs.seconds if way.startswith(name))
        axes.axhline(costs.ratio(found), color=colour, linewidth=1.2)
        axes.text(size.layers - 0.8, costs.ratio(found), label, color=colour, ha="right", va="bottom", fontsize=9)
    if TRL in costs.seconds:
        axes.axhline(costs.ratio(TRL), color="tab:gray", linewidth=1.2)
        axes.text(
            -0.2, costs.ratio(TRL), "TRL, plain fine-tuning", color="tab:gray", ha="left", va="bottom", fontsize=9
        )
    axes.axhline(1, color="black", linewidth=1.2)
    axes.text(-0.2, 1, "plain fine-tuning", ha="left", va="bottom", fontsize=9)
    axes.plot(layers, [floor(size, k, share) for k in layers], "--", color="tab:blue", label="floor, by counting FLOPs")
    axes.plot(layers, [costs.ratio(ways[k]) for k in layers], "o-", color="tab:blue", label="NoiseFiT, one forked pass")
    axes.set(xlabel=f"first of {NOISY} noisy layers", ylabel="time of a step, plain fine-tuning = 1", ylim=(0, None))
    axes.set_xticks(layers)
    axes.set_title(f"{size.name}, {size.layers} layers, on {where}", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.8), fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that every way is timed")
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="small",
        help="tiny is for trying this out; llama-1b, llama-7b and qwen-0.5b need a GPU",
    )
    parser.add_argument("--supervised", type=int, help="supervised tokens a row; default: the size's own")
    parser.add_argument("--picture", metavar="FILE", help="draw cost against the first noisy layer (needs matplotlib)")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    if args.supervised is not None and not 1 <= args.supervised < SIZES[args.size].length:
        parser.error(f"--supervised: expected 1 to {SIZES[args.size].length - 1} of a row's tokens")
    check_picture(parser, args.picture)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[args.size]
    if args.supervised is not None:
        size = replace(size, supervised=args.supervised)
    steps, costs = Steps(size, device), Costs(device)
    n = size.layers

    def noisy(first: int) -> list[int]:
        return list(range(first, min(first + NOISY, n)))

    firsts = range(n) if args.picture else (0, n // 2 - 1, n - n // 4)
    forks = {first: f"fork, noise in layers {first}-{noisy(first)[-1]}" for first in firsts}
    batch = steps.batch()

    @torch.no_grad()
    def plain_forward() -> None:
        steps.branched(**batch, chunk_losses=plain_losses)

    ways: dict[str, Callable[[], object]] = {PLAIN: steps.ours}
    ways |= {name: functools.partial(steps.ours, noisy(first)) for first, name in forks.items()}
    late, kinds = noisy(n - n // 4), other_noise()
    live = forks[late[0]]
    ways |= {name: functools.partial(steps.ours, late, kind=noise) for name, noise in kinds.items()}
    counting = {PLAIN: "plain, a step that is logged", live: "fork, a step that is logged"}
    ways |= {name: functools.partial(steps.ours, layers, counting=True)
             for name, layers in zip(counting.values(), ([], late), strict=True)}  # fmt: skip
    ways |= {
        f"separate passes, layers 0-{NOISY - 1}": functools.partial(steps.ours, noisy(0), "separate"),
        f"published way, layers 0-{NOISY - 1}": functools.partial(steps.published, noisy(0)),
        f"published way, layers {n - NOISY}-{n - 1}": functools.partial(steps.published, noisy(n - NOISY)),
        **{f"{name} as the teacher, no noise": functools.partial(steps.taught, name) for name in steps.teachers},
        "plain forward pass": plain_forward,
        "SNR of all layers": functools.partial(layer_snr, steps.branched, batch, NOISE_STD),
        "calibration": functools.partial(calibration.measure, steps.branched, [batch], range(n), FACTORS, "fork"),
    }
    share = head_share(steps)
    version = measure(ways, size, costs, args.rounds)

    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{size}; loss chunks of {steps.branched.loss_chunk_size} tokens")
    print(f"on {where}, torch {torch.__version__}, TRL {version or 'is not installed'}, {args.rounds} rounds")
    print(f"the head's share of a plain step's FLOPs: {share:.1%}\n")
    print(f"{'':<32}{'time':>8}{'floor':>8}{'memory':>9}{'MB':>8}")
    floors = {PLAIN: 1.0} | {name: floor(size, first, share) for first, name in forks.items()}
    for name in [*([TRL] if version else []), *ways]:
        if name == "plain forward pass":
            break
        if name in kinds:
            continue
        counted = f"{floors[name]:.2f}" if name in floors else ""
        memory = costs.memory[name]
        print(
            f"{name:<32}{costs.ratio(name):>8.2f}{counted:>8}{memory / costs.memory[PLAIN]:>9.2f}{memory / 2**20:>8.0f}"
        )
    print_kinds(costs, late, live, list(kinds))
    print()
    for published, fork in zip((n - NOISY, 0), (live, forks[0]), strict=True):
        name = f"published way, layers {published}-{published + NOISY - 1}"
        print(f"{name}, over {fork}: {costs.ratio(name, fork):.2f}")
    for way, name in counting.items():
        more, bytes_more = costs.ratio(name, way) - 1, costs.memory[name] - costs.memory[way]
        print(f"accuracy and entropy in a step that is logged, over {way}: {more:+.1%}, {bytes_more / 2**20:+.1f} MB")
    snr = costs.ratio("SNR of all layers", "plain forward pass")
    print(f"measuring the SNR of all layers, in plain forward passes: {snr:.2f}")
    calibrated = costs.ratio("calibration", "plain forward pass")
    print(
        f"calibrating the noise of {n} layers at {len(FACTORS)} scales, in plain forward passes: {calibrated:.1f}; the "
        f"published way makes {n * len(FACTORS) + 1}"
    )
    if args.picture:
        draw(args.picture, size, costs, forks, share, where)


if __name__ == "__main__":
    main()
