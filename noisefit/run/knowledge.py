"""Training by what the base model knows: its probe at the start of a run, and what becomes of the rows it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedTokenizerBase

from noisefit.base.errors import InputError, notice
from noisefit.base.meeting import apart
from noisefit.inputs.conversations import Message
from noisefit.inputs.models import frozen_dtype, load_base
from noisefit.inputs.probing import (
    CHAT,
    DIGEST,
    TEXT,
    ProbedRow,
    chat_item,
    read_probe_rows,
    read_scores,
    text_item,
)
from noisefit.inputs.sources import Table
from noisefit.inputs.tables import Row, as_csv
from noisefit.method.decisive import words
from noisefit.method.knowledge import Item, Probe, score_all
from noisefit.method.modes import part
from noisefit.run.checkpoint_files import SCORES, asked_for
from noisefit.run.left_out import LeftOut
from noisefit.run.processes import progress_bar
from noisefit.run.settings import Settings

EXAMPLES = 3  # rows that a line names

Scores = list[dict[str, str]]
"""The cells of each row by their columns, `knowledge_chat` among them; empty where nothing decisive had a place."""


def by_what_is_known(
    settings: Settings, sources: Sequence[Table], rows: Sequence[list[Row] | None],
    tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, left_out: LeftOut,
) -> tuple[Sequence[list[Row] | None], str | None]:  # fmt: skip
    """The rows as `--unknown_rows` has them, with their responses and weights. All processes call it.

    The scores are those of the checkpoint that the run goes on from, those in the file of the rows, or else those of
    the base model, which is loaded and probed.

    Args:
        settings: of the run.
        sources: those of `--train_data`.
        rows: of each source.
        tokenizer: with its chat template.
        accelerator: of the run.
        left_out: where the unknown rows are noted.

    Returns:
        The rows of each source, and the content of `knowledge.csv`; `None` under `keep`.

    Raises:
        InputError: rows were edited since they were probed, have no score, have one mode and no `--unknown_below`, or
            none is left.
    """
    if settings.unknown_rows == "keep":
        return rows, None
    resumed, path = asked_for(settings), ", ".join(map(str, sources))
    if resumed is not None and not (resumed / SCORES).exists():
        return rows, None  # a run that kept its rows: `find_checkpoint` says so
    found = [read_scores(source) for source in sources]
    of_sources = [read_probe_rows(source)[1] if known is None else known[0]
                  for source, known in zip(sources, found, strict=True)]  # fmt: skip
    probed = [row for of_source in of_sources for row in of_source]
    place = [(number, row.number) for number, of_source in enumerate(of_sources) for row in of_source]
    for source, known in zip(sources, found, strict=True):
        if known is not None:
            if any(DIGEST not in cells for cells in known[1]):
                notice(f"{source}: it has no column {DIGEST}, so whether rows were edited since their probe is not "
                       "checked")  # fmt: skip
            notice(f"{source}: its rows are probed already ({CHAT})")
    if resumed is not None and None in found:
        before = read_scores(str(resumed / SCORES))
        if before is None or [row.digest for row in before[0]] != [row.digest for row in probed]:
            raise InputError(f"{path}: its rows are not those that {resumed} was trained on; resume it with its own, "
                             "or start afresh in another --output_model")  # fmt: skip
        scores = before[1]
    else:
        unscored = [row for known, of_source in zip(found, of_sources, strict=True) if known is None
                    for row in of_source]  # fmt: skip
        new = iter(_probe(settings, unscored, tokenizer, accelerator) if unscored else ())
        scores = [cells for known, of_source in zip(found, of_sources, strict=True)
                  for cells in (list(islice(new, len(of_source))) if known is None else known[1])]  # fmt: skip
    values = [float(cells[CHAT]) if cells[CHAT] else None for cells in scores]
    if not any(cells[CHAT] for cells in scores):
        raise InputError(f"{path}: no row has a {CHAT}, as nothing decisive is within --max_length; raise that, or "
                         "give --unknown_rows keep")  # fmt: skip
    threshold = _threshold(settings, path, [value for value in values if value is not None])
    below = [value is not None and value < threshold and words(row.response) != words(settings.refusal)
             for row, value in zip(probed, values, strict=True)]  # fmt: skip
    numbers = [row.number for row, is_below in zip(probed, below, strict=True) if is_below]
    left_out.note_unknown(settings.unknown_rows, threshold, numbers, sum(value is None for value in values))
    _say(settings, path, threshold, list(zip(probed, scores, below, strict=True)))
    unknown = {where for where, is_below in zip(place, below, strict=True) if is_below}
    left = [[treated for row in of_source or () if (treated := _treated(settings, row, (i, row.number) in unknown))]
            for i, of_source in enumerate(rows)]  # fmt: skip
    if not any(left):
        raise InputError(
            f"{path}: all rows are below --unknown_below {threshold:g}, so --unknown_rows drop leaves none"
        )
    columns = [_row_cells(row) | cells for row, cells in zip(probed, scores, strict=True)]
    return left, as_csv(columns).decode()


def _row_cells(row: ProbedRow) -> dict[str, str]:
    more = {name: cell for name, cell in (("question", row.question), ("answer", row.answer)) if cell}
    if row.history:
        turns = [*row.history, Message("user", row.prompt), Message("assistant", row.response)]
        return {"messages": json.dumps([turn._asdict() for turn in turns], ensure_ascii=False)} | more
    return {"prompt": row.prompt, "response": row.response} | more


def _treated(settings: Settings, row: Row, unknown: bool) -> Row | None:
    """What becomes of a row."""
    if not unknown:
        return row
    if settings.unknown_rows == "drop":
        return None
    if settings.unknown_rows == "refuse":
        return replace(row, response=settings.refusal.strip())
    return replace(row, weight=settings.unknown_weight)


def _threshold(settings: Settings, path: str, values: Sequence[float]) -> float:
    if settings.unknown_below is not None:
        return settings.unknown_below
    parting = part(np.array(values))
    if parting.threshold is None:
        raise InputError(f"{path}: what the base model knows of its rows does not part in two groups "
                         f"({parting.why}); give --unknown_below, or --unknown_rows keep")  # fmt: skip
    return parting.threshold


def _say(
    settings: Settings, path: str, threshold: float, rows: Sequence[tuple[ProbedRow, dict[str, str], bool]]
) -> None:
    what = {"drop": "left out", "refuse": f"trained with the answer {settings.refusal.strip()!r}",
            "weight": f"trained with weight {settings.unknown_weight:g}"}[settings.unknown_rows]  # fmt: skip
    given = "" if settings.unknown_below is not None else ", where the rows part"
    examples = [f"{row.prompt[:60]!r} ({float(cells[CHAT]):.2f})" for row, cells, unknown in rows if unknown]
    such = f", such as {', '.join(examples[:EXAMPLES])}" if examples else ""
    unscored = sum(not cells[CHAT] for _, cells, _ in rows)
    notice(
        f"{path}: the base model does not know {len(examples)} of {len(rows)} rows (below {threshold:.4g}"
        f"{given}): {what}{such}",
        f"{unscored} rows have no {CHAT}, as nothing decisive was within --max_length, and stay as they are"
        if unscored
        else None,
    )


def _probe(
    settings: Settings, rows: Sequence[ProbedRow], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Scores:
    name = settings.model
    with apart("loading the base model"):
        model = load_base(settings, name, accelerator, frozen_dtype(accelerator), settings.trust_remote_code)
    if settings.quantization == "none":
        model = model.to(accelerator.device)
    columns = probe_rows(model, tokenizer, rows, settings.max_length, settings.batch_size, accelerator)
    del model
    clear_device_cache(garbage_collection=True)
    return [cells | {DIGEST: row.digest} for row, cells in zip(rows, columns, strict=True)]


def probe_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ProbedRow], max_length: int, batch_size: int,
    accelerator: Accelerator,
) -> Scores:  # fmt: skip
    """`knowledge_chat` and `knowledge_text` of all rows. All processes call it, and get the same."""
    scores: Scores = [{CHAT: "", TEXT: ""} for _ in rows]
    makers = {CHAT: chat_item, TEXT: text_item}
    found = {(column, i): make(tokenizer, row, max_length) for column, make in makers.items()
             for i, row in enumerate(rows)}  # fmt: skip
    items: dict[int, Item] = {}
    for number, item in enumerate(found.values()):
        if item is not None:
            items[number] = item
    if not items:
        return scores
    probe = Probe(model, int(tokenizer.pad_token_id), next(iter(items.values())))
    mine = share(items, accelerator)
    own: dict[int, list[float]] = {}
    with progress_bar(accelerator, len(mine), "probing the base model", "text") as progress:
        for values in score_all(probe, mine, batch_size):
            own |= values
            progress.update(len(values))
    keys = list(found)
    for part_of_all in gather_object([own]):
        for number, values in part_of_all.items():
            column, i = keys[number]
            scores[i][column] = as_cell(values[0])
    return scores


def share(items: dict[int, Item], accelerator: Accelerator) -> dict[int, Item]:
    """This process's part of the items: neighbours in length go to different ones."""
    order = sorted(items, key=lambda number: (-len(items[number].input_ids), number))
    return {number: items[number] for number in order[accelerator.process_index :: accelerator.num_processes]}


def as_cell(value: float) -> str:
    """A score as it stands in a file."""
    return f"{value:.4f}"
