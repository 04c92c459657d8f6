"""Below which confidence answers are to be refused, so that few are wrong.

    python -m noisefit.threshold answers.csv --target_wrong 0.05 [--json]

By conformal risk control, with the guarantee that it gives: see `noisefit/answers/conformal.py`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from noisefit.answers.conformal import threshold_for
from noisefit.answers.outcomes import RIGHT, WRONG, Assessed, assess
from noisefit.answers.reading import LOGPROB, read_answers, read_phrases
from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path
from noisefit.base.errors import InputError, one_line_errors


def find_threshold(path: str, target: float, more: Sequence[str] = ()) -> dict[str, Any]:
    """What `--json` prints: the threshold, and what answering from it on does to these answers.

    It goes by the answers as they were before `generate.py --abstain_below` replaced some: a refusal in the place of a
    wrong answer would say that this one may be given.

    Raises:
        InputError: as `read_answers`; or the answers have no log-probabilities.
    """
    prompts = read_answers(path, None, before_abstaining=True)
    if any(prompt.logprobs is None for prompt in prompts):
        raise InputError(f"{path}: no column {LOGPROB!r} with a value in it; expected the answers of generate.py, "
                         "which writes it")  # fmt: skip
    assessed = assess(prompts, more)
    threshold = threshold_for(assessed, target)
    report: dict[str, Any] = {"file": path, "target_wrong": target, "threshold": threshold, "prompts": len(prompts)}
    if threshold is None:
        needed = math.ceil(1 / target - 1e-9) - 1
        few = f"; a target of {target:g} needs {needed} prompts at least" if len(prompts) < needed else ""
        report["reason"] = f"no threshold keeps the guarantee and lets an answer of these through{few}"
    return report | _shares(assessed, math.inf if threshold is None else threshold)


def _shares(assessed: Sequence[Assessed], threshold: float) -> dict[str, float | None]:
    """Means over the prompts, where answers below the threshold are refused."""

    def share(*kinds: str) -> float:
        return float(np.mean([
            np.mean([o in kinds and np.exp(p) >= threshold
                     for o, p in zip(item.outcomes, item.prompt.logprobs or (), strict=True)])
            for item in assessed
        ]))  # fmt: skip

    answered, wrong = share(RIGHT, WRONG), share(WRONG)
    return {
        "answered_rate": answered,
        "right_rate": share(RIGHT),
        "wrong_rate": wrong,
        "wrong_given_answered": wrong / answered if answered else None,
    }


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    asked, target = f"{report['file']}: {report['prompts']} prompts", report["target_wrong"]
    if report["threshold"] is None:
        return f"{asked}: {report['reason']}: refuse all"
    given = report["wrong_given_answered"]
    return "\n".join([
        f"{asked}: answer where the confidence is at least {report['threshold']!r}",
        f"  of these prompts {report['answered_rate']:.1%} are then answered: {report['right_rate']:.1%} right, "
        f"{report['wrong_rate']:.1%} wrong" + (f" ({given:.1%} of those answered)" if given is not None else ""),
        f"  for a further prompt of the same kind the probability that it is answered and wrong is at most {target:g}, "
        "on average over such sets of prompts (conformal risk control)",
        f"  next: generate.py --abstain_below {report['threshold']!r}",
    ])  # fmt: skip


def _target(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        prog="python -m noisefit.threshold",
        description="Below which confidence answers are to be refused.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", type=a_path, help="answers of generate.py, with the columns response and logprob")
    add("--target_wrong", type=_target, required=True, metavar="SHARE", help="of prompts that may be answered wrong")
    add("--refusals", type=a_path, metavar="FILE", help="further phrases that refuse, one a line")
    add("--json", action="store_true", help="one JSON object for machines")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.threshold"):
        args = build_parser().parse_args(argv)
        report = find_threshold(args.file, args.target_wrong, read_phrases(args.refusals))
        print(json.dumps(report, indent=2) if args.json else text_of(report))


if __name__ == "__main__":
    main()
