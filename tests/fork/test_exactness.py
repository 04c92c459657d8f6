"""The start-up check takes the cheapest way that is exact for a model, and says why where it is not the fork."""

import pytest
import torch
from accelerate import Accelerator
from tiny_models import CONFIGS, tiny_batch, tiny_model
from transformers import LlamaForCausalLM

from noisefit.base.errors import InputError
from noisefit.fork.branches import BranchedModel
from noisefit.fork.exactness import choose_strategy
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.inputs.prompts import Example
from noisefit.run.evaluation import evaluate


class LogitsFromTokens(LlamaForCausalLM):
    """A model whose logits depend on the tokens too, so that hidden states alone do not give them."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits * (1 + input_ids.unsqueeze(-1) % 3)
        return output


def check(model, requested="auto", layers=(1, 3)):
    branched = BranchedModel(model, 7)
    strategy, reason = choose_strategy(branched, tiny_batch(), list(layers), requested)
    assert branched.training and pop_noise_sizes(branched) == {}
    return strategy, reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in ("bloom", "mixtral")])
def test_the_fork_is_exact_for_most_architectures(model_type, dtype):
    assert check(tiny_model(model_type, dtype)) == ("fork", None)


def test_bloom_falls_back_to_separate_passes_and_says_so():
    strategy, reason = check(tiny_model("bloom", torch.float32))
    assert strategy == "separate"
    assert "forked" in reason and "separate passes" in reason and "\n" not in reason
    with pytest.raises(InputError, match="--branches fork"):
        check(tiny_model("bloom", torch.float32), "fork")


def test_a_model_whose_logits_need_more_than_hidden_states_keeps_its_own():
    model = LogitsFromTokens(tiny_model("llama", torch.float32).config).train()
    strategy, reason = check(model)
    assert strategy == "full_logits" and "all logits in memory" in reason
    assert check(model, "separate")[0] == "full_logits"
    # Evaluation goes the same way.
    example = Example(list(range(5, 25)), 4)
    ids = torch.tensor([example.input_ids])
    expected = torch.nn.functional.cross_entropy(model.eval()(ids).logits[0, 3:-1], ids[0, 4:])
    found = evaluate(Accelerator(cpu=True), BranchedModel(model, 7), strategy, [example], 2, 0)
    assert found["eval_ce_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("lengths", [(1,), (2,), (2, 2), (3,), (4, 2)], ids=str)
def test_rows_of_a_few_tokens_can_be_checked(lengths):
    batch = tiny_batch(lengths)
    before = batch["attention_mask"].clone()
    branched = BranchedModel(tiny_model("llama", torch.float32), 7)
    assert choose_strategy(branched, batch, [1], "auto") == ("fork", None)
    assert torch.equal(batch["attention_mask"], before)


def test_a_model_that_looks_to_the_right_is_told_of_padding():
    """The fork's attention has no mask, which is right only where tokens look to the left."""

    def look_both_ways(module, args, kwargs):
        module.is_causal = False
        if kwargs.get("attention_mask") is not None:  # keep what it says of padding
            kwargs["attention_mask"] = kwargs["attention_mask"][:, :, -1:, :].expand_as(kwargs["attention_mask"])
        return args, kwargs

    model = tiny_model("llama", torch.float32)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(look_both_ways, with_kwargs=True)
    strategy, reason = choose_strategy(BranchedModel(model, 7), tiny_batch((11, 11)), [1, 3], "auto")
    assert strategy == "separate" and "differ" in reason


def test_a_subtly_wrong_fork_is_seen():
    model = tiny_model("llama", torch.float32)

    def mix_rows(module, args, output):  # what no single batch shows: rows that see each other
        return output + 0.01 * output.roll(1, dims=0)

    model.model.layers[3].register_forward_hook(mix_rows)
    strategy, reason = check(model)
    assert strategy == "separate" and "differ" in reason


def test_what_is_asked_for_is_done():
    assert check(tiny_model("llama", torch.float32), "separate") == ("separate", None)
    assert check(tiny_model("llama", torch.float32), "fork") == ("fork", None)
    assert check(tiny_model("llama", torch.float32), layers=()) == ("fork", None)


class OfFewerBits(torch.nn.Linear):
    """As bitsandbytes' layers of 4 bits: what comes and goes is float32, and what is computed is bfloat16."""

    compute_dtype = torch.bfloat16

    def forward(self, x):
        low = torch.nn.functional.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16))
        # On a GPU the sums' order depends on the rows; a CPU's kernels for so small a model hardly do that.
        return (low * (1 + 2**-8 * (len(x) > 3))).to(x.dtype)


def test_layers_that_compute_in_fewer_bits_than_the_logits_have_decide_on_the_tolerance(monkeypatch):
    model = tiny_model("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj = OfFewerBits(48, 32, bias=False)
    assert model(**tiny_batch()).logits.dtype == torch.float32
    assert check(model) == ("fork", None)
    monkeypatch.setattr(OfFewerBits, "compute_dtype", None)  # as before its first pass: nothing is known
    assert check(model)[0] == "separate"
