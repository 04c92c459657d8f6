"""Metrics: means over supervised tokens, and what is said of numbers that are none."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from noisefit.errors import InputError
from noisefit.tracking import Metrics


@pytest.fixture
def metrics(tmp_path):
    AcceleratorState._reset_state(True)
    return Metrics(Accelerator(cpu=True), Namespace(output_model=str(tmp_path)))


def log(metrics, step=1, grad_norm=2.0):
    return metrics.log(step, 0.5, (0.5, 0.5, 0.1), 1e-3, torch.tensor(grad_norm), {})


def test_a_line_has_the_means_since_the_one_before(metrics):
    for sums in ([6.0, 3.0, 0.0], [4.0, 1.0, 2.0]):
        metrics.add_losses(torch.tensor(sums))
        metrics.add_step(target_tokens=5, tokens=20)
    line = log(metrics)
    assert (line["ce_loss"], line["soft_loss"], line["consistency_loss"]) == pytest.approx((1.0, 0.4, 0.2))
    assert line["loss"] == pytest.approx(0.72) and line["target_tokens"] == 10 and line["tokens_per_second"] > 0
    metrics.add_step(target_tokens=5, tokens=20)
    assert log(metrics, step=2)["loss"] == 0
    assert [json.loads(text)["step"] for text in metrics.path.read_text().splitlines()] == [1, 2]


def test_a_skipped_fp16_step_has_no_gradient_norm_but_divergence_is_an_error(metrics):
    metrics.add_step(target_tokens=5, tokens=20)
    with pytest.raises(InputError, match="step 1: the loss or its gradient is not a finite number"):
        log(metrics, grad_norm=float("inf"))
    assert not metrics.path.exists()
    metrics.accelerator._optimizers = [SimpleNamespace(step_was_skipped=True)]
    assert log(metrics, grad_norm=float("inf"))["grad_norm"] is None
    assert json.loads(metrics.path.read_text())["grad_norm"] is None
    metrics.add_losses(torch.tensor([float("nan"), 0.0, 0.0]))
    with pytest.raises(InputError):
        log(metrics, grad_norm=1.0)
