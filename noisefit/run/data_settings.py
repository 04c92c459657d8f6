"""The settings of the rows: which of them, how often, and what their columns are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from noisefit.base.errors import InputError
from noisefit.base.settings import setting, words_of
from noisefit.inputs.columns import parse_columns

if TYPE_CHECKING:
    from noisefit.run.settings import Settings


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The rows."""

    columns: list[str] | None = setting(
        None, "what the columns are called in the data: prompt=question response=answer", metavar="NAME=COLUMN"
    )
    data_weights: list[float] | None = setting(
        None, "one for each of --train_data: how often an epoch takes its rows; 0.5: half of them, 2: each twice",
        low=0, open_low=True, high=1000,
    )  # fmt: skip
    long_rows: str = setting(
        "drop", "rows over --max_length: drop them, cut them (their end is then not learnt), or end with an error",
        choices=("drop", "cut", "error"),
    )  # fmt: skip
    eval_split: float = setting(
        0.0, "hold out this share of the rows where no --eval_data is given; rows with one prompt stay together",
        low=0, high=0.9,
    )  # fmt: skip
    split: str | None = setting(
        None, "split of folders and hub datasets in --train_data; train[:10%] takes a part (default: train)"
    )
    eval_data_split: str | None = setting(
        None, "split of folders and hub datasets in --eval_data (default: validation, else test)"
    )
    dataset_config: str | None = setting(None, "configuration of a dataset that has several")
    revision: str | list[str] | None = setting(
        None, "branch, tag or commit of the hub datasets in --train_data, one for all or one each; default: main"
    )


def check_data(settings: Settings) -> None:
    """Refuse settings of the data that contradict each other.

    Raises:
        InputError: as said.
    """
    words, weights = words_of(settings.train_data), settings.data_weights
    parse_columns(settings.columns)
    for flag in ("train_data", "eval_data"):
        given = words_of(getattr(settings, flag))
        if twice := [word for word in given if given.count(word) > 1]:
            instead = "; --data_weights 2 takes its rows twice" if flag == "train_data" else ""
            raise InputError(f"--{flag} {twice[0]}: it is given twice{instead}")
    if weights is not None and len(weights) != len(words):
        raise InputError(f"--data_weights has {len(weights)} numbers, and --train_data {len(words)} sources; give one "
                         "for each")  # fmt: skip
    if settings.eval_split and settings.eval_data is not None:
        raise InputError("--eval_split holds out rows where no --eval_data is given; leave one of them out")
    if settings.eval_data is None and settings.eval_data_split is not None:
        raise InputError("--eval_data_split is of --eval_data, which is not given; --eval_split holds out rows")
