"""The answers of a conversation, in as few texts as show each behind the very tokens that generation starts from.

Where a template writes the turns one behind the other, that is one text. Where it writes an earlier turn otherwise once
others stand behind it (Qwen3's leaves out thoughts), or where tokens are joined over a turn's end, an answer begins a
text of its own: one text of the whole would train it behind a prompt that generation never sees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Span = tuple[int, int]


@dataclass
class Text:
    """Tokens, and where answers stand in them, each from its first token to behind its last one. It ends with one."""

    ids: list[int]
    answers: list[Span] = field(default_factory=list)

    def end_with(self, end: int | None, stops: Collection[int]) -> None:
        """Put the token `end` behind the last answer, unless it ends with a token that stops generation anyway.
        `None` is no token."""
        start, stop = self.answers[-1]
        if end is not None and (start == stop or self.ids[-1] not in stops):
            self.ids.append(end)
            self.answers[-1] = start, stop + 1


def join_turns(turns: Sequence[tuple[list[int], list[int]]], turns_end: bool) -> list[Text]:
    """The texts of a conversation.

    Args:
        turns: of each answer, in order, the tokens of its prompt, with all turns before it, and its own.
        turns_end: whether the template ends a turn. If not only the end of the text shows where an answer ends, so
            each has a text of its own.
    """
    texts: list[Text] = []
    for prompt, answer in turns:
        if texts and turns_end and prompt[: len(texts[-1].ids)] == texts[-1].ids:
            texts[-1].ids = prompt + answer
        else:
            texts.append(Text(prompt + answer))
        texts[-1].answers.append((len(prompt), len(prompt) + len(answer)))
    return texts


def cut_texts(
    texts: Sequence[Text], max_length: int, everything: bool
) -> Iterator[tuple[list[int], list[Span], bool]]:  # fmt: skip
    """The texts within `max_length`, those of which some answer has a token left.

    Args:
        texts: of a conversation.
        max_length: tokens of a text.
        everything: whether all tokens are supervised but the first, instead of the answers; of a further text those
            from where it parts from the one before.

    Yields:
        The tokens, up to the last one that is supervised; what is supervised; and whether the end of an answer had no
        place: of a text that was left out the one before it says so.
    """
    whole: list[tuple[list[int], list[Span], bool]] = []
    is_cut, before = False, list[int]()
    for text in texts:
        ids, answers = text.ids[:max_length], text.answers
        if everything:
            answers = [(_shared(before, text.ids), len(text.ids))] if answers[0][0] < max_length else []
        spans = [(max(start, 1), min(end, max_length)) for start, end in answers if start < max_length]
        is_cut |= len(text.ids) > max_length
        if spans:
            whole.append((ids[: spans[-1][1]], spans, len(text.ids) > max_length))
        before = text.ids
    for ids, spans, cut in whole[:-1]:
        yield ids, spans, cut
    for ids, spans, _ in whole[-1:]:
        yield ids, spans, is_cut


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def gaps_between(spans: Sequence[Span]) -> tuple[Span, ...]:
    """What stands between spans."""
    return tuple((end, start) for (_, end), (start, _) in pairwise(spans) if start > end)
