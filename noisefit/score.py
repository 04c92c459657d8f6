"""How true the answers of `generate.py` are.

    python -m noisefit.score answers.csv [more.csv ...] [--by COLUMN] [--json]

Files with answers to the same questions are compared with the first one, pair by pair.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from noisefit.answers.scoring import METRICS, Prompt, compare, group_by, summarize
from noisefit.base.command_line import HelpFormatter, OneLineParser
from noisefit.base.errors import InputError, one_line_errors
from noisefit.inputs.tables import read_records, text_cell

FEW = 20  # prompts, under which a bootstrap interval holds less than it says
NEEDED = ("prompt", "response", "generated_response")


def read_answers(path: str, by: str | None) -> list[Prompt]:
    """The answers of a file, a prompt with all its rounds each, in order of first appearance.

    Raises:
        InputError: as `read_records`; a row without prompt or reference; one prompt with two references or groups; a
            round with fewer answers than another.
    """
    columns = (*NEEDED, by) if by else NEEDED
    found: dict[str, dict[str, Any]] = {}
    rounds: Counter[str] = Counter()
    for row, record in read_records(path, columns):
        prompt, reference = (text_cell(path, row, column, record.get(column)) for column in NEEDED[:2])
        if not prompt or not reference:
            raise InputError(f"{path}: row {row}: prompt or response is empty: nothing to compare with")
        facts = {
            "response": reference,
            **{column: text_cell(path, row, column, record.get(column)) for column in ("answer", "question")},
            **({by: text_cell(path, row, by, record.get(by))} if by else {}),
        }
        entry = found.setdefault(prompt, {"facts": facts, "answers": [], "row": row})
        for column, value in facts.items():
            if entry["facts"][column] != value:
                raise InputError(f"{path}: rows {entry['row']} and {row} give one prompt two values of {column!r}")
        entry["answers"].append(text_cell(path, row, NEEDED[2], record.get(NEEDED[2])))
        rounds[str(record.get("round"))] += 1
    if not found:
        raise InputError(f"{path}: it has no rows")
    if len(set(rounds.values())) > 1:
        counts = ", ".join(f"{count} of round {name}" for name, count in rounds.items())
        raise InputError(f"{path}: answers are missing: {counts}")
    return [
        Prompt(prompt, facts["response"], tuple(e["answers"]), facts["answer"], facts.get(by, ""), facts["question"])
        for prompt, e in found.items()
        for facts in [e["facts"]]
    ]


def score(paths: Sequence[str], by: str | None) -> dict[str, Any]:
    """What `--json` prints: the first file's figures at the top level, further files and groups below.

    Raises:
        InputError: a file cannot be used, or the files ask different questions.
    """
    files = [read_answers(path, by) for path in paths]
    for path, prompts in zip(paths[1:], files[1:], strict=True):
        if {(p.prompt, p.reference) for p in prompts} != {(p.prompt, p.reference) for p in files[0]}:
            raise InputError(f"{path}: it has other questions or responses than {paths[0]}; only the same compare")
    reports = []
    for path, prompts in zip(paths, files, strict=True):
        report: dict[str, Any] = {"file": path} | summarize(prompts)
        if by:
            report["by"] = {by: {name: summarize(group) for name, group in group_by(prompts).items()}}
        reports.append(report)
    for report, prompts in zip(reports[1:], files[1:], strict=True):
        report["compared_with_first"] = compare(files[0], prompts)
    return reports[0] | ({"others": reports[1:]} if reports[1:] else {})


def table(report: dict[str, Any], by: str | None) -> str:
    """The report for people."""
    lines = []
    for entry in (report, *report.get("others", [])):
        counts = (
            f"{entry['answers']} answers to {entry['prompts']} prompts: {entry['right']} right, {entry['wrong']} wrong"
        )
        lines.append(f"{entry['file']}: {counts}")
        if entry["prompts"] < FEW:
            lines.append(f"  with fewer than {FEW} prompts the intervals are too narrow")
        for metric in METRICS:
            interval = _interval(entry[f"{metric}_ci"])
            lines.append(f"  {metric.replace('_', ' '):<20}{entry[metric]:>7.1%}   95% interval {interval}")
        for name, group in entry.get("by", {}).get(by, {}).items():
            share, interval = group["hallucination_rate"], _interval(group["hallucination_rate_ci"])
            what = f"{by} {name}"
            lines.append(
                f"    {what[:30]:<30} hallucination rate {share:>6.1%} ({interval}), {group['prompts']} prompts"
            )
        if "compared_with_first" in entry:
            pair = entry["compared_with_first"]
            low, high = (100 * end for end in pair["difference_ci"])
            lines.append(
                f"  hallucination rate against {report['file']}: {100 * pair['difference']:+.1f} points "
                f"({low:+.1f} to {high:+.1f}), p = {pair['p_value']:.2g}"
            )
    return "\n".join(lines)


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.1%} to {ends[1]:.1%}"


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        prog="python -m noisefit.score",
        description="How true answers are.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="CSV of generate.py, with the column response")
    parser.add_argument("--by", metavar="COLUMN", help="also per value of this column")
    parser.add_argument("--json", action="store_true", help="one JSON object for machines")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.score"):
        args = build_parser().parse_intermixed_args(argv)
        report = score(args.files, args.by)
        print(json.dumps(report, indent=2) if args.json else table(report, args.by))


if __name__ == "__main__":
    main()
