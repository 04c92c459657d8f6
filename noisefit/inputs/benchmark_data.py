"""Questions of benchmarks, from files of their data.

The prompts of TruthfulQA, by letter, and HaluEval QA are those of the published evaluation, to the last line end. Those
of TriviaQA, NQ-open, PopQA and SimpleQA are the questions alone, for the chat format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any, NamedTuple

from noisefit.base.errors import InputError
from noisefit.base.files import read_text
from noisefit.inputs.readers import is_unicode
from noisefit.inputs.tables import read_records

Record = dict[str, Any]
Question = dict[str, str]

# What published variants of HaluEval say of a row whose `answer` is not the truth, by column.
MARKS = {"label": ("fail",), "score": ("0", "0.0"), "hallucination": ("yes",)}
INCOMPLETE = "with an empty or missing cell"
MARKED = "whose answer is marked as a hallucination, so no truth to compare with"
REPEATED = "with the prompt of an earlier row"
UNANSWERED = "whose answer is not published"


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
        numbers = [str(i) for i in range(len(choices))]
        label = str(record.get("label")).strip().removesuffix(".0")  # of a column with gaps pandas makes 1.0
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
        "answers": _listed([choices[right]]),
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
    return {
        "prompt": f"{passage}\n\n{question}\n\n",
        "response": truth,
        "question": question,
        "answers": _listed([truth]),
    }


def triviaqa_question(where: str, record: Record) -> Question | str:
    """A row of TriviaQA, of its own files (`Question`, `Answer`) or of the hub's (`question`, `answer`).

    Its true answers are its value, its aliases, and where they are given those that people wrote.

    Raises:
        InputError: the answer is no object, or holds something else than texts.
    """
    named = {name.lower(): value for name, value in record.items()}
    cell = _parsed(f"{where}: answer", named.get("answer"))
    if cell is None:
        return INCOMPLETE
    if not isinstance(cell, dict):
        raise InputError(f"{where}: answer: expected an object with value and aliases, as in rc.nocontext")
    answer = {name.lower().replace("_", ""): value for name, value in cell.items()}
    found = [_text(f"{where}: answer", answer, "value")]
    for name in ("aliases", "normalizedaliases", "humananswers"):
        found += _texts(f"{where}: answer: {name}", answer.get(name))
    if "<unk>" in found:  # the value of the hub's test rows
        return UNANSWERED
    return _chat_question(_text(where, named, "question"), found)


def nq_open_question(where: str, record: Record) -> Question | str:
    """A row of NQ-open, whose `answer` is a list of texts. Raises `InputError` where it is none."""
    return _chat_question(_text(where, record, "question"), _texts(f"{where}: answer", record.get("answer")))


def popqa_question(where: str, record: Record) -> Question | str:
    """A row of PopQA, whose `possible_answers` is a list, in JSON. Raises `InputError` where it is none."""
    found = _texts(f"{where}: possible_answers", record.get("possible_answers"))
    return _chat_question(_text(where, record, "question"), found)


def simpleqa_question(where: str, record: Record) -> Question | str:
    """A row of SimpleQA, one `problem` and one `answer`. Raises `InputError` where they are not text."""
    return _chat_question(_text(where, record, "problem"), [_text(where, record, "answer")])


def _chat_question(question: str, answers: Sequence[str]) -> Question | str:
    """The question alone; the first of the true answers is the reference, and all stand in `answers`, each once."""
    each: dict[str, str] = {}
    for text in filter(None, map(str.strip, answers)):
        each.setdefault(text.casefold(), text)
    if not question or not each:
        return INCOMPLETE
    return {"prompt": question.strip(), "response": next(iter(each.values())), "answers": _listed([*each.values()])}


class Benchmark(NamedTuple):
    """How a benchmark's data become questions."""

    title: str
    question: Callable[[str, Record], Question | str]
    layouts: tuple[tuple[str, ...], ...]  # a file must have the columns of one
    new_tokens: int  # an answer; in the published program, where there is one
    plain: bool = False  # the prompt as it stands, as published; else in the chat format


BENCHMARKS = {
    "truthfulqa": Benchmark("TruthfulQA, multiple choice", truthfulqa_question,
                            (("question", "choices", "label"), ("question", "mc1_targets")), 3, plain=True),
    "halueval": Benchmark("HaluEval QA", halueval_question,
                          (("question", "answer"), ("question", "right_answer")), 36, plain=True),
    "triviaqa": Benchmark("TriviaQA", triviaqa_question, (("question", "answer"), ("Question", "Answer")), 32),
    "nq_open": Benchmark("NQ-open", nq_open_question, (("question", "answer"),), 32),
    "popqa": Benchmark("PopQA", popqa_question, (("question", "possible_answers"),), 32),
    "simpleqa": Benchmark("SimpleQA", simpleqa_question, (("problem", "answer"),), 32),
}  # fmt: skip


def read_questions(path: str, benchmark: Benchmark) -> tuple[list[Question], dict[str, list[int]]]:
    """A benchmark's questions, each once, from a file of its data.

    Returns:
        The questions, and the numbers of the rows left out by the reason.

    Raises:
        InputError: as `read_records`, which reads all but a `.json` that is one document, a list of rows or TriviaQA's
            own with the list in `Data`; the file has the columns of no layout, a row cannot be used, or none is left.
    """
    records = _document_rows(Path(path))
    if records is None:
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


def _document_rows(path: Path) -> list[tuple[int, Record]] | None:
    """The rows of a `.json` file that is one document, numbered from 1; `None` where it is none, but lines."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError, InputError):
        return None  # whoever reads its lines says what is wrong
    rows = found.get("Data") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        return None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is a JSON {type(row).__name__}, expected an object")
        if not is_unicode(row):
            raise InputError(f"{path}: row {number} holds half of a surrogate pair (\\ud800 or so), which is no text")
    return list(enumerate(rows, start=1))


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


def _texts(where: str, value: Any) -> list[str]:
    """A cell that holds a list of texts, in a CSV as JSON, without the blank ones; none where the cell is empty."""
    found = _parsed(where, value) if value != "" else None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{where}: expected a list of texts")
    return [text for text in found if text.strip()]


def _listed(answers: Sequence[str]) -> str:
    return json.dumps(list(answers), ensure_ascii=False)
