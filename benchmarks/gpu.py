"""What a GPU says: how this project trains, answers and costs on one, in one command; it writes `docs/gpu.md`.

    python benchmarks/gpu.py [--minutes 20] [--parts steps-1b head ...] [--again]

Each part is a process of its own: one that fails, runs out of memory or is killed costs its rows and nothing else.
Results are kept as they come, in `docs/gpu.jsonl`; the same command goes on with the parts that have none. What would
not fit into `--minutes` is listed as not run. Libraries that are not installed (bitsandbytes, TRL, Liger, vLLM,
FlashAttention) are told as such. `--size tiny` is the same code on a tiny model, which a CPU runs in a minute.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from gpu_parts import answers, head, launches, packing, steps, syncs, training
from gpu_report import Entry, attempts, page

from noisefit.base.files import append_json_line

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger_kernel", "vllm", "flash_attn")
DONE, FAILED, NOT_RUN = "done", "failed", "not run"

Part = Callable[[str, str], Iterator[dict[str, Any]]]
"""From a device, `cuda` or `cpu`, and a size, `full` or `tiny`, to rows as they come."""

# By importance: what does not fit into the time is at the end. With the seconds that each takes, about, at full size.
PARTS: dict[str, tuple[Part, int]] = {
    "training-bf16": (functools.partial(training.train_and_resume, precision="bf16"), 80),
    "training-fp16": (functools.partial(training.train_and_resume, precision="fp16"), 45),
    "syncs": (syncs.syncs, 40),
    "steps-1b": (functools.partial(steps.step_costs, shape="llama-1b"), 60),
    "steps-7b": (functools.partial(steps.step_costs, shape="llama-7b"), 55),
    "steps-7b-checkpointing": (functools.partial(steps.step_costs, shape="llama-7b", gradient_checkpointing=True), 90),
    "generation": (answers.generation, 90),
    "fsdp": (training.fsdp, 60),
    "noise": (launches.noise, 60),
    "adamw": (launches.adamw, 20),
    "head": (head.head, 45),
    "losses": (head.losses, 45),
    "packing": (packing.packing, 60),
    "training-8bit": (functools.partial(training.train_and_resume, precision="bf16", quantization="8bit"), 60),
    "training-4bit": (functools.partial(training.train_and_resume, precision="bf16", quantization="4bit"), 60),
    "training-paged": (functools.partial(training.train_and_resume, precision="bf16", optim="paged_adamw_8bit"), 60),
    "steps-1b-checkpointing": (functools.partial(steps.step_costs, shape="llama-1b", gradient_checkpointing=True), 60),
    "trl-1b": (functools.partial(steps.trl, shape="llama-1b"), 60),
    "vllm": (answers.vllm, 150),
}


def machine(device: str, size: str) -> dict[str, Any]:
    """What the results are of."""
    found = {"size": size, "device": platform.processor() or platform.machine(), "driver": None}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        found |= {"driver": driver(), "CUDA": torch.version.cuda}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found | {"python": platform.python_version()}


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def run_part(name: str, device: str, size: str, results: Path) -> None:
    """Run a part in this process, each of its rows written as it comes."""
    for row in PARTS[name][0](device, size):
        append_json_line(results, {"part": name, "row": row})


def run_here(name: str, device: str, size: str, results: Path) -> str | None:
    """`run_part`; returns why it failed, `None` where it did not."""
    try:
        run_part(name, device, size, results)
    except Exception as error:  # a part that fails costs its own rows, whatever it is
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def watched(command: Sequence[str], log: Path, seconds: float) -> str | None:
    """Run a command to its end, or kill it with all that it started; returns why it failed, `None` where it did not."""
    with log.open("a") as file:
        file.write(f"\n--- {' '.join(command)}\n")
        file.flush()
        begin = file.tell()
        process = psutil.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        try:
            status = process.wait(seconds)
        except psutil.TimeoutExpired:
            return f"not done after {seconds:.0f} seconds"
        finally:
            if process.is_running():
                for started in [*process.children(recursive=True), process]:
                    started.kill()
                process.wait()
    if status == 0:
        return None
    if status < 0:
        return f"killed by signal {-status}"
    said = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    return said[-1][:300] if said else f"status {status}"


def run_parts(names: Sequence[str], device: str, args: argparse.Namespace) -> None:
    """Run the parts that have no results yet, as long as the time lasts."""
    end, log = time.monotonic() + 60 * args.minutes, args.results.with_suffix(".log")
    for name in names:
        has_results = attempts(read(args.results)).get(name, Entry()).status in (DONE, FAILED)
        if not args.again and has_results:
            print(f"{name}: has results already; --again runs it again")
            continue
        needs, left = PARTS[name][1] * (1 if args.size == "full" else 0.2), end - time.monotonic()
        if left < needs and has_results:
            print(f"{name}: keeps the results that it has; it takes about {needs:.0f} seconds")
            continue
        append_json_line(args.results, {"part": name, "status": "started"})
        if left < needs:
            status, why = NOT_RUN, f"it takes about {needs:.0f} seconds, and --minutes left {max(left, 0):.0f}"
            taken = 0.0
        else:
            start = time.monotonic()
            if args.here:
                why = run_here(name, device, args.size, args.results)
            else:
                command = [sys.executable, str(Path(__file__).resolve()), "--size", args.size, "--one", name]
                why = watched([*command, "--results", str(args.results)], log, min(left, max(3 * needs, 60)))
            status, taken = FAILED if why else DONE, time.monotonic() - start
        ended = {"part": name, "status": status, "why": why, "seconds": round(taken, 1)}
        append_json_line(args.results, ended)
        args.page.write_text(page(read(args.results)))
        print(f"{name}: {status}" + (f": {why}" if why else f" in {taken:.0f} seconds"), flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def same_machine(parser: argparse.ArgumentParser, results: Path, found: dict[str, Any]) -> None:
    """Write the machine at the top of the results; refuse those of another. Libraries may have been installed since."""
    machines = [line["machine"] for line in read(results) if "machine" in line]
    if machines and machines[-1] != found:
        before = machines[-1]
        others = [name for name in {**before, **found} if before.get(name) != found.get(name)]
        if other := next((name for name in others if name not in LIBRARIES or before.get(name) is not None), None):
            which = f"{other} {before.get(other)}, here {found.get(other)}"
            parser.error(
                f"--results {results}: these are of another machine ({which}); name another file, or delete it"
            )
    if not machines or machines[-1] != found:
        results.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(results, {"machine": found, "date": datetime.date.today().isoformat()})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=20, help="what does not fit is listed as not run")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny runs on a CPU, to try this out")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: docs/gpu.jsonl; of tiny build/gpu.jsonl")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: beside the results")
    parser.add_argument("--again", action="store_true", help="also run parts that have results")
    parser.add_argument("--here", action="store_true", help="in this process, instead of a process for each part")
    parser.add_argument("--one", choices=list(PARTS), help=argparse.SUPPRESS)  # what a part's own process is told
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "full" and device == "cpu":
        parser.error("torch finds no GPU here; --size tiny tries everything out on a CPU")
    args.results = args.results or ROOT / ("docs" if args.size == "full" else "build") / "gpu.jsonl"
    args.page = args.page or args.results.with_suffix(".md")
    if args.one:
        run_part(args.one, device, args.size, args.results)
        return
    same_machine(parser, args.results, machine(device, args.size))
    run_parts(args.parts or list(PARTS), device, args)
    print(f"{args.page} has what there is")


if __name__ == "__main__":
    main()
