"""What docs/editing.md tells a reader to edit is applied to a copy, and trains, and takes effect."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from running import ROOT, metrics_of, run_command, words

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "editing.md").read_text()
CHANGES = re.findall(r"## ([^\n]*)\n.*?```diff\n(.*?)```", PAGE, flags=re.DOTALL)
FLAGS = dict(
    max_steps=3, logging_steps=1, learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, epochs=9,
    lora_dropout=0, noise_std=0.5, save_steps=0,
)  # fmt: skip


def train(root: Path, model: Path, data: Path, output: Path, **flags: object) -> list[dict]:
    command = [sys.executable, str(root / "train_loop.py"), *words(model=model, train_data=data, output_model=output)]
    done = run_command([*command, *words(**FLAGS | flags)], PYTHONPATH=str(root))
    assert done.returncode == 0, done.stderr
    return metrics_of(output)


@pytest.fixture(scope="module")
def plain(llama_folder, tmp_path_factory):
    """`(data, metrics)` of the loop as it is."""
    folder = tmp_path_factory.mktemp("plain")
    data = folder / "q.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i}.\n" for i in range(12)))
    return data, train(ROOT, llama_folder, data, folder / "out")


def warm_up(train, plain):
    for step, (line, before) in enumerate(zip(train("out"), plain, strict=True), start=1):
        ce, soft, consistency = (line[f"{name}_loss"] for name in ("ce", "soft", "consistency"))
        assert line["loss"] == pytest.approx(0.5 * ce + 0.5 * soft + 0.1 * step / 100 * consistency, rel=1e-5)
        assert line["loss"] < before["loss"] or step > 1


def another_loss(train, plain):
    lines = train("out", confidence_penalty=0.25)
    for line in lines:
        assert -6 < line["confidence_loss"] < 0  # of 259 tokens
        ce, soft, consistency = (line[f"{name}_loss"] for name in ("ce", "soft", "consistency"))
        whole = 0.5 * ce + 0.5 * soft + 0.1 * consistency + 0.25 * line["confidence_loss"]
        assert line["loss"] == pytest.approx(whole, rel=1e-5)
    assert lines[0]["ce_loss"] == plain[0]["ce_loss"] and lines[-1]["ce_loss"] != plain[-1]["ce_loss"]


def another_distribution(train, plain):
    lines = train("out", distribution="laplace")
    ratio = (0.5**0.5) / (2 / 3.141592653589793) ** 0.5  # of the mean sizes of a draw
    first = lines[0]["layer_noise_to_signal"], plain[0]["layer_noise_to_signal"]
    assert first[0]["0"] == pytest.approx(ratio * first[1]["0"], rel=1e-4)
    assert train("gaussian", distribution="gaussian")[-1]["loss"] == plain[-1]["loss"]
    train("auto", distribution="laplace", noise_policy="auto")


def a_schedule(train, plain):
    lines = train("out")
    ratios = [line["layer_noise_to_signal"]["0"] / before["layer_noise_to_signal"]["0"]
              for line, before in zip(lines, plain, strict=True)]  # fmt: skip
    assert ratios == pytest.approx([1, 2 / 3, 1 / 3], rel=0.02)


def another_objective(train, plain):
    for line in train("out", loss_mode="ce_both"):
        whole = 0.5 * line["ce_loss"] + 0.5 * line["noisy_ce_loss"]
        assert line["loss"] == pytest.approx(whole, rel=1e-5) and line["soft_loss"] is None
        assert line["noisy_ce_loss"] != line["ce_loss"]


LOOKS = [warm_up, another_loss, another_distribution, a_schedule, another_objective]


def test_the_page_has_five_small_changes():
    assert len(CHANGES) == len(LOOKS) == 5
    for title, diff in CHANGES:
        lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:4] not in ("--- ", "+++ ")]
        assert len(lines) <= 25 and diff.count("\n+++ ") <= 3, title


@pytest.mark.parametrize(("change", "look"), zip(CHANGES, LOOKS, strict=True), ids=[title for title, _ in CHANGES])
def test_a_change_applies_trains_and_takes_effect(change, look, plain, llama_folder, tmp_path):
    copy, (data, before) = tmp_path / "copy", plain
    for name in ("noisefit", "train_loop.py", "generate.py"):
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy.mkdir(exist_ok=True)
        place(ROOT / name, copy / name)
    done = subprocess.run(["patch", "-p1", "--fuzz=0"], cwd=copy, input=change[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    edited = partial(train, copy, llama_folder, data)
    look(lambda name, **flags: edited(tmp_path / name, **flags), before)
    settings = json.loads((tmp_path / "out" / "noisefit_config.json").read_text())
    assert settings["max_steps"] == 3
