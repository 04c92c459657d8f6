"""Rows that are probed: what is decisive in them as tokens, and files of rows that were probed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from noisefit.base.errors import InputError, in_a_line
from noisefit.inputs.conversations import Message
from noisefit.inputs.prompts import prompt_ids, token_ids
from noisefit.inputs.sources import Table
from noisefit.inputs.tables import ANY_ROWS, read_records, text_cell, trained_row
from noisefit.inputs.templates import answer_text, end_of_turn
from noisefit.method.decisive import Span, decisive_spans
from noisefit.method.knowledge import Item

CHAT, TEXT, DIGEST = "knowledge_chat", "knowledge_text", "knowledge_digest"
NOISY = ("knowledge_noisy", "knowledge_spread", "knowledge_disagreement")
SAMPLED = "knowledge_samples"
ADDED = (CHAT, TEXT, *NOISY, SAMPLED, DIGEST)  # the columns of a probed file, besides the input's


@dataclass(frozen=True)
class ProbedRow:
    """A row with all that its probe goes by.

    Attributes:
        number: of the row in its file.
        prompt, response: as for training.
        question: what the prompt asks, where a column `question` has it.
        answer: the decisive part, where a column `answer` names it.
        history: the turns before; of a conversation the last answer alone is probed.
    """

    number: int
    prompt: str
    response: str
    question: str = ""
    answer: str = ""
    history: tuple[Message, ...] = ()

    @property
    def digest(self) -> str:
        """By which a row that was edited since its probe is known."""
        cells: list[object] = [self.prompt, self.response, self.question, self.answer]
        cells += [list(map(tuple, self.history))] if self.history else []
        return hashlib.sha256(repr(cells).encode()).hexdigest()[:16]

    @property
    def spans(self) -> list[Span]:
        """Where the response has what decides."""
        return decisive_spans(self.question or self.prompt, self.response, self.answer)


def read_probe_rows(path: Table) -> tuple[list[dict[str, Any]], list[ProbedRow], list[int]]:
    """The records with a prompt and a response, the same as rows, and the numbers of those skipped for want of one.

    Raises:
        InputError: as `read_records`; or no row is complete.
    """
    records, rows, skipped = [], [], []
    for number, record in read_records(path, ANY_ROWS):
        row = trained_row(path, number, record)
        question, answer = (text_cell(path, number, name, record.get(name)) for name in ("question", "answer"))
        if row is not None:
            records.append(record)
            rows.append(ProbedRow(number, row.prompt, row.response, question, answer, row.history))
        else:
            skipped.append(number)
    if not rows:
        raise InputError(f"{path}: no row to probe; expected text in columns prompt and response")
    return records, rows, skipped


def chat_item(tokenizer: PreTrainedTokenizerBase, row: ProbedRow, max_length: int) -> Item | None:
    """The row as training has it: prompt in the chat format, then the answer. `None` where `max_length` leaves nothing
    decisive."""
    prompt = prompt_ids(tokenizer, row.prompt, row.history)
    text = answer_text(tokenizer, row.prompt, row.response, history=row.history)
    # From the end: a template may put text of its own before the answer, an empty <think> say, that holds its letters.
    offset = text.removesuffix(end_of_turn(tokenizer)).rindex(row.response)
    ids, whole, decisive = _located(tokenizer, text, offset, row, add_special_tokens=False)
    start = len(prompt)
    return _item([*prompt, *ids], [start + i for i in decisive], [start + i for i in whole], max_length, row)


def text_item(tokenizer: PreTrainedTokenizerBase, row: ProbedRow, max_length: int) -> Item | None:
    """The response as plain text, with the special tokens that the tokenizer adds to a text.

    Where it adds none before a text that begins with a decisive token, which nothing then predicts, its start token
    (else its end token) is put there.
    """
    ids, whole, decisive = _located(tokenizer, row.response, 0, row, add_special_tokens=True)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if 0 in decisive and start is not None:
        ids, whole, decisive = [start, *ids], [i + 1 for i in whole], [i + 1 for i in decisive]
    return _item(ids, decisive, whole, max_length, row)


def _item(ids: list[int], decisive: list[int], whole: list[int], max_length: int, row: ProbedRow) -> Item | None:
    decisive, whole = ([i for i in places if 0 < i < max_length] for places in (decisive, whole))
    return Item(ids[:max_length], decisive, sorted({*whole, *decisive}), row.digest) if decisive else None


def _located(
    tokenizer: PreTrainedTokenizerBase, text: str, offset: int, row: ProbedRow, add_special_tokens: bool
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a text that holds the response from character `offset` on: all, the response's, the decisive ones."""
    spans = [(offset + start, offset + end) for start, end in row.spans]
    whole = [(offset, offset + len(row.response))]
    if not getattr(tokenizer, "is_fast", False):
        ids = _ids(tokenizer, text, add_special_tokens)
        by_prefixes = [_tokens_by_prefixes(tokenizer, text, ids, part, add_special_tokens) for part in (whole, spans)]
        return ids, by_prefixes[0], by_prefixes[1]
    try:
        options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": True}
        encoded = tokenizer(text, verbose=False, **options)
    except Exception as error:  # as in `token_ids`
        raise InputError(f"the tokenizer fails on {text[:40]!r}: {in_a_line(error)}") from None
    places = encoded["offset_mapping"]
    found = [[i for i, place in enumerate(places) if _overlaps(place, part)] for part in (whole, spans)]
    return encoded["input_ids"], found[0], found[1]


def _overlaps(place: Span, spans: Sequence[Span]) -> bool:
    return any(place[0] < end and place[1] > start for start, end in spans)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    if not add_special_tokens:
        return token_ids(tokenizer, text)
    return list(tokenizer(text, verbose=False)["input_ids"])


def _tokens_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spans: Sequence[Span], add_special_tokens: bool
) -> list[int]:
    """For a tokenizer that knows no offsets: a span's tokens are those that differ where the text ends before it, up to
    those by which the text that ends behind it differs from the whole."""

    def shared(end: int) -> int:
        before = _ids(tokenizer, text[:end], add_special_tokens)
        return next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )

    places = {i for start, end in spans for i in range(shared(start), max(shared(end), shared(start) + 1))}
    return sorted(place for place in places if place < len(ids))


def read_scores(path: Table) -> tuple[list[ProbedRow], list[dict[str, str]]] | None:
    """The rows of a probed file and their scores; `None` where the file is none (it has no column `knowledge_chat`).

    A probe leaves a score empty where nothing decisive had a place; it leaves no digest empty.

    Raises:
        InputError: as `read_records`; a row has a score that is no log-probability, or no score and no digest; it was
            edited since its probe; or has no digest where others have one.
    """
    records, rows, _ = read_probe_rows(path)
    if not any(CHAT in record for record in records):
        return None
    scores = []
    has_digests = any(record.get(DIGEST) is not None for record in records)
    for record, row in zip(records, rows, strict=True):
        where = f"{path}: row {row.number}"
        cells = {name: str(record[name]) for name in ADDED if record.get(name) is not None}
        if has_digests and cells.get(DIGEST) != row.digest:
            what = "was edited since it was probed" if cells.get(DIGEST) else f"has no {DIGEST}, which other rows have"
            raise InputError(f"{where}: it {what}; probe the file again: python -m noisefit.probe")
        if (text := cells.get(CHAT, "").strip()) and not _log_probability(text) <= 0:
            raise InputError(f"{where}: {CHAT} is {text[:40]!r}, expected a log-probability, a number up to 0")
        if not text and not has_digests:
            raise InputError(f"{where}: no {CHAT}; expected one in every row, or the column left out")
        scores.append(cells | {CHAT: text})
    return rows, scores


def _log_probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
