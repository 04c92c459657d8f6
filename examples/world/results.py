"""The results file of compare.py: a CSV with one row a run."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from methods import SIZES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.base.errors import InputError
from noisefit.base.files import check_regular, replacing, writing

KEY = ("size", "seed", "method")
BANDS = ("rare", "uncommon", "common", "famous")
MEASURES = (
    "hallucination_rate", *(f"hallucination_rate_{band}" for band in BANDS), "hallucination_rate_new_phrasing",
    "invented_rate", "refused_known", "refused_unknown", "refused_false_premise", "self_consistency",
    "calibration_error", "brier", "train_accuracy", "train_untold_accuracy", "train_seconds", "noise_to_signal",
)  # fmt: skip
FIELDS = (*KEY, *MEASURES, "noise_layers", "flags", "command", "machine", "versions")


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none where there is no file.

    Raises:
        InputError: it is no such file.
    """
    if not path.exists():
        return []
    check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            fields, rows = reader.fieldnames, list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if tuple(fields or ()) != FIELDS:
        raise InputError(f"{path}: its columns are not those of this program's results; choose another --results")
    for number, row in enumerate(rows, start=1):
        if (
            None in row
            or None in row.values()
            or not (row["seed"].isascii() and row["seed"].isdecimal())
            or row["size"] not in SIZES
        ):
            raise InputError(f"{path}: row {number} is damaged; remove it, and that run is made again")
    return rows


def write_results(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """All rows, in the order of worlds and methods; the file is whole at any time."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (row["size"], int(str(row["seed"])), row["method"])):
        writer.writerow({name: f"{value:.6g}" if isinstance(value := row[name], float) else value for name in FIELDS})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(text.getvalue(), encoding="utf-8")
