"""The noise's scale against float64 computations written from the formulas, in numpy."""

import weakref

import numpy as np
import pytest
import torch

from noisefit.noise import TokenScaledNoise, lower_median, masked_mean, noise_scale, snr_base_std


def sigma_from_the_formula(hidden: np.ndarray, s: float, mask: np.ndarray) -> np.ndarray:
    """One token at a time, as the formula reads."""
    eps, beta, width = 1e-6, 0.1, hidden.shape[-1]
    real = [hidden[b, t] for b, t in zip(*np.nonzero(mask), strict=True)]
    mean_variance = np.mean([h.var(ddof=1) for h in real])
    sigma = np.empty_like(hidden)
    for b, t in np.ndindex(*mask.shape):
        h = hidden[b, t]
        factor = min(5.0, np.exp(h.var(ddof=1) / (mean_variance + eps)))
        median = np.sort(h)[(width - 1) // 2]
        distance = np.abs(h - median)
        mad = max(np.sort(distance)[(width - 1) // 2], eps * np.sqrt((h**2).sum()))
        sigma[b, t] = s * mad * np.exp(-beta * distance / (mad + eps)) * factor
    return sigma


def random_hidden(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, with tokens of very different sizes, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return normal**3 * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) * 4


@pytest.mark.parametrize("width", [1, 2, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lower_median_is_torchs(width, dtype):
    values = random_hidden((3, 5, 2 * width)).to(dtype)[..., ::2].requires_grad_()  # not contiguous, and in a graph
    assert torch.equal(lower_median(values), values.detach().median(dim=-1, keepdim=True).values)


def test_both_branches_at_the_fork_share_one_sigma_and_other_tensors_do_not():
    hidden, other = random_hidden((2, 5, 16)).float(), random_hidden((2, 5, 16), seed=1).float()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    noise = TokenScaledNoise(0.1)

    def expected(tensor):
        torch.manual_seed(3)
        return torch.randn_like(tensor) * noise_scale(tensor, snr_base_std(tensor, 0.1, mask), mask)

    for tensors in ((hidden, hidden), (hidden, other), (other, hidden.clone())):
        for branch, tensor in enumerate(tensors, start=1):
            torch.manual_seed(3)
            drawn = noise(tensor, branch, mask)
            assert torch.equal(drawn, expected(tensor))
    shared = TokenScaledNoise(0.1)
    assert not torch.equal(shared(hidden, 1, mask), shared(hidden, 2, mask))


def test_the_scale_is_computed_once_at_the_fork_and_every_branch_is_recorded(monkeypatch):
    hidden, other = random_hidden((2, 5, 16)), 3 * random_hidden((2, 5, 16), seed=1)
    computed = []
    monkeypatch.setattr("noisefit.noise.noise_scale", lambda *args: computed.append(args) or noise_scale(*args))

    def ratio(*tensors):
        source = TokenScaledNoise(0.5)
        for branch, tensor in enumerate(tensors, start=1):
            source(tensor, branch)
        return source.pop_noise_to_signal()

    torch.testing.assert_close(ratio(hidden, hidden), ratio(hidden))
    assert len(computed) == 2
    torch.testing.assert_close(ratio(hidden, other), (ratio(hidden) + ratio(other)) / 2)
    assert len(computed) == 6
    assert ratio(hidden) != ratio(other)


def test_the_noise_keeps_no_hidden_states_alive():
    hidden = random_hidden((2, 5, 16))
    noise, watched = TokenScaledNoise(0.1), weakref.ref(hidden)
    noise(hidden, 1)
    del hidden
    assert watched() is None


@pytest.mark.parametrize("width", [16, 33])
@pytest.mark.parametrize("masked", [False, True])
def test_scale_is_the_formula(width, masked):
    hidden = random_hidden((3, 7, width))
    mask = torch.ones(3, 7, dtype=torch.long)
    if masked:
        mask[0, 4:] = 0
        mask[2, 1:] = 0
    expected = sigma_from_the_formula(hidden.numpy(), 0.03, mask.numpy())
    actual = noise_scale(hidden, 0.03, mask if masked else None)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


def test_a_constant_token_gets_the_floor_and_not_a_division_by_zero():
    hidden = random_hidden((1, 3, 8))
    hidden[0, 1] = 2.0
    actual = noise_scale(hidden, 1.0)
    np.testing.assert_allclose(actual.numpy(), sigma_from_the_formula(hidden.numpy(), 1.0, np.ones((1, 3))), rtol=1e-12)
    assert (actual[0, 1] > 0).all()


def test_padding_changes_nothing_even_where_it_is_not_a_number():
    hidden = random_hidden((2, 5, 16))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    poisoned = hidden.clone()
    poisoned[1, 2:] = torch.nan
    real = mask.bool()
    assert torch.equal(noise_scale(hidden, 0.1, mask)[real], noise_scale(poisoned, 0.1, mask)[real])
    assert torch.equal(snr_base_std(hidden, 0.1, mask), snr_base_std(poisoned, 0.1, mask))


def test_base_scale_is_the_square_of_noise_std_times_the_std_of_real_elements():
    hidden = random_hidden((2, 5, 16))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = 0.2**2 * hidden.numpy()[mask.numpy() == 1].std(ddof=1)
    assert snr_base_std(hidden, 0.2, mask).item() == pytest.approx(expected, rel=1e-12)
    assert snr_base_std(hidden, 0.2).item() == pytest.approx(0.04 * hidden.numpy().std(ddof=1), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32_and_keeps_its_dtype(dtype):
    hidden = random_hidden((2, 6, 32)).to(dtype)
    actual = noise_scale(hidden, 0.5)
    assert actual.dtype == dtype and not actual.requires_grad
    torch.testing.assert_close(actual, noise_scale(hidden.double(), 0.5).to(dtype), rtol=1e-2, atol=1e-6)


def test_no_gradient_flows_through_the_scale_or_the_noise():
    hidden = random_hidden((1, 4, 8)).requires_grad_()
    noise = TokenScaledNoise(1.0)(hidden, 1)
    assert not noise.requires_grad
    (hidden + noise).sum().backward()
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


def test_drawn_noise_has_the_scale_and_the_recorded_strength():
    torch.manual_seed(0)
    hidden, mask = random_hidden((2, 5, 16)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    source = TokenScaledNoise(0.5)
    draws = torch.stack([source(hidden, 1, mask=mask) for _ in range(4000)])
    sigma = noise_scale(hidden, snr_base_std(hidden, 0.5, mask), mask)
    torch.testing.assert_close(draws.std(dim=0), sigma, rtol=0.06, atol=0)
    assert (draws.mean(dim=0).abs() < 6 * sigma / 4000**0.5).all()
    sampled = masked_mean(draws.abs().mean(dim=0), mask) / masked_mean(hidden.abs(), mask)
    assert source.pop_noise_to_signal().item() == pytest.approx(sampled.item(), rel=0.01)
    assert torch.isnan(source.pop_noise_to_signal())


def test_noise_std_zero_is_no_noise():
    hidden = random_hidden((1, 4, 8))
    assert torch.equal(TokenScaledNoise(0.0)(hidden, 1), torch.zeros_like(hidden))


@pytest.mark.parametrize("base_std", [0.3, 0.0])
def test_a_calibrated_scale_takes_the_place_of_noise_std(base_std):
    hidden, mask = random_hidden((2, 5, 16)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    noise = TokenScaledNoise(0.1, base_std)
    torch.manual_seed(3)
    drawn = noise(hidden, 1, mask)
    torch.manual_seed(3)
    expected = torch.randn_like(hidden) * torch.from_numpy(
        sigma_from_the_formula(hidden.numpy(), base_std, mask.numpy())
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-9, atol=1e-12)
    assert (noise.pop_noise_to_signal() > 0) == (base_std > 0)
