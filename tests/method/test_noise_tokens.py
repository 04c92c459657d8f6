"""Noise at the prompt's tokens alone, or the response's: where it arrives, and of what its statistics are."""

import pytest
import torch
from running import run
from tiny_models import tiny_model

from noisefit.base.errors import InputError
from noisefit.fork.branches import BRANCHES, BranchedModel
from noisefit.fork.decoder import find_decoder_layers
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.inputs.batches import collate
from noisefit.inputs.prompts import Example
from noisefit.method.noise import TokenScaledNoise, noise_scale, snr_base_std
from noisefit.method.policy import NoisePolicy, make_noise
from noisefit.method.snr import layer_snr
from noisefit.run.contradictions import without_effect
from noisefit.run.settings import Settings

ROWS = [Example(list(range(3, 15)), target_start=5), Example(list(range(20, 28)), target_start=3),
        Example(list(range(30, 40)), target_start=3, gaps=((5, 8),))]  # fmt: skip
LAYER = 1
WHERE = {"prompt": [[1] * 5 + [0] * 7, [1] * 3 + [0] * 9, [1] * 3 + [0, 0, 1, 1, 1] + [0] * 4],
         "response": [[0] * 5 + [1] * 7, [0] * 3 + [1] * 5 + [0] * 4,
                      [0, 0, 0, 1, 1] + [0] * 3 + [1, 1, 0, 0]]}  # fmt: skip


def settings(**flags):
    return Settings(model="m", train_data="t", noise_std=0.7, **flags)


def outputs_of(model, batch, noise, strategy):
    """The noisy layer's outputs: `[clean, noisy, noisy]`."""
    found = []
    hook = find_decoder_layers(model)[LAYER].register_forward_hook(lambda module, args, output: found.append(output))

    def no_losses(logits, targets):
        return {}

    with torch.no_grad():
        model(**batch, branches=BRANCHES, noise=noise, strategy=strategy, chunk_losses=no_losses)
    hook.remove()
    return list(found[0].chunk(3)) if strategy == "fork" else found


@pytest.mark.parametrize("strategy", ["fork", "separate"])
@pytest.mark.parametrize("scale", ["live", "relative"])
@pytest.mark.parametrize("tokens", WHERE)
def test_noise_is_where_it_is_asked_for_and_as_strong_as_these_tokens_say(tokens, scale, strategy, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # so a draw is its scale
    model = BranchedModel(tiny_model(), 100)
    batch = collate(ROWS, 0, noise_tokens=tokens)
    assert batch["noise_mask"].tolist() == WHERE[tokens]
    noise = make_noise(settings(noise_tokens=tokens, noise_scale=scale), NoisePolicy(layers=[LAYER]))
    clean, first, second = outputs_of(model, batch, noise, strategy)
    mask = batch["noise_mask"].bool()
    added = first - clean
    assert torch.equal(first, second) and (added[~mask] == 0).all() and (added[mask] > 0).all()
    chosen = clean[mask][None]  # as if there were no other tokens
    if scale == "live":
        expected = noise_scale(chosen, snr_base_std(chosen, 0.7))[0]
    else:
        expected = (0.7 * chosen.square().mean(-1, keepdim=True).sqrt()).expand_as(chosen)[0]
    torch.testing.assert_close(added[mask], expected, rtol=1e-5, atol=1e-8)
    sizes = pop_noise_sizes(model)[LAYER]
    ratio = expected.mean() * (2 / torch.pi) ** 0.5 / chosen.abs().mean()
    torch.testing.assert_close(sizes[0], ratio, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sizes[1], chosen.square().mean().sqrt(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tokens", WHERE)
def test_the_snr_and_the_limit_are_of_these_tokens(tokens):
    model, batch = tiny_model(), collate(ROWS, 0, noise_tokens=tokens)
    snr, states = layer_snr(model, batch, 0.7), []
    for layer in find_decoder_layers(model):
        layer.register_forward_hook(lambda module, args, output: states.append(output.detach()))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for ratio, hidden in zip(snr, states, strict=True):
        chosen = hidden[batch["noise_mask"].bool()][None]
        noise = TokenScaledNoise(noise_std=0.7)
        torch.testing.assert_close(ratio, chosen.abs().mean() / (noise.mean_size(noise.scale(chosen)) + 1e-6))
    limited = make_noise(settings(noise_tokens=tokens, max_noise_to_signal=0.01), NoisePolicy(layers=[0]))[0]
    mask, hidden = batch["noise_mask"], states[0]
    scale = limited.capped(limited.scale(hidden, mask), hidden, mask)
    share = limited.mean_size(scale, mask) / hidden[mask.bool()].abs().mean()
    assert share.item() == pytest.approx(0.01, rel=1e-5)


def test_a_batch_without_rows_has_a_mask_that_means_can_be_taken_of():
    for tokens in WHERE:
        assert collate([], 0, noise_tokens=tokens)["noise_mask"].tolist() == [[1]]
    assert "noise_mask" not in collate(ROWS, 0)


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (dict(noise_tokens="prompt"), None),
        (dict(noise_tokens="response", noise_policy="auto"), "--noise_std"),
        (dict(noise_tokens="prompt", num_noise_layers=0), "--noise_tokens"),
        (dict(noise_tokens="prompt", loss_mode="neftune"), "--noise_tokens"),
    ],
    ids=str,
)
def test_it_is_said_where_it_changes_nothing(flags, idle):
    said = without_effect(settings(**flags))
    assert (said is None) == (idle is None) and (idle is None or idle in said)


def test_a_text_without_a_border_is_refused():
    with pytest.raises(InputError, match="--noise_tokens prompt: under --loss_on all a row is one text"):
        settings(noise_tokens="prompt", loss_on="all")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [dict(noise_policy="auto", auto_calib_batches=1), dict(noise_scale="frozen")], ids=str
)
def test_runs_are_told_apart_and_resumed(flags, llama_folder, questions, tmp_path):
    flags |= dict(noise_tokens="prompt", max_steps=4, save_steps=2, save_total_limit=0, logging_steps=1, batch_size=2)
    whole = run(llama_folder, questions, tmp_path / "whole", **flags)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = run(llama_folder, questions, tmp_path / "resumed", **flags, resume_from_checkpoint=checkpoint)
    other = run(llama_folder, questions, tmp_path / "other", **flags | dict(noise_tokens="response", save_steps=0))
    assert [line["loss"] for line in whole] == [line["loss"] for line in resumed] != [line["loss"] for line in other]
    with pytest.raises(InputError, match="noise_tokens was prompt and is response"):
        run(llama_folder, questions, tmp_path / "new", **flags | dict(noise_tokens="response"),
            resume_from_checkpoint=checkpoint)  # fmt: skip
