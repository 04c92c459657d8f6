"""The benchmarks of noise run, keep what they have made, and measure what they say."""

import json
import shutil
import sys
from collections import Counter

import pytest
import torch
from running import ROOT, call

from noisefit.base.errors import InputError
from noisefit.fork import hooks
from noisefit.method.noise import TokenScaledNoise

sys.path.insert(0, str(ROOT / "benchmarks"))

import low_precision
import noise_scale
import shared_dropout
import world_runs
from ways import NOISE_STD, SIZES, Steps, other_noise

pytestmark = pytest.mark.slow

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def world(llama_folder, tmp_path_factory):
    """As small as a world can be: sums, and a random model of 4 layers."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(llama_folder, folder / "model")
    for name, numbers in (("train", range(16)), ("test", range(16, 20))):
        rows = [f"What is {i} plus {i}?,It is {i + i}.\n" for i in numbers]
        (folder / f"{name}.csv").write_text("prompt,response\n" + "".join(rows))
    return folder


@pytest.fixture
def never(monkeypatch):
    """A call that trains from now on is an error."""

    def stop():
        def fail(*arguments):
            raise AssertionError("it trains again")

        monkeypatch.setattr(world_runs.train_loop, "train", fail)

    return stop


def rows_of(text, width):
    """The lines of a table by their first column, of this width."""
    return {line[:width].strip(): line[width:].split() for line in text.splitlines()}


# --- The runs that they share ---------------------------------------------------------------------------------------


def test_a_finished_run_is_read_again_and_another_one_is_not_taken_for_it(world, tmp_path, never, capsys):
    made = world_runs.world_run(tmp_path / "run", world, {"epochs": 1, "noise_std": 0.3})
    assert made.lines[-1]["step"] == 1 and len(made.layers) == 3 and made.wrong == 1
    never()
    assert world_runs.world_run(tmp_path / "run", world, {"epochs": 1, "noise_std": 0.3}) == made
    with pytest.raises(InputError, match="its run had other flags; remove it"):
        world_runs.world_run(tmp_path / "run", world, {"epochs": 1, "noise_std": 0.2})


def test_a_run_that_was_killed_before_its_end_goes_on(world, tmp_path, capsys):
    flags = {"epochs": 4, "save_steps": 1, "logging_steps": 1, "save_total_limit": 0}
    made = world_runs.world_run(tmp_path / "run", world, flags)
    (tmp_path / "run/run.json").unlink()
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run/adapter" / name)
    capsys.readouterr()
    again = world_runs.world_run(tmp_path / "run", world, flags)
    assert "checkpoint-2, after step 2" in capsys.readouterr().err
    assert [line["ce_loss"] for line in again.lines] == [line["ce_loss"] for line in made.lines]
    assert json.loads((tmp_path / "run/run.json").read_text())["wrong"] == again.wrong


@pytest.mark.parametrize("main", [noise_scale.main, shared_dropout.main])
@pytest.mark.parametrize("flags", [["--world", "/nowhere"], ["--seeds", "0"], ["--epochs", "0"]])
def test_bad_flags_are_one_line(main, flags, world, tmp_path):
    done = call(main, "--world", world, "--output", tmp_path / "out", *flags)
    assert done.returncode == 2 and f"error: {flags[0]}: " in done.stderr
    assert not (tmp_path / "out").exists()


# --- Noise that runs away ---------------------------------------------------------------------------------------------


def test_noise_scale_draws_every_kind_and_makes_each_run_once(world, tmp_path, never):
    picture = tmp_path / "noise.png"
    flags = ["--world", world, "--output", tmp_path / "out", "--seeds", "1", "--epochs", "1", "--picture", picture]
    done = call(noise_scale.main, *flags)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout, 26)
    lines = {path.parent.parent.name: json.loads(path.read_text().splitlines()[0])
             for path in tmp_path.glob("out/*/adapter/metrics.jsonl")}  # fmt: skip
    assert len(lines) == len(noise_scale.KINDS)
    for name, folder in (("live", "live-0"), ("frozen", "frozen-0"), ("relative", "relative-0")):
        *_, start, end, grown, _, ce, wrong = rows[name]
        line = lines[folder]
        assert float(start) == float(end) == pytest.approx(line["noise_to_signal"], rel=0.01) and float(grown) == 1
        assert float(ce) == pytest.approx(line["ce_loss"], abs=1e-3) and wrong == "100.0%"
    assert len(rows[noise_scale.PLAIN]) == 2  # no noise, no layers of it
    assert picture.read_bytes().startswith(b"\x89PNG")
    for flags_of_kind in noise_scale.KINDS.values():
        asked = flags_of_kind | {"target_modules": ["all-linear"], "seed": 0}
        configurations = (json.loads(path.read_text()) for path in tmp_path.glob("out/*/adapter/noisefit_config.json"))
        assert any(asked.items() <= configuration.items() for configuration in configurations)
    picture.unlink()
    never()
    again = call(noise_scale.main, *flags)
    assert again.returncode == 0 and again.stdout == done.stdout and picture.is_file()


def test_growth_is_that_of_each_run_and_the_middle_is_told_with_its_ends(capsys):
    def run(*ratios):
        lines = [{"noise_to_signal": ratio, "hidden_rms": [0, 2 * ratio**2], "ce_loss": 0.5} for ratio in ratios]
        return world_runs.WorldRun(None, lines, [0, 1], 0.25)

    noise_scale.print_table({"live": [run(0.1, 0.7, 0.2), run(0.2, 0.2), run(0.3, 3.0)]})
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("live")]
    assert "0.2 (0.1 to 0.3)" in line and "0.2 (0.2 to 3)" in line and "2 (1 to 10)" in line and "4 (1 to 100)" in line
    assert "0.500 (0.500 to 0.500)" in line and "25.0% (25.0% to 25.0%)" in line


# --- Dropout that the branches share ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A trained adapter's model, in training mode, and a batch."""
    run = world_runs.world_run(tmp_path_factory.mktemp("runs") / "run", world, {"epochs": 2, "learning_rate": 0.03})
    return shared_dropout.load(run.folder / "adapter", world)


def test_where_all_dropout_is_before_the_noise_a_fork_has_none_between_its_branches(trained):
    """So that without noise its noise terms are zero, where separate passes compare masks of dropout."""
    none = {3: TokenScaledNoise(0.0)}
    fork, separate = (shared_dropout.draw(*trained, none, strategy, 6) for strategy in ("fork", "separate"))
    for name in ("soft", "consistency"):
        assert fork.terms[name].abs().max() < 1e-6 < 1e-4 < separate.terms[name].min()
    assert fork.gradients["noise terms"].abs().max() < 1e-6 < separate.gradients["noise terms"].norm(dim=1).min()
    assert shared_dropout.spread(fork.gradients["loss"]) > 0  # the cross-entropy has dropout as well


def test_without_dropout_and_noise_every_draw_is_the_gradient_of_the_cross_entropy(trained):
    model, batch = trained
    model.eval()
    try:
        drawn = shared_dropout.draw(model, batch, {3: TokenScaledNoise(0.0)}, "fork", 4)
        logits = model.model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits[batch["target_positions"]], batch["target_tokens"])
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss / 2, trainable)])
    finally:
        model.train()
    torch.testing.assert_close(drawn.gradients["loss"], expected.expand(4, -1), rtol=1e-4, atol=1e-7)
    assert shared_dropout.spread(drawn.gradients["loss"]) < 1e-6


def test_the_statistics_of_draws():
    gradients = torch.tensor([[3.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    assert shared_dropout.cosine(*shared_dropout.halves(gradients)) == pytest.approx(0)
    assert shared_dropout.spread(gradients) == pytest.approx((1.5**2 + 0.5**2) ** 0.5)


def test_shared_dropout_prints_its_tables_and_makes_each_run_once(world, tmp_path, never):
    flags = ["--world", world, "--output", tmp_path, "--seeds", "1", "--epochs", "1", "--draws", "4"]
    done = call(shared_dropout.main, *flags)
    assert done.returncode == 0, done.stderr
    for title in ("late noise, in layers 3,", "early noise, in layers "):
        table = rows_of(done.stdout[done.stdout.index(title) :], 40)
        one, other, ratio = map(float, table["soft term, mean"])
        assert one / other == pytest.approx(ratio, rel=0.02) and other > 0
    for name in ("late noise, fork", "late noise, separate", "early noise, fork", "early noise, separate"):
        assert rows_of(done.stdout, 26)[name][1:3] == ["100.0%", "mean"]
    never()
    assert call(shared_dropout.main, *flags).stdout == done.stdout


# --- The kinds of noise, and 16 bits ----------------------------------------------------------------------------------


def test_the_other_kinds_of_noise_are_what_their_names_say():
    kinds, hidden = other_noise(), torch.randn(2, 5, 16).cumsum(-1)
    live = TokenScaledNoise(NOISE_STD).scale(hidden)
    assert kinds["frozen"].base_std is not None and kinds["relative"].relative
    assert [name for name, kind in kinds.items() if kind.gradient] == ["live, with its gradient"]
    assert [name for name, kind in kinds.items() if kind.max_to_signal] == ["live, with a limit"]
    for name in ("live, with its gradient", "live, with a limit"):
        scale = kinds[name].scale(hidden)
        assert torch.equal(kinds[name].capped(scale, hidden), live)


def test_a_step_has_the_kind_of_noise_that_is_asked_for():
    asked = []

    class Watched(TokenScaledNoise):
        def scale(self, hidden_states, mask=None):
            asked.append(tuple(hidden_states.shape))
            return super().scale(hidden_states, mask)

    Steps(TINY, "cpu").ours([1, 2], kind=Watched(0.1))
    assert len(asked) == 3  # at the fork for both branches at once


def test_low_precision_lets_the_steps_add_in_both_ways(monkeypatch):
    calls = []
    ways = {name: lambda h, noise, name=name, add=add: calls.append((name, h.dtype)) or add(h, noise)
            for name, add in low_precision.ADDITIONS.items()}  # fmt: skip
    monkeypatch.setattr(low_precision, "ADDITIONS", ways)
    usual = hooks.add_noise
    costs = low_precision.Costs("cpu")
    low_precision.time_steps(TINY, costs, [2, 3], rounds=2)
    assert hooks.add_noise is usual
    each = (1 + 2) * len([2, 3]) * low_precision.NOISY_BRANCHES  # of rounds, the first of which is not timed
    assert Counter(calls) == {(low_precision.PLAIN, torch.bfloat16): each, (low_precision.CHANCE, torch.bfloat16): each}
    assert {name: len(seconds) for name, seconds in costs.seconds.items()} == dict.fromkeys(
        (low_precision.PLAIN, low_precision.CHANCE, low_precision.FLOAT32), 2
    )


def test_only_one_of_the_two_additions_lets_small_noise_arrive():
    hidden, noise = torch.ones(1, 100, 100, dtype=torch.bfloat16), torch.full((1, 100, 100), 1e-3)
    arrived = {name: (add(hidden, noise * torch.rand_like(noise) * 2).float() - 1).mean().item()
               for name, add in low_precision.ADDITIONS.items()}  # fmt: skip
    assert arrived[low_precision.PLAIN] == 0 and arrived[low_precision.CHANCE] == pytest.approx(1e-3, rel=0.1)


def test_low_precision_prints_its_shares():
    done = call(low_precision.main, "--size", "tiny", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout, 24)
    more = 2 * (float(rows[low_precision.CHANCE][1]) - float(rows[low_precision.PLAIN][1]))
    share = float(done.stdout.split("over a step in float32: ")[1].rstrip("%\n"))
    assert share == pytest.approx(100 * more / float(rows[low_precision.FLOAT32][0]), abs=0.02)
    assert call(low_precision.main, "--rounds", "0").stderr.endswith("error: --rounds: expected 1 or more\n")
