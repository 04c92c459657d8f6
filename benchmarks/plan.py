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
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from shapes import SHAPES, branched_shape, in_shape_alone, shape_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from noisefit.base.errors import one_line_errors
from noisefit.fork.branches import NOISY, BranchedModel
from noisefit.fork.decoder import find_causal_lm, find_decoder_layers
from noisefit.fork.hooks import EMBEDDING
from noisefit.inputs.models import load_config
from noisefit.method.losses import cross_entropy
from noisefit.method.policy import NoisePolicy, make_noise
from noisefit.method.teacher import SELF
from noisefit.run.footprint import UNIT, Amount, Footprint, Way, measure, training_whole
from noisefit.run.noise_policy import first_eligible
from noisefit.run.settings import Settings, parse_arguments

GIB, GB = 2**30, 1e9
BYTES = {"no": 4, "bf16": 2, "fp16": 2}
# Bytes a weight of a linear layer. nf4: a scale of 8 bits for every 64, and one of 32 for every 256 of those.
QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
FEW = 3  # layers that are measured where all are alike: backward ends at the first, so it differs from the others


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
class Weights:
    """Numbers of weights. `trained` ones are float32; `quantized` is the share of the frozen ones that can be.

    Attributes:
        frozen, trained: of a block, or outside of the blocks.
        quantized: of the frozen ones, those of linear layers other than the head.
    """

    frozen: int
    trained: int
    quantized: int

    def held(self, frozen_bytes: float, quantization: str) -> float:
        """Bytes."""
        small = QUANTIZED.get(quantization, frozen_bytes)
        return (self.frozen - self.quantized) * frozen_bytes + self.quantized * small + self.trained * 4


@dataclass(frozen=True)
class Flops:
    """Of one branch: forward and backward of each block, and of the head for a token."""

    forward: tuple[Amount, ...]
    backward: tuple[Amount, ...]
    head: float
    head_backward: float


@dataclass(frozen=True)
class Model:
    """All that is known of a model and what is trained of it."""

    blocks: tuple[Weights, ...]
    outside: Weights
    footprint: Footprint
    flops: Flops

    def sum(self, name: str) -> int:
        return sum(getattr(part, name) for part in (*self.blocks, self.outside))


def model_of(config: PreTrainedConfig, settings: Settings, precision: str, as_on_gpu: bool = True) -> Model:
    """Count and measure a model of this configuration, as the loop would have it."""
    frozen = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    whole = shape_of(config, settings, frozen)
    layers = find_decoder_layers(whole)
    blocks = tuple(weights_of(layer, settings) for layer in layers)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = weights_of(whole, settings, leaving_out=inside)

    # Layers that are alike are measured once: a model of few of them stands for all.
    alike = len(layers) > FEW and len(set(map(_signature, layers))) == 1
    measured = _with_layers(config, FEW) if alike else config
    with in_shape_alone(as_on_gpu):
        chunk, dropout = settings.loss_chunk_size, settings.rdrop_dropout
        model = branched_shape(measured, settings, frozen, chunk, precision, dropout)
        noise = make_noise(settings, NoisePolicy(layers=[0]))
        ids = torch.zeros(1, dtype=torch.long)
        footprint = measure(model, ids, 3 * UNIT, noise, settings.objective.branches)
        flops = measure_flops(model)
    count = len(layers)
    footprint = replace(footprint, blocks=_all(footprint.blocks, count))
    flops = replace(flops, forward=_all(flops.forward, count), backward=_all(flops.backward, count))
    return Model(blocks, outside, footprint, flops)


def weights_of(module: nn.Module, settings: Settings, leaving_out: set[int] = frozenset()) -> Weights:  # type: ignore
    """The weights of a module, each once."""
    counts, seen = {"frozen": 0, "trained": 0, "quantized": 0}, set(leaving_out)
    head = find_causal_lm(module).get_output_embeddings() if leaving_out else None
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
            small = isinstance(part, nn.Linear) and part is not head and parameter.dim() == 2
            if small and not parameter.requires_grad and settings.quantization != "none":
                counts["quantized"] += parameter.numel()
    return Weights(**counts)


def _signature(layer: nn.Module) -> tuple:
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    few = copy.deepcopy(config)
    few.num_hidden_layers = count
    if getattr(few, "layer_types", None):
        few.layer_types = few.layer_types[:count]
    return few


def _all(measured: tuple[Amount, ...], count: int) -> tuple[Amount, ...]:
    if len(measured) == count:
        return measured
    return (measured[0], *[measured[1]] * (count - len(measured) + 1), *measured[2:])


def measure_flops(model: BranchedModel) -> Flops:
    """FLOPs of a model in training mode, as torch counts them: of an attention kernel all queries with all keys, of
    which it skips half."""
    layers = find_decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    keys = [f"{type(model).__name__}.{names[id(layer)]}" for layer in layers]
    runs: list[tuple[list[float], list[float]]] = []
    for length in (UNIT, 2 * UNIT, 3 * UNIT):
        ids = torch.zeros(1, length, dtype=torch.long)
        with training_whole(model), FlopCounterMode(display=False) as counter:
            states = model(ids, torch.ones_like(ids))
            forward = [float(sum(counter.get_flop_counts()[key].values())) for key in keys]
            states.sum().backward()
            both = [float(sum(counter.get_flop_counts()[key].values())) for key in keys]
        runs.append((forward, [b - f for b, f in zip(both, forward, strict=True)]))
    forward_amounts, backward_amounts = (
        tuple(Amount.through(UNIT, *values) for values in zip(*(run[i] for run in runs), strict=True)) for i in (0, 1)
    )
    counts = []
    for backward in (False, True):
        hidden = states.detach().requires_grad_()[0, :UNIT].unsqueeze(0)
        with FlopCounterMode(display=False) as counter:
            loss = model.sum_losses(hidden, torch.zeros(UNIT, dtype=torch.long), _cross_entropy)["ce"]
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops() / UNIT)
    return Flops(forward_amounts, backward_amounts, counts[0], counts[1] - counts[0])


def _cross_entropy(logits: dict, targets: torch.Tensor) -> dict:
    [clean] = next(part for part in logits.values() if part)
    return {"ce": cross_entropy(clean, targets)}


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
    # Without a reduction at each micro-batch FSDP keeps the gradients of all, whole: small ones, of an adapter.
    whole = mesh.sharded and not settings.full_finetune and settings.gradient_accumulation_steps > 1
    yield "gradients", trained / (1 if whole else share)
    if mesh.count > 1 and not mesh.sharded:
        yield "DDP's buckets", trained
    yield "optimizer", 2 * trained / share
    if mesh.sharded:
        # A block that is computed with, the next one on its way, and what is in no block.
        yield "gathered", 2 * max(_gathered(block, mesh) for block in model.blocks) + _gathered(model.outside, mesh)
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
    blocks = sum(_gathered(block, mesh) for block in model.blocks)
    passes = 1 if way.strategy == "fork" else way.count
    outside = _gathered(model.outside, mesh)  # stays gathered through a micro-batch
    yield "all-gather, forward", ring * micro * (passes * blocks + outside)
    yield "all-gather, backward", ring * micro * passes * blocks
    yield "reduce-scatter of gradients", ring * trained * (micro if settings.full_finetune else 1)


def _flops(model: Model, settings: Settings, way: Way, length: int, supervised: int) -> Iterator[tuple[str, float]]:
    rows, micro, flops = settings.batch_size, settings.gradient_accumulation_steps, model.flops
    copies = [way.copies(layer) for layer in range(len(model.blocks))]

    def blocks(amounts: Sequence[Amount], counts: Sequence[int]) -> float:
        return sum(amount.of(rows * n, length) for amount, n in zip(amounts, counts, strict=True))

    tokens = rows * supervised
    again = tokens - min(settings.loss_chunk_size, tokens)  # the last chunk is not computed twice
    yield "forward", micro * (blocks(flops.forward, copies) + way.count * tokens * flops.head)
    yield "backward", micro * (blocks(flops.backward, copies) + way.count * tokens * flops.head_backward)
    recomputed = way.count * again * flops.head + (blocks(flops.forward, copies) if way.checkpointing else 0)
    yield "computed again", micro * recomputed
    if settings.teacher != SELF and not settings.cache_teacher:
        yield "teacher", micro * (blocks(flops.forward, [1] * len(copies)) + (tokens + again) * flops.head)


def way_of(settings: Settings, layers: int, noisy: Sequence[int] | None, strategy: str) -> Way:
    """How the run computes a micro-batch.

    Args:
        settings: of the run.
        layers: of the model.
        noisy: the layers with noise; `None`: as many as the settings say, from the first that may have it.
        strategy: `fork` or `separate`.
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
    return Way(objective.branches, chosen, strategy, settings.gradient_checkpointing, settings.loss_chunk_size)


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
    config = SHAPES.get(args.model) or load_config(args.model, settings.trust_remote_code)
    mesh = Mesh(args.gpus, args.nodes, args.sharding, args.mixed_precision)
    if mesh.sharded and settings.quantization != "none":
        parser.error("--quantization does not go with --sharding fsdp")
    model = model_of(config, settings, mesh.precision)
    layers = len(model.blocks)
    if not all(0 <= layer < layers for layer in args.noisy_layers or ()):
        parser.error(f"--noisy_layers: {args.model} has layers 0 to {layers - 1}")
    way = way_of(settings, layers, args.noisy_layers, "separate" if settings.branches == "separate" else "fork")
    supervised = args.supervised or max(args.length - 1, 1)
    found = plan(model, settings, mesh, way, args.length, supervised)
    print("\n".join(tables(args.model, found, mesh, way, settings, args.length)))


if __name__ == "__main__":
    with one_line_errors("plan.py"):
        main()
