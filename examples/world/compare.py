"""Compares methods on worlds whose truth is known: one row a method and world in a CSV.

    python examples/world/compare.py --output build/compare --methods all --seeds 10

For every seed it builds a world, trains with every method, asks the held-out questions and scores the answers. Runs
that have their row are not made again, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

from chosen import read_chosen
from methods import GROUPS, SIZES, Run
from results import KEY, read_results, write_results
from runs import build_world, run_folder, train_and_ask, words

from build import integer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from noisefit.base.command_line import OneLineParser, canonical  # noqa: E402
from noisefit.base.errors import InputError, notice, one_line_errors  # noqa: E402
from noisefit.base.files import alone_in  # noqa: E402

PACKAGES = ("torch", "transformers", "accelerate", "peft")
# What each run is given by this program; a token would end in the results.
RESERVED = {"model", "train_data", "output_model", "seed", "save_steps", "overwrite_output", "resume_from_checkpoint",
            "config", "hf_token", "push_to_hub", "hub_private", "help"}  # fmt: skip

# Each run in a process of its own, forked from one that has imported everything.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["compare", "runs", "rows", "train_loop", "generate", "measures", "pretrain", "peft"])


# --- What runs in a process of its own -------------------------------------------------------------------------------


def apart(log: str, target: Callable[[Run, Path], None], run: Run, folder: Path) -> None:
    """What a process does: both its outputs go to a file, and it ends with the main process, however that ends."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def end_with_it() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with one_line_errors("compare.py"):
        target(run, folder)


# --- What the main process does --------------------------------------------------------------------------------------


def in_process(target: Callable[[Run, Path], None], run: Run, folder: Path, log: Path) -> str | None:
    """Runs `target` in a process of its own. Returns why it failed; None if it did not."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = PROCESSES.Process(target=apart, args=(str(log), target, run, folder), daemon=True)
    process.start()
    process.join()
    if process.exitcode == 0:
        return None
    said = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines() or ["it said nothing"]
    return f"status {process.exitcode}: {said[-1]} ({log})"


def machine() -> str:
    """The processor, or the GPU, that the runs are made on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, 1 thread a run"


def missing_runs(wanted: Sequence[Run], rows: Sequence[Mapping[str, object]], path: Path) -> list[Run]:
    """The runs that have no row yet.

    Raises:
        InputError: a run has a row that was made with other flags, or its world one from another machine: another
            processor rounds the sums of a world's pretraining otherwise, which ends in another model.
    """
    there = {tuple(row[name] for name in KEY): row["flags"] for row in rows}
    machines = {(row["size"], row["seed"]): row["machine"] for row in rows}
    missing = []
    for run in wanted:
        flags = there.get((run.size, str(run.seed), run.method))
        if flags is None:
            missing.append(run)
        elif flags != shlex.join(words(run.flags)):
            raise InputError(
                f"{path}: {run.method} on seed {run.seed} was run with other flags ({flags}); remove that row, or "
                "choose another --results"
            )
    here = machine()
    for run in missing:
        where = machines.get((run.size, str(run.seed)), here)
        if where != here:
            raise InputError(f"{path}: the runs on seed {run.seed} were made on another machine ({where}), where that "
                             "seed's model is another one; choose another --results, or other seeds")  # fmt: skip
    return missing


def side_by_side(
    pool: ThreadPoolExecutor, target: Callable[[Run, Path], None], logs: Mapping[Run, Path], folder: Path
) -> Iterator[tuple[Run, str]]:
    """Runs `target` for every run of `logs`, each in a process of its own.

    Yields:
        Those that succeeded, as they end, with a text of how far it is. Of the others it says why they failed.
    """
    began = time.monotonic()
    running = {pool.submit(in_process, target, run, folder, log): run for run, log in logs.items()}
    for number, done in enumerate(as_completed(running), start=1):
        run, reason = running[done], done.result()
        name = run.world_name if target is build_world else f"{run.world_name} {run.method}"
        at = f"{number} of {len(running)}, {time.monotonic() - began:.0f} s: {name}"
        if reason is None:
            yield run, at
        else:
            notice(f"{at}: {reason}")


def compare(options: argparse.Namespace, command: str) -> bool:
    """Makes the runs that are missing; returns whether all could be made."""
    folder, path = options.output, options.results or options.output / "results.csv"
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    methods = named_methods(options.methods)
    wanted = [Run(options.size, seed, method) for seed in seeds for method in methods]
    check_flags(wanted)
    with ExitStack() as locks:
        for place in {folder.resolve(), path.parent.resolve()}:  # two that add rows to one file would lose some
            locks.enter_context(alone_in(place))
        rows: list[Mapping[str, object]] = list(read_results(path))
        missing = missing_runs(wanted, rows, path)
        notice(f"{len(wanted)} runs, of which {len(wanted) - len(missing)} have their row in {path}")
        if not missing:
            return True
        origin = {"command": command, "machine": machine(),
                  "versions": " ".join(f"{name} {version(name)}" for name in PACKAGES)}  # fmt: skip
        write_results(path, rows)  # so that a file which cannot be written is told now
        pool = ThreadPoolExecutor(options.jobs)
        try:
            worlds = {run.world_name: run for run in missing}.values()
            logs = {run: folder / "worlds" / f"{run.world_name}.log" for run in worlds}
            built = set()
            for run, at in side_by_side(pool, build_world, logs, folder):
                built.add(run.world_name)
                notice(f"world {at}")
            logs = {run: run_folder(run, folder) / "log.txt" for run in missing if run.world_name in built}
            made = 0
            whole = partial(train_and_ask, brief=options.brief)
            for run, at in side_by_side(pool, whole, logs, folder):
                measured = json.loads((run_folder(run, folder) / "measures.json").read_text())
                key = dict(zip(KEY, (run.size, run.seed, run.method), strict=True))
                rows.append(key | measured | origin | {"flags": shlex.join(words(run.flags))})
                write_results(path, rows)
                made += 1
                notice(f"{at}: hallucination rate {measured['hallucination_rate']:.1%}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # asked politely, a training would first write a checkpoint
    return made == len(missing)


def named_methods(names: Sequence[str]) -> list[str]:
    """The methods that names, groups and `@FILE`, as chosen.py has it, stand for, each once."""
    found = [method for name in names for method in
             (read_chosen(Path(name[1:])).values() if name.startswith("@") else GROUPS.get(name, [name]))]  # fmt: skip
    return list(dict.fromkeys(found))


def check_flags(runs: Iterable[Run]) -> None:
    """Raise `InputError` for a method that is none, or whose flags train_loop.py would refuse."""
    from noisefit.run.settings import parse_arguments

    for run in runs:
        try:
            flags, _ = run.flags, run.own
            if taken := [flag for flag in flags if canonical(flag) in RESERVED]:
                raise InputError(f"{taken[0]} is not for a method: each run gets its own")
            parse_arguments(words({"model": "model", "train_data": "train.csv"} | flags))
        except (ValueError, InputError) as error:
            raise InputError(f"--methods {run.method}: {error}") from None


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog="compare.py", description="Compares methods on worlds whose truth is known.",
                           allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add(
        "--output", type=Path, default=Path("build/compare"), help="folder for worlds and runs (default: build/compare)"
    )
    add("--results", type=Path, metavar="CSV", help="a row a run (default: OUTPUT/results.csv)")
    add("--size", choices=SIZES, default="standard", help="of a world; large is for a GPU (default: standard)")
    add("--seeds", type=integer("a number", 1, 1000), default=3, help="how many worlds (default: 3)")
    add("--first_seed", type=integer("a seed", 0, 10**6), default=0, help="of the first world (default: 0)")
    add(
        "--methods", nargs="+", default=["headline"], metavar="METHOD",
        help="names, groups (headline, ablations, all), or a name with other flags of train_loop.py, such as "
        "snr_largest:noise_std=1:num_noise_layers=2, or with other rows: basefit:unknown_share=0.2, basefit:told_only; "
        "@FILE: those of such a file as docs/experiment/chosen.json (default: headline)",
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add(
        "--brief",
        action="store_true",
        help="ask the held-out questions once and nothing else, for tuning; "
        "what needs more is not a number in those rows",
    )
    add("--jobs", type=integer("a number", 1, 256), default=cores, help="runs side by side (default: a core each)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_options(arguments)
    # One thread each, so that a run's numbers do not depend on how many run side by side. OpenMP reads these once.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = shlex.join(["compare.py", *(sys.argv[1:] if arguments is None else arguments)])
    return 0 if compare(options, command) else 1


if __name__ == "__main__":
    # Turned into an exception, so that a polite kill takes the runs with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with one_line_errors("compare.py"):
        status = main()
    sys.exit(status)
