"""The noise's scale against float64 computations written from the formulas, in numpy."""

import weakref

import numpy as np
import pytest
import torch
from tiny_models import LaplaceNoise

from noisefit.base.precision import masked_mean, mean_magnitude
from noisefit.method.noise import EmbeddingNoise, TokenScaledNoise, lower_median, noise_scale, snr_base_std
from noisefit.method.policy import BY_SNR, CALIBRATED, NoisePolicy


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


def test_the_noise_keeps_no_hidden_states_alive():
    hidden = random_hidden((2, 5, 16))
    noise, watched = TokenScaledNoise(0.1), weakref.ref(hidden)
    scale = noise.scale(hidden)
    noise.draw(scale)
    noise.mean_size(scale)
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
    source = TokenScaledNoise(1.0)
    scale = source.scale(hidden)
    noise = source.draw(scale)
    assert not (scale.requires_grad or noise.requires_grad or source.mean_size(scale).requires_grad)
    (hidden + noise).sum().backward()
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


def drawn(noise: TokenScaledNoise, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return noise.draw(noise.scale(hidden, mask))


@pytest.mark.slow
def test_drawn_noise_has_the_scale_and_the_size_that_is_said():
    torch.manual_seed(0)
    hidden, mask = random_hidden((2, 5, 16)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    source = TokenScaledNoise(0.5)
    draws = torch.stack([drawn(source, hidden, mask) for _ in range(4000)])
    sigma = noise_scale(hidden, snr_base_std(hidden, 0.5, mask), mask)
    torch.testing.assert_close(draws.std(dim=0), sigma, rtol=0.06, atol=0)
    assert (draws.mean(dim=0).abs() < 6 * sigma / 4000**0.5).all()
    sampled = masked_mean(draws.abs().mean(dim=0), mask)
    assert source.mean_size(source.scale(hidden, mask), mask).item() == pytest.approx(sampled.item(), rel=0.01)
    assert mean_magnitude(hidden, mask) == masked_mean(hidden.abs(), mask)  # what it is compared with
    assert not torch.equal(drawn(source, hidden, mask), drawn(source, hidden, mask))  # each call draws afresh


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "source",
    [TokenScaledNoise(0.5), TokenScaledNoise(base_std=0.3), LaplaceNoise(0.5), LaplaceNoise(base_std=0.3),
     EmbeddingNoise(5.0)],
    ids=["by std", "calibrated", "laplace by std", "laplace calibrated", "embedding"],
)  # fmt: skip
def test_the_mean_size_of_any_distribution_is_the_limit_of_its_draws(source, masked):
    torch.manual_seed(0)
    hidden = random_hidden((2, 5, 16))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]) if masked else None
    real = torch.ones(2, 5, dtype=torch.bool) if mask is None else mask.bool()
    scale = source.scale(hidden, mask)
    sampled = torch.stack([source.draw(scale)[real].abs().mean() for _ in range(4000)]).mean()
    assert source.mean_size(scale, mask).item() == pytest.approx(sampled.item(), rel=0.01)
    poisoned = hidden.masked_fill(~real.unsqueeze(-1), torch.nan)
    assert source.mean_size(source.scale(poisoned, mask), mask) == source.mean_size(scale, mask) > 0
    low = source.scale(hidden.bfloat16(), mask)
    assert low.dtype == source.draw(low).dtype == torch.float32
    size = source.mean_size(low, mask)
    assert size.dtype == torch.float32 and size.item() == pytest.approx(sampled.item(), rel=0.02)


@pytest.mark.parametrize("source", [TokenScaledNoise(0.5), LaplaceNoise(base_std=0.3), EmbeddingNoise(5.0)])
def test_the_strength_multiplies_scale_draws_and_size(source):
    hidden, mask = random_hidden((2, 5, 16)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def of(strength):
        torch.manual_seed(3)
        source.strength = strength
        scale = source.scale(hidden, mask)
        return scale, source.draw(scale), source.mean_size(scale, mask)

    assert source.strength == 1.0
    whole = of(1.0)
    assert all(tensor.any() for tensor in whole)
    for strength in (4.0, 0.1, 0.0):
        for found, before in zip(of(strength), whole, strict=True):
            torch.testing.assert_close(found, strength * before)
    source.strength = 1.0


def test_noise_std_zero_is_no_noise():
    hidden = random_hidden((1, 4, 8))
    assert torch.equal(drawn(TokenScaledNoise(0.0), hidden), torch.zeros_like(hidden))


@pytest.mark.parametrize("base_std", [0.3, 0.0])
def test_a_calibrated_scale_takes_the_place_of_noise_std(base_std):
    hidden, mask = random_hidden((2, 5, 16)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    noise = TokenScaledNoise(0.1, base_std)
    torch.manual_seed(3)
    found = drawn(noise, hidden, mask)
    torch.manual_seed(3)
    expected = torch.randn_like(hidden) * torch.from_numpy(
        sigma_from_the_formula(hidden.numpy(), base_std, mask.numpy())
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (noise.mean_size(noise.scale(hidden, mask), mask) > 0) == (base_std > 0)


@pytest.mark.parametrize("kind", [TokenScaledNoise, LaplaceNoise])
def test_a_policy_gives_each_layer_noise_of_its_kind_and_strength(kind):
    by_snr = NoisePolicy(BY_SNR, [1, 4], snr=[1.0] * 5).noise(kind, 0.2)
    assert {layer: (type(noise), noise.noise_std, noise.base_std) for layer, noise in by_snr.items()} == {
        1: (kind, 0.2, None), 4: (kind, 0.2, None),
    }  # fmt: skip
    calibrated = NoisePolicy(CALIBRATED, [1, 4], [0.3, 0.0]).noise(kind, 0.2)
    assert {layer: (type(noise), noise.base_std) for layer, noise in calibrated.items()} == {
        1: (kind, 0.3), 4: (kind, 0.0),
    }  # fmt: skip
    assert by_snr[1] is not by_snr[4]  # one may be made stronger than the other
    with pytest.raises(ValueError):
        NoisePolicy(CALIBRATED, [1, 4], [0.3]).noise(kind, 0.2)
