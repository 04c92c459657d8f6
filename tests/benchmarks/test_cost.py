"""What a step costs, in what can be counted exactly: decoder rows, the largest logits, FLOPs, waits for the device.

No time is measured here; `benchmarks/` does that.
"""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import rows_and_calls, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from noisefit.fork.branches import CLEAN, NOISY, TEACHER, BranchedModel
from noisefit.fork.decoder import find_decoder
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.inputs.batches import collate
from noisefit.inputs.prompts import Example
from noisefit.method.losses import consistency_loss, cross_entropy, soft_target_loss
from noisefit.method.noise import TokenScaledNoise
from noisefit.method.snr import layer_snr
from noisefit.method.teacher import BaseModel, MovingAverage

LAYERS, VOCAB, CHUNK = 6, 4099, 8  # no other dimension is as large as the vocabulary, which is how logits are known


@pytest.fixture(scope="module")
def model():
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    sizes = dict(num_hidden_layers=LAYERS, vocab_size=VOCAB, hidden_size=64, intermediate_size=128, head_dim=16)
    return BranchedModel(get_peft_model(tiny_model(dtype=torch.float32, **sizes), lora), CHUNK)


def plain_losses(logits, targets):
    return {"ce": cross_entropy(logits[CLEAN][0], targets)}


def noisefit_losses(logits, targets):
    [clean], (noisy_1, noisy_2) = logits[CLEAN], logits[NOISY]
    soft = soft_target_loss(clean, noisy_1, 1.0) + soft_target_loss(clean, noisy_2, 1.0)
    return {
        "ce": cross_entropy(clean, targets),
        "soft": soft / 2,
        "consistency": consistency_loss(noisy_1, noisy_2, 1.0),
    }


def step(model, first_noisy=None, lengths=(40, 40, 40, 40), strategy="fork"):
    """A forward and backward pass, the tokens from the 30th on supervised; no noisy layer is plain fine-tuning."""
    noise = {} if first_noisy is None else {i: TokenScaledNoise(0.1) for i in range(first_noisy, LAYERS)}
    losses = noisefit_losses if noise else plain_losses
    batch = collate([Example([1 + i % (VOCAB - 1) for i in range(length)], 30) for length in lengths], 0)
    total(model(**batch, noise=noise, strategy=strategy, chunk_losses=losses)).backward()
    pop_noise_sizes(model)  # as the loop does once a step


def teacher_losses(logits, targets):
    [clean], [teacher] = logits[CLEAN], logits[TEACHER]
    return {"ce": cross_entropy(clean, targets), "soft": soft_target_loss(teacher, clean, 1.0)}


def step_with(teacher, batch):
    """As `step`, without noise, and with what another teacher says."""
    taught = batch | teacher.predictions(batch, "fork")
    total(teacher.model(**taught, branches=(CLEAN,), chunk_losses=teacher_losses)).backward()


def rows_of(*lengths):
    return collate([Example([1 + i % (VOCAB - 1) for i in range(length)], 30) for length in lengths], 0)


def total(losses):
    return sum(losses.values())


class Watch(TorchDispatchMode):
    """Counts the operations that make a GPU's program wait, and the largest logits."""

    def __init__(self, weights=()):
        super().__init__()
        self.waits, self.made, self.logits = Counter(), Counter(), 0
        self.weights = {weight.data_ptr() for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
            self.waits[name] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.made[tuple(tensor.shape)] += 1
            is_logits = isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[-1] == VOCAB
            if is_logits and tensor.data_ptr() not in self.weights:  # nor the head itself, transposed
                self.logits = max(self.logits, tensor.numel())
        return result


@pytest.mark.parametrize("first_noisy", [0, 2, LAYERS - 1])
def test_the_fork_runs_the_prefix_once_and_each_layer_in_one_call(model, first_noisy):
    prefix = first_noisy + 1
    assert rows_and_calls(model, lambda: step(model, first_noisy)) == (4 * (prefix + 3 * (LAYERS - prefix)), LAYERS)
    assert rows_and_calls(model, lambda: step(model, first_noisy, strategy="separate")) == (12 * LAYERS, 3 * LAYERS)
    assert rows_and_calls(model, lambda: step(model)) == (4 * LAYERS, LAYERS)


def test_a_teacher_is_one_more_pass_and_none_where_its_predictions_are_kept(model):
    batch, cached = rows_of(40, 40, 40, 40), BaseModel(model, 5)
    for teacher in (BaseModel(model), MovingAverage(model, 0.9)):
        assert rows_and_calls(model, lambda teacher=teacher: step_with(teacher, batch)) == (8 * LAYERS, 2 * LAYERS)
    batch["teacher"] = cached.top_k(batch, "fork", 5, 1.0)
    assert rows_and_calls(model, lambda: step_with(cached, batch)) == (4 * LAYERS, LAYERS)


def test_a_teachers_logits_are_a_chunk_whatever_the_batch(model):
    batch = rows_of(60, 60, 60, 60)
    with Watch(model.parameters()) as watch:
        step_with(BaseModel(model), batch)
    assert watch.logits == CHUNK * VOCAB
    with Watch(model.parameters()) as watch:
        batch["teacher"] = BaseModel(model, 5).top_k(batch, "fork", 5, 1.0)
        step_with(BaseModel(model, 5), batch)
    assert watch.logits == CHUNK * VOCAB


def test_a_teacher_waits_no_more_than_transformers_does(model):
    batch = rows_of(40, 31, 35, 33)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain["attention_mask"] = torch.ones_like(plain["attention_mask"])
    theirs = waits(lambda: find_decoder(model)(**plain, use_cache=False))
    assert waits(lambda: step_with(BaseModel(model), batch)) == theirs + theirs
    batch["teacher"] = BaseModel(model, 5).top_k(batch, "fork", 5, 1.0)
    assert waits(lambda: step_with(BaseModel(model, 5), batch)) == theirs


def test_a_teacher_costs_a_forward_pass_and_kept_predictions_no_flops(model):
    batch = rows_of(40, 40, 40, 40)
    plain = flops(lambda: total(model(**batch, branches=(CLEAN,), chunk_losses=plain_losses)).backward())
    forward = flops(lambda: BaseModel(model).predictions(batch, "fork"))
    heads = 2 * 64 * VOCAB * (40 + 40 - CHUNK)  # once for each token, and again in backward but for the last chunk
    assert flops(lambda: step_with(BaseModel(model), batch)) == plain + forward + heads
    batch["teacher"] = BaseModel(model, 5).top_k(batch, "fork", 5, 1.0)
    assert flops(lambda: step_with(BaseModel(model, 5), batch)) == plain


def test_measuring_the_snr_is_one_plain_pass_a_batch(model):
    batch = tiny_batch((40, 40, 40, 40))
    assert rows_and_calls(model, lambda: layer_snr(model, batch, 0.1)) == (4 * LAYERS, LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(32, 31), (40, 40, 40, 40), (60,) * 16], ids=len)
def test_the_largest_logits_are_a_chunk_of_three_branches_whatever_the_batch(model, lengths):
    with Watch(model.parameters()) as watch:
        step(model, 2, lengths)
    targets = sum(length - 30 for length in lengths)
    assert watch.logits == 3 * min(CHUNK, targets) * VOCAB


def waits(run):
    with Watch() as watch:
        run()
    return watch.waits


@pytest.mark.parametrize(("strategy", "passes"), [("fork", 1), ("separate", 3)])
@pytest.mark.parametrize("lengths", [(40, 40, 40, 40), (40, 31, 35, 33)], ids=["even", "padded"])
def test_a_step_waits_for_the_device_only_where_transformers_does(model, strategy, passes, lengths):
    """transformers looks once a pass whether there is padding, or whether rows are packed."""
    batch = tiny_batch(lengths)
    if strategy == "fork":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    theirs = waits(lambda: find_decoder(model)(**batch, use_cache=False))
    assert theirs.total() <= 2
    ours = waits(lambda: step(model, 2, lengths, strategy))
    assert ours == Counter({name: passes * count for name, count in theirs.items()})


def test_measuring_the_snr_waits_no_more_than_transformers_does(model):
    batch = tiny_batch((40, 31, 35, 33))
    theirs = waits(lambda: find_decoder(model)(**batch, use_cache=False))
    assert waits(lambda: layer_snr(model, batch, 0.1)) == theirs


def test_without_noise_no_kl_is_formed_and_the_logits_have_one_gradient(model):
    """Plain fine-tuning is the same loop with the same losses: it must not pay for branches that are one."""

    def losses(logits, targets):
        [clean], noisy = logits[CLEAN], logits[NOISY]
        assert len(noisy) == 2 and noisy[0] is clean and noisy[1] is clean
        return noisefit_losses(logits, targets)

    def run(chunk_losses):
        states = torch.ones(1, 40, 64, requires_grad=True)
        with Watch(model.parameters()) as watch:
            sums = model.sum_losses(states, torch.zeros(40, dtype=torch.long), chunk_losses)
            total(sums).backward()
        return sums, watch, states.grad

    plain, watch, gradient = run(plain_losses)
    all_losses, watch_all, gradient_all = run(losses)
    assert all_losses == plain | {"soft": 0, "consistency": 0} and torch.equal(gradient, gradient_all)
    wide = [{s: n for s, n in w.made.items() if s[-1:] == (VOCAB,)} for w in (watch, watch_all)]
    assert wide[0] == wide[1] and watch.logits == CHUNK * VOCAB


def test_the_gradient_of_the_hidden_states_is_joined_once(model):
    """And not added up whole for every chunk, which would be quadratic in the tokens."""
    states = torch.ones(3, 40, 64, requires_grad=True)
    with Watch() as watch:
        total(model.sum_losses(states, torch.zeros(40, dtype=torch.long), noisefit_losses)).backward()
    assert watch.made[3, 40, 64] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("first_noisy", [0, 2, LAYERS - 1])
def test_the_fork_computes_its_floor_and_no_more(model, first_noisy):
    """In FLOPs: the share of the layers up to the first noisy one once, the others and the head three times."""
    plain, forked = flops(lambda: step(model)), flops(lambda: step(model, first_noisy))
    head = flops(lambda: head_alone(model))
    share = (first_noisy + 1) / LAYERS
    # Not quite equal: backward ends at the first layer's adapter, so that layer costs a little less than the others.
    floor = (plain - head) * (share + 3 * (1 - share)) + 3 * head
    assert forked == pytest.approx(floor, rel=0.01)


def test_the_last_chunk_of_the_loss_is_not_computed_twice(model):
    """A forward and a backward product for each of the 40 tokens (the head is frozen), and a second forward one for
    the chunks before the last."""
    product = 2 * 64 * VOCAB  # FLOPs a token
    assert flops(lambda: head_alone(model)) == product * (40 * 2 + (40 - CHUNK))


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def head_alone(model):
    """The head and the loss over 40 tokens of one branch."""
    states = torch.zeros(1, 40, 64, requires_grad=True)
    total(model.sum_losses(states, torch.zeros(40, dtype=torch.long), plain_losses)).backward()
