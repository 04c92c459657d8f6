"""The final file of answers, CSV or JSON Lines, and beside it the settings that they were drawn with."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from noisefit import __version__
from noisefit.answers.jobs import Abstention, Answer
from noisefit.answers.journal import Answers, partial_folder
from noisefit.answers.repeating import versions
from noisefit.answers.settings import ABOUT, VERSION, AnswerSettings
from noisefit.base.errors import InputError
from noisefit.base.files import check_regular, sync_file, writing
from noisefit.inputs.tables import BEFORE_ABSTAINING, csv_cells, csv_writer

SUFFIXES = (".csv", ".jsonl")


def default_output(settings: AnswerSettings) -> str:
    """The adapter's folder name, or the base model's, and `_answers.csv`."""
    return f"{Path(settings.model_path or str(settings.model_id)).resolve().name}_answers.csv"


def check_answers_output(output: Path, source: Path, overwrite: bool, flag: str = "--output_csv",
                         *suffixes: str) -> None:  # fmt: skip
    """Raise `InputError` where the final file exists already, is the input, or cannot be written. Writes nothing.

    `flag` is the one that names it, for the line; `suffixes` what its name may end in, by default `.csv`.
    """
    if output.suffix.lower() not in (suffixes or (".csv",)):
        raise InputError(f"{flag} {output}: expected a name that ends in {' or '.join(suffixes or ('.csv',))}")
    if output.is_dir():
        raise InputError(f"{flag} {output}: a folder, expected a file name")
    if output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"{flag} {output} is the input itself; choose another name")
    if output.exists() and not overwrite:
        raise InputError(f"{flag} {output} exists; choose another name, or give --overwrite_output")
    check_regular(output, f"{flag} ")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{flag} {output}: no folder {output.parent}")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {output}: no permission to write in {output.absolute().parent}")


def settings_file(output: Path) -> Path:
    """Where the settings of the answers are: beside them."""
    return output.with_name(f"{output.name}.settings.json")


def check_settings_output(output: Path, overwrite: bool) -> None:
    """Raise `InputError` where what stands beside the answers is not theirs, or has none. Writes nothing.

    A kill between the two files leaves the settings and the unfinished answers, from which the same command goes on.
    """
    path = settings_file(output)
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"--output_csv {output}: the name is too long for {path.name} beside it") from None
        return  # whoever writes there says so
    check_regular(path)
    content: Any = None
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get(ABOUT), dict) or VERSION not in content:
        raise InputError(f"{path} is in the way: it does not hold the settings of answers, which are to stand there; "
                         "rename or remove it")  # fmt: skip
    if not output.exists() and not overwrite and not partial_folder(output).exists():
        raise InputError(f"{path} is there without its answers; remove it, or give --overwrite_output")


def settings_record(settings: AnswerSettings, about: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the answers: all flags, which as `--config` repeat them, and what else is known of them.

    Args:
        settings: of the answers, without a token.
        about: facts that are no flags, by name.
    """
    return {VERSION: __version__, ABOUT: {**about, "versions": versions()}} | settings.record()


def write_answers(
    output: Path, records: Sequence[Mapping[str, Any]], answers: Answers, rounds: int,
    abstention: Abstention | None = None, settings: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the final file, whole or not at all: the input's columns, `generated_response`, `round`, and the figures.

    In JSON Lines what an input's cell is stays what it is, a number a number, and what a row lacks it lacks.

    Args:
        output: where; a name that ends in `.jsonl` gets JSON Lines, any other a CSV.
        records: the prompts' rows, in the input's order.
        answers: one for every row and round.
        rounds: how many; those of one prompt stand together, numbered from 1.
        abstention: which answers are replaced, and by what.
        settings: written beside it, as JSON; `None`: nothing is.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for index, record in enumerate(records):
            for number in range(1, rounds + 1):
                yield {**record, **_cells(answers[index, number], number, abstention)}

    def write_csv(file: TextIO) -> None:
        columns = dict.fromkeys(name for record in records for name in record)
        writer = csv_writer(file, columns | dict.fromkeys(_cells(answers[0, 1], 1, abstention)))
        writer.writeheader()
        writer.writerows(map(csv_cells, rows()))

    def write_json_lines(file: TextIO) -> None:
        file.writelines(json.dumps(json_value(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows())

    folder = partial_folder(output)
    with writing(output), _beside(folder / ".noisefit_answers.tmp") as new:
        _write(new, write_json_lines if output.suffix.lower() == ".jsonl" else write_csv)
        if settings is not None:
            with _beside(folder / ".noisefit_settings.tmp") as facts:
                _write(facts, lambda file: file.write(json.dumps(settings, indent=2) + "\n"))
                # First: who finds the answers finds what they were drawn with.
                os.replace(facts, settings_file(output))
        os.replace(new, output)


def json_value(value: Any) -> Any:
    """A cell as JSON can hold it: dates and the like as text, as a CSV has them; no number where it is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return str(value)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file on its way; what is left of it goes."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[TextIO], object]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write(file)
    sync_file(path)


def _cells(answer: Answer, number: int, abstention: Abstention | None) -> dict[str, Any]:
    """What the file says of an answer, by column."""
    figures = {name: value for name, value in answer._asdict().items() if name != "text" and value is not None}
    if abstention is None:
        return {"generated_response": answer.text, "round": number} | figures
    text = abstention.refusal if abstention.replaces(answer) else answer.text
    return {"generated_response": text, "round": number} | figures | {BEFORE_ABSTAINING: answer.text}
