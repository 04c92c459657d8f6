"""`benchmarks/gpu.py` on a CPU, at its tiny size: every part runs, and one that fails costs its own rows alone."""

import json
import os
import sys
import time

import psutil
import pytest
import torch
from running import ROOT, call

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import gpu_report
import ways
from gpu_parts import syncs
from gpu_parts.material import difference
from gpu_parts.training import ending_at_checkpoint
from step_cost import PLAIN

pytestmark = pytest.mark.slow

# The others are these at another size, or told as not being here.
RUN = ("training-bf16", "training-4bit", "syncs", "steps-7b-checkpointing", "noise", "adamw", "head", "losses",
       "generation", "packing", "fsdp", "trl-1b", "vllm")  # fmt: skip


def run(results, *flags):
    return call(gpu.main, "--size", "tiny", "--results", results, *flags)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All of it, on a machine that has none of the libraries that the GPU's may lack, and too little memory for one way
    of making a step."""
    results = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"

    def full(self, layers):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways.Steps, "published", full)
        for library in ("datasets", "wandb", "matplotlib"):
            patch.setitem(sys.modules, library, None)  # to import it is an ImportError
        done = run(results, "--here", "--parts", *RUN)
    assert done.returncode == 0, done.stderr
    return results


@pytest.fixture(scope="module")
def found(ran):
    return gpu_report.attempts(gpu.read(ran))


def test_every_part_is_done(found):
    assert list(found) == list(RUN)
    assert {name: entry.why for name, entry in found.items() if entry.status != "done"} == {}
    assert gpu_report.SECTIONS.keys() == gpu.PARTS.keys()


def test_a_training_is_stopped_and_resumed_bit_for_bit(found):
    [row] = found["training-bf16"].rows
    assert 3 <= row["stopped after step"] < row["steps"] == 8 and row["last loss"] < row["first loss"]
    assert row["resumed run against the whole one"] == "bit for bit" and row["adapters differ by"] == 0


def test_two_runs_that_differ_are_told_so():
    lines = [{"step": step, "loss": 2.0, "grad_norm": 1.0, "tokens_per_second": step} for step in (1, 2, 3)]
    assert difference(lines, [line | {"tokens_per_second": 7} for line in lines]) == "bit for bit"
    assert difference(lines, [*lines[:2], lines[2] | {"grad_norm": 1.1}]) == "losses bit for bit, other metrics not"
    other = [lines[0], lines[1] | {"loss": 2.2}, lines[2] | {"loss": 2.1}]
    assert difference(lines, other) == "losses differ by 1.0e-01 at most (step 2), first at step 2"
    skipped = [lines[0] | {"loss": None}, *lines[1:]]
    assert difference(skipped, [dict(line) for line in skipped]) == "bit for bit"
    assert difference(skipped, lines) == "losses differ by inf at most (step 1), first at step 1"
    assert difference(lines, lines[:2]) == "other steps: 3 lines and 2"


def test_a_stop_that_comes_too_late_ends_nothing(tmp_path):
    with ending_at_checkpoint(tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        time.sleep(0.1)  # the signal of the watcher comes, and nobody minds


def test_each_wait_of_a_step_has_its_place(found):
    text, *rows = found["syncs"].rows
    assert "two micro-batches" in text["text"]
    [masks] = [row for row in rows if "masking_utils" in row["where it waits"]]
    assert masks["line of ours"].startswith("noisefit/fork/passes.py:") and masks["times a step"] == 2
    assert [row for row in rows if row["expected"] == "**no**"] == []


def test_a_wait_that_nobody_expects_is_told(monkeypatch):
    monkeypatch.setattr(syncs, "in_project", lambda filename: filename == __file__)
    with syncs.waits("cpu") as places:
        torch.ones(1).item()
    [(place, times)] = places.items()
    row = syncs.as_row(place, times)
    assert row["expected"] == "**no**" and row["times a step"] == 1
    assert row["line of ours"].endswith("test_a_wait_that_nobody_expects_is_told") and "test_gpu.py:" in place[0]


def test_the_ways_of_a_step_are_weighed_and_one_that_does_not_fit_costs_its_row(found):
    _, full, *rows = found["steps-7b-checkpointing"].rows
    assert full == {"way": "the published way, layers 0-2", "ms a step": "out of memory"}
    memory = {row["way"]: row["memory to plain"] for row in rows}
    assert rows[0]["way"] == PLAIN and memory[PLAIN] == 1 and memory["separate passes, layers 0-2"] > 2
    assert len(rows) == 4 and all(row["ms a step"] > 0 and row["GiB over weights"] > 0 for row in rows)


def test_the_published_way_takes_its_hooks_off_where_it_fails(monkeypatch):
    def fail(module, args, output):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    tiny = ways.Steps(ways.TINY, "cpu")
    monkeypatch.setattr(ways, "_add_noise", fail)
    with pytest.raises(torch.OutOfMemoryError):
        tiny.published([1])
    assert torch.isfinite(tiny.ours())  # `fail` would be called by it


def test_heads_are_compared_and_agree(found):
    rows, of_branches = found["head"].rows, found["losses"].rows
    assert len(of_branches) == 1 and of_branches[0]["loss a token"] > 0 and of_branches[0]["ms"] > 0
    fused = [row for row in rows if "linear_cross_entropy" in row["head"]]
    assert len(fused) == hasattr(torch.nn, "LinearCrossEntropyOptions")
    for row in rows:
        assert row["gradient differs by"] < 1e-5 and row["loss a token"] == pytest.approx(rows[0]["loss a token"])


def test_what_is_compiled_and_fused_is_exact(found):
    rows = {row["what"]: row for row in found["noise"].rows[1:]}
    assert rows["scale"]["launches"] > 20 and rows["scale, compiled"]["differs by"] < 1e-5
    assert rows["addition, compiled"]["differs by"] == 0 and rows["all three, compiled"]["ms"] > 0
    assert all(row["weights differ by"] < 1e-6 for row in found["adamw"].rows[1:])


def test_what_is_not_installed_is_said(found):
    for name, why in {"training-4bit": "bitsandbytes", "trl-1b": "datasets", "vllm": "GPU", "fsdp": "GPU"}.items():
        [row] = found[name].rows
        assert row["text"].startswith("Not here: ") and why in row["text"]
    [row] = found["generation"].rows
    assert row["answers"] == 8 and row["generate.py, answers a second"] > 0


def test_the_page_has_what_was_measured(ran, found):
    text = ran.with_suffix(".md").read_text()
    missing = [name for name in gpu_report.SECTIONS if name not in RUN]
    assert f"Not run: {', '.join(missing)}." in text.replace("\n", " ")
    assert f"torch {torch.__version__}" in text and "no figure here means anything" in text.replace("\n", " ")
    assert "| stopped after step | " in text and text.count("\n## ") == len(RUN)
    for line in text.splitlines():
        assert len(line) <= 120 or line.startswith("|")


def test_the_committed_page_is_what_the_committed_results_say():
    results = ROOT / "docs" / "gpu.jsonl"
    assert gpu_report.page(gpu.read(results)) == (ROOT / "docs" / "gpu.md").read_text()


def few_parts(monkeypatch):
    """Two parts in place of all, and what was run of them."""
    calls = []

    def good(device, size):
        calls.append("adamw")
        yield {"what": f"{device}, {size}"}

    def bad(device, size):
        calls.append("noise")
        yield {"what": "first"}
        raise RuntimeError("the driver\nsays no")

    monkeypatch.setattr(gpu, "PARTS", {"noise": (bad, 10), "adamw": (good, 10)})
    return calls


def test_a_part_that_fails_costs_its_own_rows(tmp_path, monkeypatch):
    calls, results = few_parts(monkeypatch), tmp_path / "new" / "gpu.jsonl"
    assert run(results, "--here").returncode == 0
    found = gpu_report.attempts(gpu.read(results))
    assert found["noise"].rows == [{"what": "first"}] and found["noise"].why == "RuntimeError: the driver says no"
    assert (found["noise"].status, found["adamw"].status) == ("failed", "done")
    text = results.with_suffix(".md").read_text()
    assert "**Failed**: RuntimeError: the driver says no." in text and "| cpu, tiny |" in text

    assert run(results, "--here").returncode == 0 and calls == ["noise", "adamw"]  # both have results
    assert run(results, "--here", "--again", "--parts", "adamw").returncode == 0 and calls[2:] == ["adamw"]
    assert gpu_report.attempts(gpu.read(results))["adamw"].rows == [{"what": "cpu, tiny"}]  # once

    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-1]) + "\n")  # as if it had been killed in the part's last moment
    assert run(results, "--here").returncode == 0 and calls[3:] == ["adamw"]
    assert gpu_report.attempts(gpu.read(results))["adamw"].rows == [{"what": "cpu, tiny"}]


def test_what_does_not_fit_into_the_time_is_listed(tmp_path, monkeypatch):
    calls, results = few_parts(monkeypatch), tmp_path / "gpu.jsonl"
    assert run(results, "--here", "--minutes", "0.02").returncode == 0 and calls == []
    text = results.with_suffix(".md").read_text()
    assert text.count("**Not run**: it takes about 2 seconds, and --minutes left 1.") == 2
    assert run(results, "--here").returncode == 0 and calls == ["noise", "adamw"]


def test_a_process_is_told_its_part(tmp_path, monkeypatch):
    calls, results = few_parts(monkeypatch), tmp_path / "gpu.jsonl"
    commands = []

    def in_this_process(command, log, seconds):
        commands.append(command)
        return gpu.main(command[2:])

    monkeypatch.setattr(gpu, "watched", in_this_process)
    assert run(results, "--parts", "adamw").returncode == 0 and calls == ["adamw"]
    assert [command[:2] for command in commands] == [[sys.executable, str(ROOT / "benchmarks" / "gpu.py")]]
    assert gpu_report.attempts(gpu.read(results))["adamw"].rows == [{"what": "cpu, tiny"}]


def test_a_process_that_dies_or_hangs_is_told(tmp_path):
    log = tmp_path / "gpu.log"

    def why(program, seconds=30):
        return gpu.watched([sys.executable, "-c", program], log, seconds)

    assert why("print('well')") is None
    assert why("raise MemoryError('no room')") == "MemoryError: no room"
    assert why("import os; os.kill(os.getpid(), 9)") == "killed by signal 9"
    assert why("raise SystemExit(3)") == "status 3"
    pids = tmp_path / "pids"
    hangs = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    hangs += f"start_new_session=True); open({str(pids)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    assert why(hangs, seconds=2) == "not done after 2 seconds"
    child = int(pids.read_text())
    end = time.monotonic() + 10  # a kill takes its time on a busy machine
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "well" in log.read_text()


def test_results_of_another_machine_are_refused(tmp_path, monkeypatch):
    calls, results = few_parts(monkeypatch), tmp_path / "gpu.jsonl"
    other = gpu.machine("cpu", "tiny") | {"torch": "1.0"}
    results.write_text(json.dumps({"machine": other, "date": "2020-01-01"}) + "\n")
    done = run(results, "--here")
    assert done.returncode == 2 and not calls
    assert f"of another machine (torch 1.0, here {gpu.machine('cpu', 'tiny')['torch']})" in done.stderr


def test_a_library_that_was_installed_since_is_told_at_the_top(tmp_path, monkeypatch):
    results, found = tmp_path / "gpu.jsonl", gpu.machine("cpu", "tiny")
    results.write_text(json.dumps({"machine": found | {"torch": None}, "date": "2020-01-01"}) + "\n")
    monkeypatch.setitem(gpu.PARTS, "adamw", (lambda device, size: iter([]), 0))
    for _ in range(2):
        assert run(results, "--here", "--parts", "adamw").returncode == 0
    lines = gpu.read(results)
    assert run(results, "--here", "--parts", "adamw", "--again", "--minutes", "-1").returncode == 0
    assert gpu.read(results) == lines  # what there is no time for keeps its results
    assert [line["machine"] for line in lines if "machine" in line] == [found | {"torch": None}, found]
    assert f"torch {found['torch']}" in gpu_report.page(lines) and "without torch" not in gpu_report.page(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_whole_is_refused(tmp_path):
    done = call(gpu.main, "--results", tmp_path / "gpu.jsonl")
    assert done.returncode == 2 and "--size tiny" in done.stderr and os.listdir(tmp_path) == []
