"""The tokens that a chat template makes of a row: the same prompt in training and in generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from noisefit.base.errors import InputError, in_a_line, notice
from noisefit.base.settings import setting
from noisefit.inputs.conversations import Message
from noisefit.inputs.tables import Row, SomeRows, describe_skipped, name_rows
from noisefit.inputs.templates import BOS, PLAIN, answer_text, end_of_turn, prompt_text, why_turns_are_apart
from noisefit.inputs.turns import Span, cut_texts, gaps_between, join_turns
from noisefit.method.top_k import TopK

TOGETHER = 100  # rows whose texts are tokenized in one call, which takes two thirds of the time of one by one


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How a row becomes tokens."""

    chat_template: str | None = setting(
        None, 
        "prompt format: chatml, alpaca, plain or a Jinja file; default: the tokenizer's own, else chatml. "
        "It is saved with the adapter, and answers use it",
        metavar="NAME|FILE", is_path=True,
    )  # fmt: skip
    max_length: int = setting(1024, "tokens a row; memory grows with it as far as rows are that long", low=2)
    loss_on: str = setting(
        "response", "supervise every answer of a conversation, the last one alone, or the prompts too",
        choices=("response", "last", "all"),
    )  # fmt: skip
    prompt_date: str | None = setting(
        None,
        "date and time for a chat template that asks for today's, as 2026-01-31T12:00:00; default: now, "
        "kept for the whole run",
    )


@dataclass(frozen=True)
class Example:
    """A row as token ids, of which those from `target_start` on are supervised but for the `gaps`: what stands between
    the answers of a conversation, each `(start, end)`. `target_start` is at least 1, and the last token is supervised.

    `is_cut` says that the end of its answer, or an answer behind it, had no place. `weight` is that of its
    cross-entropy. `teacher` has what is known of another model's predictions of the supervised tokens.
    """

    input_ids: list[int]
    target_start: int
    is_cut: bool = False
    weight: float = 1.0
    teacher: TopK | None = field(default=None, compare=False, repr=False)
    gaps: tuple[Span, ...] = ()

    @property
    def num_targets(self) -> int:
        return len(self.input_ids) - self.target_start - sum(end - start for start, end in self.gaps)

    @property
    def spans(self) -> list[Span]:
        """The supervised tokens, as stretches `(start, end)`."""
        borders = [self.target_start, *(border for gap in self.gaps for border in gap), len(self.input_ids)]
        return list(zip(borders[::2], borders[1::2], strict=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, history: Sequence[Message] = ()) -> list[int]:
    """Token ids of `prompt_text`: what generation starts from, and what training puts before the answer."""
    start, text = _prompt(tokenizer, prompt, history)
    return start + token_ids(tokenizer, text)


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, history: Sequence[Message]) -> tuple[list[int], str]:
    """The prompt as a text, and the tokens that stand before those of the text."""
    if tokenizer.chat_template == BOS + PLAIN:
        # A tokenizer may begin a text with a space, but not what stands behind a start token in the text.
        return [tokenizer.bos_token_id], "".join([*(turn.content for turn in history), prompt])
    return [], prompt_text(tokenizer, prompt, history)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that a template has finished, with none added. `InputError` where the tokenizer fails."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    except Exception as error:  # its settings may come from a file that anybody wrote
        reason = in_a_line(error)
        raise InputError(f"the tokenizer fails on {text[:40]!r}: {reason}") from None


def make_examples(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    max_length: int,
    loss_on: str = "response",
    stop_ids: Iterable[int] = (),
) -> tuple[list[Example], list[int]]:
    """Tokenize rows: the prompt as generation does, then the answer's own tokens, then the end of the answer.

    Prompt and answer are tokenized apart, since tokens merged across their border would show training a prompt that
    generation never sees. An answer ends with the template's end-of-turn text, and with the end-of-text token unless
    a model stops at that text's last token anyway: so the end is learnt, and every tool stops there.

    A conversation is one example as far as each answer then stands behind the very tokens that generation would start
    from, and several where it does not, see `noisefit.inputs.turns`.

    Args:
        tokenizer: with the chat template that `set_chat_template` gave it.
        rows: questions and answers.
        max_length: tokens; what exceeds it is cut from the end.
        loss_on: `response` (the answers alone are supervised), `last` (the last of them) or `all`.
        stop_ids: tokens at which the model's own generation settings stop.

    Returns:
        The examples, and the numbers of the rows dropped because no token of their answer was left.

    Raises:
        InputError: the template cannot be rendered for a row.
    """
    examples, dropped = [], []
    for row, made in examples_by_row(tokenizer, rows, max_length, loss_on, stop_ids):
        examples += made
        dropped += [] if made else [row.number]
    return examples, dropped


def examples_by_row(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], max_length: int, loss_on: str, stop_ids: Iterable[int]
) -> Iterator[tuple[Row, list[Example]]]:
    """Each row with its examples, none where it is dropped; as `make_examples`."""
    end, stops = tokenizer.eos_token_id, {tokenizer.eos_token_id, *stop_ids}
    turns_end = bool(end_of_turn(tokenizer))
    left = iter(rows)
    while some := list(islice(left, TOGETHER)):
        for row, turns in zip(some, _tokenized(tokenizer, some, loss_on == "last"), strict=True):
            texts = join_turns(turns, turns_end)
            for text in texts:
                text.end_with(end, stops)
            parts = cut_texts(texts, max_length, everything=loss_on == "all")
            yield row, [Example(ids, spans[0][0], is_cut, row.weight, gaps=gaps_between(spans))
                        for ids, spans, is_cut in parts]  # fmt: skip


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], last_alone: bool
) -> list[list[tuple[list[int], list[int]]]]:
    """The tokens of each row's answers, or of its last one, each with those of its prompt: `(prompt, answer)`."""
    of_rows = [row.answers[-1:] if last_alone else row.answers for row in rows]
    turns = [turn for of_row in of_rows for turn in of_row]
    try:
        starts, prompts = zip(*(_prompt(tokenizer, prompt, history) for history, prompt, _ in turns), strict=True)
        answers = [answer_text(tokenizer, turn[1], turn[2], None if start else prompt, turn[0])
                   for turn, start, prompt in zip(turns, starts, prompts, strict=True)]  # fmt: skip
        how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids = tokenizer([*prompts, *answers], **how)["input_ids"]
        both = zip(starts, ids[: len(turns)], ids[len(turns) :], strict=True)
        pairs = [(start + prompt, answer) for start, prompt, answer in both]
    except Exception:  # one by one it is told of which row, and a tokenizer of somebody else's may want it so
        pairs = []
        for row, of_row in zip(rows, of_rows, strict=True):
            with naming_row(row):
                for history, prompt, response in of_row:
                    text = answer_text(tokenizer, prompt, response, history=history)
                    pairs.append((prompt_ids(tokenizer, prompt, history), token_ids(tokenizer, text)))
    left = iter(pairs)
    return [list(islice(left, len(of_row))) for of_row in of_rows]


@contextmanager
def naming_row(row: Row, path: str = "") -> Iterator[None]:
    """Put a row's number, and the file it is from, before what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}{': ' if path else ''}row {row.number}: {error}") from None


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], path: str, settings: PromptSettings,
    vocabulary: int, stop_ids: Iterable[int],
) -> list[Example]:  # fmt: skip
    """`usable_examples` of rows in memory, with lines about those that cannot be used, or not whole.

    Raises:
        InputError: as `usable_examples`; or no row is left.
    """
    examples, numbers, dropped = usable_examples(tokenizer, rows, path, settings, vocabulary, stop_ids)
    cut = dict.fromkeys(number for number, example in zip(numbers, examples, strict=True) if example.is_cut)
    tell_of_turns(path, tokenizer, repeated(numbers))
    tell_of_length(path, settings.max_length, dropped, list(cut), any_left=bool(examples or not rows))
    return examples


def usable_examples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], path: str, settings: PromptSettings,
    vocabulary: int, stop_ids: Iterable[int],
) -> tuple[list[Example], list[int], list[int]]:  # fmt: skip
    """`make_examples` with a run's settings.

    Args:
        tokenizer: with its chat template.
        rows: questions and answers.
        path: the file they are from, for the lines.
        settings: of the run.
        vocabulary: tokens that the model knows.
        stop_ids: as for `make_examples`.

    Returns:
        The examples, the number of each one's row, and the numbers of the rows dropped.

    Raises:
        InputError: as `make_examples`; or a row has a token that the model does not know.
    """
    examples, numbers, dropped = list[Example](), list[int](), list[int]()
    try:
        for row, made in examples_by_row(tokenizer, rows, settings.max_length, settings.loss_on, stop_ids):
            examples += made
            numbers += [row.number] * len(made)
            dropped += [] if made else [row.number]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for number, example in zip(numbers, examples, strict=True):
        check_tokens(example.input_ids, vocabulary, f"{path}: row {number}")
    return examples, numbers, dropped


def tell_of_turns(path: object, tokenizer: PreTrainedTokenizerBase, apart: Sequence[int] | SomeRows) -> None:
    """A line about conversations that became several examples, if any."""
    if number := SomeRows.of(apart).number:
        notice(f"{path}: {number} conversation{'s are' if number > 1 else ' is'} trained in several texts, each answer "
               f"behind what generation would see before it, since {why_turns_are_apart(tokenizer)} "
               f"({name_rows(apart)})")  # fmt: skip


def repeated(numbers: Sequence[int]) -> list[int]:
    """The rows that have several examples; `numbers` has that of each example's row, in the order of the rows."""
    return list(dict.fromkeys(a for a, b in pairwise(numbers) if a == b))


def tell_of_length(
    path: object, max_length: int, dropped: Sequence[int] | SomeRows, cut: Sequence[int] | SomeRows, any_left: bool,
    is_cut: bool = True,
) -> None:  # fmt: skip
    """Lines about rows too long: `dropped` leave no room for an answer, `cut` for the beginning of one, which is cut or
    the row dropped too. Raises `InputError` where none is left."""
    if SomeRows.of(dropped).number:
        notice(describe_skipped(path, dropped, f"whose prompt leaves no answer within {max_length} tokens"))
    number = SomeRows.of(cut).number
    if number and not is_cut:
        notice(describe_skipped(path, cut, f"longer than --max_length {max_length} tokens; --long_rows cut cuts them, "
                                           "and their end is not learnt"))  # fmt: skip
    if not any_left:
        raise InputError(f"{path}: no row has an answer within --max_length {max_length}; raise it")
    if number and is_cut:
        notice(f"{path}: of {number} row{'s' if number > 1 else ''} the answer's end is cut off at --max_length "
               f"{max_length}, so it is not learnt ({name_rows(cut)})")  # fmt: skip


def check_tokens(input_ids: Iterable[int], vocabulary: int, where: str) -> None:
    """Raise `InputError` where a token has no embedding: the tokenizer is of another model, or was enlarged."""
    largest = max(input_ids, default=0)
    if largest >= vocabulary:
        raise InputError(
            f"{where}: the tokenizer makes a token of number {largest}, but the base model has embeddings for "
            f"{vocabulary}: the adapter or tokenizer is of a model with a larger vocabulary; give that one"
        )


def stop_token_ids(model: str, revision: str | None = None) -> list[int]:
    """Tokens at which the base model's own generation settings stop; empty where it has none. On the hub they are
    those of its `revision`.

    Raises:
        InputError: there are such settings, and they cannot be read.
    """
    try:
        return end_token_ids(GenerationConfig.from_pretrained(model, revision=revision or "main"))
    except OSError as error:
        if (Path(model) / "generation_config.json").exists():
            raise InputError(f"{model}/generation_config.json: not to be read: {error}") from None
        return []
    except InputError as error:
        raise InputError(f"{model}: {error}") from None
    except Exception as error:  # of what stands in a file that somebody else wrote
        raise InputError(f"{model}/generation_config.json: not to be read: {error}") from None


def end_token_ids(config: GenerationConfig) -> list[int]:
    """`eos_token_id`, one token, several or none, as a list. Raises `InputError` where it is none of these."""
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < 2**31 for end in ends):
        raise InputError(f"the model's generation settings: eos_token_id is {ends}, expected numbers of tokens")
    return ends
