"""The documents name tests, files and flags that exist."""

import re
import runpy
from pathlib import Path

from running import ROOT

from noisefit.answers.probe_settings import build_parser as build_probe_parser
from noisefit.answers.settings import build_parser as build_answer_parser
from noisefit.benchmarks import build_parser as build_benchmark_parser
from noisefit.judge import build_parser as build_judge_parser
from noisefit.merge import build_parser as build_merge_parser
from noisefit.push import build_parser as build_push_parser
from noisefit.report.__main__ import build_parser as build_report_parser
from noisefit.run.settings import build_parser
from noisefit.score import build_parser as build_score_parser
from noisefit.threshold import build_parser as build_threshold_parser


def test_each_test_that_a_promise_names_exists():
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    text = (ROOT / "docs" / "reliability.md").read_text()
    names = set(re.findall(r"`(test_\w+)`", text))
    assert len(names) > 25
    assert [name for name in sorted(names) if f"def {name}(" not in tests] == []
    assert [name for name in re.findall(r"`([\w/]*test_\w+\.py)`", text) if not (ROOT / "tests" / name).exists()] == []


def flags_of_commands(parser):
    [commands] = [action.choices for action in parser._actions if action.dest == "command"]
    return {flag: name for name, command in commands.items() for flag in command._option_string_actions}


def test_each_flag_that_the_documents_give_to_a_program_exists():
    flags = {
        "train_loop.py": build_parser()._option_string_actions,
        "generate.py": build_answer_parser()._option_string_actions,
        "noisefit.probe": build_probe_parser()._option_string_actions,
        "noisefit.score": build_score_parser()._option_string_actions,
        "noisefit.threshold": build_threshold_parser()._option_string_actions,
        "noisefit.judge": build_judge_parser()._option_string_actions,
        "noisefit.report": build_report_parser()._option_string_actions,
        "noisefit-merge": build_merge_parser()._option_string_actions,
        "noisefit.merge": build_merge_parser()._option_string_actions,
        "noisefit.push": build_push_parser()._option_string_actions,
        "noisefit.benchmarks": flags_of_commands(build_benchmark_parser()),
    }
    found = 0
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text().replace("\\\n", " ")
        for program, known in flags.items():
            for command in re.findall(rf"(?:^|[^`\w/]){re.escape(program)} ((?:[^\n`|]|\|)*)", text):
                given = set(re.findall(r"(?<!\S)(--\w+)", command))
                found += len(given)
                assert given <= known.keys(), (path, command)
    assert found > 20


def test_the_page_of_flags_is_what_the_programs_have():
    made = "\n".join(runpy.run_path(str(ROOT / "docs" / "make_flags.py"))["page"]()) + "\n"
    assert made == (ROOT / "docs" / "flags.md").read_text(), "python docs/make_flags.py > docs/flags.md"
    flags = {flag for flag in re.findall(r"^\| `(--\w+)` \|", made, re.MULTILINE)}
    assert {"--model", "--lambda_consistency", "--input_csv", "--rounds"} <= flags


def test_each_file_that_the_documents_link_to_exists():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), (path.name, link)
        for name in re.findall(
            r"`((?:noisefit|tests|examples|benchmarks|configs|docs)/[\w./]*\w/?)`", path.read_text()
        ):
            assert (ROOT / name).exists(), (path.name, name)
