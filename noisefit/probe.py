"""What a model knows of a file's answers, before it is trained on them.

    accelerate launch -m noisefit.probe --model MODEL --train_data questions.csv --output probed.csv

Each row gets the mean log-probability that the model gives to the tokens which decide its answer, and on request what
noise does to it, and how often the model answers right by itself. The same file for any batch size and number of
processes (in float32, on one kind of device). Finished rows go to disk as they come: after a kill, the same command
goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from noisefit.answers.disks import agreed, gathered
from noisefit.answers.generation import Answerer, answer_all
from noisefit.answers.jobs import Answer, Job
from noisefit.answers.journal import Journal, alone_with
from noisefit.answers.loading import (
    base_config,
    check_vocabulary,
    context_length,
    digest,
    find_base,
    load_answer_model,
    load_answer_tokenizer,
    model_fingerprint,
)
from noisefit.answers.output import check_answers_output
from noisefit.answers.probe_settings import ProbeSettings, parse_arguments
from noisefit.answers.probe_summary import check_picture, draw_histogram, summary
from noisefit.answers.reading import ALIASES, texts_cell, with_columns
from noisefit.answers.scoring import Prompt, score_prompt
from noisefit.base.errors import InputError, notice, one_line_errors
from noisefit.base.files import replacing, writing
from noisefit.base.meeting import apart
from noisefit.base.settings import names_of, not_default
from noisefit.inputs.columns import parse_columns
from noisefit.inputs.probing import (
    ADDED,
    CHAT,
    DIGEST,
    NOISY,
    SAMPLED,
    TEXT,
    ProbedRow,
    chat_item,
    read_probe_rows,
    text_item,
)
from noisefit.inputs.prompts import naming_row, prompt_ids
from noisefit.inputs.tables import Row, as_csv, describe_skipped, name_rows
from noisefit.inputs.templates import asks_for_date, check_chat_template, set_chat_template
from noisefit.method.knowledge import Item, Probe, score_all
from noisefit.run.knowledge import as_cell, share
from noisefit.run.processes import check_processes, finish, progress_bar, start_accelerator

# What the journal calls the scores of a row; its samples have the numbers of their rounds, from 1.
SCORES = {CHAT: 0, TEXT: -1, NOISY[0]: -2}


def probe(settings: ProbeSettings) -> None:
    """Probe a file as the settings say."""
    accelerator = start_accelerator(patience=timedelta(days=7))
    check_processes(accelerator)
    output = Path(os.path.realpath(settings.output))  # a link stays one
    with apart("checking the output"):
        picture = check_output(settings, output, accelerator)
    with alone_with(output) as first:
        with apart("checking the output"):
            check_output(settings, output, accelerator)  # again: now nobody else writes it
        probe_file(settings, output, picture, accelerator, Journal(output, accelerator.process_index, first))


def check_output(settings: ProbeSettings, output: Path, accelerator: Accelerator) -> Path:
    """Where the picture goes. The main process writes, so it alone looks."""
    if not accelerator.is_main_process:
        return output
    check_answers_output(output, Path(settings.train_data), settings.overwrite_output, "--output")
    return check_picture(settings.picture, output, settings.overwrite_output)


def probe_file(
    settings: ProbeSettings, output: Path, picture: Path, accelerator: Accelerator, journal: Journal
) -> None:
    # --- Everything that can be checked before the model is loaded ---------------------------------------------------
    check_chat_template(settings.chat_template)
    base = find_base(settings.answers)
    layers = layers_with_noise(settings, base)
    records, rows, skipped = read_probe_rows(with_columns(settings.train_data, settings.columns))
    if taken := [name for name in ADDED if any(name in record for record in records)]:
        raise InputError(f"{settings.train_data}: it has a column {taken[0]!r} already, which is one of the probe's; "
                         "remove it, or give the file as it was before")  # fmt: skip
    aliases = [true_answers_of(settings, row, record) for row, record in zip(rows, records, strict=True)]
    if skipped:
        notice(describe_skipped(settings.train_data, skipped, "with an empty or missing cell"))
    tokenizer = load_answer_tokenizer(settings.answers, base)
    today = None
    if asks_for_date(tokenizer, settings.chat_template):
        today = journal.prompt_date(settings.prompt_date)
    set_chat_template(tokenizer, settings.chat_template, today)

    # --- What is to be probed ----------------------------------------------------------------------------------------
    limit = min(settings.max_length, context_length(settings.answers, base) or settings.max_length)
    items: dict[tuple[int, int], Item] = {}
    jobs: list[Job] = []
    unsampled: list[int] = []
    seen = Counter[str]()
    for index, row in enumerate(rows):
        asked = Row(row.number, row.prompt, row.response, history=row.history)
        with naming_row(asked, settings.train_data):
            items |= items_of(settings, tokenizer, index, row, limit)
            ids = prompt_ids(tokenizer, row.prompt, row.history)
            if settings.samples and len(ids) + settings.max_new_tokens > limit:
                unsampled.append(row.number)
            elif settings.samples:
                jobs.append(Job(index, asked.asked, ids, tuple(range(1, settings.samples + 1)), seen[asked.asked]))
        seen[asked.asked] += 1
    if cut := [row.number for index, row in enumerate(rows) if (index, SCORES[CHAT]) not in items]:
        notice(f"{settings.train_data}: no score for rows of which nothing decisive is within {limit} tokens "
               f"({name_rows(cut)})")  # fmt: skip
    if unsampled:
        notice(f"{settings.train_data}: no samples for rows whose prompt leaves less than --max_new_tokens "
               f"{settings.max_new_tokens} of {limit} tokens ({name_rows(unsampled)})")  # fmt: skip
    of_noise = (settings.noise_passes, layers, settings.noise_std, settings.seed)
    hidden = ("train_data", "output", "overwrite_output", "picture", "batch_size", "model")
    record = {name: getattr(settings, name) for name in names_of(ProbeSettings) if name not in hidden} | {
        "input": digest(Path(settings.train_data).read_bytes()),
        "columns": parse_columns(settings.columns) or None,
        "tokens": digest(repr([(key, item.input_ids, item.decisive) for key, item in items.items()]).encode()),
        "base": model_fingerprint(settings.answers, base, accelerator.device),
        "prompt_date": today,
    }
    record = agreed(record)
    with apart("comparing settings"):
        journal.check(record)

    # --- Probing, what is left of it, shared out over the processes --------------------------------------------------
    with apart("loading the model"):
        model = load_answer_model(settings.answers, base, accelerator.device)
        check_vocabulary(model, [Job(i, "", item.input_ids, ()) for (i, _), item in items.items()])
        journal.start(record, accelerator.num_processes)
    wanted = {*items, *((job.index, number) for job in jobs for number in job.rounds)}
    done = journal.read_all(wanted)  # the same on all, who must agree on what is left
    if done:
        notice(f"going on with {journal.folder}: {len(done)} of {len(wanted)} are there already")
    notice(f"{len(rows)} rows of {settings.train_data}; processes: {accelerator.num_processes}")
    progress = progress_bar(accelerator, len(wanted), "probing", "text")
    progress.update(len(done))
    for number in SCORES.values():
        left = {index: item for (index, n), item in items.items() if n == number and (index, n) not in done}
        noise = of_noise if number == SCORES[NOISY[0]] else ()
        for scores in score_batches(settings, model, tokenizer, items, noise, left, accelerator):
            journal.append([(index, number, Answer(json.dumps(own), 0.0, 0)) for index, own in scores.items()])
            if accelerator.is_main_process:
                progress.update(max(min(journal.count(), len(wanted)) - progress.n, 0))  # of all processes
    if jobs:
        unanswered = [Job(j.index, j.prompt, j.input_ids, tuple(r for r in j.rounds if (j.index, r) not in done),
                          j.occurrence) for j in jobs]  # fmt: skip
        unanswered = sorted((job for job in unanswered if job.rounds), key=lambda job: len(job.input_ids))
        mine = unanswered[accelerator.process_index :: accelerator.num_processes]
        for batch in answer_all(Answerer(model, tokenizer, settings.sampling), mine, settings.batch_size):
            journal.append(batch)
            if accelerator.is_main_process:
                progress.update(max(min(journal.count(), len(wanted)) - progress.n, 0))

    # --- The whole of it, written by one process ---------------------------------------------------------------------
    fresh = gathered(journal.read_own(wanted))
    progress.update(len(wanted) - progress.n)
    progress.close()
    with apart("writing the rows") as is_main:
        if is_main:
            whole = done | {key: entry for part in fresh for key, entry in part.items()}
            found = {key: entry.text for key, entry in whole.items()}
            cells = [cells_of(settings, index, row, aliases[index], found) for index, row in enumerate(rows)]
            with writing(output), replacing(output) as beside:
                beside.write_bytes(as_csv(r | c for r, c in zip(records, cells, strict=True)))
            lines, values, threshold = summary(settings.train_data, cells)
            drawn = draw_histogram(picture, values, threshold)
            print(*lines, *([f"a picture of them is {picture}"] if drawn else []), sep="\n")
    with apart("ending"):  # not before the whole of it stands
        journal.remove()
    notice(f"the probed rows are in {settings.output}")
    finish(accelerator)


def layers_with_noise(settings: ProbeSettings, base: str) -> list[int]:
    """Those of `--noise_layers` that the model has; of the default a small model may have fewer.

    Raises:
        InputError: one was asked for that it has not.
    """
    if not settings.noise_passes:
        return []
    count = base_config(settings.answers, base).num_hidden_layers
    missing = [layer for layer in settings.noise_layers if layer >= count]
    if missing and "noise_layers" in not_default(settings):
        raise InputError(f"--noise_layers: the model has {count} layers, 0 to {count - 1}, and no "
                         f"{', '.join(map(str, missing))}")  # fmt: skip
    return [layer for layer in settings.noise_layers if layer < count]


def items_of(
    settings: ProbeSettings, tokenizer: PreTrainedTokenizerBase, index: int, row: ProbedRow, limit: int
) -> dict[tuple[int, int], Item]:
    """What is scored of a row, by the row's index and the number in `SCORES`."""
    chat = chat_item(tokenizer, row, limit)
    made = {CHAT: chat, TEXT: text_item(tokenizer, row, limit)} | ({NOISY[0]: chat} if settings.noise_passes else {})
    return {(index, SCORES[name]): item for name, item in made.items() if item is not None}


def score_batches(
    settings: ProbeSettings, model: Any, tokenizer: PreTrainedTokenizerBase, items: dict[tuple[int, int], Item],
    of_noise: Sequence[Any], left: dict[int, Item], accelerator: Accelerator,
) -> Iterator[dict[int, list[float]]]:  # fmt: skip
    """Score this process's share of what is left of one column; `of_noise` is what `Probe` takes of noise, if any."""
    if not left:  # all processes agree on that
        return
    scorer = Probe(model, int(tokenizer.pad_token_id), next(iter(items.values())), *of_noise)
    yield from score_all(scorer, share(left, accelerator), settings.batch_size)


def true_answers_of(settings: ProbeSettings, row: ProbedRow, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The further true answers that a row lists, for its samples. Raises `InputError` where a list is none."""
    if not settings.samples:
        return ()
    lists = [texts_cell(settings.train_data, row.number, name, record.get(name)) for name in ALIASES]
    return tuple(text for texts in lists for text in texts)


def cells_of(
    settings: ProbeSettings, index: int, row: ProbedRow, aliases: tuple[str, ...], found: dict[tuple[int, int], str]
) -> dict[str, str]:
    """The columns that a row gets."""
    cells = {name: "" for name in ADDED}
    for name in (CHAT, TEXT):
        if (text := found.get((index, SCORES[name]))) is not None:
            cells[name] = as_cell(json.loads(text)[0])
    if (text := found.get((index, SCORES[NOISY[0]]))) is not None:
        cells |= dict(zip(NOISY, map(as_cell, json.loads(text)), strict=True))
    answers = [found[index, r] for r in range(1, settings.samples + 1) if (index, r) in found]
    if answers:
        asked = Prompt(row.prompt, row.response, tuple(answers), row.answer, question=row.question, aliases=aliases)
        cells[SAMPLED] = as_cell(score_prompt(asked)["contains_truth"])
    left_out = (*(() if settings.noise_passes else NOISY), *(() if settings.samples else (SAMPLED,)))
    return {name: cell for name, cell in cells.items() if name not in left_out} | {DIGEST: row.digest}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.probe"):
        probe(parse_arguments(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
