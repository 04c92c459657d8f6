"""A run's output folder, and the record of what runs wrote there. Whatever else lies in it is somebody's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from noisefit.base.errors import LocalError, notice
from noisefit.base.files import files_in, fingerprint, replacing, sync_folder, write_json, writing
from noisefit.run.checkpoint_files import STATE, list_checkpoints
from noisefit.run.file_record import RECORD, Entry, is_as_written, is_on_its_way, read_record, write_record
from noisefit.run.standing import drop_best

SCRATCH = ".noisefit_unfinished"  # a folder of what is being written; what a kill leaves in it, the next run removes
PREVIOUS = "previous_run"  # what --overwrite_output replaces, until it is replaced


class OutputFolder:
    """The folder, through which everything is written that a run leaves.

    `noisefit_files.json` lists each file's name before its first byte is written, and its size and digest once it is
    final. A run replaces and removes only what stands in that list and is as it was written. The main process alone
    calls what writes.

    Args:
        path: the folder; it need not exist.

    Raises:
        InputError: there is a record that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._entries = read_record(self.path / RECORD)
        self._started = False

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing but what is to stay; what was to grow is final now."""
        if self._started:
            with suppress(OSError, LocalError):
                _clear(self.path / SCRATCH)
                growing = [name for name in self._entries if self._entries[name] is None and not name.endswith("/")]
                written = [name for name in growing if os.path.lexists(self.path / name)]
                self._settle(*written)
                self._forget(f"{SCRATCH}/", *set(growing).difference(written))

    # --- What is whose -----------------------------------------------------------------------------------------------

    def is_own(self, name: str) -> bool:
        """Whether a run wrote what stands here under this name, and nobody changed it since. A folder's ends in `/`."""
        if name not in self._entries or name.endswith("/"):
            return name in self._entries
        return is_as_written(self.path / name, self._entries[name])

    def is_whole(self, folder: str) -> bool:
        """Whether a run wrote the folder of this name, and all its files are as they were then."""
        files: Any = self._entries.get(f"{folder}/")
        return bool(files) and all(is_as_written(self.path / folder / part, entry) for part, entry in files.items())

    def parts(self, folder: str) -> list[str]:
        """The files that a run wrote in the folder of this name, by their paths there."""
        files: Any = self._entries.get(f"{folder}/")
        return list(files or {})

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are taken by what no run wrote, or by what was changed since."""
        taken = [name for name in names if os.path.lexists(self.path / name) and not self.is_own(name)]
        return [name for name in taken if name != f"{SCRATCH}/" or not is_on_its_way(self.path / name)]

    def files(self) -> list[str]:
        """The names of the files here that runs wrote."""
        return [name for name in self._entries if not name.endswith("/") and os.path.lexists(self.path / name)]

    def changed(self) -> list[str]:
        """The names of the files that runs wrote here and that are links now, are missing, or were changed since."""
        files = {name: entry for name, entry in self._entries.items() if not name.endswith("/")}
        return [name for name, entry in files.items() if (self.path / name).is_symlink()
                or (entry is not None and not is_as_written(self.path / name, entry))]  # fmt: skip

    def holds_model(self) -> bool:
        """Whether a run's model is here, whole."""
        weights = [name for name in self._entries if name.endswith(".safetensors")]
        return bool(weights) and all((self.path / name).is_file() for name in weights)

    def holds_previous(self) -> bool:
        """Whether a model is set aside here, in place of which none was saved."""
        return f"{PREVIOUS}/" in self._entries and any((self.path / PREVIOUS).glob("*.safetensors"))

    def checkpoints(self) -> list[Path]:
        """The checkpoints here that runs wrote, in the order in which they were saved."""
        return [folder for folder in list_checkpoints(self.path) if f"{folder.name}/" in self._entries]

    # --- Writing -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the folder, and remove what a kill left unfinished in it."""
        self._started = True
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.expect(f"{SCRATCH}/")
            _clear(self.path / SCRATCH)

    def expect(self, *names: str) -> None:
        """Note what will be written, before it is."""
        self._note(dict.fromkeys(names))

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        with writing(self.path / name):
            self._make_room(name)
            with self._scratch() as scratch:
                write_json(self.path / name, content, scratch)
            self._settle(name)

    def write_text(self, name: str, content: str) -> None:
        """Write a text file, whole or not at all."""
        with writing(self.path / name):
            self._make_room(name)
            with self._scratch() as scratch, replacing(self.path / name, scratch) as beside:
                beside.write_bytes(content.encode())
            self._settle(name)

    def copy(self, source: Path, name: str) -> None:
        """Write a copy of a file that will grow."""
        self._make_room(name)
        with self._scratch() as scratch, replacing(self.path / name, scratch) as beside:
            shutil.copyfile(source, beside)

    def remove(self, name: str) -> None:
        """Remove a file, if a run wrote it."""
        if self.is_own(name):
            (self.path / name).unlink(missing_ok=True)
            self._forget(name)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A folder for files on their way: `move_in` or `place_folder` takes them from there. It goes at the end."""
        with self._scratch() as scratch:
            folder = scratch / name
            _clear(folder)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def move_in(self, staged: Path) -> None:
        """Move files here, weights last: a folder that holds them holds the rest too."""
        folders = [path for path in staged.iterdir() if path.is_dir()]  # some tokenizers have one
        for folder in folders:
            self.place_folder(folder, folder.name)
        paths = sorted(set(staged.iterdir()) - set(folders), key=lambda path: (path.suffix == ".safetensors", path))
        names = [path.name for path in paths]
        for name in names:
            self._make_room(name)
        for path in paths:
            os.replace(path, self.path / path.name)
        self._settle(*names)

    def place_folder(self, staged: Path, name: str) -> Path:
        """Give a folder its place and name, as a checkpoint's; one of the same name that a run wrote is replaced."""
        folder = self.path / name
        if f"{name}/" in self._entries and os.path.lexists(folder):
            self.remove_folder(folder)
        self._make_room(f"{name}/")
        self._note({f"{name}/": {part: fingerprint(staged / part) for part in files_in(staged)}})
        os.replace(staged, folder)
        sync_folder(self.path)
        return folder

    def remove_folder(self, folder: Path) -> None:
        """Remove what a run wrote of a folder: all of it, or all but what somebody else put there."""
        if folder.is_symlink():  # somebody has moved it to another disk; what it links to is theirs
            folder.unlink()
        else:
            entry: dict[str, Any] = dict(self._entries.get(f"{folder.name}/") or {})
            written = {name for name in entry if is_as_written(folder / name, entry[name])}
            if set(files_in(folder)) <= written:
                with self._scratch() as scratch:  # moved at once, so that a kill leaves no half of it
                    removed = scratch / f"removed-{folder.name}"
                    _clear(removed)
                    os.replace(folder, removed)
                    shutil.rmtree(removed)
            else:
                for part in sorted(written, key=lambda part: part != STATE):
                    (folder / part).unlink(missing_ok=True)
        self._forget(f"{folder.name}/")

    # --- What --overwrite_output replaces ----------------------------------------------------------------------------

    def foreign_in_previous(self) -> str | None:
        """What stands in the way of setting a model aside: the name of a file that no run wrote."""
        previous = self.path / PREVIOUS
        if not os.path.lexists(previous):
            return None
        if f"{PREVIOUS}/" not in self._entries or previous.is_symlink():
            return PREVIOUS
        known = {RECORD, *read_record(previous / RECORD)}
        return next((f"{PREVIOUS}/{path.name}" for path in previous.iterdir() if path.name not in known), None)

    def set_aside(self) -> None:
        """Move a run's model and records to `previous_run`; of a run without a whole model they are removed.

        A kill in the midst of it leaves a part in either place, and the next call goes on with that.
        """
        previous = self.path / PREVIOUS
        own = [name for name in self.files() if self.is_own(name)]
        if self.holds_model():
            self.drop_previous()
            self.expect(f"{PREVIOUS}/")
            previous.mkdir(exist_ok=True)
            with self._scratch() as scratch:
                write_record(previous / RECORD, {name: self._entries[name] for name in own}, scratch)
        waiting = read_record(previous / RECORD) if f"{PREVIOUS}/" in self._entries else {}
        # Weights first: from then on this folder holds no whole model, and the other one is to be made whole.
        for name in sorted(own, key=lambda name: not name.endswith(".safetensors")):
            if name in waiting and not os.path.lexists(previous / name):
                os.replace(self.path / name, previous / name)
            else:
                (self.path / name).unlink()
        for folder in self.checkpoints():
            self.remove_folder(folder)
        drop_best(self)
        self._forget(*own)

    def drop_previous(self) -> None:
        """Remove what was set aside, now that it is replaced; what somebody else put there stays."""
        previous = self.path / PREVIOUS
        if f"{PREVIOUS}/" not in self._entries:
            return
        if previous.is_dir() and not previous.is_symlink():
            aside = OutputFolder(previous)
            for name in aside.files():
                if aside.is_own(name):
                    (previous / name).unlink()
            (previous / RECORD).unlink(missing_ok=True)
            with suppress(OSError):
                previous.rmdir()
        self._forget(f"{PREVIOUS}/")

    # --- The record --------------------------------------------------------------------------------------------------

    def _settle(self, *names: str) -> None:
        self._note({name: fingerprint(self.path / name) for name in names})

    def _note(self, entries: Mapping[str, Entry]) -> None:
        if any(self._entries.get(name, ...) != entry for name, entry in entries.items()):
            self._entries |= entries
            self._save()

    def _forget(self, *names: str) -> None:
        kept = {name: entry for name, entry in self._entries.items() if name not in names}
        if kept != self._entries:
            self._entries = kept
            self._save()

    def _save(self) -> None:
        with self._scratch() as scratch:
            write_record(self.path / RECORD, self._entries, scratch)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        folder = self.path / SCRATCH
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            with suppress(OSError):  # something else is on its way there
                folder.rmdir()

    def _make_room(self, name: str) -> None:
        """Note a name that is about to be taken. What somebody put there while the run went on gets another one."""
        for taken in self.foreign([name]):
            path, number = self.path / taken, 1
            while os.path.lexists(kept := path.with_name(f"{path.name}.kept-{number}")):
                number += 1
            os.replace(path, kept)
            notice(f"{path} is not of this run, which needs the name: it is {kept.name} now")
        self.expect(name)


def _clear(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
