"""The rows of a run: in a list where their file is small, and where it is large in files that all processes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from noisefit.base.errors import InputError
from noisefit.base.meeting import apart
from noisefit.inputs.prompts import Example, PromptSettings, tell_of_length, tell_of_turns, tokenize_rows
from noisefit.inputs.stored import StoredExamples, cache_folder, is_large
from noisefit.inputs.storing import store
from noisefit.inputs.tables import Row, load_rows, tell_of_skipped


def list_rows(path: str | None, always: bool = False) -> list[Row] | None:
    """The rows of a file, none without a file; `None` where it is large, unless they are needed `always`.

    Raises:
        InputError: as `read_rows`.
    """
    return None if is_large(path) and not always else load_rows(path)


def make_rows(
    path: str | None, rows: list[Row] | None, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings,
    vocabulary: int, stop_ids: Iterable[int], accelerator: Accelerator,
) -> Sequence[Example]:  # fmt: skip
    """The tokenized rows of a file, with lines about those that cannot be used. All processes call it.

    Where they are not listed, one process a machine tokenizes them, unless that was done before, and the others wait.

    Args:
        path: the file; `None` for none.
        rows: as `list_rows` gave them.
        tokenizer, settings, vocabulary, stop_ids: as for `noisefit.inputs.prompts.usable_examples`.
        accelerator: of the run.

    Raises:
        InputError: as `tokenize_rows`, and as `store`; or the machines have different files.
    """
    if path is None:
        return []
    name = None
    with apart(f"tokenizing {path}"):
        if rows is None and accelerator.is_local_main_process:
            name = store(path, tokenizer, settings, vocabulary, stop_ids)
    views = gather_object([(rows is None, name)])
    names = {name for _, name in views if name is not None}
    if len({large for large, _ in views}) > 1 or len(names) > 1:
        raise InputError(f"{path}: it is not the same for all processes; all machines need the same file and libraries")
    if rows is not None:
        return tokenize_rows(tokenizer, rows, path, settings, vocabulary, stop_ids)
    with apart(f"reading the tokenized rows of {path}"):
        examples = StoredExamples(cache_folder() / names.pop())
    tell_of_skipped(path, examples.skipped)
    tell_of_turns(path, tokenizer, examples.apart)
    tell_of_length(path, settings.max_length, examples.dropped, examples.cut, any_left=len(examples) > 0)
    return examples
