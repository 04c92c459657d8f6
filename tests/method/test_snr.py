"""The SNR's closed form against the mean of sampled passes, and the choice of layers."""

import pytest
import torch
from tiny_models import CONFIGS, LaplaceNoise, tiny_batch, tiny_model

from noisefit.base.errors import InputError
from noisefit.fork.branches import BranchedModel
from noisefit.method.noise import TokenScaledNoise, noise_scale, snr_base_std
from noisefit.method.snr import average_snr, layer_snr, negligible_noise, select_layers


def block_outputs(model, batch) -> list[torch.Tensor]:
    """Every block's output, from transformers' own record of hidden states but for the last layer's, from a hook."""
    last = []
    handle = (model.model.layers if hasattr(model, "model") else model.transformer.h)[-1].register_forward_hook(
        lambda module, args, output: last.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    handle.remove()
    return [*states[1:-1], last[0]]


def laplace(tensor):
    return torch.distributions.Laplace(tensor.new_zeros(()), 1.0).sample(tensor.shape)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "unit"), [(TokenScaledNoise, torch.randn_like), (LaplaceNoise, laplace)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_closed_form_is_the_limit_of_sampled_passes(model_type, kind, unit):
    model, batch = tiny_model(model_type).eval(), tiny_batch()
    real = batch["attention_mask"].bool()
    expected = []
    torch.manual_seed(0)
    for hidden in block_outputs(model, batch):
        sigma = noise_scale(hidden, snr_base_std(hidden, 0.3, batch["attention_mask"]), batch["attention_mask"])
        samples = torch.stack([(unit(hidden) * sigma)[real].abs().mean() for _ in range(1000)])
        expected.append(hidden[real].abs().mean() / (samples.mean() + 1e-6))
    found = layer_snr(model, batch, 0.3, kind)
    torch.testing.assert_close(found, torch.stack(expected), rtol=3e-3, atol=0)
    assert torch.equal(average_snr(model, [batch], 0.3, kind), found)
    assert torch.equal(layer_snr(model, batch, 0.3), found) == (kind is TokenScaledNoise)


def test_snr_does_not_depend_on_padding():
    model = tiny_model().eval()
    batch = tiny_batch((6, 6))
    padded = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.items()}
    torch.testing.assert_close(layer_snr(model, batch, 0.1), layer_snr(model, padded, 0.1), rtol=1e-9, atol=0)


def test_measuring_runs_in_eval_mode_and_leaves_the_model_as_it_was():
    model = tiny_model("gpt2", attn_pdrop=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    branched = BranchedModel(model, 8)
    assert torch.equal(layer_snr(branched, tiny_batch(), 0.1), layer_snr(branched, tiny_batch(), 0.1))
    assert model.training
    assert torch.equal(layer_snr(branched, tiny_batch(), 0.1), layer_snr(model, tiny_batch(), 0.1))


def test_the_average_is_over_batches():
    model, batches = tiny_model(), [tiny_batch(seed=0), tiny_batch((4, 12), seed=1)]
    expected = (layer_snr(model, batches[0], 0.1) + layer_snr(model, batches[1], 0.1)) / 2
    torch.testing.assert_close(average_snr(model, batches, 0.1), expected.double())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_one_ratio_a_layer_for_every_architecture(model_type):
    model = tiny_model(model_type, torch.float32)
    snr = layer_snr(model, tiny_batch(), 0.1)
    assert snr.shape == (4,) and (snr > 0).all()


def test_selection():
    snr = torch.tensor([3.0, 9.0, 1.0, 9.0, 5.0])
    assert select_layers(snr, 3, "Largest") == [1, 3, 4]
    assert select_layers(snr, 2, "Lowest") == [0, 2]
    assert select_layers(snr, 1, "Largest") == [1]  # of equal ones the earlier
    assert select_layers(snr, 0, "Largest") == []
    assert select_layers(snr, 5, "Lowest") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count, snr_format", [(6, "Largest"), (-1, "Largest"), (1, "largest")])
def test_selection_refuses_what_is_out_of_range(count, snr_format):
    with pytest.raises(ValueError):
        select_layers(torch.ones(5), count, snr_format)


def test_layers_that_overflow_cannot_be_ranked():
    with pytest.raises(InputError, match=r"layers \[1\]"):
        select_layers(torch.tensor([1.0, torch.inf]), 1, "Largest")


def test_negligible_noise_is_said():
    snr = torch.tensor([900.0, 2000.0, 5000.0])
    assert negligible_noise(snr, [1, 2]) is not None and "0.0005" in negligible_noise(snr, [1, 2])
    assert negligible_noise(snr, [0, 2]) is None
    assert negligible_noise(snr, []) is None
