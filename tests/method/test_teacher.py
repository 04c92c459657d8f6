"""Teachers other than the clean branch: the untouched base model, and a plain loop's moving average."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import fixed_noise, rows_and_calls, supervise, tiny_batch, tiny_model
from torch import nn

from noisefit.base.errors import InputError
from noisefit.fork.branches import CLEAN, NOISY, TEACHER, BranchedModel
from noisefit.method.losses import cross_entropy, soft_target_loss
from noisefit.method.teacher import BaseModel, MovingAverage, Teacher, make_teacher
from noisefit.run.method_settings import LossSettings

NOISE = {1: fixed_noise(1), 2: fixed_noise(2)}
T = 1.5


def adapted(model_type="llama", dropout=0.0, chunk=6, **lora):
    """A model with an adapter that is not zero, and an untouched copy of the model without one."""
    base = tiny_model(model_type)
    lora = dict(target_modules="all-linear") | lora
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, **lora))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return BranchedModel(model.double(), chunk), base.eval()


def teacher_of(name, branched, **settings):
    return make_teacher(LossSettings(teacher=name, teacher_decay=0.9, **settings), branched)


def chunk_losses(logits, targets):
    [teacher], clean = logits[TEACHER] or logits[CLEAN], logits[CLEAN][0]
    pulled = logits[NOISY] or logits[CLEAN]
    soft = sum(soft_target_loss(teacher, z, T) for z in pulled) / len(pulled)
    return {"ce": 0.3 * cross_entropy(clean, targets), "soft": 0.7 * soft}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def expected(branched, teacher, batch, branches):
    """The sum and every gradient from the formulas, over all logits of passes of the models' own forward."""
    model, inputs = branched.model, {name: batch[name] for name in ("input_ids", "attention_mask")}
    at = batch["target_positions"]
    layers = model.base_model.model.model.layers

    def log_q(number, temperature=1.0):
        hooks = [
            layers[i].register_forward_hook(lambda m, a, output, i=i: output + NOISE[i](output, number))
            for i in NOISE
            if number
        ]
        logits = model(**inputs).logits.flatten(0, 1)[at]
        for hook in hooks:
            hook.remove()
        return (logits / temperature).log_softmax(-1)

    with torch.no_grad():
        log_p = (teacher(**inputs).logits.flatten(0, 1)[at] / T).log_softmax(-1)
    numbers = [1, 2][: branches.count(NOISY)] or [0]
    kl = sum((log_p.exp() * (log_p - log_q(number, T))).sum() for number in numbers) / len(numbers)
    ce = -log_q(0).gather(1, batch["target_tokens"][:, None]).sum()
    model.zero_grad()
    (0.3 * ce + 0.7 * T**2 * kl).backward()
    return {"ce": 0.3 * ce.item(), "soft": 0.7 * T**2 * kl.item()}, copy.deepcopy(gradients(branched))


@pytest.mark.parametrize("strategy", ["fork", "separate", "full_logits"])
@pytest.mark.parametrize("branches", [(CLEAN, NOISY, NOISY), (CLEAN,)], ids=len)
@pytest.mark.parametrize("name", ["base", "ema"])
def test_losses_and_every_gradient_are_those_of_a_second_copy_of_the_model(name, branches, strategy):
    branched, base = adapted()
    batch, teacher = supervise(tiny_batch()), teacher_of(name, branched)
    other = base if name == "base" else copy.deepcopy(branched.model).eval()
    if name == "ema":
        for weight in branched.parameters():
            if weight.requires_grad:
                weight.data += 0.1
    sums, wanted = expected(branched, other, batch, branches)
    branched.zero_grad()
    noise = NOISE if NOISY in branches else {}
    taught = batch | teacher.predictions(batch, strategy)
    found = branched(**taught, branches=branches, noise=noise, strategy=strategy, chunk_losses=chunk_losses)
    sum(found.values()).backward()
    assert {key: value.item() for key, value in found.items()} == pytest.approx(sums, rel=1e-6)
    assert wanted and all(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    for key, gradient in gradients(branched).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["base", "ema"])
def test_the_pass_has_no_dropout_no_gradient_and_leaves_the_model_as_it_was(name, checkpointing):
    branched, base = adapted(dropout=0.5)
    if checkpointing:
        branched.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, teacher = supervise(tiny_batch()), teacher_of(name, branched)
    before = {key: (weight.clone(), weight.requires_grad) for key, weight in branched.named_parameters()}
    state = torch.get_rng_state()
    found = teacher.predictions(batch, "fork")["teacher"]
    assert torch.equal(torch.get_rng_state(), state) and not found.requires_grad
    assert found.shape == (len(batch["target_tokens"]), 32)
    other = base if name == "base" else copy.deepcopy(branched.model).eval().base_model.model
    truth = other.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(found, truth.flatten(0, 1)[batch["target_positions"]], rtol=1e-6, atol=1e-6)
    assert branched.training and all(module.training for module in branched.modules())
    after = {key: (weight, weight.requires_grad) for key, weight in branched.named_parameters()}
    for key, (weight, is_trained) in before.items():
        assert torch.equal(after[key][0], weight) and after[key][1] == is_trained == ("lora" in key)
    again = branched(**batch | {"teacher": found}, noise=NOISE, chunk_losses=chunk_losses)
    sum(again.values()).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(branched).values())


@pytest.mark.parametrize("name", ["base", "ema"])
def test_a_teacher_costs_one_pass_of_the_batch(name):
    branched, _ = adapted()
    batch, teacher = supervise(tiny_batch()), teacher_of(name, branched)
    assert rows_and_calls(branched, lambda: teacher.predictions(batch, "fork")) == (3 * 4, 4)
    itself = teacher_of("self", branched)
    assert type(itself) is Teacher
    assert rows_and_calls(branched, lambda: itself.predictions(batch, "fork")) == (0, 0)
    assert itself.predictions(batch, "fork") == {} == itself.state_dict()


def test_the_average_is_that_of_a_plain_loop():
    branched, _ = adapted()
    teacher = MovingAverage(branched, 0.8)
    trained = {name: weight for name, weight in branched.named_parameters() if weight.requires_grad}
    plain = {name: weight.detach().clone() for name, weight in trained.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for name, weight in trained.items():
            weight.data += torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            plain[name] = 0.8 * plain[name] + 0.2 * weight.detach()
        teacher.follow()
    now = {name: weight.detach().clone() for name, weight in trained.items()}
    with teacher.in_place():
        for name, weight in branched.named_parameters():
            if name in plain:
                torch.testing.assert_close(weight.detach(), plain[name], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(weight, now[name]) for name, weight in trained.items())
    with pytest.raises(KeyError), teacher.in_place():
        raise KeyError  # the model is itself again whatever happens
    assert all(torch.equal(weight, now[name]) for name, weight in trained.items())

    again = MovingAverage(branched, 0.8)
    again.load_state_dict(teacher.state_dict())
    assert again.state_dict().keys() == plain.keys()
    assert all(torch.equal(again.averages[name], average) for name, average in teacher.averages.items())


def test_tensors_of_another_model_are_refused():
    branched, _ = adapted()
    teacher = MovingAverage(branched, 0.8)
    whole = teacher.state_dict()
    name = min(whole)
    for change, message in [
        ({name: whole[name][:1]}, r"of shape \(1, .*\) is not of this model or finite"),
        ({name: whole[name] * torch.nan}, "is not of this model or finite"),
        ({"other": whole[name]}, "the teacher's other is in one of the two only"),
    ]:
        with pytest.raises(ValueError, match=message):
            teacher.load_state_dict(whole | change)
    with pytest.raises(ValueError, match="in one of the two only"):
        teacher.load_state_dict({})


def test_an_adapter_on_the_head_is_refused():
    for name in ("base", "ema"):
        branched, _ = adapted(target_modules=["lm_head"])
        with pytest.raises(InputError, match="--target_modules or --lora trains the model's head"):
            teacher_of(name, branched)


def test_an_adapter_on_the_embedding_is_none_of_the_base_model():
    """Also where the head has the embedding's weights."""
    branched, base = adapted("gemma2", target_modules=["embed_tokens"])
    batch = supervise(tiny_batch())
    found = BaseModel(branched).predictions(batch, "full_logits")["teacher"]
    truth = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, truth.flatten(0, 1)[batch["target_positions"]], rtol=1e-6, atol=1e-6)


def test_a_teacher_is_no_branch():
    branched, _ = adapted()
    batch = supervise(tiny_batch())
    with pytest.raises(ValueError, match=r"a branch is <Branch\.TEACHER"):
        branched(**batch, branches=(CLEAN, TEACHER), chunk_losses=chunk_losses)
