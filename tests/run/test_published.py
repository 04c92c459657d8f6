"""The published programs: one step of each, written plainly from its formulas, and the loop under its configuration.

The plain step has no fork, no chunks and no gradients in closed form: three passes of the model's own forward for every
micro-batch, in float64, with a hook on each noisy layer, and autograd through all of it. Both sides draw the same noise
and the same dropout.
"""

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import yaml
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from running import ROOT, run
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import train_loop
from noisefit.fork.decoder import find_decoder
from noisefit.inputs.batches import collate, cut_step, epoch_steps
from noisefit.inputs.prompts import make_examples
from noisefit.inputs.tables import read_rows
from noisefit.method.policy import make_noise
from noisefit.run.settings import Settings, parse_arguments

pytestmark = pytest.mark.slow

# --- The published defaults -------------------------------------------------------------------------------------------

BOTH = dict(
    loss_mode="full", hybrid_loss_alpha=0.5, temperature=1.0, loss_on="all", noise_scale="live", branches="separate",
    batch_size=4, gradient_accumulation_steps=4, learning_rate=5e-5, lr_scheduler_type="cosine", warmup_ratio=0.0,
    weight_decay=0.0, max_grad_norm=1.0, seed=42, lora_r=8, lora_alpha=16.0, lora_dropout=0.05,
    target_modules=["q_proj", "v_proj"], long_rows="cut",
)  # fmt: skip
DEFAULTS = {
    "v1": BOTH | dict(
        lambda_consistency=0.1, temperature_on="teacher", teacher_gradient=True, chat_template="chatml",
        noise_policy="snr", noise_std=0.1, num_noise_layers=3, snr_format="Largest", snr_batches=1,
        noise_gradient=True, epochs=1000, max_steps=1000, logging_steps=5,
    ),
    "v2": BOTH | dict(
        lambda_consistency=0.05, temperature_on="both", teacher_gradient=False, chat_template="alpaca",
        noise_policy="auto", auto_calib_batches=2, auto_scale_factors=[0.25, 0.5, 1.0, 1.5, 2.0],
        auto_scale_l2_penalty=0.05, auto_max_ce_delta_ratio=0.02, auto_max_layers=0, auto_depth_bands=3,
        auto_target_kl_fraction=0.75, noise_gradient=False, epochs=3, max_steps=-1, logging_steps=20,
    ),
}  # fmt: skip


def config_of(version):
    return ROOT / "configs" / f"published_{version}.yaml"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_configuration_spells_out_the_published_defaults_and_nothing_else(version):
    """Each of them stands in the file, so that another default of ours never changes what it does."""
    given = yaml.safe_load(config_of(version).read_text())
    assert given.keys() == DEFAULTS[version].keys()
    settings = parse_arguments(["--model=m", "--train_data=t", f"--config={config_of(version)}"])
    assert settings == Settings(model="m", train_data="t", **DEFAULTS[version])


# --- The published programs, plainly ----------------------------------------------------------------------------------


def whole(x):
    return x


def detached(x):
    return x.detach()


def kl(teacher, student):
    """`KL(softmax(teacher) || softmax(student))`, summed over tokens."""
    log_p, log_q = (x - torch.logsumexp(x, -1, keepdim=True) for x in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum()


def first_terms(z, z1, z2, t, teacher):
    """Soft and consistency term of the first program: the temperature is the clean teacher's alone."""
    soft = 0.5 * (kl(teacher(z) / t, z1) + kl(teacher(z) / t, z2))
    return soft, kl(teacher(z2), z1)


def second_terms(z, z1, z2, t, teacher):
    """Those of the second: both sides have it, and the terms are multiplied by its square."""
    soft = 0.5 * (kl(teacher(z) / t, z1 / t) + kl(teacher(z) / t, z2 / t))
    return t**2 * soft, t**2 * kl(teacher(z2) / t, z1 / t)


@dataclass(frozen=True)
class Program:
    """What sets a published program apart, besides its base scales.

    Attributes:
        terms: its soft and consistency term.
        consistency: the weight of the latter.
        teacher: what of a teacher's logits its terms see, for the gradient.
        sized_by: what of the hidden states the size of the noise sees, for the gradient.
        dropout: whether LoRA's is on.
    """

    terms: Callable
    consistency: float
    teacher: Callable
    sized_by: Callable
    dropout: bool = True


PROGRAMS = {
    "v1": Program(first_terms, consistency=0.1, teacher=whole, sized_by=whole),
    "v2": Program(second_terms, consistency=0.05, teacher=detached, sized_by=detached),
}


def lower_median(x):
    return x.sort(dim=-1).values[..., (x.shape[-1] - 1) // 2].unsqueeze(-1)


def sigma(h, base, real):
    """The size of the noise at each element of `h`, `[B, L, H]`; `real`, `[B, L]`, is false at padding."""
    variance = ((h - h.mean(-1, keepdim=True)) ** 2).sum(-1) / (h.shape[-1] - 1)
    f = (variance / (variance[real].mean() + 1e-6)).exp().clamp(max=5)
    distance = (h - lower_median(h)).abs()
    mad = torch.maximum(lower_median(distance), 1e-6 * (h**2).sum(-1, keepdim=True).sqrt())
    w = torch.exp(-0.1 * distance / (mad + 1e-6))
    return base * mad * w * f.unsqueeze(-1)


def unit_noise(shape, layer, draw):
    """What a layer draws the `draw`-th time: first for noisy branch 1 of the first micro-batch, then for branch 2."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * layer + draw), dtype=torch.float64)


def plain_step(program, model, batches, base_scales, temperature, random_state):
    """The losses of one step, each a mean over its supervised tokens, and the gradients.

    `base_scales` has of each noisy layer a function of its output and of which tokens are real.
    """
    model = copy.deepcopy(model).train(program.dropout)
    torch.set_rng_state(random_state)
    layers = model.base_model.model.model.layers
    count = sum(int(batch["attention_mask"][:, 1:].sum()) for batch in batches)  # all text but a row's first token
    sums = Counter()
    for i, batch in enumerate(batches):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        real = mask == 1

        def logits_of(branch, i=i, ids=ids, mask=mask, real=real):
            def adding(layer):
                def add(module, args, h):
                    size = sigma(program.sized_by(h), base_scales[layer](h, real), real)
                    return h + unit_noise(h.shape, layer, 2 * i + branch - 1) * size

                return add

            hooks = [layers[j].register_forward_hook(adding(j)) for j in base_scales if branch]
            logits = model(input_ids=ids, attention_mask=mask).logits
            for hook in hooks:
                hook.remove()
            return logits[:, :-1][real[:, 1:]]  # a position predicts the token behind it

        z, z1, z2 = logits_of(0), logits_of(1), logits_of(2)
        targets = ids[:, 1:][real[:, 1:]]
        ce = (torch.logsumexp(z, -1) - z[torch.arange(len(targets)), targets]).sum()
        soft, consistency = program.terms(z, z1, z2, temperature, program.teacher)
        loss = 0.5 * ce + 0.5 * soft + program.consistency * consistency
        (loss / count).backward()
        for name, value in dict(loss=loss, ce_loss=ce, soft_loss=soft, consistency_loss=consistency).items():
            sums[name] += value.item() / count
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(sums), gradients


# --- The loop, watched ------------------------------------------------------------------------------------------------


class Watch:
    """The loop in float64, from an adapter that is not zero, with noise that is known; and what it does.

    Attributes:
        start: the adapter's weights before the step, by name.
        random_state: torch's, before the first pass of training.
        gradients: of the step, before they are clipped.
    """

    def __init__(self, monkeypatch):
        self.random_state, self.gradients = None, {}
        self.load, self.clip = train_loop.load_model, Accelerator.clip_grad_norm_
        monkeypatch.setattr(train_loop, "load_model", self.load_model)
        monkeypatch.setattr(train_loop, "make_noise", self.make_noise)
        monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: self.clip_grad_norm_(*args))

    def load_model(self, *args):
        model = self.load(*args).double()
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        for i, (name, weight) in enumerate(self.trained.items()):
            if "lora_B" in name:  # zeros, and so is every gradient of lora_A
                weight.data = 0.1 * unit_noise(weight.shape, 99, i)
        self.start = {name: weight.detach().clone() for name, weight in self.trained.items()}
        find_decoder(model).register_forward_pre_hook(self.before_pass)
        return model

    def before_pass(self, decoder, args):
        if decoder.training and self.random_state is None:
            self.random_state = torch.get_rng_state()

    @staticmethod
    def make_noise(*args):
        noise = make_noise(*args)
        for layer, of_layer in noise.items():
            draws = itertools.count()  # of each layer: branches 1 and 2 by turns, however the passes are run
            of_layer.draw = lambda scale, layer=layer, n=draws: unit_noise(scale.shape, layer, next(n)) * scale
        return noise

    def clip_grad_norm_(self, *args):
        self.gradients = {name: weight.grad.clone() for name, weight in self.trained.items()}
        return self.clip(*args)


def norm_in_float64(module, x):
    """In place of Llama's own, which rounds to float32: the two sides then differ by rounding in float64 alone."""
    return module.weight * x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


@pytest.fixture(scope="module")
def longer_llama(tmp_path_factory):
    """With places for the prompts of both programs, a token a byte."""
    return tiny_folder(tmp_path_factory.mktemp("published") / "llama", max_position_embeddings=512)


def plain_model(folder, start):
    """The model with the adapter of both programs, as it stood before the step."""
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).double()
    adapter = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert adapter.keys() == start.keys()
    for name, weight in adapter.items():
        weight.data = start[name]
    return model


def micro_batches(data, output, question):
    """Those of the step, under the configurations' own 4 rows a micro-batch and 4 of these a step."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    examples, _ = make_examples(tokenizer, read_rows(data)[0], 512, loss_on="all")
    assert all(question in tokenizer.decode(example.input_ids) for example in examples)
    [rows] = epoch_steps(examples, 16, 42, epoch=0)
    batches = [collate(part, tokenizer.pad_token_id) for part in cut_step(rows, 4)]
    assert len(batches) == 2 and all((batch["attention_mask"] == 0).any() for batch in batches)
    return batches


@pytest.fixture
def both_sides(longer_llama, questions, tmp_path, monkeypatch):
    """`(version, flags) -> line of metrics, gradients, plain`, with `plain(program) -> losses, gradients`."""

    def run_both(version, flags):
        monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
        questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:7]))
        watch, out = Watch(monkeypatch), tmp_path / "out"
        [line] = run(longer_llama, questions, out, config=config_of(version), max_steps=1, **flags)
        if version == "v1":
            selected = json.loads((out / "layer_snr.json").read_text())["selected"]
            strength = flags["noise_std"] ** 2
            base_scales = dict.fromkeys(selected, lambda h, real: strength * h[real].std().item())
            assert len(base_scales) == 3
        else:
            policy = json.loads((out / "noise_policy.json").read_text())
            chosen = zip(policy["selected"], policy["scales"], strict=True)
            base_scales = {layer: lambda h, real, scale=scale: scale for layer, scale in chosen}
            assert base_scales
        question = {"v1": "<|im_start|>user\nWhat is", "v2": "### Instruction:\nWhat is"}[version]
        batches = micro_batches(questions, out, question)
        model, t = plain_model(longer_llama, watch.start), flags.get("temperature", 1)

        def plain(program):
            return plain_step(program, model, batches, base_scales, t, watch.random_state)

        return line, watch.gradients, plain

    return run_both


def distance(found, expected):
    """Between two dictionaries of gradients, as a share of the second's norm."""
    flat_found, flat_expected = (torch.cat([of[name].flatten() for name in expected]) for of in (found, expected))
    return ((flat_found - flat_expected).norm() / flat_expected.norm()).item()


def assert_is(program, line, found, plain):
    losses, gradients = plain(program)
    for name, value in losses.items():
        assert line[name] == pytest.approx(value, rel=1e-6), name  # the loop adds up its loss in float32
        assert value > 0.01, name  # there is noise to speak of
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert distance(found, {name: gradient}) < 1e-9, name


# The published noise of v1 is too weak to see: it gets more.
STRONG = {"v1": dict(noise_std=0.5), "v2": {}}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_step_is_that_of_the_published_program(version, both_sides):
    """As configured: three passes, each with dropout of its own."""
    assert_is(PROGRAMS[version], *both_sides(version, STRONG[version]))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_fork_without_dropout_takes_the_same_step(version, both_sides):
    flags = STRONG[version] | dict(branches="fork", lora_dropout=0, temperature=2)
    assert_is(replace(PROGRAMS[version], dropout=False), *both_sides(version, flags))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_each_thing_that_sets_a_published_program_apart_shows(version, both_sides):
    """With any one of them as it is in the other program, or without dropout, the step is another one by far."""
    program, other = PROGRAMS[version], PROGRAMS["v2" if version == "v1" else "v1"]
    line, found, plain = both_sides(version, STRONG[version] | dict(temperature=2))
    assert_is(program, line, found, plain)
    for name in ("terms", "consistency", "teacher", "sized_by"):
        _, gradients = plain(replace(program, **{name: getattr(other, name)}))
        assert distance(found, gradients) > 0.01, name
    _, gradients = plain(replace(program, dropout=False))
    assert distance(found, gradients) > 0.01
