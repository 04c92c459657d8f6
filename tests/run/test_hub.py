"""A push to the hub: what goes there, what does not, what is checked before a training, and what a failure leaves.

The hub is a server on this machine. No test can reach the real one: anything that is not on this machine is sent to a
proxy that is not there.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hub_server import TOKEN, USER, serving
from running import call, launch, run

from noisefit import merge as merge_program
from noisefit import push as push_program
from noisefit.base.errors import InputError, LocalError
from noisefit.run.card import evaluation_of, evaluation_results, model_card
from noisefit.run.contradictions import without_effect
from noisefit.run.hub import PUBLISHED, check_repository, make_repository, publishable, reason_of
from noisefit.run.output import RECORDS
from noisefit.run.output_folder import OutputFolder
from noisefit.run.run_settings import HubSettings
from noisefit.run.settings import Settings, parse_arguments

pytestmark = pytest.mark.slow

NAME = f"{USER}/mine"
NOWHERE = {"HTTPS_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def output(llama_folder, tmp_path_factory) -> Path:
    """The output of a run with every record, and with files of somebody else and a checkpoint beside it."""
    folder = tmp_path_factory.mktemp("hub")
    rows = "".join(f"What is {i} and {i}?,It is {i + i}.\n" for i in range(8))
    (folder / "q.csv").write_text(f"prompt,response\n{rows}")
    flags = dict(max_steps=2, batch_size=2, gradient_accumulation_steps=1, eval_data=folder / "q.csv", save_steps=1)
    run(llama_folder, folder / "q.csv", folder / "out", **flags, unknown_rows="weight", unknown_below=-1,
        noise_policy="auto", loss_mode="full")  # fmt: skip
    (folder / "out" / "secret.json").write_text("{}")
    return folder / "out"


@pytest.fixture
def connected(monkeypatch):
    """The client as it is in a process of its own, and a token; it can reach this machine alone."""
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between its retries
    huggingface_hub.close_session()
    yield monkeypatch
    huggingface_hub.close_session()


@pytest.fixture
def hub(connected):
    with serving() as server:
        connected.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server
        assert server.wrong == []


def pushed(folder: Path, *words: str):
    return call(push_program.main, folder, "mine", *words)


def model_files(folder: Path) -> set[str]:
    """What a push should take, by another way than the push's: all there is, but for what is named here."""
    others = {"knowledge.csv", "noisefit_files.json", "secret.json", "rows.json", "samples.jsonl"}
    return {path.name for path in folder.iterdir() if path.is_file() and path.name not in others}


def test_a_push_takes_the_model_its_card_and_its_figures_byte_for_byte(hub, output):
    done = pushed(output)
    assert done.returncode == 0 and f"pushed: {hub.url}/{NAME}/commit/" in done.stderr, done.stderr
    assert hub.files(NAME) == {name: (output / name).read_bytes() for name in model_files(output)}
    assert hub.files(NAME).keys() > {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"}
    assert (output / "knowledge.csv").exists() and (output / "checkpoint-2").is_dir()  # and they stayed here
    assert hub.commits == 1 and not hub.repos[NAME]["private"]
    assert TOKEN not in done.stdout + done.stderr


def test_a_second_push_adds_a_commit_and_sends_no_large_file_again(hub, output):
    assert pushed(output).returncode == 0
    large = [line for line in hub.requests if line.startswith("PUT")]
    assert pushed(output).returncode == 0 and hub.commits == 2
    assert [line for line in hub.requests if line.startswith("PUT")] == large != []


def test_no_record_that_is_not_named_for_it_is_published(tmp_path):
    """A record that somebody adds to a run shows what it shows to nobody until it is named in `PUBLISHED`."""
    output = OutputFolder(tmp_path)
    showing_rows = {"knowledge.csv", "samples.jsonl", "rows.json"}
    assert not showing_rows & {*PUBLISHED} and {*PUBLISHED} < {*RECORDS}
    records = {*RECORDS, *showing_rows}
    names = [*records, "new.jsonl", "new.csv", "adapter_model.safetensors", "vocab.txt"]
    for name in names:
        (tmp_path / name).write_text("{}")
    output.expect(*names, "checkpoint-1/", "previous_run/", "teacher_cache/")
    (tmp_path / "not_the_runs.json").write_text("{}")
    assert set(publishable(output, records)) == {*PUBLISHED, "adapter_model.safetensors", "vocab.txt"}


@pytest.mark.parametrize("how", ["a link", "changed", "missing"])
def test_what_is_not_as_the_run_wrote_it_is_not_published(how, tmp_path):
    """Nor what somebody's link leads to. A card may be edited."""
    folder, elsewhere = tmp_path / "out", tmp_path / "secret"
    output = OutputFolder(folder)
    (tmp_path / "staged").mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (tmp_path / "staged" / name).write_text(name)
    output.start()
    output.move_in(tmp_path / "staged")
    (folder / "README.md").write_text("My own words.")
    assert publishable(output, RECORDS) == ["README.md", "config.json", "model.safetensors"]
    for name in ("config.json", "README.md"):
        before = (folder / name).read_bytes()
        elsewhere.write_bytes(before)
        (folder / name).unlink()
        if how == "a link":
            (folder / name).symlink_to(elsewhere)
        elif how == "changed" and name != "README.md":
            (folder / name).write_text("{}")
        elif how == "changed":
            continue
        with pytest.raises(InputError, match=f"{name}: not as the run wrote it"):
            publishable(output, RECORDS)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(before)


def test_a_folder_of_templates_goes_along(tmp_path):
    output = OutputFolder(tmp_path)
    (tmp_path / "staged" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "staged" / "additional_chat_templates" / "tool.jinja").write_text("x")
    (tmp_path / "staged" / "model.safetensors").write_text("x")
    output.start()
    output.move_in(tmp_path / "staged")
    (tmp_path / "additional_chat_templates" / "mine.jinja").write_text("somebody else's")
    assert publishable(output, RECORDS) == ["additional_chat_templates/tool.jinja", "model.safetensors"]


# --- A training that pushes -------------------------------------------------------------------------------------------


def test_a_training_pushes_what_it_leaves(hub, llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    flags = dict(max_steps=1, batch_size=2, eval_data=questions, push_to_hub="mine", hub_private=True)
    run(llama_folder, questions, out, **flags)
    assert hub.files(NAME) == {name: (out / name).read_bytes() for name in model_files(out)}
    assert hub.repos[NAME]["private"]
    made, last = (
        hub.requests.index("POST /api/repos/create"),
        hub.requests.index(f"POST /api/models/{NAME}/commit/main"),
    )
    assert made < hub.requests.index("POST /api/validate-yaml") < last == len(hub.requests) - 1
    recorded = json.loads((out / "noisefit_config.json").read_text())
    assert not {"push_to_hub", "hub_private"} & recorded.keys()  # who repeats the run does not replace its model
    again = parse_arguments([f"--config={out / 'noisefit_config.json'}"])
    assert again.push_to_hub is None and without_effect(again) is None
    for path in out.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_a_launch_of_two_processes_pushes_once(llama_folder, questions, tmp_path):
    """As a user does it, with the client's own ways to find the hub and the token."""
    out = tmp_path / "out"
    flags = ["--model", llama_folder, "--train_data", questions, "--output_model", out, "--max_steps", "1"]
    with serving() as hub:
        environment = NOWHERE | dict(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN,
                                     HF_HOME=str(tmp_path / "home"))  # fmt: skip
        done = launch("train_loop.py", *map(str, flags), "--push_to_hub", NAME, processes=2, **environment)
        assert done.returncode == 0, done.stderr
        assert hub.files(NAME) == {name: (out / name).read_bytes() for name in model_files(out)}
        assert hub.commits == 1 and hub.requests.count("GET /api/whoami-v2") == 1 and not hub.wrong
    assert "processes: 2" in done.stderr and TOKEN not in done.stdout + done.stderr
    kept = [path for folder in (out, tmp_path / "home") for path in folder.rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if TOKEN.encode() in path.read_bytes()]


# --- What is told before the model is loaded -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [("a/b/c", "no name of a repository"), ("mine--", "no name of a repository"), ("", "no name of a repository"),
     ("../x", "no name of a repository"), ("mine.git", "no name of a repository")],
)  # fmt: skip
def test_a_name_that_the_hub_would_not_take_is_refused(name, said):
    with pytest.raises(InputError, match=f"--push_to_hub: {said}"):
        Settings(model="m", train_data="t", push_to_hub=name)


def test_private_alone_is_refused():
    with pytest.raises(InputError, match="--hub_private says how --push_to_hub makes a repository"):
        Settings(model="m", train_data="t", hub_private=True)


def test_nothing_is_trained_without_a_token(connected, llama_folder, questions, tmp_path):
    connected.delenv("HF_TOKEN")
    connected.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=f"{NAME} on the hub: no token to push with; run `hf auth login`"):
        run(llama_folder, questions, tmp_path / "out", push_to_hub=NAME)
    assert not (tmp_path / "out").exists()


def test_nor_offline(connected, llama_folder, questions, tmp_path):
    connected.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, with which nothing can be pushed"):
        run(llama_folder, questions, tmp_path / "out", push_to_hub=NAME)
    assert not (tmp_path / "out").exists()


def test_nor_where_the_hub_refuses(hub, llama_folder, questions, tmp_path, capsys):
    def refused(name: str, said: str, **flags: object) -> None:
        with pytest.raises(InputError, match=said) as caught:
            run(llama_folder, questions, tmp_path / "out", push_to_hub=name, **flags)
        assert not (tmp_path / "out").exists() and TOKEN not in str(caught.value)

    refused("bob/his", r"bob/his on the hub: the token may not do that \(status 403\) You don't have the rights")
    hub.role = "read"
    refused("mine", "the token may read and not write; make one with the role write")
    hub.role = "write"
    os.environ["HF_TOKEN"] = "hf_anotherOne"
    refused("mine", r"it does not accept the token \(status 401\)")
    os.environ["HF_TOKEN"] = TOKEN
    hub.repos[NAME] = {"private": False, "files": {}}
    refused("mine", "is there already and public, and --hub_private asks for a private one", hub_private=True)
    hub.broken = lambda method, path: 500
    refused("mine", r"it failed \(status 500\)")
    assert not hub.commits


def test_nor_where_the_hub_is_not_to_be_reached(connected, llama_folder, questions, tmp_path):
    with pytest.raises(LocalError, match=r"mine on the hub: it cannot be reached: .*refused"):
        run(llama_folder, questions, tmp_path / "out", push_to_hub="mine")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_bad_makes_no_repository(hub, llama_folder, tmp_path):
    (tmp_path / "q.csv").write_text("prompt,answer\na,b\n")
    with pytest.raises(InputError, match="response"):
        run(llama_folder, tmp_path / "q.csv", tmp_path / "out", push_to_hub="mine")
    assert not hub.repos


def test_that_others_do_not_have_the_base_model_is_said(hub, llama_folder, capsys):
    settings = HubSettings(push_to_hub="mine")
    check_repository(settings, base=str(llama_folder))
    assert f"mine on the hub will be an adapter of {llama_folder}, a folder of this machine" in capsys.readouterr().err
    check_repository(settings, base="Qwen/Qwen2.5-0.5B")
    assert not capsys.readouterr().err and not hub.repos
    make_repository(settings)
    assert NAME in hub.repos


# --- What goes wrong at the end -----------------------------------------------------------------------------------


def test_a_push_that_fails_keeps_the_run_and_says_how_to_push_again(hub, llama_folder, questions, tmp_path, capsys):
    hub.broken = lambda method, path: 401 if "/commit/" in path else None
    with pytest.raises(LocalError, match="mine on the hub: not pushed: it does not accept the token") as caught:
        run(llama_folder, questions, tmp_path / "out", max_steps=1, batch_size=2, push_to_hub="mine")
    out = tmp_path / "out"
    assert f"{out} holds the adapter with its tokenizer and card" in capsys.readouterr().err
    assert not hub.files(NAME) and TOKEN not in str(caught.value)
    hub.broken = lambda method, path: None
    said, _, command = str(caught.value).partition("pushes it again: ")
    assert f"{out} is whole" in said and command.startswith("python -m noisefit.push ")
    done = call(push_program.main, *command.split()[3:])
    assert done.returncode == 0, done.stderr
    assert hub.files(NAME) == {name: (out / name).read_bytes() for name in model_files(out)}


@pytest.mark.parametrize(
    ("method", "place", "status", "said"),
    [
        ("POST", "preupload", 404, "there is no such place (status 404)"),
        ("PUT", "storage", 403, "the token may not do that (status 403)"),
        ("PUT", "storage", 0, "it cannot be reached: "),
        ("POST", "commit", 500, "it failed (status 500)"),
    ],
)
def test_a_push_that_ends_midway_leaves_nothing_there(method, place, status, said, hub, output):
    hub.broken = lambda asked, path: status if asked == method and place in path else None
    done = pushed(output)
    assert done.returncode == 2 and f"mine on the hub: not pushed: {said}" in done.stderr, done.stderr
    assert not hub.files(NAME) and TOKEN not in done.stderr and "Traceback" not in done.stderr
    hub.broken = lambda method, path: None
    assert pushed(output).returncode == 0 and hub.commits == 1


def test_metadata_that_the_hub_refuses_is_told(hub, output, tmp_path):
    card = (output / "README.md").read_text()
    folder = OutputFolder(tmp_path)
    for name in ("README.md", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((output / name).read_bytes())
    folder.expect("README.md", "adapter_model.safetensors")
    (tmp_path / "README.md").write_text(card.replace("---\n", "---\nbase_model: /home/ada/model\n", 1))
    done = pushed(tmp_path)
    assert done.returncode == 2 and not hub.commits
    assert 'not pushed: Invalid metadata in README.md. - "/home/ada/model" is not valid' in done.stderr


def test_what_no_run_left_is_not_pushed(hub, tmp_path):
    done = pushed(tmp_path / "none")
    assert done.returncode == 2 and done.stderr == f"noisefit.push: error: {tmp_path / 'none'}: no such folder\n"
    (tmp_path / "model.safetensors").write_text("x")
    done = pushed(tmp_path)
    assert done.returncode == 2 and "no run left a whole model there" in done.stderr
    assert call(push_program.main, tmp_path, "a/b/c").returncode == 2 and not hub.requests


def test_no_reason_holds_the_token(connected):
    for error in (ValueError(f"x {TOKEN} y"), OSError(TOKEN)):
        assert TOKEN not in reason_of(error) and "***" in reason_of(error)


def test_the_token_as_a_flag_leaves_the_command_line(hub, output, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr(sys, "argv", ["noisefit-push", str(output), "mine", f"--hf_token={TOKEN}"])
    push_program.main()
    assert hub.commits == 1 and TOKEN not in str(sys.argv)


# --- The card ---------------------------------------------------------------------------------------------------------


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_has_the_evaluation_as_the_hub_shows_it(output):
    text, line = (output / "README.md").read_text(), evaluation_of(output / "eval_metrics.jsonl")
    data = metadata_of(text)
    [entry] = data["model-index"]
    assert entry["name"] == "out" and line["step"] == 2
    [result] = entry["results"]
    assert result["task"]["type"] == "text-generation" and result["dataset"] == {"name": "q.csv", "type": "csv"}
    figures = {metric["type"]: (metric["name"], metric["value"]) for metric in result["metrics"]}
    assert figures["ce_loss"] == ("cross-entropy, nats a token", line["eval_ce_loss"])
    assert "target_tokens" not in figures and "epoch" not in figures
    loaded = huggingface_hub.ModelCard.load(output / "README.md").data  # by the hub's own reader
    assert {r.metric_type: r.metric_value for r in loaded.eval_results}["ce_loss"] == line["eval_ce_loss"]
    assert f"| `q.csv` | `cross-entropy, nats a token` | {line['eval_ce_loss']:.5g} |" in text
    assert "base_model" not in data and "datasets" not in data  # a folder and a file of this machine


def test_every_figure_of_an_evaluation_gets_its_entry():
    settings = Settings(model="Qwen/Qwen2.5-0.5B", train_data="t.csv", eval_data="held/out.jsonl", output_model="a/b")
    line = {"step": 9, "epoch": 1.5, "eval_ce_loss": 0.25, "eval_target_tokens": 80, "wrong_rate": 0.0,
            "hallucination_rate": 0.5, "eval_token_accuracy": None}  # fmt: skip
    results = evaluation_results(settings, line)
    assert [(r.metric_type, r.metric_value) for r in results] == [
        ("ce_loss", 0.25), ("wrong_rate", 0.0), ("hallucination_rate", 0.5)]  # fmt: skip
    assert {(r.dataset_name, r.dataset_type) for r in results} == {("out.jsonl", "json")}
    data = metadata_of(model_card(settings, 3, evaluation=line))
    assert data["base_model"] == "Qwen/Qwen2.5-0.5B" and data["model-index"][0]["name"] == "b"
    assert "model-index" not in metadata_of(model_card(settings, 3))
    named = dataclasses.replace(settings, train_data="ada/questions", eval_data=None)
    [result, *_] = evaluation_results(named, line)
    assert (result.dataset_name, result.dataset_type) == ("ada/questions (held out)", "ada/questions")
    assert metadata_of(model_card(named, 3, evaluation=line))["datasets"] == ["ada/questions"]


def test_no_evaluation_is_made_up_and_that_of_the_step_is_found(tmp_path):
    lines = [{"step": 3, "eval_ce_loss": 0.5}, {"step": 6, "eval_ce_loss": 0.75}]
    (tmp_path / "three").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [evaluation_of(tmp_path / "three", step) for step in (None, 3, 6, 7)] == [lines[1], *lines, {}]
    assert evaluation_of(tmp_path / "none") == {}
    for text in ("", "\n", "{", "3\n", "[" * 5000):
        (tmp_path / "eval_metrics.jsonl").write_text(text)
        assert evaluation_of(tmp_path / "eval_metrics.jsonl") == {}


# --- A merged model -----------------------------------------------------------------------------------------------


def test_a_merged_model_is_pushed_with_its_card(hub, output, tmp_path):
    done = call(merge_program.main, output, "--output", tmp_path / "model", "--push_to_hub", "mine")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "model").iterdir()} - {"noisefit_files.json"}
    assert hub.files(NAME) == {name: (tmp_path / "model" / name).read_bytes() for name in names}
    assert {"model.safetensors", "config.json", "tokenizer.json", "noisefit_config.json"} < hub.files(NAME).keys()
    [entry] = metadata_of(hub.files(NAME)["README.md"].decode())["model-index"]
    assert entry["name"] == "mine" and entry["results"][0]["metrics"]
    hub.broken = lambda method, path: 403 if "/commit/" in path else None
    done = call(merge_program.main, output, "--output", tmp_path / "other", "--push_to_hub", "mine")
    assert done.returncode == 2 and "not pushed: the token may not do that" in done.stderr
    assert (tmp_path / "other" / "model.safetensors").is_file()
