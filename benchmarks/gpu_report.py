"""`docs/gpu.md`, written from the results of `gpu.py`; without any, it says how to get them.

python benchmarks/gpu_report.py [docs/gpu.jsonl] > docs/gpu.md
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOW = """```sh
python benchmarks/gpu.py                    # everything, in at most 20 minutes
python benchmarks/gpu.py --parts steps-7b   # a part of it
python benchmarks/gpu.py --size tiny        # to try it out, also on a CPU
```

It needs one GPU, torch, transformers, accelerate and peft; no network, no model, no data: weights are random, rows are
made on the spot. TRL, bitsandbytes, Liger, vLLM and FlashAttention take part where they are installed. Each part is a
process of its own, so one that fails costs its own rows. Results are kept in `gpu.jsonl`, beside this page, as they
come, and the same command goes on where it was ended; `--again` measures again."""

STEPS = (
    "A step is forward, backward, clip and AdamW with LoRA on random weights. Ratios are to plain fine-tuning in the "
    "same round, the median over the rounds; memory is the allocator's peak over weights and optimizer."
)
RESUMED = (
    "The run is stopped by a SIGTERM after its first checkpoint and resumed; its metrics and its adapter are compared "
    "with those of a run that was left alone."
)
SECTIONS = {
    "training-bf16": ("Training and resuming in bf16", RESUMED),
    "training-fp16": ("Training and resuming in fp16", RESUMED),
    "training-8bit": ("Training and resuming with `--quantization 8bit`", RESUMED),
    "training-paged": ("Training and resuming with `--optim paged_adamw_8bit`", RESUMED),
    "training-4bit": ("Training and resuming with `--quantization 4bit`", RESUMED),
    "syncs": (
        "Where a step waits for the GPU",
        "Each wait of a training step by its place, as `torch.cuda.set_sync_debug_mode` tells it. What is not expected "
        "is to be looked at.",
    ),
    "steps-1b": ("A step at 1B", STEPS),
    "steps-1b-checkpointing": ("A step at 1B with `--gradient_checkpointing`", STEPS),
    "steps-7b": ("A step at 7B", STEPS),
    "steps-7b-checkpointing": ("A step at 7B with `--gradient_checkpointing`", STEPS),
    "trl-1b": ("TRL beside it", "Plain fine-tuning by both, step by step in turns."),
    "generation": (
        "Answers a second",
        "`generate.py`'s batches against `generate` for one prompt at a time; a random model of Llama-3.2-1B's shape, "
        "50 new tokens an answer.",
    ),
    "vllm": ("vLLM", "The same prompts and settings; its answers are others, as it draws its own random numbers."),
    "fsdp": (
        "FSDP2 on one process",
        "`configs/accelerate/fsdp.yaml` with one process against a plain run, both in bf16, without noise and dropout.",
    ),
    "noise": ("One draw of noise", "Times are medians; launches are kernels, as the profiler counts them."),
    "adamw": ("AdamW", "One step over the adapter's weights."),
    "head": (
        "The head, for the cross-entropy alone",
        "Forward and backward pass of a frozen head, to the gradient of the hidden states. Ours forms the logits of a "
        "chunk again in backward; the fused ones form the gradient at once, for this one loss.",
    ),
    "losses": (
        "The head and the losses of three branches",
        "The same with NoiseFiT's three losses, the loss functions as they are and compiled, as a GPU has them.",
    ),
    "packing": ("Packing", "Rows of mixed lengths through `train_loop.py`, padded and packed."),
}


@dataclass
class Entry:
    """A part's last attempt: its rows, and how it ended."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    status: str | None = None
    why: str | None = None
    seconds: float = 0.0


def attempts(lines: Iterable[dict[str, Any]]) -> dict[str, Entry]:
    """The parts that were begun, by name. Rows of an attempt that another one followed are gone."""
    found: dict[str, Entry] = {}
    for line in lines:
        if "part" not in line:
            continue
        if line.get("status") == "started":
            found[line["part"]] = Entry()
        elif "row" in line:
            found[line["part"]].rows.append(line["row"])
        else:
            entry = found[line["part"]]
            entry.status, entry.why, entry.seconds = line["status"], line["why"], line["seconds"]
    return found


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The page, of the lines of a results file."""
    if not lines:
        what = "**Not run yet**: no GPU has been at hand. One command measures, and writes this page:"
        return f"# On a GPU\n\n{what}\n\n{HOW}\n"
    found = attempts(lines)
    texts = [
        "# On a GPU",
        wrapped(machine([line for line in lines if "machine" in line][-1])),
        f"How it was made:\n\n{HOW}",
    ]
    missing = [name for name in SECTIONS if name not in found or found[name].status is None]
    if missing:
        texts.append(wrapped(f"Not run: {', '.join(missing)}."))
    told: set[str] = set()
    for name in SECTIONS:
        if name in missing:
            continue
        title, what = SECTIONS[name]
        texts.append(f"## {title}")
        if what not in told:
            texts.append(wrapped(what))
        told.add(what)
        texts += section(found[name])
    return "\n\n".join(texts) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def machine(line: dict[str, Any]) -> str:
    found = dict(line["machine"])
    size, device = found.pop("size"), found.pop("device")
    having = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
    without = ", ".join(name for name, value in found.items() if value is None)
    tried = " **Of a tiny model, to try the program out: no figure here means anything.**" if size == "tiny" else ""
    return f"Measured on {line['date']} on {device}: {having}; without {without}.{tried}"


def section(entry: Entry) -> list[str]:
    texts = [wrapped(row["text"]) for row in entry.rows if "text" in row]
    rows = [row for row in entry.rows if "text" not in row]
    if rows:
        texts.append(table(rows))
    if entry.status != "done":
        texts.append(f"**{(entry.status or 'not done').capitalize()}**: {entry.why}.")
    return texts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of all columns that any of them has; a single row stands upright."""
    if len(rows) == 1 and len(rows[0]) > 6:
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows[0].items())])
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


if __name__ == "__main__":
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs" / "gpu.jsonl"
    read = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    print(page(read), end="")
