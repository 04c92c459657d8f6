"""In which precision a launch computes, and what of it is left behind."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from noisefit.base.precision import keeping_tf32, set_precision, without_tf32
from noisefit.fork.branches import BranchedModel
from noisefit.fork.exactness import choose_strategy


def products() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(autouse=True)
def as_before():
    before = products()
    with keeping_tf32():
        yield
    assert (products() == "tf32") == (before == "tf32")


def launch(device: str, mixed_precision: str) -> SimpleNamespace:
    return SimpleNamespace(is_fsdp2=False, device=torch.device(device), mixed_precision=mixed_precision)


def test_training_on_a_gpu_multiplies_in_tf32_and_nothing_else_does():
    assert set_precision(launch("cpu", "no")) is None and products() != "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with keeping_tf32():
            assert set_precision(launch("cuda", "bf16")) is None and products() == "tf32"
            # Inductor reads the older names, which raise where newer ones alone were set.
            assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
            with without_tf32():
                assert products() != "tf32"
            assert products() == "tf32"
    assert products() != "tf32" and not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_without_mixed_precision_is_told_the_flag():
    line = set_precision(launch("cuda", "no"))
    assert "--mixed_precision bf16" in line and "\n" not in line


def test_the_start_up_check_compares_exact_products():
    model, seen = tiny_model("llama", torch.float32), []
    model.model.layers[0].register_forward_hook(lambda *of_call: seen.append(products()))
    set_precision(launch("cuda", "bf16"))
    choose_strategy(BranchedModel(model, 7), tiny_batch(), [1], "auto")
    assert seen and "tf32" not in seen and products() == "tf32"
