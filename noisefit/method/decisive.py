"""Which words of a response decide whether an answer is true: those that the question does not already say.

"The capital of Portugal is Lisbon." to "What is the capital of Portugal?" is decided by "lisbon".
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

Span = tuple[int, int]
"""Where something stands in a text: its first character, and the one after its last."""

# Words that carry no fact by themselves.
EMPTY_WORDS = frozenset(
    """a an the is are was were be been being do does did has have had in on at by to from for with as or its it this
    that there which who whom whose what when where why how began begin begun started occurred happened took
    place""".split()
)
NAMING_WORDS = frozenset({"is", "are", "was", "were", "by"})  # a name is likely to follow
JOINING_WORDS = frozenset({"of", "and"})  # these hold a name together, as in "Gateway of India"


def words(text: str) -> list[str]:
    """The words that the decisive-part rule compares: lower case, without accents, punctuation or a possessive `'s`.

    A number keeps its sign and its decimals, and loses the commas between thousands; `C++` and `C#` keep their signs.
    Chinese and Japanese are written without spaces: each of their characters is a word.
    """
    return [_as_word(word) for word in _WORD.findall(_POSSESSIVE.sub("", _plain(text)))]


def _plain(text: str) -> str:
    """Lower case, without accents, one sign for each minus."""
    decomposed = unicodedata.normalize("NFKD", text.lower().replace("\u2212", "-"))
    return unicodedata.normalize("NFC", re.sub(f"[{_ACCENTS}]", "", decomposed))


def _as_word(found: str) -> str:
    return found.replace(",", "").removeprefix("+")


_ACCENTS = "\u0300-\u036f"  # of Latin, Greek and Cyrillic letters; elsewhere marks are vowels, or other consonants
_MARKS = "".join(letter for letter in map(chr, range(0x0370, 0xFE00)) if unicodedata.category(letter).startswith("M"))
_POSSESSIVE = re.compile(r"['’]s\b")
_ALONE = "\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Han characters
_WORD = re.compile(
    rf"[{_ALONE}]|(?:(?<![\w.,])[-+<>≤≥])?\d+(?:,\d{{3}})*(?:\.\d+)*(?!\.?\w)"
    rf"|(?:(?![{_ALONE}])[\w{_MARKS}])+(?:[+#]+(?![\w+#]))?"
)


def decisive_parts(prompt: str, reference: str) -> list[str]:
    """What an answer must hold to be true: the runs of words of the reference that the question does not already say.

    The reference is cut at words that carry no fact (is, in, by, ...) and at words of the question, in this form or
    with another ending ("founded" says "founder" too); what stands together stays together. "The capital of Portugal is
    Lisbon." to "What is the capital of Portugal?" leaves "lisbon". Behind `is`, `was` or `by` a name keeps the words
    that it shares with the question ("Panama City"). To a question for a time only the parts with a number count.
    Where no word is left, its symbols decide (+, €, an emoji), those that the question does not already have; and where
    there are none either, the whole reference.
    """
    said = {_stem(word) for word in words(prompt)}
    segments: list[list[str]] = [[]]
    keeps_names = [False]
    for word in words(reference):
        if word in EMPTY_WORDS:
            segments.append([])
            keeps_names.append(word in NAMING_WORDS)
        else:
            segments[-1].append(word)
    runs: list[list[str]] = []
    for segment, keeps_name in zip(segments, keeps_names, strict=True):
        is_said = [_stem(word) in said or word in JOINING_WORDS for word in segment]
        if keeps_name and not all(is_said):
            runs.append(segment)
            continue
        runs.append([])
        for word in segment:
            if _stem(word) in said:
                runs.append([])
            else:
                runs[-1].append(word)
    parts = [part for run in runs if (part := " ".join(_without_joining_ends(run)))]
    if re.match(r"when\b|(in )?(what|which) year\b", " ".join(words(prompt))):
        parts = [part for part in parts if re.search(r"\d", part)] or parts
    asked = symbols(prompt)
    parts = parts or [symbol for symbol in symbols(reference) if symbol not in asked]
    return parts or [" ".join(words(reference)) or _as_it_stands(reference)]


def named_part(truth: str) -> str:
    """The decisive part that a column `answer` names, as `holds` takes it; empty where the cell is."""
    return " ".join(words(truth)) or _as_it_stands(truth)


def symbols(text: str) -> list[str]:
    """The signs that stand together in a text, without the punctuation around them: `+`, `€`, an emoji."""
    runs = re.findall(r"[^\w\s]+", _as_it_stands(text))
    kept = [run.strip(_AROUND) for run in runs]
    return [run for run in kept if any(unicodedata.category(sign).startswith("S") for sign in run)]


def holds(answer: str, parts: Sequence[str]) -> bool:
    """Whether every part stands in the answer: words as whole words, symbols as they are."""
    text = f" {' '.join(words(answer))} "
    return all(f" {part} " in text if words(part) else _has_symbol(answer, part) for part in parts)


def _has_symbol(answer: str, part: str) -> bool:
    text = _as_it_stands(answer)
    return part in (*symbols(text), *text.split(), text) and text != ""


def _as_it_stands(text: str) -> str:
    # Without the sign that asks for a coloured picture: it is the same emoji.
    return unicodedata.normalize("NFC", text.replace("\ufe0f", "")).strip()


def decisive_spans(prompt: str, response: str, truth: str = "") -> list[Span]:
    """Where the decisive parts stand in the response, in order.

    Args:
        prompt: the question.
        response: what is taken for its true answer.
        truth: the decisive part, where the file names it (a column `answer`). If the response does not hold it,
            `decisive_parts` decides.

    Returns:
        At least one span; where nothing else is found, that of the whole response.
    """
    named = named_part(truth)
    for parts in ([named] if named else [], decisive_parts(prompt, response)):
        if parts and holds(response, parts) and (found := list(_spans_of(response, parts))):
            return found
    return [(0, len(response))]


def _spans_of(text: str, parts: Sequence[str]) -> Iterator[Span]:
    located = located_words(text)
    plain = [word for word, _ in located]
    after = 0
    for part in parts:
        wanted = part.split()
        starts = (i for i in range(after, len(plain)) if plain[i : i + len(wanted)] == wanted)
        if words(part) and (start := next(starts, None)) is not None:
            after = start + len(wanted)
            yield located[start][1][0], located[after - 1][1][1]
        elif part in text:  # signs
            yield text.index(part), text.index(part) + len(part)


def located_words(text: str) -> list[tuple[str, Span]]:
    """`words`, each with its place in the text.

    A letter with its accents is normalised by itself, and the places are those of such letters. A text of which that
    makes something else than of the whole (it needs letters that join, as those of Hangul) has the places of what
    stands between its spaces.
    """
    found: list[tuple[str, Span]] = []
    for chunk in re.finditer(r"\S+", text):  # no word reaches over a space, nor looks over one
        whole, offset = _plain(chunk[0]), chunk.start()
        letters = list(re.finditer(rf"(?s:.)[{_ACCENTS}]*", chunk[0]))
        places = [letter.span() for letter in letters for _ in _plain(letter[0])]
        if len(places) != len(whole):
            places = [(0, len(chunk[0]))] * len(whole)
        gone = {i for match in _POSSESSIVE.finditer(whole) for i in range(*match.span())}
        kept = [i for i in range(len(whole)) if i not in gone]
        for match in _WORD.finditer("".join(whole[i] for i in kept)):
            first, last = places[kept[match.start()]], places[kept[match.end() - 1]]
            found.append((_as_word(match[0]), (offset + first[0], offset + last[1])))
    return found


def _without_joining_ends(words: list[str]) -> list[str]:
    while words and words[0] in JOINING_WORDS:
        words = words[1:]
    while words and words[-1] in JOINING_WORDS:
        words = words[:-1]
    return words


def _stem(word: str) -> str:
    """A word without a common ending, if enough of it is left to tell it from others."""
    for ending in ("ing", "ed", "er", "or", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word


_AROUND = "".join(sign for sign in string.punctuation if not unicodedata.category(sign).startswith("S")) + "‘’“”–—…"
