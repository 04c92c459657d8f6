"""CSV, JSON Lines and Parquet: for any bytes rows or an `InputError`, and the rows that Python's own modules read."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_folder import byte_tokenizer

from noisefit.base.errors import InputError
from noisefit.benchmarks import write_questions
from noisefit.inputs.benchmark_data import BENCHMARKS, read_questions
from noisefit.inputs.prompts import make_examples, prompt_ids
from noisefit.inputs.tables import as_csv, read_prompts, read_records, read_rows
from noisefit.inputs.templates import set_chat_template

CELL = st.text(st.sampled_from("a\"',;\r\n\t\0 é€😀\u2028\ufeff+"), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELL, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tables")


def records_or_error(path: Path, content: bytes, columns: tuple[str, ...] = ("prompt",)):
    """What `read_records` makes of a file; `None` where it refuses, in one line that names the file."""
    path.write_bytes(content)
    try:
        return read_records(path, columns)
    except InputError as error:
        assert str(path) in str(error)
        return None


def by_the_csv_module(content: bytes) -> list[dict[str, str]]:
    rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) if row]
    header = [name or f"Unnamed: {i}" for i, name in enumerate(rows[0])]
    return [dict(zip(header, row, strict=True)) for row in rows[1:]]


@given(st.binary(max_size=60))
@example(b"\xff\xfep\0r\0")
def test_any_bytes_as_csv(folder, content):
    found = records_or_error(folder / "any.csv", b"prompt,response\n" + content)
    if found is not None:
        assert [record for _, record in found] == by_the_csv_module(b"prompt,response\n" + content)


@given(st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=5), st.sampled_from(["\n", "\r\n", "\r"]))
@example([["", "q", "a"]], "\r")  # whose rows another parser shifts by a cell
def test_what_the_csv_module_writes_is_read_as_it_was(folder, rows, line_end):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows([["id", "prompt", "response"], *rows])
    found = records_or_error(folder / "written.csv", text.getvalue().encode())
    assert [tuple(record.values()) for _, record in found] == [tuple(row) for row in rows]


@given(st.text(st.sampled_from('a",\r\n'), max_size=30))
@example("\r,q,a\r")
def test_any_row_ends_and_quotes(folder, text):
    content = b"id,prompt,response\r" + text.encode()
    found = records_or_error(folder / "ends.csv", content)
    if found is not None:
        assert [record for _, record in found] == by_the_csv_module(content)


@given(st.binary(max_size=80))
def test_any_bytes_as_json_lines(folder, content):
    found = records_or_error(folder / "any.jsonl", b'{"prompt": "a"}\n' + content)
    if found is not None:
        lines = [line for line in content.split(b"\n") if line.strip(b" \t\r\n")]
        assert [record for _, record in found[1:]] == [json.loads(line) for line in lines]


@given(st.lists(st.dictionaries(st.sampled_from(["prompt", "response", "x"]), JSON, max_size=3), max_size=5))
def test_any_objects_as_json_lines(folder, objects):
    lines = [json.dumps(value) for value in [{"prompt": "a"}, *objects]]
    found = records_or_error(folder / "objects.jsonl", "\n".join(lines).encode())
    assert json.dumps([record for _, record in found[1:]]) == json.dumps(objects)
    try:
        for row in read_rows(folder / "objects.jsonl")[0]:
            assert objects[row.number - 2]["prompt"].strip() == row.prompt
    except InputError:
        pass


LIKELY = st.lists(CELL | st.just("x"), max_size=4)
FLAGS = st.lists(st.integers(0, 1), max_size=4)
TARGETS = st.fixed_dictionaries({"choices": LIKELY | JSON, "labels": FLAGS | JSON})
VALUE = st.fixed_dictionaries({}, optional={"value": CELL | JSON, "aliases": LIKELY | JSON})
CELLS = {
    "question": CELL | JSON, "choices": LIKELY | LIKELY.map(json.dumps) | JSON, "label": st.integers(-1, 4) | JSON,
    "mc1_targets": TARGETS | TARGETS.map(json.dumps) | JSON, "passage": CELL | JSON,
    "answer": CELL | LIKELY | VALUE | VALUE.map(json.dumps) | JSON, "problem": CELL | JSON,
    "possible_answers": LIKELY | LIKELY.map(json.dumps) | JSON,
}  # fmt: skip


@given(st.lists(st.fixed_dictionaries({}, optional=CELLS), max_size=4), st.sampled_from(sorted(BENCHMARKS)))
@example([{"question": "q", "choices": '["\\ud800", "b"]', "label": 0}], "truthfulqa")
def test_any_objects_as_a_benchmark(folder, objects, name):
    """Questions that are read again as they were written, or a line that names the file."""
    data, output = folder / "benchmark.jsonl", folder / "questions.csv"
    data.write_text("".join(json.dumps(value) + "\n" for value in objects))
    try:
        questions, _ = read_questions(str(data), BENCHMARKS[name])
        write_questions(name, str(data), str(output), overwrite=True)
    except InputError as error:
        assert str(data) in str(error)
        return
    records, rows, skipped = read_prompts(output, strip=False)
    assert records == questions and [row.prompt for row in rows] == [q["prompt"] for q in questions] and not skipped


ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"]) | JSON
TURN = st.fixed_dictionaries({}, optional={"role": ROLE, "content": CELL | JSON, "from": ROLE, "value": CELL | JSON})
PAIR = st.tuples(CELL, CELL).map(lambda p: [{"from": "human", "value": p[0]}, {"role": "assistant", "content": p[1]}])
TURNS = st.lists(PAIR, max_size=3).map(lambda pairs: [turn for pair in pairs for turn in pair])
CHAT = TURNS | st.tuples(TURNS, st.lists(TURN, max_size=2)).map(lambda parts: parts[0] + parts[1]) | JSON
CHATS = st.fixed_dictionaries(
    {}, optional={"messages": CHAT | CHAT.map(json.dumps), "conversations": CHAT, "prompt": CELL, "response": CELL}
)


@pytest.fixture(scope="module")
def chatml():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    return tokenizer


@given(st.lists(CHATS, min_size=1, max_size=3))
@example([{"messages": "[" * 100_000}])
@example([{"messages": '[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]'}])
def test_any_conversations(folder, chatml, records):
    """Rows, the same from a CSV, whose answers stand behind what generation is asked; or a line that names the file."""
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        asked = read_prompts(data)[1]
        assert all(row.prompt for row in asked)
        rows = read_rows(data)[0]
    except InputError as error:
        assert str(error).startswith(f"{data}: ") and "\n" not in str(error)
        return
    assert all(row.prompt and row.response for row in rows)
    (folder / "chats.csv").write_bytes(as_csv([{"n": "1"} | record for record in records]))
    assert read_rows(folder / "chats.csv")[0] == rows
    for row in rows:
        [example], _ = make_examples(chatml, [row], 10_000)
        starts = [len(prompt_ids(chatml, prompt, history)) for history, prompt, _ in row.answers]
        assert [start for start, _ in example.spans] == starts
        assert example.input_ids[: starts[-1]] == prompt_ids(chatml, row.prompt, row.history)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": ' * 50_000, "9" * 5000, "\ufeff{}"])
def test_json_that_is_too_much(folder, text):
    assert records_or_error(folder / "much.jsonl", text.encode()) is None


COLUMNS = {
    "text": pa.array(["a", None, "é"]),
    "number": pa.array([1, 2, None]),
    "image": pa.array([{"bytes": b"x", "path": "/etc/passwd"}] * 3),
    "sounds": pa.array([[b"x"], None, []]),
    "when": pa.array([0, 1, None], pa.timestamp("s")),
    "coded": pa.array(["a", "b", "a"]).dictionary_encode(),
    "nested": pa.array([{"a": [1]}, None, {"a": []}]),
    "amount": pa.array([None, None, None], pa.decimal128(5, 2)),
}
IMAGE = {"info": {"features": {"prompt": {"_type": "Image"}, "picture": {"_type": "Image"}}}}


@given(st.dictionaries(st.sampled_from(["prompt", "response", "picture", "z"]), st.sampled_from(sorted(COLUMNS))))
def test_any_columns_of_parquet(folder, chosen):
    """Whatever the file says of its columns, text is read as it is, and what holds bytes is left alone."""
    table = pa.table({name: COLUMNS[kind] for name, kind in chosen.items()})
    table = table.replace_schema_metadata({"huggingface": json.dumps(IMAGE)})
    path = folder / "any.parquet"
    pa.parquet.write_table(table, path)
    try:
        rows = read_rows(path)[0]
        pairs = zip(*(COLUMNS[chosen[name]].to_pylist() for name in ("prompt", "response")), strict=True)
        assert [(row.prompt, row.response) for row in rows] == [pair for pair in pairs if all(pair)]
    except InputError as error:
        assert str(path) in str(error)
    try:
        for record in read_prompts(path)[0]:
            assert not any(chosen[name] in ("image", "sounds") for name in record)
    except InputError as error:
        assert str(path) in str(error)


@given(st.binary(min_size=1, max_size=8), st.floats(0, 1))
def test_damaged_parquet(folder, damage, place):
    path = folder / "damaged.parquet"
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"], "response": ["c", "d"]}), path)
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    content[start : start + len(damage)] = damage
    records_or_error(path, bytes(content))
