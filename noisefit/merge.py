"""Merge an adapter into its base model: a model of its own, which needs neither of the two.

    python -m noisefit.merge my_adapter --output my_model

The sum is formed in float32, and saved in the `--dtype` asked for. Its logits are compared with the adapter's, before
it is saved and after it is loaded back; how much of what the adapter does is lost in 16 bits is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from noisefit.answers.loading import (
    base_revision,
    context_length,
    find_base,
    load_answer_model,
    load_answer_tokenizer,
)
from noisefit.answers.merging import (
    ROUNDING,
    SHARE,
    change,
    check_kind,
    check_saved,
    logits_of,
    logits_without,
    merge_adapter,
    probes,
    round_weights,
    saved_dtype,
    size_of,
    write_merged,
)
from noisefit.answers.settings import AnswerSettings
from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path, add_token, without_token
from noisefit.base.errors import InputError, notice, one_line_errors
from noisefit.base.files import alone_in, sync_folder, writing
from noisefit.base.settings import add_flags, check_fields, setting
from noisefit.inputs.templates import prompt_text
from noisefit.run.card import merged_card
from noisefit.run.contradictions import check_hub
from noisefit.run.file_record import RECORD
from noisefit.run.hub import check_repository, push
from noisefit.run.output import RECORDS
from noisefit.run.output_folder import SCRATCH, OutputFolder
from noisefit.run.run_settings import HubSettings

SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)
LARGE, TOO_LARGE = 0.1, 0.5  # shares of what the adapter does that 16 bits lose: said, and refused unless asked for


@dataclass(frozen=True, kw_only=True)
class MergeFileSettings:
    """What goes in and what comes out."""

    output: str = setting(help="a new or empty folder for the merged model (required)", is_path=True)
    model_id: str | None = setting(
        None, "the base model: a folder, or a name on the hub; default: the one that the adapter records", is_path=True
    )
    model_revision: str | None = setting(
        None, "its branch, tag or commit on the hub; default: the one that the adapter records", metavar="REVISION"
    )
    dtype: str = setting(
        "auto", "of the saved weights; auto: the base model's; float32 loses nothing of a small adapter",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    max_shard_size: str | None = setting(
        None, "weights are split into files of this size; default: transformers' own", metavar="SIZE"
    )
    trust_remote_code: bool = setting(False, "run code that comes with the base model")


GROUPS: dict[str, type] = {"what goes in and what comes out": MergeFileSettings, "the hub": HubSettings}


@dataclass(frozen=True, kw_only=True)
class MergeSettings(HubSettings, MergeFileSettings):
    """All settings of a merge, checked; `adapter` is its folder.

    Raises:
        InputError: a value is out of its range, or a required one is missing.
    """

    adapter: str

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.output.strip():
            raise InputError("--output is required: a folder for the merged model")
        if self.max_shard_size is not None and not (
            SIZE.fullmatch(self.max_shard_size) and float(self.max_shard_size[:-2]) > 0
        ):
            raise InputError(f"--max_shard_size: {self.max_shard_size[:40]!r} is no size; expected one as 5GB")
        check_hub(self)

    @property
    def answers(self) -> AnswerSettings:
        """The adapter beside its base model in float32, as `generate.py` has it."""
        return AnswerSettings(
            model_path=self.adapter, model_id=self.model_id, model_revision=self.model_revision, input_csv="-",
            dtype="float32", no_merge=True, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip


def merge(settings: MergeSettings) -> None:
    """Merge as the settings say.

    Raises:
        InputError: something is not as it should be; nothing is left in the output folder then.
    """
    check_adapter(Path(settings.adapter))
    with empty_folder(Path(settings.output)) as output:
        with naming_adapter():
            base = find_base(settings.answers)
            dtype = saved_dtype(settings.answers, base, settings.dtype)
            tokenizer = load_answer_tokenizer(settings.answers, base)
            if tokenizer.chat_template:
                prompt_text(tokenizer, "Question?")  # a model whose template is broken is not saved
        notice(trained_beside(Path(settings.adapter)))
        check_repository(settings)
        lines = merge_into(output, settings, base, dtype, tokenizer)
        notice(*lines, f"{output.path} holds the merged model, its tokenizer and card")
        if settings.push_to_hub is not None:
            push(settings, output, RECORDS)


def merge_into(
    output: OutputFolder, settings: MergeSettings, base: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Load, merge, save, load back, and compare on the way.

    Returns:
        What was found, for the user.

    Raises:
        InputError: the merged model, or the saved one, is not the adapter on its base.
    """
    name = str(dtype).removeprefix("torch.")
    with naming_adapter():
        model: Any = load_answer_model(settings.answers, base, torch.device("cpu"))
    vocabulary = len(model.get_input_embeddings().weight)
    rows = probes(tokenizer, vocabulary, context_length(settings.answers, base))
    check_kind(model, settings.adapter)
    beside = logits_of(model, rows)
    effect = change(beside, logits_without(model, rows))
    size = size_of(beside)
    if not all(z.isfinite().all() for z in beside):
        raise InputError(f"{settings.adapter}: with this adapter logits are not finite numbers; there is nothing to "
                         "merge")  # fmt: skip
    merged = merge_adapter(model, settings.adapter)
    whole = logits_of(merged, rows)
    off = change(whole, beside)
    if not off.rms <= max(ROUNDING * size, SHARE * effect.rms):
        raise InputError(f"{settings.adapter}: merged, logits differ by up to {off.largest:.2g} from those with the "
                         f"adapter beside the weights, which changes them by up to {effect.largest:.2g}; keep it "
                         "beside them")  # fmt: skip
    lines = [f"merged in float32: logits differ from the adapter's by {off.largest:.2g} at most; it changes the base "
             f"model's by up to {effect.largest:.2g}"]  # fmt: skip
    round_weights(merged, dtype, keep=True)
    expected = whole if dtype == torch.float32 else logits_of(merged, rows)
    lost = change(expected, beside)
    if dtype != torch.float32:
        share = lost.rms / effect.rms if effect.rms else 0.0
        lines.append(what_is_lost(settings.dtype, name, lost.largest, share))
    round_weights(merged, dtype, keep=False)
    output.start()
    with writing(output.path), output.staging("model") as staged:
        write_merged(staged, merged, tokenizer, settings.max_shard_size)
        revision = base_revision(settings.answers, base)
        card = merged_card(
            settings.push_to_hub or output.path.resolve().name, base, revision, Path(settings.adapter), name, lines
        )
        (staged / "README.md").write_text(card, encoding="utf-8")
        record = Path(settings.adapter) / "noisefit_config.json"
        if record.is_file():
            shutil.copyfile(record, staged / record.name)
        del model, merged
        gc.collect()  # before the saved one is loaded: there is room for one
        try:
            check_saved(staged, expected, rows, tokenizer, dtype, ROUNDING * size, settings.trust_remote_code)
        except InputError as error:
            raise InputError(f"--output {output.path}: {error}; nothing is left there") from None
        sync_folder(staged)
        output.move_in(staged)
    return lines


def what_is_lost(asked: str, name: str, largest: float, share: float) -> str:
    """The line about what 16 bits lose. Raises `InputError` where that is most of it, and nobody asked for 16 bits."""
    line = (f"rounded to {name}: logits differ from the adapter's by {largest:.2g} at most, {share:.1%} of what the "
            "adapter does (root mean squares)")  # fmt: skip
    if share < LARGE:
        return line
    if share >= TOO_LARGE and asked == "auto":
        raise InputError(f"{line}: it would hardly be this adapter; give --dtype float32, or --dtype {name} to have it "
                         "all the same")  # fmt: skip
    return f"{line}: much of it is lost; --dtype float32 keeps it, and so does the adapter beside the weights"


def check_adapter(folder: Path) -> None:
    """Raise `InputError` where the folder cannot be an adapter's."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected an adapter's")
    if not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise InputError(f"{folder}: a whole model, as --full_finetune leaves it: there is nothing to merge, use it as "
                         "it is")  # fmt: skip


def trained_beside(folder: Path) -> str | None:
    """A line where an adapter was trained beside other weights than it is merged into."""
    try:
        bits = json.loads((folder / "noisefit_config.json").read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if bits in (None, "none"):
        return None
    return (f"{folder}: trained with --quantization {bits}; it is merged into the weights that those were made from, "
            "beside which it was not trained")  # fmt: skip


@contextmanager
def empty_folder(path: Path) -> Iterator[OutputFolder]:
    """A folder with nothing in it, to this process alone; after an error nothing is in it, and it goes if it was made.

    What a merge that was killed left unfinished there does not count, and is removed.

    Raises:
        InputError: it is not empty, or cannot be one.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(f"--output {path}: a link to a folder that does not exist")
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {path}: a file, expected a folder")
    with alone_in(path):
        unfinished = OutputFolder(path)  # outside of what is cleared up after: a list that is not ours stays
        try:
            with unfinished as output:
                others = sorted(entry.name for entry in path.iterdir() if entry.name not in (RECORD, SCRATCH))
                if others or output.foreign([f"{SCRATCH}/"]):
                    raise InputError(f"--output {path}: holds {(others or [SCRATCH])[0]}; expected a new or an empty "
                                     "folder")  # fmt: skip
                yield output
        finally:
            if [entry.name for entry in path.iterdir()] == [RECORD]:
                (path / RECORD).unlink()


@contextmanager
def naming_adapter() -> Iterator[None]:
    """Errors of `generate.py`'s loading name its flag for the adapter; here it has none."""
    try:
        yield
    except InputError as error:
        raise type(error)(str(error).replace("--model_path ", "").replace("; give --no_merge", "")) from None


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped."""
    parser = OneLineParser(
        prog="python -m noisefit.merge",
        description="Merge an adapter into its base model, check that it is the same, and save it.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=a_path, help="the adapter's folder")
    add_flags(parser, GROUPS)
    add_token(parser.add_argument_group("the token"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.merge"):
        given = without_token(vars(build_parser().parse_args(sys.argv[1:] if argv is None else argv)))
        merge(MergeSettings(**{"output": ""} | given))


if __name__ == "__main__":
    main()
