"""Where an answer ends, and the text that it is: the same whoever generates it."""

from __future__ import annotations

import bisect
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from noisefit.inputs.prompts import end_token_ids, token_ids
from noisefit.inputs.templates import end_of_turn


class Ending:
    """What ends an answer.

    Args:
        tokenizer: with the chat template of the prompts.
        generation_config: the model's own, which may name further tokens.

    Attributes:
        end_text: of the turn, by the chat template; empty where it has none.
        stop_ids: tokens that end an answer.
        stop_strings: text that does, where it is several tokens, which no id tells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig):
        self.tokenizer = tokenizer
        self.end_text = end_of_turn(tokenizer)
        self.stop_ids = stop_ids(generation_config, tokenizer, self.end_text)
        one_token = tokenizer.convert_tokens_to_ids(self.end_text) in self.stop_ids if self.end_text else True
        self.stop_strings = None if one_token else [self.end_text]

    def own_tokens(self, tokens: list[int]) -> list[int]:
        """A row without what stands behind the answer's end: up to the token that ended it, that one included."""
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        tokens = tokens if end is None else tokens[: end + 1]
        if not self.end_text or self.end_text not in self._decoded(tokens):
            return tokens
        # The end of the turn as several tokens: the first ones whose text holds it.
        at = bisect.bisect_left(range(len(tokens)), True, key=lambda i: self.end_text in self._decoded(tokens[: i + 1]))
        return tokens[: at + 1]

    def _decoded(self, tokens: list[int]) -> str:
        ends = [i for i, token in enumerate(tokens) if token in self.stop_ids]
        return str(self.tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True))

    def text(self, tokens: list[int]) -> str:
        """The answer's text, without its end, stripped."""
        text = self._decoded(tokens)
        return (text.partition(self.end_text)[0] if self.end_text else text).strip()


def asked_for(config: GenerationConfig) -> dict[str, Any]:
    """What a model's own generation settings ask for beyond defaults and tokens: it is not applied, and to be said."""
    defaults = dict(vars(GenerationConfig())) | {"use_cache": True}
    known = {"transformers_version", "eos_token_id", "bos_token_id", "pad_token_id"}
    given = {name: value for name, value in config.to_diff_dict().items() if name not in known}
    return {
        name: value
        for name, value in given.items()
        if value != defaults.get(name) and not name.startswith(("_", "output_", "return_dict"))
    }


def stop_ids(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, end_text: str) -> list[int]:
    """Tokens that end an answer: the model's own, the tokenizer's end of text, the end of turn if it is one token."""
    found = {tokenizer.eos_token_id, *end_token_ids(generation_config)}
    if end_text and len(token_ids(tokenizer, end_text)) == 1:
        found.add(tokenizer.convert_tokens_to_ids(end_text))
    return sorted(token for token in found if token is not None)
