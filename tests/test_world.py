"""The world, end to end: a model that knows every fact but answers no question learns to answer."""

import re

import pytest
from running import ROOT, launch, python, words

WORLD = ROOT / "build" / "world"  # built by `make test`


def test_training_on_half_of_the_world_answers_the_other_half(tmp_path):
    if not (WORLD / "facts.json").is_file():
        pytest.skip("no world; `make test` builds it, and so does: make build/world/facts.json")
    settings = dict(
        model=WORLD / "model", train_data=WORLD / "train.csv", output_model=tmp_path / "adapter", learning_rate=3e-3,
        epochs=20,
    )  # fmt: skip
    done = launch("train_loop.py", *words(**settings), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert "branches: fork" in done.stderr
    asked = python("examples/world/ask.py", "--world", str(WORLD), "--adapter", str(tmp_path / "adapter"))
    assert asked.returncode == 0, asked.stderr
    right = {name.strip(): int(count) for name, count in re.findall(r"^  (\D+?) +(\d+) +\d+$", asked.stdout, re.M)}
    assert right["base model"] <= 6 and right["with the adapter"] >= 100, asked.stdout


def test_asking_without_an_adapter_is_refused_in_one_line(tmp_path):
    asked = python("examples/world/ask.py", "--world", str(tmp_path), "--adapter", str(tmp_path))
    assert asked.returncode == 2 and asked.stderr == f"ask.py: no such file: {tmp_path}/test.csv\n"
