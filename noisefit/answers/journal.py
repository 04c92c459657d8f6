"""Answers on disk as they come: a run that is killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from noisefit.answers.disks import first_on_its_disk, gathered
from noisefit.answers.jobs import Answer, Answered
from noisefit.base.errors import InputError
from noisefit.base.files import append_whole, check_regular, sync_file, write_json
from noisefit.base.meeting import apart

SETTINGS, PROCESSES = "settings.json", "processes"

Answers = dict[tuple[int, int], Answer]
"""`(index of the prompt, round)` to the answer."""


@contextmanager
def alone_with(output: Path) -> Iterator[bool]:
    """Keep an output to this launch: the first process on each disk has the folder of the unfinished answers to itself.

    All processes enter it. A launch that ends before its first answer leaves nothing there.

    Yields:
        Whether this process is the first on its disk.

    Raises:
        InputError: the folder is a file, its name is too long, or another launch writes there.
    """
    folder = partial_folder(output)
    with apart(f"looking at {folder}"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"{folder} is in the way: it is not an unfinished run's folder; rename or remove it")
    with first_on_its_disk(folder) as first:
        begins = not os.path.lexists(folder / SETTINGS)
        try:
            yield first
        finally:
            if begins and first and not _has_answers(folder):
                with suppress(OSError, InputError):
                    if Journal(output, 0).unfinished() is not None:  # settings, and ours
                        (folder / SETTINGS).unlink()


def partial_folder(output: Path) -> Path:
    """Where the answers of an unfinished run are."""
    return output.with_name(output.name + ".partial")


class Journal:
    """The finished answers of an unfinished run, in a folder beside its output: a file of JSON lines a process.

    Where the processes of a launch do not share a disk, each disk has such a folder, and the first process on it looks
    after it: what is said of "the first" below is for these, of which the main process is one.

    Args:
        output: the final file's path.
        process_index: this process's, which writes a file of its own.
        first: whether it is the first on its disk, as `alone_with` says.
    """

    def __init__(self, output: Path, process_index: int, first: bool = True):
        self.first = first
        self.folder = partial_folder(output)
        self.path = self.folder / f"process-{process_index}.jsonl"
        self._paths: list[Path] = []  # of all processes, of this launch and those before; the first knows them
        self._counted: dict[Path, tuple[int, int]] = {}

    def unfinished(self) -> dict[str, Any] | None:
        """The settings of an unfinished run; `None` where there is none.

        Raises:
            InputError: something else is in the way.
        """
        try:
            if not any(self.folder.iterdir()):
                return None
            check_regular(self.folder / SETTINGS)
            content: dict[str, Any] = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
            if type(content[PROCESSES]) is not int or not 0 < content[PROCESSES] < 10**6:
                raise ValueError(PROCESSES)
            return content
        except FileNotFoundError as error:
            if not self.folder.exists():
                return None
            problem: Exception = error
        except (OSError, ValueError, TypeError, KeyError, RecursionError, InputError) as error:
            problem = error
        raise InputError(
            f"{self.folder} is in the way: it is not an unfinished run's folder; rename or remove it"
        ) from problem

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise `InputError` where another run's answers are in the way of the first. Writes nothing.

        Args:
            settings: all that determines an answer. Answers of other settings are not taken over.
        """
        before = self.unfinished() if self.first else None
        if before is None or not _has_answers(self.folder):
            return
        names = {**before, **settings}.keys() - {PROCESSES}
        if differing := [name for name in names if before.get(name) != settings.get(name)]:
            raise InputError(
                f"{self.folder} holds answers of an unfinished run with other settings "
                f"({', '.join(sorted(differing))}); remove it, or give that run's settings to go on with it"
            )

    def start(self, settings: Mapping[str, Any], num_processes: int) -> None:
        """Write the settings, and how many files are ours. The first does."""
        if not self.first:
            return
        before = self.unfinished() or {PROCESSES: 0}
        count = max(before[PROCESSES], num_processes)
        self._paths = [self.folder / f"process-{i}.jsonl" for i in range(count)]
        content = dict(settings) | {PROCESSES: count}
        if content != before:
            write_json(self.folder / SETTINGS, content)

    def prompt_date(self, given: str | None = None) -> str:
        """The date for a chat template that asks: of what is there already, else the one given, else now.

        All processes call it, and get the same.
        """
        with apart(f"reading {self.folder}"):
            before = self.unfinished() or {}
        now = given or datetime.now().isoformat(timespec="seconds")
        found = gathered((before.get("prompt_date"), now))
        return str(next((date for date, _ in found if date is not None), found[0][1]))

    def read(self, wanted: Collection[tuple[int, int]]) -> Answers:
        """The answers so far to `wanted` on the disks that this process is the first on. A line that a kill cut short
        is not counted."""
        return self._read(self._paths, wanted)

    def read_all(self, wanted: Collection[tuple[int, int]]) -> Answers:
        """The answers so far to `wanted`, of all disks. All processes call it, and get the same."""
        with apart(f"reading {self.folder}"):
            own = self.read(wanted)
        return {key: answer for part in gathered(own) for key, answer in part.items()}

    def read_own(self, wanted: Collection[tuple[int, int]]) -> Answers:
        """This process's answers so far."""
        return self._read([self.path], wanted)

    def _read(self, paths: Iterable[Path], wanted: Collection[tuple[int, int]]) -> Answers:
        answers: Answers = {}
        for path in paths:
            check_regular(path)
            if not path.exists():
                continue
            for line in path.read_bytes().split(b"\n")[:-1]:  # the last piece has no line end: it is empty, or cut
                try:
                    index, round_number, facts = json.loads(line)
                    answer = Answer(*facts)
                except (ValueError, TypeError, RecursionError):
                    continue  # a cut line that a later run ended
                if _is_whole(answer) and (index, round_number) in wanted:
                    answers[index, round_number] = answer
        return answers

    def append(self, answers: Iterable[Answered]) -> None:
        """Add answers to this process's file, all of them or none."""
        rows = [[index, number, [part for part in answer if part is not None]] for index, number, answer in answers]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        # A line that a kill cut short is ended first, or the next one would be lost with it.
        append_whole(self.path, b"\n" * _ends_within_a_line(self.path) + lines.encode())
        sync_file(self.path)

    def count(self) -> int:
        """How many lines all processes have written; each byte is read once."""
        for path in filter(Path.exists, self._paths):
            seen, lines = self._counted.get(path, (0, 0))
            with path.open("rb") as file:
                file.seek(seen)
                new = file.read()
            self._counted[path] = (seen + len(new), lines + new.count(b"\n"))
        return sum(lines for _, lines in self._counted.values())

    def remove(self) -> None:
        """Remove our files and the folder, once the output stands; the first does. What somebody else put there
        stays."""
        if not self.first:
            return
        for path in (*self._paths, self.folder / SETTINGS):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _is_whole(answer: Answer) -> bool:
    """Whether an answer that was read has what it must: each of its cells is text, or a number."""
    figures = (answer.logprob, answer.noise_logprob_mean, answer.noise_logprob_spread)
    numbers = all(type(figure) is float for figure in figures if figure is not None) and answer.logprob is not None
    return isinstance(answer.text, str) and numbers and type(answer.tokens) is int


def _has_answers(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob("process-*.jsonl"))


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
