"""The noise of a finished run is made again from what its output folder records."""

import json
import re
import shutil

import pytest
from running import run

import train_loop
from noisefit.base.errors import InputError
from noisefit.fork.hooks import EMBEDDING
from noisefit.inputs.noise_records import read_noise

pytestmark = pytest.mark.slow

RUNS = {
    "live": dict(noise_std=0.7, num_noise_layers=2, max_noise_to_signal=0.25),
    "frozen": dict(noise_scale="frozen", snr_format="Lowest"),
    "relative": dict(noise_scale="relative", noise_std=0.2),
    "calibrated": dict(noise_policy="auto", auto_scale_factors="1,2", auto_calib_batches=1),
    "embedding": dict(loss_mode="neftune", neftune_alpha=3.0),
    "one noisy branch": dict(loss_mode="ce_noisy"),
}


@pytest.fixture(scope="module")
def folders(llama_folder, tmp_path_factory):
    """The output folder of each kind of run, and the noise that it trained with."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    (root / "q.csv").write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i + i}.\n" for i in range(4)))
    make = train_loop.make_noise
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in RUNS.items():
            patch.setattr(train_loop, "make_noise", lambda *args, name=name: made.setdefault(name, make(*args)))
            run(llama_folder, root / "q.csv", root / name, max_steps=1, batch_size=4, **flags)
    return root, made


@pytest.mark.parametrize("name", RUNS)
def test_the_noise_is_that_of_the_run(folders, name):
    root, made = folders
    found = read_noise(root / name, 4).make()
    assert found.keys() == made[name].keys() and found
    for layer, noise in found.items():
        assert type(noise) is type(made[name][layer]) and vars(noise) == vars(made[name][layer])
    if name == "live":
        assert all((noise.noise_std, noise.max_to_signal) == (0.7, 0.25) for noise in found.values())
    assert (EMBEDDING in found) == (name == "embedding")


@pytest.mark.parametrize("name", RUNS)
def test_its_identity_is_the_same_in_another_process_and_another_runs_is_not(folders, name):
    """By it a killed `generate.py --noise_passes` goes on: an address in it would make each process another run."""
    found = {own: read_noise(folders[0] / own, 4).identity for own in RUNS}
    assert not re.search(r"0x[0-9a-f]{4}", found[name]) and list(found.values()).count(found[name]) == 1


def test_the_scale_of_a_run_of_an_earlier_version_is_live(folders, tmp_path):
    copy = shutil.copytree(folders[0] / "live", tmp_path / "copy")
    config = json.loads((copy / "noisefit_config.json").read_text())
    for name in ("noise_scale", "max_noise_to_signal"):
        del config[name]
    (copy / "noisefit_config.json").write_text(json.dumps(config))
    noise = read_noise(copy, 4).make()
    assert len(noise) == 2 and not any(of_layer.relative or of_layer.max_to_signal for of_layer in noise.values())


REFUSED = {
    "no settings": ("live", "noisefit_config.json", None, "noisefit_config.json: no such file"),
    "no layers": ("live", "layer_snr.json", None, "layer_snr.json: no such file"),
    "no policy": ("calibrated", "noise_policy.json", None, "noise_policy.json: no such file"),
    "no objective": ("live", "noisefit_config.json", dict(loss_mode="best"), "loss_mode is 'best', none of full, "),
    "no kind": ("live", "noisefit_config.json", dict(noise_scale="big"), "noise_scale is 'big', none of live"),
    "of the prompt": ("live", "noisefit_config.json", dict(noise_tokens="prompt"), "at the tokens of the prompt alone"),
    "no strength": ("live", "noisefit_config.json", dict(noise_std=0.0), "had no noise, .* leave out --noise_passes"),
    "no alpha": ("embedding", "noisefit_config.json", dict(neftune_alpha=0.0), "neftune. had no noise"),
    "no scale": ("calibrated", "noise_policy.json", dict(selected=[1], scales=[0.0]), "had no noise"),
    "plain": ("live", "noisefit_config.json", dict(loss_mode="basefit"), "basefit. had no noise"),
    "no noisy layer": ("live", "layer_snr.json", dict(selected=[]), "had no noise"),
    "a layer too many": ("live", "layer_snr.json", dict(selected=[1, 4]), "no layer 4 in a model of 4"),
    "a frozen layer too many": ("frozen", "layer_snr.json", dict(selected=[1, 4]), "no layer 4 in a model of 4"),
    "another model's": ("live", "layer_snr.json", dict(snr=[1.0, 2.0]), "snr is not that of 4 layers"),
    "another model's scales": ("frozen", "layer_snr.json", dict(base_stds=[1.0]), "there are 1 base_stds to 4 layers"),
    "not a number": ("live", "noisefit_config.json", dict(noise_std="much"), "noise_std: expected a number from 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_records_that_cannot_be_a_runs_are_refused_in_a_line(folders, tmp_path, case):
    name, file, change, message = REFUSED[case]
    copy = shutil.copytree(folders[0] / name, tmp_path / "copy")
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    with pytest.raises(InputError, match=message) as caught:
        read_noise(copy, 4)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
    read_noise(folders[0] / name, 4)
