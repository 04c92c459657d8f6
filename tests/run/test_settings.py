"""Flags: the published defaults, values checked, YAML under the command line, the token out of sight."""

import json
import os
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from noisefit.answers.settings import parse_arguments as parse_answer_arguments
from noisefit.base.errors import InputError
from noisefit.base.settings import fields_of
from noisefit.run.settings import GROUPS, Settings, build_parser, parse_arguments

REQUIRED = ["--model", "m", "--train_data", "t.csv"]


def test_the_published_programs_defaults_are_kept():
    args = parse_arguments(REQUIRED)
    published = dict(
        output_model="output_model", batch_size=4, epochs=5, learning_rate=5e-5, noise_std=0.1,
        lambda_consistency=0.1, snr_format="Largest", num_noise_layers=3, hybrid_loss_alpha=0.5,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    assert args.max_steps == -1  # published: 1000, which ended long trainings early and without a word


def test_every_flag_says_what_it_does():
    text = build_parser().format_help()
    for field in (field for cls in GROUPS.values() for field in fields_of(cls)):
        assert f"--{field.name} " in text and len(field.rule.help) > 5
    assert "%(" not in text and "==SUPPRESS==" not in text and "(default: 0.25 0.5 1 1.5 2)" in " ".join(text.split())


ALIASED = [
    ("--model_name_or_path m --train-data t", {}),
    ("--model m --train_data t --output_dir o --num_train_epochs 2", dict(output_model="o", epochs=2)),
    ("--model=m --train_file=t --per-device-train-batch-size=3", dict(batch_size=3)),
    ("--model m --train_data t --lora_target_modules q_proj v_proj", dict(target_modules=["q_proj", "v_proj"])),
    ("--model m --train_data t --load_in_4bit", dict(quantization="4bit")),
    ("--model m --train_data t --load_in_8bit=True --load_in_4bit=False", dict(quantization="8bit")),
    ("--model m --train_data t --gradient_checkpointing True", dict(gradient_checkpointing=True)),
    ("--model m --train_data t --gradient-checkpointing", dict(gradient_checkpointing=True)),
    ("--model m --train_data t --full_finetune false", {}),
    ("--model m --train_data t --full_finetune --no-full-finetune", {}),
]


@pytest.mark.parametrize(("line", "expected"), ALIASED)
def test_names_that_users_of_transformers_type_are_accepted(line, expected, tmp_path):
    assert parse_arguments(line.split()) == Settings(model="m", train_data="t", **expected)


def test_so_are_they_in_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\ntrain-data: t\nnum_train_epochs: 2\nload_in_4bit: true\n")
    expected = Settings(model="m", train_data="t", epochs=2, quantization="4bit")
    assert parse_arguments(["--config", str(file)]) == expected
    file.write_text("model: m\ntrain_data: t\nepochs: 2\nnum_train_epochs: 3\n")
    with pytest.raises(InputError, match="line 4: epochs is given a second time"):
        parse_arguments(["--config", str(file)])


def test_settings_of_a_program_are_checked_as_those_of_a_command_line_are():
    settings = Settings(model=Path("m"), train_data="t", learning_rate=1, auto_scale_factors=[2, 0.5, 2])
    assert settings.model == "m" and settings.auto_scale_factors == [0.5, 2.0] and type(settings.learning_rate) is float
    for values, message in [
        (dict(noise_std=-1), "--noise_std: '-1' is not a number from 0"),
        (dict(epochs=2.5), "--epochs: '2.5' is not a whole number"),
        (dict(epochs=True), "--epochs: 'True' is not a whole number"),
        (dict(snr_format="largest"), "--snr_format: invalid choice: 'largest'"),
        (dict(full_finetune="perhaps"), "--full_finetune: 'perhaps' is not true or false"),
        (dict(full_finetune=True, quantization="4bit"), "cannot train quantized"),
        (dict(noise_policy="auto", num_noise_layers=2), "--num_noise_layers goes with"),
        (dict(train_data="x\udcff"), "--train_data: x.udcff: not UTF-8 text"),
        (dict(prompt_date="yesterday"), "--prompt_date: 'yesterday' is no date"),
        (dict(model=""), "--model is required"),
    ]:
        with pytest.raises(InputError, match=message):
            Settings(**dict(model="m", train_data="t") | values)
    with pytest.raises(TypeError, match="noise_stdd"):
        Settings(model="m", train_data="t", noise_stdd=1)
    with pytest.raises(FrozenInstanceError):
        settings.epochs = 3


def test_a_record_of_the_settings_gives_them_again(tmp_path):
    settings = Settings(model="m", train_data="t", target_modules=["a", "b"], full_finetune=True, run_name="null")
    file = tmp_path / "noisefit_config.json"
    file.write_text(json.dumps({"noisefit_version": "0", **settings.record()}, indent=2))
    assert parse_arguments(["--config", str(file)]) == settings


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
    ("--lr 1", "did you mean --learning_rate?"),
    ("--bf16", "did you mean accelerate launch --mixed_precision bf16?"),
    ("--gradient_checkpointing maybe", "'maybe' is not true or false"),
    ("--noise-stdd 1", "did you mean --noise_std?"),
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
    assert parse_arguments([*REQUIRED, "--target_modules", "all-linear"]).target_modules == ["all-linear"]


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


@pytest.mark.parametrize(
    ("words", "quantization"),
    [("--load_in_4bit", "4bit"), ("--load_in_4bit True", "4bit"), ("--load-in-8bit=yes", "8bit"),
     ("--load_in_4bit false", "none")],
)  # fmt: skip
def test_switches_of_other_programs_are_values_of_ours(words, quantization):
    found = parse_arguments(["--model=m", "--train_data=d", *words.split(), "--epochs=2"])
    assert (found.quantization, found.epochs) == (quantization, 2)
    with pytest.raises(InputError, match="--load_in_4bit: 'maybe' is not true or false"):
        parse_arguments(["--model=m", "--train_data=d", "--load_in_4bit", "maybe"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("quantization: none\nload_in_4bit: true\n", "line 2: quantization is given a second time"),
     ("no_gradient_checkpointing: true\n", "instead of no_gradient_checkpointing write gradient_checkpointing: false")],
)  # fmt: skip
def test_a_file_cannot_say_one_thing_in_two_ways(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        parse_arguments(["--model=m", "--train_data=d", f"--config={tmp_path / 'c.yaml'}"])


@pytest.mark.parametrize("policy", ["snr", "auto", "file.json"])
def test_the_record_of_any_run_repeats_it(policy, tmp_path):
    settings = Settings(model="m", train_data="d.csv", noise_policy=policy, epochs=3)
    (tmp_path / "c.json").write_text(json.dumps({"noisefit_version": "1"} | settings.record()))
    assert parse_arguments([f"--config={tmp_path / 'c.json'}"]) == settings
    other = parse_arguments([f"--config={tmp_path / 'c.json'}", "--noise_policy=auto", "--seed=5"])
    assert (other.noise_policy, other.seed, other.epochs) == ("auto", 5, 3)


def test_a_hint_names_a_flag_of_the_program_alone():
    with pytest.raises(InputError, match=r"did you mean --learning_rate\?"):
        parse_arguments(["--model=m", "--train_data=d", "--lr=1"])
    with pytest.raises(InputError, match=r"did you mean --save_steps 0\?"):
        parse_arguments(["--model=m", "--train_data=d", "--save_only_model=1"])
    with pytest.raises(InputError) as raised:
        parse_answer_arguments(["--model_id=m", "--input_csv=q", "--lr=1"])
    assert "--learning_rate" not in str(raised.value)
