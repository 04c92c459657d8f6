"""Summarises the results of compare.py: means over seeds, and each method against plain fine-tuning on the same worlds.

    python examples/world/summary.py build/compare/results.csv --markdown

Seeds are the sample: each is a world with a model of its own. As worlds differ more than methods do, methods are
compared in pairs, two runs of one seed. A family, for p values and simultaneous intervals, is one measure over all
methods shown: in 5% of experiments at the most is any of them wrongly said to differ in it. Measures are not corrected
for one another, as the hallucination rate is the question and the others describe how a method comes by it. To choose
`--methods` after having seen the results makes the family too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from methods import GROUPS, METHODS, SIZES
from results import BANDS, FIELDS, MEASURES, read_results
from scipy import stats
from statsmodels.stats.multitest import multipletests

from noisefit.base.command_line import OneLineParser
from noisefit.base.errors import InputError, one_line_errors

LEVEL, EXACT_PAIRS, RANDOM_SIGNS = 0.95, 16, 20_000
RATE, RATIO = "hallucination_rate", "train_seconds"  # the question; what is compared as a ratio, not as a difference
FAME = tuple(f"{RATE}_{band}" for band in (*BANDS, "new_phrasing"))
SWEPT = tuple(measure for measure in MEASURES if measure not in FAME)
OTHERS = tuple(measure for measure in SWEPT if measure not in (RATE, RATIO, "noise_to_signal"))
DIGITS = {"calibration_error": 3, "brier": 3, RATIO: 2, "noise_to_signal": 4}  # the others are shown in percent
# Of the table of everything: means and their intervals, then differences to another method.
MEAN, OWN = ("mean", "low", "high"), ("difference", "difference_low", "difference_high")
SIMULTANEOUS = ("difference", "simultaneous_low", "simultaneous_high")
COLUMNS = ("measure", "method", "seeds", *MEAN, "pairs", *OWN, *SIMULTANEOUS[1:], "p", "holm_p")


def t_interval(values: Iterable[float], level: float = LEVEL) -> tuple[float, float, float]:
    """The mean of a normal sample, and the ends of its interval, mean ± t s / sqrt(n) (Student 1908, Biometrika 6).

    The interval covers with probability `level`. Of fewer than two values the ends are NaN, of none the mean is, too.
    """
    sample = np.asarray(list(values), float)
    mean = float(sample.mean()) if len(sample) else math.nan
    if len(sample) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return mean, mean - half, mean + half


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """The two-sided p value, by the mean, of "each difference is as likely with the other sign" (Fisher 1935, The
    Design of Experiments, section 21).

    It is exact, over all patterns of signs, for up to 16 pairs. Else 20000 random ones from a fixed seed stand in, the
    observed one counted with them so that p stays valid (Phipson & Smyth 2010, arXiv 1603.05766).

    `differences` are (pairs,), at least two. Sums of them that agree to about 1e-9 are ties.
    """
    units = np.rint(np.asarray(differences, float) * 1e9)  # whole numbers add up exactly, so ties are ties
    found = stats.permutation_test(
        (units,), np.sum, permutation_type="samples", vectorized=True, rng=np.random.default_rng(0),
        n_resamples=np.inf if len(units) <= EXACT_PAIRS else RANDOM_SIGNS,
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of a family adjusted so that, whatever their dependence, at most 5% of families have a false one
    under 0.05 (Holm 1979, Scandinavian Journal of Statistics 6). The order is kept.
    """
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def read_runs(path: Path, size: str) -> pd.DataFrame:
    """The runs on worlds of a size: a column for each of `MEASURES`, indexed by method and seed.

    Raises:
        InputError: no such file, no runs of this size, a run that is there twice, a method that was not the same on all
            seeds, or what should be a number is none.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    rows = pd.DataFrame([row for row in read_results(path) if row["size"] == size], columns=FIELDS)
    if rows.empty:
        raise InputError(f"{path}: no runs of size {size}")
    rows = rows.astype({"seed": int}).set_index(["method", "seed"]).sort_index()
    for method, seed in rows.index[rows.index.duplicated()]:
        raise InputError(f"{path}: {method} on seed {seed} is there twice; remove one of the rows")
    for method, flags in rows["flags"].groupby(level="method"):
        if flags.nunique() > 1:
            raise InputError(f"{path}: {method} was run with different flags: {' and '.join(flags.unique())}")
    try:
        return rows[list(MEASURES)].astype(float)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def choose_methods(runs: pd.DataFrame, wanted: Sequence[str] | None, against: str | None) -> list[str]:
    """The methods to show, in the order of `METHODS`, then by name.

    `wanted` has names, or groups, of which those without runs are left out; None is all. `against` is always shown.

    Raises:
        InputError: a method has no runs.
    """
    there = list(runs.index.unique("method"))
    names = {against} if against else set()
    for name in wanted or there:
        names |= set(GROUPS[name]).intersection(there) if name in GROUPS else {name}
    for name in sorted(names.difference(there)):
        raise InputError(f"there are no runs of {name!r}; there are those of {', '.join(there)}")
    ranks = {name: rank for rank, name in enumerate(METHODS)}
    return sorted(names, key=lambda name: (ranks.get(name, len(ranks)), name))


def pairs(runs: pd.DataFrame, method: str, against: str, measure: str) -> pd.Series:
    """A method's difference to another for every seed where both have the measure; NaN, that of no questions, is none.

    Of `train_seconds` it is the logarithm of their ratio.
    """
    values = np.log(runs[measure].where(runs[measure] > 0)) if measure == RATIO else runs[measure]
    return (values[method] - values[against]).dropna()


def summarise(runs: pd.DataFrame, methods: Sequence[str], against: str | None) -> pd.DataFrame:
    """Every measure of every method, alone and against another.

    Those that have two pairs or more are a measure's family: their number is what Holm's correction and Bonferroni's
    intervals (Dunn 1961, Journal of the American Statistical Association 56) are for.

    Returns:
        `COLUMNS`, indexed by measure and method, in the measures' own units, "difference" being a ratio for
        `train_seconds`. It is NaN, as all that goes with it is, for a method with fewer than two pairs.

    Raises:
        InputError: `against` is given, and all methods have fewer than two pairs of the hallucination rate.
    """
    rows = []
    for measure in MEASURES:
        found = {name: pairs(runs, name, against, measure) for name in methods if against not in (None, name)}
        family = [name for name, differences in found.items() if len(differences) > 1]
        if measure == RATE and against and not family:
            raise InputError(f"no method has two seeds in common with {against}")
        p_values = [sign_flip_p(found[name].to_numpy()) for name in family]
        tested = dict(zip(family, zip(p_values, holm(p_values), strict=True), strict=True))
        for name in methods:
            values = runs[measure][name].dropna()
            row = {"measure": measure, "method": name, "seeds": len(values), "pairs": len(found.get(name, ()))}
            row |= zip(MEAN, t_interval(values), strict=True)
            if name in tested:
                unit = np.exp if measure == RATIO else np.asarray
                row |= zip(OWN, unit(t_interval(found[name])), strict=True)
                row |= zip(SIMULTANEOUS, unit(t_interval(found[name], 1 - (1 - LEVEL) / len(family))), strict=True)
                row["p"], row["holm_p"] = tested[name]
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).set_index(["measure", "method"])


def show(values: Iterable[float], measure: str, sign: str = "") -> str:
    """A mean, or one with the ends of its interval, in the unit of the tables; signed with "+"; a dash for NaN."""
    factor, digits = (1, DIGITS[measure]) if measure in DIGITS else (100, 1)
    known = [factor * value for value in values if math.isfinite(value)]
    texts = [f"{round(value, digits) + 0.0:{sign}.{digits}f}" for value in known]  # + 0.0, as -0.0 says nothing
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(texts) == 3 else "".join(texts) or "-"


def make_tables(summary: pd.DataFrame, against: str | None) -> dict[str, dict[str, list[str]]]:
    """The tables to read, as title, header and cells, of what `summarise` returns; without `against`, the means."""
    rate = summary.loc[RATE]

    def column(measure: str, names: Sequence[str], sign: str = "") -> list[str]:
        count = "seeds" if names[0] == "mean" else "pairs"
        few = [f" [{n}]" if n < most else "" for n, most in zip(summary.loc[measure, count], rate[count], strict=True)]
        values = summary.loc[measure, list(names)].to_numpy(float)
        return [show(row, measure, sign) + note for row, note in zip(values, few, strict=True)]

    def other(measure: str) -> list[str]:
        stars = ["*" if p < 0.05 else "" for p in summary.loc[measure, "holm_p"]]
        cells = zip(rate.index, column(measure, MEAN[:1]), column(measure, OWN[:1], "+"), stars, strict=True)
        return [mean if name == against else change + star for name, mean, change, star in cells]

    head = {"method": list(rate.index), "seeds": [str(count) for count in rate["seeds"]]}
    if against is None:
        return {"Means": head | {measure: column(measure, MEAN[:1]) for measure in SWEPT}}
    main = {"rate, %": column(RATE, MEAN), f"against {against}, points": column(RATE, SIMULTANEOUS, "+")}
    main["pairs"] = [str(count or "-") for count in rate["pairs"]]
    main["Holm p"] = [f"{p:.3f}" if p >= 0 else "-" for p in rate["holm_p"]]
    main["training time, ratio"] = column(RATIO, OWN)
    fame = {measure.removeprefix(f"{RATE}_"): column(measure, MEAN) for measure in FAME}
    others = {measure: other(measure) for measure in OTHERS}
    family, most = rate["p"].count(), rate["pairs"].max()
    least = f"with {most} pairs, no Holm p of {family} methods is under {min(1, family / 2 ** (most - 1)):.2g}"
    return {
        f"Hallucination rate, 95% intervals, those of differences simultaneous; {least}": head | main,
        "Hallucination rate by fame, %, 95% intervals; [n]: of n seeds only": head | fame,
        f"Means of {against}, differences in points (calibration_error, brier: as is); * Holm p < 0.05": head | others,
    }


def print_table(title: str, columns: dict[str, list[str]], markdown: bool) -> None:
    """Prints a table with its columns aligned."""
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    print(f"{title}:\n")
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    print()


def make_parser(program: str, description: str) -> OneLineParser:
    """The flags that say which results are looked at."""
    parser = OneLineParser(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS.csv", help="as compare.py writes it")
    add("--size", choices=SIZES, default="standard", help="of the worlds (default: standard)")
    add("--against", metavar="METHOD", default="basefit", help="what is compared with (default: basefit)")
    add("--methods", nargs="+", metavar="METHOD", help="names or groups, as compare.py has them (default: all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; raises InputError for results that cannot be compared."""
    parser = make_parser("summary.py", "Summarises the results of compare.py.")
    parser.add_argument("--sweep", action="store_true", help="means alone, the lowest hallucination rate first")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--markdown", action="store_true", help="tables for a Markdown page")
    add("--json", action="store_true", help="every number of every measure, in the measure's own unit")
    options = parser.parse_args(arguments)
    runs, against = read_runs(options.results, options.size), None if options.sweep else options.against
    summary = summarise(runs, choose_methods(runs, options.methods, against), against)
    if options.sweep:
        summary = summary.loc[(slice(None), list(summary.loc[RATE].sort_values("mean").index)), :]
    if options.json:
        print(summary.reset_index().to_json(orient="records", indent=2))
        return
    for title, columns in make_tables(summary, against).items():
        print_table(title, columns, options.markdown)


if __name__ == "__main__":
    with one_line_errors("summary.py"):
        main()
