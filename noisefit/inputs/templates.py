"""One prompt format for training and generation: a chat template, and the text that it makes of a question."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from noisefit.base.errors import InputError, in_a_line
from noisefit.base.files import read_text
from noisefit.inputs.conversations import Message

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
# The text as it stands, and the answer right behind it: what a base model is asked in published evaluations.
PLAIN = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"
TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN}
BOS = "{{- bos_token -}}"
DATE_CALL = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
DATE_TEST = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")  # Llama 3's asks whether there is such a thing


def check_chat_template(name: str | None) -> None:
    """Raise `InputError` where `--chat_template` is neither a known name nor a readable file."""
    if name is not None and name not in TEMPLATES:
        _read_template(name)


def check_date(text: str) -> None:
    """Raise `InputError` where `--prompt_date` is no date."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"--prompt_date: {text[:40]!r} is no date; expected one as 2026-01-31T12:00:00") from None


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None, today: str | None = None) -> None:
    """Give the tokenizer the chat template that training and generation use; saved with it, it travels along.

    Where a template asks for today's date, the date is written into it: a run that is resumed tomorrow, or answers,
    sees the prompts of the training.

    Also gives it a padding token where it has none: the end-of-text token, which is harmless, since what is padding
    and what is supervised is told by masks and never by a token's id.

    Args:
        tokenizer: changed in place.
        name: one of `TEMPLATES`, the path of a Jinja file, or `None` for the tokenizer's own template, ChatML where
            it has none.
        today: date and time for a template that asks, see `asks_for_date`; `None` for now.

    Raises:
        InputError: the file cannot be read, or the template does not render a question and its answer.
    """
    if isinstance(tokenizer.chat_template, dict):  # several by name; the others are for tools and the like
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.chat_template is not None and not isinstance(tokenizer.chat_template, str):
        raise InputError(f"{tokenizer.name_or_path}: its chat template is no text; give another --chat_template")
    if name is not None or not tokenizer.chat_template:
        template = TEMPLATES.get(name or "chatml") or _read_template(str(name))
        if name in (None, *TEMPLATES) and _adds_bos(tokenizer):
            # Templates are tokenized without special tokens; a model trained with this one at the start keeps it.
            template = BOS + template
        tokenizer.chat_template = template
    tokenizer.chat_template = _with_date(tokenizer.chat_template, today)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    answer_text(tokenizer, "Question?", "Answer.")
    if prompt_text(tokenizer, "Question?") == prompt_text(tokenizer, "Another one?"):
        raise InputError("the chat template does not print the question; give another --chat_template")


def asks_for_date(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> bool:
    """Whether the chat template that `set_chat_template` would give it prints today's date."""
    template = tokenizer.chat_template if name is None else TEMPLATES.get(name) or _read_template(name)
    return "strftime_now" in str(template)


def _with_date(template: str, today: str | None) -> str:
    """The template with the date in place of each `strftime_now("...")`, which transformers gives to templates."""
    now = datetime.now() if today is None else datetime.fromisoformat(today)
    dated = DATE_CALL.sub(lambda call: json.dumps(now.strftime(call[1][1:-1])), template)
    dated = DATE_TEST.sub(lambda test: "false" if test[1] else "true", dated)
    if "strftime_now" in dated:
        raise InputError("the chat template asks for the date in a way that cannot be kept for the run; write it as "
                         "strftime_now('%d %b %Y'), with the format as text")  # fmt: skip
    return dated


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str, history: Sequence[Message] = ()) -> str:
    """The text that stands before an answer, ending where the answer begins; `history` has the turns before.

    Raises:
        InputError: the template cannot be rendered, or leaves one of these turns out.
    """
    text = _render(tokenizer, [*history, Message("user", prompt)], add_generation_prompt=True)
    if history:
        _check_turns(tokenizer, history)
    return text


def answer_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, before: str | None = None,
    history: Sequence[Message] = (),
) -> str:  # fmt: skip
    """The text that the template puts after `prompt_text`: the answer and its end-of-turn text, if it has one.

    Args:
        tokenizer: with its chat template.
        prompt, response: the question and its answer.
        before: `prompt_text` of the prompt, where it is known already.
        history: the turns before.

    Raises:
        InputError: the template renders an answered question with another beginning than the question alone.
    """
    before = prompt_text(tokenizer, prompt, history) if before is None else before
    messages = [*history, Message("user", prompt), Message("assistant", response)]
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if whole.startswith(before) and whole[len(before) :].strip() and response not in whole[len(before) :]:
        written = whole[len(before) :].strip()
        raise InputError(f"the chat template writes the answer {response[:60]!r} otherwise, as {written[:80]!r}, so it "
                         "would be trained as it is not; write it in the row as the template does, or give another "
                         "--chat_template")  # fmt: skip
    if not whole.startswith(before) or response not in whole[len(before) :]:
        raise InputError(
            "the chat template does not continue its generation prompt with the answer, so training and generation "
            "would see different prompts; use --chat_template chatml"
        )
    return whole[len(before) :].rstrip()


def _check_turns(tokenizer: PreTrainedTokenizerBase, history: Sequence[Message]) -> None:
    """Raise `InputError` where the template leaves out one of the turns before a question, whatever it says.

    Such a model would be trained, or asked, as if the turn were not there. What a template does to a turn's text, such
    as leaving out the thoughts of an earlier answer, is its own affair.
    """
    left_out = _left_out(tokenizer, str(tokenizer.chat_template), tuple(turn.role for turn in history))
    number = next((i for i in left_out if history[i].content), None)
    if number is not None:
        role = history[number].role
        what = "system prompt" if role == "system" else f"turn of the {role}"
        raise InputError(f"the chat template leaves out the {what} (turn {number + 1} of the conversation); give a "
                         "--chat_template that shows it, chatml say, or remove the turn")  # fmt: skip


@lru_cache(maxsize=256)
def _left_out(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> tuple[int, ...]:
    """The places of turns with these roles that are not in the prompt of the question behind them."""
    marks = [f"Mark{i}of{role}." for i, role in enumerate(roles)]
    turns = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
    text = _render(tokenizer, [*turns, Message("user", "Question?")], add_generation_prompt=True)
    return tuple(i for i, mark in enumerate(marks) if mark not in text)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that ends an answer in the chat template; empty where it has none."""
    return answer_text(tokenizer, "Question?", "Answer.").rpartition("Answer.")[2].strip()


def why_turns_are_apart(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why the answers of a conversation are likely not to stand in one text as generation would see each."""
    if not end_of_turn(tokenizer):
        return "the chat template has no end of a turn, so a model learns to stop only where the text ends"
    question, history = "Question?", (Message("user", "Question?"),)
    for answer in ("Answer.", "<think>\nThought.\n</think>\n\nAnswer."):  # thoughts are what templates leave out
        with suppress(InputError):
            so_far = prompt_text(tokenizer, question) + answer_text(tokenizer, question, answer)
            then = prompt_text(tokenizer, "Another?", (*history, Message("assistant", answer)))
            if not then.startswith(so_far):
                return "the chat template writes an earlier turn otherwise once the next one stands behind it"
    return "the tokenizer joins the end of an answer with what stands behind it"


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
        str(text).encode()
    except Exception as error:  # a template is a program: it may do anything, recurse, or print half a surrogate
        reason = in_a_line(error)
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
