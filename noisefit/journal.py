"""Answers on disk as they come: a run that is killed goes on where it stopped, and the final CSV appears whole."""

from __future__ import annotations

import csv
import json
import os
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from noisefit.errors import InputError
from noisefit.files import write_json

Answers = dict[tuple[int, int], str]
"""`(index of the prompt, round)` to the answer."""


def default_output(args: Namespace) -> str:
    """The adapter's folder name, or the base model's, and `_answers.csv`."""
    return f"{Path(args.model_path or args.model_id).resolve().name}_answers.csv"


def check_answers_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise `InputError` where the final CSV exists already, is the input, or cannot be written. Writes nothing."""
    if output.suffix.lower() != ".csv":
        raise InputError(f"--output_csv {output}: expected a name that ends in .csv")
    if output.is_dir():
        raise InputError(f"--output_csv {output}: a folder, expected a file name")
    if output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"--output_csv {output} is the input itself; choose another name")
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
        self._counted: dict[Path, tuple[int, int]] = {}

    def check(self) -> None:
        """Raise `InputError` where something else, or another run's answers, are in the way. Writes nothing."""
        if not self.folder.exists():
            return
        try:
            before = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
            differing = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        except (OSError, ValueError, TypeError, AttributeError):
            raise InputError(
                f"{self.folder} is in the way: it is not an unfinished run's folder; rename or remove it"
            ) from None
        if differing:
            raise InputError(
                f"{self.folder} holds answers of an unfinished run with other settings ({', '.join(differing)}); "
                "remove it, or give that run's settings to go on with it"
            )

    def start(self) -> None:
        """Make the folder, settings and all, under another name first. The main process calls it."""
        if not self.folder.exists():
            beside = self.folder.with_name(self.folder.name + f".{os.getpid()}")
            beside.mkdir()
            write_json(beside / "settings.json", self.settings)
            os.replace(beside, self.folder)

    def read(self, wanted: Collection[tuple[int, int]]) -> Answers:
        """The answers of all processes so far to `wanted`. A line that a kill cut short is not counted."""
        return self._read(sorted(self.folder.glob("process-*.jsonl")), wanted)

    def read_own(self, wanted: Collection[tuple[int, int]]) -> Answers:
        """This process's answers so far."""
        return self._read([self.path] if self.path.exists() else [], wanted)

    def _read(self, paths: Iterable[Path], wanted: Collection[tuple[int, int]]) -> Answers:
        answers: Answers = {}
        for path in paths:
            for line in path.read_bytes().split(b"\n")[:-1]:  # the last piece has no line end: it is empty, or cut
                try:
                    index, round_number, text = json.loads(line)
                except (ValueError, TypeError):
                    continue  # a cut line that a later run ended
                if isinstance(text, str) and (index, round_number) in wanted:
                    answers[index, round_number] = text
        return answers

    def append(self, answers: Iterable[tuple[int, int, str]]) -> None:
        """Add answers to this process's file."""
        lines = "".join(json.dumps(answer) + "\n" for answer in answers)
        with self.path.open("ab") as file:
            # A line that a kill cut short is ended first, or the next one would be lost with it.
            file.write(b"\n" * _ends_within_a_line(self.path) + lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def count(self) -> int:
        """How many lines all processes have written; each byte is read once."""
        for path in self.folder.glob("process-*.jsonl"):
            seen, lines = self._counted.get(path, (0, 0))
            with path.open("rb") as file:
                file.seek(seen)
                new = file.read()
            self._counted[path] = (seen + len(new), lines + new.count(b"\n"))
        return sum(lines for _, lines in self._counted.values())

    def remove(self) -> None:
        """Remove our files and the folder, once the output stands."""
        for path in (*self.folder.glob("process-*.jsonl"), self.folder / "settings.json"):
            path.unlink(missing_ok=True)
        self.folder.rmdir()


def write_answers(output: Path, records: Sequence[Mapping[str, Any]], answers: Answers, rounds: int) -> None:
    """Write the final CSV, whole or not at all: the input's columns, `generated_response`, `round`.

    Args:
        output: where; the way there is through the journal's folder.
        records: the prompts' rows, in the input's order.
        answers: one for every row and round.
        rounds: how many; those of one prompt stand together, numbered from 1.
    """
    columns = [*dict.fromkeys(name for record in records for name in record), "generated_response", "round"]
    beside = output.with_name(output.name + ".partial") / "answers.tmp"
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
