"""Processes that share no disk give the file of one, go on from what lies on any of them, and end together."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from running import run_generate, start_program, wait, words
from tiny_folder import tiny_folder

import generate
from noisefit.answers.disks import first_on_its_disk
from noisefit.answers.loading import SAMPLE_BYTES, SAMPLES, sampled_digest
from noisefit.answers.settings import parse_arguments
from noisefit.base.errors import InputError
from noisefit.base.meeting import apart

FLAGS = dict(model_id="model", input_csv="asked.csv", output_csv="out.csv", max_new_tokens=40, rounds=3, batch_size=1)


def on_its_own_disk(argv: list[str]) -> None:
    """Each process sees another folder under the same relative names, as the machines of a launch do."""
    os.chdir(os.environ["DISKS"].split(":")[int(os.environ["RANK"])])
    run_generate(argv)


def start_on(disks: list[Path], log: Path, **flags: object) -> list:
    log.unlink(missing_ok=True)
    return start_program(on_its_own_disk, words(**FLAGS | flags), log, 2, {"DISKS": ":".join(map(str, disks))})


@pytest.fixture
def disks(tmp_path):
    """Two folders with copies of the same model and questions, of other times."""
    made = [tmp_path / "disk 0", tmp_path / "disk 1"]
    tiny_folder(made[0] / "model")
    (made[0] / "asked.csv").write_text("prompt\n" + "".join(f"{'Why ' * (i % 4)}is {i}?\n" for i in range(13)))
    shutil.copytree(made[0], made[1])  # copytree keeps times, so they are set
    for path in made[1].rglob("*"):
        os.utime(path, (1, 1))
    return made


@pytest.mark.slow
def test_what_lies_on_either_disk_counts_and_one_file_is_written(disks, tmp_path, monkeypatch):
    monkeypatch.chdir(disks[0])
    generate.generate(parse_arguments(words(**FLAGS | dict(output_csv="whole.csv"))))
    expected = (disks[0] / "whole.csv").read_bytes()
    log = tmp_path / "log"
    journals = [disk / "out.csv.partial" / f"process-{rank}.jsonl" for rank, disk in enumerate(disks)]
    started = start_on(disks, log)
    while any(process.is_alive() for process in started) and min(map(lines_in, journals)) < 3:
        time.sleep(0.005)
    for process in started:
        process.kill()
    assert -signal.SIGKILL in wait(started), log.read_text()
    there = sum(map(lines_in, journals))
    # The launch may number its machines otherwise; another file of that name on one of them is left alone.
    (disks[0] / "out.csv").write_text("mine")
    assert wait(start_on(disks[::-1], log)) == [0, 0], log.read_text()
    assert f"{there} answers are there already" in log.read_text() and "processes: 2" in log.read_text()
    assert (disks[1] / "out.csv").read_bytes() == expected and (disks[0] / "out.csv").read_text() == "mine"
    assert not any((disk / "out.csv.partial").exists() for disk in disks)


@pytest.mark.slow
def test_another_file_on_one_of_the_disks_ends_all_in_one_line(disks, tmp_path):
    with (disks[1] / "asked.csv").open("a") as file:
        file.write("Who?\n")
    log = tmp_path / "log"
    processes = start_on(disks, log)
    assert wait(processes) == [2, 2]
    said = [line for line in log.read_text().splitlines() if "error: " in line]
    assert len(set(said)) == 1 and "error: process 1, on " in said[0], said
    assert "another input, tokens than process 0" in said[0] and "Traceback" not in log.read_text()
    assert all({path.name for path in disk.iterdir()} == {"asked.csv", "model"} for disk in disks)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_mark_that_a_kill_left_is_no_reason_to_refuse(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / f".noisefit_launch-{'0a' * 16}").touch()
    (folder / ".noisefit_launch-notes").touch()  # somebody else's
    with first_on_its_disk(folder) as first:
        assert first and [path.name for path in folder.iterdir()] == [".noisefit_launch-notes"]


def test_an_error_is_raised_as_it_is_where_a_process_is_alone():
    for error in (InputError("a"), OSError(28, "full"), KeyError("b")):
        with pytest.raises(type(error)), apart("reading"):
            raise error


def test_a_copy_of_a_file_has_its_digest_and_a_change_anywhere_another(tmp_path):
    path, copy = tmp_path / "a", tmp_path / "b"
    content = bytearray(os.urandom(3 * SAMPLE_BYTES + 7))
    path.write_bytes(content)
    copy.write_bytes(content)
    os.utime(copy, (1, 1))
    assert sampled_digest(path) == sampled_digest(copy)
    for at in (0, SAMPLE_BYTES, 2 * SAMPLE_BYTES + 5, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        copy.write_bytes(changed)
        assert sampled_digest(copy) != sampled_digest(path)
    large = tmp_path / "large"  # a file with holes: what is between the samples is not read
    with large.open("wb") as file:
        file.truncate(4 * SAMPLES * SAMPLE_BYTES)
    before = sampled_digest(large)
    with large.open("r+b") as file:
        file.seek(4 * SAMPLE_BYTES * 7)
        file.write(b"x")
    assert sampled_digest(large) != before
