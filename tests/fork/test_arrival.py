"""Noise that is added to hidden states of 16 bits: what arrives, against float64 computations of the rounding."""

import math

import pytest
import torch
from tiny_models import supervise, tiny_batch, tiny_model

from noisefit.base.precision import add_noise, mean_magnitude
from noisefit.fork.branches import CLEAN, NOISY, BranchedModel
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.method.noise import TokenScaledNoise

LOW = {torch.bfloat16: 8, torch.float16: 11}  # bits of precision


def hidden_states(dtype, count=400_000):
    torch.manual_seed(0)
    return torch.randn(count).to(dtype)


def step_of(hidden: torch.Tensor) -> torch.Tensor:
    """The distance between neighbours in the dtype's grid around each element, float64."""
    _, exponent = torch.frexp(hidden.double())
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - LOW[hidden.dtype])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("share", [0.0012, 0.005, 0.02, 0.3])
def test_the_mean_of_the_noise_arrives_and_a_spread_that_is_wider_by_the_roundings(dtype, share):
    hidden = hidden_states(dtype)
    drawn = torch.randn(hidden.shape) * share
    arrived = add_noise(hidden, drawn).double() - hidden.double()
    noise, count = drawn.double(), len(hidden)
    large = hidden.double().abs() > 8 * share  # noise stays on one grid, whose step is known
    fraction = (noise / step_of(hidden)).abs() % 1
    expected = noise**2 + fraction * (1 - fraction) * step_of(hidden) ** 2  # the variance of rounding up or down
    # Of each element on average: rounding by chance has no bias, and none where the noise is positive.
    for chosen in (large, large & (noise > 0), large & (noise.abs() < share / 4)):
        error = (arrived - noise)[chosen]
        assert abs(error.mean()) < 5 * error.std() / math.sqrt(chosen.sum())
    assert arrived[large].abs().mean() == pytest.approx(noise[large].abs().mean().item(), rel=0.01)
    assert arrived[large].square().mean() == pytest.approx(expected[large].mean().item(), rel=0.02)
    assert abs(arrived.mean()) < 5 * arrived.std() / math.sqrt(count)
    if dtype == torch.bfloat16:
        widened = (arrived.std() / noise.std()).item()
        assert widened == pytest.approx({0.0012: 1.77, 0.005: 1.10, 0.02: 1.007, 0.3: 1.0}[share], abs=0.02)


def test_noise_that_is_the_same_everywhere_arrives_as_well():
    """A user's own may be; its rounding is not the same everywhere."""
    hidden = hidden_states(torch.bfloat16)
    for constant in (0.001, 0.0011, -0.004):
        arrived = add_noise(hidden, torch.full_like(hidden, constant, dtype=torch.float32)).double() - hidden.double()
        assert arrived.mean().item() == pytest.approx(constant, rel=0.03)


def test_plain_addition_would_lose_most_of_weak_noise():
    """What the rounding is for: of noise of 0.12% three elements in four stay as they were, and half of it is lost."""
    hidden = hidden_states(torch.bfloat16)
    drawn = torch.randn(hidden.shape) * 0.0012
    plain = (hidden + drawn.bfloat16()).double() - hidden.double()
    ours = add_noise(hidden, drawn).double() - hidden.double()
    assert (plain == 0).double().mean() > 0.7
    assert plain.abs().mean() < 0.55 * drawn.abs().mean()
    assert ours.abs().mean() == pytest.approx(drawn.abs().mean().item(), rel=0.01)


@pytest.mark.parametrize("dtype", LOW)
def test_the_sum_is_one_of_its_two_neighbours_and_exact_where_it_has_none(dtype):
    hidden = hidden_states(dtype, 10_000)
    drawn = torch.randn(hidden.shape) * 0.01
    found, exact = add_noise(hidden, drawn), hidden.double() + drawn.double()
    nearest = exact.to(dtype).double()
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() < step_of(found) * (1 + 1e-4)).all()
    assert (found.double() != nearest).any() and (found.double() == nearest).any()
    assert torch.equal(add_noise(hidden, torch.zeros_like(drawn)), hidden)
    assert torch.equal(add_noise(hidden, hidden), 2 * hidden)  # on the grid again
    assert torch.equal(add_noise(hidden, drawn), found)  # the same noise arrives the same way


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_no_number_stays_none_and_what_is_too_large_is_infinite(dtype):
    most = torch.finfo(dtype).max
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the NaN that CUDA makes
    hidden = torch.tensor([math.nan, math.inf, -math.inf, most, -most, 1.0, 1.0, 1.0]).to(dtype)
    noise = torch.tensor([0.1, 0.1, 0.1, most, -most, math.nan, math.inf, 0.0])
    found = add_noise(hidden, noise)
    assert found[[0, 5]].isnan().all() and found[7] == 1
    assert found[[1, 3, 6]].isposinf().all() and found[[2, 4]].isneginf().all()
    assert add_noise(hidden[7:], all_ones).isnan().all()


def test_in_32_bits_it_is_plain_addition():
    for dtype in (torch.float32, torch.float64):
        hidden, drawn = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
        assert torch.equal(add_noise(hidden, drawn), hidden + drawn)


def test_the_gradient_is_that_of_a_sum():
    hidden, noise = torch.randn(64).bfloat16().requires_grad_(), torch.randn(64).requires_grad_()
    weights = torch.randn(64).bfloat16()
    (add_noise(hidden, noise) * weights).sum().backward()
    assert torch.equal(hidden.grad, weights) and torch.equal(noise.grad, weights.float())
    assert hidden.grad.dtype == torch.bfloat16 and noise.grad.dtype == torch.float32


@pytest.mark.parametrize("strategy", ["fork", "separate"])
def test_in_16_bits_what_is_recorded_is_what_arrived(strategy):
    model, batch, states = tiny_model(dtype=torch.bfloat16), supervise(tiny_batch()), []
    branched, last, mask = BranchedModel(model, 100), 3, batch["attention_mask"]
    model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))
    noise = {last: TokenScaledNoise(base_std=0.003)}
    branched(**batch, branches=(CLEAN, NOISY), noise=noise, strategy=strategy, chunk_losses=lambda *args: {})
    clean, noisy = torch.cat(states).chunk(2)
    [(ratio, rms)] = pop_noise_sizes(model).values()
    arrived = mean_magnitude(noisy.double() - clean.double(), mask) / mean_magnitude(clean.double(), mask)
    assert ratio.item() == pytest.approx(arrived.item(), rel=1e-4) and 1e-4 < ratio < 0.02
    real = clean.double()[mask == 1]
    assert rms.item() == pytest.approx(real.square().mean().sqrt().item(), rel=1e-5)
    assert ((noisy != clean).sum(dim=-1) > 0)[mask == 1].all()


def squares(logits, targets):
    return {"all": torch.stack(logits[NOISY]).float().square().sum()}


@pytest.mark.parametrize("strategy", ["fork", "separate"])
def test_a_model_in_16_bits_trains_with_each_kind_of_noise(strategy):
    model, batch = tiny_model(dtype=torch.bfloat16), supervise(tiny_batch())
    branched = BranchedModel(model, 100)
    for relative in (False, True):
        noise = {1: TokenScaledNoise(0.5, relative=relative), 2: TokenScaledNoise(0.5, relative=relative)}
        for of_layer in noise.values():
            of_layer.gradient = True
        sums = branched(**batch, noise=noise, strategy=strategy, chunk_losses=squares)
        sums["all"].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
