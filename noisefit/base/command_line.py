"""Command lines: errors of one line, the names that other programs have for our flags, flags from a file."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from noisefit.base.errors import InputError
from noisefit.base.files import read_text
from noisefit.base.settings import boolean, refuse_bytes

# Names under which users of transformers, TRL and PEFT know our flags. They are accepted.
ALIASES = {
    "model_name_or_path": "model",
    "output_dir": "output_model",
    "overwrite_output_dir": "overwrite_output",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "lora_target_modules": "target_modules",
    "lora_rank": "lora_r",
    "max_seq_length": "max_length",
    "eval_dataset": "eval_data",
    "train_file": "train_data",
    "dataset_name": "train_data",
    "dataset_config_name": "dataset_config",
    "dataset_revision": "revision",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_data_split",
}
SWITCHES = {"load_in_4bit": ("quantization", "4bit"), "load_in_8bit": ("quantization", "8bit")}
# What has no flag of its own, and what does the same.
HINTS = {
    "lr": "--learning_rate",
    "bf16": "accelerate launch --mixed_precision bf16",
    "fp16": "accelerate launch --mixed_precision fp16",
    "dataset": "--train_data",
    "data": "--train_data",
    "warmup_steps": "--warmup_ratio",
    "save_strategy": "--save_steps",
    "eval_strategy": "--eval_steps",
    "save_only_model": "--save_steps 0",
    "num_processes": "accelerate launch --num_processes",
    "alpha": "--hybrid_loss_alpha",
    "lambda": "--lambda_consistency",
    "num_return_sequences": "--rounds",
}


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage, and name the flag that was meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's, of words that are text, with our names in place of other programs'."""
        words = sys.argv[1:] if args is None else list(args)
        refuse_bytes(words)
        return super().parse_known_args([part for word in words for part in self._our_words(word)], namespace)

    def _our_words(self, word: str) -> list[str]:
        if not word.startswith("--") or word in self._option_string_actions:
            return [word]
        flag, equals, value = word.partition("=")
        name = canonical(flag.removeprefix("--"))
        return [f"--{name}{equals}{value}"] if f"--{name}" in self._option_string_actions else [word]

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            message += nearest(message.split()[2].partition("=")[0], self)
        raise InputError(message.removeprefix("argument "))


class _Switch(argparse.Action):
    """Another program's switch: a value of one of our flags, if it is on."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            on = boolean(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        if on:
            setattr(namespace, self.dest, SWITCHES[self.option_strings[0].removeprefix("--")][1])


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add `SWITCHES` to a parser that has their flags."""
    for name, (flag, _) in SWITCHES.items():
        parser.add_argument(f"--{name}", dest=flag, nargs="?", const="true", action=_Switch, help=argparse.SUPPRESS,
                            default=argparse.SUPPRESS)  # fmt: skip


class HelpFormatter(argparse.HelpFormatter):
    """Shows each flag with what it does beside it, as wide as the terminal is."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)


def canonical(name: str) -> str:
    """Our name for a flag: underscores for hyphens, and other programs' names replaced."""
    name = name.replace("-", "_")
    return ALIASES.get(name, name)


def nearest(flag: str, parser: argparse.ArgumentParser) -> str:
    """What was likely meant by a flag that is none."""
    name = canonical(flag.removeprefix("--"))
    hint = HINTS.get(name, "")
    if hint.partition(" ")[0] in (*parser._option_string_actions, "accelerate"):
        return f"; did you mean {hint}?"
    close = difflib.get_close_matches(f"--{name}", parser._option_string_actions, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help"


def a_path(text: str) -> str:
    """A flag's value that names a file, a folder, or a model on the hub; `~` is a home wherever it is written."""
    return os.path.expanduser(text)


def flags_from_file(
    file: Path, parser: argparse.ArgumentParser, passed_over: Sequence[str] = (),
    others: Mapping[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """A YAML or JSON mapping of flag names to values, as words of a command line.

    A value is what is written there: a date, or a number beyond all bounds, is text for the flag to judge.

    Args:
        file: to be read.
        parser: knows the flags.
        passed_over: further names that may stand there and are no flags.
        others: flags of other programs, and what a file that has one is the settings of.

    Raises:
        InputError: the file cannot be read, is not such a mapping, is another program's, or names an unknown flag or
            one flag twice.
    """
    where = f"--config {file}"
    try:
        root = yaml.compose(read_text(file, "--config "), yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {error}") from None
    except (RecursionError, ValueError) as error:  # lists in lists in lists; an escaped half of a surrogate
        raise InputError(f"{where}: not YAML: {type(error).__name__}: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{where}: expected lines such as 'epochs: 3'")
    for key, _ in root.value:
        if isinstance(key, yaml.ScalarNode) and (program := (others or {}).get(canonical(key.value))):
            raise InputError(f"{where}: it has {key.value}, so it is the settings of {program}; expected flags of "
                             f"{parser.prog}")  # fmt: skip
    words: list[str] = []
    seen: set[str] = set()
    for key, value in root.value:
        given, line = key.value if isinstance(key, yaml.ScalarNode) else "a list", key.start_mark.line + 1
        name = canonical(given)
        if given in passed_over:
            continue
        action = parser._option_string_actions.get(f"--{name}")
        if action is None or name in ("config", "help"):
            raise InputError(f"{where}: no flag is called {given!r}{nearest(f'--{given}', parser)}")
        if action.nargs == 0:
            raise InputError(f"{where}: line {line}: instead of {name} write {action.dest}: false")
        if action.dest in seen:
            raise InputError(f"{where}: line {line}: {action.dest} is given a second time; leave one of them out")
        seen.add(action.dest)
        is_list = isinstance(value, yaml.SequenceNode)
        parts = value.value if is_list else [value]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise InputError(f"{where}: line {line}: {name}: expected a value, or a list of values")
        texts = [part.value for part in parts]
        if is_list and any(text.startswith("-") for text in texts):
            raise InputError(f"{where}: line {line}: {name}: a value begins with '-', as flags do")
        if is_list:
            words.extend([f"--{name}", *texts])
        elif value.tag != _NULL:  # an empty value leaves the default
            words.append(f"--{name}={texts[0]}")
    return words


_NULL = "tag:yaml.org,2002:null"


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], passed_over: Sequence[str] = (),
    others: Mapping[str, str] | None = None,
) -> Mapping[str, Any]:  # fmt: skip
    """The flags that are given: those of the command line over those of the file that `--config` names.

    Raises:
        InputError: a flag is unknown or its value out of range; of a file's flags the line names the file.
    """
    given = vars(parser.parse_args(argv))
    if (file := given.pop("config", None)) is None:
        return given
    words = flags_from_file(Path(file), parser, passed_over, others)
    try:
        from_file = vars(parser.parse_args(words))
    except InputError as error:
        raise InputError(f"--config {file}: {error}") from None
    return from_file | given


def add_token(group: Any) -> None:
    """Add `--hf_token` to a parser, or a group of its flags."""
    help_text = "token for the hub; safer in the environment as HF_TOKEN: others on the machine see a running " \
                "program's command line. It is never written anywhere"  # fmt: skip
    group.add_argument("--hf_token", help=help_text)


def without_token(given: dict[str, Any]) -> dict[str, Any]:
    """The flags but for the token: that goes to the environment, where huggingface_hub looks for it, and out of the
    recorded command line."""
    if token := given.pop("hf_token", None):
        os.environ["HF_TOKEN"] = token
        sys.argv = [word.replace(token, "***") for word in sys.argv]
    return given
