"""Answers do not depend on the batch they are made in, and end where the turn ends."""

from dataclasses import replace

import pytest
import torch
from tiny_folder import byte_tokenizer
from tiny_models import tiny_model

from noisefit.answers.generation import Answerer, answer_all
from noisefit.answers.jobs import Answer, Job, left_pad, plan_batches
from noisefit.answers.settings import DrawSettings
from noisefit.base.errors import InputError
from noisefit.inputs.prompts import prompt_ids
from noisefit.inputs.templates import set_chat_template

SAMPLING = DrawSettings(
    seed=1, greedy=False, max_new_tokens=12, temperature=0.9, top_p=0.95, top_k=50, repetition_penalty=1.2
)
PROMPTS = [
    "Who?",
    "Where, and when, was it?",
    "Why?",
    "Which of them was the first of all?",
    "How?",
    "Who?!",
    "What is it?",
]


def answerer(model_type="llama", sampling=SAMPLING, **overrides) -> Answerer:
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    overrides = dict(vocab_size=len(tokenizer), max_position_embeddings=256, n_positions=256) | overrides
    return Answerer(tiny_model(model_type, torch.float32, **overrides).eval(), tokenizer, sampling)


def jobs_for(answerer: Answerer, rounds=(1, 2, 3)) -> list[Job]:
    return [Job(i, prompt, prompt_ids(answerer.tokenizer, prompt), rounds) for i, prompt in enumerate(PROMPTS)]


def answers_of(answerer: Answerer, batch_size: int, rounds=(1, 2, 3)) -> dict[tuple[int, int], Answer]:
    found = [answer for batch in answer_all(answerer, jobs_for(answerer, rounds), batch_size) for answer in batch]
    assert len(found) == len(PROMPTS) * len(rounds)
    return {(index, number): answer for index, number, answer in found}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt2", "bloom", "opt"])
def test_any_batch_size_and_shared_prefill_or_not_give_the_same_answers(model_type):
    model = answerer(model_type)
    expected = answers_of(model, 1)
    assert len({answer.text for answer in expected.values()}) > len(PROMPTS)  # rounds differ
    for batch_size in (2, 7, 100):
        assert answers_of(model, batch_size) == expected
    assert model.shares_prefill
    model.shares_prefill = False
    assert answers_of(model, 7) == expected


def test_rounds_share_one_prefill():
    model, rows = answerer(), []
    model.model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape[:2])))
    [batch] = plan_batches(jobs_for(model), 100)
    longest = max(len(job.input_ids) for job in batch)
    model.answer(batch)
    assert rows[:2] == [(7, longest - 1), (21, 1)]


def test_a_cache_that_cannot_be_repeated_is_not_shared(monkeypatch):
    from transformers import DynamicCache

    expected = answers_of(answerer(), 7)
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, indices: None)
    broken = answerer()
    assert not broken.shares_prefill and answers_of(broken, 7) == expected


def test_another_seed_gives_other_answers_and_greedy_the_same_ones():
    assert answers_of(answerer(), 7) != answers_of(answerer(sampling=replace(SAMPLING, seed=2)), 7)
    greedy = [answers_of(answerer(sampling=replace(SAMPLING, seed=s, greedy=True)), 7, (1,)) for s in (1, 2)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_batched_greedy_answers_equal_those_of_plain_generate(model_type):
    """Against transformers alone: one prompt at a time, without padding and without anything of ours."""
    greedy = replace(SAMPLING, seed=0, greedy=True, repetition_penalty=1.3)
    model = answerer(model_type, greedy)
    found = answers_of(model, 100, (1,))
    for job in jobs_for(model, (1,)):
        ids = torch.tensor([job.input_ids])
        output = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, repetition_penalty=1.3,
            pad_token_id=0, eos_token_id=model.stop_ids,
        )  # fmt: skip
        tokens = output[0, ids.shape[1] :].tolist()
        assert len(tokens) <= 12 and found[job.index, 1].text == model._text(tokens)
    assert (
        max(len(model.tokenizer(answer.text)["input_ids"]) for answer in found.values()) >= 10
    )  # some reach the limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [dict(temperature=1.6), dict(top_k=6), dict(top_p=0.6), dict(repetition_penalty=3.0)], ids=str
)
def test_every_sampling_setting_reaches_the_model(flags):
    """The first token's frequencies over many rounds against the distribution that transformers' own sampling has."""
    plain = DrawSettings(seed=0, max_new_tokens=1, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    model = answerer(sampling=replace(plain, **flags))
    drawn = []
    model._text = lambda tokens: drawn.append(tokens[0]) or ""
    ids = prompt_ids(model.tokenizer, "Why, or why not?")
    list(answer_all(model, [Job(0, "Why, or why not?", ids, tuple(range(4000)))], 4000))
    settings = dict(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0) | flags
    scores = model.model.generate(
        torch.tensor([ids]), do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        pad_token_id=0, **settings,
    ).scores[0]  # fmt: skip
    p = scores.softmax(-1).squeeze().double()
    counts = torch.bincount(torch.tensor(drawn), minlength=len(p)).double()
    assert not counts[p == 0].any()
    likely = p > 5 / 4000
    error = (counts - 4000 * p)[likely] / (4000 * p * (1 - p))[likely].sqrt().clamp(min=1e-9)
    assert error.abs().max() < 4.5 and likely.sum() > 2


def test_the_models_own_end_token_ends_an_answer_too():
    model = answerer(sampling=SAMPLING, eos_token_id=77)
    assert 77 in model.stop_ids and model.tokenizer.eos_token_id in model.stop_ids
    letters = model.tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert model._text([*letters, 77, *letters]) == "yes"


@pytest.mark.parametrize("single", [False, True], ids=["many tokens", "one token"])
def test_an_answer_ends_at_the_end_of_the_turn(single):
    tokenizer = byte_tokenizer()
    if single:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_chat_template(tokenizer)
    model = tiny_model("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=512).eval()
    said = tokenizer(" Yes: it is.<|im_end|>and on and on", add_special_tokens=False)["input_ids"]
    answers = Answerer(model, tokenizer, DrawSettings(greedy=True, max_new_tokens=60))
    script(model, said)
    job = Job(0, "Is it?", prompt_ids(tokenizer, "Is it?"), (1,))
    made = []
    original = answers._own_tokens
    answers._own_tokens = lambda tokens: made.append(len(tokens)) or original(tokens)
    own = len(tokenizer(" Yes: it is.<|im_end|>", add_special_tokens=False)["input_ids"])
    assert answers.answer([job]) == [(0, 1, Answer("Yes: it is.", 0.0, own))]  # the end's tokens are the answer's own
    assert made[0] < len(said)  # it stopped there and did not only cut there


def script(model, tokens: list[int]) -> None:
    """Make the model say these tokens, whatever it is asked: its logits are replaced, position by position."""
    said = iter(tokens)

    def say(module, args, output):
        output.logits = torch.full_like(output.logits, -100.0)
        output.logits[..., next(said)] = 100.0
        return output

    model.register_forward_hook(say)


def test_batches_hold_similar_lengths_and_no_more_answers_than_asked():
    jobs = [Job(i, str(i), [1] * length, (1, 2, 3)) for i, length in enumerate([3, 9, 5, 7])]
    for size in (1, 2, 3, 4, 6, 100):
        batches = plan_batches(jobs, size)
        assert all(sum(len(job.rounds) for job in batch) <= size for batch in batches)
        tasks = [(job.index, r) for batch in batches for job in batch for r in job.rounds]
        assert sorted(tasks) == [(i, r) for i in range(4) for r in (1, 2, 3)]
        lengths = [len(job.input_ids) for batch in batches for job in batch]
        assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in plan_batches(jobs, 6)] == [2, 2]


def test_left_padding():
    ids, mask = left_pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


class LittleMemory(Answerer):
    """Runs out of memory with more than four answers at a time, as a device does."""

    sizes: list[int]

    def answer(self, batch):
        size = sum(len(job.rounds) for job in batch)
        self.sizes.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().answer(batch)


@pytest.mark.slow
def test_out_of_memory_halves_the_batch_and_changes_no_answer():
    model = answerer()
    expected = answers_of(model, 7)
    model.__class__, model.sizes = LittleMemory, []
    assert answers_of(model, 0) == expected
    assert max(model.sizes) == 21 and model.sizes[-1] <= 4
    with pytest.raises(InputError, match=r"out of memory with 7 answers of up to .* smaller --batch_size"):
        answers_of(model, 7)
