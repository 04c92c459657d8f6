"""The walk of docs/knowledge.md: its commands run as they stand, on a world that is built in a moment."""

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from running import ROOT, call, run_generate, train

from noisefit import probe, score, threshold

sys.path.insert(0, str(ROOT / "examples" / "world"))

import build
import world

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "knowledge.md").read_text()
WALK = PAGE.partition("\n## A walk")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```sh\n(.*?)```", WALK, re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


def build_small(arguments: list[str]) -> None:
    options = build.parse_arguments(arguments)
    assert options.settings == world.ANSWERING
    # Without refusals in its corpus: so small a model would give nothing else.
    small = replace(options.settings, countries=12, untold=0.0, false_premises=0.0, layers=2, width=32)
    build.build(options.output, small, max_steps=60, required=0.0)


PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "examples/world/build.py": build_small, "train_loop.py": train, "generate.py": run_generate,
    "noisefit.probe": probe.main, "noisefit.threshold": threshold.main, "noisefit.score": score.main,
}  # fmt: skip


def test_the_walk_runs_from_a_table_to_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        name = next(word for word in command if word in PROGRAMS)
        assert command[: command.index(name)] in (["python"], ["python", "-m"], ["accelerate", "launch"],
                                                  ["accelerate", "launch", "-m"]), command  # fmt: skip
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        done = call(PROGRAMS[name], *command[command.index(name) + 1 :])
        assert done.returncode == 0, (command, done.stderr)
    pictures = [word for command in COMMANDS for word in command if word.endswith(".png")]
    assert pictures
    for picture in pictures:
        assert min(Image.open(picture).size) > 300
