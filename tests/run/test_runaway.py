"""How the noise's base scale lives over a run: that it is kept, that it is told where it runs away, and its limit."""

import json

import pytest
from running import MEASURED, metrics_of, run
from test_loop_exact import on_processes

from noisefit.base.errors import InputError
from noisefit.method import noise as noise_module
from noisefit.run.runaway import Runaway
from noisefit.run.settings import parse_arguments, without_effect

FAST = dict(
    learning_rate=1e-2, batch_size=4, gradient_accumulation_steps=1, max_steps=4, logging_steps=1, lora_dropout=0,
    save_steps=0,
)  # fmt: skip
# The smallest world in which noise runs away: a random model that learns sums by heart.
GROWING = FAST | dict(learning_rate=3e-2, target_modules="all-linear", batch_size=8, epochs=9, max_steps=25)


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("prompt,response\n" + "".join(f"What is {i} plus {i}?,It is {i + i}.\n" for i in range(24)))
    return path


def growth(lines):
    """By how much the noise to signal of a layer has grown since the first step, where most."""
    first, last = lines[0]["layer_noise_to_signal"], lines[-1]["layer_noise_to_signal"]
    return max(last[layer] / first[layer] for layer in first)


@pytest.mark.slow
def test_live_noise_runs_away_and_is_told_once_and_the_other_kinds_do_not(llama_folder, sums, tmp_path, capsys):
    live = run(llama_folder, sums, tmp_path / "live", **GROWING, noise_std=0.3)
    assert growth(live) > 10
    said = [line for line in capsys.readouterr().err.splitlines() if "runs away" in line]
    assert len(said) == 1 and "what helps: --noise_scale frozen or relative" in said[0]
    step = int(said[0].split("step ")[1].split(":")[0])
    grown = [growth([live[0], line]) > 3 for line in live]
    assert not any(grown[: step - 1]) and grown[step - 1]
    for flags in (dict(noise_scale="frozen", noise_std=0.3), dict(noise_scale="relative", noise_std=0.2)):
        lines = run(llama_folder, sums, tmp_path / flags["noise_scale"], **GROWING, **flags)
        assert growth(lines) < 2
        assert lines[-1]["hidden_rms"][0] > 2 * lines[0]["hidden_rms"][0]  # the model grows here as well
        assert "runs away" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_limit_ends_the_runaway(llama_folder, sums, tmp_path, capsys):
    lines = run(llama_folder, sums, tmp_path / "out", **GROWING, noise_std=0.3, max_noise_to_signal=0.4)
    ratios = [ratio for line in lines for ratio in line["layer_noise_to_signal"].values()]
    assert max(ratios) == pytest.approx(0.4, rel=1e-3) and min(ratios) < 0.3
    assert "runs away" not in capsys.readouterr().err


def watching(tmp_path, *ratios, scale="live"):
    watch, said = Runaway(tmp_path / "metrics.jsonl", scale), []
    for step, ratio in enumerate(ratios, 1):
        line = {"step": step, "layer_noise_to_signal": ratio}
        said.append(watch.watch(line))
        with watch.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return said


def test_it_is_told_at_three_times_the_start_of_a_layer_and_once(tmp_path):
    said = watching(tmp_path, {"1": 0.1, "2": 0.2}, {"1": 0.3, "2": 0.2}, {"1": 0.2, "2": 0.61}, {"1": 0.9, "2": 9.0})
    assert [bool(line) for line in said] == [False, False, True, False]
    assert "step 3: the noise runs away: in layer 2 it is 0.61 of the signal, 3.0 times its start" in said[2]


def test_a_run_that_goes_on_knows_its_start_and_whether_it_was_told(tmp_path):
    assert watching(tmp_path, {"1": 0.1}, {"1": 0.2}) == [None, None]
    [said] = watching(tmp_path, {"1": 0.31})
    assert "3.1 times its start" in said
    assert watching(tmp_path, {"1": 0.5}, {"1": 5.0}) == [None, None]


def test_a_layer_that_gets_noise_later_has_a_start_of_its_own(tmp_path):
    said = watching(tmp_path, {"1": 0.1}, {}, {"2": 0.5, "3": 0.0}, {"2": 1.4, "3": None}, {"2": 1.6, "3": 0.2})
    assert [bool(line) for line in said] == [False, False, False, False, True]


def test_what_helps_is_not_what_is_there_already(tmp_path):
    [_, said] = watching(tmp_path, {"1": 0.1}, {"1": 1.0}, scale="frozen")
    assert "--noise_scale" not in said and "--max_noise_to_signal" in said


@pytest.mark.slow
def test_a_frozen_scale_is_measured_at_the_start_and_kept(llama_folder, sums, tmp_path, monkeypatch):
    """Whatever the model becomes, and whichever layers are chosen later."""
    out, given = tmp_path / "out", []
    plain = noise_module.noise_scale
    monkeypatch.setattr(noise_module, "noise_scale", lambda h, base, *rest: given.append(base) or plain(h, base, *rest))
    flags = FAST | dict(
        noise_scale="frozen", noise_std=0.3, snr_batches=2, learning_rate=0.3, max_steps=6, save_steps=3
    )
    lines = run(llama_folder, sums, out, **flags, snr_every=2)
    found = json.loads((out / "layer_snr.json").read_text())
    assert len(found["base_stds"]) == 4 and len(found["selected"]) == 3
    once = json.loads((tmp_path / "out" / "checkpoint-3" / "checkpoint.json").read_text())["loop"]["policy"]
    assert once["start_stds"] == found["base_stds"] and once["kind"] == "frozen"
    assert once["base_stds"] == [once["start_stds"][layer] for layer in once["layers"]]
    in_training = [base for base in given if isinstance(base, float)]
    assert set(in_training) <= set(found["base_stds"]) and len(in_training) >= 18
    assert lines[-1]["hidden_rms"][0] != pytest.approx(lines[0]["hidden_rms"][0], rel=0.2)  # the model did change
    live = FAST | dict(noise_std=0.3, snr_batches=2, max_steps=1)
    [first] = run(llama_folder, sums, tmp_path / "live", **live)
    assert "base_stds" not in json.loads((tmp_path / "live" / "layer_snr.json").read_text())
    ratios = [line["layer_noise_to_signal"] for line in (first, lines[0])]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.3) and ratios[0] != ratios[1]  # of other batches


@pytest.mark.slow
def test_two_processes_freeze_what_one_does(llama_folder, sums, tmp_path):
    flags = FAST | dict(noise_scale="frozen", noise_std=0.3, max_steps=1, snr_batches=2, batch_size=1)
    on_processes(2, llama_folder, sums, tmp_path / "two", **flags | dict(gradient_accumulation_steps=2))
    more = dict(gradient_accumulation_steps=4, snr_batches=4)
    on_processes(1, llama_folder, sums, tmp_path / "one", **flags | more)
    two, one = (json.loads((tmp_path / name / "layer_snr.json").read_text()) for name in ("two", "one"))
    assert two["base_stds"] == pytest.approx(one["base_stds"], rel=1e-6)


def same_lines(one, other):
    lines = [[{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_of(out)] for out in (one, other)]
    assert lines[0] == lines[1] and lines[0][0]["soft_loss"] > 0


@pytest.mark.slow
def test_relative_noise_is_calibrated_and_its_file_repeats_the_run(llama_folder, sums, tmp_path):
    auto, again = tmp_path / "auto", tmp_path / "again"
    flags = FAST | dict(noise_scale="relative")
    lines = run(llama_folder, sums, auto, **flags, noise_policy="auto")
    policy = json.loads((auto / "noise_policy.json").read_text())
    assert policy["settings"]["noise_scale"] == "relative"
    # Of Gaussian hidden states the ratio would be the scale itself.
    for layer, scale in zip(policy["selected"], policy["scales"], strict=True):
        assert lines[0]["layer_noise_to_signal"][str(layer)] == pytest.approx(scale, rel=0.15)
    run(llama_folder, sums, again, **flags, noise_policy=auto / "noise_policy.json")
    same_lines(auto, again)
    with pytest.raises(InputError, match=r"was calibrated with --noise_scale relative, .* give --noise_scale relative"):
        run(llama_folder, sums, tmp_path / "no", **FAST, noise_policy=auto / "noise_policy.json")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_calibrated_scale_is_a_number_so_it_is_frozen_as_it_is(llama_folder, sums, tmp_path, capsys):
    for name in ("live", "frozen"):
        run(llama_folder, sums, tmp_path / name, **FAST, noise_policy="auto", noise_scale=name)
    said = capsys.readouterr().err
    assert "without effect under --loss_mode full, --noise_policy auto: --noise_scale" in said
    same_lines(tmp_path / "live", tmp_path / "frozen")
    file = tmp_path / "live" / "noise_policy.json"
    run(llama_folder, sums, tmp_path / "file", **FAST, noise_policy=file, noise_scale="frozen")
    same_lines(tmp_path / "live", tmp_path / "file")
    with pytest.raises(InputError, match="was calibrated with --noise_scale live"):
        run(llama_folder, sums, tmp_path / "no", **FAST, noise_policy=file, noise_scale="relative")


@pytest.mark.slow
def test_a_policy_by_hand_has_scales_of_whichever_kind_is_asked_for(llama_folder, sums, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"selected": [1, 3], "scales": [0.2, 0.1]}')
    [line, *_] = run(llama_folder, sums, tmp_path / "out", **FAST, noise_policy=file, noise_scale="relative")
    ratios = line["layer_noise_to_signal"]
    assert ratios["1"] == pytest.approx(0.2, rel=0.15) and ratios["3"] == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (dict(noise_scale="frozen"), None),
        (dict(noise_scale="frozen", noise_policy="auto"), "--noise_scale"),
        (dict(noise_scale="relative", noise_policy="auto"), None),
        (dict(noise_gradient=True, max_noise_to_signal=0.3, loss_mode="ce_noisy"), None),
        (dict(noise_gradient=True, max_noise_to_signal=0.3, loss_mode="neftune"),
         "--noise_gradient, --max_noise_to_signal"),
        (dict(teacher_gradient=True, temperature_on="teacher", loss_mode="ce_noisy"),
         "--temperature_on, --teacher_gradient"),
        (dict(noise_scale="relative", loss_mode="basefit"), "--noise_scale"),
    ],
    ids=str,
)  # fmt: skip
def test_flags_that_change_nothing_are_named(flags, idle):
    words = [f"--{name}={value}" for name, value in dict(model="m", train_data="d.csv", **flags).items()]
    said = without_effect(parse_arguments(words))
    assert (said is None) == (idle is None) and (idle is None or said.endswith(idle))
