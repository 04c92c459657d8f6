"""The fork equals three separate passes, and the chunked head equals all logits at once: values and gradients."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, fixed_noise, supervise, tiny_batch, tiny_model
from torch.utils.checkpoint import checkpoint

from noisefit.fork.branches import CLEAN, NOISY, BranchedModel, branch_hidden_states, run_branches
from noisefit.fork.decoder import logits_of
from noisefit.method.losses import consistency_loss, cross_entropy, soft_target_loss
from noisefit.method.noise import TokenScaledNoise

REQUIRED = ["llama", "qwen2", "mistral", "gemma2", "gpt2"]
# The experts of the last two know no float64.
FORKS = [name for name in CONFIGS if name not in ("bloom", "mixtral", "glm4_moe")]
NOISE = {1: fixed_noise(1), 3: fixed_noise(3)}

# float64 throughout, but several architectures form their norms in float32 inside.
EXACT = dict(rtol=1e-5, atol=1e-5)


WEIGHTS = {"ce": 0.5, "soft": 0.3, "consistency": 0.2}


def three_losses(logits, targets):
    [clean], (noisy_1, noisy_2) = logits[CLEAN], logits[NOISY]
    soft = soft_target_loss(clean, noisy_1, 2.0) + soft_target_loss(clean, noisy_2, 2.0)
    return {
        "ce": cross_entropy(clean, targets),
        "soft": soft / 2,
        "consistency": consistency_loss(noisy_1, noisy_2, 2.0),
    }


def total(losses, weights=None):
    return sum((weights or {}).get(name, 1.0) * value for name, value in losses.items())


def gradients(model, value):
    model.zero_grad()
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def enable_checkpointing(model, use_reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # which the reentrant kind needs


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("model_type", FORKS)
def test_fork_equals_separate_passes(model_type, checkpointing):
    model, batch = tiny_model(model_type), tiny_batch()
    if checkpointing:
        enable_checkpointing(model)
    results = {s: branch_hidden_states(model, **batch, noise=NOISE, strategy=s) for s in ("fork", "separate")}
    assert results["fork"].shape[:3] == (3, 3, 11)
    torch.testing.assert_close(results["fork"], results["separate"], **EXACT)
    clean, noisy_1, noisy_2 = results["fork"]
    assert not torch.allclose(clean, noisy_1, atol=0.01) and not torch.allclose(noisy_1, noisy_2, atol=0.01)

    # Backward after both forward passes: each must recompute its own pass and not whichever came last.
    weight = torch.randn(results["fork"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {s: gradients(model, (states * weight).sum()) for s, states in results.items()}
    for name, gradient in found["separate"].items():
        torch.testing.assert_close(found["fork"][name], gradient, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("strategy", ["fork", "separate"])
def test_checkpointing_changes_no_gradient_also_with_drawn_noise(strategy, use_reentrant):
    def drawn(hidden, branch):
        return 0.3 * torch.randn_like(hidden)

    model, batch = tiny_model(), tiny_batch()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
        torch.manual_seed(7)
        states = branch_hidden_states(model, **batch, noise={0: drawn, 2: drawn}, strategy=strategy)
        found.append(gradients(model, (states**2).sum()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def hidden_states_with(model, batch, noise, strategy):
    """As `branch_hidden_states`, for noise that is told of the mask."""

    def run(copies):
        ids, mask = (batch[name].repeat(copies, 1) for name in ("input_ids", "attention_mask"))
        return model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    return run_branches(model, len(batch["input_ids"]), noise, strategy, run, mask=batch["attention_mask"])


def checkpoint_whole_blocks(model):
    """As transformers did up to 5.17 and some later: the block's `__call__` is checkpointed, hooks and all."""
    for layer in model.model.layers:
        parent = type(layer)

        def call(self, *args, parent=parent, **kwargs):
            function = functools.partial(super(parent, self).__call__, **kwargs)
            return self._gradient_checkpointing_func(function, *args)

        layer.__class__ = type(f"Old{parent.__name__}", (parent,), {"__call__": call})
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


@pytest.mark.parametrize("strategy", ["fork", "separate"])
def test_blocks_that_are_checkpointed_with_their_hooks_recompute_the_pass_and_the_noise_they_had(strategy):
    batch, found, states = tiny_batch(), [], []
    for old_style in (False, True):
        model = tiny_model()
        if old_style:
            checkpoint_whole_blocks(model)
        torch.manual_seed(7)
        noise = {layer: TokenScaledNoise(2.0) for layer in (1, 2)}
        result = hidden_states_with(model, batch, noise, strategy)
        branch_hidden_states(model, **batch, noise={0: fixed_noise(0)}, strategy="fork")  # another pass in between
        states.append(result)
        found.append(gradients(model, (result**2).sum()))
    assert torch.equal(states[0], states[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", REQUIRED)
def test_both_attentions_and_a_single_row(model_type, attention):
    if (model_type, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma2: its attention logits are soft-capped")
    model = tiny_model(model_type, attn_implementation=attention)
    for batch in (tiny_batch(), tiny_batch((9,)), tiny_batch((9, 9, 9, 9))):
        fork, separate = (branch_hidden_states(model, **batch, noise=NOISE, strategy=s) for s in ("fork", "separate"))
        torch.testing.assert_close(fork, separate, **EXACT)


@pytest.mark.parametrize("layers", [[0], [3], [0, 1, 2, 3], []])
def test_any_choice_of_layers(layers):
    model, batch = tiny_model(), tiny_batch()
    noise = {i: fixed_noise(i) for i in layers}
    fork, separate = (branch_hidden_states(model, **batch, noise=noise, strategy=s) for s in ("fork", "separate"))
    torch.testing.assert_close(fork, separate, **EXACT)
    torch.testing.assert_close(fork[0], model.model(**batch).last_hidden_state, **EXACT)


def test_every_branch_sees_its_own_rows_and_the_clean_one_none():
    calls = []

    def record(layer):
        def draw(hidden, branch):
            calls.append((layer, branch, tuple(hidden.shape)))
            return torch.zeros_like(hidden)

        return draw

    branch_hidden_states(tiny_model(), **tiny_batch(), noise={1: record(1), 2: record(2)}, strategy="fork")
    assert calls == [(layer, branch, (3, 11, 32)) for layer in (1, 2) for branch in (1, 2)]


def test_a_fork_runs_the_prefix_once():
    model, rows = tiny_model(), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    branch_hidden_states(model, **tiny_batch(), noise={2: fixed_noise(2)}, strategy="fork")
    assert rows == [3, 3, 3, 9]


def test_the_model_is_its_plain_self_afterwards():
    model, batch = tiny_model().eval(), tiny_batch()
    before = model(**batch).logits
    branch_hidden_states(model, **batch, noise=NOISE, strategy="fork")
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(RuntimeError, match="in the noise"):
        branch_hidden_states(model, **batch, noise={0: failing_noise}, strategy="fork")
    assert torch.equal(model(**batch).logits, before)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, before)


def failing_noise(hidden, branch):
    raise RuntimeError("in the noise")


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="strategy"):
        branch_hidden_states(tiny_model(), **tiny_batch(), noise=NOISE, strategy="forked")
    with pytest.raises(ValueError, match=r"\[4\]"):
        branch_hidden_states(tiny_model(), **tiny_batch(), noise={4: fixed_noise(4)}, strategy="fork")
    branched, batch = BranchedModel(tiny_model(), 7), supervise(tiny_batch())
    with pytest.raises(ValueError, match=r"\[4\]"):
        branched(**batch, noise={4: fixed_noise(4)}, chunk_losses=three_losses)


def test_a_strategy_that_is_none_is_refused_by_the_whole_forward_pass_too():
    with pytest.raises(ValueError, match="strategy is 'forked'"):
        BranchedModel(tiny_model(), 7)(
            **supervise(tiny_batch()), noise=NOISE, strategy="forked", chunk_losses=three_losses
        )


@pytest.mark.parametrize("strategy", ["fork", "separate", "full_logits"])
@pytest.mark.parametrize("branches", [("attention", "nosiy", "noisy"), ("clean", "noisy", "noisy"), (CLEAN, "noisy")])
@pytest.mark.parametrize("noise", [NOISE, {}], ids=["noise", "no noise"])
def test_branches_of_no_known_kind_are_refused(branches, strategy, noise):
    """Also text that reads as one is none: what was misspelled used to run as a clean branch."""
    first = next(kind for kind in branches if kind is not CLEAN)
    with pytest.raises(ValueError, match=f"a branch is {first!r}, expected one of Branch.CLEAN, Branch.NOISY"):
        BranchedModel(tiny_model(), 7)(
            **supervise(tiny_batch()), branches=branches, noise=noise, strategy=strategy, chunk_losses=three_losses
        )


def test_branches_of_no_known_kind_are_refused_too_where_the_clean_one_is_known():
    model, batch = tiny_model(), supervise(tiny_batch())
    branched = BranchedModel(model, 7)
    with pytest.raises(ValueError, match="a branch is 'clean'"):
        branched(**batch, branches=("clean", NOISY, NOISY), noise=NOISE, chunk_losses=three_losses,
                 clean_states=branched(batch["input_ids"], batch["attention_mask"]))  # fmt: skip


@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits_of_hidden_states_are_the_models_own(model_type):
    model, batch = tiny_model(model_type, torch.float32), tiny_batch()
    own = model(**batch).logits
    states = branch_hidden_states(model, **batch, noise={}, strategy="separate")[0]
    torch.testing.assert_close(logits_of(model, states), own)
    torch.testing.assert_close(logits_of(model, states[1, 3:5]), own[1, 3:5])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("model_type", REQUIRED)
def test_chunked_head_equals_the_models_own_logits_in_three_passes(model_type, chunk):
    batch, noise = supervise(tiny_batch()), NOISE
    model = tiny_model(model_type)
    expected_model = BranchedModel(model, 1000)
    expected = expected_model(**batch, noise=noise, strategy="full_logits", chunk_losses=three_losses)
    assert list(expected) == list(WEIGHTS) and all(value.shape == () for value in expected.values())
    expected_gradients = gradients(expected_model, total(expected, WEIGHTS))
    for strategy in ("fork", "separate"):
        branched = BranchedModel(model, chunk)
        sums = branched(**batch, noise=noise, strategy=strategy, chunk_losses=three_losses)
        torch.testing.assert_close(sums, expected, **EXACT)
        found = gradients(branched, total(sums, WEIGHTS))
        assert found.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_no_more_logits_than_a_chunk_are_formed_at_a_time():
    """The rest of the division first: the last chunk is not computed again in backward, so it is a whole one."""
    shapes = []

    def watch(logits, targets):
        shapes.append((tuple(logits[CLEAN][0].shape), len(targets)))
        return three_losses(logits, targets)

    batch = supervise(tiny_batch())  # 8 + 4 + 6 supervised tokens
    sums = BranchedModel(tiny_model(), 7)(**batch, noise=NOISE, chunk_losses=watch)
    chunks = [((4, 97), 4), ((7, 97), 7), ((7, 97), 7)]
    assert shapes == chunks
    shapes.clear()
    total(sums).backward()
    assert shapes == chunks[1::-1]


def test_what_only_some_chunks_have_is_summed_over_those():
    """A loss of some tokens alone: what another chunk does not have is 0 there, and not forgotten."""
    batch, parts = supervise(tiny_batch()), []

    def some(logits, targets):
        parts.append(logits[CLEAN][0].sum())
        return {"all": parts[-1]} | ({"first": parts[-1]} if len(parts) == 1 else {})

    with torch.no_grad():
        sums = BranchedModel(tiny_model(), 7)(**batch, noise=NOISE, chunk_losses=some)
    torch.testing.assert_close(sums, {"all": sum(parts), "first": parts[0]})


@pytest.mark.parametrize("strategy", ["fork", "separate", "full_logits"])
def test_a_batch_without_supervised_tokens_gives_every_parameter_a_zero_gradient(strategy):
    batch = supervise(tiny_batch(), first=11)
    assert len(batch["target_tokens"]) == 0
    branched = BranchedModel(tiny_model(), 7)
    sums = branched(**batch, noise=NOISE, strategy=strategy, chunk_losses=three_losses)
    assert sums == dict.fromkeys(WEIGHTS, 0)
    found = gradients(branched, total(sums))
    assert found.keys() == {name for name, _ in branched.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_adapters_get_the_same_gradient(checkpointing):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    if checkpointing:
        enable_checkpointing(model)
    branched, batch = BranchedModel(model, 5), supervise(tiny_batch())
    found = [
        gradients(branched, total(branched(**batch, noise=NOISE, strategy=strategy, chunk_losses=three_losses)))
        for strategy in ("fork", "full_logits")
    ]
    assert any("lm_head" in name for name in found[0]) and any("q_proj" in name for name in found[0])
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_without_losses_it_is_the_clean_pass():
    model, batch = tiny_model(), tiny_batch()
    assert torch.equal(BranchedModel(model, 7)(**batch), model.model(**batch).last_hidden_state)
