"""Collects the losses, the noise and the hidden states of runs, as training logged them, into one CSV for the page.

python examples/world/curves.py build/compare --size standard --seeds 0 5 --methods snr_largest auto --output curves.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from compare import check_flags, named_methods
from methods import SIZES, Run
from results import read_rows
from runs import run_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.base.command_line import OneLineParser
from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.files import read_text, replacing, writing

KEY = ("size", "seed", "method", "step")
LOGGED = ("loss", "ce_loss", "soft_loss", "consistency_loss", "noise_to_signal")
FIELDS = (*KEY, *LOGGED, "hidden_rms")  # the last: of the noisy layers, separated by spaces


def curve_rows(folder: Path, run: Run) -> list[dict[str, str]]:
    """A row for each line of a run's metrics.jsonl.

    Raises:
        InputError: the run is not there, or a line of it is damaged.
    """
    path = run_folder(run, folder) / "adapter" / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no such file; {run.method} on seed {run.seed} was not run with this --output")
    rows = []
    try:
        for line in map(json.loads, read_text(path).splitlines()):
            key = dict(zip(KEY, map(str, (run.size, run.seed, run.method, line["step"])), strict=True))
            values = {name: "" if line[name] is None else f"{line[name]:.4g}" for name in LOGGED}
            rows.append(key | values | {"hidden_rms": " ".join(f"{size:.4g}" for size in line["hidden_rms"])})
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: line {len(rows) + 1} is none of a training's; run the method again") from None
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = OneLineParser(prog="curves.py", description=__doc__.partition("\n")[0] if __doc__ else "",
                           allow_abbrev=False, formatter_class=argparse.HelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("folder", type=Path, help="the --output of compare.py")
    add("--size", choices=SIZES, default="standard", help="of the worlds (default: standard)")
    add("--seeds", nargs="+", type=int, required=True, help="of the worlds")
    add("--methods", nargs="+", required=True, help="as compare.py has them")
    add("--output", type=Path, required=True, metavar="CSV", help="rows of other runs that are there are kept")
    options = parser.parse_args(arguments)
    wanted = [Run(options.size, seed, method) for seed in options.seeds for method in named_methods(options.methods)]
    check_flags(wanted)
    there = read_rows(options.output, FIELDS, lambda row: True, "--output")
    fresh = [row for run in wanted for row in curve_rows(options.folder, run)]
    rows = {tuple(row[name] for name in KEY): row for row in (*there, *fresh)}
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    with writing(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.output) as beside:
            beside.write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors("curves.py"):
        main()
