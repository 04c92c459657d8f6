"""The whole program: the same CSV whatever the processes, batches and kills, and one line for bad input."""

import csv
import json
import math
import signal
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from running import call, launch, run, run_generate, start_program, wait, words
from tiny_folder import tiny_folder
from transformers import AutoTokenizer

import generate
from noisefit.answers.jobs import Abstention, Answer
from noisefit.answers.journal import Journal
from noisefit.answers.output import write_answers
from noisefit.answers.settings import AnswerSettings, DrawSettings, parse_arguments
from noisefit.base.errors import InputError
from noisefit.score import score


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "q.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i + i}.\n" for i in range(16)))
    run(llama_folder, data, folder / "adapter", learning_rate=1e-2, max_steps=4)
    return folder / "adapter"


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.csv"
    lines = [f'{i},{"Why " * (i % 4)}is {i}?,"It is, so {i}"' for i in range(13)]
    path.write_text("id,prompt,response\n" + "\n".join(lines) + "\n")
    return path


FAST = dict(max_new_tokens=10, rounds=3, temperature=0.9)


def answer(output, **flags):
    generate.generate(parse_arguments(words(output_csv=output, **FAST | flags)))
    return rows_of(output)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_the_inputs_columns_and_every_round_in_order(adapter, asked, tmp_path):
    rows = answer(tmp_path / "out.csv", model_path=adapter, input_csv=asked)
    assert list(rows[0]) == ["id", "prompt", "response", "generated_response", "round", "logprob", "tokens"]
    assert all(float(row["logprob"]) < 0 and 1 <= int(row["tokens"]) <= 10 for row in rows)
    assert [(row["id"], row["round"]) for row in rows] == [(str(i), str(r)) for i in range(13) for r in (1, 2, 3)]
    assert rows[4]["response"] == "It is, so 1" and len({row["generated_response"] for row in rows}) > 13
    assert {path.name for path in tmp_path.iterdir()} == {"asked.csv", "out.csv", "out.csv.settings.json"}


@pytest.mark.slow
def test_any_batch_size_gives_the_same_file(adapter, asked, tmp_path):
    expected = answer(tmp_path / "0.csv", model_path=adapter, input_csv=asked)
    noisy = answer(tmp_path / "noisy 0.csv", model_path=adapter, input_csv=asked, noise_passes=3)
    assert list(noisy[0])[-4:] == ["logprob", "tokens", "noise_logprob_mean", "noise_logprob_spread"]
    assert [dict(list(row.items())[:-2]) for row in noisy] == expected  # the noise changes no other column
    for size in (1, 3, 16):
        answer(tmp_path / f"{size}.csv", model_path=adapter, input_csv=asked, batch_size=size)
        assert (tmp_path / f"{size}.csv").read_bytes() == (tmp_path / "0.csv").read_bytes()
    for size in (1, 16):
        answer(tmp_path / f"noisy {size}.csv", model_path=adapter, input_csv=asked, batch_size=size, noise_passes=3)
        assert (tmp_path / f"noisy {size}.csv").read_bytes() == (tmp_path / "noisy 0.csv").read_bytes()
    assert answer(tmp_path / "seed.csv", model_path=adapter, input_csv=asked, seed=1) != expected
    unmerged = answer(tmp_path / "unmerged.csv", model_path=adapter, input_csv=asked, no_merge=True, noise_passes=1)
    assert {row["noise_logprob_spread"] for row in unmerged} == {"0.0"}  # of one pass
    same = [a["generated_response"] == b["generated_response"] for a, b in zip(unmerged, expected, strict=True)]
    assert sum(same) > 0.9 * len(same)  # the sums are rounded otherwise


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(adapter, asked, tmp_path):
    expected, found = tmp_path / "1.csv", tmp_path / "2.csv"
    answer(expected, model_path=adapter, input_csv=asked, noise_passes=2)
    flags = words(model_path=adapter, input_csv=asked, output_csv=found, noise_passes=2, **FAST)
    done = launch("generate.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stderr
    assert found.read_bytes() == expected.read_bytes()
    assert not found.with_name(found.name + ".partial").exists()


@pytest.mark.slow
def test_fewer_prompts_than_processes_give_the_file_of_one(adapter, tmp_path):
    one_prompt = tmp_path / "one.csv"
    one_prompt.write_text("prompt\nWhy?\n")
    expected, found = tmp_path / "1.csv", tmp_path / "2.csv"
    answer(expected, model_path=adapter, input_csv=one_prompt, noise_passes=2)
    flags = dict(model_path=adapter, input_csv=one_prompt, noise_passes=2)
    statuses, said = answer_all_of_it(found, 2, **flags, **FAST)
    assert statuses == [0, 0] and "processes: 2" in said, said
    assert found.read_bytes() == expected.read_bytes()


def test_the_base_model_alone_and_a_whole_model(llama_folder, asked, tmp_path, monkeypatch):
    base = answer(tmp_path / "base.csv", model_id=llama_folder, input_csv=asked)
    monkeypatch.chdir(tmp_path)
    generate.generate(parse_arguments(words(model_id=llama_folder, input_csv=asked, **FAST)))
    assert rows_of(tmp_path / f"{llama_folder.name}_answers.csv") == base


def test_greedy_rounds_are_the_same_and_do_not_depend_on_the_seed(adapter, asked, tmp_path):
    rows = answer(tmp_path / "a.csv", model_path=adapter, input_csv=asked, greedy=True)
    assert len(rows) == 39
    assert all(rows[i]["generated_response"] == rows[i - i % 3]["generated_response"] for i in range(39))
    again = answer(tmp_path / "b.csv", model_path=adapter, input_csv=asked, greedy=True, seed=7)
    assert again == rows


def answer_all_of_it(output: Path, processes: int = 1, **flags: object) -> tuple[list[int | None], str]:
    """`generate.py` in processes of its own: their exit statuses, and what they said."""
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    return wait(start_program(run_generate, words(output_csv=output, **flags), log, processes)), log.read_text()


def kill_when_there_are(wanted: int, output: Path, processes: int = 1, **flags: object) -> bool:
    """Start it, and kill all its processes when so many answers are written; whether that came before the end."""
    started = start_program(run_generate, words(output_csv=output, **flags), output.with_suffix(".log"), processes)
    partial = output.with_name(output.name + ".partial")
    while any(process.is_alive() for process in started) and answers_in(partial) < wanted:
        time.sleep(0.005)
    for process in started:
        process.kill()
    statuses = wait(started)
    assert output.exists() == (not partial.exists())
    return -signal.SIGKILL in statuses


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_file(adapter, asked, tmp_path):
    flags = dict(model_path=adapter, input_csv=asked, batch_size=2, noise_passes=2, **FAST | dict(max_new_tokens=40))
    assert answer_all_of_it(tmp_path / "whole.csv", **flags)[0] == [0]
    output, partial = tmp_path / "killed.csv", tmp_path / "killed.csv.partial"
    assert any([kill_when_there_are(wanted, output, **flags) for wanted in (2, 11, 20)])
    with (partial / "process-0.jsonl").open("ab") as file:
        file.write(b'[12, 3, "cut sh')  # what a kill within a write leaves
    for other, name in ((dict(seed=5), "seed"), (dict(noise_passes=3), "noise")):
        status, said = answer_all_of_it(output, **flags | other)
        assert status == [2] and f"unfinished run with other settings ({name})" in said
    status, said = answer_all_of_it(output, **flags)
    assert status == [0] and "answers are there already" in said, said
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not partial.exists()


@pytest.mark.slow
def test_two_killed_processes_go_on_as_one_and_give_the_same_file(adapter, asked, tmp_path):
    flags = dict(model_path=adapter, input_csv=asked, batch_size=1, **FAST | dict(max_new_tokens=40))
    assert answer_all_of_it(tmp_path / "whole.csv", **flags)[0] == [0]
    output, partial = tmp_path / "killed.csv", tmp_path / "killed.csv.partial"
    for wanted, processes in ((4, 2), (14, 1)):
        assert kill_when_there_are(wanted, output, processes, **flags)
        assert not output.exists() and partial.exists()
    assert {path.name for path in partial.glob("*.jsonl")} == {"process-0.jsonl", "process-1.jsonl"}
    status, said = answer_all_of_it(output, 2, **flags)
    assert status == [0, 0] and "answers are there already" in said, said
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not partial.exists()


def test_settings_of_a_newer_peft_and_an_unnamed_column_are_no_reason_to_refuse(adapter, asked, tmp_path):
    copy = copy_without(adapter, tmp_path, "nothing")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"brand_new_option": False}))
    indexed = tmp_path / "indexed.csv"  # as pandas writes it
    indexed.write_text(asked.read_text().replace("id,prompt", ",prompt"))
    rows = answer(tmp_path / "new.csv", model_path=copy, input_csv=indexed)
    old = answer(tmp_path / "old.csv", model_path=adapter, input_csv=asked)
    assert [row["generated_response"] for row in rows] == [row["generated_response"] for row in old]
    assert rows[3]["Unnamed: 0"] == "1"


def test_logits_that_are_no_numbers_are_said_and_nothing_stays(adapter, asked, tmp_path):
    with pytest.raises(InputError, match="logits are not finite"):
        answer(tmp_path / "out.csv", model_path=adapter, input_csv=asked, temperature=1e-39)
    assert [path.name for path in tmp_path.iterdir()] == ["asked.csv"]


def test_a_link_stays_one_and_the_answers_are_where_it_leads(adapter, asked, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "there.csv")
    for flags in ({}, dict(overwrite_output=True, seed=1)):
        answer(tmp_path / "link.csv", model_path=adapter, input_csv=asked, **flags)
        assert (tmp_path / "link.csv").is_symlink() and len(rows_of(tmp_path / "there.csv")) == 39


def test_the_same_prompt_in_two_rows_gets_answers_of_its_own(adapter, tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("prompt\nWhy?\nHow?\nWhy?\n")
    rows = answer(tmp_path / "out.csv", model_path=adapter, input_csv=path)
    assert [row["generated_response"] for row in rows[:3]] != [row["generated_response"] for row in rows[6:]]


def test_the_real_test_file_end_to_end(adapter, real_data, tmp_path):
    rows = answer(
        tmp_path / "out.csv", model_path=adapter, input_csv=real_data / "test_ground_truth.csv", max_new_tokens=5
    )
    assert len(rows) == 208 * 3
    found = score([str(tmp_path / "out.csv")], by=None)
    assert found["prompts"] == 208 and found["hallucination_rate"] > 0.9  # a random model knows nothing


def test_answers_of_any_text_survive_the_way_to_the_score(tmp_path):
    texts = ['Is it? "Yes", it is.', "two\nlines, or\rthree\r\n4", "<|im_start|>user", "", "Größe\u2028;'=cmd"]
    journal = Journal(tmp_path / "out.csv", 0)
    journal.folder.mkdir()
    journal.start({}, 1)
    journal.append((i, 1, Answer(text, -0.1 * i, i + 1)) for i, text in enumerate(texts))
    wanted = {(i, 1) for i in range(len(texts))}
    records = [{"prompt": f"Question, {i}?", "response": f'"{text}" is it.'} for i, text in enumerate(texts)]
    write_answers(tmp_path / "out.csv", records, journal.read(wanted), rounds=1)
    rows = rows_of(tmp_path / "out.csv")
    assert [row["generated_response"] for row in rows] == texts
    assert [(float(row["logprob"]), row["tokens"]) for row in rows] == [(-0.1 * i, str(i + 1)) for i in range(5)]
    assert score([str(tmp_path / "out.csv")], by=None)["right"] == 4  # the empty one is not


def test_true_answers_that_are_a_list_in_the_input_are_one_for_the_score(tmp_path):
    """JSON Lines and Parquet have lists; the CSV of the answers has them as JSON, not as Python prints them."""
    (tmp_path / "out.csv.partial").mkdir()
    records = [{"prompt": "Who?", "response": "Ada did.", "answers": ["Ada L.", "Lady's"]}]
    write_answers(tmp_path / "out.csv", records, {(0, 1): Answer("Lady's, I think", -0.5, 2)}, rounds=1)
    assert json.loads(rows_of(tmp_path / "out.csv")[0]["answers"]) == ["Ada L.", "Lady's"]
    assert score([str(tmp_path / "out.csv")], by=None)["right"] == 1


@pytest.mark.parametrize(
    "facts",
    ["So.", ["So."], ["So.", -0.5], ["So.", None, 3], ["So.", -0.5, 3.5], [["So."], -0.5, 3], ["So.", "-0.5", 3],
     ["So.", True, 3], ["So.", -0.5, 3, "x", 0.1], ["So.", -0.5, 3, 1.0, 0.1, 7], {"text": "So.", "a": 1, "b": 2}],
    ids=str,
)  # fmt: skip
def test_a_line_of_the_journal_that_is_no_answer_is_answered_again(facts, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0)
    journal.folder.mkdir()
    journal.start({}, 1)
    whole = ["So.", -0.5, 3]
    lines = [[0, 1, facts], [0, 1], [0, 1, *whole], [1, 1, whole]]
    journal.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert journal.read({(0, 1), (1, 1)}) == {(1, 1): Answer("So.", -0.5, 3)}


def test_an_answer_that_is_less_sure_than_the_threshold_is_replaced(tmp_path):
    (tmp_path / "out.csv.partial").mkdir()
    answers = {(i, 1): Answer(f"Answer {i}", logprob, 2, -1.0, 0.5) for i, logprob in enumerate((-0.5, -0.7, 0.0, -90))}
    for below, replaced in ((math.exp(-0.5), [1, 3]), (0.4, [3]), (0.0, []), (1.0, [0, 1, 3])):
        write_answers(tmp_path / "out.csv", [{"prompt": "a"}] * 4, answers, 1, Abstention(below, "No idea."))
        rows = rows_of(tmp_path / "out.csv")
        assert list(rows[0])[-3:] == ["noise_logprob_mean", "noise_logprob_spread", "answer_before_abstaining"]
        said = ["No idea." if i in replaced else f"Answer {i}" for i in range(4)]
        assert [row["generated_response"] for row in rows] == said
        assert [row["answer_before_abstaining"] for row in rows] == [f"Answer {i}" for i in range(4)]


def test_abstaining_replaces_answers_and_says_how_many(adapter, asked, tmp_path, capsys):
    plain = answer(tmp_path / "plain.csv", model_path=adapter, input_csv=asked)
    middle = sorted(float(row["logprob"]) for row in plain)[20]
    rows = answer(
        tmp_path / "out.csv", model_path=adapter, input_csv=asked, abstain_below=math.exp(middle) * (1 + 1e-9)
    )
    assert list(rows[0])[-3:] == ["logprob", "tokens", "answer_before_abstaining"]
    unsure = [float(row["logprob"]) <= middle for row in plain]
    assert 21 <= sum(unsure) < 39
    for row, before, is_unsure in zip(rows, plain, unsure, strict=True):
        assert row.pop("answer_before_abstaining") == before["generated_response"]
        assert row == before | ({"generated_response": "I do not know."} if is_unsure else {})
    said = capsys.readouterr().err
    assert f"{sum(unsure)} of 39 answers have a confidence under" in said and "noisefit.score knows" not in said
    flags = dict(input_csv=asked, rounds=1, max_new_tokens=1, abstain_below=1, refusal="Weiß nicht.")
    answer(tmp_path / "other.csv", model_path=adapter, **flags)
    assert "--refusal 'Weiß nicht.' is none that noisefit.score knows" in capsys.readouterr().err


def test_greedy_rounds_have_the_same_noise(adapter, asked, tmp_path):
    rows = answer(tmp_path / "a.csv", model_path=adapter, input_csv=asked, greedy=True, noise_passes=2, rounds=2)
    assert len(rows) == 26 and all(a | {"round": "2"} == b for a, b in zip(rows[::2], rows[1::2], strict=True))
    spreads = [float(row["noise_logprob_spread"]) for row in rows]
    assert all(spread > 0 for spread in spreads) and len(set(spreads)) > 8


def answers_in(partial) -> int:
    return sum(path.read_bytes().count(b"\n") for path in partial.glob("process-*.jsonl")) if partial.exists() else 0


def test_rows_without_a_prompt_are_counted_and_json_lines_work(adapter, tmp_path, capsys):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "Why?", "n": 1}\n{"prompt": ""}\n{"prompt": "Größe?", "m": "x"}\n')
    rows = answer(tmp_path / "out.csv", model_path=adapter, input_csv=path)
    assert [row["prompt"] for row in rows[::3]] == ["Why?", "Größe?"] and rows[0]["n"] == "1" and rows[3]["m"] == "x"
    assert "skipped 1 row with an empty or missing prompt (row 2)" in capsys.readouterr().err


def test_the_published_programs_defaults_are_kept_but_for_the_repetition_penalty():
    """Which was 1.2: it also penalizes the question's words, of which a right answer is made."""
    settings = parse_arguments(["--model_path", "a", "--input_csv", "q.csv"])
    expected = dict(
        input_csv="q.csv", rounds=5, max_new_tokens=50, temperature=0.5, top_p=0.9, top_k=40, repetition_penalty=1.0,
        model_id=None,
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings == AnswerSettings(model_path="a", input_csv="q.csv")


def copy_without(adapter, folder, name):
    copy = folder / "copy"
    copy.mkdir()
    for path in adapter.iterdir():
        if path.is_file() and path.name != name:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("flags", [[], ["--input_csv="]], ids=["none", "empty"])
def test_the_questions_must_be_given(flags):
    with pytest.raises(InputError, match="--input_csv is required"):
        parse_arguments(["--model_path", "a", *flags])
    with pytest.raises(TypeError, match="input_csv"):
        AnswerSettings(model_path="a")


def test_a_base_model_alone_has_no_noise():
    with pytest.raises(InputError, match="--noise_passes: a base model alone was trained with no noise"):
        parse_arguments(["--model_id", "a", "--input_csv", "q.csv", "--noise_passes", "2"])


def test_settings_of_a_program_are_held_to_the_rules_of_the_command_line():
    given = dict(model_id="m", input_csv="q.csv")
    flags = ["--model_id=m", "--input_csv=q.csv"]
    assert AnswerSettings(**given, top_k="7", rounds=2.0) == parse_arguments([*flags, "--top_k", "7", "--rounds", "2"])
    for name, value in [("top_p", 0), ("rounds", 2.5), ("temperature", 0), ("dtype", "float8"), ("greedy", "maybe")]:
        with pytest.raises(InputError, match=f"--{name}: "):
            AnswerSettings(**given | {name: value})
        with pytest.raises(InputError, match=f"--{name}: |argument --{name}: "):
            parse_arguments([*flags, f"--{name}={value}"])
    with pytest.raises(InputError, match=r"give --model_path, .*, or --model_id"):
        AnswerSettings(input_csv="q.csv")
    with pytest.raises(FrozenInstanceError):
        AnswerSettings(**given).rounds = 3
    assert isinstance(AnswerSettings(**given), DrawSettings)  # which is all that an `Answerer` takes


def test_an_adapter_that_records_no_base_is_asked_for_it(adapter, asked, tmp_path, llama_folder):
    copy = copy_without(adapter, tmp_path, "nothing")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match=r"adapter_config\.json names no base model; give it as --model_id") as caught:
        answer(tmp_path / "out.csv", model_path=copy, input_csv=asked)
    assert f"--model_path {copy}" in str(caught.value) and not (tmp_path / "out.csv").exists()
    rows = answer(tmp_path / "out.csv", model_path=copy, input_csv=asked, model_id=llama_folder)
    assert rows == answer(tmp_path / "old.csv", model_path=adapter, input_csv=asked)


def pickled(adapter, folder):
    copy = copy_without(adapter, folder, "adapter_model.safetensors")
    torch.save({}, copy / "adapter_model.bin")
    return dict(model_path=copy)


REFUSED = {
    "no prompt column": (lambda a, t: dict(input_csv=write(t, "question\nWhy?\n")), "no column 'prompt'"),
    "answers' column": (lambda a, t: dict(input_csv=write(t, "prompt,round\nWhy?,1\n")), "column 'round' already"),
    "answers' figures": (lambda a, t: dict(input_csv=write(t, "prompt,tokens\nWhy?,1\n")), "column 'tokens' already"),
    "an answer before": (
        lambda a, t: dict(input_csv=write(t, "prompt,answer_before_abstaining\nWhy?,1\n")),
        "'answer_before_abstaining' already",
    ),
    "noise of no run": (
        lambda a, t: dict(model_path=copy_without(a, t, "noisefit_config.json"), noise_passes=1),
        "noisefit_config.json: no such file, and --noise_passes needs this record of the adapter's run",
    ),
    "noise of a run without": (lambda a, t: dict(model_path=noiseless(a, t), noise_passes=1), "had no noise"),
    "missing input": (lambda a, t: dict(input_csv=t / "missing.csv"), "no such file"),
    "no adapter": (lambda a, t: dict(model_path=t), "no adapter_config.json in it"),
    "missing adapter": (lambda a, t: dict(model_path=t / "missing"), "no such folder"),
    "no weights": (
        lambda a, t: dict(model_path=copy_without(a, t, "adapter_model.safetensors")),
        "no adapter_model.safe",
    ),
    "pickled weights": (pickled, "no adapter_model.safetensors .pickles are not loaded"),
    "whole model": (lambda a, t: dict(model_path=tiny_folder(t / "m")), "holds a whole model: give it as --model_id"),
    "missing base": (lambda a, t: dict(model_id="./missing"), "--model_id ./missing: no such folder"),
    "other width": (
        lambda a, t: dict(model_id=tiny_folder(t / "m", hidden_size=64)),
        "does not fit .* trained on .*llama",
    ),
    "other model": (lambda a, t: dict(model_id=tiny_folder(t / "m", "gpt2")), "does not fit .* trained on .*llama"),
    "fewer layers": (lambda a, t: dict(model_id=tiny_folder(t / "m", num_hidden_layers=2)), "does not fit"),
    "long prompt": (
        lambda a, t: dict(input_csv=write(t, "prompt\nWhy?\n" + "x" * 100 + "\n")),
        "row 2: the prompt has",
    ),
    "output exists": (lambda a, t: dict(output_csv=write(t, "mine\n")), "exists; choose another name"),
    "no output folder": (lambda a, t: dict(output_csv=t / "no" / "a.csv"), "no folder"),
    "output is a folder": (lambda a, t: dict(output_csv=a_folder(t)), "a folder, expected a file name"),
    "template": (lambda a, t: dict(chat_template="chatlm"), "--chat_template chatlm"),
    "output is the input": (
        lambda a, t: dict(output_csv=t / "asked.csv", overwrite_output=True),
        "is the input itself",
    ),
    "output is no CSV": (lambda a, t: dict(output_csv=t / "a.parquet"), "expected a name that ends in .csv"),
    "someone's folder": (lambda a, t: dict(output_csv=in_the_way(t)), "mine.csv.partial is in the way"),
    "damaged weights": (lambda a, t: damaged(a, t), "adapter_model.safetensors: not a safetensors file"),
    "larger vocabulary": (lambda a, t: larger_vocabulary(a, t), "embeddings for 259"),
    "half a surrogate": (lambda a, t: dict(input_csv=write(t, '{"prompt": "\\ud800"}', "a.jsonl")), "row 1 holds half"),
    "unclosed quote": (lambda a, t: dict(input_csv=write(t, 'prompt\n"Why?\n')), "a quote in it is never closed"),
    "one name twice": (lambda a, t: dict(input_csv=write(t, "id,id,prompt\n1,2,Why?\n")), "'id' appears 2 times"),
}


def noiseless(adapter, folder):
    copy = copy_without(adapter, folder, "nothing")
    config = json.loads((copy / "noisefit_config.json").read_text())
    (copy / "noisefit_config.json").write_text(json.dumps(config | {"loss_mode": "basefit"}))
    return copy


def a_folder(folder):
    (folder / "folder.csv").mkdir()
    return folder / "folder.csv"


def in_the_way(folder):
    (folder / "mine.csv.partial").mkdir()
    (folder / "mine.csv.partial" / "thesis.txt").write_text("mine")
    return folder / "mine.csv"


def damaged(adapter, folder):
    copy = copy_without(adapter, folder, "nothing")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    return dict(model_path=copy)


def larger_vocabulary(adapter, folder):
    copy = copy_without(adapter, folder, "nothing")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["Why", "is"])
    tokenizer.save_pretrained(copy)
    return dict(model_path=copy)


def write(folder, text, name="written.csv"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_nothing_is_written(case, adapter, asked, tmp_path):
    make, message = REFUSED[case]
    flags = dict(output_csv=tmp_path / "out.csv", model_path=adapter, input_csv=asked) | make(adapter, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        answer(flags.pop("output_csv"), **flags)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--temperature 0", "use --greedy"),
        ("--top_p 0", "not a number above 0 and up to 1"),
        ("--rounds 0", "not a whole number from 1 to 1e+06"),
        ("--repetition_penalty 0", "above 0"),
        ("--round 3", "did you mean --rounds"),
        ("--abstain_below 1.5", "not a number from 0 to 1"),
        ("--abstain_below -0.1", "not a number from 0 to 1"),
        ("--abstain_below nan", "not a number from 0 to 1"),
        ("--abstain_below 0.5 --refusal=", "--refusal: it is empty"),
        ("--refusal No.", "--refusal says what --abstain_below answers"),
        ("--noise_passes -1", "not a whole number from 0"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(InputError) as caught:
        parse_arguments(["--model_path", "a", "--input_csv", "q.csv", *flags.split()])
    assert message in str(caught.value)


@pytest.mark.slow
def test_bad_input_ends_in_one_line_and_status_2(tmp_path, monkeypatch):
    argv = ["generate.py", f"--model_path={tmp_path / 'missing'}", f"--input_csv={tmp_path / 'q.csv'}"]
    monkeypatch.setattr(sys, "argv", argv)
    done = call(lambda argv: generate.main())
    assert done.returncode == 2
    assert done.stderr == f"generate.py: error: --model_path {tmp_path}/missing: no such folder\n"
    for flags, message in [((), "give --model_path"), (("--model_id", "m"), "--input_csv is required")]:
        done = call(lambda argv: generate.generate(parse_arguments(argv)), *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
