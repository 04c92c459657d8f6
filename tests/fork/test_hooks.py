"""What the hooks make of noise: one scale where branches share a tensor, and a record of how large the draws are."""

import gc
import weakref

import pytest
import torch
from tiny_models import fixed_noise, supervise, tiny_batch, tiny_model

from noisefit.base.precision import EPS
from noisefit.fork import hooks
from noisefit.fork.branches import CLEAN, NOISY, BranchedModel
from noisefit.fork.hooks import EMBEDDING, pop_noise_sizes
from noisefit.method.losses import consistency_loss
from noisefit.method.noise import EmbeddingNoise, TokenScaledNoise, noise_scale, snr_base_std


def random_hidden(seed=0, dtype=torch.float64):
    return torch.randn(2, 5, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed)) ** 3


def test_both_branches_at_the_fork_share_one_sigma_and_other_tensors_do_not():
    hidden, other = random_hidden(dtype=torch.float32), random_hidden(1, torch.float32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    noise = TokenScaledNoise(0.1)

    def expected(tensor):
        return tensor + torch.randn_like(tensor) * noise_scale(tensor, snr_base_std(tensor, 0.1, mask), mask)

    for tensors in ((hidden, hidden), (hidden, other), (other, hidden.clone()), (hidden, other, hidden, hidden)):
        branches = range(1, len(tensors) + 1)
        torch.manual_seed(3)
        found = hooks._with_noise(noise, tensors, branches, mask, None)
        torch.manual_seed(3)
        for rows, tensor in zip(found, tensors, strict=True):  # in the order of the branches
            assert torch.equal(rows, expected(tensor))
    first, clean, second = hooks._with_noise(noise, [hidden] * 3, (1, 0, 2), mask, None)
    assert clean is hidden and not torch.equal(first, second)


@pytest.fixture
def computed(monkeypatch):
    """The scales that are computed."""
    scales = []
    monkeypatch.setattr("noisefit.method.noise.noise_scale", lambda *args: scales.append(args) or noise_scale(*args))
    return scales


def test_the_scale_is_computed_once_at_the_fork_and_every_branch_is_recorded(computed):
    hidden, other = random_hidden(), 3 * random_hidden(1)

    def ratio(*tensors):
        sizes = []
        hooks._with_noise(TokenScaledNoise(0.5), tensors, range(1, len(tensors) + 1), None, sizes)
        assert len(sizes) == len(tensors)
        return torch.stack(sizes).mean(dim=0)[0]

    torch.testing.assert_close(ratio(hidden, hidden), ratio(hidden))
    assert len(computed) == 2
    torch.testing.assert_close(ratio(hidden, other), (ratio(hidden) + ratio(other)) / 2)
    assert len(computed) == 6
    assert ratio(hidden) != ratio(other)
    computed.clear()
    ratio(hidden, hidden, hidden)
    assert len(computed) == 1


@pytest.mark.parametrize(("strategy", "count"), [("fork", 1 + 2), ("separate", 2 + 2), ("full_logits", 2 + 2)])
def test_a_step_computes_no_more_scales_than_it_has_noisy_tensors(strategy, count, computed):
    branched, batch = BranchedModel(tiny_model(), 100), supervise(tiny_batch())
    noise = {layer: TokenScaledNoise(0.5) for layer in (1, 3)}
    branched(**batch, noise=noise, strategy=strategy, chunk_losses=some_loss)
    assert len(computed) == count


def some_loss(logits, targets):
    return {"consistency": consistency_loss(*logits[NOISY], 1.0)}


def collecting(found):
    """A `chunk_losses` that keeps the logits, clean ones first, and forms nothing."""

    def collect(logits, targets):
        found.append(torch.stack([*logits[CLEAN], *logits[NOISY]]))
        return {}

    return collect


def as_function(noise, ratios=None):
    """The same noise as a plain function, which measures by itself how large its draws are beside the signal."""

    def draw(hidden, branch, mask):
        drawn = noise.draw(noise.scale(hidden, mask))
        if ratios is not None:
            real = mask.bool()
            ratios.append(drawn[real].abs().mean() / (hidden.detach()[real].abs().mean() + EPS))
        return drawn

    return draw


@pytest.mark.parametrize("strategy", ["fork", "separate", "full_logits"])
def test_a_plain_function_gives_the_branches_that_an_object_does_and_its_noise_is_measured(strategy):
    model, batch = tiny_model(), supervise(tiny_batch())
    branched, found, ratios = BranchedModel(model, 100), [], {1: [], 3: []}
    objects = {layer: TokenScaledNoise(2.0) for layer in ratios}
    functions = {layer: as_function(noise, ratios[layer]) for layer, noise in objects.items()}
    for noise in (objects, functions):
        torch.manual_seed(3)
        assert branched(**batch, noise=noise, strategy=strategy, chunk_losses=collecting(found)) == {}
        popped = pop_noise_sizes(model)
        assert list(popped) == [1, 3] and not any(sizes.requires_grad for sizes in popped.values())
        assert pop_noise_sizes(model) == {}
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0][1], found[0][2], atol=0.01)
    assert all(len(of_layer) == 2 for of_layer in ratios.values())
    found = {layer: sizes[0] for layer, sizes in popped.items()}
    torch.testing.assert_close(found, {layer: torch.stack(of_layer).mean() for layer, of_layer in ratios.items()})


@pytest.mark.slow
@pytest.mark.parametrize(
    "noise", [{2: TokenScaledNoise(1.0)}, {EMBEDDING: EmbeddingNoise(2.0)}], ids=["layer", "embedding"]
)
@pytest.mark.parametrize("strategy", ["fork", "separate"])
def test_what_is_recorded_of_an_object_is_the_mean_over_all_draws(noise, strategy):
    branched, batch, sampled = BranchedModel(tiny_model(), 100), supervise(tiny_batch((11, 7))), []
    branched(**batch, noise=noise, strategy=strategy, chunk_losses=collecting([]))
    [(layer, (exact, rms))] = pop_noise_sizes(branched).items()
    functions = {layer: as_function(noise[layer])}
    for _ in range(60):
        with torch.no_grad():
            branched(**batch, noise=functions, strategy=strategy, chunk_losses=collecting([]))
        sampled.append(pop_noise_sizes(branched)[layer])
    ratio, plain_rms = torch.stack(sampled).mean(dim=0).tolist()
    assert exact.item() == pytest.approx(ratio, rel=0.02) and rms.item() == pytest.approx(plain_rms)


def test_several_passes_before_a_pop_are_averaged_and_eval_mode_records_nothing():
    model = tiny_model()
    branched, batches = BranchedModel(model, 100), [supervise(tiny_batch(seed=seed)) for seed in (0, 1)]
    noise = {0: TokenScaledNoise(1.0)}  # the layer's own input has no noise: its ratio is no matter of chance

    def ratio(*batches):
        for batch in batches:
            branched(**batch, noise=noise, chunk_losses=some_loss)
        return pop_noise_sizes(model)

    first, second = (ratio(batch)[0] for batch in batches)
    assert (first != second).all()
    torch.testing.assert_close(ratio(*batches)[0], (first + second) / 2)
    model.eval()
    assert ratio(*batches) == {}


@pytest.mark.parametrize("strategy", ["fork", "separate"])
def test_an_objects_strength_scales_its_noise_and_the_recorded_ratio(strategy):
    model, batch = tiny_model(), supervise(tiny_batch())
    last = len(model.model.layers) - 1
    branched, noise, states = BranchedModel(model, 100), {last: TokenScaledNoise(1.0)}, []
    # What comes out of the last layer, before the norm that is not linear.
    model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))

    def shift(strength):
        noise[last].strength = strength
        states.clear()
        torch.manual_seed(3)
        branched(**batch, noise=noise, strategy=strategy, chunk_losses=some_loss)
        clean, *noisy = torch.cat(states).chunk(3)
        return torch.stack(noisy) - clean, pop_noise_sizes(model)[last][0]

    one, ratio = shift(1.0)
    assert ratio > 0.01
    for strength in (3.0, 0.5, 0.0):
        found, found_ratio = shift(strength)
        torch.testing.assert_close(found, strength * one)
        torch.testing.assert_close(found_ratio, strength * ratio)


def test_what_comes_of_the_noise_keeps_no_hidden_states_alive():
    """Neither the objects nor the record of their size, which lives on to the end of a step."""
    model, batch, watched = tiny_model(), supervise(tiny_batch()), []
    branched = BranchedModel(model, 100)

    def watch(module, args, output):
        watched.append(weakref.ref(output))

    for layer in model.model.layers:
        layer.register_forward_hook(watch, prepend=True)
    kept = {1: TokenScaledNoise(1.0), 2: TokenScaledNoise(1.0), 3: fixed_noise(3)}
    for strategy in ("fork", "separate"):
        branched(**batch, noise=kept, strategy=strategy, chunk_losses=some_loss)
    gc.collect()
    assert len(watched) == 4 + 3 * 4 and not any(reference() is not None for reference in watched)
    assert pop_noise_sizes(model).keys() == kept.keys()
