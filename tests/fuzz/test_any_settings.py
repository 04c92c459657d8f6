"""YAML, policies, checkpoints and what a run reads of its own: for any content an answer or an `InputError`."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from running import words

from noisefit.base.command_line import flags_from_file
from noisefit.base.errors import InputError
from noisefit.method.policy import NoisePolicy
from noisefit.report.runs import read_runs
from noisefit.run.checkpoint_files import _problem, list_checkpoints
from noisefit.run.file_record import RECORD
from noisefit.run.noise_policy import read_policy
from noisefit.run.output_folder import OutputFolder
from noisefit.run.settings import build_parser, parse_arguments

HUGE = [10**400, -(10**400), 2**63, 1e308, float("nan"), float("inf")]
WORDS = st.sampled_from(["", "a", "\ud800", "../x", "0", "prompt", "*", "epoch", "\0", "x" * 300])
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(HUGE) | st.integers(-3, 3) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("settings")


def changed(content: object, path: list[float], value: object) -> object:
    """A copy of a JSON value with another value somewhere in it; `path` says where, by shares of each level."""
    if not path or not isinstance(content, (dict, list)) or not content:
        return value
    result = copy.copy(content)
    keys = sorted(content) if isinstance(content, dict) else range(len(content))
    key = keys[int(path[0] * len(content)) % len(content)]
    result[key] = changed(content[key], path[1:], value)
    return result


SHARES = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5)

# --- YAML -------------------------------------------------------------------------------------------------------------

NAMES = sorted(flag.removeprefix("--") for flag in build_parser()._option_string_actions if flag.startswith("--"))
SCALARS = st.sampled_from(["1", "-1", "1e-4", "2024-01-01", "true", "null", "~", "'a'", '"\\ud800"', "9" * 500,
                           "[1, 2]", "[[1]]", "{a: 1}", "&x [1]", "*x", "--epochs", "[--epochs]", "",
                           "!!python/object:os.system a", "!!timestamp 2001-01-01"])  # fmt: skip


def parse(folder: Path, text: str) -> None:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        parse_arguments([*words(model="m", train_data="t.csv"), "--config", str(path)])
    except InputError as error:
        assert str(path) in str(error) or "--" in str(error)


@pytest.mark.slow
@given(st.text(max_size=40))
@example("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]")
@example("epochs: 1\nepochs: 2")
@example("[" * 20_000)
def test_any_text_as_yaml(folder, text):
    parse(folder, text)


@given(st.dictionaries(st.sampled_from(NAMES), SCALARS, max_size=4))
def test_any_values_of_flags_in_yaml(folder, values):
    parse(folder, "".join(f"{name}: {value}\n" for name, value in values.items()))


def test_what_stands_in_yaml_is_what_the_flag_gets(folder):
    path = folder / "run.yaml"
    path.write_text("run_name: 2024-01-01\nepochs: 0012\ntarget_modules: [yes, 1.50]\nfull_finetune: on\nseed:\n")
    found = flags_from_file(path, build_parser())
    assert found == ["--run_name=2024-01-01", "--epochs=0012", "--target_modules", "yes", "1.50", "--full_finetune=on"]


# --- Policies, records, checkpoints -----------------------------------------------------------------------------------

GRID = [{"factor": 1.0, "scale": 0.1, "kl": 0.2, "ce_change": 0.0, "score": 0.2, "allowed": True}]
POLICY = {"selected": [0, 2], "scales": [0.1, 0.2], "snr": [1.0, 2.0, 3.0, 4.0], "num_layers": 4,
          "layers": [{"layer": 0, "best_score": 0.2, "scale": 0.1, "grid": GRID}]}  # fmt: skip


@given(SHARES, VALUES)
@example([0.4, 0.0], 10**400)
def test_any_change_of_a_policy(folder, where, value):
    path = folder / "policy.json"
    path.write_text(json.dumps(changed(POLICY, where, value)))
    try:
        policy = read_policy(str(path), 4)
    except InputError as error:
        assert str(path) in str(error)
        return
    assert isinstance(policy, NoisePolicy) and policy.layers == sorted(policy.layers)
    assert all(float(scale) >= 0 for scale in policy.base_stds or ())


def test_what_is_no_policy(folder):
    for content in (b"", b"\xff", b"[" * 100_000, b"null", b"[]"):
        (folder / "policy.json").write_bytes(content)
        with pytest.raises(InputError):
            read_policy(str(folder / "policy.json"), 4)


@given(st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"{}")
def test_any_record_of_an_output_folder(folder, content):
    """What cannot be read lists nothing, so nothing of the folder is taken for a run's."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    (out / "README.md").write_text("mine")
    (out / RECORD).write_bytes(content)
    with pytest.raises(InputError, match=RECORD):
        OutputFolder(out)


@given(SHARES, VALUES)
def test_any_change_of_a_record(folder, where, value):
    out = folder / "changed"
    out.mkdir(exist_ok=True)
    (out / "README.md").write_text("mine")
    output = OutputFolder(folder / "whole")
    output.start()
    output.write_json("layer_snr.json", {})
    record = json.loads((folder / "whole" / RECORD).read_text())
    (out / RECORD).write_text(json.dumps(changed(record, where, value)))
    try:
        output = OutputFolder(out)
    except InputError:
        return
    assert output.foreign(["README.md"]) == ["README.md"]
    output.set_aside()
    assert (out / "README.md").read_text() == "mine"


LOOP = {"step": 3, "total_steps": 9, "seen_targets": 9, "bad_steps": 0, "strategy": "fork",
        "policy": {"kind": "snr", "layers": [0], "base_stds": [], "snr": [1.0], "calibration": None}}  # fmt: skip
STATE = {
    "saved_at": 1, "run": {"prompt_date": None}, "loop": LOOP, "schedule": {"last_epoch": 3}, "scaler": None,
    "metrics": {"steps": 1, "skipped": 0, "targets": 1, "tokens": 1, "seconds": 0.1, "noisy_steps": [1, 0]},
    "files": {"optimizer.safetensors": [1, "x"], "processes.safetensors": [1, "x"], "model.safetensors": [1, "x"]},
}  # fmt: skip


@given(SHARES, VALUES)
@example([0.2, 0.9], 10**400)
def test_any_change_of_a_checkpoint(folder, where, value):
    checkpoint = folder / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name in STATE["files"]:
        (checkpoint / name).write_bytes(b"x")
    (checkpoint / "checkpoint.json").write_text(json.dumps(changed(STATE, where, value)))
    assert list_checkpoints(folder / "run") == [checkpoint]
    assert isinstance(_problem(checkpoint), str)  # its tensors are none


LINE = {"step": 1, "epoch": 0.1, "loss": 1.0, "ce_loss": 1.0, "noise_to_signal": 0.1, "layer_noise_to_signal": {"0": 1}}


READ = ["metrics.jsonl", "layer_snr.json", "noise_policy.json", "noisefit_config.json"]


@given(SHARES, VALUES, st.sampled_from(READ))
def test_any_change_of_what_the_report_reads(folder, where, value, name):
    run = folder / "report"
    run.mkdir(exist_ok=True)
    contents = dict(zip(READ, (LINE, {"snr": [1.0, 2.0], "selected": [0]}, POLICY, {"a": 1}), strict=True))
    contents[name] = changed(contents[name], where, value)
    if name != "noise_policy.json":
        del contents["noise_policy.json"]
    for file, content in contents.items():
        (run / file).write_text(json.dumps(content) + "\n")
    try:
        [found] = read_runs([str(run)])
        found.name.encode()
    except InputError as error:
        assert str(run) in str(error)
