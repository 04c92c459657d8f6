"""Answers to a batch of prompts, several rounds each, through transformers' own `generate`."""

from __future__ import annotations

import bisect
import inspect
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from noisefit.answers.gumbel import CheckFinite, GumbelSampling, RepetitionPenalty, answer_key
from noisefit.answers.jobs import Answer, Answered, Job, left_pad, plan_batches
from noisefit.answers.noisy_passes import NoisyPasses
from noisefit.answers.probability import LogPOfDrawn, answer_log_p, is_near_border, round_log_p
from noisefit.answers.settings import DrawSettings
from noisefit.base.errors import InputError, LocalError, is_out_of_memory
from noisefit.inputs.prompts import end_token_ids, prompt_ids, token_ids
from noisefit.inputs.templates import end_of_turn

FIRST_BATCH_SIZE = 256  # answers at a time, where memory allows
TOLERANCE = 0.05  # of the largest logit; a cache repeated wrongly is off by about 1


class Answerer:
    """A model that answers batches of prompts.

    Args:
        model: a causal language model in eval mode.
        tokenizer: with the chat template of the prompts.
        sampling: how tokens are drawn; greedy takes the likeliest and ignores the rest but the repetition penalty.
        noisy: passes with noise over each answer, where they are asked for.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: DrawSettings,
        noisy: NoisyPasses | None = None,
    ):  # fmt: skip
        self.noisy = noisy
        self.model: Any = model  # GenerationMixin's methods are not known to the type checker
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.device = next(model.parameters()).device
        self.end_text = end_of_turn(tokenizer)
        of_model = model.generation_config or GenerationConfig()
        self.stop_ids = stop_ids(of_model, tokenizer, self.end_text)
        self.not_applied = asked_for(of_model)
        # Text that is several tokens cannot be told by an id.
        one_token = tokenizer.convert_tokens_to_ids(self.end_text) in self.stop_ids if self.end_text else True
        self.stop_strings = None if one_token else [self.end_text]
        # What the model's own settings say would come on top of ours, in `generate` and in the caches.
        self.model.generation_config = GenerationConfig()
        self.model.config.get_text_config(decoder=True).use_cache = True
        self.config = GenerationConfig(
            use_cache=True,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=self.stop_ids or None,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            stop_strings=self.stop_strings,
        )
        self.shares_prefill = self._can_share_prefill()

    @torch.no_grad()
    def answer(self, batch: Sequence[Job]) -> list[Answered]:
        """Answer every round of every job; an answer is the new tokens alone."""
        ids, mask = left_pad([job.input_ids for job in batch], self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        prompt_of_row = torch.tensor([i for i, job in enumerate(batch) for _ in job.rounds], device=self.device)
        tasks = [(job, round_number) for job in batch for round_number in job.rounds]
        keys = [answer_key(self.sampling.seed, job.prompt, r, job.occurrence) for job, r in tasks]
        share = self.shares_prefill and len(tasks) > len(batch)
        cache = self._prefill(ids, mask, prompt_of_row) if share else None
        ids, mask = ids[prompt_of_row], mask[prompt_of_row]
        drawn = LogPOfDrawn()
        processors = self._processors(torch.tensor(keys, device=self.device), mask)
        processors = LogitsProcessorList([drawn.first, *processors, drawn.last])
        rows = self._generate(ids, mask, cache, self.config, logits_processor=processors)[:, ids.shape[1] :].tolist()
        log_p, errors = (torch.stack(steps, dim=1).tolist() for steps in zip(*drawn.of_tokens, strict=True))
        del cache, drawn, processors  # the passes of `_answer` need memory too
        found = zip(tasks, rows, log_p, errors, keys, strict=True)
        return [(job.index, number, self._answer(job, *of_row)) for (job, number), *of_row in found]

    def _answer(self, job: Job, tokens: list[int], log_p: list[float], errors: list[float], key: int) -> Answer:
        tokens = self._own_tokens(tokens)
        value = sum(log_p[: len(tokens)])
        # In 16 bits the errors are larger than any grid of use, and the answers differ as well.
        if self.model.dtype == torch.float32 and is_near_border(value, sum(errors[: len(tokens)])):
            value = answer_log_p(self.model, job.input_ids, tokens)
        answer = Answer(self._text(tokens), round_log_p(value), len(tokens))
        if self.noisy is None:
            return answer
        noisy = self.noisy.log_p(job.input_ids, tokens, key)
        spread = statistics.pstdev(noisy) if all(map(math.isfinite, noisy)) else math.nan
        return answer._replace(
            noise_logprob_mean=round_log_p(sum(noisy) / len(noisy)), noise_logprob_spread=round_log_p(spread)
        )

    def _processors(self, keys: Tensor, mask: Tensor) -> LogitsProcessorList:
        """In the order in which transformers applies them."""
        s = self.sampling
        processors = LogitsProcessorList([CheckFinite()])
        if s.repetition_penalty != 1.0:
            processors.append(RepetitionPenalty(s.repetition_penalty, mask))
        if s.greedy:
            return processors
        if s.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(s.temperature))
        if s.top_k:
            processors.append(TopKLogitsWarper(s.top_k))
        top_p = TopPLogitsWarper(s.top_p) if s.top_p < 1.0 else None
        processors.append(GumbelSampling(keys, mask.shape[1], top_p))
        return processors

    def _generate(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, config: GenerationConfig, **options: Any
    ) -> Any:
        return self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            tokenizer=self.tokenizer if self.stop_strings else None,
            **options,
        )

    def _prefill(self, ids: Tensor, mask: Tensor, prompt_of_row: Tensor) -> DynamicCache:
        """Keys and values of every prompt but for its last token, computed once and repeated for its rounds."""
        cache = DynamicCache(config=self.model.config)
        inputs = dict(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
        accepted = inspect.signature(self.model.forward).parameters
        if "position_ids" in accepted:
            inputs["position_ids"] = (mask[:, :-1].cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        self.model(**inputs)
        cache.batch_select_indices(prompt_of_row)
        return cache

    @torch.no_grad()
    def _can_share_prefill(self) -> bool:
        """Whether this model's cache can be repeated: two prompts, shared and not, must give the same logits."""
        prompts = ["Why?", "Why, and since when?"]
        ids, mask = left_pad([prompt_ids(self.tokenizer, p) for p in prompts], self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        rows = torch.tensor([0, 1, 1, 1], device=self.device)
        logits = []
        one_token = GenerationConfig(
            **self.config.to_diff_dict() | dict(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        )
        for shares in (False, True):
            try:
                cache = self._prefill(ids, mask, rows) if shares else None
                logits.append(self._generate(ids[rows], mask[rows], cache, one_token).logits[0].float())
            except Exception as error:  # of an architecture's own code, or of settings in somebody's files
                if is_out_of_memory(error):
                    raise
                if shares:  # its own kind of cache; the plain way works
                    return False
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise InputError(f"the model with its tokenizer cannot generate: {reason}") from None
        return bool((logits[0] - logits[1]).abs().max() <= TOLERANCE * logits[0].abs().max())

    def _own_tokens(self, tokens: list[int]) -> list[int]:
        """A row without what stands behind the answer's end: up to the token that ended it, that one included."""
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        tokens = tokens if end is None else tokens[: end + 1]
        if not self.end_text or self.end_text not in self._decoded(tokens):
            return tokens
        # The end of the turn as several tokens: the first ones whose text holds it.
        at = bisect.bisect_left(range(len(tokens)), True, key=lambda i: self.end_text in self._decoded(tokens[: i + 1]))
        return tokens[: at + 1]

    def _decoded(self, tokens: list[int]) -> str:
        ends = [i for i, token in enumerate(tokens) if token in self.stop_ids]
        return str(self.tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True))

    def _text(self, tokens: list[int]) -> str:
        text = self._decoded(tokens)
        return (text.partition(self.end_text)[0] if self.end_text else text).strip()


def asked_for(config: GenerationConfig) -> dict[str, Any]:
    """What a model's own generation settings ask for beyond defaults and tokens: it is not applied, and to be said."""
    defaults = dict(vars(GenerationConfig())) | {"use_cache": True}
    known = {"transformers_version", "eos_token_id", "bos_token_id", "pad_token_id"}
    given = {name: value for name, value in config.to_diff_dict().items() if name not in known}
    return {
        name: value
        for name, value in given.items()
        if value != defaults.get(name) and not name.startswith(("_", "output_", "return_dict"))
    }


def stop_ids(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, end_text: str) -> list[int]:
    """Tokens that end an answer: the model's own, the tokenizer's end of text, the end of turn if it is one token."""
    found = {tokenizer.eos_token_id, *end_token_ids(generation_config)}
    if end_text and len(token_ids(tokenizer, end_text)) == 1:
        found.add(tokenizer.convert_tokens_to_ids(end_text))
    return sorted(token for token in found if token is not None)


def answer_all(answerer: Answerer, jobs: Sequence[Job], batch_size: int) -> Iterator[list[Answered]]:
    """Answer all jobs, a batch at a time.

    Args:
        answerer: the model.
        jobs: what to answer.
        batch_size: answers at a time; 0 starts with many and halves whenever memory runs out, which changes no answer.

    Yields:
        What `Answerer.answer` gives for each batch.

    Raises:
        LocalError: out of memory with the batch size asked for, or with one answer at a time.
    """
    size = batch_size or FIRST_BATCH_SIZE
    batches = plan_batches(jobs, size)
    while batches:
        try:
            answers = answerer.answer(batches[0])
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size or size == 1:
                length = max(len(job.input_ids) for job in batches[0]) + answerer.sampling.max_new_tokens
                raise LocalError(
                    f"out of memory with {size} answers of up to {length} tokens at a time; "
                    f"give a smaller {'--batch_size' if batch_size else '--max_new_tokens'}"
                ) from None
            answers = None
        if answers is None:  # outside the except block, whose traceback keeps the tensors of the failed batch alive
            size //= 2
            clear_device_cache(garbage_collection=True)
            batches = plan_batches([job for batch in batches for job in batch], size)
        else:
            batches.pop(0)
            yield answers
