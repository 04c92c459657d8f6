"""What an optimizer step costs, way by way, and TRL's beside it; a way that fails or does not fit costs a row."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from sizes import SIZES, Size
from step_cost import NOISY, PLAIN, TRL, Costs, measure
from ways import Steps, floor, head_share

from gpu_parts.material import GIB, Row, forget, installed, one_line
from noisefit.base.errors import is_out_of_memory

LESS = 256  # tokens a chunk of the losses, where a GPU has no memory to spare


def step_costs(device: str, size: str, shape: str, gradient_checkpointing: bool = False) -> Iterator[Row]:
    """Time and peak memory of a step of each way, as in `step_cost.py`, at one of the shapes of `sizes.py`."""
    of = SIZES["tiny" if size == "tiny" else shape]
    steps, costs = Steps(of, device, gradient_checkpointing), Costs(device)
    n, last = of.layers, of.layers - min(NOISY, of.layers - 1)
    early, late = list(range(NOISY)), list(range(last, n))
    forks = [f"fork, noise in layers {layers[0]}-{layers[-1]}" for layers in (early, late)]
    ways: dict[str, Callable[[], object]] = {
        PLAIN: steps.ours,
        forks[0]: functools.partial(steps.ours, early),
        forks[1]: functools.partial(steps.ours, late),
        f"separate passes, layers 0-{NOISY - 1}": functools.partial(steps.ours, early, "separate"),
        f"the published way, layers 0-{NOISY - 1}": functools.partial(steps.published, early),
    }
    yield {"text": about(of, steps, gradient_checkpointing)}
    if size != "tiny":
        for name, layers in zip(forks, (early, late), strict=True):
            ways[f"{name}, --loss_chunk_size {LESS}"] = functools.partial(steps.ours, layers, chunk=LESS)
    measures = [contextlib.nullcontext, costs.weighed, *[costs.timed] * (2 if size == "tiny" else 5)]
    for kind in measures:
        for name in list(ways):
            if why := problem(ways[name], kind(name)):
                del ways[name]
                steps.optimizer.zero_grad()
                forget(device)
                yield {"way": name, "ms a step": why}
    share = head_share(steps) if PLAIN in ways else 0.0
    first = {name: layers[0] for name, layers in zip(forks, (early, late), strict=True)}
    for name in ways:
        fork = name.split(", --")[0]
        counted = floor(of, first[fork], share) if fork in first else 1.0 if name == PLAIN else None
        yield cost_row(costs, name, of, counted, PLAIN in ways)


def problem(step: Callable[[], object], measuring: AbstractContextManager[Any]) -> str | None:
    """Take a step; why it could not be taken, `None` where it could."""
    try:
        with measuring:
            step()
    except Exception as error:  # one way that fails costs one row
        return "out of memory" if is_out_of_memory(error) else one_line(error)
    return None


def cost_row(costs: Costs, name: str, size: Size, counted: float | None, has_plain: bool = True) -> Row:
    seconds = statistics.median(costs.seconds[name])
    row: Row = {"way": name, "ms a step": 1000 * seconds, "tokens a second": size.rows * size.length / seconds}
    if has_plain:
        ratios = costs.ratios(name)
        row |= {
            "to plain": costs.ratio(name),
            "in the rounds": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            "floor": counted,
        }
        row["memory to plain"] = costs.memory[name] / costs.memory[PLAIN]
    return row | {"GiB over weights": costs.memory[name] / GIB}


def about(size: Size, steps: Steps, gradient_checkpointing: bool) -> str:
    weights = sum(parameter.nbytes for parameter in steps.model.parameters()) / GIB
    how = "with --gradient_checkpointing" if gradient_checkpointing else "all activations kept"
    return f"{size}; {how}; weights {weights:.1f} GiB."


def trl(device: str, size: str, shape: str) -> Iterator[Row]:
    """TRL's `SFTTrainer` and plain fine-tuning with ours, taking turns."""
    missing = [library for library in ("trl", "datasets") if not installed(library)]
    if missing:
        yield {"text": f"Not here: {' and '.join(missing)} not installed (pip install trl)."}
        return
    of, costs = SIZES["tiny" if size == "tiny" else shape], Costs(device)
    steps = Steps(of, device)
    version = measure({PLAIN: steps.ours}, of, costs, 2 if size == "tiny" else 5)
    yield {"text": f"{about(of, steps, False)} TRL {version}."}
    for name in (PLAIN, TRL):
        yield cost_row(costs, name, of, None)
