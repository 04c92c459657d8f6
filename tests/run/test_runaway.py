"""How the noise's base scale lives over a run: that it is kept, that it is told where it runs away, and its limit."""

import io
import json
import math
from contextlib import redirect_stderr

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from running import MEASURED, metrics_of, run
from test_loop_exact import on_processes

from noisefit.base.errors import InputError
from noisefit.method import noise as noise_module
from noisefit.run.contradictions import without_effect
from noisefit.run.metrics import Metrics
from noisefit.run.noise_policy import check_policy, policy_from
from noisefit.run.settings import Settings, parse_arguments

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
    assert len(said) == 1 and "what helps: --noise_scale relative or frozen" in said[0]
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


def settings(**flags):
    return Settings(model="m", train_data="t", **flags)


def logged(tmp_path, *ratios, **flags):
    """What is said of lines of metrics that have, of each layer, the noise to signal of one step."""
    AcceleratorState._reset_state(True)
    metrics, said = Metrics(Accelerator(cpu=True), tmp_path, 4, settings(**flags)), []
    for step, by_layer in enumerate(ratios, 1):
        sizes = {layer: torch.tensor([ratio, 1.0]) for layer, ratio in by_layer.items()}
        metrics.add_step(torch.tensor(1.0), {}, sizes, target_tokens=5, tokens=20, skipped=False)
        with redirect_stderr(io.StringIO()) as stream:
            metrics.log(step, 0.5, 1e-3, torch.tensor(1.0))
        said.append(stream.getvalue().strip())
    return said


def test_it_is_told_at_three_times_the_start_of_a_layer_and_once(tmp_path):
    said = logged(tmp_path, {1: 0.1, 2: 0.2}, {1: 0.29, 2: 0.2}, {1: 0.2, 2: 0.61}, {1: 0.9, 2: 9.0})
    assert [bool(line) for line in said] == [False, False, True, False]
    assert "step 3: the noise runs away: in layer 2 it is 0.61 of the signal, 3.1 times its start" in said[2]


def test_the_layer_that_is_told_is_the_one_that_has_grown_most(tmp_path):
    [_, said] = logged(tmp_path, {1: 0.1, 2: 1.0}, {1: 0.9, 2: 3.5})
    assert "in layer 1 it is 0.9 of the signal, 9.0 times" in said


def test_a_layer_that_gets_noise_later_has_a_start_of_its_own(tmp_path):
    said = logged(tmp_path, {1: 0.1}, {}, {2: 0.5, 3: 0.0}, {2: 1.4, 3: math.nan}, {2: 1.6, 3: 0.2})
    assert [bool(line) for line in said] == [False, False, False, False, True]


def test_noise_on_the_embedding_is_not_watched(tmp_path):
    """Its share of the signal goes by the length of the rows."""
    assert logged(tmp_path, {-1: 0.1}, {-1: 1.0}, loss_mode="neftune") == ["", ""]


@pytest.mark.parametrize(
    ("flags", "helps"),
    [
        ({}, "--noise_scale relative or frozen, --noise_gradient, --max_noise_to_signal, "
         "a lower --noise_std or --learning_rate"),
        (dict(noise_scale="frozen", noise_gradient=True),
         "--max_noise_to_signal, a lower --noise_std or --learning_rate"),
        (dict(max_noise_to_signal=9.0, noise_scale="relative"),
         "--noise_gradient, a lower --noise_std or --learning_rate"),
        (dict(noise_policy="auto"), "--noise_gradient, --max_noise_to_signal, a lower --learning_rate"),
    ],
    ids=str,
)  # fmt: skip
def test_what_helps_is_what_would_change_something(tmp_path, flags, helps):
    [_, said] = logged(tmp_path, {1: 0.1}, {1: 1.0}, **flags)
    assert said.endswith(f"what helps: {helps}")
    assert ("its base scale grows with the hidden states" in said) == (not flags)


def test_a_checkpoint_has_the_start_of_each_layer_and_whether_it_was_told(tmp_path):
    def step(metrics, ratio):
        sizes = {1: torch.tensor([ratio, 1.0])}
        metrics.add_step(torch.tensor(1.0), {}, sizes, target_tokens=5, tokens=20, skipped=False)
        with redirect_stderr(io.StringIO()) as stream:
            metrics.log(1, 0.5, 1e-3, torch.tensor(1.0))
        return stream.getvalue()

    AcceleratorState._reset_state(True)
    first, second, third = (Metrics(Accelerator(cpu=True), tmp_path, 4, settings()) for _ in range(3))
    assert step(first, 0.1) == ""
    second.load_state_dict(first.state_dict())
    assert "4.0 times its start" in step(second, 0.4)
    third.load_state_dict(second.state_dict())
    assert step(third, 0.9) == ""


@pytest.mark.slow
def test_its_start_is_the_first_step_whenever_a_line_is_due(llama_folder, sums, tmp_path, capsys):
    """And a run that goes on from a checkpoint knows it, and whether it was told."""
    flags = GROWING | dict(noise_std=0.3, save_steps=5, save_total_limit=0)
    run(llama_folder, sums, tmp_path / "out", **flags | dict(logging_steps=20))
    said = capsys.readouterr().err
    assert said.count("the noise runs away") == 1 and "step 20: the noise runs away" in said
    for step, told in ((5, 1), (20, 0)):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        run(llama_folder, sums, tmp_path / f"from-{step}", **flags | dict(logging_steps=20),
            resume_from_checkpoint=checkpoint)  # fmt: skip
        assert capsys.readouterr().err.count("the noise runs away") == told


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
def test_it_is_measured_on_the_batches_of_the_snr_alone(llama_folder, sums, tmp_path):
    flags = FAST | dict(noise_scale="frozen", noise_std=0.3, max_steps=1)
    stds = []
    for snr, auto in ((1, 1), (1, 3), (3, 1)):
        out = tmp_path / f"{snr}-{auto}"
        run(llama_folder, sums, out, **flags, snr_batches=snr, auto_calib_batches=auto)
        stds.append(json.loads((out / "layer_snr.json").read_text())["base_stds"])
    assert stds[0] == stds[1] != stds[2]


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["frozen", "relative", "live"])
def test_the_snr_is_that_of_the_noise_that_is_injected(scale, llama_folder, sums, tmp_path):
    """Also after the model has grown, and where a limit holds the noise."""
    flags = GROWING | dict(noise_scale=scale, noise_std=0.2, num_noise_layers=4, max_steps=13, snr_every=12)
    lines = run(llama_folder, sums, tmp_path / "out", **flags)
    snr = json.loads((tmp_path / "out" / "layer_snr.json").read_text())["snr"]
    assert lines[-1]["hidden_rms"][0] > 1.3 * lines[0]["hidden_rms"][0]
    for layer, ratio in lines[-1]["layer_noise_to_signal"].items():
        # Of other rows, and in training each layer also has the noise of those before it.
        assert 1 / snr[int(layer)] == pytest.approx(ratio, rel=0.5 if scale == "live" else 0.2)
    limited = flags | dict(max_noise_to_signal=0.01, max_steps=1)
    run(llama_folder, sums, tmp_path / "limited", **limited)
    snr = json.loads((tmp_path / "limited" / "layer_snr.json").read_text())["snr"]
    assert snr == pytest.approx([100] * 4, rel=1e-3)


@pytest.mark.slow
def test_a_calibration_tries_the_noise_that_the_limit_allows(llama_folder, sums, tmp_path):
    grids = []
    for limit in (0, 0.01, 1e3):
        out = tmp_path / str(limit)
        run(llama_folder, sums, out, **FAST | dict(max_steps=1), noise_policy="auto", max_noise_to_signal=limit)
        layers = json.loads((out / "noise_policy.json").read_text())["layers"]
        grids.append([[cell["kl"] for cell in entry["grid"]] for entry in layers])
    free, limited, loose = grids
    assert loose == free
    for of_layer, of_limited in zip(free, limited, strict=True):
        assert of_layer[-1] > 10 * of_layer[0] and of_limited[-1] == pytest.approx(of_limited[1], rel=0.05)
        assert of_limited[-1] < of_layer[-1]


def a_policy(**changes):
    policy = dict(kind="frozen", layers=[1, 3], base_stds=[0.2, 0.4], snr=[1.0] * 4, calibration=None,
                  start_stds=[0.1, 0.2, 0.3, 0.4])  # fmt: skip
    return policy | changes


@pytest.mark.parametrize(
    ("changes", "run_has", "message"),
    [
        (dict(kind="thawed"), {}, "kind is none of snr, calibrated, frozen"),
        (dict(start_stds=[0.1, 0.2]), {}, "start_stds are not those of 4 layers"),
        (dict(base_stds=[0.2, 0.3]), {}, "base_stds are not the start_stds of its layers"),
        (dict(kind="snr", base_stds=[], start_stds=[]), {}, "kind is snr, that of the run is frozen"),
        (dict(kind="calibrated", start_stds=[]), {}, "kind is calibrated, that of the run is frozen"),
        ({}, dict(noise_scale="live"), "kind is frozen, that of the run is snr"),
        ({}, dict(noise_policy="auto"), "kind is frozen, that of the run is calibrated"),
    ],
    ids=str,
)
def test_a_checkpoints_policy_is_of_its_run(changes, run_has, message):
    of_run = dict(noise_policy="snr", noise_scale="frozen")
    assert policy_from(a_policy(), "here", 4, of_run).start_stds == [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(InputError, match=message):
        policy_from(a_policy(**changes), "here", 4, of_run | run_has)


def test_a_file_that_names_no_known_scale_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"selected": [1], "scales": [0.1], "settings": {"noise_scale": "bogus"}}))
    with pytest.raises(InputError, match="its noise_scale is none of"):
        check_policy(settings(noise_policy=str(file)), 4)


def test_a_softened_teacher_is_a_loss_without_noise():
    for noiseless in (dict(num_noise_layers=0), dict(noise_std=0)):
        with pytest.raises(InputError, match="is a loss without noise, too"):
            settings(temperature_on="teacher", temperature=2, **noiseless)
        settings(temperature_on="teacher", temperature=2, loss_mode="ce_noisy", **noiseless)
        settings(temperature_on="teacher", **noiseless)


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
        (dict(temperature_on="teacher"), "--temperature_on"),
        (dict(temperature_on="teacher", temperature=2), None),
        (dict(temperature_on="teacher", temperature=2, loss_mode="consistency_only"), "--temperature"),
        (dict(temperature=2, loss_mode="consistency_only"), None),
        (dict(num_noise_layers=0, noise_scale="frozen", noise_gradient=True), "--noise_scale, --noise_gradient"),
        (dict(noise_scale="relative", loss_mode="basefit"), "--noise_scale"),
    ],
    ids=str,
)  # fmt: skip
def test_flags_that_change_nothing_are_named(flags, idle):
    words = [f"--{name}={value}" for name, value in dict(model="m", train_data="d.csv", **flags).items()]
    said = without_effect(parse_arguments(words))
    assert (said is None) == (idle is None) and (idle is None or said.endswith(idle))
