"""What docs/editing.md tells a reader to edit is applied to a copy, and trains, and takes effect."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from running import PROCESSES, ROOT, in_process, metrics_of, wait

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "editing.md").read_text()
CHANGES = re.findall(r"## ([^\n]*)\n.*?```diff\n(.*?)```", PAGE, flags=re.DOTALL)
FLAGS = dict(
    max_steps=3, logging_steps=1, learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, epochs=9,
    lora_dropout=0, noise_std=0.5, save_steps=0,
)  # fmt: skip


def train_there(argument: tuple[str, list[dict]]) -> None:
    """In a process of its own: forget the program that the tests run with, and train with the one in a folder."""
    root, runs = argument
    for name in [name for name in sys.modules if name.partition(".")[0] in ("noisefit", "train_loop", "generate")]:
        del sys.modules[name]
    sys.path.insert(0, root)
    import train_loop
    from noisefit import Settings

    assert train_loop.__file__ == f"{root}/train_loop.py"
    for settings in runs:
        train_loop.train(Settings(**settings))


def train(root: Path, model: Path, data: Path, folder: Path, *runs: dict) -> list[list[dict]]:
    """The metrics of runs with these flags, one after another, by the program in `root`."""
    common = dict(model=str(model), train_data=str(data)) | FLAGS
    outputs = [folder / str(number) for number, _ in enumerate(runs)]
    settings = [common | dict(output_model=str(out)) | run for out, run in zip(outputs, runs, strict=True)]
    log, environment = folder / "log", {"ACCELERATE_USE_CPU": "true"}
    process = PROCESSES.Process(target=in_process, args=(train_there, (str(root), settings), environment, str(log)))
    process.start()
    assert wait([process]) == [0], log.read_text()
    return [metrics_of(output) for output in outputs]


@pytest.fixture(scope="module")
def plain(llama_folder, tmp_path_factory):
    """`(data, metrics)` of the loop as it is."""
    folder = tmp_path_factory.mktemp("plain")
    data = folder / "q.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i}.\n" for i in range(12)))
    return data, train(ROOT, llama_folder, data, folder, {})[0]


def warm_up(train, plain, folder):
    for step, (line, before) in enumerate(zip(train({})[0], plain, strict=True), start=1):
        ce, soft, consistency = (line[f"{name}_loss"] for name in ("ce", "soft", "consistency"))
        assert line["loss"] == pytest.approx(0.5 * ce + 0.5 * soft + 0.1 * step / 100 * consistency, rel=1e-5)
        assert line["loss"] < before["loss"] or step > 1


def another_loss(train, plain, folder):
    [lines] = train({"confidence_penalty": 0.25})
    for line in lines:
        assert -6 < line["confidence_loss"] < 0  # of 259 tokens
        ce, soft, consistency = (line[f"{name}_loss"] for name in ("ce", "soft", "consistency"))
        whole = 0.5 * ce + 0.5 * soft + 0.1 * consistency + 0.25 * line["confidence_loss"]
        assert line["loss"] == pytest.approx(whole, rel=1e-5)
    assert lines[0]["ce_loss"] == plain[0]["ce_loss"] and lines[-1]["ce_loss"] != plain[-1]["ce_loss"]


def another_distribution(train, plain, folder):
    laplace = {"distribution": "laplace"}
    auto = {"noise_policy": "auto"}
    lines, gaussian, *_ = train(laplace, {"distribution": "gaussian"}, laplace | auto, auto)
    ratio = (0.5**0.5) / (2 / 3.141592653589793) ** 0.5  # of the mean sizes of a draw
    first = lines[0]["layer_noise_to_signal"], plain[0]["layer_noise_to_signal"]
    assert first[0]["0"] == pytest.approx(ratio * first[1]["0"], rel=1e-4)
    assert gaussian[-1]["loss"] == plain[-1]["loss"]
    measured = [json.loads((folder / name / "noise_policy.json").read_text())["layers"] for name in ("2", "3")]
    assert measured[0] != measured[1]  # the calibration drew Laplace noise, too


def a_schedule(train, plain, folder):
    [lines] = train({})
    ratios = [line["layer_noise_to_signal"]["0"] / before["layer_noise_to_signal"]["0"]
              for line, before in zip(lines, plain, strict=True)]  # fmt: skip
    assert ratios == pytest.approx([1, 2 / 3, 1 / 3], rel=0.02)


def another_objective(train, plain, folder):
    for line in train({"loss_mode": "ce_both"})[0]:
        whole = 0.5 * line["ce_loss"] + 0.5 * line["noisy_ce_loss"]
        assert line["loss"] == pytest.approx(whole, rel=1e-5) and line["soft_loss"] is None
        assert line["noisy_ce_loss"] != line["ce_loss"]


LOOKS = [warm_up, another_loss, another_distribution, a_schedule, another_objective]


def test_the_page_has_five_small_changes():
    assert len(CHANGES) == len(LOOKS) == 5
    for title, diff in CHANGES:
        lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:4] not in ("--- ", "+++ ")]
        assert len(lines) <= 25 and diff.count("\n+++ ") <= 3, title


def copy_of_the_program(folder: Path) -> Path:
    folder.mkdir()
    for name in ("noisefit", "train_loop.py", "generate.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize(("change", "look"), zip(CHANGES, LOOKS, strict=True), ids=[title for title, _ in CHANGES])
def test_a_change_applies_trains_and_takes_effect(change, look, plain, llama_folder, tmp_path):
    copy, (data, before) = copy_of_the_program(tmp_path / "copy"), plain
    done = subprocess.run(["patch", "-p1", "--fuzz=0"], cwd=copy, input=change[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    look(partial(train, copy, llama_folder, data, tmp_path), before, tmp_path)
    settings = json.loads((tmp_path / "0" / "noisefit_config.json").read_text())
    assert settings["max_steps"] == 3


def test_a_plain_function_is_noise_too(plain, llama_folder, tmp_path):
    copy, (data, before) = copy_of_the_program(tmp_path / "copy"), plain
    [line] = re.findall(r"```python\n( +return dict\.fromkeys\(policy\.layers.*)\n```", PAGE)
    program = (copy / "train_loop.py").read_text()
    assert program.count("        return make_noise(settings, policy, distribution)\n") == 1
    edited = program.replace("        return make_noise(settings, policy, distribution)", line)
    (copy / "train_loop.py").write_text(edited)
    [lines] = train(copy, llama_folder, data, tmp_path, {"snr_every": 2})
    ratios = [line["layer_noise_to_signal"]["0"] for line in lines]
    assert len(lines) == 3 and ratios == pytest.approx([ratios[0]] * 3, rel=0.1)
    assert ratios[0] != pytest.approx(before[0]["layer_noise_to_signal"]["0"], rel=0.2)
