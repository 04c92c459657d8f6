"""`--help` of a program with many flags: those that matter first, the others by name, and all that a word is about."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

ALL = "all"


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, first: Sequence[str], help: str, **_: Any):
        super().__init__(option_strings, dest, "?", "", argparse.SUPPRESS, help=help, metavar="WORD")
        self.first = first

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(help_text(parser, self.first, values))
        parser.exit()


def add_help(parser: argparse.ArgumentParser, first: Sequence[str]) -> None:
    """Give a parser that has none, and all its flags, a `--help [WORD]`.

    Args:
        parser: made with `add_help=False`.
        first: the names of the flags that matter first.
    """
    text = "the flags that matter first; those about a word; all: every flag"
    parser.add_argument("-h", "--help", action=_Help, first=first, help=text)


def help_text(parser: argparse.ArgumentParser, first: Sequence[str], word: str) -> str:
    """What `--help WORD` prints.

    Args:
        parser: with its flags in groups.
        first: the names of the flags that are shown where `word` is empty.
        word: `all`, or what the flags shown have in their name, their text or their group's title. Where none has it,
            a line says so before the flags that matter first.
    """
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    shown = {group.title: _shown(group, first, word.strip("-").lower()) for group in parser._action_groups}
    if not word or not any(shown.values()):
        formatter.add_text(f"No flag is about {word!r}." if word else parser.description)
        by_name = {action.dest: action for action in reversed(parser._actions) if action.help != argparse.SUPPRESS}
        _add_section(formatter, "the flags that matter first", [by_name[name] for name in first])
        width = formatter._width
        return f"{formatter.format_help()}\n{_names(parser, width)}"
    formatter.add_text(parser.description if word == ALL else None)
    for title, actions in shown.items():
        if actions:
            _add_section(formatter, title, actions)
    return formatter.format_help().rstrip()


def _shown(group: Any, first: Sequence[str], word: str) -> list[argparse.Action]:
    flags = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
    if not word or word == ALL or word in str(group.title).lower().split():
        return flags
    return [action for action in flags if word in f"{' '.join(action.option_strings)} {action.help}".lower()]


def _add_section(formatter: Any, title: str | None, actions: Sequence[argparse.Action]) -> None:
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()


def _names(parser: argparse.ArgumentParser, width: int) -> str:
    """Every flag by its name alone, and how to read what it does."""
    lines = ["every flag, by what it touches:"]
    for group in parser._action_groups:
        names = [action.option_strings[-1] for action in _shown(group, (), ALL) if action.option_strings]
        if names and group.title != "options":
            text = f"{group.title}: {' '.join(names)}"
            lines += textwrap.wrap(text, width - 2, initial_indent="  ", subsequent_indent="      ",
                                   break_on_hyphens=False)  # fmt: skip
    return "\n".join([*lines, "", "--help WORD shows the flags about it (--help memory), --help all every one with "
                                  "what it does."])  # fmt: skip
