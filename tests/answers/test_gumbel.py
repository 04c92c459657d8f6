"""Gumbel-max sampling draws from the model's distribution, and from nothing but what an answer is."""

import math

import pytest
import torch
from torch.nn.functional import one_hot
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from noisefit.answers.gumbel import GumbelSampling, RepetitionPenalty, answer_key, gumbel_noise


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([answer_key(seed, f"prompt {i}", 1 + i % 5) for i in range(count)])


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """As a number of standard deviations from its mean (Wilson and Hilferty's cube-root approximation)."""
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.slow
def test_the_distribution_is_that_of_torch_multinomial():
    torch.manual_seed(0)
    logits, draws = torch.randn(30), 200_000
    ids = torch.zeros(draws, 4, dtype=torch.long)
    top_p = TopPLogitsWarper(0.9)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(20)])
    warped = warpers(ids[:1], logits.unsqueeze(0))
    p = top_p(ids[:1], warped).softmax(-1).squeeze().double()
    kept = p > 0
    assert 3 < kept.sum() < 20
    counts = {
        "multinomial": one_hot(torch.multinomial(p, draws, replacement=True), 30).sum(0),
        "gumbel": one_hot(GumbelSampling(keys_of(draws), 4, top_p)(ids, warped.expand(draws, -1)).argmax(-1), 30).sum(
            0
        ),
        "next position": one_hot(
            GumbelSampling(keys_of(draws), 3, top_p)(ids, warped.expand(draws, -1)).argmax(-1), 30
        ).sum(0),
    }
    for name, count in counts.items():
        assert not count[~kept].any()
        assert abs(chi_squared(count[kept], draws * p[kept])) < 4, name
    assert chi_squared(counts["gumbel"][kept], draws * p[kept].sqrt() / p[kept].sqrt().sum()) > 100  # it can fail


def test_noise_is_standard_gumbel_and_independent_over_its_arguments():
    keys, tokens = keys_of(400)[:, None], torch.arange(250)[None]
    noise = gumbel_noise(keys, 0, tokens)
    assert noise.shape == (400, 250) and torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi**2 / 6) < 0.04
    others = [
        gumbel_noise(keys, 1, tokens),
        gumbel_noise(keys, 0, tokens + 1),
        gumbel_noise(keys_of(400, 1)[:, None], 0, tokens),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(noise)[0, 1:]).mean() < 0.1  # rows
    assert torch.equal(noise, gumbel_noise(keys, 0, tokens))


def test_keys_tell_seed_prompt_and_round_apart():
    keys = {answer_key(seed, prompt, r) for seed in (0, 1) for prompt in ("a", "b", "1a") for r in (1, 2, 11)}
    assert len(keys) == 18
    assert answer_key(1, "a", 1) == answer_key(1, "a", 1)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_the_repetition_penalty_does_not_see_padding():
    scores = torch.linspace(-1, 1, 10).expand(2, -1).contiguous()
    prompts = torch.tensor([[0, 0, 5, 6], [4, 7, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    answer = torch.tensor([[8], [8]])
    padded = RepetitionPenalty(1.5, mask)(torch.cat([prompts, answer], dim=1), scores)
    alone = RepetitionPenalty(1.5, mask[:1, 2:])(torch.cat([prompts[:1, 2:], answer[:1]], dim=1), scores[:1])
    assert torch.equal(padded[:1], alone)
    assert padded[0, 0] == scores[0, 0]  # the padding's token
    assert padded[0, 8] == scores[0, 8] / 1.5 and padded[1, 4] == scores[1, 4] * 1.5
