"""Compares methods on a real model and real questions, split by what the model knows: one row a run, and a page.

    python examples/real/compare.py --model meta-llama/Llama-3.2-3B-Instruct --benchmark triviaqa \\
        --source validation.parquet --output build/real --dry_run

It probes what the base model knows, trains it with every method and seed, lets it answer held-out questions and scores
the answers. What that takes is said first. Nothing is done twice: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "world"))

from comparison import METHODS, Run, as_words, choose, unknown_below
from page import page, read_results, replace_text, write_results
from plan import DTYPES, TEMPLATE, Plan, make_plan
from steps import KNOWN, UNKNOWN, Apart, answer, apart, probe, train

from build import integer, number
from noisefit.base.command_line import OneLineParser, a_path, add_token, without_token
from noisefit.base.errors import InputError, notice, one_line_errors
from noisefit.base.files import alone_in, read_text, write_json
from noisefit.inputs.benchmark_data import BENCHMARKS
from noisefit.inputs.probing import CHAT, read_probe_rows, read_scores
from noisefit.inputs.tables import as_csv

RESULTS, RECORD, PROBED = "results.csv", "experiment.json", "probed.csv"
MADE = ("questions.csv", PROBED, "train.csv", "test.csv", "runs", RESULTS, "page.md", TEMPLATE)


def check_folder(options: argparse.Namespace, plan: Plan) -> list[dict[str, str]]:
    """The rows of the results that are there. Writes nothing.

    Raises:
        InputError: the folder is another comparison's, has somebody's files under names that are this program's, or a
            run has a row that was made with other flags.
    """
    folder, record = options.output, options.output / RECORD
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: a file, expected a folder")
    if record.exists():
        try:
            before = json.loads(read_text(record))
            different = [name for name in plan.fixed if before[name] != plan.fixed[name]]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{record}: it is not this program's; choose another --output") from None
        if different:
            was = ", ".join(f"{name} {str(before[name])[:60]} (now {str(plan.fixed[name])[:60]})" for name in different)
            raise InputError(f"{record}: the runs there were made with {was}; choose another --output")
    elif taken := [name for name in MADE if (folder / name).exists()]:
        raise InputError(f"{folder / taken[0]}: it is not of this program, as there is no {RECORD}; choose another "
                         "--output")  # fmt: skip
    rows = read_results(folder / RESULTS)
    flags_of = {(row["method"], row["seed"]): row["flags"] for row in rows}
    for run in plan.settings:
        there = flags_of.get((run.method, str(run.seed)))
        if there is not None and there != flags_as_text(options, run):
            raise InputError(f"{folder / RESULTS}: {run.method} of seed {run.seed} was made with other flags "
                             f"({there}); choose another --output")  # fmt: skip
    return rows


def flags_as_text(options: argparse.Namespace, run: Run) -> str:
    """A run's own flags of train_loop.py, as the results have them."""
    return shlex.join(as_words(run.flags(options.train_flags)))


class Comparison:
    """The comparison on the disk.

    Args:
        options: the command line.
        plan: made of it.
        apart: what runs a step in a process of its own.
    """

    def __init__(self, options: argparse.Namespace, plan: Plan, apart: Apart):
        self.options, self.plan, self.folder, self._apart = options, plan, options.output, apart
        self._for_all = {"trust_remote_code": options.trust_remote_code, "chat_template": self.folder / TEMPLATE}

    def apart(self, name: str, log: Path, target: Callable[..., None], *arguments: Any) -> str | None:
        """A step in a process of its own; returns a line that says why it failed, if it did."""
        log.parent.mkdir(parents=True, exist_ok=True)
        reason = self._apart(target, arguments, log, {"ACCELERATE_MIXED_PRECISION": self.options.mixed_precision})
        return None if reason is None else f"{name} failed: {reason}"

    def make_questions(self) -> tuple[float, list[str]]:
        """`train.csv` and `test.csv`, by what the base model knows; it is probed unless it was.

        Returns:
            The score under which a row is unknown, and lines for the user.

        Raises:
            InputError: the probe failed, or leaves too few rows of a kind.
        """
        options, table, probed = self.options, self.folder / "questions.csv", self.folder / PROBED
        parts = {"train": self.plan.pool, "test": self.plan.test}
        rows = [row | {"part": name} for name, part in parts.items() for row in part]
        replace_text(table, as_csv(rows).decode())
        if not probed.exists():
            # What is overwritten is a picture that was left.
            own = {"model": options.model, "train_data": table, "output": probed, "overwrite_output": True}
            words = as_words(own | self._for_all | {"dtype": DTYPES[options.mixed_precision][0]})
            notice(f"probing {len(rows):,} rows")
            if failed := self.apart("the probe", self.folder / "probe.log", probe, words):
                raise InputError(failed)
        found, (records, _, _) = read_scores(str(probed)), read_probe_rows(str(probed))
        if found is None or [(r["prompt"], r.get("part")) for r in records] != [(r["prompt"], r["part"]) for r in rows]:
            raise InputError(f"{probed}: it is not the probe of {table}; remove it, and it is made again")
        scores = [float(cells[CHAT]) if cells[CHAT] else math.nan for cells in found[1]]
        of_train = [score for row, score in zip(records, scores, strict=True)
                    if row["part"] == "train" and not math.isnan(score)]  # fmt: skip
        below, how = unknown_below(of_train, options.unknown_below)
        marked = [row | {"known": KNOWN if score >= below else UNKNOWN}
                  for row, score in zip(records, scores, strict=True) if not math.isnan(score)]  # fmt: skip
        to_train, to_answer = ([row for row in marked if row["part"] == name] for name in parts)
        to_train = choose(to_train, [row["known"] == KNOWN for row in to_train], options.train_rows,
                          options.unknown_share)  # fmt: skip
        counts = []
        for name, chosen, what in (("train", to_train, "to train on"), ("test", to_answer, "to answer")):
            if not chosen:
                raise InputError(f"{probed}: no row {what} has a score; see {self.folder / 'probe.log'}")
            replace_text(self.folder / f"{name}.csv", as_csv(chosen).decode())
            counts.append(f"{sum(row['known'] == UNKNOWN for row in chosen):,} of {len(chosen):,} rows {what}")
        lost = sum(map(math.isnan, scores))
        lines = [f"unknown is a {CHAT} below {below:.4g}, {how}: {' and '.join(counts)}"]
        return below, lines + [f"{lost} rows without a {CHAT} are left out"] * bool(lost)

    def make_run(self, run: Run, below: float) -> dict[str, Any] | None:
        """A row of the results: trains and answers, as far as that was not done. `None`, with a line, where it failed.

        `below` is the score under which a row is unknown.
        """
        options, settings, here = self.options, self.plan.settings[run], self.folder / "runs" / run.folder
        name, log, adapter = f"{run.method}, seed {run.seed}", here / "log.txt", here / "adapter"
        took: dict[str, float] = {"train_seconds": 0.0, "peak_memory_gib": math.nan, "noise_to_signal": math.nan}
        if run.is_trained:
            own = {"model": options.model, "train_data": self.folder / "train.csv", "output_model": adapter,
                   "seed": run.seed, "resume_from_checkpoint": "auto", "save_steps": options.save_steps,
                   "save_total_limit": 1}  # fmt: skip
            if settings.unknown_rows != "keep" and settings.unknown_below is None:
                own["unknown_below"] = below
            done = here / "training.json"
            words = as_words(run.flags(options.train_flags) | own | self._for_all)
            if not done.exists() and (failed := self.apart(f"training {name}", log, train, words, done)):
                notice(failed)
                return None
            took = json.loads(read_text(done))
        model: dict[str, Any] = {"model_id": options.model}
        if run.is_trained:
            model = {"model_id": adapter} if settings.full_finetune else {**model, "model_path": adapter}
        done = here / "measures.json"
        asked = {"input_csv": self.folder / "test.csv", "output_csv": here / "answers.csv", "greedy": True, "rounds": 1,
                 "max_new_tokens": options.max_new_tokens, "dtype": DTYPES[options.mixed_precision][0]}  # fmt: skip
        words = as_words(model | asked | self._for_all)
        if not done.exists() and (
            failed := self.apart(f"answering {name}", log, answer, words, settings.refusal, done)
        ):
            notice(failed)
            return None
        key = {"method": run.method, "seed": run.seed, "flags": flags_as_text(options, run)}
        return key | took | json.loads(read_text(done))


def compare(options: argparse.Namespace, apart: Apart) -> bool:
    """Makes the rows that are missing, and the page; returns whether all could be made."""
    plan, folder = make_plan(options), options.output
    there = {(row["method"], row["seed"]) for row in check_folder(options, plan)}
    todo = [run for run in plan.settings if (run.method, str(run.seed)) not in there]
    said = [
        *plan.lines,
        f"{len(plan.settings) - len(todo)} of {len(plan.settings)} runs have their row; so assumed, the others take "
        f"{sum(plan.seconds[run] for run in todo) / 3600:.1f} hours",
        f"{folder} gets {', '.join(sorted(MADE))}",
    ]
    if options.dry_run:
        print(*said, sep="\n")
        return True
    with alone_in(folder):
        rows: list[Mapping[str, Any]] = list(check_folder(options, plan))  # again: now nobody else writes there
        notice(*said)
        write_json(folder / RECORD, plan.fixed)
        replace_text(folder / TEMPLATE, plan.template)
        comparison = Comparison(options, plan, apart)
        below, about = comparison.make_questions()
        notice(*about)

        def write_page(rows: Sequence[Mapping[str, Any]]) -> None:
            title, facts = f"{options.model} on {options.benchmark}", [*plan.lines[:2], *about]
            replace_text(folder / "page.md", page(title, facts, write_results(folder / RESULTS, rows)))

        made, spent, expected = 0, 0.0, 0.0
        for number, run in enumerate(todo, start=1):
            began = time.monotonic()
            row = comparison.make_run(run, below)
            spent, expected = spent + time.monotonic() - began, expected + plan.seconds[run]
            if row is None:
                continue
            made, rows = made + 1, [*rows, row]
            write_page(rows)
            left = sum(plan.seconds[other] for other in todo[number:]) * spent / expected
            notice(f"{number} of {len(todo)}: {run.method}, seed {run.seed}: right {row['right_rate']:.1%}, wrong "
                   f"{row['wrong_rate']:.1%}; by the time that it took, {left / 3600:.1f} hours are left")  # fmt: skip
        if rows:
            write_page(rows)
            notice(f"the page is {folder / 'page.md'}")
    return made == len(todo)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises `InputError` for what cannot be."""
    parser = OneLineParser(prog="compare.py", allow_abbrev=False,
                           description="Compares methods on a real model and real questions.")  # fmt: skip
    add = parser.add_argument
    add("--model", type=a_path, required=True, help="the base model: a folder, or a name on the hub")
    add("--benchmark", choices=[name for name, kind in BENCHMARKS.items() if not kind.plain], required=True,
        help="what the questions are of")  # fmt: skip
    add("--source", type=a_path, required=True, metavar="FILE", help="its data: docs/answers.md says in which formats")
    add("--output", type=Path, required=True, help="folder for everything that is made; the same one to go on")
    add("--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(METHODS)}, or one with other flags of "
        "train_loop.py, such as plain:learning_rate=1e-4:epochs=3 (default: all)")  # fmt: skip
    add("--train_flags", nargs="+", default=[], metavar="FLAG=VALUE", help="flags of train_loop.py for all methods")
    add("--seeds", type=integer("a number", 1, 1000), default=3, help="trainings of each method (default: 3)")
    add("--first_seed", type=integer("a seed", 0, 10**6), default=0, help="of the first training (default: 0)")
    add("--train_rows", type=integer("a number", 1, 10**7), default=2000, help="questions to train on (default: 2000)")
    add("--test_rows", type=integer("a number", 1, 10**7), default=1000, help="questions to answer (default: 1000)")
    add(
        "--split_seed",
        type=integer("a seed", 0, 10**6),
        default=0,
        help="decides which questions these are (default: 0)",
    )
    add("--unknown_share", type=number("a share", 0, 1), metavar="SHARE", help="of the rows to train on, the share "
        "that the base model does not know (default: as they come)")  # fmt: skip
    add("--unknown_below", type=number("a score", -1e6, 0), metavar="SCORE", help="a row is unknown if the mean "
        "log-probability of its answer's decisive tokens is lower (default: where the rows part in two, else their "
        "median)")  # fmt: skip
    add("--max_new_tokens", type=integer("a number", 1, 10**6), help="of an answer (default: the benchmark's)")
    add("--chat_template", type=a_path, metavar="NAME|FILE", help="as of train_loop.py")
    add(
        "--mixed_precision", choices=DTYPES, help="of training; weights are of it too (default: bf16 on a GPU, else no)"
    )
    add(
        "--save_steps", type=integer("a number", 1, 10**9), default=100, help="steps between checkpoints (default: 100)"
    )
    add("--tflops", type=number("a number", 1e-6, 1e6), default=150.0, help="what the device is assumed to do, for the "
        "estimate of the time (default: 150)")  # fmt: skip
    add("--dry_run", action="store_true", help="check everything, say what it takes, and write nothing")
    add("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    add_token(parser)
    options = argparse.Namespace(**without_token(vars(parser.parse_args(arguments))))
    if options.mixed_precision is None:
        import torch

        options.mixed_precision = "bf16" if torch.cuda.is_available() else "no"
    options.max_new_tokens = options.max_new_tokens or BENCHMARKS[options.benchmark].new_tokens
    return options


def main(arguments: Sequence[str] | None = None, apart: Apart = apart) -> int:
    """Runs the command line, with `apart` for processes of their own; returns the exit status."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError("start it as one process, with python: it trains on one device")
    return 0 if compare(parse_options(arguments), apart) else 1


if __name__ == "__main__":
    # Turned into an exception, so that a polite kill is passed on: a training then writes a checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with one_line_errors("compare.py"):
        status = main()
    sys.exit(status)
