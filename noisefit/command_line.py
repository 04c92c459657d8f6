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

BOOLEAN = argparse.BooleanOptionalAction


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage, and name the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            message += _nearest(message.split()[2].partition("=")[0], self)
        raise InputError(message.removeprefix("argument "))


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
        in_range = math.isfinite(value) and low <= value <= high and not (open_low and value == low)
        if not in_range and value not in also:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return convert


def flags_from_yaml(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML mapping of flag names to values, as words of a command line.

    Raises:
        InputError: the file cannot be read, is not a mapping, or names an unknown flag.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected lines such as 'epochs: 3'")
    words = []
    for name, value in settings.items():
        if f"--{name}" not in parser._option_string_actions or name in ("config", "help"):
            raise InputError(f"--config {path}: no flag is called {name!r}{_nearest(f'--{name}', parser)}")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words.extend([f"--{name}", *map(str, value)])
        elif value is not None:  # an empty value leaves the default
            words.append(f"--{name}={value}")
    return words


def hide_token(token: str) -> None:
    """Move the token to the environment, where huggingface_hub looks for it, and out of the recorded command line."""
    os.environ["HF_TOKEN"] = token
    sys.argv = [word.replace(token, "***") for word in sys.argv]


def _nearest(flag: str, parser: argparse.ArgumentParser) -> str:
    close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help"
