"""Predictions of which the likeliest tokens are kept: the divergence and its gradient, against the definition."""

import pytest
import torch

from noisefit.fork.branches import CLEAN, TEACHER, BranchedModel
from noisefit.method.losses import soft_target_loss
from noisefit.method.top_k import LEAST, TopK

N, V = 7, 41


def logits(seed, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(N, V, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def definition(teacher, predicted, k, t_teacher, t):
    """The kept tokens and one bucket of all others, by autograd."""
    p, q = (teacher / t_teacher).softmax(-1), (predicted / t).softmax(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(k).indices, True)
    terms = torch.where(kept, p * (p / q).log(), 0).sum()
    if k == V:
        return terms
    rest_p, rest_q = torch.where(kept, 0, p).sum(-1), torch.where(kept, 0, q).sum(-1)
    return terms + (rest_p * (rest_p / rest_q).log()).sum()


@pytest.mark.parametrize(("temperature", "on"), [(1.0, "both"), (2.5, "both"), (2.5, "teacher")])
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_the_loss_and_its_gradient_are_the_definition(k, temperature, on):
    teacher, predicted = logits(0), logits(1).requires_grad_()
    kept = TopK.of(teacher, k, temperature)
    assert kept.tokens.shape == (N, k) and kept.log_probs.shape == (N, k + 1)
    loss = soft_target_loss(kept, predicted, temperature, on)
    (0.5 * loss).backward()
    found, predicted.grad = predicted.grad, None
    t = 1.0 if on == "teacher" else temperature
    expected = t**2 * definition(teacher, predicted, k, temperature, t)
    (0.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, predicted.grad, rtol=1e-5, atol=1e-7)


def test_with_the_whole_vocabulary_it_is_the_loss_of_the_logits():
    teacher = logits(0)
    one, two = logits(1).requires_grad_(), logits(1).requires_grad_()
    kept = TopK.of(teacher, 10**9, 1.5)
    losses = soft_target_loss(kept, one, 1.5), soft_target_loss(teacher, two, 1.5)
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)


def test_the_rest_is_spread_as_the_student_spreads_it():
    """So of the others, the gradient is 0 where their mass is right."""
    predicted = logits(1).requires_grad_()
    TopK.of(predicted.detach(), 3, 1.0).divergence(predicted, 1.0).backward()
    assert predicted.grad.abs().max() < 1e-6  # the predictions are the teacher's own
    predicted.grad = None
    TopK.of(logits(0), 3, 1.0).divergence(predicted, 1.0).backward()
    q = predicted.detach().softmax(-1)
    for row, tokens in enumerate(TopK.of(logits(0), 3, 1.0).tokens.long()):
        others = [token for token in range(V) if token not in tokens]
        ratios = predicted.grad[row, others] / q[row, others]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rest_of_no_mass_on_either_side_is_finite(dtype):
    sure, unsure = torch.zeros(1, V, dtype=dtype), torch.zeros(1, V, dtype=dtype)
    sure[0, 4] = 1000.0
    assert TopK.of(sure, 1, 1.0).log_probs.tolist() == [[0.0, LEAST]]
    for teacher, student in ((sure, unsure), (unsure, sure), (sure, sure)):
        predicted = student.clone().requires_grad_()
        loss = TopK.of(teacher, 1, 1.0).divergence(predicted, 1.0)
        loss.backward()
        assert loss.isfinite() and predicted.grad.isfinite().all() and predicted.grad.dtype == dtype
        assert (loss.abs() < 1e-6) == (teacher is student)


def test_parts_are_joined_and_split():
    kept = TopK.of(logits(0), 4, 1.0)
    parts = kept.split([3, 0, 4])
    assert [len(part.tokens) for part in parts] == [3, 0, 4]
    joined = TopK.joined(parts)
    assert torch.equal(joined.tokens, kept.tokens) and torch.equal(joined.log_probs, kept.log_probs)
    none = TopK.none(10**3)
    predicted = torch.zeros(0, V, requires_grad=True)
    loss = none.split([0])[0].divergence(predicted, 1.0)
    loss.backward()
    assert loss == 0 and predicted.grad.shape == (0, V)


def test_each_chunk_gets_its_part():
    model = torch.nn.Linear(2, 2)
    kept, seen = TopK.of(logits(0), 4, 1.0), []

    def collect(of_kind, targets):
        seen.append((of_kind[TEACHER][0], len(targets)))
        return {"sum": of_kind[CLEAN][0].sum()}

    branched = BranchedModel.__new__(BranchedModel)
    torch.nn.Module.__init__(branched)
    branched.model, branched.loss_chunk_size = model, 3
    targets = torch.zeros(N, dtype=torch.long)
    branched.sum_losses(logits(1)[None], targets, collect, (CLEAN,), are_logits=True, teacher=kept)
    assert [count for _, count in seen] == [1, 3, 3]
    assert torch.equal(TopK.joined([part for part, _ in seen]).tokens, kept.tokens)
