"""The benchmarks run, their memory count is what a process takes, and the loss's memory grows with its chunks alone."""

import sys

import pytest
import torch
from running import ROOT, call, run_command
from torch.utils.flop_counter import FlopCounterMode

from noisefit.method.noise import noise_scale, snr_base_std

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import step_cost  # noqa: E402
import ways  # noqa: E402
from loss_memory import loss_alone  # noqa: E402
from peak_memory import PeakMemory  # noqa: E402
from ways import SIZES, Steps  # noqa: E402

pytestmark = pytest.mark.slow

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
        assert counted == pytest.approx(taken, rel=0.01)


def test_a_model_in_shape_alone_counts_as_the_real_one():
    for layers in ([], [2], [0, 1]):
        peaks = []
        for device in ("cpu", "meta"):
            steps = Steps(TINY, device)
            steps.ours(layers)
            with PeakMemory() as memory:
                steps.ours(layers)
            peaks.append(memory.peak)
        assert peaks[0] == peaks[1]


def test_the_published_way_has_the_same_loss(monkeypatch):
    """Given the same noise; its gradients differ, as it detaches nothing."""

    def wave(hidden):
        return 0.1 * torch.sin(torch.arange(hidden.numel())).view_as(hidden)

    monkeypatch.setattr(ways, "_add_noise", lambda module, args, output: output + wave(output))
    monkeypatch.setattr(ways, "TokenScaledNoise", lambda std: lambda hidden, branch, mask=None: wave(hidden))
    published, ours = Steps(TINY, "cpu").published([1, 2]), Steps(TINY, "cpu").ours([1, 2], "separate")
    assert published.item() == pytest.approx(ours.item(), rel=1e-5)
    assert ours.item() != pytest.approx(Steps(TINY, "cpu").ours([2], "separate").item(), rel=1e-5)


def test_the_published_noise_is_ours():
    hidden = torch.randn(2, 5, 16).cumsum(-1)
    torch.testing.assert_close(ways._plain_sigma(hidden), noise_scale(hidden, snr_base_std(hidden, ways.NOISE_STD)))


def test_a_step_moves_the_adapter_and_leaves_no_gradient():
    steps = Steps(TINY, "cpu")
    for step in (steps.ours, lambda: steps.ours([1]), lambda: steps.published([1])):
        before = [p.clone() for p in steps.model.parameters()]
        step()
        moved = [not torch.equal(a, b) for a, b in zip(before, steps.model.parameters(), strict=True)]
        assert any(moved) and all(p.grad is None for p in steps.model.parameters())
    assert steps.target_tokens == TINY.rows * TINY.supervised


def test_the_floor_is_the_formula():
    """12 layers, the head a tenth: noise first in layer 8 runs 9 layers once and 3 three times, and the head thrice."""
    assert ways.floor(SIZES["small"], 8, 0.1) == pytest.approx(0.9 * (9 + 3 * 3) / 12 + 0.1 * 3)
    assert ways.floor(SIZES["small"], 0, 0.0) == pytest.approx((1 + 3 * 11) / 12)
    steps = Steps(TINY, "cpu")
    with FlopCounterMode(display=False) as counter:
        steps.ours()
    # The head is frozen: a product forward, one backward, for each of the supervised tokens.
    head = 2 * 2 * TINY.rows * TINY.supervised * TINY.config.hidden_size * TINY.config.vocab_size
    assert ways.head_share(Steps(TINY, "cpu")) == pytest.approx(head / counter.get_total_flops())


@pytest.mark.parametrize(
    "flags", [["--rounds", "0"], ["--supervised", "64"], ["--picture", "/nowhere/x.png"], ["--picture", "x.jpeg"]]
)
def test_bad_flags_of_step_cost_are_one_line(flags):
    done = call(step_cost.main, "--size", "tiny", *flags)
    assert done.returncode == 2 and f"error: {flags[0]}: " in done.stderr


def test_memory_for_the_loss_grows_with_the_chunk_and_not_with_the_batch():
    steps = Steps(TINY, "meta")

    def taken(chunk, rows, length):
        return loss_alone(steps, TINY, rows, length, chunk)

    once = taken(64, 8, 129)
    assert taken(128, 8, 129) == pytest.approx(2 * once, rel=0.05)
    assert taken(64, 16, 129) == pytest.approx(once, rel=0.05)
    assert taken(64, 8, 257) == pytest.approx(once, rel=0.05)


def test_step_cost_runs_and_draws(tmp_path):
    picture = tmp_path / "cost.png"
    done = call(step_cost.main, "--size", "tiny", "--rounds", 1, "--picture", picture)
    assert done.returncode == 0, done.stderr
    lines = {line[:32].strip(): line[32:].split() for line in done.stdout.splitlines()}
    assert lines["plain fine-tuning"][:3] == ["1.00", "1.00", "1.00"]
    for layers in ("0-2", "1-3", "2-3", "3-3"):
        assert len(lines[f"fork, noise in layers {layers}"]) == 4
    for kind in ("live", *ways.other_noise()):
        time, to_live, memory = map(float, lines[kind][:3])
        assert to_live == pytest.approx(time / float(lines["live"][0]), abs=0.02) and memory >= float(lines["live"][2])
    assert lines["live"][:1] == lines["fork, noise in layers 3-3"][:1] and lines["live"][1] == "1.00"
    assert "calibrating the noise of 4 layers at 5 scales" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
