"""Settings that are lists of `key=value`, for options that another library names: their values, and one way to write
them, by which two lists that say the same are the same."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import yaml

from noisefit.base.errors import InputError, in_a_line

Kind = Callable[[Any], Any]
"""What a value may be: gives it converted, or raises `ValueError` with what was expected."""


def key_values(flag: str, words: Sequence[str]) -> dict[str, Any]:
    """The values by their keys, as YAML reads them: numbers, true and false, text, lists and mappings.

    Args:
        flag: that they were given to, for the line.
        words: each a `key=value`.

    Raises:
        InputError: a word is none, its value is not YAML, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{flag} {word[:80]}: expected key=value")
        if key in found:
            raise InputError(f"{flag}: {key} is given twice; leave one of them out")
        try:
            found[key] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise InputError(f"{flag} {word[:80]}: not YAML: {in_a_line(error)}") from None
    return found


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Undo of `key_values`: the same words for the same options, in the order of their keys."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in sorted(options.items())]


def converted(flag: str, key: str, value: Any, kind: Kind) -> Any:
    """The value as one of its kind. Raises `InputError` where it is none."""
    try:
        return kind(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{flag} {key}={str(value)[:80]}: expected {error}") from None


def did_you_mean(key: str, known: Collection[str]) -> str:
    """What was likely meant by a key that is none of the known ones, and which they are."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"


def truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def number(value: Any) -> int | float:
    """As most configurations have it: a whole one is an int. YAML takes 1e-3 for text."""
    found = float("nan") if isinstance(value, bool) else _number_or_nan(value)
    if not abs(found) < 1e9:
        raise ValueError("a number")
    return int(found) if found == int(found) else found


def _number_or_nan(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError):
        return float("nan")


def count(low: int) -> Kind:
    def kind(value: Any) -> int:
        found = number(value)
        if not isinstance(found, int) or found < low:
            raise ValueError(f"a whole number from {low}")
        return found

    return kind


def above_zero(value: Any) -> int | float:
    found = number(value)
    if found <= 0:
        raise ValueError("a number above 0")
    return found


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def one_of(*choices: Any) -> Kind:
    def kind(value: Any) -> Any:
        for choice in choices:
            if value == choice and type(value) is type(choice):
                return choice
        raise ValueError(f"one of {', '.join(json.dumps(choice).strip(chr(34)) for choice in choices)}")

    return kind


def list_of(part: Kind) -> Kind:
    """A list, as YAML has them or with commas between its values, or one value."""

    def kind(value: Any) -> list[Any]:
        if isinstance(value, str):
            value = [piece.strip() for piece in value.split(",") if piece.strip()]
        found = [part(one) for one in (value if isinstance(value, list) else [value])]
        if not found:
            raise ValueError("at least one value")
        return found

    return kind


def mapping_to(part: Kind) -> Kind:
    def kind(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value or not all(isinstance(key, str) and key for key in value):
            raise ValueError("a mapping such as {name: value}")
        return {key: part(one) for key, one in value.items()}

    return kind
