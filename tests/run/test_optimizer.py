"""The optimizer of a GPU leaves the state of any other, so that a run goes on here as there."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from noisefit.run.steps import make_optimizer
from noisefit.run.weights import gather_optimizer, restore_optimizer

SETTINGS = SimpleNamespace(learning_rate=0.1, weight_decay=0.01)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("resumed_on", ["cuda", "cpu"])
@pytest.mark.parametrize("begun_on", ["cuda", "cpu"])
def test_a_fused_step_goes_on_from_any_and_any_from_it(begun_on, resumed_on):
    model = torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(SETTINGS, model, torch.device(begun_on))  # torch has the fused one for CPUs, too
    assert bool(optimizer.defaults["fused"]) == (begun_on == "cuda") and len(optimizer.param_groups[0]["params"]) == 1
    step(model, optimizer)
    state, weights = gather_optimizer(model, optimizer), {k: v.clone() for k, v in model.state_dict().items()}
    step(model, optimizer)

    other = torch.nn.Linear(3, 3)
    other.bias.requires_grad_(False)
    other.load_state_dict(weights)
    optimizer = make_optimizer(SETTINGS, other, torch.device(resumed_on))
    restore_optimizer(Accelerator(cpu=True), other, optimizer, state)
    step(other, optimizer)
    assert bool(optimizer.param_groups[0]["fused"]) == (resumed_on == "cuda")
    torch.testing.assert_close(other.weight, model.weight, rtol=1e-6, atol=1e-6)
