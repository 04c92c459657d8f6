"""What `--train_data` may name: files, folders laid out for the hub, what `save_to_disk` left, and what goes wrong."""

import gzip
import json
import os
import sys

import datasets
import pytest

from noisefit.base.errors import InputError
from noisefit.inputs import readers
from noisefit.inputs.columns import parse_columns
from noisefit.inputs.sources import EVALUATION, Source, find_source, is_file_name
from noisefit.inputs.tables import ANY_ROWS, read_records, read_rows

ROWS = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` makes of a folder lies here."""
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def find(word, columns=(), split="train", **options):
    return find_source("--train_data", str(word), parse_columns(columns), (split,), **options)


def hub_folder(path, **splits):
    """A dataset repository: rows of each split as JSON Lines."""
    path.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(source):
    return [(row.number, row.prompt, row.response) for row in read_rows(source)[0]]


def expected(rows):
    return [(number, row["prompt"], row["response"]) for number, row in enumerate(rows, start=1)]


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    folder = hub_folder(tmp_path / "mine", train=ROWS, test=ROWS[:2])
    source = find(folder)
    assert str(source) == f"{folder} (train)" and pairs(source) == expected(ROWS)
    assert pairs(find(folder, split="test")) == expected(ROWS[:2])
    assert pairs(find(folder, split="train[:60%]")) == expected(ROWS[:3])
    assert pairs(find(folder, split="test+train")) == expected(ROWS[:2] + ROWS)
    evaluated = find_source("--eval_data", str(folder), {}, EVALUATION)
    assert str(evaluated) == f"{folder} (test)" and pairs(evaluated) == expected(ROWS[:2])
    # What decides on the stored rows: split and rows, and the columns.
    contents = [find(folder).content(), find(folder).content(), find(folder, split="test").content(),
                find(folder, ["prompt=response"]).content()]  # fmt: skip
    hub_folder(folder, train=[*ROWS, ROWS[0]])
    contents.append(find(folder).content())
    assert contents[0] == contents[1] and len({json.dumps(content) for content in contents}) == 4


def test_a_csv_in_a_folder_loses_no_cell(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.csv").write_text("question,response,n\nq1,NA,1\nq2,007\nq3,null,\nq4\n")
    records = [record for _, record in read_records(find(tmp_path / "mine", ["prompt=question"]), ANY_ROWS)]
    assert [(record["prompt"], record["response"]) for record in records] == [
        ("q1", "NA"), ("q2", "007"), ("q3", "null"), ("q4", "")]  # fmt: skip
    plain = datasets.load_dataset(str(tmp_path / "mine"), split="train")["response"]
    assert list(plain) == [None, 7.0, None, None]  # what the library does if it is not told


def test_configurations_and_messages(tmp_path):
    folder = hub_folder(tmp_path / "mine", a=ROWS[:1], b=ROWS[1:])
    head = "configs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n"
    (folder / "README.md").write_text(f"---\n{head}---\n")
    with pytest.raises(InputError, match=r"mine: give one of its configurations as --dataset_config: one, two$"):
        find(folder)
    with pytest.raises(InputError, match=r"mine: give one of its configurations as --dataset_config: one, two$"):
        find(folder, config="three")
    assert pairs(find(folder, config="two")) == expected(ROWS[1:])
    chats = [{"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 2
    assert pairs(find(hub_folder(tmp_path / "chats", train=chats), ["messages=chat"])) == [(1, "q", "a"), (2, "q", "a")]


def test_what_save_to_disk_left(tmp_path):
    table = datasets.Dataset.from_list([row | {"picture": b"\x00"} for row in ROWS])
    table.select([4, 2]).save_to_disk(tmp_path / "one")
    one = find(tmp_path / "one")
    assert str(one) == str(tmp_path / "one") and pairs(one) == expected([ROWS[4], ROWS[2]])
    assert one.content() == find(tmp_path / "one").content()
    datasets.DatasetDict(train=table, held=table.select([1])).save_to_disk(tmp_path / "both")
    assert pairs(find(tmp_path / "both")) == expected(ROWS)
    held = find(tmp_path / "both", split="held")
    assert str(held).endswith("both (held)") and pairs(held) == expected(ROWS[1:2])
    [(_, record)] = read_records(held, ANY_ROWS)
    assert record == ROWS[1]  # bytes are left out
    with pytest.raises(InputError, match=r"one: it is one split, train, and no test; leave that out"):
        find(tmp_path / "one", split="test")
    with pytest.raises(InputError, match=r"both: it has no split test; its splits: train, held; give one as --split"):
        find(tmp_path / "both", split="test")
    with pytest.raises(InputError, match=r"no split validation or test.*; give one as --eval_data_split"):
        find_source("--eval_data", str(tmp_path / "both"), {}, EVALUATION)


def test_what_a_row_of_a_dataset_lacks_is_told_with_its_number(tmp_path):
    rows = [*ROWS, {"prompt": "q", "response": None}, {"prompt": "q", "response": ""}]
    source = find(hub_folder(tmp_path / "mine", train=rows))
    assert read_rows(source)[1] == [6, 7]
    with pytest.raises(InputError, match=r"other \(train\): row 2: response is int, expected text"):
        read_rows(find(hub_folder(tmp_path / "other", train=[ROWS[0], {"prompt": "a", "response": 4}])))


@pytest.mark.parametrize(
    "word, message",
    [
        ("none.csv", "none.csv: no such file"),
        ("./none", "none: no such file"),
        ("a/b/c", "a/b/c: no such file"),
        ("some/where", "no such file or folder, and on the hub: .*some/where"),
        ("nothing", "no such file or folder, and on the hub: .*nothing"),
        ("empty", "empty: not to be read as a dataset: .*contain any data files"),
        ("script", "script: not to be read as a dataset: .*scripts are no longer supported"),
        ("broken", "broken: not to be read as a dataset: "),
        ("book.xlsx", r"book.xlsx: file name ends in '.xlsx', expected .csv"),
    ],
)
def test_what_cannot_be_read_is_one_line(word, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "script", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit")
    (tmp_path / "broken" / "train.csv").write_text("prompt,response\na,b,c,d\na,b\na,b,c,d,e\n")
    (tmp_path / "book.xlsx").write_text("PK")
    with pytest.raises(InputError, match=message) as caught:
        read_rows(find(word))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # nothing of the library's own


def test_without_datasets_a_folder_is_refused_and_a_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.csv").write_text("prompt,response\nq0,a0\n")
    assert pairs(find(tmp_path / "a.csv")) == expected(ROWS[:1])
    with pytest.raises(InputError, match=r"is not a file is read by way of the library datasets.*pip install datasets"):
        find(tmp_path)


def test_which_words_name_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").mkdir()
    (tmp_path / "rows").write_text("")
    names = {"rows": True, "data.csv": False, "other.csv": True, "a.jsonl.gz": True, "~/x": True, "squad": False,
             "org/data-v1.5": False, "/abs": True, "..": False, "../x": True, "a/b/c": True}  # fmt: skip
    assert {name: is_file_name(name) for name in names} == names


def test_columns_have_other_names(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer,prompt,n\nq,a,old,1\n")
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}\n{"prompt": "p", "response": "r"}\n')
    (tmp_path / "c.csv").write_text("prompt,response\np,r\n")
    words = ["prompt=question", "response=answer"]
    [(_, record)] = read_records(find(tmp_path / "a.csv", words), ANY_ROWS)
    assert record == {"prompt": "q", "response": "a", "n": "1"}
    assert pairs(find(tmp_path / "b.jsonl", words)) == [(1, "q", "a"), (2, "p", "r")]
    assert pairs(find(tmp_path / "c.csv", words)) == [(1, "p", "r")]
    swapped = find(tmp_path / "c.csv", ["prompt=response", "response=prompt"])
    assert pairs(swapped) == [(1, "r", "p")]
    table = datasets.Dataset.from_list([{"question": "q", "answer": "a", "prompt": "old"}])
    table.to_parquet(tmp_path / "d.parquet")
    assert pairs(find(tmp_path / "d.parquet", words)) == [(1, "q", "a")]


@pytest.mark.parametrize(
    "header, words, message",
    [
        ("question,completion", [], r"no column 'prompt'; columns found: question, completion; did you mean --columns "
                                    r"prompt=question response=completion\?"),
        ("Prompt,response", [], r"did you mean --columns prompt=Prompt\?"),
        ("conversation,id", [], r"did you mean --columns messages=conversation\?"),
        ("x,y", [], r"no column 'prompt'; columns found: x, y; or give messages or conversations$"),
        ("query,response", ["prompt=qeury"], r"no column 'qeury' \(--columns prompt=qeury\), and no 'prompt'; columns "
                                             r"found: query, response; did you mean --columns prompt=query\?"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_is_looked_for(header, words, message, tmp_path):
    (tmp_path / "a.csv").write_text(f"{header}\n1,2\n")
    with pytest.raises(InputError, match=message):
        read_rows(find(tmp_path / "a.csv", words))
    table = datasets.Dataset.from_list([dict.fromkeys(header.split(","), "a")])
    table.save_to_disk(tmp_path / "folder")
    with pytest.raises(InputError, match=message):
        read_rows(find(tmp_path / "folder", words))
    if not words:
        with pytest.raises(InputError) as caught:  # a program that has no such flag does not speak of it
            read_rows(tmp_path / "a.csv")
        assert "--columns" not in str(caught.value)


@pytest.mark.parametrize(
    "words", [["prompt"], ["prompt="], ["promt=question"], ["prompt=a", "prompt=b"], ["prompt=a", "response=a"]]
)
def test_columns_that_are_no_renames_are_refused(words):
    with pytest.raises(InputError, match="--columns "):
        parse_columns(words)


def test_rows_that_are_held_are_parsed_once(tmp_path, monkeypatch):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"question,response\nq0,a0\nq1,\n"))
    held = find(tmp_path / "a.csv.gz", ["prompt=question"]).holding(ANY_ROWS)
    monkeypatch.setattr(readers, "stream_records", lambda *_: pytest.fail("parsed again"))
    assert pairs(held) == pairs(held) == expected(ROWS[:1]) and read_rows(held)[1] == [2]


def test_a_name_on_the_hub_is_read_from_the_cache_of_datasets(tmp_path, monkeypatch, capfd):
    """The hub is out of reach here: the library itself finds what an earlier run left, whose commit it knows."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "cache" / "org___mine" / "default" / "0.0.0" / commit
    table = datasets.load_dataset(str(hub_folder(tmp_path / "mine", train=ROWS)))["train"]
    made = os.path.dirname(table.cache_files[0]["filename"])
    place.parent.mkdir(parents=True)
    os.rename(made, place)
    capfd.readouterr()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = find("org/mine")
    assert (str(source), source.commit, pairs(source)) == ("org/mine (train)", commit, expected(ROWS))
    said = capfd.readouterr().err
    assert said == f"org/mine: the hub was not asked; its rows are those in the cache, of commit {commit}\n"


def test_a_source_stands_where_a_path_does():
    source = Source("org/mine", "org/mine (train)")
    assert os.fspath(source) == "org/mine" and f"{source}" == "org/mine (train)"
