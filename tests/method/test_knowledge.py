"""The probe's values against one row at a time in float64, and the same for any batch."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from tiny_models import VOCAB, tiny_model

from noisefit.fork.decoder import find_decoder_layers
from noisefit.method.knowledge import FIRST_BATCH_SIZE, Item, Probe, is_doubtful, jensen_shannon, score_all

pytestmark = pytest.mark.slow


def items(count=9):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i in range(count):
        ids = torch.randint(3, VOCAB, (6 + 3 * (i % 5),), generator=generator).tolist()
        made[i] = Item(ids, [3, 5] if i % 2 else [len(ids) - 1], list(range(2, len(ids))), str(i))
    return made


@torch.no_grad()
def log_p(model, item):
    return model(input_ids=torch.tensor([item.input_ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "bloom"])
def test_knowledge_is_the_mean_log_probability_of_the_decisive_tokens(kind):
    model, all_items = tiny_model(kind).eval(), items()
    found = Probe(model, 0, all_items[0])(list(all_items.values()))
    for own, item in zip(found, all_items.values(), strict=True):
        logs = log_p(model, item)
        expected = np.mean([logs[i - 1, item.input_ids[i]].item() for i in item.decisive])
        assert own == [pytest.approx(expected, abs=5.1e-5)] and own[0] < -0.5


def noisy_log_p(model, probe, item, branch):
    """Hooks that add the noise that this row draws, alone and without padding."""
    hooks = []
    for layer in probe.noise_layers:
        draw = probe._noise(layer, [item])
        hooks.append(find_decoder_layers(model)[layer].register_forward_hook(
            lambda module, args, output, draw=draw: output + draw(output, branch, None)))  # fmt: skip
    logs = log_p(model, item)
    for hook in hooks:
        hook.remove()
    return logs


def test_noisy_passes_against_hooks_of_our_own():
    model, all_items = tiny_model().eval(), items(5)
    probe = Probe(model, 0, all_items[0], 3, [1, 2], 0.3, seed=7)
    found = probe(list(all_items.values()))
    for own, item in zip(found, all_items.values(), strict=True):
        passes = [noisy_log_p(model, probe, item, branch) for branch in (1, 2, 3)]
        means = [np.mean([logs[i - 1, item.input_ids[i]].item() for i in item.decisive]) for logs in passes]
        p = np.stack([logs.exp().numpy() for logs in passes])[:, [i - 1 for i in item.answer]]
        entropy = -(p * np.log(p)).sum(-1)
        mixed = -(p.mean(0) * np.log(p.mean(0))).sum(-1)
        expected = [np.mean(means), np.std(means), (mixed - entropy.mean(0)).mean()]
        assert own == pytest.approx(expected, abs=6e-5)
        assert own[1] > 1e-3 and own[2] > 1e-3
    other = Probe(model, 0, all_items[0], 3, [1, 2], 0.3, seed=8)(list(all_items.values()))
    assert all(a != b for a, b in zip(found, other, strict=True))
    calm = Probe(model, 0, all_items[0], 3, [1, 2], 0.0)(list(all_items.values()))
    assert all(own[1:] == [0, 0] for own in calm)


def test_the_scale_of_the_noise_is_a_share_of_the_token():
    model, [item] = tiny_model().eval(), items(1).values()
    hidden = torch.randn(1, len(item.input_ids), 4096, dtype=torch.float64) * 3
    noise = Probe(model, 0, item, 2, [1], 0.25)._noise(1, [item])(hidden, 1, None)
    ratio = noise.square().mean(-1).sqrt() / hidden.square().mean(-1).sqrt()
    assert torch.allclose(ratio, torch.full_like(ratio, 0.25), rtol=0.06)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_any_batch_gives_the_same_values(passes):
    model, all_items = tiny_model(dtype=torch.float32).eval(), items(40)
    probe = Probe(model, 0, all_items[0], passes, [0, 2], 0.2)
    found = []
    for size in (1, 3, 0):
        values = {}
        for batch in score_all(probe, all_items, size):
            assert len(batch) <= (size or FIRST_BATCH_SIZE)
            values |= batch
        found.append(values)
    assert found[0] == found[1] == found[2] and found[0].keys() == all_items.keys()


def test_what_rounding_could_turn_is_computed_alone():
    assert is_doubtful(-1.23455) and is_doubtful(-1.234548) and not is_doubtful(-1.2345) and not is_doubtful(0.0)
    model, all_items = tiny_model(dtype=torch.float32).eval(), list(items(3).values())
    probe = Probe(model, 0, all_items[0])
    calls = []

    def values(batch):
        calls.append(len(batch))
        return [[-2.000051]] if len(batch) == 1 else [[-1.0], [-2.000049], [-3.0]]

    probe._values = values
    assert probe(all_items) == [[-1.0], [-2.0001], [-3.0]] and calls == [3, 1]


def test_memory_that_runs_out_halves_the_batch():
    sizes = []

    def scorer(batch):
        sizes.append(len(batch))
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [[float(len(item.input_ids))] for item in batch]

    found = {}
    for values in score_all(scorer, items(20), 0):
        found |= values
    assert found == {i: [float(len(item.input_ids))] for i, item in items(20).items()} and sizes[0] == 20
    with pytest.raises(Exception, match=r"out of memory with 8 rows of up to .* give a smaller --batch_size"):
        list(score_all(scorer, items(20), 8))


def test_jensen_shannon_is_scipys():
    p = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1)
    expected = [jensenshannon(p[0, i], p[1, i]) ** 2 for i in range(5)]
    assert jensen_shannon(p.log()).tolist() == pytest.approx(expected)
    apart = torch.tensor([[[50.0, 0, 0]], [[0, 50.0, 0]], [[0, 0, 50.0]]]).log_softmax(-1)
    assert jensen_shannon(apart).item() == pytest.approx(math.log(3))


def test_one_pass_over_the_rows():
    model, all_items = tiny_model().eval(), items(10)
    probe = Probe(model, 0, all_items[0])
    rows = []
    hook = find_decoder_layers(model)[0].register_forward_hook(lambda m, args, out: rows.append(len(out)))
    probe.exact = False  # without the rows that are computed again
    list(score_all(probe, all_items, 4))
    hook.remove()
    assert rows == [4, 4, 2]


def test_each_row_layer_pass_and_seed_has_noise_of_its_own():
    model, item = tiny_model().eval(), items(1)[0]
    other = Item(item.input_ids, item.decisive, item.answer, "another")
    hidden = torch.ones(2, len(item.input_ids), 32, dtype=torch.float64)
    drawn = []
    for seed in (0, 1):
        probe = Probe(model, 0, item, 2, [1, 2], 0.25, seed)
        for layer in (1, 2):
            for branch in (1, 2):
                drawn += list(probe._noise(layer, [item, other])(hidden, branch, None))
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 16
