"""The results file of compare.py, a row a run, and the page that it makes of it."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "world"))

from comparison import BEFORE, METHODS, PLAIN
from results import read_rows
from risk import MATCHED, matched

try:
    from paired import holm, sign_flip_p, t_interval
    from summary_tables import print_table
except ModuleNotFoundError as error:  # told now, and not after hours of training
    print(f"compare.py: error: {error.name} is not installed; pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

from noisefit.base.files import replacing, writing

KEY = ("method", "seed")
RATES = tuple(f"{kind}{name}_rate" for kind in ("", "known_", "unknown_") for name in ("right", "wrong", "refused"))
OF_PLAIN = ("wrong_at_matched_right", "matched_shortfall")  # against plain fine-tuning of the same seed
COSTS = ("train_seconds", "answer_seconds", "peak_memory_gib", "noise_to_signal")
MEASURES = (*RATES, *OF_PLAIN, "best_right_minus_wrong", "auroc", "aurc", *COSTS)
COUNTS = ("asked", "asked_known", "asked_unknown")
# `wrong_by_right`: see examples/world/risk.py; the whole of a run's risk-coverage curve.
FIELDS = (*KEY, *MEASURES, *COUNTS, "wrong_by_right", "flags", "machine", "versions")
PAIRED = ("wrong_rate", "right_rate", "known_right_rate", "known_wrong_rate", "unknown_wrong_rate",
          "unknown_refused_rate", "wrong_at_matched_right", "best_right_minus_wrong", "auroc")  # fmt: skip
AS_IS = {"auroc": 3, "aurc": 3, "train_seconds": 0, "answer_seconds": 0, "peak_memory_gib": 2, "noise_to_signal": 3}

READING = """An answer is right if it holds one of the true answers as words, refused if it says that it does not know,
and wrong otherwise.
Known and unknown are the questions by what the base model knew of their answers before any training.
*Wrong at matched right* lets the least confident answers go, until 90% as many right ones are left as plain fine-tuning
of the same seed gives, and counts the wrong ones that are left, of all questions; where there are not so many right
ones, those that are missing count as wrong. It is what a threshold on confidence (`generate.py --abstain_below`) can
make of a method. *Best right - wrong* is the most that right answers can exceed wrong ones by, at any threshold.
Seeds differ in adapter, order of the rows and noise, not in model and questions: intervals say what another training
might give, and nothing of other questions. p is of an exact sign-flip test of the paired differences; Holm's correction
is over the methods of a measure."""


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none where there is no file. Raises `InputError` where it is no such file."""
    return read_rows(path, FIELDS, _is_whole, "--output")


def _is_whole(row: Mapping[str, str]) -> bool:
    try:
        [float(row[name]) for name in MEASURES]
        counts = [int(row[name]) for name in ("seed", *COUNTS)] + [int(text) for text in row["wrong_by_right"].split()]
        return min(counts) >= 0 and int(row["asked"]) > 0 and bool(row["wrong_by_right"].split())
    except ValueError:
        return False


def write_results(path: Path, rows: Iterable[Mapping[str, object]]) -> list[dict[str, str]]:
    """Writes all rows, with what compares them with plain fine-tuning, in the order of methods and seeds.

    The file is whole at any time. Returns the rows as they stand there.
    """
    rows = [{name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}
            for row in rows]  # fmt: skip
    curves = {(row["method"], row["seed"]): [int(n) for n in row["wrong_by_right"].split()] for row in rows}
    plain_seeds = [seed for method, seed in curves if method == PLAIN]
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (rank(row["method"]), int(row["seed"]))):
        has_one_row = row["method"] == BEFORE and plain_seeds
        seed = plain_seeds[0] if has_one_row else row["seed"]
        plain = curves.get((PLAIN, seed))
        values = (math.nan, math.nan)
        if plain and len(plain) > 1:  # with no right answer there is nothing to match
            values = matched(curves[row["method"], row["seed"]], int(row["asked"]), MATCHED * (len(plain) - 1))
        writer.writerow(row | {name: f"{value:.6g}" for name, value in zip(OF_PLAIN, values, strict=True)})
    replace_text(path, text.getvalue())
    return list(csv.DictReader(io.StringIO(text.getvalue())))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, unless it is there as it is to be."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with writing(path), replacing(path) as beside:
        beside.write_bytes(text.encode())


def rank(method: str) -> tuple[int, str]:
    """The place of a method in tables."""
    return list(METHODS).index(name) if (name := method.partition(":")[0]) in METHODS else len(METHODS), method


def page(title: str, facts: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """The page, in Markdown.

    Args:
        title: its heading.
        facts: lines about model and questions.
        rows: of the results, at least one.
    """
    found: dict[str, dict[int, Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[int(row["seed"])] = row
    methods = sorted(found, key=rank)

    def values(method: str, measure: str) -> dict[int, float]:
        return {seed: value for seed, row in found[method].items() if math.isfinite(value := float(row[measure]))}

    def column(measure: str) -> list[str]:
        ends = 1 if measure in COSTS else 3  # of times a mean alone
        return [show(t_interval(values(method, measure).values())[:ends], measure) for method in methods]

    def table(measures: Mapping[str, str]) -> dict[str, list[str]]:
        seeds = {"method": methods, "seeds": [str(len(found[method])) for method in methods]}
        return seeds | {name: column(measure) for name, measure in measures.items()}

    kinds = {f"{kind} {name}".strip(): f"{kind}_{name}_rate".lstrip("_")
             for kind in ("known", "unknown") for name in ("right", "wrong", "refused")}  # fmt: skip
    tables = {
        "All questions, %": table({
            "right": "right_rate", "wrong": "wrong_rate", "refused": "refused_rate",
            "wrong at matched right": "wrong_at_matched_right", "best right - wrong": "best_right_minus_wrong",
            "AUROC": "auroc",
        }),
        "Known and unknown questions, % of their kind": table(kinds),
        "What it took; - where a run was interrupted": table({
            "training, s": "train_seconds", "answers, s": "answer_seconds", "peak memory, GiB": "peak_memory_gib",
            "noise to signal": "noise_to_signal",
        }),
    }  # fmt: skip
    paired = differences({name: {m: values(name, m) for m in PAIRED} for name in methods}) if PLAIN in found else {}
    if paired:
        tables[f"Against {PLAIN}, pairs of one seed, points (AUROC as is); 95% intervals"] = paired
    elif PLAIN in found:
        facts = [*facts, f"Differences to {PLAIN} need two seeds."]
    origins = sorted({f"{row['machine']}; {row['versions']}" for row in rows})
    shown = io.StringIO()
    with redirect_stdout(shown):
        for name, columns in tables.items():
            print_table(name, columns, markdown=True)
    listed = "\n".join(f"- {line}" for line in [*facts, *(f"made on {origin}" for origin in origins)])
    return f"# {title}\n\n{listed}\n\n{shown.getvalue()}{READING}\n"


def differences(values: Mapping[str, Mapping[str, Mapping[int, float]]]) -> dict[str, list[str]]:
    """Each method against plain fine-tuning; empty where no method has two seeds in common with it.

    Args:
        values: by method, measure and seed. What was not trained has one seed, and is compared with each.
    """
    columns: dict[str, list[str]] = {n: [] for n in ("measure", "method", "pairs", "difference", "p", "Holm p")}
    for measure in PAIRED:
        plain = values[PLAIN][measure]
        pairs = {}
        for method in values:
            own = values[method][measure]
            if method == BEFORE and own:
                own = dict.fromkeys(plain, next(iter(own.values())))
            both = [own[seed] - plain[seed] for seed in sorted(plain.keys() & own.keys())]
            if method != PLAIN and len(both) > 1:
                pairs[method] = both
        p_values = [sign_flip_p(both) for both in pairs.values()]
        for (method, both), p, adjusted in zip(pairs.items(), p_values, holm(p_values), strict=True):
            shown = show(t_interval(both), measure, "+")
            cells = (measure, method, str(len(both)), shown, f"{p:.3f}", f"{adjusted:.3f}")
            for name, cell in zip(columns, cells, strict=True):
                columns[name].append(cell)
    return columns if columns["measure"] else {}


def show(values: Iterable[float], measure: str, sign: str = "") -> str:
    """A mean with its interval, where it has one, in percent or points but for `AS_IS`; a dash for not a number."""
    factor, digits = (1, AS_IS[measure]) if measure in AS_IS else (100, 1)
    texts = [f"{round(factor * value, digits) + 0.0:{sign}.{digits}f}" for value in values if math.isfinite(value)]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(texts) == 3 else "".join(texts) or "-"
