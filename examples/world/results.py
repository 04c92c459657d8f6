"""The results file of compare.py: a CSV with one row a run."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from methods import SIZES
from risk import KINDS, MATCHED, matched

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.base.errors import InputError
from noisefit.base.files import check_regular, replacing, writing

KEY = ("size", "seed", "method")
BANDS = ("rare", "uncommon", "common", "famous")
OF_PLAIN = ("wrong_at_matched_right", "matched_shortfall")  # against plain fine-tuning on the same world
PLAIN = "basefit"
MEASURES = (
    "hallucination_rate", *(f"hallucination_rate_{band}" for band in BANDS), "hallucination_rate_new_phrasing",
    "invented_rate", "refused_known", "refused_unknown", "refused_false_premise", "self_consistency",
    "calibration_error", "brier", "train_accuracy", "train_untold_accuracy", "train_seconds", "noise_to_signal",
    "right_rate", "wrong_rate", *KINDS, "auroc", "aurc", "best_right_minus_wrong", *OF_PLAIN, "hidden_growth",
)  # fmt: skip
# `wrong_by_right`: see risk.py; the whole of a run's risk-coverage curve.
FIELDS = (*KEY, *MEASURES, "noise_layers", "asked", "wrong_by_right", "flags", "command", "machine", "versions")


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none where there is no file. Raises `InputError` where it is no such file."""
    return read_rows(path, FIELDS, _is_whole, "--results")


def read_rows(
    path: Path, fields: Sequence[str], is_whole: Callable[[Mapping[str, str]], bool], flag: str
) -> list[dict[str, str]]:
    """The rows of a CSV that a program adds to; none where there is no file.

    Args:
        path: of the file.
        fields: its columns.
        is_whole: whether a row, which has a cell for each of them, has in each what belongs there.
        flag: by which the user named the file.

    Raises:
        InputError: it is another file, or a row is damaged.
    """
    if not path.exists():
        return []
    check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            found, rows = reader.fieldnames, list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if tuple(found or ()) != tuple(fields):
        raise InputError(f"{path}: its columns are not those of this program; choose another {flag}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values() or not is_whole(row):
            raise InputError(f"{path}: row {number} is damaged; remove it, and that run is made again")
    return rows


def _is_whole(row: Mapping[str, str]) -> bool:
    seed = row["seed"]
    if row["size"] not in SIZES or not (seed.isascii() and seed.isdecimal() and len(seed) < 10):
        return False
    try:
        whole = all(not math.isinf(float(row[name])) for name in MEASURES)
        curve = [int(count) for count in row["wrong_by_right"].split()]  # none in rows from before it was measured
        return whole and (not curve or 0 < int(row["asked"]) < 10**9)
    except ValueError:
        return False


def with_matched(rows: Iterable[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """The rows with `OF_PLAIN`, which is no number where plain fine-tuning on that world has no row, or none right."""
    rows = list(rows)
    curves = {tuple(map(str, (row[name] for name in KEY))): [int(n) for n in str(row["wrong_by_right"]).split()]
              for row in rows}  # fmt: skip
    found = []
    for row in rows:
        size, seed, method = (str(row[name]) for name in KEY)
        plain, curve = curves.get((size, seed, PLAIN)), curves[size, seed, method]
        values = (math.nan, math.nan)
        if plain and len(plain) > 1 and curve:  # with no right answer there is nothing to match
            values = matched(curve, int(str(row["asked"])), MATCHED * (len(plain) - 1))
        found.append({**row, **dict(zip(OF_PLAIN, values, strict=True))})
    return found


def write_results(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """All rows, in the order of worlds and methods; the file is whole at any time."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(with_matched(rows), key=lambda row: (row["size"], int(str(row["seed"])), row["method"])):
        writer.writerow({name: f"{value:.6g}" if isinstance(value := row[name], float) else value for name in FIELDS})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(text.getvalue(), encoding="utf-8")
