"""Answers of a model while it trains: to evaluation prompts, greedy, scored as `noisefit.score` scores them.

The model answers as it is in evaluations: without noise and dropout, in the mixed precision of the run. It is left as
it was, and so is every random generator: a run that samples is the run that does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import GenerationConfig

from noisefit.answers.ending import Ending
from noisefit.answers.generation import Answerer, answer_all
from noisefit.answers.jobs import Answer, Job
from noisefit.answers.outcomes import OUTCOMES, outcome
from noisefit.answers.scoring import Prompt, score_prompt
from noisefit.answers.settings import DrawSettings
from noisefit.base.errors import InputError, notice
from noisefit.base.meeting import apart
from noisefit.fork.decoder import find_causal_lm, find_decoder_layers
from noisefit.inputs.conversations import Message
from noisefit.inputs.prompts import Example
from noisefit.inputs.templates import answer_text, prompt_text
from noisefit.run.evaluation import prompt_of
from noisefit.run.preparation import Prepared

MARK = "\N{SECTION SIGN}question\N{SECTION SIGN}"  # in place of a question, to find what a template puts around it
ANSWERED = "\N{SECTION SIGN}answer\N{SECTION SIGN}"  # likewise


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer; the fields but the last are those of `samples.jsonl`."""

    prompt: str
    response: str  # the reference
    generated_response: str
    logprob: float | None  # in nats; `None` where it is not finite
    tokens: int
    outcome: str
    hallucinated: float  # the prompt's hallucination rate: 0 or 1

    def line(self) -> dict[str, Any]:
        """What `samples.jsonl` says of it, besides the step."""
        return {name: value for name, value in asdict(self).items() if name != "hallucinated"}


def make_sampler(prepared: Prepared, model: nn.Module) -> TrainingSampler | None:
    """The sampler of a run; `None` where it needs no answers. All processes call it."""
    settings = prepared.settings
    return TrainingSampler(prepared, model) if settings.sample_steps or settings.scores_answers else None


class TrainingSampler:
    """Answers evaluation prompts with the model that trains.

    Args:
        prepared: what the run begins with.
        model: the prepared `BranchedModel`, not sharded.

    Raises:
        InputError: the model with its tokenizer cannot generate.
    """

    def __init__(self, prepared: Prepared, model: nn.Module):
        settings, self.tokenizer = prepared.settings, prepared.tokenizer
        self.accelerator = prepared.accelerator
        # The model below the adapter, whose layers have the adapter in them: nothing is set on the wrapping.
        self.model = find_causal_lm(model)
        # What it puts before an answer of its own, Qwen3's empty <think> say, is not the row's.
        self.before_answer = answer_text(self.tokenizer, MARK, ANSWERED).partition(ANSWERED)[0].lstrip()
        self.ending = Ending(self.tokenizer, self.model.generation_config or GenerationConfig())
        # As many answers at a time as a step's pass has rows, for which there is memory.
        self.at_once = settings.batch_size * len(settings.objective.branches)
        draw = DrawSettings(rounds=1, max_new_tokens=settings.sample_tokens, greedy=True)
        with self._answering(), apart("trying out answers"):
            self.answerer = Answerer(self.model, self.tokenizer, draw)

    def answer(self, examples: Sequence[Example], step: int) -> list[Sample]:
        """Answer the prompts of these rows, shared out over the processes. All processes call it.

        Answers that cannot be given (logits that are not finite, memory that runs out) are a line, and no reason to end
        a training.

        Args:
            examples: rows with a prompt and its answer.
            step: optimizer steps taken, for that line.

        Returns:
            A sample for each row, in order, the same on all processes; none where an answer could not be given.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Neighbours in length go to different processes.
        order = sorted(range(len(examples)), key=lambda i: len(prompt_of(examples[i])))
        jobs = [Job(i, "", prompt_of(examples[i]), rounds=(1,)) for i in order[rank::ranks]]
        problem, found = None, dict[int, Answer]()
        with apart("answering evaluation prompts"), self._answering():
            try:
                for batch in answer_all(self.answerer, jobs, 0, self.at_once):
                    found |= {index: answer for index, _, answer in batch}
            except InputError as error:
                problem = str(error)
        parts = gather_object([(found, problem)])
        if problems := [of_process for _, of_process in parts if of_process]:
            notice(f"step {step}: no prompt is answered: {problems[0]}")
            return []
        answers = {index: answer for part, _ in parts for index, answer in part.items()}
        return [self._scored(examples[i], answers[i]) for i in range(len(examples))]

    @staticmethod
    def figures(samples: Sequence[Sample]) -> dict[str, float]:
        """The rates of these answers by the names of `noisefit.score`, and how many they are; NaN of none."""
        shares = {f"{kind}_rate": [float(sample.outcome == kind) for sample in samples] for kind in OUTCOMES}
        shares["hallucination_rate"] = [sample.hallucinated for sample in samples]
        means = {name: statistics.fmean(values) if values else math.nan for name, values in shares.items()}
        return means | {"answered": len(samples)}

    def _scored(self, example: Example, answer: Answer) -> Sample:
        (shown, question), reference = self._asked(example), self._reference(example)
        prompt = Prompt(shown, reference, (answer.text,), question=question)
        logprob = answer.logprob if math.isfinite(answer.logprob) else None
        rate = score_prompt(prompt)["hallucination_rate"]
        return Sample(shown, reference, answer.text, logprob, answer.tokens, outcome(prompt, answer.text), rate)

    def _reference(self, example: Example) -> str:
        """The row's answer."""
        after = example.input_ids[len(prompt_of(example)) :]
        return self.ending.text(self.ending.own_tokens(after)).removeprefix(self.before_answer).strip()

    def _asked(self, example: Example) -> tuple[str, str]:
        """The text of a prompt without what the chat template puts around a single question, and its last question.

        The rows' own texts are not kept, so both are read from the tokens. A conversation has the template's marks
        between its turns.
        """
        text = str(self.tokenizer.decode(prompt_of(example), clean_up_tokenization_spaces=False))
        before, _, after = prompt_text(self.tokenizer, MARK).partition(MARK)
        text = text.removesuffix(after)
        shown = question = text.removeprefix(before)
        for mark in (before, self._between_turns()):
            question = question.rpartition(mark)[2] if mark else question
        return shown.strip(), question.strip()

    def _between_turns(self) -> str:
        """What the chat template puts between an answer and the next question; empty where it shows no such turns."""
        turns = (Message("user", MARK), Message("assistant", ANSWERED))
        with suppress(InputError):
            return prompt_text(self.tokenizer, MARK, turns).rpartition(ANSWERED)[2].partition(MARK)[0]
        return ""

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """The model as answers need it, and afterwards as it was."""
        config, modules = self.model.config.get_text_config(decoder=True), list(self.model.modules())
        generation_config, settings = self.model.generation_config, dict(vars(config))
        training = [module.training for module in modules]
        self.model.eval()
        try:
            self.model.generation_config, config.use_cache = GenerationConfig(), True
            with self.accelerator.autocast(), _as_written(self.model):
                yield
        finally:
            self.model.generation_config = generation_config
            if "use_cache" in settings:
                config.use_cache = settings["use_cache"]
            else:
                del config.use_cache
            for module, was_training in zip(modules, training, strict=True):
                module.training = was_training


def _as_written(model: nn.Module) -> Any:
    """Blocks that are compiled run as they are written: answers have a cache, whose every shape they would be compiled
    for again."""
    compiled = any(hasattr(layer.forward, "_torchdynamo_orig_callable") for layer in find_decoder_layers(model))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
