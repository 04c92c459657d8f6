"""Answers to a batch of prompts, several rounds each, through transformers' own `generate`."""

from __future__ import annotations

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

from noisefit.answers.ending import Ending, asked_for
from noisefit.answers.gumbel import CheckFinite, GumbelSampling, RepetitionPenalty, answer_key
from noisefit.answers.jobs import Answer, Answered, Job, left_pad, plan_batches
from noisefit.answers.noisy_passes import NoisyPasses
from noisefit.answers.probability import (
    LogPOfDrawn,
    accepted_inputs,
    answer_log_p,
    input_device,
    is_near_border,
    round_log_p,
)
from noisefit.answers.settings import DrawSettings
from noisefit.base.errors import InputError, LocalError, in_a_line, is_out_of_memory
from noisefit.inputs.prompts import prompt_ids

FIRST_BATCH_SIZE = 256  # answers at a time, where memory allows
TOLERANCE = 0.05  # of the largest logit; a cache repeated wrongly is off by about 1


class Answerer:
    """A model that answers batches of prompts.

    Args:
        model: a causal language model in eval mode.
        tokenizer: with the chat template of the prompts.
        sampling: how tokens are drawn; greedy takes the likeliest and ignores the rest but the repetition penalty.
        noisy: passes with noise over each answer, where they are asked for.
        static_cache: keys and values in transformers' cache of fixed size, with which it compiles the model on a GPU.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: DrawSettings,
        noisy: NoisyPasses | None = None, static_cache: bool = False,
    ):  # fmt: skip
        self.noisy = noisy
        self.model: Any = model  # GenerationMixin's methods are not known to the type checker
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.device = input_device(model)
        of_model = model.generation_config or GenerationConfig()
        self.not_applied = asked_for(of_model)
        ending = Ending(tokenizer, of_model)
        self.stop_ids, self.stop_strings = ending.stop_ids, ending.stop_strings
        self._own_tokens, self._text = ending.own_tokens, ending.text
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
            cache_implementation="static" if static_cache else None,
        )
        # A static cache has a row for each answer from the start, and none to be repeated.
        self.shares_prefill = not static_cache and self._can_share_prefill()

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
        accepted = accepted_inputs(self.model)
        if "position_ids" in accepted:
            inputs["position_ids"] = (mask[:, :-1].cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        self.model(**inputs)
        # A sharded model's cache is on all its devices, and an index that is on none of them goes with each.
        sharded = len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1
        cache.batch_select_indices(prompt_of_row.cpu() if sharded else prompt_of_row)
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
                reason = in_a_line(error)
                raise InputError(f"the model with its tokenizer cannot generate: {reason}") from None
        return bool((logits[0] - logits[1]).abs().max() <= TOLERANCE * logits[0].abs().max())


def answer_all(
    answerer: Any, jobs: Sequence[Job], batch_size: int, first: int | None = None
) -> Iterator[list[Answered]]:
    """Answer all jobs, a batch at a time.

    Args:
        answerer: an `Answerer`, or another that has its `answer`, `sampling` and `device`.
        jobs: what to answer.
        batch_size: answers at a time; 0 starts with `first`, doubles while a GPU is at most half full, and halves
            whenever memory runs out, which changes no answer.
        first: answers at a time, to begin with; `None` for `FIRST_BATCH_SIZE`.

    Yields:
        What `Answerer.answer` gives for each batch.

    Raises:
        LocalError: out of memory with the batch size asked for, or with one answer at a time.
    """
    size, may_grow = batch_size or first or FIRST_BATCH_SIZE, not batch_size
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
            size, may_grow = size // 2, False
            clear_device_cache(garbage_collection=True)
            batches = plan_batches([job for batch in batches for job in batch], size)
        else:
            batches.pop(0)
            yield answers
            if len(batches) > 1 and may_grow and is_half_free(answerer.device):
                size *= 2
                batches = plan_batches([job for batch in batches for job in batch], size)


def is_half_free(device: torch.device) -> bool:
    """Whether half of a GPU's memory is free after a batch, so that twice as many answers fit in it.

    What the batch had stays with torch's allocator, so it counts as used; and no later batch has longer prompts. On a
    CPU, whose memory is everybody's, the answer is no.
    """
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free >= total / 2
