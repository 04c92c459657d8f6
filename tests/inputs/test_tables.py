"""Reading CSV, JSON Lines and Parquet, and one clear line for every file that cannot be used."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from running import python

from noisefit.base.errors import InputError
from noisefit.inputs.tables import Row, as_csv, describe_skipped, read_records, read_rows


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path):
    return [(row.number, row.prompt, row.response) for row in read_rows(path)[0]]


def test_csv_cells_are_text_whatever_they_look_like(tmp_path):
    path = write(
        tmp_path / "a[1].csv",  # brackets are a pattern to the reader's library
        'id,response,prompt\n1,007,When?\n2,None,Who?\n\n3,"a ""b"", c\nd", Quoted? \n4,1.50,NA\n',
    )
    expected = [(1, "When?", "007"), (2, "Who?", "None"), (3, "Quoted?", 'a "b", c\nd'), (4, "NA", "1.50")]
    assert rows_of(path) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path, name):
    lines = [{"prompt": "Größe?\u2028", "response": "groß", "n": 1}, {"n": "x", "prompt": "b", "response": " c "}]
    path = write(tmp_path / name, "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert rows_of(path) == [(1, "Größe?", "groß"), (3, "b", "c")]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {"n": [1, 2], "prompt": ["a", "b"], "response": ["c", None]}
    # In a process of its own: here another test may have imported what the reader needs.
    write_it = f"import datasets; datasets.Dataset.from_dict({rows}).to_parquet({str(path)!r})"
    read_it = f"from noisefit.inputs.tables import read_rows; print(len(read_rows({str(path)!r})[0]))"
    assert python("-c", write_it).returncode == 0
    assert python("-c", read_it).stdout == "1\n"
    assert read_rows(path) == ([Row(1, "a", "c")], [2])


@pytest.mark.parametrize(
    "name, text", [("a.csv", "prompt,response\na,b\n"), ("a.jsonl", '{"prompt":"a","response":"b"}')]
)
def test_a_byte_order_mark_is_accepted(tmp_path, name, text):
    assert rows_of(write(tmp_path / name, b"\xef\xbb\xbf" + text.encode())) == [(1, "a", "b")]


def test_an_edited_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,response\na,b\n")
    assert rows_of(path) == [(1, "a", "b")]
    assert rows_of(write(path, "prompt,response\na,c\n")) == [(1, "a", "c")]


def test_incomplete_rows_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,response\na,b\n,x\nc,\n d ,e\n" + "f,  \n" * 5)
    rows, skipped = read_rows(path)
    assert [row.number for row in rows] == [1, 4] and skipped == [2, 3, 5, 6, 7, 8, 9]
    line = describe_skipped(path, skipped, "with an empty or missing cell")
    assert line == f"{path}: skipped 7 rows with an empty or missing cell (row 2, 3, 5, 6, 7, ...)"
    json_lines = write(tmp_path / "a.jsonl", '{"prompt": null, "response": "b"}\n{"prompt": "a", "response": "b"}\n{}')
    assert read_rows(json_lines) == ([Row(2, "a", "b")], [1, 3])


def test_the_same_rows_in_every_kind_of_file(tmp_path):
    records = [{"prompt": "a", "response": "NA"}, {"prompt": "b, c", "response": "007"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    plain = {
        "a.csv": as_csv(records), "a.tsv": as_csv(records).replace(b'","', b'"\t"'), "a.jsonl": lines.encode(),
        "b.json": lines.encode(), "c.json": b"\xef\xbb\xbf \n" + json.dumps(records, indent=2).encode(),
    }  # fmt: skip
    packed = {f"{name}.{end}": how(content) for name, content in plain.items()
              for end, how in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress))}  # fmt: skip
    for name, content in (plain | packed).items():
        assert read_records(write(tmp_path / name, content), ("prompt", "response")) == [*enumerate(records, 1)], name
    table = pyarrow.Table.from_pylist(records)
    for name, new in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as file:
            file.write_table(table)
        assert read_records(tmp_path / f"{name}.arrow", ("response",)) == [*enumerate(records, 1)]


def test_only_the_columns_asked_for_are_needed(tmp_path):
    assert read_rows(write(tmp_path / "a.csv", "prompt\na\n"), columns=("prompt",))[0] == [Row(1, "a", "")]


def test_a_column_without_a_name_is_one_that_is_ignored(tmp_path):
    assert rows_of(write(tmp_path / "a.csv", ",prompt,response\n0,a,b\n")) == [(1, "a", "b")]  # as pandas writes it


BAD = {
    "empty.csv": (b"", "the file is empty"),
    "blank.csv": (b"\n\n", "the file is empty"),
    "header.csv": (b"prompt,response\n", "has no rows"),
    "columns.csv": (b"n,Promt,response\n1,a,b\n", "no column 'prompt'; columns found: n, Promt, .*; rename 'Promt'"),
    "semicolon.csv": (b"prompt;response\na;b\n", "no column 'prompt'; columns found: prompt;response"),
    "unclosed.csv": (b'prompt,response\na,"b\n', "the row on line 2 is not CSV: a quote in it is never closed"),
    "surrogate.jsonl": (b'{"prompt":"\\ud800","response":"b"}', "row 1 holds half of a surrogate pair"),
    "twice.csv": (b"prompt,response,prompt\na,b,c\n", "'prompt' appears 2 times"),
    "wide.csv": (b"prompt,response\na,b\nWhere?,Paris, France\n", r"row 2 \(line 3\) has 3 cells, expected 2.*quotes"),
    "narrow.csv": (b"prompt,response\na\n", r"row 1 \(line 2\) has 1 cells, expected 2"),
    "allempty.csv": (b"prompt,response\n,a\nb,\n", "all 2 rows have an empty or missing cell"),
    "latin.csv": ("prompt,response\na,b\n\"c\nd\",é\n".encode("latin-1"), r"row 2 \(line 4\) is not UTF-8"),
    "utf16.csv": ("prompt,response\na,b\n".encode("utf-16"), "the header is not UTF-8"),
    "latin.jsonl": ('{"prompt":"a","response":"é"}'.encode("latin-1"), "row 1 is not UTF-8"),
    "broken.jsonl": (b'{"prompt":"a","response":"b"}\n{"prompt":', "row 2 is not JSON"),
    "array.jsonl": (b'[{"prompt":"a","response":"b"}]', "row 1 is a JSON list, expected an object"),
    "array.json": (b'[{"prompt":"a","response":"b"},\n 3]', "row 2 is a JSON int, expected an object"),
    "open.json": (b'[{"prompt":"a",\n"response":"b"}', "not JSON .*line 2 column 16.*; expected a list of objects"),
    "latin.json": ('[{"prompt":"a",\n"response":"é"}]'.encode("latin-1"), "line 2 is not UTF-8"),
    "cut.csv.gz": (gzip.compress(b"prompt,response\na,b\n" * 99)[:40], "not readable: "),
    "not.csv.gz": (b"prompt,response\na,b\n", "not readable: "),
    "packed.parquet.gz": (b"PAR", "file name ends in '.gz', expected"),
    "not.arrow": (b"ARR", "not an Arrow file"),
    "number.jsonl": (b'{"prompt":"a","response":5}', "row 1: response is int, expected text"),
    "columns.jsonl": (b'{"prompt":"a","answer":"b"}', "no column 'response'; columns found: prompt, answer"),
    "not.parquet": (b"PAR", "not a Parquet file"),
    "a.txt": (b"prompt,response\na,b\n", r"ends in '.txt', expected .csv, .jsonl or .parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        read_rows(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="not a file"):
        read_rows(tmp_path)


def test_the_real_data_is_read_whole(real_data):
    rows, skipped = read_rows(real_data / "train.csv")
    assert len(rows) == 832 and not skipped
    assert rows[0] == Row(1, "Who invented the Windows?", "Bill Gates invented the Windows.")


def test_what_is_written_as_a_csv_is_read_back_with_its_lists_as_json(tmp_path):
    records = [{"prompt": "a\rb", "answers": ["x", "é"], "round": 1}, {"prompt": 'say "c"\n', "more": {"d": (1, 2)}}]
    (tmp_path / "t.csv").write_bytes(as_csv(records))
    first, second = (record for _, record in read_records(tmp_path / "t.csv", ()))
    assert first == {"prompt": "a\rb", "answers": '["x", "é"]', "round": "1", "more": ""}
    assert second == {"prompt": 'say "c"\n', "answers": "", "round": "", "more": '{"d": [1, 2]}'}
