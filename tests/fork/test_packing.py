"""Packed rows see each other nowhere: losses and gradients are those of the padded batch, whatever the model."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, supervise, tiny_batch, tiny_model
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from noisefit.base.errors import LocalError
from noisefit.fork.branches import CLEAN, DROPOUT, NOISY, BranchedModel
from noisefit.fork.exactness import can_pack
from noisefit.fork.hooks import EMBEDDING
from noisefit.fork.packing import Packing, pack, repeat_borders
from noisefit.inputs.batches import collate, cut_step
from noisefit.inputs.prompts import Example
from noisefit.method.losses import consistency_loss, cross_entropy
from noisefit.method.noise import EmbeddingNoise, TokenScaledNoise
from noisefit.run.steps import naming_failures

# The experts of the first two know no float64; the others have masks of their own, which no position parts.
PACKED = [name for name in CONFIGS if name not in ("mixtral", "glm4_moe", "bloom", "opt", "falcon")]
EXACT = dict(rtol=1e-5, atol=1e-5)


def steady(noise):
    """The method's noise, whose scale is of the batch's tokens, with draws that depend on branch and element alone."""

    def draw(hidden, branch, mask):
        scale = noise.capped(noise.scale(hidden.detach(), mask), hidden, mask)
        return scale * torch.sin(torch.arange(hidden.shape[-1], dtype=scale.dtype) * 0.7 + 3 * branch)

    return draw


class SteadyEmbeddingNoise(EmbeddingNoise):
    """NEFTune's noise, which must know the rows, with draws that depend on element and turn alone."""

    def __init__(self):
        super().__init__(5.0)
        self.turn = 0

    def draw(self, scale):
        self.turn += 1
        return scale * torch.sin(torch.arange(scale.shape[-1], dtype=scale.dtype) * 0.7 + 3 * (self.turn % 2))


NOISE = {layer: steady(TokenScaledNoise(noise_std=0.4)) for layer in (1, 3)}


def losses(logits, targets):
    if not logits[NOISY]:
        return {"ce": cross_entropy(logits[CLEAN][0], targets)}
    noisy = logits[NOISY]
    return {"ce": cross_entropy((logits[CLEAN] or noisy)[0], targets), "consistency": consistency_loss(*noisy, 2.0)}


def sums_and_gradients(model, batch, **how):
    branched = BranchedModel(model, loss_chunk_size=8)
    found = branched(**batch, **how, chunk_losses=losses)
    model.zero_grad()
    sum(found.values()).backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_packed_is_padded(model, batch, expected=True, **how):
    padded, packed = (sums_and_gradients(model, b, **how) for b in (batch, pack(batch)))
    assert not how["noise"] or padded[0]["consistency"] > 1e-9
    close = all(torch.allclose(padded[0][name], packed[0][name], **EXACT) for name in padded[0])
    assert close == expected
    if expected:
        for name, gradient in padded[1].items():
            torch.testing.assert_close(packed[1][name], gradient, rtol=1e-5, atol=1e-4, msg=name)


def test_a_batch_is_packed_without_its_padding():
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 11, 12]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "noise_mask": (ids > 6).long()}
    batch |= {
        "target_positions": torch.tensor([1, 9, 10]),
        "target_tokens": torch.tensor([7, 11, 12]),
        "other": "stays",
    }
    packed = pack(batch)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert packed["attention_mask"].tolist() == [[1, 1, 1, 2, 3, 3, 3, 3]]
    assert packed["noise_mask"].tolist() == [[0, 0, 1, 2, 3, 3, 3, 3]]
    assert packed["target_positions"].tolist() == [1, 5, 6]  # where 6, 10 and 11 stand
    assert packed["target_tokens"] is batch["target_tokens"] and packed["other"] == "stays"
    packing = packed["packing"]
    assert packing.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert packing.borders.tolist() == [0, 3, 4, 8] and packing.borders.dtype == torch.int32 and packing.longest == 4
    assert repeat_borders(packing.borders, 3).tolist() == [0, 3, 4, 8, 11, 12, 16, 19, 20, 24]


@pytest.mark.parametrize("strategy", ["fork", "separate"])
@pytest.mark.parametrize("model_type", PACKED)
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(model_type, strategy):
    batch = supervise(tiny_batch((11, 7, 9)))
    assert_packed_is_padded(tiny_model(model_type), batch, noise=NOISE, strategy=strategy)


@pytest.mark.parametrize("kind", ["relative to tokens", "limited", "NEFTune, by the row's length", "none"])
def test_other_noise_sees_no_neighbours_either(kind):
    limited = TokenScaledNoise(noise_std=0.4)
    limited.max_to_signal = 0.001
    places = {
        "relative to tokens": {1: TokenScaledNoise(noise_std=0.4, relative=True)},
        "limited": {1: limited},
        "NEFTune, by the row's length": {EMBEDDING: SteadyEmbeddingNoise()},
        "none": {},
    }[kind]
    noise = {place: steady(of) if place != EMBEDDING else of for place, of in places.items()}
    assert_packed_is_padded(tiny_model(), supervise(tiny_batch((11, 1, 7, 9))), noise=noise)


def test_noise_that_multiplies_by_the_mask_is_the_same():
    def masked(hidden, branch, mask):
        assert mask.max() == 1
        return 0.3 * hidden.detach().roll(branch, dims=-1) * mask.unsqueeze(-1)

    assert_packed_is_padded(tiny_model(), supervise(tiny_batch((11, 2, 7))), noise={1: masked})


def test_also_where_gradients_are_checkpointed_and_noise_is_on_some_tokens_alone():
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = supervise(tiny_batch((11, 4, 7)))
    batch["noise_mask"] = batch["attention_mask"] * (torch.arange(11) >= 3)
    masked = TokenScaledNoise(noise_std=0.4)
    masked.masked = True
    assert_packed_is_padded(model, batch, noise={0: steady(masked), 2: steady(masked)})


def test_all_logits_and_other_branches_are_packed_as_well():
    batch = supervise(tiny_batch((5, 9)))
    assert_packed_is_padded(tiny_model(), batch, noise=NOISE, strategy="full_logits")
    model = BranchedModel(tiny_model(), 8, dropout=0.3).eval()  # dropout is off: branches that the input parts

    def both(logits, targets):
        return {"ce": sum(cross_entropy(z, targets) for z in logits[DROPOUT])}

    padded, packed = (model(**b, branches=(DROPOUT, DROPOUT), chunk_losses=both)["ce"] for b in (batch, pack(batch)))
    torch.testing.assert_close(padded, packed)


def varlen(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What transformers' flash attention does with the rows' borders, in plain torch: `[B, heads, T, D]` flattened over
    the batch, each row attending to itself."""
    assert attention_mask is None
    borders, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    assert borders.dtype == torch.int32 and int(borders.diff().max()) == longest == kwargs["max_length_k"]
    groups = query.shape[1] // key.shape[1]
    flat = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (query, key, value)]  # [heads, B * T, D]
    assert borders[-1] == flat[0].shape[1]
    rows = zip(*(x.split(borders.diff().tolist(), dim=1) for x in flat), strict=True)
    found = [F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0),
                                            is_causal=True, scale=scaling) for q, k, v in rows]  # fmt: skip
    return torch.cat(found, dim=1).transpose(0, 1).unflatten(0, (query.shape[0], -1)), None


@pytest.mark.parametrize("noise", [{}, NOISE, {EMBEDDING: SteadyEmbeddingNoise()}], ids=["", "layers", "input"])
def test_flash_attention_is_told_of_the_rows_of_every_branch(noise, monkeypatch):
    """Its kernels are for GPUs: the stand-in keeps their contract, as transformers documents it."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
    model, batch = tiny_model(), supervise(tiny_batch((11, 1, 7, 9)))
    expected = sums_and_gradients(model, batch, noise=noise)
    model.config._attn_implementation = "flash_attention_2"  # it cannot be asked for where it is not installed
    found = sums_and_gradients(model, pack(batch), noise=noise)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_a_model_that_keeps_rows_apart_is_packed(model_type, capsys):
    for lengths in ((20, 13), (9,)):  # also where the batch has no neighbours to see
        for layers in ([1, 3], []):
            model = BranchedModel(tiny_model(model_type, torch.float32), 8)
            assert can_pack(model, tiny_batch(lengths), layers, "fork")
            assert model.training
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("model_type", "strategy"), [("bloom", "separate"), ("falcon", "fork"), ("opt", "fork")])
def test_rows_of_a_model_that_does_not_are_padded_and_a_line_says_why(model_type, strategy, capsys):
    for lengths in ((20, 13), (9,)):
        model = BranchedModel(tiny_model(model_type, torch.float32), 8)
        assert not can_pack(model, tiny_batch(lengths), [1, 3], strategy)
        said = capsys.readouterr().err
        assert "--packing: rows are padded, as packed ones are not exact for this model (" in said


def test_a_model_whose_rows_leak_is_found_out(capsys):
    """One that takes position ids and has no mask from them, as code of a model's own may."""
    AttentionInterface.register("leaking", lambda *a, **k: leaking(*a, **k))

    def leaking(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None

    model = tiny_model(dtype=torch.float32)
    model.set_attn_implementation("leaking")
    assert not can_pack(BranchedModel(model, 8), tiny_batch((20, 13)), [2], "fork")
    assert "logits differ by" in capsys.readouterr().err


def example(length, start=1):
    return Example(list(range(3, 3 + length)), start)


def test_packed_micro_batches_have_all_rows_once_and_nearly_equal_tokens():
    rows = [example(length) for length in (50, 3, 4, 5, 20, 21, 22, 2, 9, 30, 31)]
    for processes in (1, 2, 3):
        of_each = [list(cut_step(rows, 3, processes, index, packing=True)) for index in range(processes)]
        assert {len(batches) for batches in of_each} == {-(-len(rows) // (3 * processes))}
        batches = [batch for of_one in of_each for batch in of_one]
        assert sorted(len(row.input_ids) for batch in batches for row in batch) == sorted(
            len(row.input_ids) for row in rows
        )
        tokens = [sum(len(row.input_ids) for row in batch) for batch in batches]
        mean = sum(tokens) / len(tokens)
        assert max(tokens) <= max(50, mean + 22) and min(tokens) >= 0.5 * mean
    assert list(cut_step(rows[:1], 3, 2, 1, packing=True)) == [[]]  # fewer rows than processes


def test_a_packed_batch_is_the_padded_one_packed_and_none_is_one_token():
    rows = [example(9, 4), example(5, 2), example(7, 6)]
    batch = collate(rows, 0, noise_tokens="response", packing=True)
    expected = pack(collate(rows, 0, noise_tokens="response"))
    assert batch.keys() == expected.keys()
    for name in expected.keys() - {"packing"}:
        assert torch.equal(batch[name], expected[name]), name
    empty = collate([], 0, packing=True)
    assert empty["input_ids"].tolist() == [[0]] and not len(empty["target_tokens"])
    assert isinstance(empty["packing"], Packing)
    sums = BranchedModel(tiny_model(), 8)(**empty, noise=NOISE, chunk_losses=losses)
    assert sums["ce"] == 0 and sums["ce"].requires_grad


def test_out_of_memory_names_the_packed_rows():
    batch = collate([example(9), example(5)], 0, packing=True)
    settings = SimpleNamespace(
        gradient_checkpointing=True, batch_size=1, loss_chunk_size=64, output_model="/nowhere", max_length=9
    )
    expected = "with 2 rows, packed into 14 tokens, in a micro-batch, 12 of them supervised"
    with pytest.raises(LocalError, match=expected), naming_failures(settings, 3, batch):
        raise MemoryError
