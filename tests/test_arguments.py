"""Flags: the published defaults, values checked, YAML under the command line, the token out of sight."""

import os
import sys
from pathlib import Path

import pytest

from noisefit.arguments import build_parser, parse_arguments
from noisefit.errors import InputError

REQUIRED = ["--model", "m", "--train_data", "t.csv"]


def test_the_published_programs_defaults_are_kept():
    args = parse_arguments(REQUIRED)
    published = dict(
        output_model="output_model", batch_size=4, epochs=5, max_steps=1000, learning_rate=5e-5, noise_std=0.1,
        lambda_consistency=0.1, snr_format="Largest", num_noise_layers=3, hybrid_loss_alpha=0.5,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published


def test_every_flag_says_what_it_does_in_the_help_and_in_the_readme():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    for action in build_parser()._actions[1:]:
        name, shown = action.option_strings[0], action.default
        shown = f"{shown:g}" if isinstance(shown, float) else str(shown)
        cell = "" if action.default is None or action.default is False else f"`{shown}`"
        assert action.help and f"| `{name}` | {cell} | {action.help[0].upper()}{action.help[1:]}" in readme
    assert "%(" not in build_parser().format_help()


BAD = [
    ("--noise_std nan", "--noise_std: 'nan' is not a number from 0 to 1e+06"),
    ("--noise_std -0.1", "--noise_std: '-0.1' is not a number from 0 to 1e+06"),
    ("--learning_rate inf", "not a number above 0 and up to 1e+06"),
    ("--learning_rate 0", "not a number above 0 and up to 1e+06"),
    ("--temperature 0", "not a number from 0.001 to 1000"),
    ("--hybrid_loss_alpha 1.01", "not a number from 0 to 1"),
    ("--lora_dropout 1", "not a number from 0 to 0.99"),
    ("--num_noise_layers -1", "not a whole number from 0 to 1e+09"),
    ("--batch_size 2.5", "not a whole number from 1 to 1e+09"),
    ("--max_steps 0", "not a whole number at least 1 or -1"),
    ("--seed 4294967296", "not a whole number from 0 to 1e+09"),
    ("--snr_format largest", "choose from"),
    ("--noise-std 1", "did you mean --noise_std"),
    ("--nois 1", "did you mean --noise_std"),
    ("--epochs", "--epochs: expected one argument"),
    ("--full_finetune --quantization 4bit", "cannot train quantized"),
]


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_values_are_refused_in_one_line(flags, message):
    with pytest.raises(InputError) as caught:
        parse_arguments([*REQUIRED, *flags.split()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_required_flags():
    with pytest.raises(InputError, match="--model is required"):
        parse_arguments(["--train_data", "t.csv"])
    with pytest.raises(InputError, match="--train_data is required"):
        parse_arguments(["--model", "m"])


def test_target_modules_by_comma_or_space():
    assert parse_arguments([*REQUIRED, "--target_modules", "q_proj,v_proj", "o_proj"]).target_modules == [
        "q_proj", "v_proj", "o_proj"
    ]  # fmt: skip
    assert parse_arguments([*REQUIRED, "--target_modules", "all-linear"]).target_modules == "all-linear"


def test_yaml_gives_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: from-file\ntrain_data: t.csv\nlearning_rate: 1e-3\nmax_steps: -1\nfull_finetune: true\n"
        "trust_remote_code: false\ntarget_modules: [q_proj, v_proj]\nrun_name:\n"
    )
    args = parse_arguments(["--config", str(file), "--model", "from-command-line", "--no-full_finetune"])
    assert (args.model, args.train_data, args.learning_rate, args.max_steps) == ("from-command-line", "t.csv", 1e-3, -1)
    assert (args.full_finetune, args.trust_remote_code, args.run_name) == (False, False, None)
    assert args.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rte: 1", "no flag is called 'learning_rte'; did you mean --learning_rate?"),
        ("batch_size: 0", "--batch_size: '0' is not a whole number"),
        ("- a", "expected lines such as"),
        ("a: [", "not YAML"),
        ("config: other.yaml", "no flag is called 'config'"),
    ],
)
def test_bad_yaml_is_refused_and_the_file_named(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse_arguments([*REQUIRED, "--config", str(file)])
    assert message in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        parse_arguments([*REQUIRED, "--config", str(tmp_path / "missing.yaml")])


def test_the_token_goes_to_the_environment_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(sys, "argv", ["train_loop.py", *REQUIRED, "--hf_token=hf_secret"])
    args = parse_arguments()
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in str(vars(args)) and "hf_secret" not in str(sys.argv)
