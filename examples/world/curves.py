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

from methods import SIZES, Run
from runs import run_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.base.command_line import OneLineParser
from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.files import read_text, replacing, writing

KEY = ("size", "seed", "method", "step")
LOGGED = ("loss", "ce_loss", "soft_loss", "consistency_loss", "noise_to_signal")
FIELDS = (*KEY, *LOGGED, "hidden_rms")  # the last: of the noisy layers, separated by spaces


def curve_rows(folder: Path, run: Run) -> list[dict[str, object]]:
    """A row for each line of a run's metrics.jsonl.

    Raises:
        InputError: the run is not there.
    """
    path = run_folder(run, folder) / "adapter" / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no such file; {run.method} on seed {run.seed} was not run with this --output")
    rows = []
    for line in map(json.loads, read_text(path).splitlines()):
        key = dict(zip(KEY, (run.size, run.seed, run.method, line["step"]), strict=True))
        values = {name: "" if line.get(name) is None else f"{line[name]:.4g}" for name in LOGGED}
        rows.append(key | values | {"hidden_rms": " ".join(f"{size:.4g}" for size in line["hidden_rms"])})
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
    add("--output", type=Path, required=True, metavar="CSV", help="rows that are there are replaced or kept")
    options = parser.parse_args(arguments)
    wanted = [Run(options.size, seed, method) for seed in options.seeds for method in options.methods]
    rows = [row for run in wanted for row in curve_rows(options.folder, run)]
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with writing(options.output), replacing(options.output) as beside:
        beside.write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors("curves.py"):
        main()
