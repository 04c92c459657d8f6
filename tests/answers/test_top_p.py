"""Top-p without a sort of the whole vocabulary leaves what transformers' own does, and draws the same tokens."""

import pytest
import torch
from transformers import TopPLogitsWarper

from noisefit.answers import gumbel
from noisefit.answers.gumbel import GumbelSampling, answer_key, nucleus

COUNT = 64


def logits_of(kind: str, rows: int = 40, vocabulary: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.linspace(0.5, 6, rows).unsqueeze(1)
    logits = torch.randn(rows, vocabulary, generator=generator) * sharpness
    if kind == "ties":  # many equal logits, at the border too
        logits = (logits * 2).round() / 2
    elif kind == "ruled out":
        logits[:, 1000:] = -torch.inf
    elif kind == "one":
        logits[torch.arange(rows), torch.arange(rows)] = 60.0
    elif kind == "halves":  # two tokens of 1/2 each: their sum is top-p itself, or within its rounding
        logits.fill_(-80.0)
        logits[:, 7] = logits[:, 11] = 5.0
    return logits


@pytest.mark.parametrize("kind", ["plain", "ties", "ruled out", "one", "halves"])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_what_is_left_and_drawn_is_that_of_transformers(kind, top_p, monkeypatch):
    logits = logits_of(kind)
    expected = TopPLogitsWarper(top_p)(None, logits)
    values, tokens, is_found = nucleus(logits, top_p, COUNT)
    left = torch.full_like(logits, -torch.inf).scatter(1, tokens, values)
    assert torch.equal(left[is_found], expected[is_found])
    if kind in ("plain", "one") and top_p in (0.1, 0.5):
        assert is_found.sum() > 10
    if kind == "halves" and top_p == 0.5:
        assert not is_found.any()  # a tie: left to transformers' sort
    keys = torch.tensor([answer_key(0, str(i), 1) for i in range(len(logits))])
    drawn = []
    for likeliest in (COUNT, logits.shape[1]):  # the second sorts all of it
        monkeypatch.setattr(gumbel, "LIKELIEST", likeliest)
        drawn.append(GumbelSampling(keys, 2, TopPLogitsWarper(top_p))(torch.zeros(len(logits), 5), logits))
    assert torch.equal(*drawn)


def test_a_sum_too_near_to_top_p_is_left_to_transformers():
    """Which adds up in another order, so that its rounding decides."""
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.05], [0.6, 0.25, 0.1, 0.04, 0.01]]).log()
    for top_p in (0.8, 0.8 + 2e-5, 0.8 - 2e-5):
        assert nucleus(logits, top_p, 4)[2].tolist() == [False, True]
    assert nucleus(logits, 0.79, 4)[2].tolist() == [True, True]


def test_a_flat_distribution_is_sorted_whole():
    logits = torch.randn(3, 1000) * 0.01
    assert not nucleus(logits, 0.9, COUNT)[2].any()


def test_without_top_k_and_top_p_nothing_is_sorted(monkeypatch):
    logits = logits_of("plain")
    keys = torch.arange(len(logits))
    expected = GumbelSampling(keys, 2, TopPLogitsWarper(1.0))(torch.zeros(len(logits), 5), logits)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    monkeypatch.setattr(torch.Tensor, "topk", None)
    assert torch.equal(GumbelSampling(keys, 2)(torch.zeros(len(logits), 5), logits), expected)
