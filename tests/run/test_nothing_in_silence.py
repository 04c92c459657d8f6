"""Results that could not be right are errors, and what is ours to decide is decided by our flags alone."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from running import PROCESSES, in_process, metrics_of, python, run, run_command, start, wait, words
from safetensors.torch import load_file, save_file
from tiny_folder import byte_tokenizer, tiny_folder

import generate
from noisefit.answers.loading import model_fingerprint
from noisefit.answers.settings import parse_arguments as parse_answer_arguments
from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.files import alone_in
from noisefit.inputs import templates
from noisefit.inputs.templates import CHATML, set_chat_template
from noisefit.report.__main__ import report
from noisefit.report.runs import read_runs
from noisefit.run.card import model_card
from noisefit.run.settings import Settings, parse_arguments
from noisefit.score import score
from train_loop import train

pytestmark = pytest.mark.slow

FAST = dict(learning_rate=1e-2, max_steps=2, logging_steps=1)
ASK = dict(rounds=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "q.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i + i}.\n" for i in range(16)))
    run(llama_folder, data, folder / "adapter", **FAST)
    return folder / "adapter"


def answer(output: Path, **flags) -> list[str]:
    generate.generate(parse_answer_arguments(words(output_csv=output, **ASK | flags)))
    with output.open(encoding="utf-8", newline="") as file:
        return [row["generated_response"] for row in csv.DictReader(file)]


def copy_of(folder: Path, place: Path, **changes: object) -> Path:
    """A copy of a model's folder; `config=...` and `generation_config=...` are merged into these files."""
    shutil.copytree(folder, place)
    for name, change in changes.items():
        path = place / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return place


# --- Settings in a model's files --------------------------------------------------------------------------------------


def test_a_model_whose_config_turns_the_cache_off_answers_the_same(llama_folder, questions, tmp_path):
    other = copy_of(llama_folder, tmp_path / "m", config={"use_cache": False}, generation_config={"use_cache": False})
    expected = answer(tmp_path / "a.csv", model_id=llama_folder, input_csv=questions)
    assert answer(tmp_path / "b.csv", model_id=other, input_csv=questions) == expected
    assert answer(tmp_path / "c.csv", model_id=other, input_csv=questions, batch_size=1) == expected


SETTINGS = {
    "penalty": dict(repetition_penalty=1.7, no_repeat_ngram_size=1, temperature=3.0, do_sample=True, top_k=1),
    "beams": dict(num_beams=4, length_penalty=2.0, early_stopping=True),
    "tokens": dict(suppress_tokens=list(range(3, 200)), forced_eos_token_id=2, bad_words_ids=[[40], [41]]),
    "lengths": dict(min_new_tokens=6, max_length=3, max_time=0.0, num_return_sequences=2, do_sample=True),
    "modes": dict(penalty_alpha=0.6, prompt_lookup_num_tokens=3, cache_implementation="static", guidance_scale=3.0),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_generation_settings_of_the_model_are_said_and_not_applied(case, adapter, llama_folder, tmp_path, capsys):
    other, questions = copy_of(llama_folder, tmp_path / "m", generation_config=SETTINGS[case]), tmp_path / "q.csv"
    questions.write_text("prompt\nWhat is 3?\nWhy?\n")
    for flags in ({}, dict(greedy=True), dict(no_merge=True)):
        flags |= dict(input_csv=questions, model_path=adapter, overwrite_output=True)
        expected = answer(tmp_path / "a.csv", **flags)
        capsys.readouterr()
        assert answer(tmp_path / "b.csv", **flags, model_id=other) == expected
        said = capsys.readouterr().err
        assert "generation_config.json asks for" in said and "the flags alone decide" in said
        assert all(f"{name}=" in said for name in SETTINGS[case])


def test_a_model_without_such_settings_is_passed_over_in_silence(llama_folder, questions, tmp_path, capsys):
    answer(tmp_path / "a.csv", model_id=llama_folder, input_csv=questions)
    assert "generation_config.json" not in capsys.readouterr().err


# --- Weights ----------------------------------------------------------------------------------------------------------


def change_weights(folder: Path, change) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def rename(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
            r"its files lack .*\.2\.mlp\.up_proj\.weight",
        ),
        (rename, r"its files lack model\.layers\.0\.self_attn.* and 13 more; the files hold .*attention"),
    ],
    ids=["missing", "renamed"],
)
def test_weights_that_are_missing_or_named_otherwise_are_refused(change, message, llama_folder, questions, tmp_path):
    model = change_weights(copy_of(llama_folder, tmp_path / "m"), change)
    with pytest.raises(InputError, match=message):
        run(model, questions, tmp_path / "out", **FAST)
    with pytest.raises(InputError, match=message):
        answer(tmp_path / "a.csv", model_id=model, input_csv=questions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "questions.csv"]


def test_weights_that_have_no_place_are_said(llama_folder, questions, tmp_path, capsys):
    model = change_weights(copy_of(llama_folder, tmp_path / "m"), lambda t: t.update(extra=torch.zeros(1)))
    run(model, questions, tmp_path / "out", **FAST)
    assert "its files hold tensors that this architecture has no place for: extra" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [dict(greedy=True), dict(top_k=0), dict(temperature=1.0)], ids=str)
def test_logits_that_are_not_numbers_are_refused_however_tokens_are_drawn(flags, llama_folder, questions, tmp_path):
    model = change_weights(copy_of(llama_folder, tmp_path / "m"), lambda t: t["lm_head.weight"][40].fill_(torch.nan))
    with pytest.raises(InputError, match="the model's logits are not finite numbers; look for NaN in the weights"):
        answer(tmp_path / "a.csv", model_id=model, input_csv=questions, **flags)
    assert not (tmp_path / "a.csv").exists()


def test_a_nan_in_the_adapter_is_refused(adapter, questions, tmp_path):
    broken = copy_of(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        answer(tmp_path / "a.csv", model_path=broken, input_csv=questions, greedy=True)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(llama_folder, questions, tmp_path):
    model = copy_of(llama_folder, tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["What"])
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=r"questions.csv: row 1: the tokenizer makes a token of number \d+, but"):
        run(model, questions, tmp_path / "out", **FAST)


# --- Rows -------------------------------------------------------------------------------------------------------------


def test_answers_that_are_cut_are_counted_and_told(llama_folder, tmp_path, capsys):
    data = tmp_path / "q.csv"
    data.write_text("prompt,response\nWhy?,No.\nWho?,Everybody that was there and then some more.\nHow?,So.\n")
    run(llama_folder, data, tmp_path / "out", **FAST, max_length=85, long_rows="cut")
    said = capsys.readouterr().err
    assert "of 1 row the answer's end is cut off at --max_length 85, so it is not learnt (row 2)" in said


def test_a_template_that_fails_on_one_row_says_which(llama_folder, tmp_path):
    data, template = tmp_path / "q.csv", tmp_path / "t.jinja"
    data.write_text("prompt,response\nWhy?,No.\n5,Yes.\n")
    fails = "{%- if messages[0]['content'] == '5' -%}{{ raise_exception('no fives') }}{%- endif -%}"
    template.write_text(CHATML + fails)
    with pytest.raises(InputError, match=r"q\.csv: row 2: the chat template cannot be rendered: no fives"):
        run(llama_folder, data, tmp_path / "out", **FAST, chat_template=template)
    with pytest.raises(InputError, match=r"q\.csv: row 2: the chat template cannot be rendered: no fives"):
        answer(tmp_path / "a.csv", model_id=llama_folder, input_csv=data, chat_template=template)


RECURSES = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"


@pytest.mark.parametrize(
    "text", [RECURSES, CHATML + "{{ '\\ud800' }}", "{{ 1 / 0 }}"], ids=["recurses", "half", "zero"]
)
def test_a_template_that_is_no_good_is_refused(text, llama_folder, questions, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(text)
    with pytest.raises(InputError, match="the chat template cannot be rendered"):
        run(llama_folder, questions, tmp_path / "out", **FAST, chat_template=template)


# --- A template with today's date -------------------------------------------------------------------------------------

DATED = "{{- 'Today Date: ' + strftime_now(\"%d %b %Y\") + '\\n' -}}" + CHATML


class Clock(datetime):
    day = 1

    @classmethod
    def now(cls, tz=None):
        return datetime(2031, 5, cls.day, 12, 30)


def test_a_run_that_is_resumed_tomorrow_sees_the_prompts_of_today(llama_folder, questions, tmp_path, monkeypatch):
    template, expected, out = tmp_path / "t.jinja", tmp_path / "expected", tmp_path / "out"
    template.write_text(DATED)
    flags = FAST | dict(chat_template=template, save_steps=1)
    monkeypatch.setattr(templates, "datetime", Clock)
    monkeypatch.setattr("noisefit.run.preparation.datetime", Clock)
    monkeypatch.setattr("noisefit.answers.journal.datetime", Clock)
    run(llama_folder, questions, expected, **flags | dict(max_steps=3))
    run(llama_folder, questions, out, **flags)
    Clock.day = 2
    run(llama_folder, questions, out, **flags | dict(max_steps=3), resume_from_checkpoint="latest")
    assert metrics_of(out)[-1]["loss"] == pytest.approx(metrics_of(expected)[-1]["loss"], rel=0.2)
    assert json.loads((out / "noisefit_config.json").read_text())["prompt_date"] == "2031-05-01T12:30:00"
    saved = (out / "chat_template.jinja").read_text()
    assert '"01 May 2031"' in saved and "strftime_now" not in saved
    # The adapter's own template is the training's; another model's is today's.
    answer(tmp_path / "a.csv", model_path=out, input_csv=questions)
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, str(template))
    assert "Today Date: 02 May 2031\n" in templates.prompt_text(tokenizer, "Why?")


def test_answers_that_go_on_tomorrow_are_to_the_prompts_of_today(llama_folder, questions, tmp_path, monkeypatch):
    template, output = tmp_path / "t.jinja", tmp_path / "a.csv"
    template.write_text(DATED)
    Clock.day = 1
    monkeypatch.setattr(templates, "datetime", Clock)
    monkeypatch.setattr("noisefit.answers.journal.datetime", Clock)
    flags = dict(model_id=llama_folder, input_csv=questions, chat_template=template, batch_size=1)
    expected = answer(tmp_path / "whole.csv", **flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("generate.gathered", interrupt)  # all are answered, and the CSV is not written
        answer(output, **flags)
    Clock.day = 2
    assert answer(output, **flags) == expected


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_template_may_ask_whether_there_is_a_date_as_that_of_llama_3_does():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '?' %}"
        "{%- endif %}{%- if strftime_now is not defined %}{{- 'no date' -}}{%- endif %}{{- 'Today Date: ' + day -}}"
    ) + CHATML
    set_chat_template(tokenizer, None, "2031-05-01")
    assert templates.prompt_text(tokenizer, "Why?").startswith("Today Date: 01 May 2031<|im_start|>user")
    assert not templates.asks_for_date(tokenizer)


# --- Paths and names --------------------------------------------------------------------------------------------------


def test_a_home_in_yaml_is_the_home_on_the_command_line(llama_folder, questions, tmp_path, monkeypatch):
    """Whatever is read of a model, its stop tokens too, is read from where it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    copy_of(llama_folder, tmp_path / "m", generation_config={"eos_token_id": [2, 14]})
    (tmp_path / "q.csv").write_text(questions.read_text())
    settings = dict(model="~/m", train_data="~/q.csv", eval_data="~/q.csv", output_model="~/yaml", max_steps=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    train(parse_arguments(words(config="~/run.yaml", logging_steps=1)))
    run(tmp_path / "m", tmp_path / "q.csv", tmp_path / "absolute", max_steps=2, logging_steps=1)
    for name in ("target_tokens", "loss"):
        both = [[line[name] for line in metrics_of(tmp_path / folder)] for folder in ("yaml", "absolute")]
        assert both[0] == both[1]
    flags = dict(model_path="~/yaml", input_csv="~/q.csv", output_csv="~/a.csv")
    generate.generate(parse_answer_arguments(words(**ASK | flags)))
    assert (tmp_path / "a.csv").exists()


def test_a_name_that_is_not_utf8_is_refused_at_the_start(llama_folder, questions, tmp_path):
    named = os.fsencode(tmp_path / "q") + b"\xff.csv"
    Path(os.fsdecode(named)).write_bytes(questions.read_bytes())
    running = start(llama_folder, Path(os.fsdecode(named)), tmp_path / "out")
    assert wait(running) == [2]
    said = (tmp_path / "out.log").read_bytes()
    assert b"Traceback" not in said
    assert b"\\udcff.csv: not UTF-8 text; if it is a file's name, rename the file" in said
    assert not (tmp_path / "out").exists()


def test_no_name_breaks_out_of_the_card(tmp_path):
    hostile = "a`b``` |\n# <script>"
    paths = dict(model=hostile, train_data=hostile, output_model=f'/x/{hostile}"', run_name=hostile)
    lines = model_card(Settings(**paths, loss_mode="basefit"), 3).splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert len(headings) == 2 and headings[1] == "## Settings" and not any(line == "# <script>" for line in lines)
    fences = [i for i, line in enumerate(lines) if line.startswith("````")]
    assert len(fences) == 2 and fences[1] == fences[0] + 2 and lines[fences[0]] == "````python"
    rows = [line for line in lines if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


# --- One output, one program ------------------------------------------------------------------------------------------


def test_a_second_generation_into_one_file_is_refused(llama_folder, questions, tmp_path):
    output = tmp_path / "a.csv"
    with alone_in(tmp_path / "a.csv.partial"), pytest.raises(InputError, match="another run is writing there"):
        answer(output, model_id=llama_folder, input_csv=questions)
    assert answer(output, model_id=llama_folder, input_csv=questions) and not (tmp_path / "a.csv.partial").exists()


def test_a_generation_that_finds_the_file_finished_meanwhile_does_not_replace_it(llama_folder, questions, tmp_path):
    """Two started at once; the slower one gets the lock when the quicker one has just written its file."""
    output, calls = tmp_path / "a.csv", []

    def check(path, *rest):
        calls.append(path)
        if len(calls) == 1:  # after its first look, before it has the lock
            output.write_text("of the other")
            return
        checked(path, *rest)

    checked = generate.check_answers_output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "check_answers_output", check)
        with pytest.raises(InputError, match=r"a\.csv exists"):
            answer(output, model_id=llama_folder, input_csv=questions)
    assert output.read_text() == "of the other" and not (tmp_path / "a.csv.partial").exists()


def test_what_somebody_puts_beside_unfinished_answers_stays(llama_folder, questions, tmp_path, monkeypatch):
    output, partial = tmp_path / "a.csv", tmp_path / "a.csv.partial"
    flags = dict(model_id=llama_folder, input_csv=questions)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("generate.gathered", interrupt)
        answer(output, **flags)
    names = ("thesis.txt", "process-7.jsonl", "process-0.jsonl.bak", "process-x.jsonl")
    for name in names:
        (partial / name).write_text("mine")
    (partial / "process-9.jsonl").mkdir()
    answer(output, **flags)
    assert sorted(path.name for path in partial.iterdir()) == sorted([*names, "process-9.jsonl"])
    assert all((partial / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"processes": 1e99}', '{"processes": "2"}'])
def test_a_folder_of_something_else_in_the_way_is_left_alone(content, llama_folder, questions, tmp_path):
    partial = tmp_path / "a.csv.partial"
    partial.mkdir()
    (partial / "settings.json").write_text(content)
    with pytest.raises(InputError, match=r"is in the way|other settings"):
        answer(tmp_path / "a.csv", model_id=llama_folder, input_csv=questions)
    assert (partial / "settings.json").read_text() == content


# --- Streams, limits and launches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffered", [True, False])
def test_a_training_goes_on_though_nobody_hears_it(buffered, llama_folder, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "" if buffered else "1")
    flags = words(model=llama_folder, train_data=questions, output_model=tmp_path / "closed", **FAST)
    done = run_command(["sh", "-c", 'exec "$0" train_loop.py "$@" >&- 2>&-', sys.executable, *flags])
    assert done.returncode == 0 and len(metrics_of(tmp_path / "closed")) == 2
    flags = words(model=llama_folder, train_data=questions, output_model=tmp_path / "full", **FAST)
    done = run_command(["sh", "-c", 'exec "$0" train_loop.py "$@" >/dev/full 2>&1', sys.executable, *flags])
    assert done.returncode == 0 and len(metrics_of(tmp_path / "full")) == 2
    assert not any(b"layer    SNR" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_the_score_is_said_whatever_letters_the_terminal_has(tmp_path):
    (tmp_path / "ü.csv").write_text("prompt,response,generated_response\nWhy?,So.,€\n", encoding="utf-8")
    done = python("-m", "noisefit.score", str(tmp_path / "ü.csv"), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and "\\xfc.csv: 1 answers" in done.stdout
    full = [sys.executable, "-m", "noisefit.score", str(tmp_path / "ü.csv")]
    for unbuffered in ("", "1"):
        done = run_command(["sh", "-c", '"$@" >/dev/full', "sh", *full], PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 2 and done.stderr == "noisefit.score: error: No space left on device\n"


def answer_within(argument: tuple[list[str], int]) -> None:
    """`generate.py` of a process whose files may have so many bytes."""
    argv, most = argument
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    with one_line_errors("generate.py"):
        generate.generate(parse_answer_arguments(argv))


def test_a_file_limit_while_answering_is_a_line_and_the_answers_so_far_stay(llama_folder, questions, tmp_path):
    output, partial, log = tmp_path / "a.csv", tmp_path / "a.csv.partial", tmp_path / "log"
    flags = ASK | dict(model_id=llama_folder, input_csv=questions, batch_size=8)
    expected = answer(tmp_path / "whole.csv", **flags)
    argument = words(output_csv=output, **flags), 800
    process = PROCESSES.Process(target=in_process, args=(answer_within, argument, {}, str(log)))
    process.start()
    assert wait([process]) == [2]
    assert "process-0.jsonl: cannot be written: File too large\n" in log.read_text()
    assert "Traceback" not in log.read_text()
    lines = (partial / "process-0.jsonl").read_bytes()
    assert lines.endswith(b"\n") and all(len(json.loads(line)) == 3 for line in lines.splitlines())
    assert answer(output, **flags) == expected and not partial.exists()


LAUNCHES = {
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "the launch cannot be what it asks for: .*fp8"),
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "the launch cannot be what it asks for: DeepSpeed is not"),
    "megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "the launch cannot be what it asks for: Megatron is not"),
    "rank": ({"RANK": "first"}, "the environment has RANK='first', expected a number"),
    "local rank": ({"LOCAL_RANK": "-1"}, "the environment has LOCAL_RANK='-1', expected a number"),
    "no such rank": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2: there is no such process"),
    "port": ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
             "the launch cannot be what it asks for: port must"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_launch_that_cannot_be_is_a_line(case, llama_folder, questions, tmp_path):
    environment, message = LAUNCHES[case]
    [running] = start(llama_folder, questions, tmp_path / "out", environment=environment, **FAST)
    assert wait([running]) == [2]
    said = (tmp_path / "out.log").read_text()
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    assert re.search(message, said), said


@pytest.fixture
def no_waiting():
    """What waits for a pipe's other end is woken, and fails."""

    def wake(number: int, frame: object) -> None:
        raise TimeoutError("it waited")

    before = signal.signal(signal.SIGALRM, wake)
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_where_files_belong_are_refused(llama_folder, questions, adapter, tmp_path, no_waiting):
    for name in ("f.csv", "f.yaml", "f.jinja", "f.json", "a.csv"):
        os.mkfifo(tmp_path / name)
    piped = copy_of(llama_folder, tmp_path / "m")
    (piped / "generation_config.json").unlink()
    os.mkfifo(piped / "generation_config.json")
    runs = [dict(train_data="f.csv"), dict(eval_data="f.csv"), dict(config="f.yaml"), dict(chat_template="f.jinja"),
            dict(noise_policy="f.json"), dict(model="m")]  # fmt: skip
    for case in runs:
        flags = dict(model=llama_folder, train_data=questions, output_model=tmp_path / "out")
        no_waiting()
        with pytest.raises(InputError, match=r"a pipe|not a file|expected snr, auto"):
            train(parse_arguments(words(**flags | {name: tmp_path / value for name, value in case.items()})))
    asked = [dict(input_csv="f.csv"), dict(output_csv="a.csv"), dict(model_id="m"), dict(chat_template="f.jinja")]
    for case in asked:
        flags = dict(model_id=llama_folder, input_csv=questions, output_csv=tmp_path / "b.csv", overwrite_output=True)
        no_waiting()
        with pytest.raises(InputError, match=r"a pipe|not a file"):
            flags |= {name: tmp_path / value for name, value in case.items()}
            generate.generate(parse_answer_arguments(words(**flags)))
    for program in (
        lambda: score([str(tmp_path / "f.csv")], None),
        lambda: read_runs([str(pipe_in(adapter, tmp_path))]),
    ):
        no_waiting()
        with pytest.raises(InputError, match=r"a pipe|not a file"):
            program()


def pipe_in(adapter: Path, tmp_path: Path) -> Path:
    folder = copy_of(adapter, tmp_path / "run")
    (folder / "layer_snr.json").unlink()
    os.mkfifo(folder / "layer_snr.json")
    return folder


def test_reports_take_flags_wherever_they_stand(adapter, tmp_path, capsys):
    other = copy_of(adapter, tmp_path / "other")
    report([str(adapter), "--output", str(tmp_path / "r"), str(other)])
    assert capsys.readouterr().out == f"{tmp_path}/r.png\n{tmp_path}/r.html\n" and (tmp_path / "r.png").exists()


def test_a_report_whose_keys_are_no_text_is_drawn(adapter, tmp_path):
    folder = copy_of(adapter, tmp_path / "odd", noisefit_config={"\ud800": "\udfff"})
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    (folder / "metrics.jsonl").write_text(json.dumps(line | {"layer_noise_to_signal": {"\ud800": 0.1}}) + "\n")
    report([str(folder), "--output", str(tmp_path / "r")])
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_a_rank_beyond_all_use_is_refused_as_such(llama_folder, questions, tmp_path):
    with pytest.raises(InputError, match="--lora_r: '1000000000' is not a whole number from 1 to 65536"):
        run(llama_folder, questions, tmp_path / "out", lora_r=10**9)


def test_a_tiny_model_of_impossible_sizes_is_refused(questions, tmp_path):
    model = tiny_folder(tmp_path / "m")
    for name, value in dict(
        num_hidden_layers=10**9, vocab_size=-1, hidden_size=1.5, max_position_embeddings="x"
    ).items():
        changed = copy_of(model, tmp_path / name, config={name: value})
        with pytest.raises(InputError, match="--model "):
            run(changed, questions, tmp_path / "out", **FAST)


# --- Neighbours of these, found by hostile users ----------------------------------------------------------------------


def test_a_model_s_folder_that_also_holds_an_adapter_is_refused(llama_folder, adapter, questions, tmp_path):
    both = copy_of(llama_folder, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, both / name)
    with pytest.raises(InputError, match=r"--model .*both: the folder holds a whole model and an adapter"):
        run(both, questions, tmp_path / "out", **FAST)
    with pytest.raises(InputError, match=r"--model_id .*both: the folder holds a whole model and an adapter"):
        answer(tmp_path / "a.csv", model_id=both, input_csv=questions)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (f"{{% set now = strftime_now %}}{{{{ now('%d') }}}}{CHATML}", "date in a way that cannot be kept"),
        (f"{{{{ (strftime_now)('%d') }}}}{CHATML}", "date in a way that cannot be kept"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
         "does not print the question"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused(template, said, llama_folder, questions, tmp_path):
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(InputError, match=said):
        run(llama_folder, questions, tmp_path / "out", chat_template=tmp_path / "t.jinja", **FAST)


def test_a_template_that_is_no_text_is_refused(llama_folder, questions, tmp_path):
    other = copy_of(llama_folder, tmp_path / "m", tokenizer_config={"chat_template": 5})
    assert not (other / "chat_template.jinja").exists()
    with pytest.raises(InputError, match="its chat template is no text"):
        run(other, questions, tmp_path / "out", **FAST)


def test_a_run_in_which_no_step_could_be_taken_saves_no_model(llama_folder, questions, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"selected": [0], "scales": [1e50]}))
    with pytest.raises(InputError, match="no step could be taken"):
        run(llama_folder, questions, tmp_path / "out", noise_policy=tmp_path / "p.json", **FAST)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_generation_settings_that_are_no_text_are_refused_by_both_programs(llama_folder, questions, tmp_path):
    other = copy_of(llama_folder, tmp_path / "m")
    (other / "generation_config.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"generation_config\.json: not to be read"):
        run(other, questions, tmp_path / "out", **FAST)
    with pytest.raises(InputError, match=r"generation_config\.json: not to be read"):
        answer(tmp_path / "a.csv", model_id=other, input_csv=questions)


def test_unfinished_answers_of_another_tokenizer_are_not_gone_on_with(adapter, llama_folder, tmp_path):
    copy = copy_of(adapter, tmp_path / "adapter")
    settings = parse_answer_arguments(words(model_path=copy, input_csv="q.csv"))
    before = model_fingerprint(settings, str(llama_folder), torch.device("cpu"))
    (copy / "metrics.jsonl").write_text("")  # which answers do not depend on
    assert model_fingerprint(settings, str(llama_folder), torch.device("cpu")) == before
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "x"}))
    assert model_fingerprint(settings, str(llama_folder), torch.device("cpu")) != before
