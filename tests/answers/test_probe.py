"""The whole program: the same file whatever the processes, batches and kills, and one line for bad input."""

import csv
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import call, launch, start_program, wait, words
from sklearn.metrics import roc_auc_score
from tiny_folder import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from noisefit.answers.jobs import Answer
from noisefit.answers.journal import Journal
from noisefit.answers.settings import DrawSettings
from noisefit.fork.decoder import find_decoder_layers
from noisefit.inputs import probing
from noisefit.inputs.probing import ProbedRow, chat_item, text_item
from noisefit.inputs.templates import set_chat_template
from noisefit.method.knowledge import Probe
from noisefit.probe import main

pytestmark = pytest.mark.slow


def write_asked(path):
    lines = [f'{i},What is {"so " * (i % 4)}{i}?,"It is {"bcdefghijk"[: 1 + i % 9]}é{i}."' for i in range(13)]
    path.write_text("id,prompt,response\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def asked(tmp_path):
    return write_asked(tmp_path / "asked.csv")


@pytest.fixture(scope="module")
def whole(llama_folder, tmp_path_factory):
    """What one process that nobody kills makes of `asked`, with all that can be asked for."""
    folder = tmp_path_factory.mktemp("whole")
    probed(llama_folder, write_asked(folder / "asked.csv"), folder / "out.csv", **OPTIONS)
    return folder / "out.csv"


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_probe(model, data, output, *more, **flags):
    return call(main, *words(model=model, train_data=data, output=output, **flags), *more)


def probed(model, data, output, **flags):
    done = run_probe(model, data, output, **flags)
    assert done.returncode == 0, done.stderr
    return rows_of(output)


OPTIONS = dict(noise_passes=3, samples=2, max_new_tokens=6)


def test_the_scores_are_those_of_one_row_at_a_time(llama_folder, asked, tmp_path):
    rows = probed(llama_folder, asked, tmp_path / "out.csv")
    assert list(rows[0]) == ["id", "prompt", "response", "knowledge_chat", "knowledge_text", "knowledge_digest"]
    model = AutoModelForCausalLM.from_pretrained(llama_folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    for row in rows:
        answer = row["response"].removeprefix("It is ").removesuffix(".")
        turn = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        for column, before in (("knowledge_chat", f"{turn}It is "), ("knowledge_text", "It is ")):
            start = len(tokenizer(before)["input_ids"])  # one token a byte
            ids = torch.tensor([tokenizer(before + answer)["input_ids"]])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].log_softmax(-1)
            of_answer = [logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
            assert float(row[column]) == pytest.approx(np.mean(of_answer), abs=6e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"asked.csv", "out.csv", "out.png"}


def test_the_summary_and_the_picture(llama_folder, asked, tmp_path):
    done = run_probe(llama_folder, asked, tmp_path / "out.csv", picture=tmp_path / "seen.png")
    assert (
        "13 rows probed" in done.stdout and "warning: knowledge_chat has one mode (13 rows are too few" in done.stdout
    )
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "out.png").exists()


def test_each_column_takes_one_pass_over_the_rows(llama_folder, asked, tmp_path, monkeypatch):
    rows, init = [], Probe.__init__

    def counting(self, model, *arguments):
        init(self, model, *arguments)
        self.exact = False  # without the few that are computed again, where rounding could turn
        find_decoder_layers(model)[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
        rows.clear()
        passes.append(rows)

    passes = []
    monkeypatch.setattr(Probe, "__init__", counting)
    probed(llama_folder, asked, tmp_path / "out.csv", batch_size=5)
    assert len(passes) == 2 and sum(rows) == 2 * 13  # of the second column, which has two hooks by then


@pytest.mark.slow
def test_any_batch_size_gives_the_same_file(whole, llama_folder, asked, tmp_path):
    for size in (1, 3, 13):  # and the one that is chosen unasked
        probed(llama_folder, asked, tmp_path / f"{size}.csv", batch_size=size, **OPTIONS)
        assert (tmp_path / f"{size}.csv").read_bytes() == whole.read_bytes()
    rows = rows_of(whole)
    assert all(float(row["knowledge_spread"]) > 0 < float(row["knowledge_disagreement"]) for row in rows)
    assert {row["knowledge_samples"] for row in rows} <= {"0.0000", "0.5000", "1.0000"}
    other = probed(llama_folder, asked, tmp_path / "seed.csv", **OPTIONS, seed=1)
    assert [row["knowledge_chat"] for row in other] == [row["knowledge_chat"] for row in rows]
    assert all(a["knowledge_noisy"] != b["knowledge_noisy"] for a, b in zip(rows, other, strict=True))


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(whole, llama_folder, asked, tmp_path):
    found = tmp_path / "2.csv"
    flags = words(model=llama_folder, train_data=asked, output=found, **OPTIONS)
    done = launch("-m", "noisefit.probe", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stderr and done.stdout.count("rows probed") == 1
    assert found.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_fewer_rows_than_processes_give_the_file_of_one(llama_folder, tmp_path):
    one_row = tmp_path / "one.csv"
    one_row.write_text("prompt,response\nWhy?,By Bo.\n")
    expected, found, log = tmp_path / "1.csv", tmp_path / "2.csv", tmp_path / "log"
    probed(llama_folder, one_row, expected, **OPTIONS)
    flags = words(model=llama_folder, train_data=one_row, output=found, **OPTIONS)
    assert wait(start_program(main, flags, log, processes=2)) == [0, 0], log.read_text()
    assert "processes: 2" in log.read_text() and log.read_text().count("rows probed") == 1
    assert found.read_bytes() == expected.read_bytes()


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("process-*.jsonl"))


@pytest.mark.slow
def test_a_killed_probe_goes_on_where_it_stopped(whole, llama_folder, asked, tmp_path):
    flags = dict(model=llama_folder, train_data=asked, batch_size=1, **OPTIONS)
    output = tmp_path / "out.csv"
    partial, log = tmp_path / "out.csv.partial", tmp_path / "log"
    for wanted in (3, 20, 45):
        [process] = start_program(main, words(output=output, **flags), log)
        while process.is_alive() and lines_in(partial) < wanted:
            time.sleep(0.002)
        process.kill()
        assert wait([process]) == [-signal.SIGKILL] and not output.exists()
    there = lines_in(partial)
    done = run_probe(llama_folder, asked, output, batch_size=2, **OPTIONS)
    assert f"going on with {partial}: {there} of " in done.stderr
    assert rows_of(output) == rows_of(whole) and not partial.exists()


def test_unfinished_rows_of_another_probe_are_not_taken_over(llama_folder, asked, tmp_path):
    output = tmp_path / "out.csv"
    journal = Journal(output, 0)
    journal.folder.mkdir()
    journal.start({"seed": 1}, 1)
    journal.append([(0, 0, "[-1.0]")])
    done = run_probe(llama_folder, asked, output)
    assert done.returncode == 2 and "holds answers of an unfinished run with other settings" in done.stderr


def test_sampled_answers_are_counted_as_the_score_counts_them(llama_folder, tmp_path, monkeypatch):
    from noisefit import probe

    data = tmp_path / "q.csv"
    data.write_text(
        f'prompt,response,answer,aliases\nWho?,It is Bo.,,\nWhere?,In Al.,,\nWho?,It is Di.,No,"[""Bo""]"\n'
        f"{'W' * 60}?,It is Al.,,\n"
    )
    asked, rounds = [], []

    def answers(answerer, jobs, batch_size):
        assert answerer.sampling == DrawSettings(rounds=4, temperature=0.9)
        asked.extend((job.prompt, job.occurrence) for job in jobs)
        for job in jobs:
            rounds.append(job.rounds)
            texts = ["Bo, so far" if r < 4 - job.index else "no" for r in job.rounds]
            yield [(job.index, r, Answer(text, -1.0, 3)) for r, text in zip(job.rounds, texts, strict=True)]

    monkeypatch.setattr(probe, "answer_all", answers)  # what it draws is tested with generate.py
    flags = dict(samples=4, temperature=0.9, max_length=110)
    done = run_probe(llama_folder, data, tmp_path / "out.csv", **flags)
    assert done.returncode == 0, done.stderr
    assert "no samples for rows whose prompt leaves less than --max_new_tokens 50 of 110 tokens (row 4)" in done.stderr
    rows = rows_of(tmp_path / "out.csv")
    assert [row["knowledge_samples"] for row in rows] == ["0.7500", "0.0000", "1.0000", ""]
    assert sorted(asked) == [("Where?", 0), ("Who?", 0), ("Who?", 1)] and set(rounds) == {(1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("prompt,response\nWhy?,So.\n", dict(output=""), "--output is required; see --help"),
        ("prompt,response\nWhy?,So.\n", dict(output="out.txt"), "expected a name that ends in .csv"),
        ("prompt,response\nWhy?,So.\n", dict(noise_layers="0,4", noise_passes=1),
         "--noise_layers: the model has 4 layers, 0 to 3, and no 4"),
        ("prompt,response\nWhy?,So.\n", dict(model="."), "--model ."),
        ("prompt,response,aliases\nWhy?,So.,So so\n", dict(samples=1), "row 1: aliases is 'So so', expected a list"),
        ("prompt,response\nWhy?,So.\n", dict(samples=-1), "--samples: '-1' is not a whole number from 0"),
        ("prompt,response\nWhy?,So.\n", dict(picture="a.jpg"), "--picture a.jpg: expected a name that ends in .png"),
        ("prompt,response\nWhy?,So.\n", dict(model="./missing"), "no such folder"),
        ("prompt,response\nWhy?,So.\n", dict(train_dat="x"), "unrecognized arguments: --train_dat=x; did you mean"),
        ("prompt,answer\nWhy?,So.\n", {}, "no column 'response'"),
        ("prompt,response\n,So.\n", {}, "no row to probe"),
        ("prompt,response,knowledge_text\nWhy?,So.,1\n", {}, "a column 'knowledge_text' already"),
        ("prompt,response\nWhy?,So.\n", dict(prompt_date="today"), "--prompt_date: 'today' is no date"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(text, flags, message, llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text(text)
    done = call(main, *words(**dict(model=llama_folder, train_data="q.csv", output="out.csv") | flags))
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert not list(tmp_path.glob("out*")) and not done.stdout


def test_a_file_that_is_there_is_not_replaced_unasked(llama_folder, asked, tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    assert "exists; choose another name" in run_probe(llama_folder, asked, tmp_path / "out.csv").stderr
    (tmp_path / "new.png").write_bytes(b"mine")
    assert "new.png exists" in run_probe(llama_folder, asked, tmp_path / "new.csv").stderr
    assert (tmp_path / "new.png").read_bytes() == b"mine" and (tmp_path / "out.csv").read_text() == "mine"
    probed(llama_folder, asked, tmp_path / "out.csv", overwrite_output=True)


# --- Tokens -----------------------------------------------------------------------------------------------------------


def test_decisive_tokens_of_the_text_and_behind_the_prompt():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    row = ProbedRow(1, "Who?", "It is Zoë.")
    chat, text = chat_item(tokenizer, row, 1000), text_item(tokenizer, row, 1000)
    for item in (chat, text):
        assert tokenizer.decode([item.input_ids[i] for i in item.decisive]) == "Zoë"
        assert tokenizer.decode([item.input_ids[i] for i in item.answer]) == "It is Zoë."[item is text :]
    assert chat_item(tokenizer, row, chat.decisive[0]) is None
    assert chat_item(tokenizer, row, chat.decisive[0] + 1).decisive == chat.decisive[:1]
    begins = text_item(tokenizer, ProbedRow(1, "Who?", "Zoë is it."), 1000)
    assert begins.input_ids[0] == tokenizer.bos_token_id and begins.decisive[0] == 1


def test_what_a_template_puts_before_the_answer_is_not_taken_for_it():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    thinks = "('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') + message['content']"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", thinks)
    item = chat_item(tokenizer, ProbedRow(1, "What is the root of -1?", "i"), 1000)
    text = tokenizer.decode(item.input_ids)
    assert text.endswith("</think>\n\ni<|im_end|>") and text.count("i") > 5
    [place] = item.decisive
    assert tokenizer.decode(item.input_ids[place:]).startswith("i<|im_end|>")


def test_a_tokenizer_without_offsets_finds_the_same_tokens(monkeypatch):
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    rows = [
        ProbedRow(i, "Who is it?", f"It is {name}, and it was Al.") for i, name in enumerate(("Zoë", "Bo", "An Oz"))
    ]
    expected = [make(tokenizer, row, 1000) for row in rows for make in (chat_item, text_item)]
    monkeypatch.setattr(probing, "getattr", lambda *arguments: False, raising=False)
    assert [make(tokenizer, row, 1000) for row in rows for make in (chat_item, text_item)] == expected


def test_a_digest_is_of_all_that_the_probe_goes_by():
    rows = [ProbedRow(1, "a", "b"), ProbedRow(1, "a", "c"), ProbedRow(1, "c", "b"), ProbedRow(1, "a", "b", "q"),
            ProbedRow(1, "a", "b", answer="q")]  # fmt: skip
    assert len({row.digest for row in rows}) == len(rows) and ProbedRow(9, "a", "b").digest == rows[0].digest


# --- Truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_answers_tells_told_facts_from_untold_ones(tmp_path):
    """In a small one of the worlds whose model answers already: half a minute. Another world: test_compare.py."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "world"))
    import build
    import world

    small = replace(world.ANSWERING, countries=30, layers=3, batch_rows=2, epochs=7)
    build.build(tmp_path / "world", small, required=0.0)
    rows = probed(tmp_path / "world" / "model", tmp_path / "world" / "train.csv", tmp_path / "out.csv")
    told = [row["kind"] == "known" for row in rows]
    assert 10 < told.count(False) < told.count(True)
    assert roc_auc_score(told, [float(row["knowledge_chat"]) for row in rows]) >= 0.98
