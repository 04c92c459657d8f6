"""Every objective's branches: as few as it needs, told apart as it says, the same forked and separate."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CONFIGS, fixed_noise, rows_and_calls, supervise, tiny_batch, tiny_model

from noisefit.fork import hooks
from noisefit.fork.branches import CLEAN, DROPOUT, NOISY, Branch, BranchedModel
from noisefit.fork.hooks import EMBEDDING
from noisefit.method.noise import EmbeddingNoise
from noisefit.method.objectives import LOSSES, OBJECTIVES, Objective, one
from noisefit.run.method_settings import LossSettings
from noisefit.run.settings import Settings

LAYERS, FIRST = 6, 2
SETS = [(CLEAN, NOISY), (NOISY, CLEAN), (NOISY,), (NOISY, NOISY), (CLEAN, NOISY, NOISY, NOISY)]
EXACT = dict(rtol=1e-5, atol=1e-5)


def logits_of(model, batch, branches, strategy="fork", **how):
    """The logits of all branches at the supervised positions, `[branches, N, V]`; those without noise first."""
    found = []

    def collect(logits, targets):
        assert {kind: len(of_kind) for kind, of_kind in logits.items()} == {
            kind: branches.count(kind) for kind in Branch
        }
        found.append(torch.stack(noisy_last(logits)))
        return {}

    model(**batch, branches=branches, strategy=strategy, chunk_losses=collect, **how)
    return torch.cat(found, dim=1)


def noisy_last(logits):
    return [*logits[CLEAN], *logits[DROPOUT], *logits[NOISY]]


def names(branches):
    return "-".join(kind.value for kind in branches)


def test_the_weights_are_those_of_the_settings():
    settings = SimpleNamespace(hybrid_loss_alpha=0.3, lambda_consistency=0.7, rdrop_alpha=2.0)
    weights = {mode: objective.weights(settings) for mode, objective in OBJECTIVES.items()}
    expected = {
        "full": {"ce": 0.3, "soft": 0.7, "consistency": 0.7},
        "ce_kl": {"ce": 0.3, "soft": 0.7},
        "kl_only": {"soft": 1},
        "ce_teacher": {"ce": 0.3, "soft": 0.7},
        "ce_noisy": {"ce": 1},
        "consistency_only": {"consistency": 1},
        "basefit": {"ce": 1},
        "neftune": {"ce": 1},
        "rdrop": {"ce": 1, "rdrop": 2.0},
    }
    assert {mode: weights[mode] for mode in expected} == expected
    assert all(set(objective.weights(settings)) <= set(LOSSES) for objective in OBJECTIVES.values())
    assert set(LOSSES) >= {"ce", "soft", "consistency", "rdrop"}
    defaults = Settings(model="m", train_data="d.csv")
    assert (defaults.loss_mode, defaults.neftune_alpha, defaults.rdrop_alpha, defaults.rdrop_dropout) == (
        "full", 5, 1, 0.05,
    )  # fmt: skip


@pytest.mark.parametrize("mode", OBJECTIVES)
def test_a_loss_without_a_weight_is_said_with_those_that_have_one(mode):
    weights = OBJECTIVES[mode].weights(LossSettings())
    known = ", ".join(weights)
    with pytest.raises(LookupError, match=f"the loss 'entropy' has no weight; .* has weights for {re.escape(known)}"):
        weights["entropy"]
    assert weights.unused(OBJECTIVES[mode].losses) is None
    assert f"forms no loss called {next(iter(weights))}" in str(weights.unused({}))
    assert "entropy" not in weights and dict(weights) == {name: weights[name] for name in OBJECTIVES[mode].losses}


class Recording:
    """Settings that know which of them were read."""

    def __init__(self):
        self.read = set()

    def __getattr__(self, name):
        self.read.add(name)
        return 0.5


@pytest.mark.parametrize("mode", OBJECTIVES)
def test_the_settings_that_an_objective_says_it_reads_are_those_that_change_it(mode):
    """What the weights are made of is seen as it is read; the rest follows from its losses, branches and noise."""
    objective, settings = OBJECTIVES[mode], Recording()
    weights = objective.weights(settings)
    others = {
        "temperature": bool({"soft", "consistency", "rdrop"} & set(weights)),
        "temperature_on": bool({"soft", "consistency"} & set(weights)),
        # Where the clean branch is not the teacher, none flows into the one of the soft term.
        "teacher_gradient": bool({"soft", "consistency"} & set(weights)) and mode != "ce_teacher",
        "teacher": "soft" in weights,
        "teacher_decay": "soft" in weights,
        "cache_teacher": "soft" in weights,
        "rdrop_dropout": DROPOUT in objective.branches,
        "neftune_alpha": objective.noise == "embedding",
    }
    assert not settings.read & set(others)
    expected = settings.read | {name for name, is_read in others.items() if is_read}
    assert sorted(objective.reads) == sorted(expected)
    assert set(objective.reads) <= set(vars(LossSettings())), "settings of no such name"
    assert objective.noise in (("layers", "embedding") if NOISY in objective.branches else ("none",))


def test_every_setting_of_the_loss_is_read_by_some_objective():
    read = {name for objective in OBJECTIVES.values() for name in objective.reads}
    assert read == set(vars(LossSettings())) - {"loss_mode", "loss_chunk_size"}


@pytest.mark.parametrize(
    ("mode", "tails"),
    [
        ("full", 3),
        ("ce_kl", 2),
        ("kl_only", 2),
        ("consistency_only", 2),
        ("ce_noisy", 1),
        ("basefit", 1),
        ("ce_teacher", 1),
        ("neftune", 1),
    ],
)
def test_each_runs_the_fewest_branches_and_the_prefix_once(mode, tails):
    model, batch, objective = tiny_model(num_hidden_layers=LAYERS), supervise(tiny_batch()), OBJECTIVES[mode]
    branched = BranchedModel(model, 100, dropout=0.05)
    layers = {"layers": (FIRST, 4), "embedding": (EMBEDDING,), "none": ()}[objective.noise]
    noise = {layer: fixed_noise(layer) for layer in layers}
    counted = rows_and_calls(model, lambda: logits_of(branched, batch, objective.branches, noise=noise))
    prefix = FIRST + 1
    assert counted == (3 * (prefix + tails * (LAYERS - prefix)), LAYERS)


def test_rdrop_runs_two_whole_branches_in_one_pass():
    model, batch = tiny_model(num_hidden_layers=LAYERS), supervise(tiny_batch())
    branched = BranchedModel(model, 100, dropout=0.05)
    counted = rows_and_calls(model, lambda: logits_of(branched, batch, OBJECTIVES["rdrop"].branches))
    assert counted == (2 * 3 * LAYERS, LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("where", [(1, 3), (EMBEDDING,), (EMBEDDING, 2)], ids=str)
@pytest.mark.parametrize("branches", SETS, ids=names)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_any_set_of_branches_is_its_definition_from_separate_passes(model_type, branches, where):
    model, batch = tiny_model(model_type), supervise(tiny_batch())
    noise = {layer: fixed_noise(layer) for layer in where}
    how = dict(branches=branches, noise=noise)
    found = {}
    for strategy in ("fork", "separate", "full_logits"):
        model.zero_grad()
        branched = BranchedModel(model, 7)
        logits = logits_of(branched, batch, strategy=strategy, **how)
        weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

        def weigh(logits, targets, weight=weight, start=[0]):  # noqa: B006
            chunk = weight[:, start[0] : start[0] + len(targets)]
            start[0] += len(targets)
            return {"weighed": (torch.stack(noisy_last(logits)) * chunk).sum()}

        BranchedModel(model, 1000)(**batch, **how, strategy=strategy, chunk_losses=weigh)["weighed"].backward()
        found[strategy] = logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    # By hand: hooks of this test alone, one pass a branch, the model's own logits.
    numbers = [0] * (len(branches) - branches.count(NOISY)) + list(range(1, branches.count(NOISY) + 1))
    for row, number in enumerate(numbers):
        layers = model.model.layers if hasattr(model, "model") else model.transformer.h
        modules = {layer: model.get_input_embeddings() if layer == EMBEDDING else layers[layer] for layer in where}
        handles = [
            module.register_forward_hook(lambda m, a, output, i=layer, b=number: output + noise[i](output, b))
            for layer, module in modules.items()
            if number
        ]
        own = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        for handle in handles:
            handle.remove()
        for strategy, (logits, _) in found.items():
            torch.testing.assert_close(logits[row], own[batch["target_positions"]], **EXACT, msg=strategy)
    for strategy in ("fork", "separate"):
        for name, gradient in found["full_logits"][1].items():
            torch.testing.assert_close(found[strategy][1][name], gradient, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("strategy", ["fork", "separate"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_two_dropout_branches_differ_though_the_model_has_no_dropout(model_type, strategy):
    if (model_type, strategy) == ("bloom", "fork"):
        strategy = "separate"  # which is what the start-up check chooses
    model, batch = tiny_model(model_type, torch.float32), supervise(tiny_batch())
    branched = BranchedModel(model, 100, dropout=0.05)
    first, second = logits_of(branched, batch, (DROPOUT, DROPOUT), strategy)
    assert (first - second).abs().max() > 1e-3
    model.eval()
    first, second = logits_of(branched, batch, (DROPOUT, DROPOUT), strategy)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_a_block_may_take_its_hidden_states_by_name():
    """As those of some architectures do."""
    model, block = tiny_model(), torch.nn.Linear(32, 32).double()
    found = hooks.layer_hooks(model)
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    with found.applying(hooks.Pass({}, (0,), 2, dropout=(0.5,))):
        torch.manual_seed(0)
        by_name = found._after(1, block, (), {"hidden_states": hidden}, hidden + 1)
        torch.manual_seed(0)
        by_place = found._after(1, block, (hidden,), {}, hidden + 1)
    assert torch.equal(by_name, by_place) and set((by_name - hidden).round().flatten().tolist()) == {0, 2}


def test_a_clean_branch_beside_one_with_dropout_is_clean():
    model, batch = tiny_model(), supervise(tiny_batch())
    branched = BranchedModel(model, 100, dropout=0.3)
    [clean] = logits_of(branched, batch, (CLEAN,))
    both = logits_of(branched, batch, (CLEAN, DROPOUT))
    torch.testing.assert_close(both[0], clean)
    assert (both[1] - clean).abs().max() > 0.1


@pytest.mark.parametrize("strategy", ["fork", "separate"])
def test_rdrops_masks_are_independent_and_what_they_do_is_their_definition(strategy, monkeypatch):
    share, masks = 0.3, []
    dropout = torch.nn.functional.dropout

    def record(values, p, training):
        assert p == share and training
        result = dropout(values, p, training)
        masks.append((result != 0).double())
        torch.testing.assert_close(result, values * masks[-1] / (1 - share))
        return result

    monkeypatch.setattr(hooks.F, "dropout", record)
    model, batch = tiny_model(), supervise(tiny_batch())
    both = logits_of(BranchedModel(model, 100, dropout=share), batch, (DROPOUT, DROPOUT), strategy)
    assert len(masks) == 2 * 4
    by_branch = [masks[::2], masks[1::2]] if strategy == "fork" else [masks[:4], masks[4:]]
    flat = [torch.stack(of_branch).flatten(1) for of_branch in by_branch]  # [layers, elements]
    count = flat[0].numel()
    for kept in flat:
        assert kept.mean().item() == pytest.approx(1 - share, abs=5 * (share * (1 - share) / count) ** 0.5)
    everything = torch.cat(flat) - (1 - share)  # 8 masks: no two of them go together
    correlation = everything @ everything.T / everything.shape[1] / (share * (1 - share))
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    assert off_diagonal.abs().max() < 6 / everything.shape[1] ** 0.5
    assert not torch.equal(by_branch[0][0][0], by_branch[0][0][1])  # nor do two rows share one
    # The same masks by hand, in passes of their own.
    for row, of_branch in enumerate(by_branch):
        handles = [
            layer.register_forward_hook(lambda m, a, out, k=kept: a[0] + (out - a[0]) * k / (1 - share))
            for layer, kept in zip(model.model.layers, of_branch, strict=True)
        ]
        own = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(both[row], own[batch["target_positions"]], **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_drops_the_same_elements_again(checkpointing):
    found = []
    for enabled in (False, True):
        model, batch = tiny_model(), supervise(tiny_batch())
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        branched = BranchedModel(model, 100, dropout=0.3)
        sums = branched(
            **batch,
            branches=(DROPOUT, DROPOUT),
            chunk_losses=lambda logits, targets: {"first": sum(logits[DROPOUT])[:, 0].sum()},
        )
        sums["first"].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neftunes_noise_has_the_published_range_for_each_rows_own_length(dtype):
    lengths, width, alpha = (400, 100, 7), 64, 5.0
    mask = torch.zeros(3, 400, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    hidden = torch.randn(3, 400, width).to(dtype)
    torch.manual_seed(0)
    source = EmbeddingNoise(alpha)
    scale = source.scale(hidden, mask)
    noise = source.draw(scale)
    assert noise.dtype == torch.float32 and noise.shape == hidden.shape
    expected = []
    for row, length in enumerate(lengths):
        limit, drawn = alpha / (length * width) ** 0.5, noise[row, :length].double()
        assert 0.97 * limit < drawn.abs().max() <= limit * 1.005
        assert drawn.var().item() == pytest.approx(limit**2 / 3, rel=0.15) and abs(drawn.mean()) < 0.1 * limit
        assert not noise[row, length:].any()
        expected.append(limit / 2 * length)
    assert source.mean_size(scale, mask).item() == pytest.approx(sum(expected) / sum(lengths), rel=0.01)
    assert not torch.equal(source.draw(scale), noise)  # each call draws afresh
    alone = source.draw(source.scale(hidden[2:, :7], mask[2:, :7]))
    assert alone.abs().max() <= alpha / (7 * width) ** 0.5 * 1.005


@pytest.mark.parametrize(
    ("branches", "losses", "noise", "said"),
    [
        ((), {"ce": one}, "layers", "at least one branch"),
        ((CLEAN,), {}, "layers", "one loss"),
        ((CLEAN, NOISY), {"ce": one}, "layer", "noise is in 'layer', expected one of layers, embedding"),
        ((CLEAN, NOISY), {"ce": one}, "none", "noise is in 'none'"),
        (("clean",), {"ce": one}, "layers", "a branch is 'clean'"),
    ],
)
def test_an_objective_that_could_not_be_is_refused(branches, losses, noise, said):
    with pytest.raises(ValueError, match=said):
        Objective(branches, losses, noise=noise)


def test_without_a_noisy_branch_there_is_no_noise():
    assert Objective((DROPOUT, DROPOUT), {"rdrop": one}).noise == Objective((CLEAN,), {"ce": one}).noise == "none"
