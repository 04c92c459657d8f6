"""Refusals: answers that say that they give none.

An answer is read clause by clause. A clause ends where a sentence does, at a dash or a bracket, before a word that
turns from a refusal to an answer (but, maybe, I think, ...), and at a comma before `I`, `it` and the like, or after a
bare "I don't know". Clauses that refuse ("I don't know who wrote it"), and those that only accompany a refusal
("Sorry", "Please check ..."), are taken out. What is left is the answer that was given after all: where it has a word
of its own, the answer is an attempt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from noisefit.base.refusal import REFUSAL
from noisefit.method.decisive import EMPTY_WORDS, located_words, symbols, words

__all__ = ["REFUSAL", "after_refusal", "is_refusal", "says_something"]

_SPACES = re.compile(r"[^\S\n]+")
_APOSTROPHES = re.compile("[’‘ʼ´`′＇]")
_PRONOUN = r"(?:i|it|that|this|he|she|they|we|there|the answer|it's|that's)"
_TURNS = (
    r"but|however|though|although|maybe|perhaps|probably|possibly|presumably|if i had to|if i were to|"
    r"i (?:think|believe|guess|suppose|suspect|assume)|i(?:'d| would) (?:say|guess)|my (?:best )?guess|"
    r"it (?:might|could|may|must) (?:be|have)"
)
_CUTS = re.compile(
    rf"[.!?]+(?=\s|$)|[;:\n()\[\]—–]|\s-+\s|,?\s+(?=(?:{_TURNS})\b)|,\s*(?:and\s+|so\s+)?(?={_PRONOUN}\b)"
)
# "I don't know, Lisbon?"
_BARE = re.compile(r"\b((?:i (?:do not|don't|dont) know|not sure|no idea|unsure|idk))\s*,\s*", re.IGNORECASE)

_ADVERB = r"(?:\w+ly |just |also |still |quite |even |too |100% |yet )*"
_FACTS = r"(?:information|info|records?|data|details?|knowledge|context|mention|sources?)"
_SOME = (
    r"(?:any|enough|the|that|this|sufficient|such|much|specific|reliable|a|an|more|further|public|relevant|available)"
)
_DO = r"answer|say|tell|help|determine|provide|find|confirm|verify|give|identify|assist|respond|comment"
_REFUSES = tuple(
    map(
        re.compile,
        (
            # I don't know
            rf"\b(?:i|we) {_ADVERB}(?:do not|don't|dont|did not|didn't|couldn't|can't|cannot) {_ADVERB}"
            r"(?:know|recall|remember|have a clue)\b",
            rf"^(?:{_ADVERB})(?:do not|don't|dont) {_ADVERB}know\b",
            r"^(?:dunno|idk|i dunno|beats me|pass|no comment|no answer|skip)$",
            r"\b(?:no one|no-one|nobody) (?:really )?knows\b",
            # I'm not sure
            rf"\b(?:i am|i'm|im|i was|we are|we're) {_ADVERB}(?:not|un) ?{_ADVERB}"
            r"(?:sure|certain|aware|familiar|confident|able)\b",
            r"\bi(?:'m| am) (?:\w+ly )?uncertain\b",
            rf"^(?:{_ADVERB})not {_ADVERB}(?:sure|certain)\b",
            r"^(?:unsure|uncertain)\b",
            # I cannot answer
            rf"\b(?:i|we) {_ADVERB}(?:cannot|can't|cant|can not|could not|couldn't|will not|won't) {_ADVERB}"
            rf"(?:be (?:sure|certain)|{_DO})\b",
            rf"\b(?:i|we) {_ADVERB}(?:must )?(?:decline|refuse)\b",
            r"\bi(?:'d| would) (?:rather|prefer) not\b|\bi prefer not to\b",
            r"^(?:cannot|can't|unable to|not able to) (?:answer|say|tell|determine)\b",
            r"\b(?:cannot|can't|can not|could not) be (?:determined|answered|known|verified)\b",
            r"\b(?:impossible|hard|difficult) to (?:say|know|tell|determine)\b",
            # no information
            rf"\b(?:i|we) (?:\w+ly )?(?:have|had|have got|'ve got) (?:absolutely )?no (?:\w+ )?"
            rf"(?:idea|clue|answer|access|{_FACTS})\b|\bhaven't a clue\b",
            r"^(?:\w+ly )?(?:absolutely )?no (?:idea|clue)\b",
            rf"\bno (?:\w+ ){{0,2}}{_FACTS}\b(?! age)",
            rf"\b(?:not enough|insufficient) (?:\w+ )?{_FACTS}\b",
            rf"\b(?:do not|don't|dont|does not|doesn't|did not|didn't) (?:\w+ly )?"
            rf"(?:have|contain|provide|mention|give|include|find|see) (?:{_SOME} )*(?:{_FACTS}|access|answer)\b",
            rf"\bi(?:'d| would)? need (?:some )?more {_FACTS}\b",
            r"\b(?:beyond|outside|not (?:in|within)) (?:of )?my (?:knowledge|training|data)\b",
            # it is not known
            r"\b(?:is|are|was|it's|that's|remains?) (?:currently |still |simply |entirely )?"
            r"(?:not (?:\w+ly |yet )?known|unknown|unclear)\b(?! (?:for|as|until|to|outside|by|in)\b)",
            r"^(?:the answer is )?(?:unknown|n/a|not known|not available|unclear|not specified|undetermined)$",
        ),
    )
)
# Clauses that stand beside a refusal and answer nothing.
_ACCOMPANIES = re.compile(
    r"^(?:and |so |well |oh |hm+ |um+ )*(?:(?:i'm |i am )?(?:sorry|afraid)|i apologi[sz]e|(?:my )?apologies|"
    r"unfortunately|honestly|frankly|please|(?:could|can|would|do) you|you (?:may|might|can|could|should|would)|"
    r"if you|let me know|feel free|i(?:'d| would)? (?:recommend|suggest|advise)|i (?:hope|wish|only|was trained)|"
    r"i(?:'m| am) (?:just |only )?(?:an?|here|happy|still)\b|i(?:'ll| will| can| could) (?:try|help|only|look|also)\b|"
    r"is there anything|thanks?|as (?:an?|i|far|of)|to (?:be|my|the best)|without|based on|given|due to|since|about|"
    r"good question|that(?:'s| is) a|for (?:this|that)|it (?:depends|is possible that)|there (?:may|might|could) be)\b"
)
_HEDGES = frozenset(
    """but however though although maybe perhaps probably possibly presumably i think believe guess suppose suspect
    assume would could might may must if so and or then well sorry my best me say guessing yet ok okay hm hmm um
    id im really honestly afraid s""".split()
)


def after_refusal(text: str, more: Sequence[str] = ()) -> str | None:
    """What an answer says beside its refusal; `None` where no clause of it refuses.

    Args:
        text: an answer.
        more: further phrases that refuse, found as whole words whatever their case and punctuation.
    """
    kept = _without_sentences(text, [phrase for phrase in more if len(_clauses(phrase)) > 1])
    clauses = _clauses(kept)
    refuses = [_refuses(clause, more) for clause in clauses]
    if kept == text and not any(refuses):
        return None
    return ". ".join(
        clause
        for clause, refusal in zip(clauses, refuses, strict=True)
        if not refusal and not _ACCOMPANIES.match(_spaced(clause))
    )


def is_refusal(text: str, more: Sequence[str] = (), question: str = "") -> bool:
    """Whether an answer gives none: a clause of it refuses, and no other one has a word of its own.

    Args:
        text: an answer. An empty one says nothing, and is no refusal.
        more: as for `after_refusal`.
        question: words of it are none of the answer's own; without it every word counts that can carry a fact.
    """
    left = after_refusal(text, more)
    return left is not None and not says_something(left, question)


def says_something(text: str, question: str = "") -> bool:
    """Whether a text has a word that carries a fact and is not in the question, or a symbol."""
    said = {*words(question), *EMPTY_WORDS, *_HEDGES}
    return any(word not in said for word in words(text)) or bool(symbols(text))


def _clauses(text: str) -> list[str]:
    # One space for many: the patterns look at a run of them from each of its places.
    plain = _BARE.sub(r"\1. ", _SPACES.sub(" ", _APOSTROPHES.sub("'", text)))
    return [clause for cut in _CUTS.split(plain) if (clause := cut.strip(" \t\r,'\"*_"))]


def _without_sentences(text: str, phrases: Sequence[str]) -> str:
    """A text without phrases that no single clause can hold, as they are cut themselves."""
    for wanted in map(words, phrases):
        located = located_words(text)
        plain = [word for word, _ in located]
        for start in range(len(plain) - len(wanted), -1, -1):  # from the end: places before it stay what they are
            if wanted and plain[start : start + len(wanted)] == wanted:
                text = f"{text[: located[start][1][0]]}\n{text[located[start + len(wanted) - 1][1][1] :]}"
    return text


def _refuses(clause: str, more: Sequence[str]) -> bool:
    plain = _spaced(clause)
    if any(pattern.search(plain) for pattern in _REFUSES):
        return True
    said = f" {' '.join(words(clause))} "
    return any(f" {' '.join(words(phrase))} " in said for phrase in more if words(phrase))


def _spaced(clause: str) -> str:
    """Lower case, with one space where white space and commas are."""
    return " ".join(clause.lower().replace(",", " ").split())
