"""Rows of several files as one sequence: which are held out, and how often an epoch takes each."""

import numpy as np
import pytest

from noisefit.base.errors import InputError
from noisefit.inputs.batches import count_targets, row_lengths
from noisefit.inputs.conversations import Message
from noisefit.inputs.examples import (
    Chosen,
    Listed,
    choose,
    held_out,
    last_texts,
    prompt_key,
    rows_digest,
    texts_of,
    weighted,
)
from noisefit.inputs.prompts import Example
from noisefit.inputs.tables import Row


def listed(*lengths, first=0):
    examples = [Example(list(range(first, first + length)), 1 + i % 2) for i, length in enumerate(lengths)]
    return Listed(examples, [False] * len(examples), [first + i for i in range(len(examples))])


def test_chosen_rows_are_those_of_the_parts_in_the_order_that_was_asked_for():
    parts = [listed(5, 6, 7), listed(), listed(3, 4, first=50)]
    everything = [row for part in parts for row in part]
    numbers = np.array([4, 0, 0, 3, 2])
    chosen = choose(parts, numbers)
    assert isinstance(chosen, Chosen) and list(chosen) == [everything[i] for i in numbers]
    assert chosen[-1] == everything[2] and chosen[1:3] == [everything[0]] * 2
    with pytest.raises(IndexError):
        chosen[5]
    assert chosen.lengths.tolist() == [4, 5, 5, 3, 7] == row_lengths(list(chosen)).tolist()
    assert count_targets(chosen) == count_targets(list(chosen)) == sum(row.num_targets for row in chosen)
    assert chosen.prompts.tolist() == [51, 0, 0, 50, 2]
    # The digest is of rows and order, whatever keeps the parts.
    assert chosen.digest == Chosen([listed(5, 6, 7), listed(), listed(3, 4, first=50)], numbers).digest
    others = [numbers[::-1], numbers[:4], np.array([4, 0, 1, 3, 2])]
    assert len({chosen.digest, *(choose(parts, other).digest for other in others)}) == 4
    assert Chosen([listed(5, 6, 8), *parts[1:]], numbers).digest != chosen.digest
    # Of one part whole that is it.
    assert choose(parts[:1], np.arange(3)) is parts[0] and parts[0].digest == rows_digest(list(parts[0]))
    assert len(choose([], np.arange(0))) == 0


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_rows_with_the_same_prompt_go_to_the_same_side(share):
    prompts = np.random.default_rng(0).integers(0, 200, 1000)
    held = held_out(prompts, share, seed=3)
    assert not set(prompts[held]) & set(prompts[~held])
    assert abs(held.sum() - share * 1000) < 5  # groups have five rows on average, and the smallest fills the rest
    assert held.sum() <= share * 1000
    assert (held_out(prompts, share, seed=3) == held).all() and (held_out(prompts, share, seed=4) != held).any()
    # It depends on the rows themselves, not on their order, and hardly on what other rows there are.
    order = np.random.default_rng(1).permutation(1000)
    assert (held_out(prompts[order], share, seed=3) == held[order]).all()
    longer = held_out(np.concatenate([prompts, np.arange(10_000, 10_100)]), share, seed=3)
    assert (longer[:1000] != held).mean() < 0.12


def test_a_row_on_each_side_or_an_error():
    assert held_out(np.arange(2), 0.001, 0).sum() == 1 and held_out(np.arange(2), 0.9, 0).sum() == 1
    assert held_out(np.array([7, 7, 7, 8]), 0.3, 0).tolist() == [False, False, False, True]  # the large group stays
    for prompts in (np.arange(0), np.array([5]), np.array([5, 5, 5])):
        with pytest.raises(InputError, match=r"--eval_split 0.5 of \d rows is \d.*prompt stay together"):
            held_out(prompts, 0.5, 0)


def test_a_prompt_is_the_same_whatever_its_case_and_in_whatever_turn_it_is_answered():
    assert prompt_key(Row(1, "Who is it?", "A")) == prompt_key(Row(2, " who  is\nIT? ", "B")) < 2**63
    assert prompt_key(Row(1, "Who is it?", "A")) != prompt_key(Row(1, "Who is he?", "A"))
    turns = (Message("system", "Be brief."), Message("user", "Who is it?"), Message("assistant", "A"))
    assert prompt_key(Row(1, "Sure?", "Yes", history=turns)) == prompt_key(Row(2, "Who is it?", "A"))


def test_an_epoch_takes_each_source_as_often_as_its_weight_says():
    names, sources = list("abcd"), np.repeat([0, 1, 2, 3], [100, 10, 7, 0])
    numbers = weighted(sources, [0.5, 2.5, 1, 3], seed=1, names=names)
    times = np.bincount(numbers, minlength=117)
    assert sorted(times[:100]) == [0] * 50 + [1] * 50
    assert sorted(times[100:110]) == [2] * 5 + [3] * 5
    assert times[110:].tolist() == [1] * 7
    assert (np.diff(numbers) >= 0).all() and (weighted(sources, [0.5, 2.5, 1, 3], seed=1, names=names) == numbers).all()
    assert (weighted(sources, [0.5, 2.5, 1, 3], seed=2, names=names) != numbers).any()
    assert weighted(sources, [1, 1, 1, 1], seed=1, names=names).tolist() == list(range(117))
    with pytest.raises(InputError, match=r"c: --data_weights 0\.05 leaves none of its 7 rows"):
        weighted(sources, [1, 1, 0.05, 1], seed=1, names=names)


def test_the_texts_of_a_row_are_taken_together():
    texts = [Example([number, place, 9], 1) for number, place in ((3, 0), (5, 0), (5, 1), (5, 2), (8, 0), (8, 1))]
    one = Listed(texts, [False] * 6, [0] * 6, numbers=[3, 5, 5, 5, 8, 8])
    other = Listed(texts[4:], [False] * 2, [0] * 2, numbers=[8, 8])  # another file's row of the same number
    everything = choose([one, other], np.arange(8))
    assert everything.continues.tolist() == [False, False, True, True, False, True, False, True]
    assert (one.num_rows, everything.num_rows, listed(1, 2).num_rows, listed().num_rows) == (3, 4, 2, 0)
    numbers = texts_of(np.array([0, 1, 1, 3]), everything.continues)
    taken = choose([one, other], numbers)
    assert numbers.tolist() == [0, 1, 2, 3, 1, 2, 3, 6, 7] and taken.num_rows == 4
    assert [text.input_ids[:2] for text in taken[1:7]] == [[5, 0], [5, 1], [5, 2]] * 2
    assert texts_of(np.arange(0), one.continues).tolist() == []


def test_a_row_is_asked_for_its_last_text_alone():
    examples = [Example([i, i + 1], 1) for i in range(6)]
    rows = Listed(examples, [False] * 6, list(range(6)), [3, 3, 4, 7, 7, 7])
    assert list(last_texts(rows)) == [examples[1], examples[2], examples[5]]
    assert list(last_texts(choose([rows], np.array([2, 3, 4, 5])))) == [examples[2], examples[5]]
    assert len(last_texts(choose([], np.arange(0)))) == 0
