"""What is looked at while a run trains: held-out rows, answers to their prompts, and whether it still gets better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from noisefit.base.errors import InputError, notice
from noisefit.base.files import sync_folder, writing
from noisefit.base.meeting import apart
from noisefit.fork.branches import CLEAN, Logits, Losses
from noisefit.fork.tally import TokenTally
from noisefit.inputs.batches import collate, count_targets, cut_step, steps_per_epoch
from noisefit.inputs.examples import last_texts
from noisefit.inputs.models import length_limit
from noisefit.inputs.prompts import Example
from noisefit.method.losses import cross_entropy
from noisefit.run.metrics import Metrics
from noisefit.run.output_folder import OutputFolder
from noisefit.run.run_settings import METRICS
from noisefit.run.settings import Settings
from noisefit.run.standing import BEST, Best, Standing
from noisefit.run.weights import gather_weights, write_model

if TYPE_CHECKING:
    from noisefit.run.preparation import Prepared


class Sampler(Protocol):
    """What answers prompts with the model that trains: `noisefit.samples.TrainingSampler`."""

    def answer(self, examples: Sequence[Example], step: int) -> list[Any]:
        """An answer with its `line` for `samples.jsonl` to each prompt; none where it failed. All processes call it."""

    def figures(self, samples: Sequence[Any]) -> dict[str, float]:
        """The rates of these answers by the names of `noisefit.score`; NaN of none."""


class Watch:
    """Looks at the model after each step: evaluates it, answers prompts, keeps the best one, and says when it is over.

    Args:
        prepared: what the run begins with.
        output: the run's folder.
        model: the prepared `BranchedModel`.
        metrics: of the run, which writes what is found.
        sampler: where `--sample_steps` or `--eval_metric` ask for answers.

    Attributes:
        standing: how the run stands by its evaluations; a checkpoint has it.
    """

    def __init__(
        self, prepared: Prepared, output: OutputFolder, model: nn.Module, metrics: Metrics, sampler: Sampler | None
    ):
        self.prepared, self.output, self.model, self.metrics = prepared, output, model, metrics
        self.sampler, self.settings = sampler, prepared.settings
        self.epoch_length = steps_per_epoch(len(prepared.examples), prepared.rows_per_step)
        self.standing = Standing()
        self.asked = last_texts(prepared.eval_examples)  # each row once, as its last answer is asked for

    @property
    def kept(self) -> Best | None:
        """The evaluation whose model the run's output will be; `None` for the last one."""
        return self.standing.best if self.settings.keep_best else None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return {"standing": self.standing.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo of `state_dict`, given a checkpoint's variables. A line about an end that was reached is said again."""
        self.standing = Standing.of(state["standing"])
        self._tell_end(state["step"])

    def is_over(self, step: int) -> bool:
        """Whether no step is taken after this one: it is the last, or `--patience` has run out."""
        return step == self.prepared.total_steps or 0 < self.settings.patience <= self.standing.stale

    def look(self, step: int, strategy: str, seen_targets: int) -> bool:
        """Do what is due after a step. All processes call it.

        Args:
            step: optimizer steps taken.
            strategy: of the run, as `choose_strategy` gave it.
            seen_targets: supervised tokens that the run has trained on.

        Returns:
            Whether the training is over, see `is_over`.
        """
        settings, answered = self.settings, None
        due = step % settings.eval_steps == 0 if settings.eval_steps else step % self.epoch_length == 0
        with self.metrics.pausing():
            if self.prepared.eval_examples and (due or step == self.prepared.total_steps):
                answered = self._evaluate(step, strategy, seen_targets)
            over = self.is_over(step)
            if settings.sample_steps and (step % settings.sample_steps == 0 or over):
                self._sample(step, answered)
        return over

    def _evaluate(self, step: int, strategy: str, seen_targets: int) -> list[Any] | None:
        """Returns the answers to all prompts, where there are any."""
        settings, prepared, answered = self.settings, self.prepared, None
        accelerator, examples = prepared.accelerator, prepared.eval_examples
        held_out = examples, settings.batch_size, prepared.tokenizer.pad_token_id
        figures = evaluate(accelerator, self.model, strategy, *held_out)
        if settings.scores_answers and self.sampler:
            answered = self.sampler.answer(self.asked, step)
            figures |= self.sampler.figures(answered)
        self.metrics.log_evaluation(step, step / self.epoch_length, figures)
        before = self.standing
        self.standing = before.after(step, figures[METRICS[settings.eval_metric]], seen_targets)
        if settings.keep_best and self.standing.best != before.best:
            keep_as_best(accelerator, self.model, prepared.tokenizer, settings, self.output)
        self._tell_end(step)
        return answered

    def _sample(self, step: int, answered: list[Any] | None) -> None:
        assert self.sampler is not None
        number = self.settings.sample_prompts
        if answered is None:
            answered = self.sampler.answer(self.asked[:number], step)
        samples = answered[:number]
        lines = [sample.line() for sample in samples]
        self.metrics.log_samples(step, step / self.epoch_length, lines, self.sampler.figures(samples))

    def _tell_end(self, step: int) -> None:
        if not 0 < self.settings.patience <= self.standing.stale:
            return
        best, metric = self.standing.best, METRICS[self.settings.eval_metric]
        than = f"lower {metric} than {best.value:.6g}, of step {best.step}" if best else f"{metric} that is a number"
        notice(f"after step {step} the training ends: {self.standing.stale} evaluations in a row had no {than} "
               f"(--patience {self.settings.patience})")  # fmt: skip


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    strategy: str,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
) -> dict[str, float]:
    """Means over all supervised tokens of `examples`, each row counted once on any number of processes.

    Args:
        accelerator: of the run. All processes call this.
        model: the prepared `BranchedModel`; evaluated in eval mode and left in its former one.
        strategy: the run's, as `choose_strategy` gave it.
        examples: the held-out rows.
        batch_size: rows a batch, on each device.
        pad_token_id: for `collate`.

    Returns:
        `eval_ce_loss` and `eval_entropy` in nats a token, `eval_token_accuracy`, and the number of these tokens as
        `eval_target_tokens`.
    """

    def clean_cross_entropy(logits: Logits, target_tokens: Tensor) -> Losses:
        [clean] = logits[CLEAN]
        return {"ce": cross_entropy(clean, target_tokens)}

    total = torch.zeros(1, device=accelerator.device)
    tally = TokenTally(accelerator.device)
    was_training = model.training
    model.eval()
    for rows in cut_step(examples, batch_size, accelerator.num_processes, accelerator.process_index):
        batch = collate(rows, pad_token_id, accelerator.device)
        how = {"branches": (CLEAN,), "strategy": strategy, "tally": tally}
        losses = model(**batch, **how, chunk_losses=clean_cross_entropy)
        total += losses["ce"]
    model.train(was_training)
    tokens = count_targets(examples)
    ce, hits, entropy = (value / tokens for value in accelerator.reduce(torch.cat([total, tally.sums]), "sum").tolist())
    return {"eval_ce_loss": ce, "eval_token_accuracy": hits, "eval_entropy": entropy, "eval_target_tokens": tokens}


def keep_as_best(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Settings,
    output: OutputFolder,
) -> None:  # fmt: skip
    """Write the model as it is now to the folder `best`, in place of the one before. All processes call it."""
    weights = gather_weights(accelerator, model, adapter_only=not settings.full_finetune)
    with apart("keeping the best model") as is_main:
        if is_main:
            with writing(output.path / BEST), output.staging(BEST) as staged:
                write_model(staged, accelerator.unwrap_model(model).model, weights, tokenizer)
                sync_folder(staged)
                output.place_folder(staged, BEST)


def check_answering(
    settings: Settings, config: PreTrainedConfig, accelerator: Accelerator, examples: Sequence[Example]
) -> None:
    """Refuse answers while training that could not be given. To be called before the model is loaded.

    Raises:
        InputError: the model is sharded, or has no positions for a prompt with its answer.
    """
    if not (settings.sample_steps or settings.scores_answers):
        return
    flag = f"--eval_metric {settings.eval_metric}" if settings.scores_answers else "--sample_steps"
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError(f"{flag} answers prompts with the model that trains, which FSDP shards: its processes would "
                         "have to take equally many passes; leave it out")  # fmt: skip
    limit = length_limit(config)
    asked = examples if settings.scores_answers else examples[: settings.sample_prompts]
    longest = max((len(prompt_of(example)) for example in asked), default=0)
    if limit is not None and longest + settings.sample_tokens > limit:
        raise InputError(
            f"{flag}: an evaluation prompt has {longest} tokens, which with --sample_tokens "
            f"{settings.sample_tokens} exceeds the model's {limit} positions; lower --sample_tokens or --max_length"
        )


def prompt_of(example: Example) -> list[int]:
    """The tokens before the last answer of a row. The answer is what follows them."""
    return example.input_ids[: example.spans[-1][0]]
