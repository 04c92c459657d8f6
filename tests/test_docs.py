"""The documents name tests, files and flags that exist."""

import re
from pathlib import Path

from running import ROOT

from noisefit.run.settings import build_parser


def test_each_test_that_a_promise_names_exists():
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    text = (ROOT / "docs" / "reliability.md").read_text()
    names = set(re.findall(r"`(test_\w+)`", text))
    assert len(names) > 25
    assert [name for name in sorted(names) if f"def {name}(" not in tests] == []
    assert [name for name in re.findall(r"`(test_\w+\.py)`", text) if not (ROOT / "tests" / name).exists()] == []


def test_each_flag_that_the_documents_name_exists():
    flags = set(build_parser()._option_string_actions)
    for path in (ROOT / "docs").glob("*.md"):
        for command in re.findall(r"train_loop\.py (--[^`]*?)(?:\"|```|\n\n)", path.read_text()):
            assert set(re.findall(r"(?<!\S)(--\w+)", command)) <= flags, (path, command)
