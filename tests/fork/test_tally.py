"""Accuracy and entropy of the tokens, from the logits that the losses are formed of."""

import pytest
import torch
from tiny_models import fixed_noise, supervise, tiny_batch, tiny_model

from noisefit.fork.branches import CLEAN, NOISY, BranchedModel
from noisefit.fork.tally import TokenTally, hits_and_entropy
from noisefit.method.losses import consistency_loss, cross_entropy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_they_are_those_of_float64(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(70, 101)).to(dtype)
    targets = torch.where(torch.arange(70) % 3 == 0, logits.argmax(dim=-1), torch.arange(70))
    hits, entropy = hits_and_entropy(logits, targets).tolist()
    p = logits.double().softmax(dim=-1)
    assert hits == (logits.argmax(dim=-1) == targets).sum() >= 24
    assert entropy == pytest.approx(torch.special.entr(p).sum().item(), rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_of_equal_logits_the_first_counts_and_tokens_that_are_ruled_out_have_no_share():
    inf = float("inf")
    logits = torch.tensor([[1.0, 2.0, 2.0, -inf], [0.0, 0.0, -inf, -inf], [5e4, -inf, -inf, -5e4]])
    hits, entropy = hits_and_entropy(logits, torch.tensor([1, 1, 0])).tolist()
    e = torch.tensor(-1.0).exp().item()
    of_first = torch.tensor([e, 1, 1]).div(2 + e)
    assert hits == 2
    assert entropy == pytest.approx(torch.special.entr(of_first).sum().item() + torch.tensor(2.0).log().item())
    assert hits_and_entropy(logits[:0], torch.tensor([], dtype=torch.long)).tolist() == [0, 0]
    assert hits_and_entropy(logits * torch.nan, torch.tensor([1, 1, 0]))[1].isnan()


def all_losses(logits, targets):
    return {"ce": cross_entropy(logits[CLEAN][0], targets), "consistency": consistency_loss(*logits[NOISY], 1.0)}


def noisy_loss(logits, targets):
    return {"ce": cross_entropy(logits[NOISY][0], targets)}


@pytest.mark.parametrize("strategy", ["fork", "separate", "full_logits"])
@pytest.mark.parametrize("chunk", [3, 256])
def test_each_token_is_counted_once_and_no_loss_or_gradient_moves_by_a_bit(strategy, chunk):
    batch, model = supervise(tiny_batch((11, 7, 9))), BranchedModel(tiny_model(), chunk)
    noise, found, tally = {1: fixed_noise(1)}, [], TokenTally("cpu")
    for counted in (None, tally):
        model.zero_grad()
        sums = model(**batch, noise=noise, strategy=strategy, chunk_losses=all_losses, tally=counted)
        sum(sums.values()).backward()
        found.append([*sums.values(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    logits = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    logits, targets = logits[batch["target_positions"]].double(), batch["target_tokens"]
    assert tally.sums[0] == (logits.argmax(dim=-1) == targets).sum()
    expected = torch.special.entr(logits.softmax(dim=-1)).sum().item()
    assert tally.sums[1].item() == pytest.approx(expected, rel=1e-6) and expected > len(targets)


def test_without_a_clean_branch_the_first_one_counts():
    batch, model, tally = supervise(tiny_batch((11, 7))), BranchedModel(tiny_model(), 5), TokenTally("cpu")
    clean = TokenTally("cpu")
    model(**batch, branches=(CLEAN,), chunk_losses=lambda z, t: {"ce": cross_entropy(z[CLEAN][0], t)}, tally=clean)
    seen = []

    def losses(logits, targets):
        seen.append(hits_and_entropy(logits[NOISY][0], targets))
        return noisy_loss(logits, targets)

    with torch.no_grad():
        model(**batch, branches=(NOISY,), noise={0: fixed_noise(0)}, chunk_losses=losses, tally=tally)
    torch.testing.assert_close(tally.sums, sum(seen).float())
    assert tally.sums[1] != clean.sums[1]
