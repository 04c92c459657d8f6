"""What `benchmarks/plan.py` counts is what processes hold, send and compute; and the documents have what it prints."""

import functools
import importlib.util
import json
import re
import shlex
import sys
from dataclasses import replace

import plan_program
import pytest
import torch
from plan_program import CASES, CONFIG, LENGTH, MICRO, ROWS
from running import ROOT, call, start_program, wait
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from noisefit.fork.branches import CLEAN, NOISY, BranchedModel
from noisefit.inputs.batches import collate
from noisefit.inputs.models import ModelSettings, make_trainable
from noisefit.inputs.prompts import Example
from noisefit.method.noise import TokenScaledNoise
from noisefit.run.footprint import Way, measure
from noisefit.run.settings import Settings

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
SPEC = importlib.util.spec_from_file_location("benchmarks_plan", BENCHMARKS / "plan.py")  # examples/ have a plan, too
plan = sys.modules["benchmarks_plan"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plan)

import counting  # noqa: E402
from peak_memory import PeakMemory  # noqa: E402
from shapes import branched_shape, in_shape_alone, shape_of  # noqa: E402

pytestmark = pytest.mark.slow

THREE = (CLEAN, NOISY, NOISY)


@functools.cache
def model_of(precision, **settings):
    return counting.model_of(CONFIG, Settings(model="m", train_data="d", **settings), precision)


def planned(sharding, strategy, precision, flags, gpus=2):
    settings = Settings(model="m", train_data="d", batch_size=ROWS, gradient_accumulation_steps=MICRO, **flags)
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    blocks, outside = counting.weights_by_part(shape_of(CONFIG, settings, frozen), settings)
    model = replace(model_of("bf16"), blocks=blocks, outside=outside)  # activations are no matter here
    mesh, way = plan.Mesh(gpus, 1, sharding, precision), Way(THREE, (1,), strategy, settings.gradient_checkpointing, 64)
    return plan.plan(model, settings, mesh, way, LENGTH, LENGTH - 8)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    log, results = folder / "log", folder / "results.json"
    assert wait(start_program(plan_program.main, [str(results)], log, 2)) == [0, 0], log.read_text()
    content = json.loads(results.read_text())
    assert content["processes"] == 2
    return content["cases"]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(list(case.values())) for case in CASES])
def test_two_processes_hold_and_send_what_is_planned(found, index):
    case, real = CASES[index], found[index]
    told = planned(**case)
    for name in ("weights", "gradients", "optimizer"):
        assert told.memory[name] == real[name], name
    assert real["loss"] == "torch.float32"  # whatever is computed in
    sent = {name: round(2 * size) for name, size in told.traffic.items()}  # a ring of two sends half of it, or all
    if case["sharding"] == "ddp":
        assert real["sent"]["allreduce_"] == sent["all-reduce of gradients"] / 2
        assert told.memory["DDP's buckets"] == real["gradients"]
        return
    gathers, scatters = real["sent"]["_allgather_base_"], real["sent"]["_reduce_scatter_base_"]
    assert gathers == sent["all-gather, forward"] + sent["all-gather, backward"]
    assert scatters == sent["reduce-scatter of gradients"]


@pytest.mark.parametrize("strategy", ["fork", "separate"])
@pytest.mark.parametrize("noisy", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("flags", [{}, dict(full_finetune=True), dict(gradient_checkpointing=True)], ids=str)
def test_the_flops_are_those_of_a_real_step(flags, noisy, strategy):
    """With attention that torch can count on a CPU, too."""
    flags = dict(lora_dropout=0, loss_chunk_size=16, attn_implementation="eager", **flags)
    settings = Settings(model="m", train_data="d", batch_size=ROWS, gradient_accumulation_steps=1, **flags)
    model = BranchedModel(real_model(settings), 16).train()
    batch = collate([Example([1 + i for i in range(LENGTH)], 8)] * ROWS, 0)
    noise = {layer: TokenScaledNoise(0.1) for layer in noisy}
    with FlopCounterMode(display=False) as counter:
        sums = model(**batch, noise=noise, strategy=strategy, chunk_losses=plan_program.losses)
        sums["ce"].backward()
    way = Way(THREE, noisy, strategy, settings.gradient_checkpointing, 16)
    told = plan.plan(model_of("no", **flags), settings, plan.Mesh(), way, LENGTH, LENGTH - 8)
    assert sum(told.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)


def real_model(settings):
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation=settings.attn_implementation)
    return make_trainable(settings, model, "tiny")


def test_a_shape_keeps_what_the_real_model_keeps():
    """But for the masks of dropout, of which a GPU keeps a byte an element: without it, or as on a CPU."""
    for precision, settings, as_on_gpu in (
        ("no", ModelSettings(), False),
        ("bf16", ModelSettings(lora_dropout=0), True),
    ):
        frozen = torch.bfloat16 if precision == "bf16" else torch.float32
        with in_shape_alone(as_on_gpu):
            shape = measure(
                branched_shape(CONFIG, settings, frozen, 64, precision), torch.zeros(1, dtype=torch.long), 96
            )
        torch.manual_seed(0)
        model = plan_program.build(precision)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = settings.lora_dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            real = measure(model, torch.zeros(1, dtype=torch.long), 60)
        for one, other in zip(shape.blocks[1:], real.blocks[1:], strict=True):
            assert one.per_token == pytest.approx(other.per_token, rel=0.01)


def test_layers_that_are_alike_are_measured_once_and_counted_all(monkeypatch):
    few = model_of("bf16")
    monkeypatch.setattr(counting, "FEW", 99)
    assert few == model_of.__wrapped__("bf16") and len(few.blocks) == 4


def test_the_peak_of_a_step_in_shape_alone_is_the_planned_one():
    settings, told = ModelSettings(), model_of("bf16").footprint
    with in_shape_alone():
        model = branched_shape(CONFIG, settings, torch.bfloat16, 64, "bf16")
        batch = {name: torch.ones_like(t) for name, t in collate([Example([1] * 64, 8)] * 4, 0).items()}
        for noisy, strategy in (((0,), "fork"), ((0,), "separate")):
            noise = {layer: TokenScaledNoise(0.1) for layer in noisy}
            with PeakMemory() as memory:
                sums = model(**batch, noise=noise, strategy=strategy, chunk_losses=plan_program.losses)
                sums["ce"].backward()
            for parameter in model.parameters():
                parameter.grad = None
            way = Way(THREE, noisy, strategy, loss_chunk_size=64)
            assert told.peak(way, 4, 64, 4 * 56) == pytest.approx(memory.peak, rel=0.15)


def test_the_page_has_the_tables_that_its_commands_print(monkeypatch):
    measured = {}

    def once(config, settings, precision):
        """A launch is no matter to it, and of these flags one alone."""
        key = (config.hidden_size, precision, settings.gradient_checkpointing)
        if key not in measured:
            measured[key] = counting.model_of(config, settings, precision)
        return measured[key]

    monkeypatch.setattr(plan, "model_of", once)
    page = (ROOT / "docs" / "launching.md").read_text()
    commands = re.findall(r"```sh\n(?:python )(benchmarks/plan\.py [^`]*?)\n```\n\n(.*?)(?=\n\n[^|\n])", page, re.S)
    assert len(commands) == 3
    for command, table in commands:
        done = call(plan.main, *shlex.split(command.replace("\\\n", " "))[1:])
        assert done.stdout.strip() == table.strip(), done.stdout + done.stderr


def test_what_is_wrong_is_said():
    assert "expected 1 or more" in call(plan.main, "llama-1b", "--gpus", "0").stderr
    assert "layers 0 to 15" in call(plan.main, "llama-1b", "--noisy_layers", "16").stderr
    assert "does not go with" in call(plan.main, "llama-1b", "--sharding", "fsdp", "--quantization", "4bit").stderr
    assert "no such folder" in call(plan.main, "./nowhere").stderr
