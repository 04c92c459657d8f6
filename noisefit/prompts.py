"""One prompt format for training and generation: a chat template, and the tokens that it makes of a row."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from noisefit.data import Row, describe_skipped
from noisefit.errors import InputError, notice

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


@dataclass(frozen=True)
class Example:
    """A row as token ids; from `target_start` on they are supervised. `target_start` is at least 1."""

    input_ids: list[int]
    target_start: int

    @property
    def num_targets(self) -> int:
        return len(self.input_ids) - self.target_start


def check_chat_template(name: str | None) -> None:
    """Raise `InputError` where `--chat_template` is neither a known name nor a readable file."""
    if name is not None and name not in TEMPLATES:
        _read_template(name)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
    """Give the tokenizer the chat template that training and generation use; saved with it, it travels along.

    Also gives it a padding token where it has none: the end-of-text token, which is harmless, since what is padding
    and what is supervised is told by masks and never by a token's id.

    Args:
        tokenizer: changed in place.
        name: `chatml`, `alpaca`, the path of a Jinja file, or `None` for the tokenizer's own template, ChatML where
            it has none.

    Raises:
        InputError: the file cannot be read, or the template does not render a question and its answer.
    """
    if name is not None or not tokenizer.chat_template:
        template = TEMPLATES.get(name or "chatml") or _read_template(str(name))
        if name in (None, *TEMPLATES) and _adds_bos(tokenizer):
            # Templates are tokenized without special tokens; a model trained with this one at the start keeps it.
            template = "{{- bos_token -}}" + template
        tokenizer.chat_template = template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    answer_text(tokenizer, "Question?", "Answer.")


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
    return tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]


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
    """
    stops = {tokenizer.eos_token_id, *stop_ids}
    examples, dropped = [], []
    for row in rows:
        prompt = prompt_ids(tokenizer, row.prompt)
        answer = tokenizer(answer_text(tokenizer, row.prompt, row.response), add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None and (not answer or answer[-1] not in stops):
            answer = [*answer, tokenizer.eos_token_id]
        if len(prompt) >= max_length:
            dropped.append(row.number)
            continue
        target_start = len(prompt) if loss_on == "response" else 1
        examples.append(Example((prompt + answer)[:max_length], max(target_start, 1)))
    return examples, dropped


def tokenize_rows(args: Namespace, tokenizer: PreTrainedTokenizerBase, rows: list[Row], path: str) -> list[Example]:
    """`make_examples` with a run's settings, and a line about the rows that cannot be used.

    Args:
        args: the run's settings.
        tokenizer: with its chat template.
        rows: questions and answers.
        path: the file they are from, for the line.

    Raises:
        InputError: no row is left.
    """
    stop_ids = stop_token_ids(args.model)
    examples, dropped = make_examples(tokenizer, rows, args.max_length, args.loss_on, stop_ids)
    if dropped:
        notice(describe_skipped(path, dropped, f"whose prompt leaves no answer within {args.max_length} tokens"))
    if rows and not examples:
        raise InputError(f"{path}: no row has an answer within --max_length {args.max_length}; raise it")
    return examples


def stop_token_ids(model: str) -> list[int]:
    """Tokens at which the base model's own generation settings stop; empty where it has none."""
    try:
        return end_token_ids(GenerationConfig.from_pretrained(model))
    except OSError:
        return []


def end_token_ids(config: GenerationConfig) -> list[int]:
    """`eos_token_id`, which may be one token, several or none, as a list."""
    ends = config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise InputError(f"the chat template cannot be rendered: {error}; try --chat_template chatml") from None
    return str(text)


def _read_template(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(TEMPLATES)
        raise InputError(f"--chat_template {name}: not one of {known}, and not a readable file ({error})") from None


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
