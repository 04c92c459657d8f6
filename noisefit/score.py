"""How true the answers of `generate.py` are.

    python -m noisefit.score answers.csv [more.csv ...] [--by COLUMN] [--json]

Files with answers to the same questions are compared with the first one, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from noisefit.answers.entropy import same_by_model, same_by_words, with_entropy
from noisefit.answers.figures import (
    CONFIDENCE_FIGURES,
    ENTROPY_FIGURES,
    RATES,
    confidences,
    differences,
    with_intervals,
)
from noisefit.answers.outcomes import OUTCOMES, Assessed, assess, calls_for_refusal
from noisefit.answers.output import check_answers_output
from noisefit.answers.per_prompt import row_of
from noisefit.answers.reading import LOGPROB, read_answers, read_phrases
from noisefit.answers.reading import NEEDED as NEEDED  # for noisefit.benchmarks
from noisefit.answers.scoring import METRICS, compare, summarize
from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path
from noisefit.base.errors import InputError, notice, one_line_errors
from noisefit.base.files import replacing, writing
from noisefit.inputs.tables import as_csv

FEW = 20  # prompts, under which a bootstrap interval holds less than it says
NATS = ("semantic_entropy",)  # the figures that are no shares
IN_GROUPS = ("right_rate", "wrong_rate", "not_attempted_rate", "auroc")  # told of each; --json has all
COMPARED = ("right_rate", "wrong_rate", "auroc")  # likewise
LABELS = {"right_given_attempted": "right if attempted", "semantic_entropy_auroc": "its auroc"}
PLAIN = ("auroc", "brier", "ece", "aurc", "semantic_entropy_auroc")  # by convention not in percent


def read_assessed(
    paths: Sequence[str], by: str | None, more: Sequence[str] = (), entailment_model: str | None = None
) -> list[list[Assessed]]:
    """The prompts of each file with the outcomes of their answers, and the entropy of their rounds.

    Raises:
        InputError: a file cannot be used, the files ask different questions, or there is no such entailment model.
    """
    files = [read_answers(path, by) for path in paths]
    for path, prompts in zip(paths[1:], files[1:], strict=True):
        if {(p.prompt, p.reference) for p in prompts} != {(p.prompt, p.reference) for p in files[0]}:
            raise InputError(f"{path}: it has other questions or responses than {paths[0]}; only the same compare")
    if entailment_model is None:
        return [with_entropy(assess(prompts, more), same_by_words(more)) for prompts in files]
    for path, prompts in zip(paths, files, strict=True):
        if any(len(prompt.answers) < 2 for prompt in prompts):
            raise InputError(f"--entailment_model: {path}: it has one round, and rounds are what it tells apart; ask "
                             "with more --rounds")  # fmt: skip
    same = same_by_model(entailment_model, [prompt for prompts in files for prompt in prompts])
    return [with_entropy(assess(prompts, more), same) for prompts in files]


def report_of(
    paths: Sequence[str], files: Sequence[Sequence[Assessed]], by: str | None, more: Sequence[str] = ()
) -> dict[str, Any]:
    """What `--json` prints: the first file's figures at the top level, further files and groups below."""
    reports = []
    for path, assessed in zip(paths, files, strict=True):
        report: dict[str, Any] = {"file": path} | figures_of(assessed, more)
        if by:
            groups: dict[str, list[Assessed]] = {}
            for item in assessed:
                groups.setdefault(item.prompt.group, []).append(item)
            report["by"] = {by: {name: figures_of(group, more) for name, group in groups.items()}}
        reports.append(report)
    for report, assessed in zip(reports[1:], files[1:], strict=True):
        first, second = ([item.prompt for item in file] for file in (files[0], assessed))
        pair: dict[str, Any] = dict(compare(first, second))
        report["compared_with_first"] = pair | {"figures": differences(files[0], assessed)}
    return reports[0] | ({"others": reports[1:]} if reports[1:] else {})


def figures_of(assessed: Sequence[Assessed], more: Sequence[str] = ()) -> dict[str, Any]:
    """All figures of some prompts, and counts: of answers by outcome, and of prompts that are to be refused."""
    found: dict[str, Any] = dict(summarize([item.prompt for item in assessed]))
    found |= {kind: sum(item.outcomes.count(kind) for item in assessed) for kind in OUTCOMES}
    found["to_be_refused"] = sum(calls_for_refusal(item.prompt, more) for item in assessed)
    return found | with_intervals(assessed)


def score(paths: Sequence[str], by: str | None) -> dict[str, Any]:
    """`report_of` some files.

    Raises:
        InputError: as `read_assessed`.
    """
    return report_of(paths, read_assessed(paths, by), by)


def table(report: dict[str, Any], by: str | None) -> str:
    """The report for people. Outcomes are told where some answer is a refusal, or should be."""
    lines = []
    for entry in (report, *report.get("others", [])):
        lines.append(f"{entry['file']}: {_counts(entry)}")
        if entry["prompts"] < FEW:
            lines.append(f"  with fewer than {FEW} prompts the intervals are too narrow")
        own_lines = (*CONFIDENCE_FIGURES, *ENTROPY_FIGURES)
        lines += [f"  {_line(entry, name)}" for name in _shown(entry) if name not in own_lines]
        lines += _confidence(entry)
        for name, group in entry.get("by", {}).get(by, {}).items():
            share, interval = group["hallucination_rate"], _interval(group, "hallucination_rate")
            what = f"{by} {name}"
            lines.append(
                f"    {what[:30]:<30} hallucination rate {share:>6.1%} ({interval}), {group['prompts']} prompts"
            )
            told = [f"{_label(name)} {_said(name, group[name])}" for name in _shown(entry) if name in IN_GROUPS]
            lines += [f"      {', '.join(told)}"] if told else []
        if "compared_with_first" in entry:
            pair = entry["compared_with_first"]
            low, high = (100 * end for end in pair["difference_ci"])
            lines.append(
                f"  hallucination rate against {report['file']}: {100 * pair['difference']:+.1f} points "
                f"({low:+.1f} to {high:+.1f}), p = {pair['p_value']:.2g}"
            )
            shown = {*_shown(report), *_shown(entry)}
            lines += [_difference(name, pair["figures"][name]) for name in COMPARED
                      if name in pair["figures"] and name in shown]  # fmt: skip
    return "\n".join(lines)


def _counts(entry: Mapping[str, Any]) -> str:
    none = f", {entry['not_attempted']} not attempted" if entry["not_attempted"] else ""
    refused = f"; {entry['to_be_refused']} prompts are to be refused" if entry["to_be_refused"] else ""
    return (f"{entry['answers']} answers to {entry['prompts']} prompts: {entry['right']} right, {entry['wrong']} wrong"
            f"{none}{refused}")  # fmt: skip


def _shown(entry: Mapping[str, Any]) -> list[str]:
    rates = RATES if entry["not_attempted"] or entry["to_be_refused"] else ()
    return [name for name in (*METRICS, *rates, *CONFIDENCE_FIGURES, *ENTROPY_FIGURES) if name in entry]


def _confidence(entry: Mapping[str, Any]) -> list[str]:
    """The figures of confidence and of entropy that there are, without their intervals, which --json has."""
    lines = []
    if "semantic_entropy" in entry:
        auroc = _said("semantic_entropy_auroc", entry["semantic_entropy_auroc"])
        lines = [f"  {'semantic entropy':<20}  {_said('semantic_entropy', entry['semantic_entropy'])} nats, its auroc "
                 f"{auroc}"]  # fmt: skip
    if "auroc" not in entry:
        return lines
    whole = [name for name in CONFIDENCE_FIGURES if not name.startswith("wrong_at_")]
    said = {name: "–" if entry[name] is None else _said(name, entry[name]) for name in CONFIDENCE_FIGURES}
    at = [f"{name.removeprefix('wrong_at_')}%: {said[name]}" for name in CONFIDENCE_FIGURES if name not in whole]
    return [*lines, f"  {'confidence':<20}  {', '.join(f'{_label(name)} {said[name]}' for name in whole)}",
            f"  {'wrong of the surest':<20}  {', '.join(at)}"]  # fmt: skip


def _line(entry: Mapping[str, Any], name: str) -> str:
    label = _label(name)
    if entry[name] is None:
        return f"{label:<20}  not defined here"
    return f"{label:<20}{_said(name, entry[name]):>7}   95% interval {_interval(entry, name)}"


def _difference(name: str, pair: Mapping[str, Any]) -> str:
    label = _label(name)
    if pair["difference"] is None:
        return f"    {label}: not defined in both"
    values = [pair["difference"], *pair["difference_ci"]]
    points = name not in (*PLAIN, *NATS)
    shown = [f"{100 * value:+.1f}" if points else f"{value:+.3f}" for value in values]
    return f"    {label}: {shown[0]}{' points' if points else ''} ({shown[1]} to {shown[2]}), p = {pair['p_value']:.2g}"


def _label(name: str) -> str:
    if name.startswith("wrong_at_"):
        return f"wrong at {name.removeprefix('wrong_at_')}%"
    return LABELS.get(name, name.replace("_", " "))


def _said(name: str, value: float | None) -> str:
    if value is None:
        return "not defined"
    return f"{value:.3f}" if name in (*PLAIN, *NATS) else f"{value:.1%}"


def _interval(entry: Mapping[str, Any], name: str) -> str:
    low, high = entry[f"{name}_ci"]
    return f"{_said(name, low)} to {_said(name, high)}"


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        prog="python -m noisefit.score",
        description="How true answers are.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="answers of generate.py, with the column response")
    add("--by", metavar="COLUMN", help="also per value of this column")
    add("--refusals", type=a_path, metavar="FILE", help="further phrases that refuse, one a line")
    add("--entailment_model", type=a_path, metavar="MODEL", help="tells the meanings of rounds apart; else words do")
    add("--per_prompt", type=a_path, metavar="CSV", help="a row a prompt: verdict, words that decided, figures")
    add("--picture", type=a_path, metavar="PNG", help="curves of risk and coverage, where answers have a logprob")
    add("--overwrite_output", action="store_true", help="replace files that are already there")
    add("--json", action="store_true", help="one JSON object for machines")
    return parser


def check_outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Where the flags' files go, by flag, links followed. Raises `InputError` where they cannot be written."""
    given = {"--per_prompt": (args.per_prompt, ".csv"), "--picture": (args.picture, ".png")}
    found = {}
    for flag, (name, suffix) in given.items():
        if name is not None:
            found[flag] = Path(os.path.realpath(name))  # a link stays one
            for source in map(Path, (*args.files, *([args.refusals] if args.refusals else []))):
                check_answers_output(found[flag], source, args.overwrite_output, flag, suffix)
    return found


def write_outputs(
    outputs: Mapping[str, Path], paths: Sequence[str], files: Sequence[Sequence[Assessed]], more: Sequence[str]
) -> None:
    """Write the files of `check_outputs`, all or none.

    Raises:
        InputError: `--picture` without log-probabilities, or as `pictures.draw`.
    """
    contents = {}
    if "--picture" in outputs:
        for path, assessed in zip(paths, files, strict=True):
            if confidences(assessed) is None:
                raise InputError(f"--picture: {path}: no column {LOGPROB!r} with a value in it, so no confidence")
        from noisefit.answers.pictures import picture_of  # here, as it imports matplotlib: seconds

        contents[outputs["--picture"]] = picture_of(dict(zip(paths, files, strict=True)))
    if "--per_prompt" in outputs:
        rows = [
            {"file": path} | row_of(item, more)
            for path, assessed in zip(paths, files, strict=True)
            for item in assessed
        ]
        contents[outputs["--per_prompt"]] = as_csv(rows)
    with ExitStack() as stack:
        for output, content in contents.items():
            stack.enter_context(writing(output))
            stack.enter_context(replacing(output)).write_bytes(content)
    notice(*(f"{flag}: {path}" for flag, path in outputs.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.score"):
        args = build_parser().parse_intermixed_args(argv)
        outputs, more = check_outputs(args), read_phrases(args.refusals)
        files = read_assessed(args.files, args.by, more, args.entailment_model)
        report = report_of(args.files, files, args.by, more)
        write_outputs(outputs, args.files, files, more)
        print(json.dumps(report, indent=2) if args.json else table(report, args.by))


if __name__ == "__main__":
    main()
