"""Steps hold every row once, and cutting a step into micro-batches and processes changes neither loss nor gradient."""

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from noisefit.fork.branches import CLEAN, NOISY, BranchedModel
from noisefit.inputs.batches import collate, count_targets, count_tokens, cut_step, epoch_steps, steps_per_epoch
from noisefit.inputs.prompts import Example
from noisefit.method.losses import add_losses, consistency_loss, cross_entropy, soft_target_loss


def random_examples(count: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        examples.append(Example(ids, int(torch.randint(1, length, (), generator=generator))))
    return examples


@pytest.mark.parametrize("rows_per_step", [1, 4, 16, 50])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(rows_per_step):
    examples = random_examples(50)
    epochs = [list(epoch_steps(examples, rows_per_step, seed=1, epoch=epoch)) for epoch in (0, 1)]
    for steps in epochs:
        assert len(steps) == steps_per_epoch(50, rows_per_step)
        assert sorted(id(row) for rows in steps for row in rows) == sorted(map(id, examples))
    assert epochs[0] != epochs[1]
    assert epochs[0] == list(epoch_steps(examples, rows_per_step, seed=1, epoch=0))
    assert epochs[0] != list(epoch_steps(examples, rows_per_step, seed=2, epoch=0))
    assert epochs[0][1:] == list(epoch_steps(examples, rows_per_step, seed=1, epoch=0, first_step=1))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 13, 16])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_processes_share_a_step_without_loss_or_repetition(count, num_processes, batch_size):
    rows = random_examples(count)
    shares = [list(cut_step(rows, batch_size, num_processes, process)) for process in range(num_processes)]
    assert len({len(share) for share in shares}) == 1  # or the processes would wait for each other for ever
    assert sorted(id(row) for share in shares for batch in share for row in batch) == sorted(map(id, rows))
    assert all(len(batch) <= batch_size for share in shares for batch in share)


def test_collate():
    rows = [Example([5, 6, 7, 8], 2), Example([9, 10, 11], 1)]
    batch = collate(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["target_positions"].tolist() == [1, 2, 4, 5]
    assert batch["target_tokens"].tolist() == [7, 8, 10, 11]
    assert count_targets(rows) == 4 and count_tokens(rows) == 7


def test_weights_are_there_where_some_row_has_one():
    rows = [Example([5, 6, 7, 8], 2), Example([9, 10, 11], 1, weight=0.5), Example([3, 4], 1)]
    assert collate(rows, pad_token_id=0)["target_weights"].tolist() == [1, 1, 0.5, 0.5, 1]
    assert "target_weights" not in collate([rows[0], rows[2]], pad_token_id=0)


def test_an_empty_share_is_a_batch_without_targets():
    batch = collate([], pad_token_id=3)
    assert batch["input_ids"].tolist() == [[3]] and len(batch["target_tokens"]) == 0
    assert len(batch["target_positions"]) == 0


def per_token_noise(hidden, branch, mask):
    """Depends on a token's own hidden state alone, so that it is the same however the rows are batched."""
    return 0.3 * hidden.roll(branch, dims=-1)


WEIGHTS = {"ce": 0.5, "soft": 0.5, "consistency": 0.1}


def whole_loss(logits, targets):
    [clean], (noisy_1, noisy_2) = logits[CLEAN], logits[NOISY]
    soft = soft_target_loss(clean, noisy_1, 2.0) + soft_target_loss(clean, noisy_2, 2.0)
    return {
        "ce": cross_entropy(clean, targets),
        "soft": soft / 2,
        "consistency": consistency_loss(noisy_1, noisy_2, 2.0),
    }


@pytest.mark.parametrize("rows", [16, 13])
def test_a_step_is_the_same_cut_into_1_2_or_4_micro_batches_and_2_processes(rows):
    examples = random_examples(rows)
    results = []
    for batch_size, processes in [(16, 1), (8, 1), (4, 1), (4, 2), (1, 1)]:
        model = BranchedModel(tiny_model(), loss_chunk_size=10)
        total = {}
        for process in range(processes):
            for share in cut_step(examples, batch_size, processes, process):
                noise = {1: per_token_noise, 2: per_token_noise}
                sums = model(**collate(share, 0), noise=noise, chunk_losses=whole_loss)
                means = {name: value / count_targets(examples) for name, value in sums.items()}
                sum(WEIGHTS[name] * value for name, value in means.items()).backward()
                add_losses(total, means)
        results.append((total, {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0].keys() == WEIGHTS.keys() and all(value > 0.01 for value in results[0][0].values())
    for total, gradients in results[1:]:
        torch.testing.assert_close(total, results[0][0], rtol=1e-6, atol=1e-8)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_a_conversation_has_the_losses_and_gradients_of_its_answers_one_by_one(packing):
    """Each as a row of its own, up to its answer: what stands behind it changes nothing."""
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    conversations = [Example(ids[:19], 4, gaps=((7, 11), (12, 16))), Example(ids[19:34], 1, gaps=((2, 9),))]
    one_by_one = [Example(c.input_ids[:end], start) for c in conversations for start, end in c.spans]
    assert [(len(row.input_ids), row.target_start) for row in one_by_one] == [
        (7, 4), (12, 11), (19, 16), (2, 1), (15, 9)
    ]  # fmt: skip
    assert count_targets(conversations) == count_targets(one_by_one) == 3 + 1 + 3 + 1 + 6
    results = []
    for rows in (conversations, one_by_one):
        model = BranchedModel(tiny_model(), loss_chunk_size=4)
        batch = collate(rows, 0, packing=packing)
        sums = model(**batch, noise={1: per_token_noise}, chunk_losses=whole_loss)
        sum(WEIGHTS[name] * value for name, value in sums.items()).backward()
        targets = sorted(batch["target_tokens"].tolist())
        results.append((targets, sums, {name: p.grad for name, p in model.named_parameters()}))
    (targets, sums, gradients), (others, expected, by_answer) = results
    assert targets == others and len(targets) == 14
    torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients, by_answer, rtol=1e-4, atol=1e-6)  # logits are float32


def test_collate_of_a_conversation():
    batch = collate([Example([5, 6, 7, 8, 9], 1, gaps=((2, 4),), weight=0.5), Example([9, 10], 1)], pad_token_id=0)
    assert batch["target_positions"].tolist() == [0, 3, 5] and batch["target_tokens"].tolist() == [6, 9, 10]
    assert batch["target_weights"].tolist() == [0.5, 0.5, 1]
