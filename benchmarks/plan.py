"""What a run takes, before there is a machine for it: memory of a GPU, traffic and FLOPs of a step.

    python benchmarks/plan.py llama-70b --gpus 8 --sharding fsdp --length 1024 --gradient_checkpointing

The first word is a folder in the Hugging Face format (its config.json is enough), a model on the hub, or one of the
built-in shapes. Then the launch, and any flag of train_loop.py. Nothing is computed and no GPU is needed: the model
exists in shape alone (`shapes.py`), and activations and FLOPs are measured on a few tokens of it and scaled, as the run
itself does before its first step (`noisefit/run/footprint.py`). `tests/benchmarks/test_plan.py` holds this against what
processes hold, send and compute.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from counting import Model, Weights, model_of
from sizes import SHAPES

from noisefit.base.compiling import chunk_size_on
from noisefit.base.errors import one_line_errors
from noisefit.fork.branches import NOISY
from noisefit.fork.hooks import EMBEDDING
from noisefit.inputs.models import load_config
from noisefit.method.teacher import SELF
from noisefit.run.footprint import Amount, Way
from noisefit.run.noise_policy import first_eligible
from noisefit.run.optimizers import bytes_kept
from noisefit.run.settings import Settings, parse_arguments

GIB, GB = 2**30, 1e9
BYTES = {"no": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Mesh:
    """The processes of a launch, one a GPU.

    Attributes:
        gpus: of a node.
        nodes: machines.
        sharding: `ddp` or `fsdp` (FSDP2, over all GPUs); one GPU has neither.
        precision: the launch's mixed precision.
    """

    gpus: int = 1
    nodes: int = 1
    sharding: str = "ddp"
    precision: str = "bf16"

    @property
    def count(self) -> int:
        return self.gpus * self.nodes

    @property
    def sharded(self) -> bool:
        return self.sharding == "fsdp"


@dataclass(frozen=True)
class Plan:
    """What a run takes; memory in bytes a GPU, traffic in bytes that a GPU sends in a step, FLOPs of a GPU's step."""

    memory: dict[str, float]
    loading: dict[str, float]
    traffic: dict[str, float]
    flops: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def plan(model: Model, settings: Settings, mesh: Mesh, way: Way, length: int, supervised: int) -> Plan:
    """Put the counts together.

    Args:
        model: as `model_of` gives it.
        settings: of the run.
        mesh: of the launch.
        way: how a micro-batch is computed.
        length: tokens of a row.
        supervised: of each row.
    """
    return Plan(
        dict(_memory(model, settings, mesh, way, length, supervised)),
        dict(_loading(model, settings, mesh)),
        dict(_traffic(model, settings, mesh, way)),
        dict(_flops(model, settings, way, length, supervised)),
    )


def _memory(
    model: Model, settings: Settings, mesh: Mesh, way: Way, length: int, supervised: int
) -> Iterator[tuple[str, float]]:
    share, rows = mesh.count if mesh.sharded else 1, settings.batch_size
    frozen_bytes = 4 if settings.full_finetune else BYTES[mesh.precision]
    parts = [*model.blocks, model.outside]
    trained = 4.0 * model.sum("trained")
    yield "weights", sum(part.held(frozen_bytes, settings.quantization) for part in parts) / share
    yield "gradients", trained / share
    if mesh.count > 1 and not mesh.sharded:
        yield "DDP's buckets", trained
    yield "optimizer", bytes_kept(settings) * trained / share
    if mesh.sharded:
        # A block that is computed with, the next one on its way, and what is in no block; of one of them the gradients,
        # and the float32 that they are reduced in.
        weights = 2 * max(_gathered(block, mesh) for block in model.blocks) + _gathered(model.outside, mesh)
        yield "gathered", weights + max(part.trained for part in parts) * (BYTES[mesh.precision] + 4)
    footprint, tokens = model.footprint, rows * supervised
    yield "activations", footprint.kept(way, rows, length)
    yield "head or block", max(footprint.head(way, rows, length, tokens), footprint.again(way, rows, length))


def _gathered(part: Weights, mesh: Mesh) -> float:
    """Bytes of a part's weights when they are gathered: in the dtype that is computed in."""
    return float(part.frozen + part.trained) * BYTES[mesh.precision]


def _loading(model: Model, settings: Settings, mesh: Mesh) -> Iterator[tuple[str, float]]:
    dtype = 4 if settings.full_finetune else BYTES[mesh.precision]
    one = float(model.sum("frozen") + model.sum("trained")) * dtype
    if settings.quantization == "none":
        yield "of one process" if mesh.sharded else "of each process", one


def _traffic(model: Model, settings: Settings, mesh: Mesh, way: Way) -> Iterator[tuple[str, float]]:
    """Of rings, in which a GPU sends `(N - 1) / N` of what is gathered or scattered."""
    count = mesh.count
    if count == 1:
        return
    ring, micro = (count - 1) / count, settings.gradient_accumulation_steps
    trained = 4.0 * model.sum("trained")
    if not mesh.sharded:
        yield "all-reduce of gradients", 2 * ring * trained
        return
    passes = 1 if way.strategy == "fork" else way.count
    # FSDP learns of the end of a block's backward by the gradient of its input. The first block's has one where the
    # embedding is trained, and for checkpointing; else the block stays gathered for all passes.
    back = [passes] * len(model.blocks)
    if not (settings.full_finetune or way.checkpointing):
        back[0] = 1
    gathered, outside = [_gathered(block, mesh) for block in model.blocks], _gathered(model.outside, mesh)
    # What is outside stays gathered through a micro-batch.
    yield "all-gather, forward", ring * micro * (passes * sum(gathered) + outside)
    yield "all-gather, backward", ring * micro * sum(n * size for n, size in zip(back, gathered, strict=True))
    yield "reduce-scatter of gradients", ring * micro * trained  # of all passes at once


def _flops(model: Model, settings: Settings, way: Way, length: int, supervised: int) -> Iterator[tuple[str, float]]:
    rows, micro, flops = settings.batch_size, settings.gradient_accumulation_steps, model.flops
    copies = [way.copies(layer) for layer in range(len(model.blocks))]

    def blocks(amounts: Sequence[Amount], counts: Sequence[int]) -> float:
        return sum(amount.of(rows * n, length) for amount, n in zip(amounts, counts, strict=True))

    tokens = rows * supervised
    again = tokens - min(settings.loss_chunk_size, tokens)  # the last chunk is not computed twice
    yield "forward", micro * (blocks(flops.forward, copies) + way.count * tokens * flops.head)
    yield "backward", micro * (blocks(flops.backward, copies) + way.count * tokens * flops.head_backward)
    yield "computed again", micro * (blocks(flops.again, copies) + way.count * again * flops.head)
    if settings.teacher != SELF and not settings.cache_teacher:
        yield "teacher", micro * (blocks(flops.forward, [1] * len(copies)) + (tokens + again) * flops.head)


def way_of(
    settings: Settings, layers: int, noisy: Sequence[int] | None, strategy: str, precision: str = "bf16"
) -> Way:  # fmt: skip
    """How the run computes a micro-batch.

    Args:
        settings: of the run.
        layers: of the model.
        noisy: the layers with noise; `None`: as many as the settings say, from the first that may have it.
        strategy: `fork` or `separate`.
        precision: the launch's mixed precision.
    """
    objective = settings.objective
    if objective.noise == "embedding":
        chosen: tuple[int, ...] = (EMBEDDING,)
    elif objective.noise != "layers" or NOISY not in objective.branches:
        chosen = ()
    elif noisy is not None:
        chosen = tuple(sorted(noisy))
    else:
        first = first_eligible(settings.prefer_late_layers, layers)
        chosen = tuple(range(first, min(first + settings.num_noise_layers, layers))) if settings.noise_std else ()
    again, chunk = settings.gradient_checkpointing, settings.loss_chunk_size
    return Way(objective.branches, chosen, strategy, again, chunk, logit_bytes=BYTES[precision])


def tables(name: str, found: Plan, mesh: Mesh, way: Way, settings: Settings, length: int) -> Iterator[str]:
    """The plan, as a page of the documents has it."""
    launch = f"{mesh.count} GPUs ({mesh.sharding.upper().replace('FSDP', 'FSDP2')})" if mesh.count > 1 else "one GPU"
    where = f"noise from layer {way.noisy[0]} on, {way.strategy}" if way.noisy else "no noise"
    rows = settings.batch_size * settings.gradient_accumulation_steps * mesh.count
    yield f"{name}, {launch}, {mesh.precision}: {rows} rows of {length} tokens a step, {where}"
    yield ""
    yield "| GiB a GPU | |"
    yield "|---|---|"
    yield from (f"| {what} | {_figure(size / GIB)} |" for what, size in found.memory.items())
    yield f"| in all | {_figure(found.total / GIB)} |"
    for what, size in found.loading.items():
        yield f"| CPU memory {what}, while the model is loaded | {_figure(size / GIB)} |"
    if found.traffic:
        yield ""
        yield "| GB that a GPU sends in a step | |"
        yield "|---|---|"
        yield from (f"| {what} | {_figure(size / GB)} |" for what, size in found.traffic.items())
    yield ""
    yield "| TFLOP of a GPU in a step | |"
    yield "|---|---|"
    yield from (f"| {what} | {_figure(size / 1e12)} |" for what, size in found.flops.items())


def _figure(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False,
        epilog="any flag of train_loop.py may follow: --batch_size 2 --gradient_checkpointing ...",
    )  # fmt: skip
    parser.add_argument("model", help=f"a folder or a name on the hub, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--gpus", type=int, default=1, help="of a node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--sharding", choices=("ddp", "fsdp"), default="ddp", help="of more than one GPU")
    parser.add_argument("--mixed_precision", choices=tuple(BYTES), default="bf16", help="the launch's")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--supervised", type=int, help="of a row; default: all but one")
    parser.add_argument(
        "--noisy_layers", type=int, nargs="+", help="default: the first that may get noise, the dearest"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args, flags = parser.parse_known_args(arguments)
    for name in ("gpus", "nodes", "length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more")
    settings = parse_arguments(["--model", args.model, "--train_data", "none", *flags])
    settings = replace(settings, loss_chunk_size=settings.loss_chunk_size or chunk_size_on("cuda"))
    config = SHAPES.get(args.model) or load_config(args.model, settings.trust_remote_code)
    mesh = Mesh(args.gpus, args.nodes, args.sharding, args.mixed_precision)
    if mesh.sharded and settings.quantization != "none":
        parser.error("--quantization does not go with --sharding fsdp")
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if not all(0 <= layer < layers for layer in args.noisy_layers or ()):
        parser.error(f"--noisy_layers: {args.model} has layers 0 to {layers - 1}")
    model = model_of(config, settings, mesh.precision)
    strategy = "separate" if settings.branches == "separate" else "fork"
    way = way_of(settings, layers, args.noisy_layers, strategy, mesh.precision)
    supervised = args.supervised or max(args.length - 1, 1)
    found = plan(model, settings, mesh, way, args.length, supervised)
    print("\n".join(tables(args.model, found, mesh, way, settings, args.length)))


if __name__ == "__main__":
    with one_line_errors("plan.py"):
        main()
