"""A run whose losses a GPU has compiled is the run without, whatever the losses are."""

import json

import pytest
import torch
from running import run
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend

from noisefit.base import compiling
from noisefit.base.errors import LocalError
from noisefit.fork.branches import CLEAN, BranchedModel
from noisefit.inputs.batches import collate
from noisefit.inputs.prompts import Example
from noisefit.method.losses import cross_entropy
from noisefit.run.settings import Settings
from noisefit.run.steps import naming_failures

pytestmark = pytest.mark.slow

# A chunk and a rest in each micro-batch; noise late, so that branches share layers.
FLAGS = dict(
    learning_rate=1e-2, max_steps=3, batch_size=4, gradient_accumulation_steps=2, num_noise_layers=1, lora_dropout=0.0,
    loss_chunk_size=16, logging_steps=1,
)  # fmt: skip
KINDS = {
    "noisefit": dict(temperature=2.0),
    "rdrop": dict(loss_mode="rdrop"),
    "cached teacher": dict(loss_mode="ce_teacher", teacher="base", cache_teacher=8),
    "teacher's gradient": dict(loss_mode="full", teacher_gradient=True, temperature_on="teacher"),
    "weights": dict(unknown_rows="weight", unknown_below=-1),
}


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """As on a GPU, without a compiler of C++; the names of the functions that are compiled."""
    names, compile_function = [], torch.compile

    def naming(function, **how):
        names.append(function.__name__)
        return compile_function(function, **how)

    monkeypatch.setattr(torch, "compile", naming)
    monkeypatch.setattr(compiling, "BACKEND", CompileCounterWithBackend("aot_eager"))  # one that none has compiled with
    monkeypatch.setattr(compiling, "DEVICES", ("cpu",))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield names
    compiling.forget_failures()


def assert_same(found: list[dict], expected: list[dict], folder) -> None:
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    one, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("plain", "compiled"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_losses_train_the_same(kind, llama_folder, questions, tmp_path, compiled, monkeypatch):
    found = run(llama_folder, questions, tmp_path / "compiled", **FLAGS | KINDS[kind])
    assert "chunk_losses" in compiled and not compiling._failed
    monkeypatch.setattr(compiling, "DEVICES", ())
    expected = run(llama_folder, questions, tmp_path / "plain", **FLAGS | KINDS[kind])
    assert_same(found, expected, tmp_path)


@pytest.mark.parametrize("graphs", [0, 1])
def test_where_the_losses_cannot_be_compiled_the_run_goes_on(
    graphs, llama_folder, questions, tmp_path, compiled, monkeypatch, capsys
):
    """Also where a chunk of another size had been: in backward it is computed again as it was in forward."""
    naming, made = torch.compile, []

    def so_many(graph, inputs):
        if len(made) == graphs:
            raise RuntimeError("PassManager::run failed")
        made.append(graph)
        return aot_eager(graph, inputs)

    def compile_function(function, **how):
        return naming(function, **how | ({"backend": so_many} if function.__name__ == "chunk_losses" else {}))

    monkeypatch.setattr(torch, "compile", compile_function)
    found = run(llama_folder, questions, tmp_path / "compiled", **FLAGS)
    said = capsys.readouterr().err
    assert said.count("torch.compile failed, so noise and losses take more") == 1 and "PassManager" in said
    assert len(made) == graphs and compiling._failed and not compiling.are_compiled("cpu")
    monkeypatch.setattr(compiling, "DEVICES", ())
    assert_same(found, run(llama_folder, questions, tmp_path / "plain", **FLAGS), tmp_path)
    assert not compiling._failed  # the next run tries again


def test_a_chunk_is_larger_where_the_losses_are_compiled_unless_its_size_is_given(
    llama_folder, questions, tmp_path, compiled, monkeypatch
):
    def size(name: str, **flags: int) -> int:
        run(llama_folder, questions, tmp_path / name, loss_mode="basefit", max_steps=1, **flags)
        return json.loads((tmp_path / name / "noisefit_config.json").read_text())["loss_chunk_size"]

    assert size("compiled") == 1024 and size("given", loss_chunk_size=77) == 77
    monkeypatch.setattr(compiling, "DEVICES", ())
    assert size("plain") == 256


def test_losses_that_are_compiled_anew_at_each_call_end_in_a_line(compiled, monkeypatch, tmp_path):
    seen = []

    @compiling.fused_losses
    def remembering(logits, targets):
        seen.append(float(logits[CLEAN][0].detach().mean()))
        return {"ce": logits[CLEAN][0].softmax(dim=-1).square().sum() + cross_entropy(logits[CLEAN][0], targets)}

    monkeypatch.setattr(compiling, "FRAMES", 8)
    settings = Settings(model="m", train_data="d", output_model=str(tmp_path))
    model, batch = BranchedModel(tiny_model(), 1), collate([Example(list(range(1, 30)), 1)], 0)
    problem = r"step 7: torch.compile is at fault \(.*\); TORCHDYNAMO_DISABLE=1 in the environment trains without it$"
    with pytest.raises(LocalError, match=problem), naming_failures(settings, 7, batch):
        model(**batch, branches=(CLEAN,), chunk_losses=remembering)["ce"].backward()
