"""A run whose losses a GPU has compiled is the run without, whatever the losses are."""

import pytest
import torch
from running import run
from safetensors.torch import load_file

from noisefit.base import compiling

pytestmark = pytest.mark.slow

# A chunk and a rest in each micro-batch; noise late, so that branches share layers.
FLAGS = dict(
    learning_rate=1e-2, max_steps=3, batch_size=4, gradient_accumulation_steps=2, num_noise_layers=1, lora_dropout=0.0,
    loss_chunk_size=16, logging_steps=1,
)  # fmt: skip
KINDS = {
    "noisefit": dict(temperature=2.0),
    "basefit": dict(loss_mode="basefit"),
    "rdrop": dict(loss_mode="rdrop"),
    "cached teacher": dict(loss_mode="ce_teacher", teacher="base", cache_teacher=8),
    "teacher's gradient": dict(loss_mode="full", teacher_gradient=True, temperature_on="teacher"),
    "weights": dict(unknown_rows="weight", unknown_below=-1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_losses_train_the_same(kind, llama_folder, questions, tmp_path, monkeypatch):
    expected = run(llama_folder, questions, tmp_path / "plain", **FLAGS | KINDS[kind])
    compiled, compile_function = [], torch.compile

    def counting(function, **how):
        compiled.append(function.__name__)
        return compile_function(function, backend="aot_eager", **how)  # which needs no compiler of C++

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(compiling, "DEVICES", ("cpu",))
    monkeypatch.setattr(compiling, "_failed", [])
    torch._dynamo.reset()
    found = run(llama_folder, questions, tmp_path / "compiled", **FLAGS | KINDS[kind])
    assert "chunk_losses" in compiled and not compiling._failed
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "compiled"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)
