"""Metrics: means over supervised tokens, and what is said of numbers that are none."""

import itertools
import json
import math
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from noisefit.base.errors import InputError
from noisefit.method.objectives import LOSSES
from noisefit.run.metrics import Metrics
from noisefit.run.settings import Settings
from noisefit.run.steps import take_step


@pytest.fixture
def metrics(tmp_path):
    AcceleratorState._reset_state(True)
    return Metrics(Accelerator(cpu=True), tmp_path, 4, Settings(model="m", train_data="t"))


def log(metrics, step=1, grad_norm=2.0):
    return metrics.log(step, 0.5, 1e-3, torch.tensor(grad_norm))


def add(metrics, sums, skipped=False, **ratios):
    """A step of five supervised tokens, whose loss is half cross-entropy, half soft, and a tenth consistency."""
    noise = {-1 if name == "embedding" else int(name[1:]): torch.tensor([value, 8 * value])
             for name, value in ratios.items()}  # fmt: skip
    ce, soft, consistency = map(torch.tensor, sums)
    losses = {"ce": ce, "soft": soft, "consistency": consistency}
    loss = (0.5 * ce + 0.5 * soft + 0.1 * consistency) / 5
    metrics.add_step(loss, losses, noise, target_tokens=5, tokens=20, skipped=skipped)


def test_a_line_has_the_means_since_the_one_before(metrics):
    add(metrics, [6.0, 3.0, 0.0])
    add(metrics, [4.0, 1.0, 2.0])
    line = log(metrics)
    assert (line["ce_loss"], line["soft_loss"], line["consistency_loss"]) == pytest.approx((1.0, 0.4, 0.2))
    assert line["loss"] == pytest.approx(0.72) and line["target_tokens"] == 10 and line["tokens_per_second"] > 0
    add(metrics, [0.0, 0.0, 0.0])
    assert log(metrics, step=2)["loss"] == 0
    assert [json.loads(text)["step"] for text in metrics.path.read_text().splitlines()] == [1, 2]


def test_a_skipped_step_is_counted_and_does_not_touch_the_means(metrics):
    add(metrics, [6.0, 3.0, 0.0])
    add(metrics, [float("nan"), 1.0, 2.0], skipped=True)
    line = log(metrics, grad_norm=float("inf"))
    assert line["ce_loss"] == pytest.approx(1.2) and line["target_tokens"] == 5 and line["skipped_steps"] == 1
    assert line["grad_norm"] is None
    add(metrics, [float("nan"), 1.0, 2.0], skipped=True)
    line = log(metrics)
    assert line["loss"] is line["ce_loss"] is line["noise_to_signal"] is None and line["skipped_steps"] == 1
    assert "NaN" not in metrics.path.read_text()


def test_the_loss_is_the_one_that_was_optimized_whatever_the_weights(metrics):
    losses = {"ce": torch.tensor(6.0), "mine": torch.tensor(3.0)}
    metrics.add_step(torch.tensor(1.01), losses, {}, target_tokens=6, tokens=9, skipped=False)
    metrics.add_step(torch.tensor(2.02), losses, {}, target_tokens=3, tokens=9, skipped=False)
    line = log(metrics)
    assert line["loss"] == pytest.approx((6 * 1.01 + 3 * 2.02) / 9)
    assert line["ce_loss"] == pytest.approx(12 / 9) and line["mine_loss"] == pytest.approx(6 / 9)
    named = [f"{name}_loss" for name in (*LOSSES, "mine")]
    assert list(line)[2 : 3 + len(named)] == ["loss", *named]


def test_a_loss_that_the_objective_does_not_have_is_null(metrics):
    add(metrics, [6.0, 3.0, 0.0])
    assert log(metrics)["rdrop_loss"] is None and log(metrics)["ce_loss"] is None


def test_trackers_get_the_noise_and_the_size_of_each_layer_by_its_name(metrics, monkeypatch):
    sent = []
    monkeypatch.setattr(metrics.accelerator, "log", lambda line, step: sent.append(line))
    add(metrics, [6.0, 3.0, 0.0], l1=0.25, l3=0.5)
    line = log(metrics)
    assert sent[0]["noise_to_signal/1"] == 0.25 and sent[0]["hidden_rms/3"] == 4.0 and sent[0]["hidden_rms/1"] == 2.0
    assert not {"layer_noise_to_signal", "hidden_rms", "rdrop_loss"} & set(sent[0]) and line["rdrop_loss"] is None


def test_the_noise_of_every_layer_is_its_mean_over_the_steps_in_which_it_had_some(metrics):
    add(metrics, [6.0, 3.0, 0.0], l1=0.25, l3=0.5)
    add(metrics, [6.0, 3.0, 0.0], l1=0.75, l3=float("nan"), skipped=True)
    add(metrics, [6.0, 3.0, 0.0], l1=0.75, l0=0.125)  # layers were chosen again
    line = log(metrics)
    assert line["layer_noise_to_signal"] == {"0": 0.125, "1": 0.5, "3": 0.5}
    assert line["noise_to_signal"] == pytest.approx(0.375) and line["hidden_rms"] == [1.0, 4.0, 4.0]
    add(metrics, [6.0, 3.0, 0.0], embedding=0.5)
    line = log(metrics)
    assert line["layer_noise_to_signal"] == {"embedding": 0.5} and line["hidden_rms"] == [4.0]
    add(metrics, [6.0, 3.0, 0.0], l2=float("inf"))
    line = log(metrics)
    assert line["layer_noise_to_signal"] == {"2": None} and line["noise_to_signal"] is None
    assert line["hidden_rms"] == [None]
    assert "Infinity" not in metrics.path.read_text()


@pytest.fixture
def clock(monkeypatch):
    """In place of the machine's: a second passes with each look at it."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


def test_what_is_no_training_does_not_count_in_the_speed(clock, metrics):
    with metrics.pausing():
        for _ in range(100):
            time.perf_counter()
    add(metrics, [6.0, 3.0, 0.0])
    assert log(metrics)["tokens_per_second"] == 20 / 2  # up to the pause, and after it


@pytest.mark.slow
def test_the_memory_is_what_this_process_has_held(metrics):
    held = torch.ones(64 * 2**20)  # a quarter of a GiB
    add(metrics, [6.0, 3.0, 0.0])
    before = log(metrics)["peak_memory_gib"]
    more = torch.ones(128 * 2**20)
    add(metrics, [6.0, 3.0, 0.0])
    assert held.sum() + more.sum() > 0
    assert log(metrics)["peak_memory_gib"] >= max(before, 0.75)


def test_a_line_that_is_not_yet_due_survives_in_a_checkpoint(clock, metrics):
    add(metrics, [6.0, 3.0, 0.1], l1=0.25)
    add(metrics, [float("nan"), 1.0, 2.0], skipped=True)
    state = {name: value.clone() if torch.is_tensor(value) else json.loads(json.dumps(value))
             for name, value in metrics.state_dict().items()}  # fmt: skip
    add(metrics, [4.0, 1.0, 0.2], l1=0.5)
    expected = log(metrics)
    assert expected["layer_noise_to_signal"] == {"1": 0.375} and expected["hidden_rms"] == [3.0]
    metrics.load_state_dict(state)
    add(metrics, [4.0, 1.0, 0.2], l1=0.5)
    again = log(metrics)
    assert {**again, "peak_memory_gib": 0} == {**expected, "peak_memory_gib": 0}


def take(**flags: int) -> int:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], weight_decay=0.5)
    weight.grad = torch.tensor([math.nan])
    bad_steps = take_step(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), bad=True, **flags)
    assert weight.item() == 1
    return bad_steps


def test_bad_steps_are_said_and_too_many_of_them_an_error(capsys):
    assert take(step=7, bad_steps=0, most=2) == 1
    assert "step 7: the loss or its gradient is not a finite number; the step is skipped" in capsys.readouterr().err
    with pytest.raises(InputError, match="step 8: the loss or its gradient is not a finite number, 2 steps in a row"):
        take(step=8, bad_steps=1, most=2)
    with pytest.raises(InputError):  # a resumed run whose limit was lowered
        take(step=9, bad_steps=6, most=2)
