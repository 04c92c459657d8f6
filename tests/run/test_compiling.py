"""A launch with `--dynamo_backend`: the blocks are compiled one by one, and losses and gradients are the same."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from running import run
from tiny_models import fixed_noise, supervise, tiny_batch, tiny_model

from noisefit.base.errors import InputError
from noisefit.fork.branches import CLEAN, NOISY, BranchedModel
from noisefit.method.losses import consistency_loss, cross_entropy
from noisefit.run.compiling import check_compiling, compile_blocks


def launch(backend: str, sharded: bool = False) -> SimpleNamespace:
    state = SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(backend=backend))
    return SimpleNamespace(state=state, is_fsdp2=sharded)


def losses(logits, target_tokens):
    return {"all": cross_entropy(logits[CLEAN][0], target_tokens) + consistency_loss(*logits[NOISY], 1.0)}


def step(model: BranchedModel, lengths: tuple[int, ...], strategy: str) -> list[torch.Tensor]:
    model.zero_grad()
    noise = {0: fixed_noise(0), 1: fixed_noise(1)}
    loss = model(**supervise(tiny_batch(lengths)), noise=noise, strategy=strategy, chunk_losses=losses)["all"]
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_gradients():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    accelerator = launch("eager")  # traces as every backend does, and computes as ever
    plain, compiled = (BranchedModel(tiny_model(num_hidden_layers=3), 7) for _ in range(2))
    compile_blocks(compiled, accelerator)
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO  # nothing is left for `prepare`
    for strategy in ("fork", "separate"):
        for lengths in ((11, 7, 9), (5, 6, 8), (4, 13)):
            of_both = zip(step(plain, lengths, strategy), step(compiled, lengths, strategy), strict=True)
            for one, other in of_both:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs < 8 and not counters["graph_break"]  # the layers share them, and lengths and rows do
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # no frame was given up and runs as it is


def test_without_the_flag_nothing_is_compiled():
    model = BranchedModel(tiny_model(), 7)
    compile_blocks(model, launch("no"))
    assert all("forward" not in vars(layer) for layer in model.model.model.layers)
    check_compiling(launch("no", sharded=True), gradient_checkpointing=True)


def test_what_does_not_go_with_it_is_refused_before_the_model_is_loaded(llama_folder, questions, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--dynamo_backend inductor does not go with FSDP"):
        check_compiling(launch("inductor", sharded=True), gradient_checkpointing=False)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setattr("train_loop.load_model", lambda *arguments: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="inductor does not go with --gradient_checkpointing"):
        run(llama_folder, questions, tmp_path / "out", gradient_checkpointing=True)
