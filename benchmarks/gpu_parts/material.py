"""What the parts work on, made on the spot: a random model's folder, rows of data; and trainings by `train_loop.py`."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from generate_speed import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import train_loop
from noisefit.run.settings import Settings

Row = dict[str, Any]
"""A line of a table of the report: column to value. A row of one `text` is a sentence before the table."""

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
FULL_MODEL = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16)
# What differs between two runs that are the same.
MEASURED = ("tokens_per_second", "peak_memory_gib")


def is_full(size: str) -> bool:
    return size == "full"


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def model_config(size: str) -> PreTrainedConfig:
    """Of a model with a byte-level tokenizer: of 150 million weights, or of a few thousand."""
    tokenizer, shape = byte_tokenizer(), FULL_MODEL if is_full(size) else TINY_MODEL
    specials = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vocabulary = 32_000 if is_full(size) else len(tokenizer)
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1024, **specials, **shape)


def save_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A folder in the Hugging Face format, of random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int, longest: int) -> Path:
    """Questions and answers of mixed lengths, up to about `longest` bytes, as JSON Lines."""
    with path.open("w") as file:
        for i in range(count):
            more = "as is well known, " * (i * i % max(longest // 18, 1))
            row = {"prompt": f"What is {i} plus {i}?", "response": f"{more}it is {i + i}."}
            file.write(json.dumps(row) + "\n")
    return path


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="noisefit-gpu-") as folder:
        yield Path(folder)


def launch_environment(device: str, precision: str) -> dict[str, str]:
    """What `accelerate launch` would say to a process of its own."""
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    return {"ACCELERATE_MIXED_PRECISION": precision, "HF_HUB_OFFLINE": "1", **on_cpu}


def train(device: str, precision: str, **settings: Any) -> list[dict[str, Any]]:
    """A training in this process; returns the lines of its metrics. Raises what `train_loop.train` raises."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    variables = launch_environment(device, precision)
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        train_loop.train(Settings(**settings))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return metrics_of(Path(settings["output_model"]))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def speed(lines: list[dict[str, Any]]) -> float:
    """Tokens a second, of the second half of a run: its first steps warm up."""
    return statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 2 :])


def difference(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """How two runs' metrics differ, in a few words."""
    if [line["step"] for line in lines] != [line["step"] for line in others]:
        return f"other steps: {len(lines)} lines and {len(others)}"
    pairs = list(zip(lines, others, strict=True))
    if all(a[name] == b.get(name) for a, b in pairs for name in a if name not in MEASURED):
        return "bit for bit"
    losses = [(_apart(a["loss"], b["loss"]), a["step"]) for a, b in pairs]
    most, step = max(losses)
    first = next((step for off, step in losses if off), None)
    if first is None:
        return "losses bit for bit, other metrics not"
    return f"losses differ by {most:.1e} at most (step {step}), first at step {first}"


def _apart(a: float | None, b: float | None) -> float:
    """Relative to the first; a loss is `None` where it was not finite, as fp16's are until its scale is found."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / abs(a)


def milliseconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, waited for; the first two calls are not counted."""
    taken = []
    for i in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        if i > 1:
            taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forget(device: str) -> None:
    """Give back what a failed attempt has left in the device's memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
