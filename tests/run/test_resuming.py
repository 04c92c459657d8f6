"""Which checkpoints a run goes on from, and which it refuses: other settings, other files, damage, and tampering."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from running import call, metrics_of, run, run_generate, start, wait, wait_until, words
from safetensors.torch import load_file, save_file
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM

from noisefit.base.errors import InputError
from noisefit.fork.branches import BranchedModel
from noisefit.method.policy import NoisePolicy
from noisefit.run.checkpoint_files import digest_of, list_checkpoints
from noisefit.run.output import start_output
from noisefit.run.output_folder import OutputFolder
from noisefit.run.settings import Settings

pytestmark = pytest.mark.slow

FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, epochs=9, logging_steps=1)


# --- Resuming what is not the same run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(llama_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A run of three steps with a checkpoint after each, and its data."""
    folder = tmp_path_factory.mktemp("finished")
    data = folder / "data.csv"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}.\n" for i in range(12)))
    run(llama_folder, data, folder / "out", **FAST, max_steps=3, save_steps=1, save_total_limit=0)
    return folder / "out", data


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    shutil.copytree(finished[0], tmp_path / "out")
    shutil.copyfile(finished[1], tmp_path / "data.csv")
    return tmp_path / "out", tmp_path / "data.csv"


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(seed=1), "seed was 42 and is 1"),
        (dict(noise_std=0.2, num_noise_layers=2), "noise_std was 0.1 and is 0.2; num_noise_layers was 3 and is 2"),
        (dict(batch_size=4), "rows an optimizer step was 4 and is 8"),
        (dict(learning_rate=1e-3), "learning_rate was 0.01 and is 0.001"),
        (dict(max_steps=2), "stands after step 3, but --max_steps or --epochs end the run at step 2"),
    ],
    ids=str,
)
def test_other_settings_are_refused_with_what_differs(flags, message, copied, llama_folder):
    out, data = copied
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        run(llama_folder, data, out, **FAST | dict(max_steps=5) | flags, resume_from_checkpoint="latest")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_rows_or_another_model_are_refused(copied, llama_folder, tmp_path):
    out, data = copied
    flags = FAST | dict(max_steps=5, resume_from_checkpoint="auto")
    other = tiny_folder(tmp_path / "other")
    weights = AutoModelForCausalLM.from_pretrained(other)
    weights.lm_head.weight.data[0, 0] += 1
    weights.save_pretrained(other)
    with pytest.raises(InputError, match=r"the files of --model have changed\. Resume it with its own, or start"):
        run(other, data, out, **flags)
    data.write_text(data.read_text().replace("It is 7.", "It is 8."))
    with pytest.raises(InputError, match=r"checkpoint-3 is of a run .*the rows of --train_data have changed"):
        run(llama_folder, data, out, **flags)


def test_more_steps_other_records_and_another_cut_or_place_are_fine(copied, llama_folder, tmp_path, capsys):
    out, data = copied
    moved = shutil.copytree(llama_folder, tmp_path / "moved")
    flags = FAST | dict(max_steps=8, logging_steps=2, batch_size=1, gradient_accumulation_steps=4, save_steps=0)
    lines = run(moved, data.rename(tmp_path / "renamed.csv"), out, **flags, resume_from_checkpoint="latest")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6, 8]
    said = capsys.readouterr().err
    assert "going on from" in said and "now follows a schedule of 8 steps instead of 3" in said
    # The learning rate follows the schedule of the run as it is now: at its end, not at that of the first part.
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) * 1e-2 for step in (5, 7)]
    assert [line["learning_rate"] for line in lines[-2:]] == pytest.approx(cosine)


def test_a_run_goes_on_in_another_folder_and_leaves_the_first_alone(finished, llama_folder, tmp_path):
    out, data = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flags = FAST | dict(max_steps=3, resume_from_checkpoint=out / "checkpoint-2")
    lines = run(llama_folder, data, tmp_path / "other", **flags)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() == before[out / "adapter_model.safetensors"]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics_of(out)]


def test_latest_is_the_one_saved_last_after_going_back(copied, llama_folder):
    out, data = copied
    flags = FAST | dict(max_steps=2, save_steps=1, save_total_limit=2)
    run(llama_folder, data, out, **flags, resume_from_checkpoint=out / "checkpoint-1")
    assert [folder.name for folder in list_checkpoints(out)] == ["checkpoint-3", "checkpoint-2"]
    lines = run(llama_folder, data, out, **flags | dict(max_steps=3), resume_from_checkpoint="latest")
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_weight_that_never_had_a_gradient_is_no_reason_to_refuse(llama_folder, questions, tmp_path, monkeypatch):
    """As an adapter on a vision tower has none in training on text: here that of the last layer."""
    whole_forward = BranchedModel.forward

    def forward(self, *args, **kwargs):
        for name, parameter in self.named_parameters():
            if "layers.3" in name:
                parameter.requires_grad_(False)
        return whole_forward(self, *args, **kwargs)

    monkeypatch.setattr(BranchedModel, "forward", forward)
    flags = FAST | dict(save_steps=2, max_steps=4, save_total_limit=0)
    run(llama_folder, questions, tmp_path / "whole", **flags)
    resume = tmp_path / "whole" / "checkpoint-2"
    run(llama_folder, questions, tmp_path / "resumed", **flags, resume_from_checkpoint=resume)
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_fine_tuning_resumes_as_the_same_run(checkpointing, llama_folder, questions, tmp_path):
    flags = FAST | dict(save_steps=2, max_steps=4, save_total_limit=0, full_finetune=True)
    flags |= dict(gradient_checkpointing=True, packing=True) if checkpointing else {}
    run(llama_folder, questions, tmp_path / "whole", **flags)
    resume = tmp_path / "whole" / "checkpoint-2"
    run(llama_folder, questions, tmp_path / "resumed", **flags, resume_from_checkpoint=resume)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


def test_latest_needs_a_checkpoint_and_auto_does_not(llama_folder, questions, tmp_path):
    with pytest.raises(InputError, match=r"latest: no checkpoint in .*out; auto starts afresh where there is none"):
        run(llama_folder, questions, tmp_path / "out", **FAST, max_steps=1, resume_from_checkpoint="latest")
    assert not (tmp_path / "out").exists()
    assert len(run(llama_folder, questions, tmp_path / "out", **FAST, max_steps=1, resume_from_checkpoint="auto")) == 1


# --- Checkpoints that are damaged or tampered with --------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(path: Path, evil: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path, evil: Path) -> None:
    path.unlink()


def pickle_of_the_same_size(path: Path, evil: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(pickle.dumps(Evil(evil)).ljust(size, b"\0"))


DAMAGES = [
    ("adapter_model.safetensors", cut, "is not a safetensors file"),
    ("metrics.jsonl", cut, "metrics.jsonl has \\d+ bytes instead of \\d+"),
    ("optimizer.safetensors", remove, "optimizer.safetensors is missing"),
    ("checkpoint.json", remove, "no checkpoint.json in it"),
    ("checkpoint.json", pickle_of_the_same_size, "checkpoint.json is not readable as one of a checkpoint"),
    ("adapter_model.safetensors", pickle_of_the_same_size, "is not a safetensors file; nothing else is loaded"),
    ("processes.safetensors", pickle_of_the_same_size, "is not a safetensors file; nothing else is loaded"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_checkpoint_that_is_not_whole_is_passed_over_or_refused(
    name, damage, message, copied, llama_folder, tmp_path, capsys
):
    out, data = copied
    adapter = (out / "adapter_model.safetensors").read_bytes()
    evil = tmp_path / "evil"
    damage(out / "checkpoint-3" / name, evil)
    flags = FAST | dict(max_steps=3)
    with pytest.raises(InputError, match=message):
        run(llama_folder, data, out, **flags, resume_from_checkpoint=out / "checkpoint-3")
    run(llama_folder, data, out, **flags, resume_from_checkpoint="latest")
    assert f"{out}/checkpoint-3 is passed over: " in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert not evil.exists()


EDITS = {
    "loop": dict(
        step=["8", 8.5, -3, True, 4], seen_targets=["x", None, -1], bad_steps=["x", 99], strategy=["nope", 3, None],
        policy=[
            None, "x", [], dict(layer=[0]),
            *(dict(layers=layers) for layers in ([99], [-1], ["0"], "012", None, [0, 0], [1, 0], [True])),
            *(dict(layers=[0], snr=snr) for snr in ("x", None, [[1.0]], [1.0], [float("nan")] * 4)),
            *(dict(kind="calibrated", layers=[0], base_stds=scales)
              for scales in ([], [1.0, 1.0], [-1.0], ["1"], [float("inf")], "1")),
            *(dict(layers=[0], kind=kind) for kind in ("other", None, 3)), dict(layers=[0], calibration=[]),
        ],
    ),
    "metrics": dict(
        steps=["1", -1], targets=[0.5], seconds=[-1, float("inf")], noisy_steps=[None, "x", [1, 1], [0, 0, 0, 0, -1]],
    ),
    "schedule": dict(last_epoch=["3", -5, 10**30]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [(part, name, value) for part, names in EDITS.items() for name, values in names.items() for value in values],
)
def test_an_edited_checkpoint_is_refused_in_a_line(part, name, value, copied, llama_folder):
    out, data = copied
    path = out / "checkpoint-3" / "checkpoint.json"
    state = json.loads(path.read_text())
    state[part][name] = value
    path.write_text(json.dumps(state))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"checkpoint-3|--max_steps"):
        run(llama_folder, data, out, **FAST, max_steps=3, resume_from_checkpoint=out / "checkpoint-3")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "null", '{"saved_at": Infinity}'], ids=lambda text: text[:9])
def test_a_checkpoint_json_of_something_else_is_passed_over(text, copied, llama_folder, capsys):
    out, data = copied
    (out / "checkpoint-3" / "checkpoint.json").write_text(text)
    run(llama_folder, data, out, **FAST, max_steps=3, resume_from_checkpoint="latest")
    assert f"{out}/checkpoint-3 is passed over: checkpoint.json is not readable" in capsys.readouterr().err


def replace_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a file's tensors and make its checkpoint agree, so that only what they are can tell."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    state = json.loads((path.parent / "checkpoint.json").read_text())
    state["files"][path.name] = digest_of(path)
    (path.parent / "checkpoint.json").write_text(json.dumps(state))


TENSORS = {
    "not finite": ("optimizer.safetensors", lambda t: next(iter(t.values())).fill_(float("nan"))),
    "another shape": ("optimizer.safetensors", lambda t: t.update({max(t): torch.zeros(3)})),
    "of no parameter": ("optimizer.safetensors", lambda t: t.update({"model.head.exp_avg": torch.zeros(3)})),
    "no random state": ("processes.safetensors", lambda t: t.pop("0.random.torch")),
    "adapter not finite": ("adapter_model.safetensors", lambda t: next(iter(t.values())).fill_(float("inf"))),
    "adapter lacking": ("adapter_model.safetensors", lambda t: t.popitem()),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_checkpoint_with_other_tensors_than_the_run_has_is_refused(case, copied, llama_folder):
    out, data = copied
    name, change = TENSORS[case]
    replace_tensors(out / "checkpoint-3" / name, change)
    with pytest.raises(InputError, match=r"checkpoint-3: (its files do not fit|not to be loaded)"):
        run(llama_folder, data, out, **FAST, max_steps=5, resume_from_checkpoint=out / "checkpoint-3")


def test_a_full_model_whose_weights_are_lacking_is_refused(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    flags = FAST | dict(full_finetune=True, save_steps=1, max_steps=1)
    run(llama_folder, questions, out, **flags)
    replace_tensors(out / "checkpoint-1" / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"checkpoint-1: not to be loaded.*lack model.layers.1.mlp.up_proj.weight"):
        run(llama_folder, questions, out, **flags | dict(max_steps=2), resume_from_checkpoint="latest")


def test_auto_does_not_start_afresh_over_checkpoints_that_are_all_damaged(copied, llama_folder):
    out, data = copied
    for folder in list_checkpoints(out):
        (folder / "processes.safetensors").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"auto: no checkpoint in .*out is whole; remove them"):
        run(llama_folder, data, out, **FAST, max_steps=5, resume_from_checkpoint="auto")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_checkpoints_moved_to_another_disk_behind_links_go_on(copied, llama_folder, tmp_path):
    out, data = copied
    for name in ("checkpoint-1", "checkpoint-3"):
        shutil.move(out / name, tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    (out / "checkpoint-7").symlink_to(tmp_path / "nowhere")
    (out / "checkpoint-8").write_text("a file")
    (out / "checkpoint-notes.tmp").write_text("mine")
    flags = FAST | dict(max_steps=4, save_steps=1, save_total_limit=1, resume_from_checkpoint="latest")
    assert [line["step"] for line in run(llama_folder, data, out, **flags)] == [1, 2, 3, 4]
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4"]
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-3"]
    assert (out / "checkpoint-notes.tmp").read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["", "~nobody-of-that-name/x", "x" * 5000, "a\0b"], ids=["empty", "home", "long", "nul"]
)
def test_a_path_that_is_none_is_refused_in_a_line(path, llama_folder, questions, tmp_path):
    with pytest.raises(InputError, match="--resume_from_checkpoint"):
        run(llama_folder, questions, tmp_path / "out", resume_from_checkpoint=path)


def test_what_was_set_aside_survives_a_run_that_left_half_a_model(llama_folder, questions, tmp_path):
    """Killed while its model was moved in: the configuration is there, the weights are not."""
    out, whole = tmp_path / "out", tmp_path / "out" / "previous_run" / "adapter_model.safetensors"
    run(llama_folder, questions, out, **FAST, max_steps=1, save_steps=0)
    settings = Settings(model=llama_folder, train_data=questions, output_model=out)
    start_output(Accelerator(cpu=True), settings, OutputFolder(out), NoisePolicy(), None)  # as --overwrite_output does
    before = whole.read_bytes()
    OutputFolder(out).expect("adapter_config.json")
    (out / "adapter_config.json").write_text("{}")
    (out / "checkpoint-500").mkdir()  # of another program
    start_output(Accelerator(cpu=True), settings, OutputFolder(out), NoisePolicy(), None)
    assert whole.read_bytes() == before and (out / "checkpoint-500").exists()
    assert not (out / "adapter_config.json").exists()


def test_two_runs_do_not_write_to_one_folder(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    [first] = start(llama_folder, questions, out, **FAST | dict(epochs=1000), max_steps=-1)
    wait_until((out / "metrics.jsonl").exists)
    [second] = start(llama_folder, questions, out, **FAST, max_steps=1, seed=1, log=tmp_path / "second.log")
    assert wait([second]) == [2]
    assert "another run is writing there" in (tmp_path / "second.log").read_text()
    os.kill(first.pid, signal.SIGTERM)
    assert wait([first]) == [75]
    steps = [line["step"] for line in metrics_of(out)]
    assert steps == list(range(1, len(steps) + 1))


def test_other_rows_to_evaluate_on_are_said(copied, llama_folder, tmp_path, capsys):
    out, data = copied
    flags = FAST | dict(max_steps=4, resume_from_checkpoint="latest", eval_data=data)
    assert len(run(llama_folder, data, out, **flags)) == 4
    assert "the rows of --eval_data are not those that checkpoint-3 was saved with" in capsys.readouterr().err


def test_generate_refuses_a_pickle_in_place_of_an_adapter(copied, tmp_path):
    out, data = copied
    evil = tmp_path / "evil"
    pickle_of_the_same_size(out / "adapter_model.safetensors", evil)
    done = call(run_generate, *words(model_path=out, input_csv=data, output_csv=tmp_path / "a.csv"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "adapter_model.safetensors: not a safetensors file" in done.stderr and not evil.exists()


def test_a_checkpoint_is_an_adapter_to_answer_with(finished, questions, tmp_path):
    answers = tmp_path / "answers.csv"
    flags = words(model_path=finished[0] / "checkpoint-2", input_csv=questions, output_csv=answers, rounds=1)
    done = call(run_generate, *flags, "--max_new_tokens", "4")
    assert done.returncode == 0 and answers.exists(), done.stderr


def test_a_checkpoint_of_another_step_than_its_name_says_is_refused(copied, llama_folder):
    out, data = copied
    path = out / "checkpoint-2" / "checkpoint.json"
    state = json.loads(path.read_text())
    state["loop"]["step"] = 3
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"checkpoint-2.* is of step 3"):
        run(llama_folder, data, out, **FAST | dict(max_steps=4), resume_from_checkpoint=out / "checkpoint-2")
