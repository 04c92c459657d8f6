"""A run's rows: several files with weights, rows held out, rows that are too long; listed and stored, and resumed."""

import gzip
import json
import re
import shlex

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from running import MEASURED, ROOT, call, metrics_of, run, words

import train_loop
from noisefit.base.errors import InputError
from noisefit.inputs import stored
from noisefit.inputs.examples import held_out, prompt_key
from noisefit.inputs.tables import as_csv, read_rows
from noisefit.run.settings import Settings, parse_arguments

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    """Two files of another shape; the second asks some of what the first does."""
    first = [f"a{i % 9},{'x' * (i % 4 + 1)}\n" for i in range(20)]
    (tmp_path / "a.csv").write_text("prompt,response\n" + "".join(first))
    lines = [json.dumps({"question": f"a{i}", "answer": "y" * 3}) + "\n" for i in range(10)]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    return tmp_path / "a.csv", tmp_path / "b.jsonl"


COLUMNS = ["--columns", "prompt=question", "response=answer"]


def train(model, output, *arguments, **flags):
    """`run`, of several words a flag."""
    given = words(model=model, output_model=output, batch_size=2, gradient_accumulation_steps=2, **flags)
    return call(main, "--train_data", *arguments, *given)


def main(argv):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_loop.train(parse_arguments(argv))


@pytest.mark.parametrize(
    "columns, message",
    [
        ("response=answr", "--columns response=answr: no column 'answr', and {a} has one called 'response'; columns "
                           "found: prompt, response, question, answer; did you mean response=answer?"),
        ("prompt=query", "--columns prompt=query: no column 'query', and {a} has one called 'prompt'"),
    ],
)  # fmt: skip
def test_a_name_that_no_file_has_is_an_error_though_ours_is_there(llama_folder, files, tmp_path, columns, message):
    done = train(llama_folder, tmp_path / "out", *files, "--columns", columns)
    assert done.returncode == 2 and message.format(a=files[0]) in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def same(output, other):
    lines = [[{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_of(o)] for o in (output, other)]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (output, other)]
    return bool(lines[0]) and lines[0] == lines[1] and weights[0] == weights[1]


def test_a_mixture_with_weights_and_a_split_is_the_same_listed_stored_and_resumed(
    llama_folder, files, tmp_path, monkeypatch
):
    mixture = [*files, *COLUMNS, "--data_weights", "1.5", "0.5"]
    flags = dict(eval_split=0.2, max_steps=6, save_steps=3, logging_steps=1, seed=5)
    done = train(llama_folder, tmp_path / "whole", *mixture, **flags)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "rows an epoch" in line or "held out" in line]
    held, total, prompts, all_prompts = map(int, re.findall(r"\d+", said[0].partition(": ")[2])[:4])
    assert (total, all_prompts) == (30, 10) and 4 <= held <= 6 and 0 < prompts < 10
    shares = [
        re.search(r"(\d+) rows an epoch, ([\d.]+)% of all, with ([\d.]+)% of the supervised", line) for line in said[1:]
    ]
    counts = [int(share[1]) for share in shares]
    assert [float(share[2]) for share in shares] == pytest.approx([100 * n / sum(counts) for n in counts], abs=0.06)
    assert sum(float(share[3]) for share in shares) == pytest.approx(100, abs=0.11)
    assert f"{sum(counts)} rows; 6 steps of 4 rows" in done.stderr
    # A record that repeats the run.
    record = json.loads((tmp_path / "whole" / "noisefit_config.json").read_text())
    assert record["train_data"] == [str(file) for file in files] and record["data_weights"] == [1.5, 0.5]
    assert record["columns"] == COLUMNS[1:] and record["eval_split"] == 0.2
    config = tmp_path / "whole" / "noisefit_config.json"
    assert call(main, "--config", config, "--output_model", tmp_path / "again").returncode == 0
    assert same(tmp_path / "whole", tmp_path / "again")
    # Stored rows are these rows; a run goes on from one way to the other.
    monkeypatch.setattr(stored, "LARGE", 0)
    half = train(llama_folder, tmp_path / "half", *mixture, **flags | {"max_steps": 3})
    assert half.returncode == 0 and half.stderr.count("its rows are tokenized once") == 2, half.stderr
    assert [line for line in half.stderr.splitlines() if line in said] == said
    monkeypatch.setattr(stored, "LARGE", 10**9)
    rest = train(llama_folder, tmp_path / "half", *mixture, **flags, resume_from_checkpoint="latest")
    assert rest.returncode == 0 and "going on from" in rest.stderr, rest.stderr
    # Only the learning rate's schedule ends elsewhere: three steps in a run of three.
    assert "follows a schedule of 6 steps instead of 3" in rest.stderr
    # Another split or mixture is another run.
    for changed, names in (
        (dict(seed=5, eval_split=0.3), "eval_split was 0.2 and is 0.3"),
        (dict(), "data_weights was"),
    ):
        other = mixture if changed else [*mixture[:-2], "1", "1"]
        refused = train(llama_folder, tmp_path / "half", *other, **flags | changed, resume_from_checkpoint="latest")
        assert (
            refused.returncode == 2
            and names in refused.stderr
            and "rows of --train_data have changed" in refused.stderr
        )


def test_a_killed_run_of_a_mixture_goes_on_bit_for_bit(llama_folder, files, tmp_path):
    mixture = [*files, *COLUMNS, "--data_weights", "2", "1"]
    flags = dict(eval_split=0.1, max_steps=6, save_steps=3, save_total_limit=0, logging_steps=1, eval_steps=3)
    assert train(llama_folder, tmp_path / "whole", *mixture, **flags).returncode == 0
    resumed = train(llama_folder, tmp_path / "resumed", *mixture, **flags,
                    resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")  # fmt: skip
    assert resumed.returncode == 0 and same(tmp_path / "whole", tmp_path / "resumed"), resumed.stderr
    lines = [(tmp_path / name / "eval_metrics.jsonl").read_text() for name in ("whole", "resumed")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 2


def test_held_out_rows_are_evaluated_and_not_trained_on(llama_folder, files, tmp_path):
    """As if somebody had split the file by hand."""
    run(llama_folder, files[0], tmp_path / "split", eval_split=0.3, max_steps=2, logging_steps=1)
    rows = read_rows(files[0])[0]
    held = held_out(np.array([prompt_key(row) for row in rows]), 0.3, 42)
    for name, side in (("train", ~held), ("held", held)):
        chosen = [f"{row.prompt},{row.response}\n" for row, of_it in zip(rows, side, strict=True) if of_it]
        (tmp_path / f"{name}.csv").write_text("prompt,response\n" + "".join(chosen))
    run(llama_folder, tmp_path / "train.csv", tmp_path / "by_hand", eval_data=tmp_path / "held.csv", max_steps=2,
        logging_steps=1)  # fmt: skip
    assert same(tmp_path / "split", tmp_path / "by_hand")
    lines = [(tmp_path / name / "eval_metrics.jsonl").read_text() for name in ("split", "by_hand")]
    assert lines[0] == lines[1] != ""


@pytest.mark.parametrize("large", [False, True])
def test_a_conversation_in_several_texts_is_one_row(large, llama_folder, tmp_path, monkeypatch):
    """Drawn, held out and counted whole, as --long_rows cut keeps all texts here."""
    monkeypatch.setattr(stored, "LARGE", 0 if large else 10**9)
    file = tmp_path / "chats.jsonl"
    turns = [[(f"q{i}", f"a{i}"), ("b?", "b"), ("c?", "c")][: 1 + i % 3] for i in range(20)]
    roles = ("user", "assistant")
    lines = [[{"role": roles[i], "content": turn[i]} for turn in some for i in (0, 1)] for some in turns]
    file.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    flags = dict(chat_template="plain", eval_split=0.2, max_steps=1, eval_steps=1, save_steps=0)
    done = train(llama_folder, tmp_path / "out", file, "--data_weights", "0.5", **flags, long_rows="cut")
    assert done.returncode == 0, done.stderr
    assert "4 of 20 rows are held out, with 4 of 20 prompts" in done.stderr
    record = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert record["train"][0]["rows"] == 16 and record["train"][0]["held_out"]["number"] == 4
    assert record["train"][0]["split"]["number"] == 13 and record["eval"][0]["rows"] == 4
    [rows, texts] = map(int, re.search(r"(\d+) rows an epoch in (\d+) texts, 100.0%", done.stderr).groups())
    assert rows == 8 and 8 < texts <= 24
    assert f"\n8 rows in {texts} texts; 1 steps of 4 texts; processes: 1\n" in done.stderr


@pytest.mark.parametrize("large", [False, True])
def test_rows_that_are_too_long(large, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "LARGE", 0 if large else 10**9)
    data = tmp_path / "data.csv"
    rows = ["a,b\n", f"a,{'b' * 100}\n", f"{'a' * 200},b\n", "a,c\n", f"a,{'c' * 200}\n"]
    data.write_text("prompt,response\n" + "".join(rows))
    flags = dict(max_steps=1, max_length=100)
    done = train(llama_folder, tmp_path / "drop", data, **flags)
    assert done.returncode == 0 and "\n2 rows; 1 steps" in done.stderr, done.stderr
    assert f"{data}: skipped 1 row whose prompt leaves no answer within 100 tokens (row 3)" in done.stderr
    assert f"{data}: skipped 2 rows longer than --max_length 100 tokens; --long_rows cut" in done.stderr
    assert "(row 2, 5)" in done.stderr
    cut = train(llama_folder, tmp_path / "cut", data, **flags, long_rows="cut")
    assert cut.returncode == 0 and "\n4 rows; 1 steps" in cut.stderr
    assert (
        f"{data}: of 2 rows the answer's end is cut off at --max_length 100, so it is not learnt (row 2, 5)"
        in cut.stderr
    )
    short = metrics_of(tmp_path / "cut")[-1]["target_tokens"] - metrics_of(tmp_path / "drop")[-1]["target_tokens"]
    before = len("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n") + 3  # <s> and a byte a token
    assert short in (2 * (100 - before), 2 * (103 - before))
    refused = train(llama_folder, tmp_path / "error", data, **flags, long_rows="error")
    length = len("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<|im_end|>") + 100
    [said] = re.findall(r"error: (.*)", refused.stderr)
    found = int(re.search(r"row 2 has (\d+) tokens, and --max_length is 100; raise that, or", said)[1])
    assert refused.returncode == 2 and abs(found - length) <= 3 and not (tmp_path / "error").exists()
    data.write_text("prompt,response\n" + rows[1])
    none = train(llama_folder, tmp_path / "none", data, **flags)
    assert none.returncode == 2 and "no row has an answer within --max_length 100; raise it" in none.stderr


def test_the_base_model_is_asked_about_the_rows_of_all_files(llama_folder, files, tmp_path):
    done = train(
        llama_folder, tmp_path / "out", *files, *COLUMNS, unknown_rows="refuse", unknown_below=-1e-6, max_steps=1
    )
    assert done.returncode == 0, done.stderr
    assert f"{files[0]}, {files[1]}: the base model does not know 30 of 30 rows" in done.stderr
    scores = (tmp_path / "out" / "knowledge.csv").read_text().splitlines()
    assert len(scores) == 31
    # Its scores are those of one file after the other, and serve again.
    again = train(llama_folder, tmp_path / "probed", tmp_path / "out" / "knowledge.csv", files[0],
                  unknown_rows="drop", unknown_below=-1e6, max_steps=1)  # fmt: skip
    assert again.returncode == 0 and "knowledge.csv: its rows are probed already" in again.stderr, again.stderr
    both = (tmp_path / "probed" / "knowledge.csv").read_text().splitlines()
    assert both[1:31] == scores[1:] and both[31:] == scores[1:21]


def test_the_same_rows_are_held_out_whatever_becomes_of_unknown_ones(llama_folder, files, tmp_path):
    flags = dict(eval_split=0.3, max_steps=1, save_steps=1, unknown_below=-1e-6)
    held = []
    for way in ("keep", "drop", "refuse", "weight"):
        below = dict(unknown_below=-5.03) if way == "drop" else {}  # elsewhere all are unknown
        done = train(llama_folder, tmp_path / way, *files, *COLUMNS, unknown_rows=way, **flags | below)
        assert done.returncode == 0, done.stderr
        state = json.loads((tmp_path / way / "checkpoint-1" / "checkpoint.json").read_text())
        held.append(state["run"]["rows of --eval_data"])
        assert (tmp_path / way / "eval_metrics.jsonl").read_text().count("\n") == 1
    assert len(set(held)) == 1


def test_a_folder_and_its_split_train_and_evaluate(llama_folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"prompt": f"q{i}", "response": "a" * (i % 3 + 1)} for i in range(12)]
    for split, some in (("train", rows), ("validation", rows[:4])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    done = train(llama_folder, tmp_path / "a", folder, eval_data=folder, max_steps=2)
    assert done.returncode == 0 and "\n12 rows; 2 steps" in done.stderr, done.stderr
    (tmp_path / "file.jsonl").write_text((folder / "train.jsonl").read_text())
    (tmp_path / "held.jsonl").write_text((folder / "validation.jsonl").read_text())
    run(llama_folder, tmp_path / "file.jsonl", tmp_path / "b", eval_data=tmp_path / "held.jsonl", max_steps=2,
        batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    assert same(tmp_path / "a", tmp_path / "b")
    assert "QUESTIONS.csv" in done.stderr  # what is a folder is no --input_csv
    card = (tmp_path / "a" / "README.md").read_text()
    assert "trained on `mine` with" in card


@pytest.mark.parametrize(
    "arguments, flags, message",
    [
        (["a.csv", "a.csv"], {}, r"--train_data a.csv: it is given twice; --data_weights 2 takes its rows twice"),
        (["a.csv"], {"data_weights": "1,2"}, r"--data_weights has 2 numbers, and --train_data 1 sources"),
        (["a.csv"], {"data_weights": "0"}, r"--data_weights: .*above 0"),
        (["a.csv"], {"eval_split": 0.1, "eval_data": "b.csv"}, r"--eval_split holds out rows where no --eval_data"),
        (["a.csv"], {"eval_split": 1}, r"--eval_split: .*from 0 to 0.9"),
        (["a.csv"], {"eval_data_split": "test"}, r"--eval_data_split is of --eval_data, which is not given"),
        (["a.csv"], {"split": "test"}, r"--split is of a folder or name on the hub, and --train_data has none"),
        (["a.csv"], {"dataset_config": "x"}, r"--dataset_config is of a folder or name on the hub"),
        (["a.csv"], {"revision": "main"}, r"--revision is of a name on the hub"),
        (["a.csv"], {"columns": "promt=question"}, r"--columns promt=question: expected NAME=COLUMN"),
        (["a.csv"], {"eval_split": 0.05}, r"--eval_split 0.05 of 2 rows is 1, and the smallest group"),
        (["a.csv", ""], {}, r"--train_data is required"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(arguments, flags, message, llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("prompt,response\na,b\nA,c\n")
    done = train(llama_folder, tmp_path / "out", *arguments, **flags)
    [said] = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode == 2 and re.search(message, said), done.stderr
    assert not (tmp_path / "out").exists()


def test_one_word_stays_a_word_and_several_are_a_list(tmp_path):
    common = ["--model", "m", "--train_data"]
    assert parse_arguments([*common, "a,b.csv"]).train_data == "a,b.csv"
    assert parse_arguments([*common, "~/a.csv", "b"]).train_data[1] == "b"
    assert not parse_arguments([*common, "~/a.csv", "b"]).train_data[0].startswith("~")
    assert parse_arguments(["--model", "m", "--train_file", "a", "--dataset_train_split", "x"]).split == "x"
    assert Settings(model="m", train_data="a.csv").record()["train_data"] == "a.csv"
    assert Settings(model="m", train_data=["a.csv"]).train_data == "a.csv"
    assert Settings(model="m", train_data=("a.csv", tmp_path)).train_data == ["a.csv", str(tmp_path)]
    for wrong in (None, 3, [], [3]):
        with pytest.raises(InputError, match="--train_data: "):
            Settings(model="m", train_data=wrong)
    (tmp_path / "c.yaml").write_text("model: m\ntrain_data: [a.csv, b.csv]\ndata_weights: [1, 0.5]\n")
    found = parse_arguments(["--config", str(tmp_path / "c.yaml")])
    assert found.train_data == ["a.csv", "b.csv"] and found.data_weights == [1, 0.5]


def test_the_commands_of_the_page_about_data_run(llama_folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    records = [{"question": f"q{i}", "answer": "a"} for i in range(40)]
    chats = [
        {"messages": [{"role": "user", "content": f"c{i}"}, {"role": "assistant", "content": "b"}]} for i in range(4)
    ]
    (tmp_path / "questions.csv").write_bytes(as_csv({"prompt": r["question"], "response": "a"} for r in records[:20]))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "more.csv.gz").write_bytes(gzip.compress(as_csv(records[20:])))
    folder = tmp_path / "my-org" / "questions"  # a folder stands where the page has a name on the hub
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_bytes(as_csv({"question": f"q{i}", "completion": "a"} for i in range(4)))
    page = (ROOT / "docs" / "data.md").read_text()
    commands = re.findall(r"^accelerate launch train_loop.py ((?:.*\\\n)*.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        done = call(main, *shlex.split(command.replace("\\\n", " ")), "--model", llama_folder, "--max_steps", 1)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "my_adapter" / "eval_metrics.jsonl").read_text().count("\n") == 1
    assert "chats.jsonl: 2 rows an epoch" in done.stderr and "2 of 44 rows are held out" in done.stderr
