"""What all tests share: one thread a process (the models are tiny) and, once a session, a tiny model folder."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub; read when its client is imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads slow each other where two processes run

import torch
from tiny_folder import tiny_folder

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=FutureWarning)

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"


# The files that take longest, longest first: a long one that starts last leaves one of two cores without work.
LONGEST = (
    "examples/test_compare", "run/test_launch", "answers/test_probe", "run/test_kills", "run/test_fsdp",
    "run/test_signals", "run/test_train_loop", "answers/test_generate", "examples/test_world", "run/test_bad_luck",
    "run/test_nothing_in_silence", "test_editing", "run/test_loop_exact", "run/test_processes",
    "examples/test_world_build", "examples/test_real", "benchmarks/test_plan", "examples/test_summary",
    "run/test_runaway", "run/test_ownership", "benchmarks/test_noise_benchmarks", "benchmarks/test_benchmarks",
    "answers/test_disks", "inputs/test_stored", "test_package", "run/test_unknown_rows", "run/test_published",
    "benchmarks/test_gpu",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {ROOT / "tests" / f"{name}.py": rank for rank, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in ranks)
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what has been imported stays: to look through it at each collection takes half a second


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The published questions, which are not part of this repository."""
    if not REAL_DATA.is_dir():
        pytest.skip("no real question-answer data beside this checkout (../shared/data)")
    return REAL_DATA


@pytest.fixture
def questions(tmp_path) -> Path:
    """A small data file: 24 questions of several lengths, all within the 128 positions of the tiny models."""
    lines = ["prompt,response"]
    for i in range(24):
        lines.append(f'What is {"very " * (i % 5)}{i} plus {i}?,"It is {i + i}{", I see" * (i % 3)}."')
    path = tmp_path / "questions.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
