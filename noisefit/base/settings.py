"""Settings as dataclasses: each field knows its flag's help and what values it may have, and command lines are made of
them. A value is held to the same rules whether it comes from a command line, a file or a program.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from noisefit.base.errors import InputError

RULE = "rule"  # the key of a field's metadata
LONG = 70  # letters of choices from which on they stand in a flag's text, not in the place of its value


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a setting may be.

    Attributes:
        help: what it does, for `--help` and the documentation.
        low, high: the range of a number, both ends included.
        open_low: `low` itself is refused.
        also: further numbers that are accepted.
        choices: of a text.
        metavar: stands for the value in `--help`.
        is_path: a file, a folder or a model's name: `~` is a home wherever it is written.
        whole_words: of a list: a word is one value, whatever commas it has.
    """

    help: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    also: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    is_path: bool = False
    whole_words: bool = False

    def number(self, kind: type, value: object) -> Any:
        """The value as a number of this kind. Raises `ValueError`, with what was expected, where it is none."""
        found: Any = math.nan
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                converted = kind(value)
                found = math.nan if isinstance(value, float) and converted != value else converted  # 2.5 rows
        # Compared as it is: a whole number may be too large for a float. NaN is in no range.
        in_range = self.low <= found <= self.high and abs(found) != math.inf
        if not (in_range and not (self.open_low and found == self.low)) and found not in self.also:
            raise ValueError(f"{str(value)[:80]!r} is not {self._expected(kind)}")
        return found

    def _expected(self, kind: type) -> str:
        what = "a whole number" if kind is int else "a number"
        span = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high != math.inf:
            between = ("above", "and up to") if self.open_low else ("from", "to")
            span = f"{between[0]} {self.low:g} {between[1]} {self.high:g}"
        return " or ".join([f"{what} {span}", *map(str, self.also)])


def setting(default: Any = dataclasses.MISSING, help: str = "", **rule: Any) -> Any:
    """A field of a settings dataclass.

    Args:
        default: its value where none is given; without it, it must be given.
        help: for `--help` and the documentation.
        rule: see `Rule`. The kind of the value is the field's annotation.
    """
    metadata = {RULE: Rule(help, **rule)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting of a class of settings, as it was declared."""

    name: str
    kind: type  # int, float, bool or str
    is_list: bool
    one_or_more: bool  # a list, or one value as itself; no commas are looked for, as names of files may have them
    optional: bool  # `None` is its default
    default: Any  # dataclasses.MISSING where it must be given
    rule: Rule

    def checked(self, value: Any) -> Any:
        """The value, converted. Raises `ValueError` where it is none for this setting."""
        if value is None and self.optional:
            return None
        if self.one_or_more:
            words = [value] if isinstance(value, (str, os.PathLike)) else [*value] if is_several(value) else []
            if not words:
                raise ValueError(f"{str(value)[:80]!r} is not text, nor a list of texts")
            found = [self._one(word) for word in words]
            return found if len(found) > 1 else found[0]
        if self.is_list:
            if isinstance(value, str) or not isinstance(value, Sequence):
                whole = self.rule.whole_words
                value = [part for part in ([str(value)] if whole else str(value).split(",")) if part]
            if not value:
                raise ValueError("expected at least one value")
            return [self._one(part) for part in value]
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if self.kind in (int, float):
            return self.rule.number(self.kind, value)
        if self.kind is bool:
            return boolean(value)
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"{value!r} is not text")
        text = os.fspath(value)
        if not _is_text(text):
            raise ValueError(f"{_readable(text)}: not UTF-8 text; if it is a file's name, rename the file")
        if self.rule.choices and text not in self.rule.choices:
            raise ValueError(f"invalid choice: {text[:80]!r} (choose from {', '.join(self.rule.choices)})")
        return os.path.expanduser(text) if self.rule.is_path else text

    def parse(self, text: str) -> Any:
        """For argparse: of a list several values may stand in one word, with commas between them."""
        try:
            return self.checked(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


def fields_of(settings: Any) -> Iterator[Field]:
    """The settings of a class of settings, or of one of its instances, in the order of their declaration."""
    cls = settings if isinstance(settings, type) else type(settings)
    hints = _hints_of(cls)
    for field in dataclasses.fields(cls):
        if RULE not in field.metadata:
            continue
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(kind for kind in kinds if kind is not type(None))
        whole = kinds[-1]  # str | list[str] is one or more
        is_list = typing.get_origin(whole) is list
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = typing.get_args(whole)[0] if is_list else whole
        yield Field(field.name, kind, is_list, len(kinds) > 1, default is None, default, field.metadata[RULE])


@functools.cache
def _hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def names_of(cls: type) -> list[str]:
    """The names of the settings of a class of settings."""
    return [field.name for field in fields_of(cls)]


def check_fields(settings: Any) -> None:
    """Hold each field to its rule, and convert it; for the `__post_init__` of a frozen dataclass.

    Raises:
        InputError: a value that its rule does not allow; the line names the flag.
    """
    for field in fields_of(settings):
        try:
            object.__setattr__(settings, field.name, field.checked(getattr(settings, field.name)))
        except ValueError as error:
            raise InputError(f"--{field.name}: {error}") from None


def not_default(settings: Any) -> frozenset[str]:
    """The names of the settings that have another value than their default."""
    return frozenset(field.name for field in fields_of(settings) if getattr(settings, field.name) != field.default)


def add_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type]) -> None:
    """Add a flag for each field of each group. Only flags that are given will be in the parser's namespace.

    Args:
        parser: gets them.
        groups: the title of each group, and its class.
    """
    for title, cls in groups.items():
        group = parser.add_argument_group(title)
        for field in fields_of(cls):
            options: dict[str, Any] = {"dest": field.name, "help": _help(field), "default": argparse.SUPPRESS}
            if field.kind is bool:
                on: dict[str, Any] = {"nargs": "?", "const": True, "type": field.parse, "metavar": "BOOL"}
                group.add_argument(f"--{field.name}", **options, **on)
                off: dict[str, Any] = options | {"help": argparse.SUPPRESS, "action": "store_const", "const": False}
                group.add_argument(f"--no_{field.name}", **off)
                continue
            if field.is_list:
                options |= {"nargs": "+", "action": _OneOrMore if field.one_or_more else _Extend}
            stands_for = {int: "N", float: "X", str: "PATH" if field.rule.is_path else "TEXT"}
            metavar = field.rule.metavar or stands_for[field.kind]
            if choices := _choices(field):
                metavar = choices if len(choices) <= LONG else "NAME"
            group.add_argument(f"--{field.name}", type=field.parse, metavar=metavar, **options)


def _help(field: Field) -> str:
    default = default_text(field)
    names = f". One of {', '.join(field.rule.choices)}" if len(_choices(field)) > LONG else ""
    return (field.rule.help + names + (f" (default: {default})" if default else "")).replace("%", "%%")


def _choices(field: Field) -> str:
    return "{" + ",".join(field.rule.choices) + "}" if field.rule.choices else ""


def default_text(field: Field) -> str:
    """A default as it is typed; empty where there is none, or it is off."""
    value = field.default
    if value is None or value is False or value is dataclasses.MISSING:
        return ""
    if isinstance(value, list):
        return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Extend(argparse.Action):
    """Joins the lists that the words of one flag are parsed to."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


class _OneOrMore(argparse.Action):
    """One word as it is, or a list of several."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def is_several(value: Any) -> bool:
    """Whether a value is a list or the like, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def words_of(value: str | Sequence[str] | None) -> list[str]:
    """A setting that may be one word or several, as a list; empty where it is `None`."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def boolean(value: Any) -> bool:
    """`True` or `False` as people write them. Raises `ValueError` for anything else."""
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    text = str(value).lower()
    if text not in known:
        raise ValueError(f"{str(value)[:80]!r} is not true or false")
    return known[text]


def _is_text(word: str) -> bool:
    try:
        return b"\0" not in word.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 come as halves of surrogate pairs
        return False


def _readable(word: str) -> str:
    return word.encode(errors="backslashreplace").decode().replace("\0", "\\x00")[:200]


def refuse_bytes(words: Collection[str]) -> None:
    """Raise `InputError` for a word that is not text: names of files go to records, cards and trackers."""
    for word in words:
        if not _is_text(word):
            raise InputError(f"{_readable(word)}: not UTF-8 text; if it is a file's name, rename the file")
