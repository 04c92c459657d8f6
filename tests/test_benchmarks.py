"""The benchmarks run, their memory count is what a process takes, and the loss's memory grows with its chunks alone."""

import sys

import pytest
import torch
from running import ROOT, run_command

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from loss_memory import loss_alone  # noqa: E402
from peak_memory import PeakMemory  # noqa: E402
from ways import SIZES, Steps  # noqa: E402

TINY = SIZES["tiny"]


def test_freed_tensors_leave_the_count_and_views_are_not_counted_twice():
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a[:500].view(2, 250).t()
        assert memory.now == memory.peak == 4000
        c = a + 1
        assert memory.now == memory.peak == 8000
        del a
        assert memory.now == 8000  # b looks at it
        del b, c
        assert memory.now == 0 and memory.peak == 8000


MEASURED = """
import sys
sys.path[:0] = [{root!r}, {benchmarks!r}]
from peak_memory import PeakMemory
from ways import TINY, Steps
from dataclasses import replace

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

TINY.config.vocab_size = 16_000  # some larger tensors, so that the interpreter's own memory does not show
steps = Steps(replace(TINY, rows=8), "cpu")
for step in (steps.ours, lambda: steps.ours([1, 2]), lambda: steps.published([1, 2])):
    step()
    with PeakMemory() as memory:
        step()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # VmHWM starts again from what is taken now
    before = status("VmRSS")
    step()
    print(memory.peak, status("VmHWM") - before, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how much a process took at its peak")
def test_the_count_is_what_a_process_takes():
    # With these settings the C library gives every freed tensor's memory back, so that the peaks can be compared.
    program = MEASURED.format(root=str(ROOT), benchmarks=str(BENCHMARKS))
    done = run_command([sys.executable, "-c", program], MALLOC_MMAP_THRESHOLD_="16384", MALLOC_TRIM_THRESHOLD_="0")
    assert done.returncode == 0, done.stderr
    peaks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(peaks) == 3
    for counted, taken in peaks:
        assert counted == pytest.approx(taken, rel=0.03)


def test_a_model_in_shape_alone_counts_as_the_real_one():
    for layers in ([], [2], [0, 1]):
        peaks = []
        for device in ("cpu", "meta"):
            steps = Steps(TINY, device)
            steps.ours(layers)
            with PeakMemory() as memory:
                steps.ours(layers)
            peaks.append(memory.peak)
        assert peaks[0] == pytest.approx(peaks[1], rel=0.08)


def test_memory_for_the_loss_grows_with_the_chunk_and_not_with_the_batch():
    steps = Steps(TINY, "meta")

    def taken(chunk, rows, length):
        steps.branched.loss_chunk_size = chunk
        return loss_alone(steps, TINY, rows, length)

    once = taken(64, 8, 129)
    assert taken(128, 8, 129) == pytest.approx(2 * once, rel=0.05)
    assert taken(64, 16, 129) == pytest.approx(once, rel=0.05)
    assert taken(64, 8, 257) == pytest.approx(once, rel=0.05)


def test_step_cost_runs_and_draws(tmp_path):
    picture = tmp_path / "cost.png"
    command = [sys.executable, str(BENCHMARKS / "step_cost.py"), "--size", "tiny", "--rounds", "1"]
    done = run_command([*command, "--picture", str(picture)])
    assert done.returncode == 0, done.stderr
    lines = {line[:32].strip(): line[32:].split() for line in done.stdout.splitlines()}
    assert lines["plain fine-tuning"][:3] == ["1.00", "1.00", "1.00"]
    for layers in ("0-2", "1-3", "2-3", "3-3"):
        assert len(lines[f"fork, noise in layers {layers}"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
