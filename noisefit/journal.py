"""Answers on disk as they come: a run that is killed goes on where it stopped, and the final CSV appears whole."""

from __future__ import annotations

import csv
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from noisefit.errors import InputError
from noisefit.outputs import write_json

Answers = dict[tuple[int, int], str]
"""`(index of the prompt, round)` to the answer."""


def default_output(args: Namespace) -> str:
    """The adapter's folder name, or the base model's, and `_answers.csv`."""
    return f"{Path(args.model_path or args.model_id).resolve().name}_answers.csv"


def check_answers_output(output: Path, overwrite: bool) -> None:
    """Raise `InputError` where the final CSV exists already or cannot be written. Writes nothing."""
    if output.is_dir():
        raise InputError(f"--output_csv {output}: a folder, expected a file name")
    if output.exists() and not overwrite:
        raise InputError(f"--output_csv {output} exists; choose another name, or give --overwrite_output")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output_csv {output}: no folder {output.parent}")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise InputError(f"--output_csv {output}: no permission to write in {output.absolute().parent}")


class Journal:
    """The finished answers of an unfinished run, in a folder beside its output: a file of JSON lines a process.

    Args:
        output: the final CSV's path.
        settings: all that determines an answer. Answers of other settings are not taken over.
        process_index: this process's, which writes a file of its own.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], process_index: int):
        self.folder = output.with_name(output.name + ".partial")
        self.settings = dict(settings)
        self.path = self.folder / f"process-{process_index}.jsonl"

    def check(self) -> None:
        """Raise `InputError` where another run's answers are in the way. Writes nothing."""
        before = self._settings_there()
        if before is not None and before != self.settings:
            names = [n for n in {**before, **self.settings} if before.get(n) != self.settings.get(n)]
            raise InputError(
                f"{self.folder} holds answers of an unfinished run with other settings ({', '.join(names)}); "
                "remove it, or give that run's settings to go on with it"
            )

    def start(self) -> None:
        """Make the folder. The main process calls it, before any other writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._settings_there() is None:
            write_json(self.folder / "settings.json", self.settings)

    def read(self) -> Answers:
        """The answers of all processes so far. A line that a kill cut short is not counted."""
        return self._read(sorted(self.folder.glob("process-*.jsonl")))

    def _read(self, paths: Iterable[Path]) -> Answers:
        answers: Answers = {}
        for path in paths:
            for line in path.read_bytes().split(b"\n")[:-1]:  # the last piece has no line end: it is empty, or cut
                try:
                    index, round_number, text = json.loads(line)
                except ValueError:
                    continue  # a cut line that a later run appended to
                answers[index, round_number] = text
        return answers

    def read_own(self) -> Answers:
        """This process's answers so far."""
        return self._read([self.path]) if self.path.exists() else {}

    def append(self, answers: Iterable[tuple[int, int, str]]) -> None:
        """Add answers to this process's file."""
        lines = "".join(json.dumps(answer) + "\n" for answer in answers)
        with self.path.open("ab") as file:
            # A line that a kill cut short is ended first, or the next one would be lost with it.
            file.write(b"\n" * _ends_within_a_line(self.path) + lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def count(self) -> int:
        """How many answers all processes have written."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("process-*.jsonl"))

    def remove(self) -> None:
        """Remove the folder, once the output stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _settings_there(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}


def write_answers(output: Path, records: Sequence[Mapping[str, Any]], answers: Answers, rounds: int) -> None:
    """Write the final CSV, whole or not at all: the input's columns, `generated_response`, `round`.

    Args:
        output: where.
        records: the prompts' rows, in the input's order.
        answers: one for every row and round.
        rounds: how many; those of one prompt stand together, numbered from 1.
    """
    columns = [*dict.fromkeys(name for record in records for name in record), "generated_response", "round"]
    beside = output.with_name(output.name + ".tmp")
    with beside.open("w", encoding="utf-8", newline="") as file:
        # Every cell is quoted: Python before 3.13 leaves a lone carriage return bare, and readers cut the row there.
        writer = csv.DictWriter(file, columns, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        for index, record in enumerate(records):
            for number in range(1, rounds + 1):
                writer.writerow({**record, "generated_response": answers[index, number], "round": number})
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, output)


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
