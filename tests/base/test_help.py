"""`--help`: the flags that matter first, the others by name, and what a word is about."""

import re

import pytest

from noisefit.answers.settings import FIRST as ANSWER_FIRST
from noisefit.answers.settings import GROUPS as ANSWER_GROUPS
from noisefit.answers.settings import build_parser as build_answer_parser
from noisefit.base.settings import fields_of
from noisefit.run.settings import FIRST, GROUPS, build_parser

PROGRAMS = {
    "train_loop.py": (build_parser, GROUPS, FIRST),
    "generate.py": (build_answer_parser, ANSWER_GROUPS, ANSWER_FIRST),
}


def help_of(build, capsys, *words):
    with pytest.raises(SystemExit) as end:
        build().parse_args(["--help", *words])
    assert end.value.code == 0
    return capsys.readouterr().out


def flags_with_text(text):
    """Those that begin a line, as an entry with its text does."""
    return re.findall(r"^  (?:-h, )?(--\w+)", text, re.MULTILINE)


def squeezed(text):
    return " ".join(text.split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_ten_that_matter_first_have_their_texts_and_every_flag_is_named(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    build, groups, first = PROGRAMS[program]
    text = help_of(build, capsys)
    assert len(first) == 10 and sorted(flags_with_text(text)) == sorted(f"--{name}" for name in first)
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 120
    names = set(re.findall(r"--\w+", text.partition("every flag, by what it touches:")[2]))
    assert {f"--{field.name}" for cls in groups.values() for field in fields_of(cls)} <= names
    for name in first:
        [field] = [field for cls in groups.values() for field in fields_of(cls) if field.name == name]
        assert squeezed(field.rule.help) in squeezed(text), name


@pytest.mark.parametrize("program", PROGRAMS)
def test_all_shows_every_flag_once_and_a_word_those_about_it(program, capsys):
    build, groups, _ = PROGRAMS[program]
    every = flags_with_text(help_of(build, capsys, "all"))
    fields = {f"--{field.name}": field for cls in groups.values() for field in fields_of(cls)}
    assert fields.keys() <= set(every) and len(every) == len(set(every))
    found = flags_with_text(help_of(build, capsys, "prompt"))
    about = [flag for flag, field in fields.items() if "prompt" in f"{flag} {field.rule.help}".lower()]
    assert about and sorted(found) == sorted(about)


def test_a_word_that_no_flag_is_about_is_said_so(capsys):
    text = help_of(build_parser, capsys, "zebra")
    assert "No flag is about 'zebra'." in text and "the flags that matter first" in text


def test_what_the_experiment_found_stands_at_the_objective(capsys):
    assert "helped little or not at all in our worlds" in squeezed(help_of(build_parser, capsys, "loss_mode"))
