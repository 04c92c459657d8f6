"""Peak memory of a step at a vocabulary of 128,256, and how the loss's share grows with `--loss_chunk_size`.

    python benchmarks/loss_memory.py [--picture loss_memory.png]

Nothing is computed and no GPU is needed: the models exist in shape alone, and the bytes of all tensors that a step
makes are counted as they come and go. `tests/benchmarks/test_benchmarks.py` holds the count against what a process
really takes. A step is one of the loop on a GPU in mixed precision: an adapter in float32, with dropout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peak_memory import PeakMemory
from shapes import filled, in_mixed_precision, in_shape_alone, shape_of
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from ways import LLAMA_1B, QWEN_HALF_B, Size, Steps, check_picture, noisefit_losses

from noisefit.fork.branches import BRANCHES
from noisefit.inputs.models import ModelSettings

GIB = 2**30
CHUNKS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = ((2, 1024), (8, 1024), (32, 1024))  # rows, length


def peak(step: Callable[[], object]) -> float:
    with PeakMemory() as memory:
        step()
    return memory.peak / GIB


class LoopSteps(Steps):
    """Steps with the loop's own settings of the model, in shape alone; to be used within `in_shape_alone`."""

    def __init__(self, size: Size, gradient_checkpointing: bool = False):
        settings = ModelSettings(gradient_checkpointing=gradient_checkpointing)
        model = filled(shape_of(size.config, settings, size.dtype))
        model.config.use_cache = False
        precision = "bf16" if size.dtype == torch.bfloat16 else "no"
        with unset_fake_temporarily():  # the rows have contents
            super().__init__(size, "cpu", model=in_mixed_precision(model, precision))
        in_mixed_precision(self.branched, precision)

    def _update(self, loss: Tensor) -> Tensor:
        """Backward alone: AdamW asks its tensors for their values, and holds less than a forward pass."""
        loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        return loss.detach()


def step_table(size: Size) -> None:
    """One optimizer step of every way, with all activations kept and with gradient checkpointing."""
    n, quarter = size.layers, size.layers // 4
    print(f"\npeak memory of a step over weights and optimizer, in GiB: {size}")
    print(f"{'':<30}{'':>10}{'with gradient checkpointing':>34}")
    columns = []
    for checkpointing in (False, True):
        steps = LoopSteps(size, checkpointing)
        first, last = list(range(3)), list(range(n - quarter, n - quarter + 3))
        columns.append(
            {
                "plain fine-tuning": peak(steps.ours),
                f"fork, noise in layers {last[0]}-{last[-1]}": peak(lambda s=steps, k=last: s.ours(k)),
                "fork, noise in layers 0-2": peak(lambda s=steps, k=first: s.ours(k)),
                "separate passes": peak(lambda s=steps, k=first: s.ours(k, "separate")),
                "published way": peak(lambda s=steps, k=first: s.published(k)),
            }
        )
    published = [column["published way"] for column in columns]
    for name in columns[0]:
        kept, again = columns[0][name], columns[1][name]
        shares = f"{kept:>8.1f}  {kept / published[0]:>5.2f}{again:>14.1f}  {again / published[1]:>5.2f}"
        print(f"{name:<30}{shares}")
    print("the second figure is the share of the published way")


def loss_alone(steps: Steps, size: Size, rows: int, length: int, chunk: int) -> float:
    """GiB that the head and the three losses take, forward and backward, over the hidden states and their gradient."""
    steps.branched.loss_chunk_size = chunk
    count = rows * (length - 1)
    states = torch.empty(
        len(BRANCHES), count, size.config.hidden_size, dtype=size.dtype, device="meta", requires_grad=True
    )
    tokens = torch.empty(count, dtype=torch.long, device="meta")

    def run() -> None:
        sum(steps.branched.sum_losses(states, tokens, noisefit_losses).values()).backward()

    return peak(run) - states.nbytes / GIB


def curves(size: Size) -> tuple[dict[tuple[int, int], list[float]], dict[tuple[int, int], float]]:
    steps = Steps(size, "meta")
    chunked = {batch: [loss_alone(steps, size, *batch, chunk) for chunk in CHUNKS] for batch in BATCHES}
    at_once = {(rows, length): loss_alone(steps, size, rows, length, rows * length) for rows, length in BATCHES}
    return chunked, at_once


def draw(
    path: str, size: Size, chunked: dict[tuple[int, int], list[float]], full: dict[tuple[int, int], float]
) -> None:
    """Memory against the chunk size, for every batch, and what all logits at once take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    for (batch, values), marker, area in zip(chunked.items(), "osD", (30, 80, 170), strict=True):
        rows, length = batch
        colour = axes.plot(CHUNKS, values, linewidth=1)[0].get_color()
        axes.scatter(CHUNKS, values, s=area, marker=marker, facecolors="none", edgecolors=colour)
        axes.axhline(full[batch], color=colour, linestyle="--", linewidth=1)
        label = f"{rows} rows of {length}: all logits at once, {full[batch]:.0f} GiB"
        axes.text(CHUNKS[0], full[batch] * 1.06, label, color=colour, ha="left", va="bottom", fontsize=9)
    few, many = BATCHES[0], BATCHES[-1]
    if chunked[many][0] > 1.2 * chunked[few][0]:
        label = f"at {CHUNKS[0]}, the gradient of {many[0]} rows of hidden states is larger"
        axes.text(CHUNKS[0] * 1.25, 0.21, label, ha="left", va="center", fontsize=9)
    axes.text(300, 0.8, "in chunks: the same for the three batches", ha="left", va="top", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(0.15, 250)
    axes.set_xticks(CHUNKS, [str(chunk) for chunk in CHUNKS])
    axes.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.set(xlabel="--loss_chunk_size, supervised tokens", ylabel="GiB for the head and the losses")
    axes.set_title(
        f"{size.name}, vocabulary {size.config.vocab_size:,}, all tokens supervised, three branches", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", metavar="FILE", help="draw memory against the chunk size (needs matplotlib)")
    args = parser.parse_args(arguments)
    check_picture(parser, args.picture)
    chunked, full = curves(LLAMA_1B)
    print(f"memory for the head and the losses of three branches, in GiB: {LLAMA_1B.name}, all tokens supervised")
    print(f"{'rows x length':<16}" + "".join(f"{chunk:>8}" for chunk in CHUNKS) + f"{'at once':>10}")
    for (rows, length), sizes in chunked.items():
        line = "".join(f"{value:>8.2f}" for value in sizes) + f"{full[rows, length]:>10.1f}"
        print(f"{rows:>3} x {length:<10}{line}")
    if args.picture:
        draw(args.picture, LLAMA_1B, chunked, full)
    for size in (LLAMA_1B, QWEN_HALF_B):
        with in_shape_alone():
            step_table(size)


if __name__ == "__main__":
    main()
