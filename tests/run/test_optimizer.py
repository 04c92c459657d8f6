"""Every optimizer goes on from a checkpoint bit for bit, and a skipped step touches nothing; that of a GPU leaves the
state of any other, so that a run goes on here as there."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from running import run
from safetensors.torch import load_file
from transformers.training_args import OptimizerNames

from noisefit.base.errors import InputError
from noisefit.run.optimizers import BITSANDBYTES, OPTIMIZERS, bytes_kept, try_optimizer
from noisefit.run.settings import Settings
from noisefit.run.steps import make_optimizer, take_step
from noisefit.run.weights import check_optimizer, gather_optimizer, restore_optimizer, write_tensors

CPU = torch.device("cpu")
NEEDS_BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="not installed")

SETTINGS = SimpleNamespace(optim="adamw_torch", optim_args=None, learning_rate=0.1, weight_decay=0.01)


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


def of(name, arguments=None):
    return SimpleNamespace(optim=name, optim_args=arguments, learning_rate=1e-2, weight_decay=0.1)


def train_on(model, optimizer, steps):
    for number in steps:
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(4, 128)).pow(2).sum().backward()
        optimizer.step()


CASES = [
    *((name, None) for name in OPTIMIZERS),
    ("adafactor", ["beta1=0.9"]),
    ("sgd", ["momentum=0.9", "nesterov=true"]),
    ("rmsprop", ["momentum=0.9", "centered=true"]),
    ("adamw_torch", ["betas=0.9,0.95", "amsgrad=true"]),
    ("ademamix", ["betas=[0.9, 0.95, 0.99]", "t_alpha=10", "t_beta3=10"]),
]


@pytest.mark.filterwarnings("ignore:Paged optimizers")  # on a CPU they are none
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, args, marks=NEEDS_BITSANDBYTES if OPTIMIZERS[name].library == BITSANDBYTES else ())
        for name, args in CASES
    ],
    ids=str,
)
def test_each_goes_on_bit_for_bit_and_a_skipped_step_touches_nothing(name, arguments, tmp_path):
    settings = of(name, arguments)
    try_optimizer(settings, CPU, sharded=False)
    model = torch.nn.Linear(128, 64)
    optimizer = make_optimizer(settings, model, CPU)
    begun = model.weight.detach().clone()
    train_on(model, optimizer, range(3))
    assert not torch.equal(model.weight, begun)
    state, weights = gather_optimizer(model, optimizer), {n: w.clone() for n, w in model.state_dict().items()}
    write_tensors(tmp_path / "optimizer.safetensors", state)
    kept = sum(tensor.nbytes for key, tensor in state.items() if key.startswith("weight.")) / model.weight.nbytes
    if not name.startswith("paged"):  # which are in no GPU's memory
        assert kept == pytest.approx(bytes_kept(settings), abs=0.08)

    optimizer.zero_grad()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    model(torch.full((1, 128), float("nan"))).sum().backward()
    assert take_step(optimizer, schedule, step=4, bad=True, bad_steps=0, most=9) == 1
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    train_on(model, optimizer, range(3, 6))

    other = torch.nn.Linear(128, 64)
    other.load_state_dict(weights)
    restored, tensors = make_optimizer(settings, other, CPU), load_file(tmp_path / "optimizer.safetensors")
    check_optimizer(other, tensors)
    restore_optimizer(Accelerator(cpu=True), other, restored, tensors)
    train_on(other, restored, range(3, 6))
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())
    ended, also = gather_optimizer(model, optimizer), gather_optimizer(other, restored)
    assert ended.keys() == also.keys() and all(torch.equal(ended[key], also[key]) for key in ended)
    for key, tensor in tensors.items():  # a checkpoint of another model
        if tensor.dim():
            with pytest.raises(ValueError, match="is not of this model"):
                check_optimizer(other, tensors | {key: torch.ones(7, 9, 999)})


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_what_a_step_does_is_what_its_own_class_does(name):
    if name == "adamw_8bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import Adafactor

    ours, theirs = torch.nn.Linear(128, 64), torch.nn.Linear(128, 64)
    theirs.load_state_dict(ours.state_dict())
    how = dict(lr=1e-2, weight_decay=0.1)
    if name == "adafactor":
        own = Adafactor(theirs.parameters(), scale_parameter=False, relative_step=False, **how)
    else:
        own = bitsandbytes.optim.AdamW8bit(theirs.parameters(), **how)
    train_on(ours, make_optimizer(of(name), ours, CPU), range(3))
    train_on(theirs, own, range(3))
    assert torch.equal(ours.weight, theirs.weight)


def test_names_are_those_of_transformers_and_others_are_refused_with_the_list():
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    with pytest.raises(InputError, match=r"--optim: invalid choice: 'galore_adamw' \(choose from adamw_torch, "):
        Settings(model="m", train_data="t", optim="galore_adamw")
    words = ["eps=1e-6", "betas=0.9,0.9"], ["betas=[0.9, 0.9]", "eps=0.000001"]
    one, other = (Settings(model="m", train_data="t", optim_args=args) for args in words)
    assert one.record()["optim_args"] == other.record()["optim_args"] == ["betas=[0.9, 0.9]", "eps=1e-06"]


@pytest.mark.parametrize(
    ("name", "arguments", "sharded", "line"),
    [
        ("sgd", ["momentum=much"], False, "--optim_args momentum=much: expected a number"),
        ("sgd", ["betas=0.9,0.99"], False, "--optim_args betas: --optim sgd has none; it has momentum, dampening"),
        ("sgd", ["nesterov=true"], False, "--optim sgd, --optim_args nesterov=true: it does not work on cpu: Nesterov"),
        ("adamw_torch", ["lr=0.1"], False, "--optim_args lr: give --learning_rate instead"),
        ("adamw_torch", ["beta=0.1"], False, r"--optim_args beta: no such argument; did you mean betas\?"),
        ("adamw_torch", ["betas"], False, "--optim_args betas: expected key=value"),
        ("adafactor", None, True, "--optim adafactor does not go with FSDP; give adamw_torch or adamw_torch_fused"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(name, arguments, sharded, line):
    with pytest.raises(InputError, match=line):
        try_optimizer(of(name, arguments), CPU, sharded)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--optim paged_adamw_8bit needs bitsandbytes: pip install bitsandbytes"):
        try_optimizer(of("paged_adamw_8bit"), CPU, sharded=False)


@pytest.mark.parametrize("optim", ["adafactor", pytest.param("adamw_8bit", marks=NEEDS_BITSANDBYTES)])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(optim, llama_folder, questions, tmp_path):
    flags = dict(optim=optim, learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=1, logging_steps=1,
                 save_steps=2, lr_scheduler_type="constant", lora_r=32)  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(llama_folder, questions, whole, **flags, max_steps=4)
    run(llama_folder, questions, parts, **flags, max_steps=2)
    with pytest.raises(InputError, match=f"optim was {optim} and is sgd"):
        run(llama_folder, questions, parts, **flags | dict(optim="sgd"), max_steps=4, resume_from_checkpoint="latest")
    run(llama_folder, questions, parts, **flags, max_steps=4, resume_from_checkpoint="latest")
    for name in ("adapter_model.safetensors", "checkpoint-4/optimizer.safetensors"):
        one, other = load_file(whole / name), load_file(parts / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
