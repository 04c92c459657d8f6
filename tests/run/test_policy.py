"""The noise policy of a run: calibrated once, given back from a file, kept over a kill, said at the start."""

import json

import pytest
import torch
from running import MEASURED, metrics_of, run, words
from tiny_folder import tiny_folder

import train_loop
from noisefit.base.errors import InputError
from noisefit.method import calibration
from noisefit.method.objectives import OBJECTIVES
from noisefit.method.policy import BY_SNR, CALIBRATED, FROZEN, NoisePolicy
from noisefit.run import noise_policy
from noisefit.run.contradictions import without_effect
from noisefit.run.noise_policy import check_policy, describe, expected_cost, first_eligible, read_policy
from noisefit.run.settings import parse_arguments

pytestmark = pytest.mark.slow

FAST = dict(
    learning_rate=1e-2, batch_size=3, gradient_accumulation_steps=2, max_steps=4, logging_steps=1, lora_dropout=0.1,
    save_steps=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "questions.csv"
    path.write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i}{' so' * (i % 3)}.\n" for i in range(12)))
    return path


@pytest.fixture(scope="module")
def calibrated(llama_folder, data, tmp_path_factory):
    """The output of a calibrated run."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    run(llama_folder, data, out, **FAST, noise_policy="auto")
    return out


def same_run(one, other):
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    lines = [[{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_of(out)] for out in (one, other)]
    assert lines[0] == lines[1] and lines[0][0]["loss"] is not None


def measures_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was measured")

    monkeypatch.setattr(calibration, "measure", refuse)
    monkeypatch.setattr(noise_policy, "average_snr", refuse)
    monkeypatch.setattr(noise_policy, "average_base_std", refuse)


def test_noise_that_does_nothing_is_not_chosen_in_silence(llama_folder, questions, tmp_path):
    flags = dict(noise_policy="auto", auto_scale_factors=1e-30, auto_calib_batches=1, max_steps=1)
    with pytest.raises(InputError, match="noise of no scale changes a prediction"):
        run(llama_folder, questions, tmp_path / "out", **flags)


def test_a_calibrated_run_says_what_it_measured_and_chose(calibrated):
    policy = json.loads((calibrated / "noise_policy.json").read_text())
    snr = json.loads((calibrated / "layer_snr.json").read_text())
    assert policy["selected"] == snr["selected"] and policy["snr"] == snr["snr"] and len(snr["snr"]) == 4
    assert 1 <= len(policy["selected"]) == len(policy["scales"]) <= 2
    assert [entry["layer"] for entry in policy["layers"]] == [0, 1, 2, 3] and policy["num_layers"] == 4
    assert [entry["layer"] for entry in policy["layers"] if entry["selected"]] == policy["selected"]
    assert {entry["scale"] for entry in policy["layers"]} == {None, *policy["scales"]}
    for entry in policy["layers"]:
        assert [cell["factor"] for cell in entry["grid"]] == [0.25, 0.5, 1, 1.5, 2]
        assert all(cell["scale"] == pytest.approx(cell["factor"] / 32**0.5) for cell in entry["grid"])
    assert policy["settings"]["auto_depth_bands"] == 3 and policy["tokens"] > 0
    for line in metrics_of(calibrated):
        assert line["layer_noise_to_signal"].keys() == set(map(str, policy["selected"]))
        assert line["soft_loss"] > 0


def test_its_file_given_back_is_the_same_run_and_measures_nothing(
    calibrated, llama_folder, data, tmp_path, monkeypatch
):
    measures_nothing(monkeypatch)
    out, file = tmp_path / "out", calibrated / "noise_policy.json"
    run(llama_folder, data, out, **FAST, noise_policy=file)
    same_run(out, calibrated)
    for name in ("noise_policy.json", "layer_snr.json"):
        assert (out / name).read_bytes() == (calibrated / name).read_bytes()


def test_a_policy_by_hand_needs_layers_and_scales_alone(llama_folder, data, tmp_path, capsys):
    file, out = tmp_path / "mine.json", tmp_path / "out"
    file.write_text('{"selected": [1, 3], "scales": [0.5, 0.25]}')
    lines = run(llama_folder, data, out, **FAST, noise_policy=file)
    assert lines[-1]["layer_noise_to_signal"].keys() == {"1", "3"}
    assert json.loads((out / "layer_snr.json").read_text()) == {"snr": [], "selected": [1, 3]}
    said = capsys.readouterr().err
    assert "noise in layers: 1, 3" in said and "0.25" in said


def test_the_scales_of_a_policy_are_those_of_the_noise_in_each_layer(llama_folder, data, tmp_path):
    """Noise to signal is proportional to the scale; a scale of 0 is no noise, and not that of --noise_std."""
    ratios = []
    for scales in ([0.5, 0.25], [1.0, 0.0]):
        file, out = tmp_path / "mine.json", tmp_path / f"{scales[0]}"
        file.write_text(json.dumps({"selected": [1, 3], "scales": scales}))
        [line, *_] = run(llama_folder, data, out, **FAST | dict(max_steps=1, lora_dropout=0), noise_policy=file)
        ratios.append(line["layer_noise_to_signal"])
    assert ratios[1]["1"] == pytest.approx(2 * ratios[0]["1"], rel=1e-3) and ratios[0]["1"] > 0
    assert ratios[1]["3"] == 0 < ratios[0]["3"]


def test_it_is_measured_on_the_batches_that_are_asked_for(llama_folder, data, tmp_path, monkeypatch):
    seen = {}
    measure, average = calibration.measure, noise_policy.average_snr
    monkeypatch.setattr(
        calibration,
        "measure",
        lambda model, batches, *rest: seen.update(auto=len(batches)) or measure(model, batches, *rest),
    )
    monkeypatch.setattr(
        noise_policy,
        "average_snr",
        lambda model, batches, *rest: seen.update(snr=len(batches)) or average(model, batches, *rest),
    )
    for auto, snr in ((3, 1), (1, 3)):
        flags = FAST | dict(max_steps=1, auto_calib_batches=auto, snr_batches=snr)
        run(llama_folder, data, tmp_path / str(auto), **flags, noise_policy="auto")
        assert seen == {"auto": auto, "snr": snr}


def test_layers_chosen_again_get_the_noise_and_are_written_down(llama_folder, data, tmp_path, monkeypatch):
    choices = iter([[0, 1], [2], [3]])
    monkeypatch.setattr("train_loop.choose_policy", lambda *args: NoisePolicy(BY_SNR, next(choices), snr=[1.0] * 4))
    lines = run(llama_folder, data, tmp_path / "out", **FAST | dict(max_steps=5), snr_every=2)
    assert [list(line["layer_noise_to_signal"]) for line in lines] == [["0", "1"]] * 2 + [["2"]] * 2 + [["3"]]
    assert json.loads((tmp_path / "out" / "layer_snr.json").read_text())["selected"] == [3]


@pytest.mark.parametrize(
    "flags",
    [
        dict(noise_policy="snr", prefer_late_layers=0.5, num_noise_layers=2),
        dict(noise_policy="auto"),
        dict(noise_policy="auto", snr_every=3),
        dict(noise_policy="FILE"),
        dict(noise_scale="frozen", noise_std=0.3),
        dict(noise_scale="frozen", noise_std=0.3, snr_every=3),
        dict(noise_scale="relative", noise_policy="auto", max_noise_to_signal=0.1),
        dict(noise_gradient=True, teacher_gradient=True, temperature=2.0, temperature_on="teacher"),
        dict(loss_mode="rdrop"),
        dict(loss_mode="neftune"),
        dict(loss_mode="consistency_only"),
    ],
    ids=str,
)
def test_a_run_resumed_in_the_middle_is_the_run_that_was_not(
    flags, calibrated, llama_folder, data, tmp_path, monkeypatch
):
    if flags.get("noise_policy") == "FILE":
        flags = dict(noise_policy=calibrated / "noise_policy.json")
    flags = FAST | flags | dict(save_steps=2, logging_steps=3, max_steps=5)
    run(llama_folder, data, tmp_path / "whole", **flags, save_total_limit=0)
    if "snr_every" not in flags:
        measures_nothing(monkeypatch)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    run(llama_folder, data, tmp_path / "resumed", **flags, resume_from_checkpoint=checkpoint)
    same_run(tmp_path / "whole", tmp_path / "resumed")
    for name in ("layer_snr.json", "noise_policy.json"):
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "resumed"))
        assert whole.exists() == resumed.exists()
        assert not whole.exists() or whole.read_bytes() == resumed.read_bytes()


def test_a_run_of_another_policy_or_objective_is_not_resumed(calibrated, llama_folder, data, tmp_path):
    flags = FAST | dict(save_steps=2, max_steps=2)
    run(llama_folder, data, tmp_path / "out", **flags)
    for change, message in [
        (dict(noise_policy="auto"), "noise_policy was snr and is auto"),
        (dict(noise_policy=calibrated / "noise_policy.json"), "noise_policy was snr and is"),
        (dict(loss_mode="ce_kl"), "loss_mode was full and is ce_kl"),
        (dict(prefer_late_layers=0.25), "prefer_late_layers was 0.0 and is 0.25"),
        (dict(auto_scale_factors="1,2"), r"auto_scale_factors was \[0.25, 0.5, 1.0, 1.5, 2.0\] and is \[1.0, 2.0\]"),
    ]:
        with pytest.raises(InputError, match=message):
            run(llama_folder, data, tmp_path / "out", **flags | change, resume_from_checkpoint="latest")


def test_layers_are_chosen_past_the_share_of_the_depth_only(llama_folder, data, tmp_path, capsys):
    for policy, flags in (("snr", dict(num_noise_layers=1)), ("auto", {})):
        out = tmp_path / policy
        run(llama_folder, data, out, **FAST | dict(max_steps=1), **flags, noise_policy=policy, prefer_late_layers=0.75)
        assert json.loads((out / "layer_snr.json").read_text())["selected"] == [3]
        assert "a step costs 1.00 times plain fine-tuning" in capsys.readouterr().err
    tried = json.loads((tmp_path / "auto" / "noise_policy.json").read_text())["layers"]
    assert [entry["layer"] for entry in tried] == [3]  # nothing else was measured


@pytest.mark.parametrize(
    ("share", "layers", "first"), [(0, 32, 0), (0.25, 32, 8), (0.7, 10, 7), (0.34, 3, 2), (1, 4, 4), (1 / 3, 6, 2)]
)
def test_the_share_of_the_depth(share, layers, first):
    assert first_eligible(share, layers) == first


def parse(**flags):
    return parse_arguments(words(model="m", train_data="t.csv", **flags))


def test_an_objective_without_noise_in_layers_needs_no_layers(data, tmp_path):
    """Three noisy layers are the default; the model has one."""
    small = tiny_folder(tmp_path / "small", num_hidden_layers=1)
    for mode in ("basefit", "neftune", "rdrop"):
        assert run(small, data, tmp_path / mode, **FAST | dict(max_steps=1), loss_mode=mode)
    with pytest.raises(InputError, match=r"--num_noise_layers 3: .* has 1 layers"):
        run(small, data, tmp_path / "full", **FAST)


def test_a_policy_without_noise_is_refused_where_nothing_else_teaches(llama_folder, data, tmp_path):
    file = tmp_path / "none.json"
    for content in ('{"selected": [], "scales": []}', '{"selected": [1], "scales": [0.0]}'):
        file.write_text(content)
        with pytest.raises(InputError, match="it has no noise, without which --loss_mode kl_only has nothing to learn"):
            run(llama_folder, data, tmp_path / "out", **FAST, noise_policy=file, loss_mode="kl_only")
    assert run(llama_folder, data, tmp_path / "out", **FAST | dict(max_steps=1), noise_policy=file)


def test_a_policy_of_another_model_is_said(calibrated, data, tmp_path, capsys):
    other = tiny_folder(tmp_path / "gpt2", "gpt2")
    run(other, data, tmp_path / "out", **FAST | dict(max_steps=1), noise_policy=calibrated / "noise_policy.json")
    assert "noise_policy.json was calibrated for " in capsys.readouterr().err


def test_more_layers_than_are_past_it_are_refused():
    for flags, message in [
        (
            dict(prefer_late_layers=0.5),
            "--num_noise_layers 3: m has 4 layers, of which 2 are past --prefer_late_layers",
        ),
        (dict(num_noise_layers=5), "--num_noise_layers 5: m has 4 layers"),
        (dict(prefer_late_layers=1, noise_policy="auto"), "--prefer_late_layers 1 leaves none of 4 layers"),
    ]:
        with pytest.raises(InputError, match=message):
            check_policy(parse(**flags), 4)
    check_policy(parse(prefer_late_layers=0.5, num_noise_layers=2), 4)


FILES = {
    "": "cannot be read",
    "[": "cannot be read",
    "[1]": "expected an object, found [1]",
    "{}": "it lacks 'selected'",
    '{"selected": [1]}': "it lacks 'scales'",
    '{"selected": [1], "scales": null, "num_layers": 4}': "scales: expected a list, found null",
    '{"selected": [1], "scales": [0.1, 0.2]}': "2 scales to 1 layers",
    '{"selected": [1], "scales": [-0.1]}': "scales[0]: expected a number from 0, found -0.1",
    '{"selected": [1], "scales": [NaN]}': "scales[0]: expected a number from 0, found NaN",
    '{"selected": ["1"], "scales": [0.1]}': "selected[0]: expected a layer's index",
    '{"selected": [1.0], "scales": [0.1]}': "selected[0]: expected a layer's index, found 1.0",
    '{"selected": [4], "scales": [0.1]}': "no layer 4 in a model of 4",
    '{"selected": [-1], "scales": [0.1]}': "selected[0]: expected a layer's index, found -1",
    '{"selected": [2, 1], "scales": [0.1, 0.1]}': "not in ascending order",
    '{"selected": [1, 1], "scales": [0.1, 0.1]}': "not in ascending order",
    '{"selected": [1], "scales": [0.1], "num_layers": 32}': "for a model of 32 layers, this one has 4",
    '{"selected": [1], "scales": [0.1], "snr": [1, 2]}': "snr is not that of 4 layers",
    '{"selected": [1], "scales": [0.1], "layers": 3}': "layers: expected a list, found 3",
    '{"selected": [], "scales": [], "layers": [{"layer": 0, "best_score": 1, "grid": []}]}': "has no grid",
    '{"selected": [], "scales": [], "layers": [{"layer": 9, "best_score": 1, "grid": []}]}': "is not of the model",
    '{"selected": [], "scales": [], "layers": [{"layer": 0, "grid": [{}]}]}': "it lacks 'best_score'",
    '{"selected": [], "scales": [], "layers": [{"layer": 0, "grid": [{}], "best_score": 1}]}': "it lacks 'factor'",
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_no_policy_of_this_model_is_refused_in_a_line(content, llama_folder, data, tmp_path):
    file = tmp_path / "noise_policy.json"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        run(llama_folder, data, tmp_path / "out", noise_policy=file)
    said = str(caught.value)
    assert said.startswith(f"--noise_policy {file}: ") and FILES[content] in said and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["autoo", "SNR", "no/such/file.json", "."])
def test_what_is_neither_a_policy_nor_a_file_is_refused(name):
    with pytest.raises(InputError, match=r"expected snr, auto, or a noise_policy\.json"):
        read_policy(name, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(noise_policy="auto", num_noise_layers=2), "--num_noise_layers goes with --noise_policy snr alone: auto"),
        (dict(noise_policy="auto", snr_format="Lowest"), "--snr_format goes with --noise_policy snr alone: auto"),
        (
            dict(noise_policy="p.json", snr_format="Lowest"),
            "--snr_format goes with --noise_policy snr alone: the file",
        ),
        (dict(noise_policy="p.json", snr_every=5), "--snr_every measures the layers again"),
        (dict(loss_mode="kl_only", num_noise_layers=0), "--num_noise_layers 0 leaves --loss_mode kl_only nothing to"),
        (dict(loss_mode="consistency_only", noise_std=0), "--noise_std 0 leaves --loss_mode consistency_only nothing"),
        (dict(auto_scale_factors="1,0"), "'0' is not a number above 0"),
        (dict(auto_scale_factors="1,x"), "'x' is not a number above 0"),
        (dict(auto_scale_factors=","), "at least one value"),
        (dict(loss_mode="sft"), "invalid choice: 'sft'"),
        (dict(rdrop_dropout=1), "'1' is not a number from 0 to 0.99"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(InputError) as caught:
        parse(**flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (dict(loss_mode="basefit", noise_std=0.3, temperature=2), "--temperature, --noise_std"),
        (dict(loss_mode="ce_kl", lambda_consistency=0.3), "--lambda_consistency"),
        (dict(noise_policy="auto", noise_std=0.3), "--noise_std"),
        (
            dict(rdrop_alpha=2, neftune_alpha=3, auto_depth_bands=2),
            "--neftune_alpha, --rdrop_alpha, --auto_depth_bands",
        ),
        (dict(loss_mode="rdrop", rdrop_alpha=2, rdrop_dropout=0.1, temperature=2), None),
        (dict(loss_mode="neftune", neftune_alpha=2, branches="fork"), "--branches"),
        (dict(hybrid_loss_alpha=0.3, lambda_consistency=0.2, noise_std=0.2, snr_every=5, branches="fork"), None),
        (dict(noise_policy="auto", auto_scale_factors="1,2", snr_every=5), None),
        (dict(loss_mode="kl_only", hybrid_loss_alpha=0.3), "--hybrid_loss_alpha"),
        (dict(noise_policy="p.json", prefer_late_layers=0.5, snr_batches=2), "--snr_batches, --prefer_late_layers"),
    ],
    ids=str,
)
def test_flags_that_change_nothing_are_named(flags, idle, capsys):
    said = without_effect(parse(**flags))
    assert said is None if idle is None else said.startswith("without effect") and said.endswith(f": {idle}")


def test_flags_that_change_nothing_stand_beside_what_they_go_with():
    said = without_effect(parse(unknown_rows="drop", refusal="No."))
    assert said == "without effect under --loss_mode full, --noise_policy snr, --unknown_rows drop: --refusal"


def test_factors_are_sorted_and_come_with_commas_or_spaces_or_from_yaml(tmp_path):
    assert parse(auto_scale_factors="2,0.5").auto_scale_factors == [0.5, 2]
    spaced = ["--model", "m", "--train_data", "t", "--auto_scale_factors", "2", "0.5", "2"]
    assert parse_arguments(spaced).auto_scale_factors == [0.5, 2]
    (tmp_path / "flags.yaml").write_text("auto_scale_factors: [3, 1]\nloss_mode: full\n")
    assert parse(config=tmp_path / "flags.yaml").auto_scale_factors == [1, 3]
    (tmp_path / "flags.yaml").write_text("noise_policy: auto\nsnr_format: Lowest\n")
    with pytest.raises(InputError, match="--snr_format goes with"):
        parse(config=tmp_path / "flags.yaml")


@pytest.mark.parametrize("mode", OBJECTIVES)
def test_what_a_step_costs_by_counting_layers(mode):
    other = {"teacher": "base"} if mode == "ce_teacher" else {}
    settings, policy = parse(loss_mode=mode, **other), NoisePolicy(layers=[3, 5])
    count = dict(full=3, ce_kl=2, kl_only=2, consistency_only=2, rdrop=2).get(mode, 1)
    forked = 0.5 + count * 0.5 if mode in ("full", "ce_kl", "kl_only", "consistency_only") else count
    assert expected_cost(settings, policy, 8, "fork") == pytest.approx(forked)
    assert expected_cost(settings, policy, 8, "separate") == count


def test_the_start_of_a_run_shows_every_layer_in_aligned_columns():
    settings = parse()
    snr = NoisePolicy(layers=[1, 10], snr=[5.0, 234.56, 0.25] * 4)
    table = describe(settings, snr, 12, "fork")
    assert table[0].split() == ["layer", "SNR", "noise"] and len(table) == 1 + 12 + 2
    assert [line.split() for line in table[1:13]] == [
        [str(i), f"{snr.snr[i]:.4g}", *(["yes"] if i in (1, 10) else [])] for i in range(12)
    ]
    assert len({len(line) for line in table[1:13] if line.endswith("yes")}) == 1
    assert table[13] == "noise in layers: 1, 10"
    assert table[14].endswith("(fork); counting layers, a step costs 2.67 times plain fine-tuning")


def test_the_start_of_a_run_says_how_its_base_scale_lives():
    frozen = NoisePolicy(FROZEN, [1, 3], [0.3, 0.125], snr=[5.0] * 4, start_stds=[0.5, 0.3, 0.2, 0.125])
    table = describe(parse(noise_scale="frozen"), frozen, 4, "fork")
    assert table[0].split() == ["layer", "SNR", "scale", "noise"] and table[4].split() == ["3", "5", "0.125", "yes"]
    assert table[5] == "noise in layers: 1, 3 (its base scale is kept as it is now)"
    relative = NoisePolicy(layers=[1], snr=[2000.0] * 4)
    said = describe(parse(noise_scale="relative"), relative, 4, "fork")
    assert said[5] == "noise in layers: 1 (relative to each token's size)"
    assert said[6].startswith("the layers' SNR are nearly the same")
    assert "nearly the same" not in str(describe(parse(), NoisePolicy(layers=[1], snr=[5.0, 5.5]), 2, "fork"))
    assert "(" not in describe(parse(noise_scale="frozen"), NoisePolicy(CALIBRATED, [1], [0.1]), 2, "fork")[3]
    assert said[-1].endswith("Raise --noise_std, to which it is in proportion")


def test_a_calibrated_table_has_score_response_and_scale(calibrated):
    settings = parse(noise_policy="auto")
    policy = read_policy(str(calibrated / "noise_policy.json"), 4)
    table = [line.split() for line in describe(settings, policy, 4, "fork")[:5]]
    assert table[0] == ["layer", "score", "KL", "scale", "noise"]
    for line, entry in zip(table[1:], policy.calibration["layers"], strict=True):
        assert len(line) == (5 if entry["selected"] else 3)
        at = next(c for c in entry["grid"] if c["scale"] == entry["scale"] or c["score"] == entry["best_score"])
        assert line[1:3] == [f"{at['score']:.3g}", f"{at['kl']:.3g}"]


def test_a_bloom_calibrates_on_separate_passes(data, tmp_path, capsys):
    folder = tiny_folder(tmp_path / "bloom", "bloom")
    run(folder, data, tmp_path / "out", **FAST | dict(max_steps=1), noise_policy="auto")
    assert "separate" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "noise_policy.json").read_text())["selected"]


def test_calibration_leaves_the_random_generators_alone(llama_folder, data, tmp_path, monkeypatch):
    states, whole = [], calibration.measure

    def watch(*args, **kwargs):
        states.append(torch.get_rng_state())
        found = whole(*args, **kwargs)
        assert not torch.equal(torch.get_rng_state(), states[-1])
        return found

    monkeypatch.setattr(calibration, "measure", watch)
    make = train_loop.make_noise
    monkeypatch.setattr("train_loop.make_noise", lambda *args: states.append(torch.get_rng_state()) or make(*args))
    run(llama_folder, data, tmp_path / "out", **FAST | dict(max_steps=1), noise_policy="auto")
    assert torch.equal(states[0], states[1])
