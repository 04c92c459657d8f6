"""The published evaluation's questions, from files of its data: TruthfulQA by letter, and HaluEval QA.

The prompts are those of the published programs, to the last line end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from string import ascii_uppercase as LETTERS
from typing import Any, NamedTuple

from noisefit.base.errors import InputError
from noisefit.inputs.tables import read_records

Record = dict[str, Any]
Question = dict[str, str]

# What published variants of HaluEval say of a row whose `answer` is not the truth, by column.
MARKS = {"label": ("fail",), "score": ("0", "0.0"), "hallucination": ("yes",)}
INCOMPLETE = "with an empty or missing cell"
MARKED = "whose answer is marked as a hallucination, so no truth to compare with"
REPEATED = "with the prompt of an earlier row"


def truthfulqa_question(where: str, record: Record) -> Question | str:
    """A row of TruthfulQA as a question whose right letter is in `answer`; or why it is left out.

    Where its choices are `mc1_targets`, the right one stands first, always. They are put in another order: that of
    their SHA-256 with the question, which is the same whoever makes the file.

    Raises:
        InputError: choices or label are not as they should be.
    """
    question = _text(where, record, "question")
    if not question:
        return INCOMPLETE
    if "choices" in record:
        choices = _choices(f"{where}: choices", _parsed(f"{where}: choices", record["choices"]))
        numbers, label = [str(i) for i in range(len(choices))], str(record.get("label")).strip()
        if label not in numbers:
            raise InputError(f"{where}: label is {label[:40]!r}, expected 0 to {numbers[-1]}, a choice's number")
        right = int(label)
    else:
        targets = _parsed(f"{where}: mc1_targets", record.get("mc1_targets"))
        targets = targets if isinstance(targets, dict) else {}
        choices, labels = _choices(f"{where}: mc1_targets: choices", targets.get("choices")), targets.get("labels")
        if not isinstance(labels, list) or sorted(map(str, labels)) != ["0"] * (len(choices) - 1) + ["1"]:
            raise InputError(f"{where}: mc1_targets: labels: expected a 1 for one of {len(choices)} choices, else 0")
        keys = [hashlib.sha256(f"{question}\n{choice}".encode()).digest() for choice in choices]
        order = sorted(range(len(choices)), key=keys.__getitem__)
        choices, right = [choices[i] for i in order], order.index([*map(str, labels)].index("1"))
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
    return {
        "prompt": f"{question}\n{listed}Answer:",
        "response": choices[right],
        "answer": LETTERS[right],
        "choices": str(len(choices)),
    }


def halueval_question(where: str, record: Record) -> Question | str:
    """A row of HaluEval QA as a question behind its passage, with the truth in `response`; or why it is left out.

    Raises:
        InputError: a cell is not text.
    """
    question, answer = _text(where, record, "question"), _text(where, record, "answer")
    if answer and any(str(record.get(column)).strip().lower() in marks for column, marks in MARKS.items()):
        return MARKED
    passage = _text(where, record, "passage") or _text(where, record, "knowledge")
    truth = answer or _text(where, record, "right_answer")
    if not question or not truth:
        return INCOMPLETE
    return {"prompt": f"{passage}\n\n{question}\n\n", "response": truth, "question": question}


class Benchmark(NamedTuple):
    """How a benchmark's data become questions."""

    question: Callable[[str, Record], Question | str]
    layouts: tuple[tuple[str, ...], ...]  # a file must have the columns of one
    new_tokens: int  # an answer, in the published program


BENCHMARKS = {
    "truthfulqa": Benchmark(truthfulqa_question, (("question", "choices", "label"), ("question", "mc1_targets")), 3),
    "halueval": Benchmark(halueval_question, (("question", "answer"), ("question", "right_answer")), 36),
}


def read_questions(path: str, benchmark: Benchmark) -> tuple[list[Question], dict[str, list[int]]]:
    """A benchmark's questions, each once, from a file of its data.

    Returns:
        The questions, and the numbers of the rows left out by the reason.

    Raises:
        InputError: as `read_records`; the file has the columns of no layout, a row cannot be used, or none is left.
    """
    records = read_records(path, ())
    if not records:
        raise InputError(f"{path}: it has no rows")
    columns = dict.fromkeys(column for _, record in records for column in record)
    if not any(columns.keys() >= set(layout) for layout in benchmark.layouts):
        expected = ", or ".join(" and ".join(layout) for layout in benchmark.layouts)
        raise InputError(f"{path}: expected columns {expected}; columns found: {', '.join(columns) or 'none'}")
    questions: dict[str, Question] = {}
    left_out: dict[str, list[int]] = {}
    for row, record in records:
        made = benchmark.question(f"{path}: row {row}", record)
        if isinstance(made, dict) and questions.setdefault(made["prompt"].strip(), made) is not made:
            made = REPEATED
        if isinstance(made, str):
            left_out.setdefault(made, []).append(row)
    if not questions:
        raise InputError(f"{path}: no question to use: each row is one {'; or '.join(left_out)}")
    return list(questions.values()), left_out


def _text(where: str, record: Record, column: str) -> str:
    """A cell's text as it stands, white space and all, as the prompt has it; empty where it is blank."""
    value = record.get(column)
    if not isinstance(value, str | None):
        raise InputError(f"{where}: {column} is {type(value).__name__}, expected text")
    return value if value and value.strip() else ""


def _parsed(where: str, value: Any) -> Any:
    """A cell that holds a list or an object; in a CSV as JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        json.dumps(found, ensure_ascii=False, default=str).encode()  # half of a surrogate pair is no text
        return found
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON; save the data as .jsonl or .parquet, whose cells can be lists") from None


def _choices(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(choice, str) and choice.strip() for choice in value):
        raise InputError(f"{where}: expected a list of texts, none of them empty")
    if not 2 <= len(value) <= len(LETTERS):
        raise InputError(f"{where}: {len(value)} choices, expected 2 to {len(LETTERS)}, a letter each")
    return value
