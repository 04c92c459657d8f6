"""What a micro-batch keeps over the weights: a few tokens tell what a whole step takes, and the run says it."""

import copy
import functools
import sys

import pytest
import torch
from running import ROOT, run
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from noisefit.fork.branches import CLEAN, DROPOUT, NOISY, BranchedModel
from noisefit.fork.packing import Packing
from noisefit.inputs.batches import collate, cut_step, epoch_steps, row_lengths
from noisefit.inputs.models import ModelSettings, make_trainable
from noisefit.inputs.prompts import Example
from noisefit.method.noise import TokenScaledNoise
from noisefit.run import memory_needed
from noisefit.run.footprint import Amount, Footprint, Way, measure
from noisefit.run.settings import Settings

sys.path.insert(0, str(ROOT / "benchmarks"))

from peak_memory import PeakMemory
from ways import noisefit_losses

LAYERS, ROWS, LENGTH, CHUNK = 4, 2, 80, 32
THREE = (CLEAN, NOISY, NOISY)
CONFIGS = {
    "llama": LlamaConfig(vocab_size=523, hidden_size=128, intermediate_size=344, num_hidden_layers=LAYERS,
                         num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=128),
    "gpt2": GPT2Config(vocab_size=523, n_embd=128, n_layer=LAYERS, n_head=8, n_positions=128, bos_token_id=1,
                       eos_token_id=2),
}  # fmt: skip


@functools.cache
def branched(name, precision="bf16", checkpointing=False, **settings):
    """As the loop has it: frozen weights in 16 bits, an adapter in float32 with dropout, under autocast."""
    torch.manual_seed(0)
    settings = ModelSettings(gradient_checkpointing=checkpointing, **settings)
    frozen = torch.bfloat16 if precision == "bf16" and not settings.full_finetune else torch.float32
    attention = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=frozen, **attention)
    model = BranchedModel(make_trainable(settings, model, name), CHUNK).train()
    inner = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")(inner)  # as accelerate does
    return model


def footprint_of(model, noise=None, branches=THREE, packing=False):
    return measure(model, torch.arange(7), LENGTH, noise, branches, packing)


footprint_of_model = functools.cache(footprint_of)  # of one without noise or dropout of its own


def noise_of(way, gradient=False):
    noise = {layer: TokenScaledNoise(0.1) for layer in way.noisy}
    for one in noise.values():
        one.gradient = gradient
    return noise


def held(model, way, gradient=False, packing=False):
    """Bytes that a micro-batch really holds when the hidden states of its branches are there, but for these."""
    ids, found, packed = torch.ones(ROWS, LENGTH, dtype=torch.long), [], None
    positions = torch.arange(ROWS * LENGTH)
    mask = torch.ones_like(ids)
    if packing:
        packed = Packing.of(mask.sum(dim=1))
        ids, mask = ids.view(1, -1), torch.arange(1, ROWS + 1).repeat_interleave(LENGTH).unsqueeze(0)
    with PeakMemory() as memory:

        def sum_losses(states, *args):
            found.append(memory.now - states.nbytes)
            return {}

        model.sum_losses = sum_losses
        model(ids, mask, positions, positions, packing=packed, branches=way.branches, noise=noise_of(way, gradient),
              strategy=way.strategy, chunk_losses=noisefit_losses)  # fmt: skip
    del model.sum_losses
    return found[0]


def peak(model, way):
    """Bytes that it holds at its peak, forward and backward, and its supervised tokens."""
    batch = collate([Example([1 + i % 500 for i in range(LENGTH)], 20) for _ in range(ROWS)], 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with PeakMemory() as memory:
        how = dict(branches=way.branches, noise=noise_of(way), strategy=way.strategy)
        sum(model(**batch, **how, chunk_losses=noisefit_losses).values()).backward()
    return memory.peak, len(batch["target_tokens"])


PLAIN, EARLY, LATE = Way(THREE, loss_chunk_size=CHUNK), Way(THREE, (0, 1)), Way(THREE, (2, 3))
SEPARATE = Way(THREE, (1,), "separate")
WAYS = {"plain": PLAIN, "early": EARLY, "late": LATE, "separate": SEPARATE}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("llama", dict(full_finetune=True)), ("gpt2", dict(attn_implementation="eager"))],
    ids=str,
)
def test_what_a_few_tokens_keep_is_what_a_micro_batch_holds(name, settings, way):
    model = branched(name, **settings)
    held_now, told = held(model, WAYS[way]), footprint_of_model(model).kept(WAYS[way], ROWS, LENGTH)
    assert told == pytest.approx(held_now, rel=0.06)


@pytest.mark.parametrize("way", WAYS)
def test_so_it_is_where_blocks_are_computed_again(way):
    model, way = branched("llama", checkpointing=True), WAYS[way]
    footprint, again = footprint_of_model(model), Way(way.branches, way.noisy, way.strategy, True, CHUNK)
    kept = footprint_of_model(branched("llama"))  # but for the first, which has no gradient for its input there
    assert footprint.blocks[1:] == kept.blocks[1:]
    assert all(layer.gradient_checkpointing for layer in model.model.base_model.model.model.layers)
    assert footprint.kept(again, ROWS, LENGTH) == pytest.approx(held(model, again), rel=0.15)
    most, supervised = peak(model, again)
    assert footprint.peak(again, ROWS, LENGTH, supervised) == pytest.approx(most, rel=0.15)


@pytest.mark.parametrize("way", WAYS)
def test_the_peak_of_a_step_is_told(way):
    model, way = branched("llama"), WAYS[way]
    most, supervised = peak(model, way := Way(way.branches, way.noisy, way.strategy, False, CHUNK))
    assert footprint_of_model(model).peak(way, ROWS, LENGTH, supervised) == pytest.approx(most, rel=0.1)


def test_noise_keeps_nothing_and_its_gradient_much():
    model, noise = branched("llama", "no"), noise_of(EARLY, gradient=True)
    without, with_it = footprint_of(model, noise_of(EARLY)), footprint_of(model, noise)
    assert without.noisy == Amount() and with_it.noisy.per_token > 4 * 128 * 4  # several float32 an element
    told = with_it.kept(SEPARATE, ROWS, LENGTH), without.kept(SEPARATE, ROWS, LENGTH)
    assert told[0] > 1.05 * told[1]
    assert told[0] == pytest.approx(held(model, SEPARATE, gradient=True), rel=0.06)


def test_a_dropout_branch_keeps_its_masks():
    model, way = branched("llama", "no"), Way((DROPOUT, DROPOUT))
    model.dropout = 0.1
    footprint = footprint_of(model, branches=way.branches)
    assert footprint.dropped.per_token >= 128
    assert footprint.kept(way, ROWS, LENGTH) == pytest.approx(held(model, way), rel=0.06)


@pytest.mark.parametrize("way", ["early", "separate"])
def test_a_packed_micro_batch_is_one_row_with_a_mask_of_all_pairs(way):
    model, way = branched("llama"), WAYS[way]
    footprint = footprint_of(model, packing=True)
    told_packed = footprint.kept(way, 1, ROWS * LENGTH)
    assert told_packed == pytest.approx(held(model, way, packing=True), rel=0.06)
    assert sum(block.per_pair for block in (*footprint.blocks, footprint.outside)) >= 1


def test_its_tokens_are_those_of_the_largest_part_of_a_step():
    lengths = torch.randint(5, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Example([1] * length, 3) for length in lengths]
    for batch_size, processes in ((4, 1), (2, 2), (1, 1), (64, 2)):
        per_step = batch_size * processes * 3
        parts = [
            sum(len(row.input_ids) for row in part)
            for step in epoch_steps(rows, per_step, 7, 0) if len(step) in (per_step, len(rows))
            for process in range(processes) for part in cut_step(step, batch_size, processes, process, packing=True)
        ]  # fmt: skip
        told_tokens = memory_needed.packed_tokens(row_lengths(rows), 7, per_step, batch_size, processes)
        assert told_tokens == pytest.approx(max(parts), rel=0.1), (batch_size, processes)


def test_measuring_changes_nothing():
    model = branched("llama").eval()
    before = [parameter.grad for parameter in model.parameters()]
    footprint_of(model, noise_of(EARLY, gradient=True))
    assert not model.training and all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert not any(module._forward_hooks for layer in model.model.base_model.model.model.layers
                   for module in layer.children())  # fmt: skip
    model.train()


SEVEN_B = Footprint(
    (Amount(per_token=132_260),) + (Amount(per_token=156_328),) * 31, Amount(per_token=16_388), Amount(), Amount(),
    8192, 32_000,
)  # fmt: skip


def told(free=70.0, update=0.0, noisy=(0, 1, 2), strategy="fork", longest=1024, **flags):
    settings = Settings(model="m", train_data="d", **{"loss_chunk_size": 256} | flags)
    return memory_needed.told(settings, SEVEN_B, noisy, strategy, lambda rows: (rows, longest), update, free)


def test_the_line_names_what_helps_with_what_each_gives():
    assert told() == (
        "a micro-batch of 4 x 1024 tokens takes about 57 GiB over the weights, of 70 GiB free; "
        "--gradient_checkpointing makes it 5.5, --prefer_late_layers 0.5 37, --batch_size 2 "
        "--gradient_accumulation_steps 8 28"
    )
    checkpointed = told(free=8.0, gradient_checkpointing=True)
    assert "; --branches separate makes it 4." in checkpointed and "--gradient_checkpointing" not in checkpointed
    assert "late" not in told(noisy=(20,), free=8.0) and "late" not in told(noise_policy="scales.json")
    assert "--batch_size" not in told(batch_size=1, free=20.0)
    assert "gradients and optimizer 84" in told(update=84 * 2**30)


def test_there_is_no_line_where_there_is_room_or_nothing_is_known():
    assert told(free=200.0) is None and told(free=float("nan")) is None
    assert told(longest=64) is None
    assert told(longest=64, update=50 * 2**30) is not None


@pytest.mark.parametrize("free", [0.001, 1000.0])
def test_a_run_tells_it_before_its_first_step_and_is_the_same_run(free, llama_folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "questions.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i}.\n" for i in range(4)))
    flags = dict(max_steps=1, batch_size=2, gradient_accumulation_steps=1, save_steps=0, noise_gradient=True)
    monkeypatch.setattr(memory_needed, "free_memory", lambda device: free)
    [line] = run(llama_folder, data, tmp_path / "told", **flags)
    said = capsys.readouterr().err
    assert ("a micro-batch of 2 x " in said) == (free < 1)
    monkeypatch.setattr("train_loop.memory_needed", lambda *_: None)
    [other] = run(llama_folder, data, tmp_path / "quiet", **flags)
    assert line["loss"] == other["loss"] and line["grad_norm"] == other["grad_norm"]
