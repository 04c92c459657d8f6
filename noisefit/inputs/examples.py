"""Tokenized rows of one or several files as one sequence: some of them, or some more often than others, none copied."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from noisefit.base.errors import InputError
from noisefit.inputs.prompts import Example
from noisefit.inputs.tables import Row

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


class Examples(Sequence[Example], ABC):
    """Tokenized rows of which some figures are known without a look at each.

    A row is one text, but a conversation may be several (see `noisefit.inputs.turns`), which stand behind each other.

    Attributes:
        lengths: tokens of each text, `[texts]` int32.
        targets: supervised tokens of each text, `[texts]` int32.
        is_cut: whether the end of an answer had no place, in this or another text of the same row, `[texts]` bool.
        continues: whether it is a further text of the row that the one before it is of, `[texts]` bool.
        prompts: by which rows with the same prompt are known, `[texts]` int64, see `prompt_key`.
        digest: of all rows, in their order: by which they are known as the same, however they are kept.
    """

    lengths: NDArray[np.int32]
    targets: NDArray[np.int32]
    is_cut: NDArray[np.bool_]
    continues: NDArray[np.bool_]

    @property
    @abstractmethod
    def prompts(self) -> NDArray[np.int64]: ...

    @property
    @abstractmethod
    def digest(self) -> str: ...

    @abstractmethod
    def row(self, index: int) -> Example:
        """The text at this place, counted from 0."""

    @property
    def num_targets(self) -> int:
        """Supervised tokens of all rows."""
        return int(self.targets.sum(dtype=np.int64))

    @property
    def num_rows(self) -> int:
        """Rows, of which `len` counts the texts."""
        return int(np.count_nonzero(~self.continues))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        return self.row(range(len(self))[index])  # with its IndexError


class Listed(Examples):
    """Rows in a list. `numbers` has that of each example's row; without it each is a row of its own."""

    def __init__(
        self, examples: Sequence[Example], is_cut: Sequence[bool], prompts: Sequence[int],
        numbers: Sequence[int] | None = None,
    ):  # fmt: skip
        self._examples, self._prompts = examples, np.array(prompts, dtype=np.int64)
        self.lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int32)
        self.targets = np.array([example.num_targets for example in examples], dtype=np.int32)
        self.is_cut = np.array(is_cut, dtype=bool)
        self.continues = continues(np.arange(len(examples)) if numbers is None else np.array(numbers, dtype=np.int64))

    @property
    def prompts(self) -> NDArray[np.int64]:
        return self._prompts

    @property
    def digest(self) -> str:
        return rows_digest(self._examples)

    def row(self, index: int) -> Example:
        return self._examples[index]


class Chosen(Examples):
    """Texts of several sequences by their numbers in all of them, one behind the other; 8 bytes a text. Those of a row
    are all there, and together."""

    def __init__(self, parts: Sequence[Examples], numbers: NDArray[np.int64]):
        self._parts, self._numbers = parts, numbers
        self._first = np.cumsum([0, *map(len, parts)])
        self.lengths = _joined([part.lengths for part in parts])[numbers]
        self.targets = _joined([part.targets for part in parts])[numbers]
        self.is_cut = _joined([part.is_cut for part in parts])[numbers]
        self.continues = _joined([part.continues for part in parts])[numbers]

    @property
    def prompts(self) -> NDArray[np.int64]:
        return _joined([part.prompts for part in self._parts])[self._numbers]

    @property
    def digest(self) -> str:
        content = hashlib.sha256(" ".join(part.digest for part in self._parts).encode())
        content.update(self._numbers.astype("<i8").tobytes())
        return content.hexdigest()

    def row(self, index: int) -> Example:
        number = int(self._numbers[index])
        part = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._parts[part].row(number - int(self._first[part]))


def _joined(arrays: Sequence[NDArray]) -> NDArray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def continues(numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`Examples.continues` of the number of each text's row, `[texts]`."""
    return np.concatenate([np.zeros(min(len(numbers), 1), dtype=bool), numbers[1:] == numbers[:-1]])


def texts_of(rows: NDArray[np.int64], further: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The texts of these rows, in their order: both by their place, rows counted without further texts.

    Args:
        rows: `[chosen rows]`, a row as often as it is taken.
        further: `Examples.continues` of all, `[texts]`.
    """
    firsts = np.flatnonzero(~further)
    counts = np.diff(np.append(firsts, len(further)))[rows]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(firsts[rows], counts) + within


def rows_digest(examples: Iterable[Example]) -> str:
    """By which rows are known as the same: of their tokens, borders and weights, however they are kept."""
    content = hashlib.sha256()
    for example in examples:
        content.update(array("q", [example.target_start, len(example.input_ids), *example.input_ids]).tobytes())
        if example.gaps:
            content.update(array("q", [-1, *(border for gap in example.gaps for border in gap)]).tobytes())
        if example.weight != 1:
            content.update(array("d", [example.weight]).tobytes())
    return content.hexdigest()


def choose(parts: Sequence[Examples], numbers: NDArray[np.int64]) -> Examples:
    """The rows with these numbers of all parts together; of one part whole, that part itself."""
    if not parts:
        return Listed([], [], [])
    if len(parts) == 1 and np.array_equal(numbers, np.arange(len(parts[0]))):
        return parts[0]
    return Chosen(parts, numbers)


def last_texts(examples: Examples) -> Examples:
    """The last text of each row: the one that ends with its last answer."""
    further = np.append(examples.continues[1:], False)
    return choose([examples], np.flatnonzero(~further[: len(examples)]))


def prompt_key(row: Row) -> int:
    """63 bits of a digest of what a row asks first, whatever its case and its white space."""
    asked = next((turn.content for turn in row.history if turn.role == "user"), row.prompt)
    text = " ".join(asked.split()).casefold()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def held_out(prompts: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: whole groups of rows with one prompt, in an order that the seed draws.

    A prompt's place in the order depends on the seed and on itself alone: with more rows, most stay where they were.

    Args:
        prompts: see `Examples.prompts`, `[rows]`.
        share: of the rows, above 0 and below 1. So many are held out, or fewer where a group has no place.
        seed: of the run.

    Returns:
        `[rows]` bool.

    Raises:
        InputError: not at least one row on each side.
    """
    each, group, sizes = np.unique(prompts.astype(np.uint64), return_inverse=True, return_counts=True)
    wanted = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    order = np.argsort(_mixed(each ^ _mixed(np.array([seed], dtype=np.uint64))), kind="stable")
    held, chosen = 0, np.zeros(len(each), dtype=bool)
    for index in order.tolist():
        if held == wanted:
            break
        if held + sizes[index] <= wanted:
            chosen[index] = True
            held += int(sizes[index])
    if not held:
        least = f", and the smallest group of rows with one prompt has {sizes.min()}" if len(sizes) else ""
        raise InputError(f"--eval_split {share:g} of {len(prompts)} rows is {max(wanted, 0)}{least}; rows with the "
                         "same prompt stay together: give a larger share, or --eval_data")  # fmt: skip
    return chosen[group]


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: each key's own 64 bits, which look random."""
    with np.errstate(over="ignore"):
        keys = (keys ^ (keys >> np.uint64(30))) * _MIX[0]
        keys = (keys ^ (keys >> np.uint64(27))) * _MIX[1]
    return keys ^ (keys >> np.uint64(31))


def weighted(
    sources: NDArray[np.int64], weights: Sequence[float], seed: int, names: Sequence[object]
) -> NDArray[np.int64]:  # fmt: skip
    """Which rows an epoch takes, and how often.

    Args:
        sources: of which source each row is, `[rows]`.
        weights: how often an epoch takes the rows of each source. Of 2.5 each row is taken twice, and half of them,
            drawn by the seed, once more.
        seed: of the run.
        names: of the sources, for the line.

    Returns:
        Indices of rows in order, a row as often as it is taken.

    Raises:
        InputError: a source has so few rows that its weight leaves none.
    """
    times = np.zeros(len(sources), dtype=np.int64)
    for source, weight in enumerate(weights):
        [rows] = np.nonzero(sources == source)
        whole = math.floor(weight)
        times[rows] = whole
        drawn = np.random.default_rng((seed, source)).permutation(rows)
        once_more = drawn[: math.floor((weight - whole) * len(rows) + 0.5)]
        times[once_more] += 1
        if len(rows) and not times[rows].any():
            raise InputError(f"{names[source]}: --data_weights {weight:g} leaves none of its {len(rows)} rows; give a "
                             "larger weight, or leave the source out")  # fmt: skip
    return np.repeat(np.arange(len(sources)), times)
