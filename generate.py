"""Answer the prompts of a file several times each, over all processes of the launch.

    accelerate launch generate.py --model_path ADAPTER --input_csv questions.csv

Every answer is a function of the seed, its prompt and its round, so the CSV is the same for any number of processes and
any batch size (in float32, on one kind of device). Finished answers go to disk as they come: after a kill, the same
command goes on where it stopped.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path

from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from noisefit.adapters import (
    check_vocabulary,
    context_length,
    digest,
    find_base,
    load_answer_model,
    load_answer_tokenizer,
    model_fingerprint,
)
from noisefit.answer_arguments import parse_arguments
from noisefit.data import describe_skipped, read_prompts
from noisefit.errors import InputError, notice, one_line_errors
from noisefit.generation import Answerer, Job, Sampling, answer_all
from noisefit.journal import Journal, alone_with, check_answers_output, default_output, write_answers
from noisefit.processes import check_processes, finish, start_accelerator
from noisefit.prompts import asks_for_date, check_chat_template, naming_row, prompt_ids, set_chat_template
from noisefit.tracking import progress_bar


def generate(args: Namespace) -> None:
    output = Path(args.output_csv or default_output(args))
    check_answers_output(output, Path(args.input_csv), args.overwrite_output)
    with alone_with(output):
        answer_file(args, output)


def answer_file(args: Namespace, output: Path) -> None:
    # --- Everything that can be checked before the model is loaded ---------------------------------------------------
    check_answers_output(output, Path(args.input_csv), args.overwrite_output)  # again: now nobody else writes it
    check_chat_template(args.chat_template)
    base = find_base(args)
    records, prompts, skipped = read_prompts(args.input_csv)
    if skipped:
        notice(describe_skipped(args.input_csv, skipped, "with an empty or missing prompt"))
    tokenizer = load_answer_tokenizer(args, base)
    # A process that is done waits for the others, however long that takes.
    accelerator = start_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_processes(accelerator)
    journal = Journal(output, accelerator.process_index)
    today = None
    if asks_for_date(tokenizer, args.chat_template):  # that of the answers so far, and of all processes
        now = datetime.now().isoformat(timespec="seconds")
        [today] = broadcast_object_list([(journal.unfinished() or {}).get("prompt_date", now)])
    set_chat_template(tokenizer, args.chat_template, today)

    # --- What is to be answered --------------------------------------------------------------------------------------
    # Greedy rounds are all the same, so one of them is computed.
    rounds = (1,) if args.greedy else tuple(range(1, args.rounds + 1))
    jobs, seen = [], Counter[str]()
    for index, row in enumerate(prompts):
        with naming_row(row, args.input_csv):
            jobs.append(Job(index, row.prompt, prompt_ids(tokenizer, row.prompt), rounds, seen[row.prompt]))
        seen[row.prompt] += 1
    limit = context_length(args, base)
    for row, job in zip(prompts, jobs, strict=True):
        if limit is not None and len(job.input_ids) + args.max_new_tokens > limit:
            raise InputError(
                f"{args.input_csv}: row {row.number}: the prompt has {len(job.input_ids)} tokens, which with "
                f"--max_new_tokens {args.max_new_tokens} exceeds the model's context of {limit}"
            )
    sampling = Sampling(
        args.seed, args.greedy, args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.repetition_penalty
    )
    settings = asdict(sampling) | {
        "rounds": args.rounds,
        "input": digest(Path(args.input_csv).read_bytes()),
        "tokens": digest(repr([job.input_ids for job in jobs]).encode()),
        "model": model_fingerprint(args, base, accelerator.device),
        "prompt_date": today,
    }
    journal.check(settings)

    # --- Answering, what is left of it, shared out over the processes ------------------------------------------------
    model = load_answer_model(args, base, accelerator.device)
    check_vocabulary(model, jobs)
    answerer = Answerer(model, tokenizer, sampling)
    if answerer.not_applied:
        asked = ", ".join(f"{name}={value}" for name, value in answerer.not_applied.items())
        notice(f"the model's generation_config.json asks for {asked}; not applied: the flags alone decide")
    if accelerator.is_main_process:
        journal.start(settings, accelerator.num_processes)
    accelerator.wait_for_everyone()
    wanted = {(job.index, number) for job in jobs for number in rounds}
    [done] = broadcast_object_list([journal.read(wanted)])  # all must agree on what is left
    left = [replace(job, rounds=tuple(r for r in job.rounds if (job.index, r) not in done)) for job in jobs]
    left = sorted((job for job in left if job.rounds), key=lambda job: len(job.input_ids))
    mine = left[accelerator.process_index :: accelerator.num_processes]  # neighbours in length go to different ones
    if done:
        notice(f"going on with {journal.folder}: {len(done)} answers are there already")
    notice(f"{len(jobs)} prompts, {args.rounds} answers each; processes: {accelerator.num_processes}")
    progress = progress_bar(accelerator, len(wanted), "answering", "answer")
    progress.update(len(done))
    for answers in answer_all(answerer, mine, args.batch_size):
        journal.append(answers)
        if accelerator.is_main_process:
            progress.update(min(journal.count(), len(wanted)) - progress.n)  # of all processes

    # --- The whole of it, written by one process ---------------------------------------------------------------------
    accelerator.wait_for_everyone()
    progress.update(len(wanted) - progress.n)
    progress.close()
    fresh = gather_object([journal.read_own(wanted)])
    if accelerator.is_main_process:
        answers = done | {key: text for part in fresh for key, text in part.items()}
        if args.greedy:
            answers = {(i, r): answers[i, 1] for i, _ in answers for r in range(1, args.rounds + 1)}
        write_answers(output, records, answers, args.rounds)
        journal.remove()
    notice(f"the answers are in {output}")
    if "response" in records[0]:
        notice(f"next, how many are true: python -m noisefit.score {shlex.quote(str(output))}")
    finish(accelerator)


if __name__ == "__main__":
    with one_line_errors("generate.py"):
        generate(parse_arguments())
