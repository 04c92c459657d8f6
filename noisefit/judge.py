"""Have the answers of `generate.py` graded by a model: right, wrong or not attempted.

    python -m noisefit.judge answers.csv --base_url http://localhost:8000/v1 --model NAME

Any server that speaks OpenAI's API: vLLM, llama.cpp, OpenAI's own. Each verdict is on the disk as soon as it is there:
after a kill, or where the server dies, the same command goes on and asks for what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from noisefit.answers.judge_server import KEYS, Server, check_url, import_openai, key_name, read_key
from noisefit.answers.judging import (
    AGAIN,
    COLUMN,
    PROMPT,
    UNPARSABLE,
    Answer,
    Case,
    Verdicts,
    cohen_kappa,
    read_cases,
)
from noisefit.answers.outcomes import NOT_ATTEMPTED, RIGHT, WRONG
from noisefit.answers.outcomes import OUTCOMES as GRADES
from noisefit.answers.output import check_answers_output
from noisefit.answers.scoring import bootstrap_interval
from noisefit.base.command_line import HelpFormatter, OneLineParser
from noisefit.base.errors import InputError, notice, one_line_errors
from noisefit.base.files import alone_in, replacing, writing
from noisefit.base.settings import add_flags, check_fields, setting
from noisefit.inputs.tables import as_csv
from noisefit.score import FEW

OUTCOMES = (*GRADES, UNPARSABLE)


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """The settings of judging.

    Raises:
        InputError: a value is out of its range, or an address is none.
    """

    base_url: str = setting(help="the server's address, such as http://localhost:8000/v1 (required)", metavar="URL")
    model: str = setting(help="the judge, as the server calls it (required)", metavar="NAME")
    output: str | None = setting(
        None, "CSV for the answers with their grades; default: ANSWERS_judged.csv", is_path=True, metavar="FILE"
    )
    overwrite_output: bool = setting(False, "replace a file that is already there")
    cache: str | None = setting(
        None, "folder for the verdicts, which other runs may use too; default: OUTPUT.verdicts", is_path=True,
        metavar="FOLDER",
    )  # fmt: skip
    concurrency: int = setting(8, "requests at a time", low=1, high=1000)
    timeout: float = setting(120.0, "seconds that a reply may take", low=0, high=86400, open_low=True)
    retries: int = setting(
        8,
        "of a request that fails, at growing distances, before the run ends; 8 take up to 40 seconds",
        low=0,
        high=1000,
    )
    max_tokens: int = setting(1024, "of a reply, thinking included; 0: no limit is sent", low=0, high=10**6)

    def __post_init__(self) -> None:
        for name in ("base_url", "model"):
            if not getattr(self, name).strip():
                raise InputError(f"--{name} is required; see --help")
        check_fields(self)
        object.__setattr__(self, "base_url", check_url(self.base_url))


def judge(path: str, settings: JudgeSettings) -> dict[str, Any]:
    """Grade a file's answers, write them with their grades, and return what `--json` prints.

    Raises:
        InputError: as `read_cases`, `check_answers_output` and `Server.ask_all`.
    """
    source = Path(path)
    output = Path(
        os.path.realpath(settings.output or source.with_name(f"{source.stem}_judged.csv"))
    )  # a link stays one
    check_answers_output(output, source, settings.overwrite_output, "--output")
    answers = read_cases(path)
    import_openai()
    server = Server(settings.base_url, settings.model, read_key(os.environ), settings.concurrency, settings.timeout,
                    settings.retries, settings.max_tokens)  # fmt: skip
    folder = Path(settings.cache) if settings.cache else output.with_name(output.name + ".verdicts")
    with alone_in(folder):
        verdicts = Verdicts(folder, [server.base_url, server.model, server.max_tokens])
        ask_for_missing(server, answers, verdicts, path)
        outcomes = [str(verdicts.get(answer.case)) for answer in answers]
        write_outcomes(output, answers, outcomes)
    notice(f"the grades are in {output}; the verdicts, with the judge's words, in {folder}")
    return {"file": path, "output": str(output), "judge": server.model} | summarize_outcomes(answers, outcomes)


def ask_for_missing(server: Server, answers: Sequence[Answer], verdicts: Verdicts, path: str) -> None:
    """Have the cases graded of which there is no verdict, each once however many rounds say the same."""
    cases: dict[Case, Answer] = {}
    for answer in answers:
        cases.setdefault(answer.case, answer)
    left = [answer for case, answer in cases.items() if verdicts.get(case) is None]
    there = len(cases) - len(left)
    known = f", {there} judged already" if there else ""
    key = f"the key of {key_name(os.environ)}" if server.key else "no key"
    notice(f"{path}: {len(answers)} answers, {len(cases)} of them different{known}; {server.base_url}, with {key}")
    interval = 0.1 if sys.stderr.isatty() else 20
    progress = tqdm(total=len(cases), initial=there, desc="judging", unit="answer", mininterval=interval)

    def keep(answer: Answer, outcome: str, replies: list[str]) -> None:
        verdicts.add(answer.case, outcome, replies)
        progress.update()

    try:
        asyncio.run(server.ask_all(left, keep))
    except InputError as error:
        done = sum(verdicts.get(case) is not None for case in cases)
        kept = (
            f"; {done} of {len(cases)} verdicts are in {verdicts.path.parent}: the same command goes on" if done else ""
        )
        raise type(error)(f"{error}{kept}") from None
    finally:
        progress.close()


def write_outcomes(output: Path, answers: Sequence[Answer], outcomes: Sequence[str]) -> None:
    """Write the CSV, whole or not at all: the input's columns, and `judge_outcome`."""
    columns = dict.fromkeys(name for answer in answers for name in answer.record)  # the outcome is the last one
    rows = (dict.fromkeys(columns) | dict(a.record) | {COLUMN: o} for a, o in zip(answers, outcomes, strict=True))
    with writing(output), replacing(output) as beside:
        beside.write_bytes(as_csv(rows))


def summarize_outcomes(answers: Sequence[Answer], outcomes: Sequence[str]) -> dict[str, Any]:
    """The share of each outcome, a mean over prompts with its 95% bootstrap interval, and the agreement with words."""
    rounds: dict[str, list[str]] = {}
    for answer, outcome in zip(answers, outcomes, strict=True):
        rounds.setdefault(answer.prompt, []).append(outcome)
    summary: dict[str, Any] = {"prompts": len(rounds), "answers": len(answers)}
    summary |= {name: outcomes.count(name) for name in OUTCOMES}
    for name in OUTCOMES:
        shares = np.array([given.count(name) / len(given) for given in rounds.values()])
        summary |= {f"{name}_rate": float(shares.mean()), f"{name}_rate_ci": bootstrap_interval(shares)}
    attempted = summary[RIGHT] + summary[WRONG]
    summary["right_given_attempted"] = summary[RIGHT] / attempted if attempted else None
    graded = [(o, a.by_words) for a, o in zip(answers, outcomes, strict=True) if o != UNPARSABLE]
    return summary | {
        "agreement": {
            "answers": len(graded),
            "share": sum(a == b for a, b in graded) / len(graded) if graded else None,
            "kappa": cohen_kappa(graded),
            "judge_and_words": {a: {b: graded.count((a, b)) for b in GRADES} for a in GRADES},
        }
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    counts = ", ".join(f"{report[name]} {name.replace('_', ' ')}" for name in OUTCOMES)
    lines = [f"{report['output']}: {report['answers']} answers to {report['prompts']} prompts: {counts}"]
    if report["prompts"] < FEW:
        lines.append(f"  with fewer than {FEW} prompts the intervals are too narrow")
    for name in OUTCOMES:
        low, high = report[f"{name}_rate_ci"]
        title = f"{name.replace('_', ' ')} rate"
        lines.append(f"  {title:<24}{report[f'{name}_rate']:>7.1%}   95% interval {low:.1%} to {high:.1%}")
    if report["right_given_attempted"] is not None:
        lines.append(f"  {'right given attempted':<24}{report['right_given_attempted']:>7.1%}")
    agreement = report["agreement"]
    if agreement["answers"]:
        kappa = agreement["kappa"]
        said = "not defined: both say one thing of all" if kappa is None else f"{kappa:.3f}"
        lines.append(f"  {'same as the word rule':<24}{agreement['share']:>7.1%}   Cohen's kappa {said}")
        both = agreement["judge_and_words"]
        others = [(a, b, both[a][b]) for a in GRADES for b in (RIGHT, WRONG, NOT_ATTEMPTED) if a != b and both[a][b]]
        lines += [f"    {n} {a.replace('_', ' ')} by the judge, {b.replace('_', ' ')} by words" for a, b, n in others]
    return "\n".join(lines)


class _NoKey(argparse.Action):
    """A key on a command line is seen by all who list processes, and stays in the shell's history."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise InputError(f"{option_string}: no flag takes a key; put it into the environment, as {KEYS[0]}")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        prog="python -m noisefit.judge",
        usage="python -m noisefit.judge ANSWERS --base_url URL --model NAME [options]",
        description="Have answers graded by a model: right, wrong or not attempted.",
        epilog=f"The server's key, if it wants one, is read from {KEYS[0]}, or where that is not set {KEYS[1]}, in the "
        "environment. It is never written anywhere.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("answers", nargs="?", metavar="ANSWERS", help="answers of generate.py, with column response")
    parser.add_argument("--show_prompt", action="store_true", help="print what the judge is asked, and end")
    parser.add_argument("--json", action="store_true", help="one JSON object for machines")
    parser.add_argument("--api_key", "--apikey", "--key", "--token", "--openai_api_key", nargs="?", action=_NoKey,
                        help=argparse.SUPPRESS)  # fmt: skip
    add_flags(parser, {"the judge": JudgeSettings})
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.judge"):
        given = vars(build_parser().parse_intermixed_args(argv))
        path, shows, as_json = given.pop("answers"), given.pop("show_prompt"), given.pop("json")
        given.pop("api_key")
        if shows:
            print(f"{PROMPT}\n\nAfter a reply that is no grade, once:\n\n{AGAIN}")
            return
        if path is None:
            raise InputError("ANSWERS is required: a file of generate.py; see --help")
        report = judge(os.path.expanduser(path), JudgeSettings(**{"base_url": "", "model": ""} | given))
        print(json.dumps(report, indent=2) if as_json else table(report))


if __name__ == "__main__":
    main()
