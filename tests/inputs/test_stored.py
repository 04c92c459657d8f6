"""Rows of a large file are those of a list, whoever makes them: tokens, lines, errors; and a cache is never stale."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from running import metrics_of, run, start, start_program, train, wait, wait_until
from tiny_folder import byte_tokenizer

from noisefit.base.errors import InputError, one_line_errors
from noisefit.inputs import prompts, stored, storing
from noisefit.inputs.batches import count_targets, cut_step, epoch_steps
from noisefit.inputs.examples import Listed, rows_digest
from noisefit.inputs.prompts import PromptSettings
from noisefit.inputs.sources import Source
from noisefit.inputs.stored import StoredExamples, cache_folder, is_large
from noisefit.inputs.templates import set_chat_template
from noisefit.run.rows import list_rows, make_rows

SETTINGS = PromptSettings(max_length=150)
ALONE = SimpleNamespace(is_local_main_process=True)
BAD_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}\n{% if '40' in m['content'] %}{{ none + 1 }}{% endif %}{% endfor %}"
)
SHORTENING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if loop.last or loop.index0 % 3 or m['role'] != 'assistant' %}"
    "{{ m['content'] }}{% else %}{{ m['content'].split('#')[-1] }}{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where stored rows lie in these tests."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    return tokenizer


def write(path: Path, rows: int = 60, last: str = "") -> Path:
    """Rows of many lengths: some lack an answer, some are cut, and of some the prompt is too long."""
    lines = [f"q{i} {'é' * (i % 50)},{'' if i % 9 == 7 else 'a' * (i % 50 + 1)}\n" for i in range(rows)]
    path.write_text("prompt,response\n" + "".join(lines) + last)
    return path


def both_ways(monkeypatch, capsys, path, tokenizer, vocabulary=300, stops=(5, 3), long_rows="cut"):
    """For a list and for files: the rows or the error, and the lines that were said."""
    found = []
    for bytes_of_a_large_one in (10**9, 0):
        monkeypatch.setattr(stored, "LARGE", bytes_of_a_large_one)
        try:
            rows = list_rows(str(path))
            assert (rows is None) == is_large(str(path)) == (bytes_of_a_large_one == 0)
            result = make_rows(str(path), rows, tokenizer, SETTINGS, vocabulary, stops, ALONE, long_rows)
        except InputError as error:
            result = str(error)
        lines = capsys.readouterr().err.splitlines()
        found.append((result, [line for line in lines if ": its rows are tokenized " not in line]))
    return found


def test_both_ways_give_the_same_rows_and_say_the_same_of_them(tmp_path, monkeypatch, capsys, tokenizer, cache):
    data = write(tmp_path / "data.csv", 110)
    (expected, said), (rows, told) = both_ways(monkeypatch, capsys, data, tokenizer)
    assert isinstance(rows, StoredExamples) and isinstance(expected, Listed)
    assert rows.digest == expected.digest
    for name in ("lengths", "targets", "is_cut", "prompts"):
        assert getattr(rows, name).tolist() == getattr(expected, name).tolist(), name
    expected = list(expected)
    assert list(rows) == expected and 60 < len(expected) < 110
    assert len(said) == 3 and said == told  # skipped, dropped, cut
    assert rows.digest == rows_digest(expected) == rows_digest(rows)
    assert rows[-1] == expected[-1] and rows[5:2:-1] == expected[5:2:-1]
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[outside]
    assert rows.lengths.tolist() == [len(row.input_ids) for row in expected] and rows.lengths.dtype == np.int32
    assert count_targets(rows) == count_targets(expected)
    assert list(cut_step(rows, 4, 3, 1)) == list(cut_step(expected, 4, 3, 1))
    assert list(epoch_steps(rows, 16, 1, 2)) == list(epoch_steps(expected, 16, 1, 2))
    # The tokens stay in the files: what is held of them are views.
    assert all(tokens.base is not None and not tokens.flags.owndata for _, tokens in rows._parts)

    # The second start finds them, also under another name, and says the same.
    monkeypatch.setattr(storing, "_write", None)
    renamed = data.rename(tmp_path / "renamed.csv")
    again = make_rows(str(renamed), None, tokenizer, SETTINGS, 300, [3, 5], ALONE, "cut")
    lines = capsys.readouterr().err.splitlines()
    assert list(again) == expected and lines[1:] == [line.replace(str(data), str(renamed)) for line in said]
    assert lines[0].startswith(f"{renamed}: its rows are tokenized already, in {cache}")

    # Not if a file of the cache is not as it was written.
    [folder] = cache.iterdir()
    with max(folder.glob("*.arrow")).open("ab") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="were changed; remove it"):
        StoredExamples(folder)
    monkeypatch.setattr(storing, "_write", lambda *_: pytest.fail("they are made again"))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        make_rows(str(renamed), None, tokenizer, SETTINGS, 300, [3, 5], ALONE)
    assert [path.name for path in cache.iterdir()] == [folder.name]  # nothing of it is left


def test_conversations_are_the_same_both_ways(tmp_path, monkeypatch, capsys, cache):
    """Cut ones, unfinished ones, and some in several texts, as the template shortens an earlier answer."""
    tokenizer, data = byte_tokenizer(), tmp_path / "chats.jsonl"
    set_chat_template(tokenizer)
    tokenizer.chat_template = SHORTENING
    lines = []
    for i in range(70):
        turns = [{"from": "system", "value": f"s{i}"}] * (i % 2)
        for j in range(1 + i % 4):
            turns += [{"from": "human", "value": f"{i}#{j}"}, {"from": "gpt", "value": f"é#{'a' * (i % 30)}{j}"}]
        lines.append(
            json.dumps({"conversations": turns if i % 11 else [{"from": "human", "value": "x" * 200}, *turns]})
        )
    data.write_text("\n".join([*lines, json.dumps({"conversations": None})]))
    (expected, said), (rows, told) = both_ways(monkeypatch, capsys, data, tokenizer)
    listed, expected = expected, list(expected)
    assert isinstance(rows, StoredExamples) and list(rows) == expected
    assert len(said) == 4 and said == told  # skipped, in several texts, dropped, cut
    assert rows.continues.tolist() == listed.continues.tolist() and rows.num_rows < len(expected)
    assert {len(row.gaps) for row in expected} >= {0, 1, 2} and len(expected) > 70
    assert rows.digest == rows_digest(expected) != rows_digest([replace(row, gaps=()) for row in expected])
    assert rows.num_targets == count_targets(expected) == sum(e - s for row in expected for s, e in row.spans)


@pytest.mark.parametrize(
    "what, message",
    [
        ("reader", "row 61 (line 62) has 1 cells, expected 2"),
        ("tokens", "row 61: the tokenizer makes a token of number 2"),
        ("template", "row 41: the chat template cannot be rendered"),
        ("length", "no row has an answer within --max_length 150"),
        ("empty", "all 2 rows have an empty or missing cell"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_row(what, message, tmp_path, monkeypatch, capsys, tokenizer, cache):
    last = {"reader": "one cell\n", "tokens": "\N{GRINNING FACE},b\n", "template": "", "length": "", "empty": ""}[what]
    data = write(tmp_path / "data.csv", last=last)
    if what in ("length", "empty"):
        data.write_text("prompt,response\n" + {"length": f"{'x' * 200},y\n,z\n", "empty": "a,\n,b\n"}[what])
    elif what == "template":
        (tmp_path / "bad.jinja").write_text(BAD_TEMPLATE)
        set_chat_template(tokenizer, str(tmp_path / "bad.jinja"))
    vocabulary = max(tokenizer("\N{GRINNING FACE}")["input_ids"]) if what == "tokens" else 300
    (expected, said), (found, told) = both_ways(monkeypatch, capsys, data, tokenizer, vocabulary)
    assert found == expected and found.startswith(f"{data}: ") and message in found
    assert told == [line for line in said if "skipped" not in line or what == "length"]  # a list is read before
    assert list(cache.iterdir()) == []


def test_the_key_is_of_all_that_decides_on_the_tokens(tmp_path, monkeypatch, tokenizer):
    how = {"settings": SETTINGS, "vocabulary": 300, "stop_ids": [1]}

    def key(name="a.csv", text="prompt,response\na,b\n", tokenizer=tokenizer, renames=None, **changed):
        (tmp_path / name).write_text(text)
        source = Source(str(tmp_path / name), name, renames or {})
        return storing._key(source.content(), tokenizer, how | changed)

    def with_tokens(*added, template="chatml", **options):
        other = byte_tokenizer(**options)
        other.add_tokens(list(added))
        set_chat_template(other, template)
        return other

    assert key() == key() == key("other.csv", tokenizer=with_tokens())
    monkeypatch.setattr(prompts, "__file__", __file__)
    another_code = key()
    monkeypatch.undo()
    monkeypatch.setattr(storing, "version", lambda library: "0")
    another_library = key()
    monkeypatch.undo()
    bos_only = dict(bos_token="<s>", eos_token="<s>")
    keys = [
        key(), key("a.jsonl"), key(text="d"), key(renames={"prompt": "q"}), key(vocabulary=301), key(stop_ids=[]),
        key(settings=PromptSettings(max_length=151)), key(settings=PromptSettings(max_length=150, loss_on="all")),
        key(tokenizer=with_tokens("é")), key(tokenizer=with_tokens(template="alpaca")),
        key(tokenizer=with_tokens(**bos_only)), another_code, another_library,
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_the_cache_is_that_of_datasets(monkeypatch):
    config = __import__("datasets").config
    monkeypatch.delenv("HF_DATASETS_CACHE")
    assert cache_folder() == Path(config.DEFAULT_HF_DATASETS_CACHE) / "noisefit"
    monkeypatch.setenv("HF_DATASETS_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine" / "noisefit"


def test_without_datasets_small_files_train_and_large_ones_are_refused(llama_folder, questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(run(llama_folder, questions, tmp_path / "out", max_steps=1)) == 1
    monkeypatch.setattr(stored, "LARGE", 0)
    with pytest.raises(InputError, match=r"questions.csv: a file of 0 MiB is .* not installed; pip install datasets"):
        run(llama_folder, questions, tmp_path / "another", max_steps=1)
    assert not (tmp_path / "another").exists()


def test_a_file_that_is_edited_meanwhile_is_not_kept(tmp_path, monkeypatch, tokenizer, cache):
    data = write(tmp_path / "data.csv")
    monkeypatch.setattr(storing, "_write", lambda *_: write(data, rows=61))
    with pytest.raises(InputError, match="edited while it was read"):
        storing.store(str(data), tokenizer, SETTINGS, 300, [])
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("other", [(True, "b" * 64), (False, None)])
def test_another_file_on_another_machine_is_told(other, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("noisefit.run.rows.store", lambda *_: "a" * 64)
    monkeypatch.setattr("noisefit.run.rows.gather_object", lambda mine: [*mine, other])
    with pytest.raises(InputError, match="not the same for all processes"):
        make_rows(str(write(tmp_path / "data.csv")), None, tokenizer, SETTINGS, 300, [], ALONE)


def test_a_cache_whose_bytes_were_changed_is_made_anew_and_one_that_is_no_table_is_a_line(
    tmp_path, monkeypatch, tokenizer, cache
):
    data = str(write(tmp_path / "data.csv"))
    folder = cache / storing.store(data, tokenizer, SETTINGS, 300, [])
    expected = list(StoredExamples(folder))
    [tokens] = sorted(folder.glob("*.arrow"))[:1]
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    others = cache / "somebody's.part"
    others.mkdir()
    storing.store(data, tokenizer, SETTINGS, 300, [])
    assert list(StoredExamples(folder)) == expected and others.is_dir()
    tokens.write_bytes(bytes(len(content)))
    with pytest.raises(InputError, match="were changed; remove it"):
        StoredExamples(folder)


# --- In a run ---------------------------------------------------------------------------------------------------------


RUN = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, logging_steps=1, eval_steps=2, save_steps=2,
           lr_scheduler_type="constant")  # fmt: skip


def train_from_files(argv: list[str]) -> None:
    stored.LARGE = 0
    train(argv)


@pytest.mark.slow
def test_a_run_goes_on_from_lists_to_files_and_back(llama_folder, questions, tmp_path, monkeypatch):
    lines = {}
    for name, ways in {"lists": {6: 10**9}, "mixed": {2: 0, 4: 10**9, 6: 0}}.items():
        for steps, large in ways.items():
            monkeypatch.setattr(stored, "LARGE", large)
            data = dict(eval_data=questions, resume_from_checkpoint="auto", max_steps=steps)
            run(llama_folder, questions, tmp_path / name, **RUN, **data)
        lines[name] = [(line["step"], line["loss"], line["grad_norm"]) for line in metrics_of(tmp_path / name)]
        evaluated = (tmp_path / name / "eval_metrics.jsonl").read_text().splitlines()
        lines[name] += [json.loads(line) for line in evaluated]
    assert lines["mixed"] == lines["lists"] and len(lines["lists"]) == 9


@pytest.mark.slow
def test_of_two_processes_one_tokenizes(llama_folder, questions, tmp_path, cache):
    out, flags = tmp_path / "out", dict(max_steps=2, logging_steps=1)
    there = {"HF_DATASETS_CACHE": str(cache.parent)}
    running = start(llama_folder, questions, out, 2, environment=there, target=train_from_files, **flags)
    assert wait(running) == [0, 0]
    said = Path(f"{out}.log").read_text()
    assert said.count("its rows are tokenized once") == 1 and "24 rows; 2 steps of 32 rows; processes: 2" in said
    assert len(metrics_of(out)) == 2 and "Traceback" not in said


def store_slowly(argv: list[str]) -> None:
    """Store the rows of a file, with a tokenizing that does not end."""
    data, told = argv

    def never(*_: object, **__: object) -> None:
        Path(told, str(os.getpid())).touch()
        time.sleep(300)

    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    storing._columns = never
    with one_line_errors("store"):
        storing.store(data, tokenizer, SETTINGS, 300, [])


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the run", "a worker"])
def test_what_a_killed_run_left_is_not_used_and_removed(killed, tmp_path, tokenizer, cache):
    data, told = write(tmp_path / "data.csv"), tmp_path / "told"
    told.mkdir()
    environment = {"HF_DATASETS_CACHE": str(cache.parent)}
    [process] = start_program(store_slowly, [str(data), str(told)], tmp_path / "log", environment=environment)
    wait_until(lambda: len(list(told.iterdir())) == 2)  # both workers are at it
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert {int(path.name) for path in told.iterdir()} <= {helper.pid for helper in helpers}
    [half] = cache.iterdir()
    with storing._staging("another"):
        assert half.exists()  # as it is being written
    if killed == "the run":
        os.kill(process.pid, signal.SIGKILL)
    else:
        os.kill(int(min(told.iterdir()).name), signal.SIGKILL)
    process.join(60)
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert not alive and half.exists() == (killed == "the run")
    if killed == "a worker":
        assert process.exitcode == 2 and "a process that tokenized was killed" in (tmp_path / "log").read_text()
    name = storing.store(str(data), tokenizer, SETTINGS, 300, [])
    assert [path.name for path in cache.iterdir()] == [name] and len(StoredExamples(cache / name)) > 30
