"""Policy `auto`: what it measures against full passes one at a time, what it chooses against the rules, its cost."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from running import start, wait
from tiny_models import LaplaceNoise, rows_and_calls, supervise, tiny_batch, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from noisefit.base.errors import InputError
from noisefit.fork.branches import BranchedModel
from noisefit.fork.decoder import find_decoder_layers
from noisefit.fork.exactness import choose_strategy
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.method import calibration
from noisefit.method.calibration import Responses, Rules, choose, measure, record
from noisefit.method.noise import TokenScaledNoise, noise_scale
from noisefit.run.noise_policy import rules_of
from noisefit.run.processes import finish, start_accelerator
from noisefit.run.settings import Settings

FACTORS = [0.25, 0.5, 1.0, 1.5, 2.0]


def rules_with(**settings):
    """The rules of a run with these settings."""
    return rules_of(Settings(model="m", train_data="d.csv", **settings))


def pattern(hidden):
    """In place of a normal draw: the same for every batch of this shape."""
    return torch.sin(torch.arange(hidden.numel(), dtype=torch.float64) * 0.7).view_as(hidden).to(hidden.dtype)


@pytest.fixture
def given_draw(monkeypatch):
    monkeypatch.setattr(calibration.torch, "randn_like", pattern)


def other_pattern(scale):
    return torch.cos(torch.arange(scale.numel(), dtype=torch.float64) * 1.3).sign().view_as(scale).to(scale.dtype)


class OtherNoise(TokenScaledNoise):
    """Of another distribution: to either side, always as far as the scale."""

    mean_of_unit = 1.0

    def draw(self, scale):
        return other_pattern(scale) * scale


def full_passes(model, batches, layers, factors, unit=pattern):
    """The plain way: a full pass for each layer, scale and batch; float64 sums, token by token."""
    model.eval()
    tokens = sum(len(batch["target_tokens"]) for batch in batches)
    kl, ce = torch.zeros(2, len(layers), len(factors), dtype=torch.float64)
    clean_ce = 0.0

    def predictions(batch):
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        logits = logits.flatten(0, 1)[batch["target_positions"]]
        return logits - torch.logsumexp(logits, -1, keepdim=True)

    for batch in batches:
        clean, at = predictions(batch), range(len(batch["target_tokens"]))
        clean_ce -= clean[at, batch["target_tokens"]].sum().item() / tokens
        for row, layer in enumerate(layers):
            for column, factor in enumerate(factors):

                def add(module, args, output, factor=factor, mask=batch["attention_mask"]):
                    hidden = output if isinstance(output, torch.Tensor) else output[0]
                    noisy = hidden + unit(hidden) * noise_scale(hidden, factor / math.sqrt(hidden.shape[-1]), mask)
                    return noisy if isinstance(output, torch.Tensor) else (noisy, *output[1:])

                handle = find_decoder_layers(model)[layer].register_forward_hook(add)
                noisy = predictions(batch)
                handle.remove()
                there, back = clean.exp() * (clean - noisy), noisy.exp() * (noisy - clean)
                kl[row, column] += 0.5 * (there.sum() + back.sum()) / tokens
                ce[row, column] -= noisy[at, batch["target_tokens"]].sum() / tokens
    return kl, (ce - clean_ce).clamp(min=0), clean_ce


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [2, 3]], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mistral", "bloom"])
def test_it_measures_what_full_passes_would(model_type, layers, given_draw):
    model = tiny_model(model_type)
    batches = [supervise(tiny_batch()), supervise(tiny_batch((9, 12), seed=1), first=2)]
    branched = BranchedModel(model, 7)
    strategy, _ = choose_strategy(branched, batches[0], layers[:1], "auto")
    assert strategy == ("separate" if model_type == "bloom" else "fork")
    found = measure(branched, batches, layers, FACTORS, strategy)
    assert branched.training
    kl, change, clean_ce = full_passes(model, batches, layers, FACTORS)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.ce_change, change, rtol=1e-4, atol=1e-6)
    assert found.clean_ce == pytest.approx(clean_ce, rel=1e-6)
    assert (found.tokens, found.hidden_size, found.layers) == (18 + 17, 32, layers)
    assert found.scales == pytest.approx([factor / 32**0.5 for factor in FACTORS])
    assert (kl > 1e-6).all() and (change.any() or layers == [2, 3])  # so that there was something to see


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_it_measures_any_distribution(model_type):
    model, batch = tiny_model(model_type), supervise(tiny_batch())
    branched = BranchedModel(model, 7)
    strategy, _ = choose_strategy(branched, batch, [0], "auto")
    found = measure(branched, [batch], range(4), FACTORS, strategy, kind=OtherNoise)
    kl, change, _ = full_passes(model, [batch], range(4), FACTORS, other_pattern)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.ce_change, change, rtol=1e-4, atol=1e-6)
    usual, _, _ = full_passes(model, [batch], range(4), FACTORS)
    assert ((kl - usual).abs() > 0.05 * usual).any()  # so that there was something to tell apart


def test_a_block_whose_output_is_known_is_not_called_and_so_not_gathered_by_fsdp():
    """FSDP's hooks gather a block's weights at every call of it, whatever its `forward` does."""
    model, batch = tiny_model(), supervise(tiny_batch())
    branched, calls = BranchedModel(model, 7), [0] * 4
    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda block, args, index=index: calls.__setitem__(index, calls[index] + 1))
    measure(branched, [batch], range(4), FACTORS, "fork")
    # On a slice, to see whether outputs can be used again, and on the batch: a clean pass, and what is behind a layer.
    assert calls == [2 * (1 + index) for index in range(4)]


def test_all_scales_share_one_draw_of_any_distribution_too():
    found = measure(BranchedModel(tiny_model(), 100), [supervise(tiny_batch())], range(4), [0.001, 0.002], "fork",
                    kind=LaplaceNoise)  # fmt: skip
    assert (found.kl[:, 1] / found.kl[:, 0]).tolist() == pytest.approx([4] * 4, rel=0.02)


def test_it_is_measured_without_dropout_and_the_model_is_left_as_it_was():
    model, batch = tiny_model("gpt2"), supervise(tiny_batch())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    branched, found = BranchedModel(model, 100), []
    for training in (True, False):
        branched.train(training)
        torch.manual_seed(0)
        found.append(measure(branched, [batch], range(4), FACTORS, "fork"))
        assert branched.training == training
    assert pop_noise_sizes(branched) == {}  # it is no part of what the metrics say of a training
    assert torch.equal(found[0].kl, found[1].kl) and found[0].clean_ce == found[1].clean_ce


def test_padding_beyond_a_sliding_window_leaves_it_finite():
    """Attention that looks back five tokens sees padding alone there, which transformers' mask makes NaN of."""
    model, batch = tiny_model("gemma2"), supervise(tiny_batch((6, 12)), first=2)
    assert measure(BranchedModel(model, 100), [batch], range(4), FACTORS, "fork").kl.isfinite().all()


def computed(model, run):
    """Rows, summed over the layers, and calls of the blocks that compute: their MLP runs."""
    rows = calls = 0

    def count(module, args, output):
        nonlocal rows, calls
        rows, calls = rows + len(output), calls + 1

    handles = [layer.mlp.register_forward_hook(count) for layer in find_decoder_layers(model)]
    run()
    for handle in handles:
        handle.remove()
    return rows, calls


@pytest.mark.parametrize("layers", [4, 12])
def test_it_computes_the_tails_alone_in_a_call_for_each_block(layers):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=layers)
    branched, batches, rows = BranchedModel(model, 100), [supervise(tiny_batch(seed=i)) for i in (0, 1)], 3
    found = computed(model, lambda: measure(branched, batches, range(layers), FACTORS, "fork"))
    passes = len(batches) * layers * len(FACTORS)
    assert found[0] <= 0.6 * passes * rows * layers and found[1] <= passes * layers / 5
    # To be exact: the tails, a clean pass a batch, and once the same for two rows to see that blocks can be left out.
    tails = layers * (layers - 1) // 2
    assert found[0] == rows * len(batches) * (len(FACTORS) * tails + layers) + 2 * (2 * tails + layers)
    assert found[1] == (len(batches) + 1) * (tails + layers)
    late = computed(model, lambda: measure(branched, batches, range(layers // 2, layers), FACTORS, "fork"))
    assert late[0] < 0.45 * found[0]


@pytest.mark.parametrize(("giver", "taker"), [(0, 2), (0, 1), (2, 3)])
def test_where_blocks_pass_on_more_than_hidden_states_they_are_computed(giver, taker, given_draw):
    """As models do that keep something of one layer for a later one: left out, it would be missing."""
    model, kept = tiny_model(), {}
    model.model.register_forward_pre_hook(lambda *args: kept.clear())
    give, take = model.model.layers[giver], model.model.layers[taker]
    give.mlp.register_forward_hook(lambda module, args, output: kept.update(value=output))
    take.mlp.register_forward_hook(lambda module, args, output: output + kept["value"].mean(dim=(1, 2), keepdim=True))
    batches = [supervise(tiny_batch((9, 9, 9)))]
    found = {}

    def run():
        found["it"] = measure(BranchedModel(model, 100), batches, range(4), FACTORS, "fork")

    assert (
        rows_and_calls(model, run)[1] >= 6 * 4 * 4
    )  # a pass of all the blocks for each layer, scale and the clean one
    kl, change, _ = full_passes(model, batches, range(4), FACTORS)
    torch.testing.assert_close(found["it"].kl, kl, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found["it"].ce_change, change, rtol=1e-4, atol=1e-6)


def test_all_scales_share_one_draw_and_each_batch_has_its_own():
    model, batch = tiny_model(), supervise(tiny_batch())
    torch.manual_seed(0)
    found = measure(BranchedModel(model, 100), [batch], range(4), [0.001, 0.002], "fork")
    assert (found.kl[:, 1] / found.kl[:, 0]).tolist() == pytest.approx([4] * 4, rel=0.02)  # quadratic, without chance
    other = measure(BranchedModel(model, 100), [batch], range(4), [0.001, 0.002], "fork")
    assert not torch.equal(found.kl, other.kl)


@pytest.mark.parametrize("broken", ["overflow", "no target"])
def test_what_cannot_be_ranked_is_one_line(broken):
    model, batch = tiny_model(dtype=torch.float32), supervise(tiny_batch(), first=3 if broken == "overflow" else 11)
    if broken == "overflow":
        model.lm_head.weight.data[5] = torch.inf
    with pytest.raises(InputError, match="not finite" if broken == "overflow" else "no supervised token"):
        measure(BranchedModel(model, 100), [batch], range(4), FACTORS, "fork")


# --- What is chosen ---------------------------------------------------------------------------------------------------


def rules(kl, change, clean_ce, factors, num_layers, penalty=0.05, most=0.02, fraction=0.75, limit=None):
    """Section by section, one number at a time: candidates with their best score, and the scale for a set of them."""
    layers, scales = range(len(kl)), range(len(factors))
    r = [[change[i][j] / clean_ce for j in scales] for i in layers]
    score = [[kl[i][j] / (1 + r[i][j]) / (1 + penalty * math.log2(factors[j]) ** 2) for j in scales] for i in layers]
    valid = [[j for j in scales if r[i][j] <= most] or list(scales) for i in layers]
    best = [max(valid[i], key=lambda j, i=i: score[i][j]) for i in layers]
    top = [score[i][best[i]] for i in layers]
    median = statistics.median_low(top)
    border = median + statistics.median_low(abs(value - median) for value in top)
    candidates = [i for i in layers if top[i] >= border] or [top.index(max(top))]

    def scale_of(i, chosen):
        target = fraction * statistics.median_low(kl[k][best[k]] for k in chosen)
        reaching = [j for j in valid[i] if kl[i][j] >= target]
        return (reaching[0] if reaching else max(valid[i], key=lambda j: kl[i][j])), bool(reaching)

    return candidates, top, scale_of, limit or math.ceil(math.sqrt(num_layers))


def random_responses(seed, layers):
    draw = random.Random(seed)
    kl = [sorted(draw.lognormvariate(-4, 1) * factor**2 for factor in FACTORS) for _ in range(layers)]
    levels = [draw.choice([0.0, 0.03, 0.6]) for _ in range(layers)]
    change = [[level * factor**2 * draw.uniform(0.5, 1.5) for factor in FACTORS] for level in levels]
    scales = [factor / 8 for factor in FACTORS]
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (kl, change))
    return kl, change, Responses(list(range(layers)), FACTORS, scales, *tensors, 2.0, 100, 64)


@pytest.mark.parametrize("layers", [1, 2, 4, 9, 12, 16, 32])
def test_the_choice_follows_the_rules(layers):
    seen_no_valid = seen_unreached = 0
    for seed in range(60):
        kl, change, found = random_responses(1000 * layers + seed, layers)
        choice = choose(found, layers, Rules())
        candidates, top, scale_of, limit = rules(kl, change, 2.0, FACTORS, layers)
        assert len(choice.layers) == min(limit, len(candidates)) and set(choice.layers) <= set(candidates)
        assert choice.layers == sorted(choice.layers)
        # Spread over bands: no band has a layer more than its share while a better one of another band is left out.
        share, bands = math.ceil(limit / 3), [i * 3 // layers for i in range(layers)]
        for left in set(candidates) - set(choice.layers):
            of_band = [i for i in choice.layers if bands[i] == bands[left]]
            assert all(top[i] >= top[left] for i in of_band)
            if len(of_band) < share:
                fullest = max(sum(bands[i] == band for i in choice.layers) for band in range(3))
                assert fullest <= len(of_band) + 1
        for layer, scale in zip(choice.layers, choice.scales, strict=True):
            index, reached = scale_of(layer, choice.layers)
            assert scale == FACTORS[index] / 8
            seen_unreached += not reached
        seen_no_valid += any(all(c / 2 > 0.02 for c in change[i]) for i in choice.layers)
    assert layers < 9 or (seen_no_valid and seen_unreached)


def responses(kl, change=None, layers=None):
    kl = torch.tensor(kl, dtype=torch.float64)
    change = torch.zeros_like(kl) if change is None else torch.tensor(change, dtype=torch.float64)
    layers = list(range(len(kl))) if layers is None else layers
    return Responses(layers, [1.0, 2.0], [0.1, 0.2], kl, change, 2.0, 100, 64)


def test_what_stands_on_a_border_is_within():
    """A rise of the cross-entropy by just the share that is allowed, and a KL that just reaches its target."""
    wanted = rules_with(auto_max_ce_delta_ratio=0.25, auto_scale_l2_penalty=0, auto_max_layers=1)
    choice = choose(responses([[3.0, 4.0]], [[0.0, 0.5]]), 1, wanted)
    assert choice.allowed.all() and choice.scales == [0.1]  # 3 = 0.75 * 4


def test_a_band_has_no_more_than_its_share_until_the_best_of_the_rest_are_taken():
    """Twelve layers in three bands; the best four are in the first of them, none in the second."""
    best = [9.0, 8, 7, 6, 0, 0, 0, 0, 0, 4, 5, 4]
    few = {limit: calibration._spread([0, 1, 2, 3, 10], best, 3, limit) for limit in (1, 2, 3, 4, 5)}
    assert few == {1: [0], 2: [0, 10], 3: [0, 1, 10], 4: [0, 1, 2, 10], 5: [0, 1, 2, 3, 10]}
    # A share of 2 of 6: then what is left is taken by score, wherever it is.
    many = {limit: calibration._spread([0, 1, 2, 3, 9, 10, 11], best, 3, limit) for limit in (3, 4, 6)}
    assert many == {3: [0, 1, 10], 4: [0, 1, 9, 10], 6: [0, 1, 2, 3, 9, 10]}


def test_the_number_of_layers_is_the_root_of_all_not_of_those_that_were_tried():
    found = responses([[1.0, 0]] * 5, layers=[11, 12, 13, 14, 15])
    assert len(choose(found, 16, Rules()).layers) == 4


def test_its_numbers_are_settings():
    found = random_responses(5, 16)[-1]
    assert len(choose(found, 16, rules_with(auto_max_layers=1)).layers) == 1
    assert rules_with() == Rules()
    numbers = dict(auto_scale_l2_penalty=0.1, auto_max_ce_delta_ratio=0.2, auto_depth_bands=4, auto_max_layers=5,
                   auto_target_kl_fraction=0.6)  # fmt: skip
    assert rules_with(**numbers) == Rules(penalty=0.1, max_ce_ratio=0.2, depth_bands=4, max_layers=5, target_kl=0.6)
    by_default = choose(found, 16, Rules())
    for other in (
        dict(auto_target_kl_fraction=0.05),
        dict(auto_max_ce_delta_ratio=1e6, auto_scale_l2_penalty=1e6),
        dict(auto_depth_bands=1, auto_max_layers=2),
    ):
        assert choose(found, 16, rules_with(**other)) != by_default, other


def test_a_model_that_noise_does_not_move_still_gets_a_layer():
    zero = torch.zeros(4, 5, dtype=torch.float64)
    choice = choose(Responses([0, 1, 2, 3], FACTORS, FACTORS, zero, zero, 2.0, 10, 64), 4, Rules())
    assert len(choice.layers) == len(choice.scales) == 1


def test_the_record_has_the_whole_grid():
    kl, change, found = random_responses(3, 6)
    choice = choose(found, 6, Rules())
    content = json.loads(json.dumps(record(found, choice)))
    assert content["tokens"] == 100 and content["clean_ce"] == 2.0 and content["hidden_size"] == 64
    assert [entry["layer"] for entry in content["layers"]] == list(range(6))
    for i, entry in enumerate(content["layers"]):
        assert [cell["kl"] for cell in entry["grid"]] == kl[i]
        assert [cell["ce_change"] for cell in entry["grid"]] == change[i]
        assert [cell["factor"] for cell in entry["grid"]] == FACTORS
        assert entry["best_score"] == max(cell["score"] for cell in entry["grid"] if cell["allowed"])
        assert (entry["scale"] in choice.scales) == entry["selected"] == (i in choice.layers)


# --- Two processes ----------------------------------------------------------------------------------------------------


class CountGathers(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.c10d._allgather_base_.default
        return function(*args, **kwargs or {})


def measure_together(argv: list[str]) -> None:
    """First the model whole on each process, then in shards, of which it is counted how often blocks are gathered."""
    accelerator = start_accelerator()
    rank = accelerator.process_index
    calibration.torch.randn_like = pattern
    batch = supervise(tiny_batch((9, 6) if rank == 0 else (12,), seed=rank), first=2)
    found = measure(BranchedModel(tiny_model(), 7), [batch], range(4), FACTORS, "fork")
    sharded = BranchedModel(tiny_model(), 7)
    for layer in find_decoder_layers(sharded):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    with CountGathers() as gathers:
        again = measure(sharded, [batch], range(4), FACTORS, "fork")
    torch.testing.assert_close((again.kl, again.ce_change), (found.kl, found.ce_change), rtol=1e-9, atol=1e-12)
    output, both = argv[-1].partition("=")[2], (found.kl.tolist(), found.ce_change.tolist())
    Path(f"{output}.{rank}").write_text(json.dumps([*both, found.tokens, gathers.count]))
    finish(accelerator)


@pytest.mark.slow
def test_all_processes_measure_the_same_over_the_batches_of_all(llama_folder, tmp_path, given_draw):
    out = tmp_path / "out"
    assert wait(start(llama_folder, tmp_path, out, 2, target=measure_together)) == [0, 0], Path(
        f"{out}.log"
    ).read_text()
    first, second = (Path(f"{out}.{rank}").read_text() for rank in (0, 1))
    assert first == second
    batches = [supervise(tiny_batch(lengths, seed=rank), first=2) for rank, lengths in enumerate([(9, 6), (12,)])]
    kl, change, _ = full_passes(tiny_model(), batches, range(4), FACTORS)
    found_kl, found_change, tokens, gathers = json.loads(first)
    torch.testing.assert_close(torch.tensor(found_kl, dtype=torch.float64), kl, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(torch.tensor(found_change, dtype=torch.float64), change, rtol=1e-4, atol=1e-6)
    assert tokens == 7 + 4 + 10
    # For the check and for the batch: each of 4 blocks in the clean pass, and those after each layer; the root once.
    assert gathers == 2 * (4 + (3 + 2 + 1)) + 1
