"""Everything about a run that can be checked without the model's weights, and what the checks prepare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from noisefit.base.compiling import chunk_size_on, forget_failures
from noisefit.base.errors import notice
from noisefit.inputs.batches import steps_per_epoch
from noisefit.inputs.examples import Examples, last_texts
from noisefit.inputs.lora import check_sharded
from noisefit.inputs.model_checks import check_checkpointing
from noisefit.inputs.models import check_model, commit_of, length_limit, load_config, load_tokenizer
from noisefit.inputs.prompts import Example, stop_token_ids
from noisefit.inputs.templates import asks_for_date, check_chat_template, set_chat_template
from noisefit.run.checkpoint_files import asked_for, find_checkpoint, identify_run, read_state
from noisefit.run.compiling import check_compiling
from noisefit.run.contradictions import without_effect
from noisefit.run.evaluation import check_answering
from noisefit.run.hub import check_repository, make_repository
from noisefit.run.noise_policy import check_policy
from noisefit.run.optimizers import try_optimizer
from noisefit.run.output import check_checkpoint_names, check_output, check_tokenizer_names
from noisefit.run.output_folder import OutputFolder
from noisefit.run.processes import check_processes, start_accelerator
from noisefit.run.rows import make_data, read_data, with_commits
from noisefit.run.settings import Settings
from noisefit.run.trackers import check_trackers


@dataclass(frozen=True)
class Prepared:
    """What a run begins with.

    Attributes:
        settings: as they are after the checks: `max_length` within the model's positions, the date of the prompts, the
            chunk size of the losses on this device.
        config: the base model's.
        tokenizer: with its chat template.
        examples, eval_examples: the tokenized rows.
        scores: the content of `knowledge.csv`, by which the rows were chosen; `None` under --unknown_rows keep.
        rows_record: the content of `rows.json`, which rows there are and which were left out.
        num_layers: decoder layers of the model.
        accelerator: of the launch.
        rows_per_step: texts of an optimizer step (a row is one, but for some conversations), over all micro-batches and
            processes.
        total_steps: of the run.
        run: what makes it the run that it is, see `identify_run`.
        checkpoint: that it goes on from; `None` where it starts afresh.
    """

    settings: Settings
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    eval_examples: Examples
    scores: str | None
    rows_record: dict[str, Any]
    num_layers: int
    accelerator: Accelerator
    rows_per_step: int
    total_steps: int
    run: dict[str, Any]
    checkpoint: Path | None

    @property
    def size(self) -> str:
        """Rows and steps, for a line: a step has texts, of which some conversations are several."""
        count = len(self.examples)
        rows = self.examples.num_rows if isinstance(self.examples, Examples) else count
        data, unit = (f"{rows} rows", "rows") if count == rows else (f"{rows} rows in {count} texts", "texts")
        return f"{data}; {self.total_steps} steps of {self.rows_per_step} {unit}"


def prepare(settings: Settings, output: OutputFolder) -> Prepared:
    """Check what can be checked before the model is loaded, cheapest first, and before anything is written.

    Under `--unknown_rows` other than `keep` the base model is loaded and probed here, as it decides on the rows.

    Raises:
        InputError: something is not as it should be; the line says what, and what to do.
    """
    model, trusted = settings.model, settings.trust_remote_code
    forget_failures()
    notice(without_effect(settings))
    check_output(settings, output)
    check_trackers(settings.report_to)
    check_chat_template(settings.chat_template)
    data = read_data(settings)
    settings = _at_its_commit(with_commits(settings, data))
    where = model, trusted, settings.model_revision
    config, tokenizer = load_config(*where), load_tokenizer(*where)
    num_layers, vocabulary = check_model(settings, model, config, trusted)
    check_policy(settings, num_layers)
    settings = _within_positions(settings, config)

    accelerator = start_accelerator(project_dir=settings.output_model)
    check_processes(accelerator, settings.quantization)
    check_compiling(accelerator, settings.gradient_checkpointing)
    check_checkpointing(settings.gradient_checkpointing, accelerator.device)
    try_optimizer(settings, accelerator.device, sharded=accelerator.is_fsdp2)
    if accelerator.is_fsdp2:
        check_sharded(settings, config)
    check_repository(settings, base=None if settings.full_finetune else model)

    chunk_size = settings.loss_chunk_size or chunk_size_on(accelerator.device.type)
    settings = replace(settings, prompt_date=_prompt_date(settings, tokenizer), loss_chunk_size=chunk_size)
    set_chat_template(tokenizer, settings.chat_template, settings.prompt_date)
    check_tokenizer_names(tokenizer, output)
    stops = stop_token_ids(model, settings.model_revision)
    made = make_data(settings, data, tokenizer, vocabulary, stops, accelerator)
    examples, eval_examples, scores, rows_record = made
    check_answering(settings, config, accelerator, last_texts(eval_examples))

    rows_per_step = settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    total_steps = settings.epochs * steps_per_epoch(len(examples), rows_per_step)
    if settings.max_steps != -1:
        total_steps = min(total_steps, settings.max_steps)
    run = identify_run(settings, examples, eval_examples, rows_per_step, accelerator)
    wanted, overwrite = settings.resume_from_checkpoint, settings.overwrite_output
    checkpoint = find_checkpoint(wanted, output.path, run, total_steps, starts_afresh=overwrite)
    check_checkpoint_names(settings, output, total_steps)
    make_repository(settings)
    return Prepared(settings, config, tokenizer, examples, eval_examples, scores, rows_record, num_layers,
                    accelerator, rows_per_step, total_steps, run, checkpoint)  # fmt: skip


def _at_its_commit(settings: Settings) -> Settings:
    """`--model_revision` as the commit that it stands for: a branch may move before the weights are read, and the run's
    record repeats the run. A folder has none."""
    given = settings.model_revision
    commit = commit_of(settings.model, given)
    if commit is None or commit == given:
        return settings
    notice(f"--model {settings.model} is read at commit {commit}" + (f" (--model_revision {given})" if given else ""))
    return replace(settings, model_revision=commit)


def _within_positions(settings: Settings, config: PreTrainedConfig) -> Settings:
    """`--max_length` lowered to the model's positions, with a line: a row past them could not be computed."""
    limit, wanted = length_limit(config), settings.max_length
    if limit is None or wanted <= limit:
        return settings
    notice(f"rows have up to {limit} tokens, as {settings.model} has no more positions (--max_length {wanted})")
    return replace(settings, max_length=limit)


def _prompt_date(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Date and time for a chat template that asks: of the run that is resumed, as given, or now; else `None`.

    All processes call it, and get the same.
    """
    if not asks_for_date(tokenizer, settings.chat_template):
        return None
    date, checkpoint = settings.prompt_date, asked_for(settings)
    if settings.resume_from_checkpoint is not None:
        try:
            recorded = read_state(checkpoint)["run"]["prompt_date"] if checkpoint is not None else None
            date = recorded if recorded is None else datetime.fromisoformat(recorded).isoformat(timespec="seconds")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # what is wrong with the checkpoint is told by `find_checkpoint`
    [found] = broadcast_object_list([date or datetime.now().isoformat(timespec="seconds")])
    return str(found)
