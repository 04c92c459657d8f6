"""What an answer's probability is, that its figure does not depend on the batch, and under noise."""

import math
import random

import pytest
import torch
from test_generation import PROMPTS, SAMPLING, answerer, answers_of, jobs_for
from tiny_models import tiny_model

from noisefit.answers import generation, probability
from noisefit.answers.generation import Answerer
from noisefit.answers.gumbel import answer_key
from noisefit.answers.noisy_passes import AT_ONCE, NoisyPasses, noise_seed
from noisefit.answers.probability import answer_log_p, is_near_border, round_log_p, token_log_p
from noisefit.fork.decoder import find_decoder_layers
from noisefit.fork.hooks import EMBEDDING
from noisefit.method.noise import EmbeddingNoise, TokenScaledNoise, noise_scale, snr_base_std

pytestmark = pytest.mark.slow


def test_log_p_of_tokens_equals_the_formula_in_float64():
    torch.manual_seed(0)
    logits = torch.randn(200, 50) * torch.logspace(-1, 2, 200).unsqueeze(-1) - 30
    logits[::7, 3] = -torch.inf
    tokens = torch.where(torch.arange(200) % 2 == 0, logits.argmax(-1), torch.randint(4, 50, (200,)))
    before = logits.clone()
    found, error = token_log_p(logits, tokens)
    over = logits.double() - logits.double().gather(-1, tokens.unsqueeze(-1))  # over the token's own
    expected = -over.exp().scatter(-1, tokens.unsqueeze(-1), 0.0).sum(-1).log1p()
    plain = logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(expected, plain, rtol=1e-12, atol=1e-12)
    assert found.dtype == torch.float64 and torch.equal(logits, before)
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)  # near p = 1 too, where log_softmax keeps no digit
    assert (expected > -1e-4).sum() > 10 and (expected > -1e-6).sum() > 5
    size = logits.amax(-1).double().abs()
    assert torch.allclose(error, -expected.expm1() * 20 * 2.0**-23 * (1 + size), rtol=1e-4, atol=1e-30)


def test_an_error_of_the_logits_moves_log_p_by_no_more_than_its_bound():
    torch.manual_seed(0)
    logits = torch.randn(500, 40, dtype=torch.float64) * 5
    tokens = torch.randint(0, 40, (500,))
    per_logit = probability.LOGIT_ERROR / 2 * (1 + logits.amax(-1, keepdim=True).abs())
    worse = logits - per_logit
    worse.scatter_(-1, tokens.unsqueeze(-1), logits.gather(-1, tokens.unsqueeze(-1)) + per_logit)  # all against one
    log_p, error = token_log_p(logits, tokens)
    moved = (token_log_p(worse, tokens)[0] - log_p).abs() / error
    assert 0.99 < moved.max() < 1.001


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(-12.345678, -12.346), (-123.45678, -123.46), (-1234567.8, -1234600.0), (-1.23456, -1.235), (-0.123456, -0.123),
     (-0.0123456, -0.0123), (-1.23456e-7, -1.23e-7), (-0.99996, -1.0), (0.0, 0.0), (-0.0, 0.0), (-1.00049, -1.0),
     (-0.0009996, -0.001)],
)  # fmt: skip
def test_three_decimals_and_three_to_five_significant_digits(value, rounded):
    assert round_log_p(value) == rounded and math.copysign(1, round_log_p(value)) == (1 if rounded == 0 else -1)


def test_away_from_a_border_no_error_within_the_bound_rounds_otherwise():
    draw = random.Random(0)
    near = 0
    for _ in range(20_000):
        value, share = -(10 ** draw.uniform(-8, 3)), 10 ** draw.uniform(-7, -3)
        error = share * abs(value)
        if is_near_border(value, error):
            near += 1
        else:
            assert len({round_log_p(value + draw.uniform(-1, 1) * error) for _ in range(5)}) == 1
    assert 0 < near < 10_000
    assert is_near_border(-0.12349999, 1e-7) and not is_near_border(-0.1236, 1e-5)
    assert math.isinf(round_log_p(-math.inf)) and not is_near_border(-math.inf, 0.0)


class Recorded(Answerer):
    """Keeps each answer's own tokens."""

    def _answer(self, job, tokens, *rest):
        answer = super()._answer(job, tokens, *rest)
        vars(self).setdefault("made", []).append((job, self._own_tokens(tokens), answer))
        return answer


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_the_figure_is_that_of_the_models_own_distribution_token_by_token(model_type):
    """The same tokens through a float64 copy, a prefix at a time: temperature, top-p and penalty play no part."""
    model = answerer(model_type)
    model.__class__ = Recorded
    answers_of(model, 5, (1, 2))
    exact = model.model.double()
    lengths = set()
    for job, tokens, answer in model.made[::3]:
        ids, total = list(job.input_ids), 0.0
        for token in tokens:
            with torch.no_grad():
                logits = exact(torch.tensor([ids])).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            ids.append(token)
        lengths.add(len(tokens))
        assert answer.logprob == pytest.approx(total, abs=0.0006) and answer.tokens == len(tokens)
    assert lengths - {1}


def with_logits_of_the_batch(model: Answerer, size: float) -> Answerer:
    """Logits that differ with the number of rows, as on every device, but by more."""

    def change(module, args, output):
        rows, _, vocabulary = output.logits.shape
        if rows > 1:
            output.logits = output.logits + size * torch.sin(torch.arange(vocabulary) * (1.3 + rows))
        return output

    model.model.register_forward_hook(change)
    return model


def test_logits_that_depend_on_the_batch_change_no_figure(monkeypatch):
    monkeypatch.setattr(probability, "LOGIT_ERROR", 200 * probability.LOGIT_ERROR)
    model = with_logits_of_the_batch(answerer(), probability.LOGIT_ERROR / 2)
    expected = answers_of(model, 1)
    assert all(answers_of(model, size) == expected for size in (4, 100))
    monkeypatch.setattr(generation, "is_near_border", lambda value, error: False)
    assert answers_of(model, 4) != expected  # else this test would show nothing


def test_few_answers_are_passed_through_the_model_again(monkeypatch):
    again = []
    original = generation.answer_log_p
    monkeypatch.setattr(generation, "answer_log_p", lambda *args: again.append(args) or original(*args))
    model = answerer()
    found = answers_of(model, 7)
    assert len(again) < len(found) / 2
    model.model.to(torch.bfloat16)
    before = len(again)
    assert all(answer.logprob < 0 for answer in answers_of(model, 7).values()) and len(again) == before


@pytest.mark.parametrize("end", ["limit", "token", "text"])
def test_the_end_is_counted_where_it_was_generated(end):
    model = answerer()
    tokens = model.tokenizer("It is.", add_special_tokens=False)["input_ids"]
    own = (
        tokens
        + {"limit": [], "token": [2], "text": model.tokenizer("<|im_end|>", add_special_tokens=False).input_ids}[end]
    )
    behind = [] if end == "limit" else [0, 0, 0] if end == "token" else [*tokens, 0, 0]
    assert 2 in model.stop_ids and model._own_tokens(own + behind) == own
    assert model._text(own) == "It is."


# --- Under noise -----------------------------------------------------------------------------------------------------

NOISE = {1: TokenScaledNoise(noise_std=3.0), 2: TokenScaledNoise(base_std=0.5)}


def by_hand(model, prompt, answer, key, number, noise=NOISE) -> float:
    """One pass with hooks of its own: the formula's scale over this row, and draws from the seeded generator."""
    handles = []
    for index, of_layer in noise.items():

        def add(module, args, output, index=index, of_layer=of_layer):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            std = snr_base_std(hidden, of_layer.noise_std) if of_layer.base_std is None else of_layer.base_std
            torch.manual_seed(noise_seed(key, number, index))
            noisy = hidden + noise_scale(hidden, std) * torch.randn(hidden.shape)
            return noisy if isinstance(output, torch.Tensor) else (noisy, *output[1:])

        handles.append(find_decoder_layers(model)[index].register_forward_hook(add))
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    return sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "opt"])
def test_a_noisy_pass_is_one_with_the_runs_noise_from_a_seeded_generator(model_type):
    model = tiny_model(model_type, torch.float32).eval()
    prompt, answer, key = [5, 6, 7, 8], [9, 10, 11], answer_key(3, "Why?", 2)
    state = torch.get_rng_state()
    found = NoisyPasses(model, NOISE, AT_ONCE + 3).log_p(prompt, answer, key)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers change
    assert found == pytest.approx([by_hand(model, prompt, answer, key, i + 1) for i in range(AT_ONCE + 3)], abs=1e-4)
    assert len(set(found)) == AT_ONCE + 3 and max(found) - min(found) > 0.1
    assert NoisyPasses(model, NOISE, 2).log_p(prompt, answer, key) == pytest.approx(found[:2], abs=1e-5)
    other = NoisyPasses(model, NOISE, 2).log_p(prompt, answer, answer_key(3, "Why?", 1))
    assert other != pytest.approx(found[:2], abs=1e-3)
    silent = NoisyPasses(model, {1: TokenScaledNoise(noise_std=0.0)}, 2).log_p(prompt, answer, key)
    assert silent == pytest.approx([answer_log_p(model, prompt, answer)] * 2, abs=1e-5)


def test_a_limit_on_the_noise_and_noise_on_the_embedding_reach_the_passes():
    model = tiny_model("llama", torch.float32).eval()
    prompt, answer = [5, 6, 7, 8], [9, 10, 11]
    limited = TokenScaledNoise(noise_std=3.0)
    limited.max_to_signal = 1e-9
    quiet = answer_log_p(model, prompt, answer)
    assert NoisyPasses(model, {1: limited}, 2).log_p(prompt, answer, 7) == pytest.approx([quiet] * 2, abs=1e-5)
    found = NoisyPasses(model, {EMBEDDING: EmbeddingNoise(50.0)}, 2).log_p(prompt, answer, 7)
    assert len({round(value, 2) for value in (*found, quiet)}) == 3


def test_every_pass_and_layer_has_noise_of_its_own():
    seeds = {noise_seed(key, number, layer) for key in (-5, 0, 9) for number in (1, 2, 12) for layer in (-1, 1, 2, 12)}
    assert len(seeds) == 36 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_noise_depends_neither_on_the_batch_nor_on_the_other_rounds():
    model = answerer()
    model.noisy = NoisyPasses(model.model, NOISE, 3)
    expected = answers_of(model, 1)
    assert answers_of(model, 4) == expected and answers_of(model, 100) == expected
    assert answers_of(model, 100, (2,)) == {(i, 2): expected[i, 2] for i in range(len(PROMPTS))}
    for job in jobs_for(model)[:2]:
        tokens = []
        model.__class__, model.made = Recorded, []
        answers_of(model, 100, (1,))
        tokens = next(own for of, own, _ in model.made if of.index == job.index)
        sums = [
            by_hand(model.model, job.input_ids, tokens, answer_key(SAMPLING.seed, job.prompt, 1), i) for i in (1, 2, 3)
        ]
        mean = sum(sums) / 3
        spread = math.sqrt(sum((value - mean) ** 2 for value in sums) / 3)  # of these passes: by their number
        found = expected[job.index, 1]
        assert found.noise_logprob_mean == pytest.approx(mean, abs=1e-3)
        assert found.noise_logprob_spread == pytest.approx(spread, abs=1e-3) and spread > 0.01
