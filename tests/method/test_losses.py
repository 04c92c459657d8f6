"""The losses and their gradients against float64 computations written from the formulas, in numpy."""

import numpy as np
import pytest
import torch

from noisefit.method.losses import (
    TEMPERATURE_ON,
    add_losses,
    consistency_loss,
    cross_entropy,
    mean_over_branches,
    soft_target_loss,
    symmetric_kl,
)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum())


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [(4 * torch.randn(6, 11, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(3)]


TARGETS = torch.tensor([0, 3, 10, 5, 5, 1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_values_and_gradients_of_the_whole_loss(logits, temperature):
    alpha, lam, t = 0.3, 0.7, temperature
    clean, noisy_1, noisy_2 = logits
    ce = cross_entropy(clean, TARGETS)
    soft = (soft_target_loss(clean, noisy_1, t) + soft_target_loss(clean, noisy_2, t)) / 2
    consistency = consistency_loss(noisy_1, noisy_2, t)
    (alpha * ce + (1 - alpha) * soft + lam * consistency).backward()

    z, z1, z2 = (x.detach().numpy() for x in logits)
    p, p1, p2 = softmax(z / t), softmax(z1 / t), softmax(z2 / t)
    assert ce.item() == pytest.approx(-np.log(softmax(z)[range(6), TARGETS]).sum(), rel=1e-12)
    assert soft.item() == pytest.approx(t**2 * 0.5 * (kl(p, p1) + kl(p, p2)), rel=1e-12)
    assert consistency.item() == pytest.approx(t**2 * kl(p2, p1), rel=1e-12)
    # d/dz T^2 KL(sg p || softmax(z / T)) = T (softmax(z / T) - p): by hand, with the stop-gradients in place.
    one_hot = np.eye(11)[TARGETS]
    expected = [
        alpha * (softmax(z) - one_hot),
        (1 - alpha) * 0.5 * t * (p1 - p) + lam * t * (p1 - p2),
        (1 - alpha) * 0.5 * t * (p2 - p),
    ]
    for tensor, gradient in zip(logits, expected, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-10, atol=1e-13)


def test_each_is_a_sum_over_tokens(logits):
    clean, noisy_1, noisy_2 = logits
    for whole, part in [
        (cross_entropy(clean, TARGETS), lambda i: cross_entropy(clean[i], TARGETS[i])),
        (soft_target_loss(clean, noisy_1, 2.0), lambda i: soft_target_loss(clean[i], noisy_1[i], 2.0)),
        (consistency_loss(noisy_1, noisy_2, 2.0), lambda i: consistency_loss(noisy_1[i], noisy_2[i], 2.0)),
    ]:
        torch.testing.assert_close(part(slice(0, 2)) + part(slice(2, 6)), whole)


def test_no_tokens_give_a_zero_that_is_tied_to_the_logits(logits):
    none = slice(0, 0)
    for loss in (
        cross_entropy(logits[0][none], TARGETS[none]),
        soft_target_loss(logits[0][none], logits[1][none], 1.0),
    ):
        assert loss.item() == 0
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_the_float64_ones_rounded(logits, dtype):
    clean, noisy = (x.detach().to(dtype) for x in logits[:2])
    for temperature in (1.0, 2.5):
        low, exact = noisy.clone().requires_grad_(), noisy.double().requires_grad_()
        (3 * soft_target_loss(clean, low, temperature)).backward()
        (3 * soft_target_loss(clean.double(), exact, temperature)).backward()
        assert low.grad.dtype == dtype
        torch.testing.assert_close(low.grad.double(), exact.grad, rtol=1e-2, atol=1e-4)


def test_second_derivatives_are_refused_and_not_silently_wrong(logits):
    clean, noisy = logits[:2]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(soft_target_loss(clean, noisy, 1.0), noisy, create_graph=True)


def test_a_branch_against_itself_is_zero(logits):
    for dtype in (torch.float64, torch.bfloat16):
        same = logits[0].detach().to(dtype)
        for loss in (soft_target_loss(same, same, 2.0), consistency_loss(same, same, 2.0)):
            assert loss.item() == 0 and loss.shape == ()
            assert loss.dtype == (torch.float32 if dtype is torch.bfloat16 else dtype)


def test_a_kl_term_keeps_one_tensor_for_backward_and_none_where_there_is_none(logits):
    """`[N, V]` tensors are what memory at a large vocabulary is made of."""
    kept = []
    clean, noisy = logits[:2]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        soft_target_loss(clean, noisy, 1.0)
        assert kept == [(6, 11)]
        consistency_loss(noisy, clean, 2.5)
        assert kept == [(6, 11)] * 2
        soft_target_loss(noisy, clean.detach(), 1.0)
    assert kept == [(6, 11)] * 2


def test_low_precision_is_computed_in_float32(logits):
    clean, noisy = (x.detach().bfloat16() for x in logits[:2])
    for loss in (cross_entropy(clean, TARGETS), soft_target_loss(clean, noisy, 1.0)):
        assert loss.dtype == torch.float32
    torch.testing.assert_close(cross_entropy(clean, TARGETS), cross_entropy(clean.double(), TARGETS).float())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_rdrop_is_half_of_both_divergences_and_its_gradient_flows_into_both(logits, temperature):
    first, second, _ = logits
    loss = symmetric_kl(first, second, temperature)
    loss.backward()
    t, (z1, z2) = temperature, (x.detach().numpy() for x in (first, second))

    def whole(z1, z2):
        p1, p2 = softmax(z1 / t), softmax(z2 / t)
        return t**2 * 0.5 * (kl(p1, p2) + kl(p2, p1))

    assert loss.item() == pytest.approx(whole(z1, z2), rel=1e-12)
    for tensor, move in ((first, lambda d: (z1 + d, z2)), (second, lambda d: (z1, z2 + d))):
        for index in np.ndindex(2, 11):  # by central differences
            d = np.zeros_like(z1)
            d[index] = 1e-5
            slope = (whole(*move(d)) - whole(*move(-d))) / 2e-5
            assert tensor.grad[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert symmetric_kl(first, first, temperature).item() == 0


def test_the_mean_over_branches(logits):
    losses = [cross_entropy(branch, TARGETS) for branch in logits]
    assert mean_over_branches(loss for loss in losses).item() == pytest.approx(sum(x.item() for x in losses) / 3)


def test_losses_are_added_by_name_and_without_their_graphs(logits):
    ce = [cross_entropy(branch, TARGETS) for branch in logits]
    sums = {}
    add_losses(sums, {"ce": ce[0]})
    first = sums["ce"]
    add_losses(sums, {"soft": ce[1], "ce": ce[2]})
    add_losses(sums, {})
    assert sums == {"ce": ce[0] + ce[2], "soft": ce[1]} and list(sums) == ["ce", "soft"]
    assert not any(value.requires_grad for value in sums.values())
    assert first == ce[0] and ce[0].requires_grad  # neither what was there before nor what came is changed


def softmax_of(z, t):
    return torch.softmax(z / t, dim=-1)


def plain_kl(p, q):
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("teacher_gradient", [False, True])
@pytest.mark.parametrize("temperature_on", TEMPERATURE_ON)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_terms_and_both_their_gradients_as_each_program_has_them(
    logits, temperature, temperature_on, teacher_gradient
):
    """By autograd, from the formulas: `teacher` softens the clean teacher alone, and has no factor T^2."""
    t, how = temperature, (temperature_on, teacher_gradient)
    clean, noisy_1, noisy_2 = logits
    soft, consistency = soft_target_loss(clean, noisy_1, t, *how), consistency_loss(noisy_1, noisy_2, t, *how)
    found = torch.autograd.grad(0.3 * soft + 0.7 * consistency, logits, allow_unused=True)

    def teacher(p):
        return p if teacher_gradient else p.detach()

    if temperature_on == "both":
        expected_soft = t**2 * plain_kl(teacher(softmax_of(clean, t)), softmax_of(noisy_1, t))
        expected_consistency = t**2 * plain_kl(teacher(softmax_of(noisy_2, t)), softmax_of(noisy_1, t))
    else:
        expected_soft = plain_kl(teacher(softmax_of(clean, t)), softmax_of(noisy_1, 1))
        expected_consistency = plain_kl(teacher(softmax_of(noisy_2, 1)), softmax_of(noisy_1, 1))
    torch.testing.assert_close(soft, expected_soft, rtol=1e-12, atol=0)
    torch.testing.assert_close(consistency, expected_consistency, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(0.3 * expected_soft + 0.7 * expected_consistency, logits, allow_unused=True)
    assert [gradient is None for gradient in found] == [gradient is None for gradient in expected]
    assert [gradient is None for gradient in found] == [not teacher_gradient, False, not teacher_gradient]
    for gradient, plain in zip(found, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient, plain, rtol=1e-9, atol=1e-12)


def test_a_branch_against_itself_is_not_zero_where_its_teacher_alone_is_softened(logits):
    same = logits[0]
    loss = soft_target_loss(same, same, 2.0, "teacher")
    torch.testing.assert_close(loss, plain_kl(softmax_of(same, 2.0), softmax_of(same, 1.0)))
    assert consistency_loss(same, same, 2.0, "teacher").item() == 0
    for how in (("teacher", False), ("both", True)):
        assert soft_target_loss(same, same, 1.0, *how).item() == 0


def test_a_teacher_with_a_gradient_costs_one_more_tensor(logits):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        soft_target_loss(logits[0], logits[1], 1.0, "both", True)
    assert kept == [(6, 11)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_teachers_gradient_is_the_float64_one_rounded(logits, dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in logits[:2]]
    exact = [x.detach().double().requires_grad_() for x in low]
    for pair in (low, exact):
        soft_target_loss(*pair, 2.0, "teacher", True).backward()
    for one, other in zip(low, exact, strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-2, atol=1e-4)


def test_weights_are_those_of_the_tokens(logits):
    clean, weights = logits[0], torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    cross_entropy(clean, TARGETS, weights).backward()
    z, w = clean.detach().numpy(), weights.numpy()
    value = cross_entropy(clean, TARGETS, weights).item()
    assert value == pytest.approx(-(w * np.log(softmax(z)[range(6), TARGETS])).sum(), rel=1e-12)
    assert clean.grad.numpy() == pytest.approx(w[:, None] * (softmax(z) - np.eye(11)[TARGETS]), rel=1e-9, abs=1e-12)
