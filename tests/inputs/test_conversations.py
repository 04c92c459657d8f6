"""Conversations in files: which columns are taken, what a row becomes, and one line for what cannot be used."""

import json

import pytest

from noisefit.base.errors import InputError
from noisefit.inputs.conversations import Message, transcript
from noisefit.inputs.tables import Row, as_csv, read_prompts, read_rows

SYSTEM, FIRST, SECOND = Message("system", "Be brief."), Message("user", "A?"), Message("assistant", "a.")
TURNS = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": " A?\n"},
    {"role": "assistant", "content": "a."}, {"role": "user", "content": "B?"}, {"role": "assistant", "content": " b."},
]  # fmt: skip
SHARE = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": SHARE[turn["role"]], "value": turn["content"]} for turn in TURNS]
WHOLE = Row(1, "B?", "b.", history=(SYSTEM, FIRST, SECOND))


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"conversations": SHAREGPT, "id": 3},
        {"conversations": TURNS},
        {"messages": TURNS, "conversations": [{"from": "human", "value": "another"}]},
        {"prompt": "the id of it", "messages": TURNS},  # as some sets have it
        {"prompt": "", "response": "", "messages": TURNS},
        {"messages": [turn | {"from": None, "value": None, "tool_calls": None} for turn in TURNS]},
        {"messages": [*TURNS, {"role": "user", "content": "nobody answers this"}]},
        {"messages": [*TURNS, {"role": "user", "content": ""}]},
    ],
)
def test_a_row_is_the_conversation_up_to_its_last_answer_whatever_the_file(record, tmp_path):
    import pyarrow.parquet

    json_lines = lines(tmp_path / "a.jsonl", record)
    (tmp_path / "a.csv").write_bytes(as_csv([record]))  # a list is JSON there
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    for path in (json_lines, tmp_path / "a.csv", tmp_path / "a.parquet"):
        assert read_rows(path) == ([WHOLE], [])


def test_prompt_and_response_go_before_a_conversation(tmp_path):
    record = {"prompt": "P?", "response": "r", "messages": TURNS}
    assert read_rows(lines(tmp_path / "a.jsonl", record))[0] == [Row(1, "P?", "r")]
    assert read_prompts(tmp_path / "a.jsonl")[1] == [Row(1, "P?", "")]
    some = lines(tmp_path / "b.jsonl", {"messages": TURNS}, {"prompt": "P?", "response": "r"}, {"messages": TURNS[1:3]})
    assert read_rows(some)[0] == [WHOLE, Row(2, "P?", "r"), Row(3, "A?", "a.")]


def test_a_prompt_is_the_conversation_up_to_the_last_turn_of_the_user(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"n": 1, "messages": TURNS}, {"messages": TURNS[:4]}, {"messages": TURNS[:2]})
    records, rows, skipped = read_prompts(path, strip=False)
    assert records[0] == {"n": 1, "messages": TURNS} and not skipped  # other columns and all turns go along
    history = (SYSTEM, FIRST, SECOND)
    assert rows == [Row(1, "B?", "b.", history=history), Row(2, "B?", "", history=history),
                    Row(3, "A?", "", history=(SYSTEM,))]  # fmt: skip
    assert rows[0].asked == rows[1].asked == "system: Be brief.\nuser: A?\nassistant: a.\nuser: B?"
    assert Row(1, "B?", "x").asked == "B?"


def test_conversations_that_differ_are_asked_otherwise():
    one = [Message("user", "A?\nassistant: a.\nuser: B?")]
    two = [Message("user", "A?"), Message("assistant", "a."), Message("user", "B?")]
    three = [Message("user", "A?\n  assistant: a."), Message("user", "B?")]
    assert len({transcript(messages) for messages in (one, two, three)}) == 3


def test_each_answer_stands_behind_what_it_answers():
    assert WHOLE.answers == [((SYSTEM,), "A?", "a."), ((SYSTEM, FIRST, SECOND), "B?", "b.")]
    assert Row(1, "A?", "a.").answers == [((), "A?", "a.")]


@pytest.mark.parametrize("place, field", [(1, "content"), (2, "content"), (4, "content")])
@pytest.mark.parametrize("empty", ["", " \n", None])
def test_rows_with_an_empty_turn_are_skipped(place, field, empty, tmp_path):
    turns = [turn | {field: empty} if i == place else turn for i, turn in enumerate(TURNS)]
    path = lines(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": turns}, {"messages": None})
    assert read_rows(path) == ([WHOLE], [2, 3])
    assert len(read_prompts(path)[1]) == (2 if place == 4 else 1)  # the last answer is not needed to ask


def test_a_system_prompt_may_be_empty(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": ""}, *TURNS[1:]]})
    assert read_rows(path)[0][0].history[0] == Message("system", "")


USER, ASSISTANT = TURNS[1:3]
BAD = {
    "no list": ("hello", "row 1: messages is 'hello', expected a list of {role, content}, .* in a CSV as JSON"),
    "repr": (str(TURNS), r"row 1: messages is \"\[\{'role': 'system', .*, expected a list"),
    "object": ({"role": "user"}, "row 1: messages is dict, expected a list"),
    "empty": ([], "row 1: messages is an empty list"),
    "texts": (["A?", "a."], "row 1: messages: turn 1 is str, expected {role, content}"),
    "role": ([USER, {"role": "bot", "content": "a"}], "turn 2: its role is 'bot', expected one of system, user, human"),
    "no role": ([USER, {"content": "a"}], "turn 2: its role is 'None'"),
    "from": ([{"from": "humans", "value": "a"}], "turn 1: its from is 'humans'"),
    "tool": ([USER, {"role": "tool", "content": "4"}], "turn 2: its role is 'tool'"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "turn 1: its content is list, expected text"),
    "number": ([USER, {"role": "assistant", "content": 4}], "turn 2: its content is int, expected text"),
    "calls": ([USER, ASSISTANT | {"tool_calls": [{}]}], "turn 2 has tool_calls, which is not supported"),
    "thoughts": (
        [USER, ASSISTANT | {"reasoning_content": "so"}],
        "turn 2 has reasoning_content, .* put it into content",
    ),
    "thinking": ([USER, ASSISTANT | {"thinking": "so"}], "turn 2 has thinking, which is not supported"),
    "weight": ([USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT], "turn 2: its weight is 0, but all answers are"),
    "train": ([USER, ASSISTANT | {"train": False}, USER, ASSISTANT], "turn 2: its train is False, but all answers"),
    "begins": ([ASSISTANT, USER, ASSISTANT], "turn 1 is the assistant's, at the beginning; expected one of the user"),
    "after system": ([TURNS[0], ASSISTANT], "turn 2 is the assistant's, after a turn of system"),
    "twice": ([USER, ASSISTANT, ASSISTANT], "turn 3 is the assistant's, after a turn of assistant"),
    "ends": ([USER, ASSISTANT, TURNS[0]], "its last turn is a system prompt"),
    "unanswered": ([TURNS[0], USER], "row 1: no turn of the conversation is the assistant's.*remove the row"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation_is_one_line(name, tmp_path):
    turns, message = BAD[name]
    path = lines(tmp_path / "a.jsonl", {"messages": turns})
    with pytest.raises(InputError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}: row 1: ") and "\n" not in str(caught.value)


def test_a_file_of_neither_says_what_it_may_have(tmp_path):
    with pytest.raises(InputError, match="no column 'prompt'; columns found: text; or give messages or conversations"):
        read_rows(lines(tmp_path / "a.jsonl", {"text": "a"}))
    (tmp_path / "a.csv").write_text("prompt,Messages\na,b\n")
    with pytest.raises(InputError, match="no column 'response'"):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_beside_a_conversation_are_refused_whatever_the_file(name, tmp_path):
    import pyarrow.parquet

    for record in ({"messages": TURNS, name: [{"name": "add"}]}, {"messages": TURNS, name: '[{"name": "add"}]'}):
        (tmp_path / "a.csv").write_bytes(as_csv([record]))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
        for path in (lines(tmp_path / "a.jsonl", record), tmp_path / "a.csv", tmp_path / "a.parquet"):
            with pytest.raises(InputError, match=f"row 1 has {name}, which are not supported; leave such"):
                read_rows(path)
    for none in (None, "", [], "[]"):
        assert read_rows(lines(tmp_path / "a.jsonl", {"messages": TURNS, name: none})) == ([WHOLE], [])


def test_what_a_turn_says_beside_is_told_once(tmp_path, capsys):
    usual = [turn | {"name": "me", "weight": 1, "train": True, "thinking": None} for turn in TURNS]
    path = lines(
        tmp_path / "a.jsonl", *[{"messages": usual, "n": 1}] * 3, {"messages": [*TURNS[:4], TURNS[4] | {"id": 0}]}
    )
    assert len(read_rows(path)[0]) == 4
    assert capsys.readouterr().err == (
        f"{path}: of turns role and content alone are used; what they say beside is not: name, weight, train, id\n"
    )
    read_rows(lines(path, {"messages": [turn | {"weight": None} for turn in TURNS]}))
    read_rows(
        lines(path, {"messages": [turn | {"weight": 1.0} if turn["role"] == "assistant" else turn for turn in TURNS]})
    )
    assert capsys.readouterr().err == ""
