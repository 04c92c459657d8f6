"""One prompt format for training and generation: a chat template, and the tokens that it makes of a row."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from noisefit.data import Row, describe_skipped, name_rows
from noisefit.errors import InputError, notice
from noisefit.files import read_text

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
ALPACA = (
    "{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\\n\\n' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '### Response:\\n' + message['content'] + '\\n\\n' -}}"
    "{%- else -%}{{- message['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
)
TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA}
DATE_CALL = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")


@dataclass(frozen=True)
class Example:
    """A row as token ids; from `target_start` on they are supervised. `target_start` is at least 1.

    `is_cut` says that the end of its answer had no place.
    """

    input_ids: list[int]
    target_start: int
    is_cut: bool = False

    @property
    def num_targets(self) -> int:
        return len(self.input_ids) - self.target_start


def check_chat_template(name: str | None) -> None:
    """Raise `InputError` where `--chat_template` is neither a known name nor a readable file."""
    if name is not None and name not in TEMPLATES:
        _read_template(name)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None, today: str | None = None) -> None:
    """Give the tokenizer the chat template that training and generation use; saved with it, it travels along.

    Where a template asks for today's date, the date is written into it: a run that is resumed tomorrow, or answers,
    sees the prompts of the training.

    Also gives it a padding token where it has none: the end-of-text token, which is harmless, since what is padding
    and what is supervised is told by masks and never by a token's id.

    Args:
        tokenizer: changed in place.
        name: `chatml`, `alpaca`, the path of a Jinja file, or `None` for the tokenizer's own template, ChatML where
            it has none.
        today: date and time for a template that asks, see `asks_for_date`; `None` for now.

    Raises:
        InputError: the file cannot be read, or the template does not render a question and its answer.
    """
    if isinstance(tokenizer.chat_template, dict):  # several by name; the others are for tools and the like
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if name is not None or not tokenizer.chat_template:
        template = TEMPLATES.get(name or "chatml") or _read_template(str(name))
        if name in (None, *TEMPLATES) and _adds_bos(tokenizer):
            # Templates are tokenized without special tokens; a model trained with this one at the start keeps it.
            template = "{{- bos_token -}}" + template
        tokenizer.chat_template = template
    tokenizer.chat_template = _with_date(tokenizer.chat_template, today)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    answer_text(tokenizer, "Question?", "Answer.")


def asks_for_date(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> bool:
    """Whether the chat template that `set_chat_template` would give it prints today's date."""
    template = tokenizer.chat_template if name is None else TEMPLATES.get(name) or _read_template(name)
    return "strftime_now" in str(template)


def _with_date(template: str, today: str | None) -> str:
    """The template with the date in place of each `strftime_now("...")`, which transformers gives to templates."""
    now = datetime.now() if today is None else datetime.fromisoformat(today)
    dated = DATE_CALL.sub(lambda call: json.dumps(now.strftime(call[1][1:-1])), template)
    if "strftime_now(" in dated.replace(" ", ""):
        raise InputError("the chat template asks for the date in a format that is computed, so it cannot be kept for "
                         "the run; write the format as text in strftime_now(...)")  # fmt: skip
    return dated


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text that stands before an answer, ending where the answer begins."""
    return _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> str:
    """The text that the template puts after `prompt_text`: the answer and its end-of-turn text, if it has one.

    Raises:
        InputError: the template renders an answered question with another beginning than the question alone.
    """
    before = prompt_text(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if not whole.startswith(before) or response not in whole[len(before) :]:
        raise InputError(
            "the chat template does not continue its generation prompt with the answer, so training and generation "
            "would see different prompts; use --chat_template chatml"
        )
    return whole[len(before) :].rstrip()


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that ends an answer in the chat template; empty where it has none."""
    return answer_text(tokenizer, "Question?", "Answer.").rpartition("Answer.")[2].strip()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of `prompt_text`: what generation starts from, and what training puts before the answer."""
    return token_ids(tokenizer, prompt_text(tokenizer, prompt))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that a template has finished, with none added. `InputError` where the tokenizer fails."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    except Exception as error:  # its settings may come from a file that anybody wrote
        reason = " ".join(str(error).split())[:200] or type(error).__name__
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

    Args:
        tokenizer: with the chat template that `set_chat_template` gave it.
        rows: questions and answers.
        max_length: tokens; what exceeds it is cut from the end.
        loss_on: `response` (the answer alone is supervised) or `all`.
        stop_ids: tokens at which the model's own generation settings stop.

    Returns:
        The examples, and the numbers of the rows dropped because no token of their answer was left.

    Raises:
        InputError: the template cannot be rendered for a row.
    """
    stops = {tokenizer.eos_token_id, *stop_ids}
    examples, dropped = [], []
    for row in rows:
        with naming_row(row):
            prompt = prompt_ids(tokenizer, row.prompt)
            answer = token_ids(tokenizer, answer_text(tokenizer, row.prompt, row.response))
        if tokenizer.eos_token_id is not None and (not answer or answer[-1] not in stops):
            answer = [*answer, tokenizer.eos_token_id]
        if len(prompt) >= max_length:
            dropped.append(row.number)
            continue
        target_start = len(prompt) if loss_on == "response" else 1
        ids = prompt + answer
        examples.append(Example(ids[:max_length], max(target_start, 1), len(ids) > max_length))
    return examples, dropped


@contextmanager
def naming_row(row: Row, path: str = "") -> Iterator[None]:
    """Put a row's number, and the file it is from, before what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}{': ' if path else ''}row {row.number}: {error}") from None


def tokenize_rows(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, rows: list[Row], path: str, vocabulary: int
) -> list[Example]:
    """`make_examples` with a run's settings, and lines about the rows that cannot be used, or not whole.

    Args:
        args: the run's settings.
        tokenizer: with its chat template.
        rows: questions and answers.
        path: the file they are from, for the lines.
        vocabulary: tokens that the model knows.

    Raises:
        InputError: no row is left, or one has a token that the model does not know.
    """
    stop_ids = stop_token_ids(args.model)
    try:
        examples, dropped = make_examples(tokenizer, rows, args.max_length, args.loss_on, stop_ids)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if dropped:
        notice(describe_skipped(path, dropped, f"whose prompt leaves no answer within {args.max_length} tokens"))
    if rows and not examples:
        raise InputError(f"{path}: no row has an answer within --max_length {args.max_length}; raise it")
    if unused := set(dropped):
        rows = [row for row in rows if row.number not in unused]
    if cut := [row.number for row, example in zip(rows, examples, strict=True) if example.is_cut]:
        notice(f"{path}: of {len(cut)} row{'s' if len(cut) > 1 else ''} the answer's end is cut off at --max_length "
               f"{args.max_length}, which teaches not to stop ({name_rows(cut)})")  # fmt: skip
    for row, example in zip(rows, examples, strict=True):
        check_tokens(example.input_ids, vocabulary, f"{path}: row {row.number}")
    return examples


def check_tokens(input_ids: Iterable[int], vocabulary: int, where: str) -> None:
    """Raise `InputError` where a token has no embedding: the tokenizer is of another model, or was enlarged."""
    largest = max(input_ids, default=0)
    if largest >= vocabulary:
        raise InputError(
            f"{where}: the tokenizer makes a token of number {largest}, but the base model has embeddings for "
            f"{vocabulary}: the adapter or tokenizer is of a model with a larger vocabulary; give that one"
        )


def stop_token_ids(model: str) -> list[int]:
    """Tokens at which the base model's own generation settings stop; empty where it has none.

    Raises:
        InputError: there are such settings, and they cannot be read.
    """
    try:
        return end_token_ids(GenerationConfig.from_pretrained(model))
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


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        str(text).encode()
    except Exception as error:  # a template is a program: it may do anything, recurse, or print half a surrogate
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"the chat template cannot be rendered: {reason}; try --chat_template chatml") from None
    return str(text)


def _read_template(name: str) -> str:
    known = ", ".join(TEMPLATES)
    try:
        if not os.path.lexists(name):
            raise InputError(f"{name}: no such file")
        return read_text(Path(name))
    except InputError as error:
        raise InputError(f"--chat_template {name}: not one of {known}, and not a readable file ({error})") from None


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    try:
        return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    except Exception:  # as in `token_ids`, which will say so
        return False
