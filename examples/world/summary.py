"""Summarises the results of compare.py: means over seeds, and each method against plain fine-tuning on the same worlds.

    python examples/world/summary.py build/compare/results.csv --markdown
    python examples/world/summary.py docs/experiment/answering.csv --size answering --sweep --methods 'basefit:loss*'

Each size of world has a primary figure, which the p values are for; see paired.py for what they say. To choose
`--methods` after having seen the results makes the family of tests too small.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
from chosen import read_chosen
from methods import GROUPS, METHODS, SIZES
from paired import PRIMARY, read_runs, summarise
from summary_tables import make_tables, print_table

from noisefit.base.command_line import OneLineParser
from noisefit.base.errors import InputError, one_line_errors


def choose_methods(runs: pd.DataFrame, wanted: Sequence[str] | None, against: str | None) -> list[str]:
    """The methods to show, in the order of `METHODS`, then by name.

    `wanted` has names, groups, of which those without runs are left out, or patterns such as "auto:*"; None is all.
    `against` is always shown.

    Raises:
        InputError: a method, or a pattern, has no runs.
    """
    there = list(runs.index.unique("method"))
    names = {against} if against else set()
    for name in wanted or there:
        if name in GROUPS:
            names |= set(GROUPS[name]).intersection(there)
        else:
            names |= {method for method in there if "*" in name and fnmatchcase(method, name)} or {name}
    _check_there(runs, sorted(names))
    ranks = {name: rank for rank, name in enumerate(METHODS)}
    return sorted(names, key=lambda name: (ranks.get(name, len(ranks)), name))


def choose_runs(options: argparse.Namespace, against: str | None) -> tuple[pd.DataFrame, dict[str, str], str | None]:
    """The runs that `make_parser`'s flags ask for, the methods to show by name, and what to compare with by name.

    A name is a method's label where `--labels` gives it one; `against` may be either, or None.

    Raises:
        InputError: a file cannot be read, or a method has no runs.
    """
    runs = read_runs(options.results, options.size)
    if options.labels is None:
        return runs, {name: name for name in choose_methods(runs, options.methods, against)}, against
    chosen = read_chosen(options.labels)
    if against is not None and against not in chosen and against not in chosen.values():
        chosen = {against: against} | chosen
    _check_there(runs, chosen.values())
    labels = {method: label for label, method in chosen.items()}
    # The others are left out first, as one of them may be called as a label is.
    runs = runs.loc[list(labels)].rename(index=labels, level="method").sort_index()
    return runs, chosen, labels.get(chosen.get(against, against))


def _check_there(runs: pd.DataFrame, names: Iterable[str]) -> None:
    there = list(runs.index.unique("method"))
    for name in names:
        if name not in there:
            raise InputError(f"there are no runs of {name!r}; there are those of {', '.join(there)}")


def make_parser(program: str, description: str) -> OneLineParser:
    """The flags that say which results are looked at."""
    parser = OneLineParser(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS.csv", help="as compare.py writes it")
    add("--size", choices=SIZES, default="standard", help="of the worlds (default: standard)")
    add("--against", metavar="METHOD", default="basefit", help="what is compared with (default: basefit)")
    add("--primary", choices=dict.fromkeys(PRIMARY.values()), help="figure that is the question (default: the size's)")
    chosen = parser.add_mutually_exclusive_group()
    add = chosen.add_argument
    add("--methods", nargs="+", metavar="METHOD", help="names, groups, or patterns as 'auto:*' (default: all)")
    add("--labels", type=Path, metavar="JSON", help='these, in this order, by shorter names: {"plain": "basefit"}')
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; raises InputError for results that cannot be compared."""
    parser = make_parser("summary.py", "Summarises the results of compare.py.")
    parser.add_argument("--sweep", action="store_true", help="means alone, the lowest primary figure first")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--markdown", action="store_true", help="tables for a Markdown page")
    add("--json", action="store_true", help="every number of every measure, in the measure's own unit")
    options = parser.parse_args(arguments)
    primary = options.primary or PRIMARY[options.size]
    runs, chosen, against = choose_runs(options, None if options.sweep else options.against)
    summary = summarise(runs, list(chosen), against, primary)
    if options.sweep:
        summary = summary.loc[(slice(None), list(summary.loc[primary].sort_values("mean").index)), :]
    if options.json:
        print(summary.reset_index().to_json(orient="records", indent=2))
        return
    for title, columns in make_tables(summary, against, primary).items():
        print_table(title, columns, options.markdown)


if __name__ == "__main__":
    with one_line_errors("summary.py"):
        main()
