"""Benchmarks as questions for `generate.py`, from files that you have; and the letters of TruthfulQA's answers.

    python -m noisefit.benchmarks NAME --source FILE --output questions.csv
    python -m noisefit.benchmarks letters answers.csv [--json]

TruthfulQA by generated letter and HaluEval QA are those of the published evaluation, for `--chat_template plain`.
TriviaQA, NQ-open, PopQA and SimpleQA are questions for the chat format. The answers to TruthfulQA are scored by
`letters`, all others by `noisefit.score`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from noisefit.answers.output import check_answers_output
from noisefit.answers.reading import answer_cell
from noisefit.answers.scoring import bootstrap_interval
from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path
from noisefit.base.errors import InputError, notice, one_line_errors
from noisefit.base.files import replacing, writing
from noisefit.inputs.benchmark_data import BENCHMARKS, LETTERS, read_questions
from noisefit.inputs.tables import as_csv, describe_skipped, read_records
from noisefit.score import FEW, read_answers


def write_questions(name: str, path: str, output_name: str, overwrite: bool = False) -> None:
    """Make the file that `generate.py` takes, whole or not at all, and say what comes next.

    Raises:
        InputError: as `read_questions` and `check_answers_output`.
    """
    output = Path(os.path.realpath(output_name))  # a link stays one
    check_answers_output(output, Path(path), overwrite, "--output")
    questions, left_out = read_questions(path, BENCHMARKS[name])
    with writing(output), replacing(output) as beside:
        beside.write_bytes(as_csv(questions))
    plain = "--chat_template plain " * BENCHMARKS[name].plain
    notice(
        *(describe_skipped(path, rows, why) for why, rows in left_out.items()),
        f"the questions, {len(questions)} of them, are in {output_name}",
        f"next, the answers: accelerate launch generate.py --model_path ADAPTER --input_csv {shlex.quote(output_name)} "
        f"{plain}--greedy --rounds 1 --max_new_tokens {BENCHMARKS[name].new_tokens}",
    )


def letter_of(answer: str, choices: int) -> str | None:
    """The letter that an answer gives: the first capital letter from A to D that stands alone as a word, if any.

    So says the published program, which knows four choices. Where a question has more, their letters count too.
    """
    found = re.search(rf"\b[A-{LETTERS[max(choices, 4) - 1]}]\b", answer)
    return found[0] if found else None


def score_letters(path: str) -> dict[str, Any]:
    """What `letters --json` prints: the share of right letters, a mean over prompts with its 95% bootstrap interval.

    Raises:
        InputError: as `read_answers`; or a row does not name its right letter and the number of its choices.
    """
    for row, record in read_records(path, ("answer", "choices")):
        if "generated_response" not in record:
            raise InputError(f"{path}: it has the questions and no answers; give them to generate.py first")
        right, choices = (answer_cell(path, row, column, record.get(column)) for column in ("answer", "choices"))
        if choices not in map(str, range(2, len(LETTERS) + 1)):
            raise InputError(f"{path}: row {row}: choices is {choices[:40]!r}, expected 2 to {len(LETTERS)}")
        if right not in tuple(LETTERS[: int(choices)]):
            raise InputError(f"{path}: row {row}: answer is {right[:40]!r}, expected a letter of {choices} choices")
    prompts = read_answers(path, by="choices")
    given = [[letter_of(answer, int(prompt.group)) for answer in prompt.answers] for prompt in prompts]
    is_right = [[letter == p.truth for letter in letters] for letters, p in zip(given, prompts, strict=True)]
    shares = np.array([np.mean(rounds) for rounds in is_right])
    answers, right_ones = sum(map(len, given)), sum(map(sum, is_right))
    return {
        "file": path,
        "accuracy": float(shares.mean()),
        "accuracy_ci": bootstrap_interval(shares),
        "prompts": len(prompts),
        "answers": answers,
        "right": right_ones,
        "wrong": answers - right_ones,
        "no_letter": sum(letters.count(None) for letters in given),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    few = f"\n  with fewer than {FEW} prompts the interval is too narrow" if report["prompts"] < FEW else ""
    low, high = report["accuracy_ci"]
    return (
        f"{report['file']}: {report['answers']} answers to {report['prompts']} prompts: {report['right']} right, "
        f"{report['wrong']} wrong, {report['no_letter']} of these without a letter{few}\n"
        f"  accuracy            {report['accuracy']:>7.1%}   95% interval {low:.1%} to {high:.1%}"
    )


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    options: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}
    parser = OneLineParser(
        prog="python -m noisefit.benchmarks", description="Benchmarks, from files of their data.", **options
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=f"{benchmark.title}: questions for generate.py", **options)
        what = "the benchmark's data: CSV, TSV, JSON, JSON Lines or Parquet"
        command.add_argument("--source", metavar="FILE", type=a_path, required=True, help=what)
        command.add_argument("--output", metavar="FILE", type=a_path, required=True, help="CSV for the questions")
        command.add_argument("--overwrite_output", action="store_true", help="replace a file that is already there")
    command = commands.add_parser("letters", help="score the answers to TruthfulQA", **options)
    command.add_argument("file", metavar="FILE", type=a_path, help="answers of generate.py")
    command.add_argument("--json", action="store_true", help="one JSON object for machines")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.benchmarks"):
        args = build_parser().parse_args(argv)
        if args.command == "letters":
            report = score_letters(args.file)
            print(json.dumps(report, indent=2) if args.json else table(report))
        else:
            write_questions(args.command, args.source, args.output, args.overwrite_output)


if __name__ == "__main__":
    main()
