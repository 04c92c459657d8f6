"""What the programs' command lines share: errors of one line, checked numbers, flags from YAML, a hidden token."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from noisefit.errors import InputError
from noisefit.files import read_text

BOOLEAN = argparse.BooleanOptionalAction


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage, and name the flag that was meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's, of words that can be written down: names of files go to records, cards and trackers."""
        for word in (words := sys.argv[1:] if args is None else list(args)):
            if not _is_text(word):
                readable = word.encode(errors="backslashreplace").decode()[:200]
                raise InputError(f"{readable}: not UTF-8 text; if it is a file's name, rename the file")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            message += _nearest(message.split()[2].partition("=")[0], self)
        raise InputError(message.removeprefix("argument "))


def _is_text(word: str) -> bool:
    try:
        return b"\0" not in word.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 come as halves of surrogate pairs
        return False


def numbers(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A converter of one number, or of several with commas between, as a list."""
    return lambda text: [convert(part) for part in text.split(",") if part]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def number(
    kind: Callable[[str], Any], low: float, high: float = math.inf, *, open_low: bool = False, also: tuple = ()
) -> Callable[[str], Any]:
    """A converter of flag values to finite numbers from `low` to `high`.

    Args:
        kind: `int` or `float`.
        low, high: the range, both ends included.
        open_low: `low` itself is refused.
        also: further values that are accepted.
    """
    what = "a whole number" if kind is int else "a number"
    span = f"{'above' if open_low else 'at least'} {low:g}"
    if high != math.inf:
        span = f"above {low:g} and up to {high:g}" if open_low else f"from {low:g} to {high:g}"
    expected = " or ".join([f"{what} {span}", *map(str, also)])

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # Compared as it is: a whole number may be too large for a float. NaN is in no range.
        in_range = low <= value <= high and value != math.inf and not (open_low and value == low)
        if not in_range and value not in also:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {expected}")
        return value

    return convert


def a_path(text: str) -> str:
    """A flag's value that names a file, a folder, or a model on the hub; `~` is a home wherever it is written."""
    return os.path.expanduser(text)


def flags_from_yaml(file: Path, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML mapping of flag names to values, as words of a command line.

    A value is what is written there: a date, or a number beyond all bounds, is text for the flag to judge.

    Raises:
        InputError: the file cannot be read, is not such a mapping, or names an unknown flag or one flag twice.
    """
    where = f"--config {file}"
    try:
        root = yaml.compose(read_text(file, "--config "), yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {error}") from None
    except (RecursionError, ValueError) as error:  # lists in lists in lists; an escaped half of a surrogate
        raise InputError(f"{where}: not YAML: {type(error).__name__}: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{where}: expected lines such as 'epochs: 3'")
    words: list[str] = []
    seen: set[str] = set()
    for key, value in root.value:
        name, line = key.value if isinstance(key, yaml.ScalarNode) else "a list", key.start_mark.line + 1
        action = parser._option_string_actions.get(f"--{name}")
        if action is None or name in ("config", "help"):
            raise InputError(f"{where}: no flag is called {name!r}{_nearest(f'--{name}', parser)}")
        if name in seen:
            raise InputError(f"{where}: line {line}: {name} is given a second time; leave one of them out")
        seen.add(name)
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise InputError(f"{where}: line {line}: {name}: expected a value, or a list of values")
        texts = [part.value for part in parts]
        if isinstance(value, yaml.SequenceNode) and any(text.startswith("-") for text in texts):
            raise InputError(f"{where}: line {line}: {name}: a value begins with '-', as flags do")
        if isinstance(action, BOOLEAN):
            words.append(_switch(where, line, name, value))
        elif isinstance(value, yaml.SequenceNode):
            words.extend([f"--{name}", *texts])
        elif value.tag != _NULL:  # an empty value leaves the default
            words.append(f"--{name}={texts[0]}")
    return words


def _switch(where: str, line: int, name: str, value: yaml.Node) -> str:
    if value.tag not in (_BOOL, _NULL):
        raise InputError(f"{where}: line {line}: {name}: expected true or false")
    if value.tag == _NULL:
        raise InputError(f"{where}: line {line}: {name} has no value; expected true or false")
    return f"--{name}" if yaml.SafeLoader.bool_values[value.value.lower()] else f"--no-{name}"


_NULL, _BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"


def hide_token(token: str) -> None:
    """Move the token to the environment, where huggingface_hub looks for it, and out of the recorded command line."""
    os.environ["HF_TOKEN"] = token
    sys.argv = [word.replace(token, "***") for word in sys.argv]


def _nearest(flag: str, parser: argparse.ArgumentParser) -> str:
    close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help"
