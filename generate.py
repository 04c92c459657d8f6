"""Answer the prompts of a file several times each, over all processes of the launch.

    accelerate launch generate.py --model_path ADAPTER --input_csv questions.csv

Every answer is a function of the seed, its prompt and its round, so the CSV is the same for any number of processes and
any batch size (in float32, on one kind of device). Finished answers go to disk as they come: after a kill, the same
command goes on where it stopped. The settings are recorded beside them: given as --config, they repeat the answers.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from noisefit.answers.disks import agreed, gathered
from noisefit.answers.generation import Answerer, answer_all
from noisefit.answers.jobs import Abstention, Job
from noisefit.answers.journal import Answers, Journal, alone_with
from noisefit.answers.loading import (
    base_config,
    check_device_map,
    check_vocabulary,
    context_length,
    digest,
    find_base,
    load_answer_model,
    load_answer_tokenizer,
    model_fingerprint,
    why_answers_differ,
)
from noisefit.answers.noisy_passes import NoisyPasses
from noisefit.answers.output import (
    SUFFIXES,
    check_answers_output,
    check_settings_output,
    default_output,
    settings_record,
    write_answers,
)
from noisefit.answers.reading import with_columns
from noisefit.answers.refusals import is_refusal
from noisefit.answers.settings import AnswerSettings, DrawSettings, parse_arguments
from noisefit.answers.vllm_engine import AT_ONCE, VllmAnswerer, check_vllm
from noisefit.base.errors import InputError, notice, one_line_errors
from noisefit.base.meeting import apart
from noisefit.base.settings import names_of
from noisefit.inputs.columns import parse_columns
from noisefit.inputs.noise_records import read_noise
from noisefit.inputs.prompts import naming_row, prompt_ids
from noisefit.inputs.tables import BEFORE_ABSTAINING, SomeRows, describe_skipped, read_prompts
from noisefit.inputs.templates import asks_for_date, check_chat_template, set_chat_template
from noisefit.run.processes import check_processes, finish, progress_bar, start_accelerator


def generate(settings: AnswerSettings) -> None:
    # A process that is done waits for the others, however long that takes.
    accelerator = start_accelerator(patience=timedelta(days=7))
    check_processes(accelerator)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        notice("--dynamo_backend compiles a training; answers are computed without it")
    check_device_map(settings)
    check_vllm(settings, accelerator)
    output = Path(os.path.realpath(settings.output_csv or default_output(settings)))  # a link stays one
    with apart("checking the output"):
        check_output(settings, output, accelerator)
    with alone_with(output) as first_on_disk:
        answer_file(settings, output, accelerator, Journal(output, accelerator.process_index, first_on_disk))


def check_output(settings: AnswerSettings, output: Path, accelerator: Accelerator) -> None:
    # The main process writes it. What stands under that name on the disk of another is nobody's business.
    if accelerator.is_main_process:
        check_answers_output(output, Path(settings.input_csv), settings.overwrite_output, "--output_csv", *SUFFIXES)
        check_settings_output(output, settings.overwrite_output)


def answer_file(settings: AnswerSettings, output: Path, accelerator: Accelerator, journal: Journal) -> None:
    # --- Everything that can be checked before the model is loaded ---------------------------------------------------
    with apart("reading the prompts"):
        check_output(settings, output, accelerator)  # again: now nobody else writes it
        check_chat_template(settings.chat_template)
        base = find_base(settings)
        noise = None
        if settings.noise_passes:
            noise = read_noise(Path(str(settings.model_path)), base_config(settings, base).num_hidden_layers)
        # In the plain format a prompt is what stands in the file, white space and all: a benchmark's may end in lines.
        source = with_columns(settings.input_csv, settings.columns)
        records, prompts, skipped = read_prompts(source, strip=settings.chat_template != "plain")
        if skipped:
            notice(describe_skipped(settings.input_csv, skipped, "with an empty or missing prompt"))
        tokenizer = load_answer_tokenizer(settings, base)
    now = journal.prompt_date()  # all processes call it

    # --- What is to be answered --------------------------------------------------------------------------------------
    with apart("preparing the prompts"):
        asks = asks_for_date(tokenizer, settings.chat_template)
        today = (settings.prompt_date or now) if asks else None
        set_chat_template(tokenizer, settings.chat_template, today)
        # Greedy rounds are all the same, so one of them is computed.
        rounds = (1,) if settings.greedy else tuple(range(1, settings.rounds + 1))
        jobs, seen = [], Counter[str]()
        for index, row in enumerate(prompts):
            with naming_row(row, settings.input_csv):
                ids = prompt_ids(tokenizer, row.prompt, row.history)
                jobs.append(Job(index, row.asked, ids, rounds, seen[row.asked]))
            seen[row.asked] += 1
        limit = context_length(settings, base)
        for row, job in zip(prompts, jobs, strict=True):
            if limit is not None and len(job.input_ids) + settings.max_new_tokens > limit:
                raise InputError(
                    f"{settings.input_csv}: row {row.number}: the prompt has {len(job.input_ids)} tokens, which with "
                    f"--max_new_tokens {settings.max_new_tokens} exceeds the model's context of {limit}"
                )
        record = {name: getattr(settings, name) for name in names_of(DrawSettings)} | {
            "input": digest(Path(settings.input_csv).read_bytes()),
            "columns": parse_columns(settings.columns) or None,
            "tokens": digest(repr([job.input_ids for job in jobs]).encode()),
            "model": model_fingerprint(settings, base, accelerator.device),
            "prompt_date": today,
            "noise": digest(repr((settings.noise_passes, noise.identity)).encode()) if noise else None,
        }
        commit = None if Path(base).is_dir() else getattr(base_config(settings, base), "_commit_hash", None)
    record = agreed(record)
    notice(settings.changed_since(record["input"], record["model"]))
    with apart("reading unfinished answers"):
        journal.check(record)

    # --- Answering, what is left of it, shared out over the processes ------------------------------------------------
    with apart("loading the model"):
        answerer: Answerer | VllmAnswerer
        if settings.engine == "vllm":
            answerer = VllmAnswerer(settings, base, tokenizer, jobs, accelerator.device)
        else:
            model = load_answer_model(settings, base, accelerator.device)
            check_vocabulary(model, jobs)
            noisy = NoisyPasses(model, noise.make(), settings.noise_passes) if noise else None
            answerer = Answerer(model, tokenizer, settings, noisy, settings.static_cache)
        journal.start(record, accelerator.num_processes)
    notice(why_answers_differ(settings, accelerator.device))
    if answerer.not_applied:
        asked = ", ".join(f"{name}={value}" for name, value in answerer.not_applied.items())
        notice(f"the model's generation_config.json asks for {asked}; not applied: the flags alone decide")
    wanted = {(job.index, number) for job in jobs for number in rounds}
    done = journal.read_all(wanted)  # the same on all, who must agree on what is left
    left = [replace(job, rounds=tuple(r for r in job.rounds if (job.index, r) not in done)) for job in jobs]
    left = sorted((job for job in left if job.rounds), key=lambda job: len(job.input_ids))
    mine = left[accelerator.process_index :: accelerator.num_processes]  # neighbours in length go to different ones
    if done:
        notice(f"going on with {journal.folder}: {len(done)} answers are there already")
    notice(f"{len(jobs)} prompts, {settings.rounds} answers each; processes: {accelerator.num_processes}")
    progress = progress_bar(accelerator, len(wanted), "answering", "answer")
    progress.update(len(done))
    for batch in answer_all(answerer, mine, AT_ONCE if settings.engine == "vllm" else settings.batch_size):
        journal.append(batch)
        if accelerator.is_main_process:
            progress.update(max(min(journal.count(), len(wanted)) - progress.n, 0))  # of all processes on its disk

    # --- The whole of it, written by one process ---------------------------------------------------------------------
    fresh = gathered(journal.read_own(wanted))
    progress.update(len(wanted) - progress.n)
    progress.close()
    with apart("writing the answers"):
        if accelerator.is_main_process:
            answers = done | {key: answer for part in fresh for key, answer in part.items()}
            about = {"answers": output.name, "prompts": len(jobs), "base_model": base, "base_model_commit": commit,
                     "model_fingerprint": record["model"], "input_sha256": record["input"], "prompt_date": today,
                     "device": accelerator.device.type, "processes": accelerator.num_processes,
                     "skipped": SomeRows.of(skipped)._asdict()}  # fmt: skip
            write_all(settings, output, records, answers, about)
    journal.remove()
    notice(f"the answers are in {output}")
    if "response" in records[0] or prompts[0].response:
        program = "noisefit.benchmarks letters" if {"answer", "choices"} <= records[0].keys() else "noisefit.score"
        notice(f"next, how many are true: python -m {program} {shlex.quote(str(output))}")
    finish(accelerator)


def write_all(
    settings: AnswerSettings, output: Path, records: list[dict[str, Any]], answers: Answers, about: dict[str, Any]
) -> None:  # fmt: skip
    if settings.greedy:
        answers = {(i, r): answers[i, 1] for i, _ in answers for r in range(1, settings.rounds + 1)}
    below = settings.abstain_below
    abstention = None if below is None else Abstention(below, settings.refusal)
    # What these had been left to is known now: a repetition has the same.
    known = {"prompt_date": about["prompt_date"], "model_revision": about["base_model_commit"]}
    repeated = replace(settings, **{name: value for name, value in known.items() if value is not None})
    write_answers(output, records, answers, settings.rounds, abstention, settings_record(repeated, about))
    if abstention:
        replaced = sum(map(abstention.replaces, answers.values()))
        notice(f"{replaced} of {len(answers)} answers have a confidence under {below:g} and are now "
               f"{settings.refusal!r}; the column {BEFORE_ABSTAINING} has all as they were")  # fmt: skip
        if not is_refusal(settings.refusal):
            notice(f"--refusal {settings.refusal!r} is none that noisefit.score knows: give it a file with that line "
                   "as --refusals, or it counts as a wrong answer")  # fmt: skip


def main() -> None:
    """Run the command line."""
    with one_line_errors("generate.py"):
        generate(parse_arguments())


if __name__ == "__main__":
    main()
