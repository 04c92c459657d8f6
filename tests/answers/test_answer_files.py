"""What `generate.py` leaves: JSON Lines as well as CSV, and beside the answers the settings that repeat them."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from running import words

import generate
from noisefit.answers import output as answers_output
from noisefit.answers.jobs import Answer
from noisefit.answers.judging import read_cases
from noisefit.answers.output import check_settings_output, json_value, settings_file, write_answers
from noisefit.answers.settings import parse_arguments
from noisefit.base.errors import InputError
from noisefit.benchmarks import score_letters
from noisefit.run.settings import parse_arguments as parse_training
from noisefit.score import score
from noisefit.threshold import find_threshold

ASKED = [
    {
        "id": 7,
        "prompt": "Who?",
        "response": "It is 3.",
        "answer": 3,
        "share": 0.5,
        "tags": ["a", "b"],
        "more": {"x": 1},
    },
    {"prompt": "When?", "response": "In 1946.", "answer": "", "answers": ["1946", "46"], "is_old": True, "id": None},
    {"prompt": "Größe, \u2028 or\nnot?", "response": '"So", it is.', "answer": "So", "id": 9, "share": 2},
]
FAST = dict(max_new_tokens=4, rounds=2, temperature=0.9)


@pytest.fixture
def asked(tmp_path) -> Path:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    return path


def answer(**flags):
    generate.generate(parse_arguments(words(**flags)))


def lines_of(path: Path) -> list[dict]:
    content = path.read_text(encoding="utf-8")
    assert content.endswith("\n")
    return [json.loads(line) for line in content.split("\n")[:-1]]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_json_lines_have_the_fields_of_the_csv_and_keep_their_types(llama_folder, asked, tmp_path):
    for name in ("a.csv", "a.jsonl"):
        answer(model_id=llama_folder, input_csv=asked, output_csv=tmp_path / name, **FAST)
    lines, rows = lines_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "a.csv")
    figures = ["generated_response", "round", "logprob", "tokens"]
    assert [list(line) for line in lines] == [[*row, *figures] for row in ASKED for _ in (1, 2)]
    assert [{name: line[name] for name in row} for row, line in zip(ASKED, lines[::2], strict=True)] == ASKED
    assert [line["round"] for line in lines] == [1, 2] * 3 and len(rows) == 6
    for line, row in zip(lines, rows, strict=True):
        assert type(line["logprob"]) is float and type(line["tokens"]) is int
        assert all(str(line[name]) == row[name] for name in ("prompt", "response", *figures))
        assert row["id"] == ("" if line["id"] is None else str(line["id"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["asked.jsonl", *(name + end for name in ("a.csv", "a.jsonl") for end in ("", ".settings.json"))]
    )


def test_all_that_read_answers_read_both_alike(tmp_path):
    """A true answer that is a number, in JSON Lines alone, is the text that it is in a CSV."""
    texts = ["It is 3.", "4, I think", "In 1946.", "I do not know.", "So.", "No."]
    answers = {(i, r): Answer(texts[2 * i + r - 1], -0.1 * (i + r), 3) for i in range(3) for r in (1, 2)}
    letters = [{"prompt": f"{i}?", "response": "A", "answer": "AB"[i], "choices": 2 + i} for i in range(2)]
    (tmp_path / "a.csv.partial").mkdir(), (tmp_path / "a.jsonl.partial").mkdir()
    found = []
    for name in ("a.csv", "a.jsonl"):
        path = tmp_path / name
        write_answers(path, ASKED, answers, 2)
        figures = score([str(path)], by="answer")
        assert (figures["right"], figures["wrong"], figures["prompts"]) == (3, 2, 3)
        cases = [(case.case, case.by_words) for case in read_cases(str(path))]
        write_answers(path, letters, {(i, 1): Answer("A", -0.5, 1) for i in range(2)}, 1)
        found.append([figures, cases, find_threshold(str(path), 0.6), score_letters(str(path))])
        for part in found[-1]:
            if isinstance(part, dict):
                assert part.pop("file") == str(path)
    assert found[0] == found[1]
    assert list(found[0][0]["by"]["answer"]) == ["3", "", "So"] and found[0][3]["accuracy"] == 0.5


def test_what_json_has_no_word_for_is_text_or_nothing():
    from datetime import date
    from decimal import Decimal

    assert json_value({"a": [date(2026, 1, 2), Decimal("1.5")], 2: (float("nan"), float("inf"), True, None)}) == {
        "a": ["2026-01-02", "1.5"],
        "2": [None, None, True, None],
    }


def test_the_settings_beside_the_answers_repeat_them(llama_folder, asked, tmp_path, monkeypatch):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%H %M %S') }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("sys.argv", ["generate.py"])
    given = dict(model_id=llama_folder, input_csv=asked, chat_template=template, hf_token="hf_secret", seed=5)
    answer(output_csv=tmp_path / "a.jsonl", **given, **FAST)
    recorded = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert recorded["seed"] == 5 and recorded["top_k"] == 40 and recorded["model_id"] == str(llama_folder)
    about = recorded["about"]
    assert (about["answers"], about["prompts"], about["processes"], about["device"]) == ("a.jsonl", 3, 1, "cpu")
    assert about["versions"]["transformers"] == transformers.__version__ and about["versions"]["torch"]
    assert about["skipped"] == {"number": 0, "first": []}
    assert len(about["model_fingerprint"]) == len(about["input_sha256"]) == 64
    assert about["prompt_date"] == recorded["prompt_date"] is not None and about["base_model"] == str(llama_folder)
    assert "secret" not in (tmp_path / "a.jsonl.settings.json").read_text() and "overwrite_output" not in recorded
    config = tmp_path / "a.jsonl.settings.json"
    answer(config=config, output_csv=tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    again = json.loads((tmp_path / "b.jsonl.settings.json").read_text())
    assert {**again, "output_csv": None, "about": None} == {**recorded, "output_csv": None, "about": None}
    assert again["about"] == about | {"answers": "b.jsonl"}
    answer(config=config, output_csv=tmp_path / "c.jsonl", seed=6)
    assert (tmp_path / "c.jsonl").read_bytes() != (tmp_path / "a.jsonl").read_bytes()
    answer(config=config, overwrite_output=True, rounds=1)
    assert len(lines_of(tmp_path / "a.jsonl")) == 3 and json.loads(config.read_text())["rounds"] == 1


def test_what_has_changed_since_the_answers_that_are_repeated_is_told(llama_folder, asked, tmp_path, capsys):
    data = tmp_path / "copy.jsonl"
    data.write_bytes(asked.read_bytes())
    model = shutil.copytree(llama_folder, tmp_path / "model")
    answer(model_id=model, input_csv=data, output_csv=tmp_path / "a.csv", **FAST)
    config, said = tmp_path / "a.csv.settings.json", f"--config {tmp_path / 'a.csv.settings.json'}: answers may be"

    def told(name: str, **flags: object) -> str | None:
        capsys.readouterr()
        answer(config=config, output_csv=tmp_path / name, **flags)
        return next((line for line in capsys.readouterr().err.splitlines() if line.startswith(said)), None)

    assert told("b.csv") is None and told("c.csv", rounds=1) is None
    data.write_text(data.read_text() + data.read_text())
    assert told("d.csv") == f"{said} others than its own, as the input has changed"
    assert told("e.csv", input_csv=data) is None  # as it was asked for
    (model / "generation_config.json").write_text('{"max_length": 99}')
    recorded = json.loads(config.read_text())
    recorded["about"]["versions"] |= {"torch": "1.0", "gone": "2"}
    config.write_text(json.dumps(recorded))
    changes = ["the model, or what it is computed on, has changed", f"torch was 1.0 and is {torch.__version__}",
               "gone was 2 and is not there"]  # fmt: skip
    assert told("f.csv", input_csv=data) == f"{said} others than its own, as {' and '.join(changes)}"
    assert changes[0] not in (told("g.csv", model_id=model) or "")
    for about in ("5", "[]", '{"versions": 5}'):
        config.write_text(json.dumps(recorded | {"about": json.loads(about)}))
        line = told(f"{len(about)}.csv")
        assert line is None or "versions" not in line


def test_flags_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("sys.argv", ["generate.py"])
    file = tmp_path / "answers.yaml"
    file.write_text(yaml.safe_dump(dict(model_path="a", input_csv="q.csv", rounds=3, greedy=True, hf_token="t")))
    found = parse_arguments(["--config", str(file), "--rounds", "2", "--no_greedy"])
    assert (found.model_path, found.rounds, found.greedy, found.top_p) == ("a", 2, False, 0.9)
    assert os.environ["HF_TOKEN"] == "t"
    for content, message in [
        ("top_p: 2", "--config .*answers.yaml: --top_p: '2' is not a number above 0"),
        ("rouns: 2", "no flag is called 'rouns'; did you mean --rounds"),
        ('{"noisefit_version": "0.1.0", "model": "m", "train_data": "t.csv"}',
         "it has train_data, so it is the settings of a training, for train_loop.py; expected flags of generate.py"),
        ("prompt_date: today", "--prompt_date: 'today' is no date"),
    ]:  # fmt: skip
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            parse_arguments(["--config", str(file), "--model_path", "a", "--input_csv", "q"])
    file.write_text("input_csv: q.csv")
    with pytest.raises(InputError, match=r"it has input_csv, so it is the settings of answers, for generate\.py"):
        parse_training(["--config", str(file)])


def test_what_stands_beside_the_answers_is_replaced_only_if_it_is_theirs(llama_folder, asked, tmp_path):
    """Before the model is looked for: there is none."""
    output = tmp_path / "a.csv"
    flags = dict(model_id=tmp_path / "none", input_csv=asked, output_csv=output)
    for content, message in [
        ("mine", "is in the way: it does not hold the settings of answers"),
        ('{"noisefit_version": "0.1.0", "train_data": "t"}', "is in the way"),
        ("[" * 10**5, "is in the way"),
    ]:
        settings_file(output).write_text(content)
        for overwrite in ({}, dict(overwrite_output=True)):
            with pytest.raises(InputError, match=message):
                answer(**flags, **overwrite)
        assert settings_file(output).read_text() == content
    settings_file(output).write_text('{"noisefit_version": "0.1.0", "about": {}}')
    with pytest.raises(InputError, match=r"a\.csv\.settings\.json is there without its answers; remove it, or give"):
        answer(**flags)
    with pytest.raises(InputError, match="none"):  # it is theirs: the next thing is looked at
        answer(**flags, overwrite_output=True)
    check_settings_output(output, overwrite=True)
    with pytest.raises(InputError, match="the name is too long for"):
        check_settings_output(tmp_path / f"{'n' * 245}.csv", overwrite=False)
    settings_file(output).unlink()
    settings_file(output).mkdir()
    with pytest.raises(InputError, match="a folder, expected a file"):
        answer(**flags)


def test_a_kill_between_the_two_files_is_no_reason_to_refuse(llama_folder, asked, tmp_path, monkeypatch):
    output, replace = tmp_path / "a.jsonl", os.replace

    def killed(source, target):
        if Path(target) == output:
            raise KeyboardInterrupt
        replace(source, target)

    flags = dict(model_id=llama_folder, input_csv=asked, output_csv=output, **FAST)
    monkeypatch.setattr(answers_output.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        answer(**flags)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"asked.jsonl", "a.jsonl.settings.json", "a.jsonl.partial"}
    monkeypatch.setattr(answers_output.os, "replace", replace)
    answer(**flags)
    assert {path.name for path in tmp_path.iterdir()} == {"asked.jsonl", "a.jsonl", "a.jsonl.settings.json"}
    assert len(lines_of(output)) == 6
