"""Each way in which the noise's scale lives, against float64 computations of its own; its gradient, and its limit."""

import functools

import numpy as np
import pytest
import torch
from test_noise import random_hidden, sigma_from_the_formula
from tiny_models import supervise, tiny_batch, tiny_model

from noisefit.base.precision import add_noise, masked_mean, mean_magnitude
from noisefit.fork.branches import NOISY, BranchedModel
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.method.losses import consistency_loss
from noisefit.method.noise import TokenScaledNoise, lower_median, noise_scale, relative_scale, snr_base_std
from noisefit.method.policy import BY_SNR, CALIBRATED, FROZEN, NoisePolicy
from noisefit.method.snr import average_base_std, layer_snr

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])

LIVE = TokenScaledNoise(0.5)
CONSTANT = TokenScaledNoise(base_std=0.3)  # as frozen and calibrated noise is
RELATIVE = TokenScaledNoise(0.2, relative=True)
KINDS = {"live": LIVE, "constant": CONSTANT, "relative": RELATIVE}


def kind_of(name, gradient=False, **changes):
    noise = KINDS[name]
    copy = TokenScaledNoise(noise.noise_std, noise.base_std, noise.relative)
    copy.gradient = gradient
    for key, value in changes.items():
        setattr(copy, key, value)
    return copy


def scale_from_the_formula(name: str, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if name == "relative":
        return np.broadcast_to(0.2 * np.sqrt((hidden**2).mean(-1, keepdims=True)), hidden.shape)
    base = 0.3 if name == "constant" else 0.5**2 * hidden[mask == 1].std(ddof=1)
    return sigma_from_the_formula(hidden, base, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_scale_of_each_kind_is_its_formula(name, masked):
    hidden = random_hidden((2, 6, 16))
    mask = MASK if masked else None
    found = KINDS[name].scale(hidden, mask).numpy()
    real = np.ones((2, 6)) if mask is None else mask.numpy()
    expected = scale_from_the_formula(name, hidden.numpy(), real)
    np.testing.assert_allclose(found[real == 1], expected[real == 1], rtol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_the_mean_size_of_each_kind_is_the_limit_of_its_draws_in_16_bits_too(name):
    """So the SNR needs no sampling: what arrives in bfloat16 is on average as large as what was meant."""
    torch.manual_seed(0)
    hidden = random_hidden((2, 6, 512)).bfloat16()
    noise = KINDS[name]
    scale = noise.scale(hidden, MASK)
    assert scale.dtype == torch.float32
    arrived = [add_noise(hidden, noise.draw(scale)).double() - hidden.double() for _ in range(60)]
    sampled = torch.stack([mean_magnitude(difference, MASK) for difference in arrived]).mean()
    assert noise.mean_size(scale, MASK).item() == pytest.approx(sampled.item(), rel=0.01)


def test_relative_noise_is_nothing_where_a_token_is_and_has_a_finite_gradient_there():
    hidden = random_hidden((1, 3, 8))
    hidden[0, 1] = 0
    hidden.requires_grad_()
    scale = relative_scale(hidden, 0.5)
    assert not scale[0, 1].any() and scale[0, [0, 2]].all()
    scale.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_through_the_scale_is_that_of_finite_differences(name):
    """Through `mad`, `w` and `f`, or the token's size; the base scale, `std(h)` for one, is a constant."""
    hidden, drawn = random_hidden((2, 6, 9)), random_hidden((2, 6, 9), seed=1)
    base = None if name == "relative" else 0.3 if name == "constant" else snr_base_std(hidden, 0.5, MASK)
    constant = TokenScaledNoise(base_std=base) if base is not None else RELATIVE  # its base scale cannot follow

    def of(h):
        scale = constant.scale(h, MASK)
        return (masked_mean(scale * drawn, MASK)).item()

    watched = hidden.clone().requires_grad_()
    noise = kind_of(name, gradient=True)
    masked_mean(noise.scale(watched, MASK) * drawn, MASK).backward()
    numeric, step = torch.zeros_like(hidden), 1e-7
    for index in np.ndindex(*hidden.shape):
        up, down = hidden.clone(), hidden.clone()
        up[index] += step
        down[index] -= step
        numeric[index] = (of(up) - of(down)) / (2 * step)
    assert watched.grad.abs().max() > 1e-3
    torch.testing.assert_close(watched.grad, numeric, rtol=1e-4, atol=1e-8)


def test_a_median_with_a_gradient_is_the_one_without():
    values = random_hidden((3, 5, 16))
    watched = values.clone().requires_grad_()
    found = lower_median(watched)
    assert torch.equal(found, lower_median(values))
    found.sum().backward()
    assert torch.equal(watched.grad, (values == lower_median(values)).double())


def test_the_gradient_is_off_unless_asked_for_and_changes_no_value():
    hidden = random_hidden((2, 6, 16)).requires_grad_()
    for name in KINDS:
        off, on = kind_of(name).scale(hidden, MASK), kind_of(name, gradient=True).scale(hidden, MASK)
        assert on.requires_grad and not off.requires_grad
        assert torch.equal(on, off)
    assert not noise_scale(hidden, 0.1).requires_grad and noise_scale(hidden, 0.1, gradient=True).requires_grad
    assert not snr_base_std(hidden, 0.1).requires_grad


def gradients(model, batch, noise, strategy):
    branched = BranchedModel(model, 100)
    model.zero_grad()
    torch.manual_seed(3)
    losses = branched(**batch, branches=(NOISY, NOISY), noise=noise, strategy=strategy, chunk_losses=some_loss)
    losses["consistency"].backward()
    pop_noise_sizes(model)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def some_loss(logits, targets):
    return {"consistency": consistency_loss(*logits[NOISY], 1.0)}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_fork_and_separate_passes_give_each_kind_the_same_gradients(name, gradient, monkeypatch):
    """Also checkpointed. The draws are fixed: those of the first branch, and of the second."""
    model, batch = tiny_model(dtype=torch.float64).train(), supervise(tiny_batch((11, 7)))
    unit = random_hidden((2, 11, 32), seed=5)
    rolled = {"calls": 0}

    def draw(self, scale):
        # The fork asks layer by layer for both branches, separate passes branch by branch for both layers.
        layer, branch = order[rolled["calls"] % 4]
        rolled["calls"] += 1
        return unit.roll(2 * layer + branch, dims=-1) * scale

    monkeypatch.setattr(TokenScaledNoise, "draw", draw)
    found = {}
    for strategy in ("fork", "separate"):
        order = [(0, 0), (0, 1), (1, 0), (1, 1)] if strategy == "fork" else [(0, 0), (1, 0), (0, 1), (1, 1)]
        noise = {layer: kind_of(name, gradient) for layer in (1, 2)}
        found[strategy] = gradients(model, batch, noise, strategy)
    assert rolled["calls"] == 8
    for parameter, gradient_of in found["fork"].items():
        torch.testing.assert_close(found["separate"][parameter], gradient_of, rtol=1e-6, atol=1e-9, msg=parameter)


def test_the_gradient_through_the_noise_reaches_the_layers_before_it_alone():
    model, batch = tiny_model(dtype=torch.float64).train(), supervise(tiny_batch((11, 7)))
    first = {name: gradients(model, batch, {1: kind_of(name, gradient=False)}, "fork") for name in KINDS}
    for name, without in first.items():
        with_it = gradients(model, batch, {1: kind_of(name, gradient=True)}, "fork")
        before, after = "model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"
        assert (with_it[before] - without[before]).norm() > 0.01 * without[before].norm()
        torch.testing.assert_close(with_it[after], without[after])


def test_gradient_checkpointing_keeps_the_gradient_through_the_noise():
    batch, found = supervise(tiny_batch((11, 7))), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = tiny_model(dtype=torch.float64).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        noise = {layer: kind_of("live", gradient=True) for layer in (1, 2)}
        found.append(gradients(model, batch, noise, "fork"))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_a_limit_makes_the_noise_that_share_of_the_signal_and_leaves_weaker_noise_alone(name):
    hidden = random_hidden((2, 6, 64))
    noise = kind_of(name)
    scale = noise.scale(hidden, MASK)
    ratio = (noise.mean_size(scale, MASK) / mean_magnitude(hidden, MASK)).item()
    noise.max_to_signal = 2 * ratio
    assert torch.equal(noise.capped(scale, hidden, MASK), scale)
    noise.max_to_signal = ratio / 3
    limited = noise.capped(scale, hidden, MASK)
    torch.testing.assert_close(limited, scale / 3)
    assert torch.equal(noise.capped(torch.zeros_like(scale), hidden, MASK), torch.zeros_like(scale))


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_under_a_limit_takes_its_factor_for_a_constant(name):
    hidden, drawn = random_hidden((2, 6, 9)), random_hidden((2, 6, 9), seed=1)
    free, limited = (kind_of(name, gradient=True, max_to_signal=limit) for limit in (0.0, 0.01))
    found = []
    for noise in (free, limited):
        watched = hidden.clone().requires_grad_()
        scale = noise.capped(noise.scale(watched, MASK), watched, MASK)
        masked_mean(scale * drawn, MASK).backward()
        found.append((watched.grad, noise.mean_size(scale, MASK)))
    factor = found[1][1] / found[0][1]
    assert factor < 0.5
    torch.testing.assert_close(found[1][0], found[0][0] * factor)


def test_the_limit_holds_in_the_pass_and_in_what_is_recorded():
    model, batch = tiny_model(), supervise(tiny_batch())
    branched = BranchedModel(model, 100)
    for strategy in ("fork", "separate"):
        for limit, expected in ((0.0, None), (0.05, 0.05)):
            noise = {layer: kind_of("relative", max_to_signal=limit) for layer in (1, 3)}
            branched(**batch, branches=(NOISY, NOISY), noise=noise, strategy=strategy, chunk_losses=some_loss)
            for ratio, _ in pop_noise_sizes(model).values():
                assert ratio.item() == pytest.approx(expected, rel=1e-4) if expected else ratio > 0.1


def test_a_frozen_scale_is_that_of_the_batches_it_was_measured_on():
    """Independently: the blocks' outputs by hooks of this test, their standard deviation over real tokens in numpy."""
    model, batches = tiny_model(dtype=torch.float64).eval(), [tiny_batch((11, 7), seed=seed) for seed in (0, 1, 2)]
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach().numpy()))
    expected = []
    for batch in batches:
        outputs.clear()
        with torch.no_grad():
            model(**batch)
        real = batch["attention_mask"].numpy() == 1
        expected.append([0.3**2 * h[real].std(ddof=1) for h in outputs])
    found = average_base_std(model, batches, 0.3)
    np.testing.assert_allclose(found.numpy(), np.mean(expected, axis=0), rtol=1e-12)


def test_the_snr_of_relative_noise_goes_by_the_tokens_own_sizes():
    model, batch, seen = tiny_model(dtype=torch.float64).eval(), tiny_batch((11, 7)), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.numpy()))
    found = layer_snr(model, batch, 0.2, functools.partial(TokenScaledNoise, relative=True))
    real = batch["attention_mask"].numpy() == 1
    for ratio, h in zip(found, seen, strict=True):
        noise = np.sqrt(2 / np.pi) * 0.2 * np.sqrt((h[real] ** 2).mean(-1)).mean()
        assert ratio.item() == pytest.approx(np.abs(h[real]).mean() / (noise + 1e-6), rel=1e-9)


def test_a_policy_that_is_frozen_gives_each_layer_its_measured_base_scale():
    frozen = NoisePolicy(FROZEN, [1, 3], [0.3, 0.1], [1.0] * 4, start_stds=[0.5, 0.3, 0.2, 0.1])
    assert {layer: noise.base_std for layer, noise in frozen.noise(TokenScaledNoise, 9.0).items()} == {1: 0.3, 3: 0.1}
    relative = functools.partial(TokenScaledNoise, relative=True)
    for policy, std in ((NoisePolicy(BY_SNR, [2]), 0.7), (NoisePolicy(CALIBRATED, [2], [0.7]), 0.7)):
        hidden = random_hidden((1, 4, 8))
        scale = policy.noise(relative, 0.7)[2].scale(hidden)
        torch.testing.assert_close(scale, relative_scale(hidden, std))
