"""How true the answers of `generate.py` are.

    python -m noisefit.score answers.csv [more.csv ...] [--by COLUMN] [--json]

Files with answers to the same questions are compared with the first one, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from noisefit.arguments import HelpFormatter, OneLineParser
from noisefit.data import read_records
from noisefit.errors import InputError, one_line_errors
from noisefit.scoring import METRICS, Prompt, compare, group_by, summarize

NEEDED = ("prompt", "response", "generated_response")


def read_answers(path: str, by: str | None) -> list[Prompt]:
    """The answers of a file, a prompt with all its rounds each, in order of first appearance.

    Raises:
        InputError: as `read_records`; a row without prompt or reference; one prompt with two references.
    """
    columns = (*NEEDED, by) if by else NEEDED
    found: dict[str, dict[str, Any]] = {}
    for row_number, record in read_records(path, columns):
        prompt, reference = record["prompt"] or "", record["response"] or ""
        if not prompt.strip() or not reference.strip():
            raise InputError(f"{path}: row {row_number}: prompt or response is empty: nothing to compare with")
        entry = found.setdefault(prompt, {"reference": reference, "answers": [], "row": row_number})
        if entry["reference"] != reference:
            raise InputError(f"{path}: rows {entry['row']} and {row_number} give one prompt two different responses")
        entry["answers"].append(record["generated_response"] or "")
        entry |= {"truth": record.get("answer") or None, "group": str(record[by]) if by else ""}
    if not found:
        raise InputError(f"{path}: it has no rows")
    return [
        Prompt(prompt, entry["reference"], tuple(entry["answers"]), entry["truth"], entry["group"])
        for prompt, entry in found.items()
    ]


def score(paths: Sequence[str], by: str | None) -> dict[str, Any]:
    """What `--json` prints: the first file's figures at the top level, further files and groups below.

    Raises:
        InputError: a file cannot be used, or the files ask different questions.
    """
    files = [read_answers(path, by) for path in paths]
    for path, prompts in zip(paths[1:], files[1:], strict=True):
        if {p.prompt for p in prompts} != {p.prompt for p in files[0]}:
            raise InputError(f"{path}: it asks other questions than {paths[0]}; only the same can be compared")
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
    args = build_parser().parse_args(argv)
    report = score(args.files, args.by)
    print(json.dumps(report, indent=2) if args.json else table(report, args.by))


if __name__ == "__main__":
    with one_line_errors("noisefit.score"):
        main(sys.argv[1:])
