"""The experiment's statistics: means over seeds, and methods compared in pairs, two runs of one seed.

Seeds are the sample: each is a world with a model of its own. Worlds differ more than methods do, hence the pairs. A
family, for p values and simultaneous intervals, is one measure over all methods shown: in 5% of experiments at the most
is any of them wrongly said to differ in it. Measures are not corrected for one another, as one of them, the primary
figure, is the question, and the others describe how a method comes by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from methods import SIZES
from results import FIELDS, MEASURES, OF_PLAIN, read_results
from scipy import stats
from statsmodels.stats.multitest import multipletests

from noisefit.base.errors import InputError

LEVEL, EXACT_PAIRS, RANDOM_SIGNS = 0.95, 16, 20_000
TIES = 2e-6  # of a difference of two values of six digits, up to 1
RATE, AT_MATCHED = "hallucination_rate", OF_PLAIN[0]
PRIMARY = dict.fromkeys(SIZES, RATE) | {"answering": AT_MATCHED}  # the question that worlds of a size are for
RATIO = "train_seconds"  # what is compared as a ratio, not as a difference
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

    `differences` are (pairs,), at least two. Sums are ties where they agree to the six digits that results have:
    `scipy.stats.permutation_test` takes them for ties to 14 digits only, and would split those of rounded shares.
    """
    d = np.asarray(differences, float)
    if len(d) <= EXACT_PAIRS:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
    else:
        drawn = np.random.default_rng(0).choice((-1, 1), (RANDOM_SIGNS, len(d)))
        signs = np.vstack([np.ones(len(d), int), drawn])
    rounding = TIES * len(d) * max(1.0, float(np.abs(d).max()))
    return float(np.mean(np.abs(signs @ d) >= abs(d.sum()) - rounding))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of a family adjusted so that, whatever their dependence, at most 5% of families have a false one
    under 0.05 (Holm 1979, Scandinavian Journal of Statistics 6). The order is kept.
    """
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def read_runs(path: Path, size: str) -> pd.DataFrame:
    """The runs on worlds of a size: a column for each of `MEASURES`, indexed by method and seed.

    Raises:
        InputError: no such file, no runs of this size, a run that is there twice, or a method that was not the same on
            all seeds.
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
    return rows[list(MEASURES)].astype(float)


def pairs(runs: pd.DataFrame, method: str, against: str, measure: str) -> pd.Series:
    """A method's difference to another for every seed where both have the measure; NaN, that of no questions, is none.

    Of `train_seconds` it is the logarithm of their ratio.
    """
    values = np.log(runs[measure].where(runs[measure] > 0)) if measure == RATIO else runs[measure]
    return (values[method] - values[against]).dropna()


def summarise(runs: pd.DataFrame, methods: Sequence[str], against: str | None, primary: str = RATE) -> pd.DataFrame:
    """Every measure of every method, alone and against another.

    Those that have two pairs or more are a measure's family: their number is what Holm's correction and Bonferroni's
    intervals (Dunn 1961, Journal of the American Statistical Association 56) are for.

    Returns:
        `COLUMNS`, indexed by measure and method, in the measures' own units, "difference" being a ratio for
        `train_seconds`. It is NaN, as all that goes with it is, for a method with fewer than two pairs.

    Raises:
        InputError: `against` is given, and all methods have fewer than two pairs of the primary figure.
    """
    rows = []
    for measure in MEASURES:
        found = {name: pairs(runs, name, against, measure) for name in methods if against not in (None, name)}
        family = [name for name, differences in found.items() if len(differences) > 1]
        if measure == primary and against and not family:
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
