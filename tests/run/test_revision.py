"""A model of the hub at a revision: pinned, recorded, resumed and answered from. The hub's cache is laid out by hand,
as its client does it, so that nobody is asked."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from running import call, metrics_of, run, run_generate
from safetensors.torch import load_file
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM

from noisefit.answers.loading import base_revision
from noisefit.answers.settings import AnswerSettings
from noisefit.base.errors import InputError
from noisefit.run.checkpoint_files import read_state

NAME, OLD, NEW = "somebody/tiny", "a" * 40, "b" * 40
FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, max_steps=2, logging_steps=1)


@pytest.fixture
def cache(tmp_path, llama_folder, monkeypatch) -> Path:
    """`somebody/tiny`: at tag v1 the model of the other tests, on main one with other weights and another end token."""
    root = tmp_path / "cache" / "models--somebody--tiny"
    shutil.copytree(llama_folder, root / "snapshots" / OLD)
    tiny_folder(root / "snapshots" / NEW)
    model = AutoModelForCausalLM.from_pretrained(root / "snapshots" / NEW)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(root / "snapshots" / NEW)
    (root / "refs").mkdir()
    for ref, commit in (("main", NEW), ("v1", OLD)):
        (root / "refs" / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return root


def records(out: Path) -> tuple[dict, dict]:
    return tuple(json.loads((out / name).read_text()) for name in ("noisefit_config.json", "adapter_config.json"))


def test_a_run_is_of_the_commit_that_its_revision_stands_for(cache, llama_folder, questions, tmp_path, capfd):
    lines = run(NAME, questions, tmp_path / "v1", **FAST, model_revision="v1")
    assert f"is read at commit {OLD} (--model_revision v1)" in capfd.readouterr().err
    plain = run(llama_folder, questions, tmp_path / "folder", **FAST)
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    record, adapter = records(tmp_path / "v1")
    assert record["model_revision"] == adapter["revision"] == OLD and adapter["base_model_name_or_path"] == NAME
    assert f'revision="{OLD}"' in (tmp_path / "v1" / "README.md").read_text()
    # In the cache's main branch the weights are others, and the commit is recorded all the same.
    main = run(NAME, questions, tmp_path / "main", **FAST)
    assert main[0]["loss"] != lines[0]["loss"]
    record, adapter = records(tmp_path / "main")
    assert record["model_revision"] == adapter["revision"] == NEW
    # The record repeats the run when the branch has moved on.
    (cache / "refs" / "main").write_text(OLD)
    again = run(NAME, questions, tmp_path / "again", **FAST, config=tmp_path / "main" / "noisefit_config.json")
    assert [line["loss"] for line in again] == [line["loss"] for line in main]
    for one, other in (("v1", "folder"), ("again", "main")):
        one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (one, other))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_goes_on_from_the_same_commit_alone(cache, questions, tmp_path):
    flags = FAST | dict(save_steps=2, lr_scheduler_type="constant")
    run(NAME, questions, tmp_path / "out", **flags)
    (cache / "refs" / "main").write_text(OLD)
    more = flags | dict(max_steps=3, resume_from_checkpoint="latest")
    with pytest.raises(InputError, match=f"--model is {NAME} at {OLD} and was {NAME} at {NEW}: --model_revision takes"):
        run(NAME, questions, tmp_path / "out", **more)
    run(NAME, questions, tmp_path / "out", **more, model_revision=NEW)
    assert len(metrics_of(tmp_path / "out")) == 3
    assert read_state(tmp_path / "out" / "checkpoint-3")["run"]["files of --model"] == f"{NAME} at {NEW}"


@pytest.mark.parametrize("folder", [False, True])
def test_what_has_no_such_revision_is_one_line(folder, cache, llama_folder, questions, tmp_path):
    model = llama_folder if folder else NAME
    line = "is of a model on the hub" if folder else "at --model_revision v9"
    with pytest.raises(InputError, match=line):
        run(model, questions, tmp_path / "out", **FAST, model_revision="v9")
    assert not (tmp_path / "out").exists()


def test_answers_are_those_of_the_base_that_was_trained(cache, questions, tmp_path):
    out = tmp_path / "v1"
    run(NAME, questions, out, **FAST, model_revision="v1")
    settings = AnswerSettings(model_path=str(out), input_csv=str(questions))
    assert base_revision(settings, NAME) == OLD
    flags = ["--input_csv", questions, "--greedy", "--rounds", 1, "--max_new_tokens", 3]

    def answers(name: str, *more: object) -> str:
        done = call(run_generate, *flags, "--output_csv", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        return (tmp_path / name).read_text()

    own = answers("own.csv", "--model_path", out)
    assert answers("same.csv", "--model_path", out, "--model_revision", "v1") == own
    assert answers("main.csv", "--model_path", out, "--model_revision", "main") != own
    assert answers("base.csv", "--model_id", NAME) != answers("old.csv", "--model_id", NAME, "--model_revision", OLD)
    # As PEFT has it by itself, too.
    ids = torch.arange(5, 25)[None]
    loaded, base = (
        AutoPeftModelForCausalLM.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained(cache / "snapshots" / OLD),
    )
    with torch.no_grad(), loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, base(ids).logits)
