"""Nothing of a user's is lost: what lies in an output folder and no run wrote is there afterwards, byte for byte."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from running import PROCESSES, in_process, metrics_of, run, start, wait
from test_kills import die_at
from tiny_folder import tiny_folder

from noisefit.base.errors import InputError
from noisefit.base.files import alone_in
from noisefit.run.file_record import RECORD
from noisefit.run.output_folder import SCRATCH, OutputFolder

pytestmark = pytest.mark.slow

FAST = dict(learning_rate=1e-2, max_steps=2, save_steps=1, logging_steps=1)
# What the programs of before, and others, call their files: nothing that a run writes.
OTHERS = ("vocab.csv", "tokenizer_notes.txt", "added_tokens.json", "merges.txt", "previous_run/model.safetensors",
          "previous_run.tmp/notes", "saving.tmp/a", "checkpoint-1.tmp/a", "checkpoint-9.removed.tmp",
          "metrics.jsonl.tmp", "noisefit_config.json.tmp", "model-00001-of-00002.bin", "checkpoint-notes/a", "run.log",
          ".noisefit_files.json.tmp")  # fmt: skip


def put(folder: Path, names=OTHERS) -> dict[Path, bytes]:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"mine: {name}".encode())
    return {folder / name: f"mine: {name}".encode() for name in names}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_there(mine: dict[Path, bytes]) -> None:
    for path, content in mine.items():
        assert path.read_bytes() == content, path


@pytest.fixture(scope="module")
def finished(llama_folder, tmp_path_factory):
    """A run that wrote everything that a run can write: `(its data, its output)`."""
    folder = tmp_path_factory.mktemp("finished")
    data = folder / "questions.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i}.\n" for i in range(24)))
    flags = FAST | dict(
        noise_policy="auto", auto_calib_batches=1, eval_data=data, unknown_rows="weight", unknown_below=-1
    )
    run(llama_folder, data, folder / "out", **flags)
    return data, folder / "out"


@pytest.fixture
def mine(finished, tmp_path):
    """Its data, and a copy of the output to go on with."""
    data, out = finished
    shutil.copytree(out, tmp_path / "out")
    return data, tmp_path / "out"


def test_what_is_in_no_run_s_way_is_left_alone(llama_folder, finished, tmp_path):
    data, out = finished[0], tmp_path / "out"
    others = put(out, [*OTHERS, "checkpoint-7/adapter_model.safetensors", "checkpoint-7/trainer_state.json"])
    with pytest.raises(InputError, match="already holds checkpoint-7 of another run"):
        run(llama_folder, data, out, **FAST)
    flags = FAST | dict(save_total_limit=1)
    run(llama_folder, data, out, **flags, overwrite_output=True)
    assert_there(others)
    assert (out / "checkpoint-2").exists() and not (out / "checkpoint-1").exists()
    run(llama_folder, data, out, **flags | dict(max_steps=3), resume_from_checkpoint="latest")
    assert_there(others)
    assert not (out / "checkpoint-2").exists()
    # Now a model is to be set aside, where somebody's folder is.
    with pytest.raises(InputError, match="/previous_run is not of such a run, and --overwrite_output needs"):
        run(llama_folder, data, out, **flags, overwrite_output=True)
    assert_there(others)
    os.rename(out / "previous_run", out / "my_run")
    others = {Path(str(path).replace("previous_run/", "my_run/")): content for path, content in others.items()}
    run(llama_folder, data, out, **flags, overwrite_output=True, seed=1)
    assert_there(others)
    assert not (out / "previous_run").exists()


def test_a_run_writes_down_what_it_wrote(finished):
    out = finished[1]
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {RECORD}
    record = json.loads((out / RECORD).read_text())["files"]
    listed = {name for name in record if not name.endswith("/")}
    listed |= {folder + name for folder, names in record.items() if folder.endswith("/") for name in names}
    assert written == listed
    assert [name for name, entry in record.items() if entry is None] == []


def names_of(finished) -> list[str]:
    return sorted(path.name for path in finished[1].iterdir())


@pytest.mark.parametrize("flags", [{}, dict(overwrite_output=True), dict(resume_from_checkpoint="auto")], ids=str)
def test_what_has_a_name_that_a_run_needs_is_refused_each_alone(flags, llama_folder, finished, tmp_path):
    names = [name for name in names_of(finished) if not name.startswith("checkpoint-")]
    for name in [*names, "model.safetensors", "model.safetensors.index.json", "config.json", f"{SCRATCH}/a"]:
        out = tmp_path / name.replace("/", "-")
        others = put(out, [name])
        with pytest.raises(InputError, match=r"that is not of such a run|keeps its list|own folder"):
            run(llama_folder, finished[0], out, **FAST, **flags)
        assert contents(out) == others


@pytest.mark.parametrize("flags", [{}, dict(overwrite_output=True), dict(resume_from_checkpoint="auto")], ids=str)
def test_a_folder_full_of_them_is_refused_whole(flags, llama_folder, finished, tmp_path):
    out = tmp_path / "out"
    put(out, [name for name in names_of(finished) if not name.startswith("checkpoint-")])
    others = put(out)
    before = contents(out)
    with pytest.raises(InputError):
        run(llama_folder, finished[0], out, **FAST, **flags)
    assert contents(out) == before
    assert_there(others)


CHANGED = ["README.md", "adapter_model.safetensors", "tokenizer.json", "layer_snr.json", "metrics.jsonl"]


@pytest.mark.parametrize("name", CHANGED)
def test_what_somebody_changed_is_theirs(name, llama_folder, mine):
    data, out = mine
    (out / name).write_bytes(b"edited" + (out / name).read_bytes())
    before = contents(out)
    for flags in (dict(overwrite_output=True), dict(resume_from_checkpoint="latest")):
        with pytest.raises(InputError, match=f"holds a {name} that is not of such a run, or was changed"):
            run(llama_folder, data, out, **FAST | dict(max_steps=3), **flags)
        assert contents(out) == before


def test_a_name_that_a_run_could_have_used_and_did_not_is_theirs(llama_folder, finished, tmp_path):
    data, out = finished[0], tmp_path / "out"
    run(llama_folder, data, out, **FAST)
    others = put(out, ["eval_metrics.jsonl"])
    for flags in (dict(overwrite_output=True), dict(resume_from_checkpoint="latest")):
        with pytest.raises(InputError, match=r"holds a eval_metrics\.jsonl that is not of such a run"):
            run(llama_folder, data, out, **FAST | dict(max_steps=3), **flags)
        assert_there(others)


def test_what_somebody_changed_in_our_folders_stays(llama_folder, mine):
    data, out = mine
    changed = out / "checkpoint-1" / "adapter_config.json"
    changed.write_text("mine")
    run(llama_folder, data, out, **FAST, overwrite_output=True, seed=1)
    kept = out / "checkpoint-1.kept-1"
    assert [path.name for path in kept.iterdir()] == [changed.name] and (kept / changed.name).read_text() == "mine"


def test_what_somebody_puts_into_folders_of_our_folders_stays(tmp_path):
    with OutputFolder(tmp_path / "out") as output:
        output.start()
        for _ in range(2):  # the second replaces the first
            with output.staging("checkpoint-1") as staged:
                (staged / "templates").mkdir()
                (staged / "templates" / "tool.jinja").write_text("ours")
                output.place_folder(staged, "checkpoint-1")
            others = put(tmp_path / "out", ["checkpoint-1/templates/mine.jinja"])
        output.remove_folder(tmp_path / "out" / "checkpoint-1")
    assert_there(others)
    assert not (tmp_path / "out" / "checkpoint-1" / "templates" / "tool.jinja").exists()
    assert (tmp_path / "out" / "checkpoint-1.kept-1" / "templates" / "mine.jinja").exists()


def test_a_model_that_a_killed_run_was_to_replace_needs_the_flag_again(llama_folder, mine):
    data, out = mine
    with OutputFolder(out) as output:  # what the killed one had done
        output.start()
        output.set_aside()
    before = contents(out)
    with pytest.raises(InputError, match="already holds previous_run of another run"):
        run(llama_folder, data, out, **FAST, seed=1)
    assert contents(out) == before
    run(llama_folder, data, out, **FAST, seed=1, overwrite_output=True)
    assert not (out / "previous_run").exists()


def test_a_run_that_goes_on_from_another_output_s_checkpoint_overwrites_nothing(llama_folder, mine):
    data, out = mine
    run(llama_folder, data, out / "inner", **FAST, seed=1)
    before = contents(out)
    with pytest.raises(InputError, match=r"already holds adapter_model\.safetensors of another run"):
        run(llama_folder, data, out, **FAST, seed=1, resume_from_checkpoint=out / "inner" / "checkpoint-1")
    assert contents(out) == before


def test_what_somebody_puts_into_our_folders_stays(llama_folder, mine):
    data, out = mine
    others = put(out, ["checkpoint-1/notes.txt", "checkpoint-2/best.csv"])
    run(llama_folder, data, out, **FAST, overwrite_output=True, save_total_limit=1, seed=1)
    # What was ours in these folders is gone, and the new run's checkpoints have their names.
    others = {path.parent.with_name(f"{path.parent.name}.kept-1") / path.name: text for path, text in others.items()}
    assert_there(others)
    assert [sorted(os.listdir(path.parent)) for path in others] == [["notes.txt"], ["best.csv"]]
    assert json.loads((out / "checkpoint-2" / "checkpoint.json").read_text())["run"]["seed"] == 1


def test_what_somebody_puts_there_while_a_run_goes_on_gets_another_name(llama_folder, finished, tmp_path, capsys):
    out = tmp_path / "out"
    with OutputFolder(out) as output:
        output.start()
        others = put(out, ["README.md", "layer_snr.json", "checkpoint-1/a"])
        output.write_json("layer_snr.json", {"snr": []})
        with output.staging("model") as staged:
            (staged / "README.md").write_text("ours")
            output.move_in(staged)
        with output.staging("checkpoint-1") as staged:
            (staged / "checkpoint.json").write_text("{}")
            output.place_folder(staged, "checkpoint-1")
    assert (out / "README.md").read_text() == "ours" and json.loads((out / "layer_snr.json").read_text()) == {"snr": []}
    kept = {Path(str(path).replace(name, f"{name}.kept-1")): content
            for path, content in others.items() for name in [path.relative_to(out).parts[0]]}  # fmt: skip
    assert_there(kept)
    assert capsys.readouterr().err.count("is not of this run, which needs the name: it is ") == 3
    assert not (out / SCRATCH).exists()


def test_a_foreign_checkpoint_of_a_name_that_the_run_will_need_is_refused(llama_folder, finished, tmp_path):
    out = tmp_path / "out"
    others = put(out, ["checkpoint-2/trainer_state.json"])
    with pytest.raises(InputError, match="checkpoint-2 is not of such a run, which will save one of that name"):
        run(llama_folder, finished[0], out, **FAST, overwrite_output=True)
    assert contents(out) == others


def test_a_file_of_a_checkpoint_s_name_is_refused(llama_folder, finished, tmp_path):
    others = put(tmp_path / "out", ["checkpoint-2"])
    with pytest.raises(InputError, match="checkpoint-2 is not of such a run, which will save one of that name"):
        run(llama_folder, finished[0], tmp_path / "out", **FAST)
    assert contents(tmp_path / "out") == others


def test_a_base_in_what_the_run_replaces_is_refused(llama_folder, finished, tmp_path):
    data, out = finished[0], tmp_path / "own"
    run(llama_folder, data, out, **FAST, full_finetune=True)
    before = contents(out)
    for model in (out / "checkpoint-1", out / "checkpoint-2"):
        with pytest.raises(InputError, match=r"--model .*checkpoint-\d lies in --output_model"):
            run(model, data, out, **FAST, overwrite_output=True)
    (tmp_path / "link").symlink_to(out / "checkpoint-1")
    with pytest.raises(InputError, match="lies in --output_model"):
        run(tmp_path / "link", data, out, **FAST, overwrite_output=True)
    (tmp_path / "links").mkdir()
    for path in filter(Path.is_file, out.iterdir()):
        (tmp_path / "links" / path.name).symlink_to(path)
    with pytest.raises(InputError, match="lies in --output_model"):
        run(tmp_path / "links", data, out, **FAST, overwrite_output=True)
    assert contents(out) == before


def test_the_lock_is_had_before_the_first_check(llama_folder, finished, tmp_path):
    """A run that starts slowly does not find its folder empty and then wipe what a quick one finished there."""
    out = tmp_path / "out"
    with alone_in(out):
        [second] = start(llama_folder, tmp_path / "missing.csv", out, log=tmp_path / "log")
        assert wait([second]) == [2]
    said = (tmp_path / "log").read_text()
    assert "another run is writing there" in said and "missing.csv" not in said
    assert not out.exists()  # it was made for the lock, and is empty


def test_a_run_with_its_own_policy_file_is_resumed(llama_folder, mine):
    data, out = mine
    flags = FAST | dict(noise_policy=out / "noise_policy.json", eval_data=data)
    run(llama_folder, data, out.with_name("new"), **flags)
    again = flags | dict(noise_policy=out.with_name("new") / "noise_policy.json", max_steps=3)
    assert len(run(llama_folder, data, out.with_name("new"), **again, resume_from_checkpoint="latest")) == 3


def test_all_may_read_what_the_folder_s_owner_lets_them_read(finished):
    usual = finished[0].stat().st_mode
    assert {path.stat().st_mode for path in finished[1].rglob("*") if path.is_file()} == {usual}


# --- Killed at each act of replacing a model --------------------------------------------------------------------------


def set_aside_and_die(argument: tuple) -> None:
    out, n = argument
    die_at(n, out)
    output = OutputFolder(out)
    output.start()
    output.set_aside()
    os._exit(0)


def test_killed_at_each_act_of_setting_a_model_aside_nothing_is_lost(llama_folder, finished, tmp_path):
    whole = finished[1]
    model = {name: (whole / name).read_bytes() for name in ("adapter_model.safetensors", "tokenizer.json", "README.md")}
    n, status = 0, -9
    while status == -9:
        n += 1
        out = tmp_path / str(n)
        shutil.copytree(whole, out)
        others = put(out, ["vocab.csv", "checkpoint-1/notes.txt"])
        process = PROCESSES.Process(target=in_process, args=(set_aside_and_die, (str(out), n), {}, f"{out}.log"))
        process.start()
        [status] = wait([process])
        for _ in range(2):  # the next run, and one after that
            output = OutputFolder(out)
            output.start()
            output.set_aside()
            assert {name: (out / "previous_run" / name).read_bytes() for name in model} == model, n
            assert_there(others)
        assert not (out / SCRATCH).exists() or not any((out / SCRATCH).iterdir())
        shutil.rmtree(out)
    assert status == 0 and n > 20


@pytest.mark.parametrize("has_record", [False, True])
def test_killed_at_each_act_of_a_run_s_start_and_end_the_folder_is_free_for_the_next(has_record, tmp_path):
    n, status = 0, None
    while status != 0:
        n += 1
        out = tmp_path / str(n)
        if has_record:  # of a run that ended, which has no scratch folder
            write_notes(OutputFolder(out), "before")
        child = os.fork()
        if child == 0:
            try:
                die_at(n, out)
                write_notes(OutputFolder(out), "new")
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), n
        output = OutputFolder(out)
        assert output.foreign([f"{SCRATCH}/", "notes"]) == [], n
        write_notes(output, "again")
        assert sorted(path.name for path in out.iterdir()) == [RECORD, "notes"], n
        assert (out / "notes").read_text() == "again", n
    assert n > 10


def write_notes(output: OutputFolder, text: str) -> None:
    with output:
        output.start()
        output.write_text("notes", text)


def test_a_model_folder_as_output_is_refused(finished, tmp_path):
    model = tiny_folder(tmp_path / "model")
    before = contents(model)
    with pytest.raises(InputError, match="own folder"):
        run(model, finished[0], model, **FAST, overwrite_output=True)
    (tmp_path / "other").mkdir()
    shutil.copytree(model, tmp_path / "copy")
    with pytest.raises(InputError, match="not of such a run"):
        run(model, finished[0], tmp_path / "copy", **FAST, overwrite_output=True)
    assert contents(model) == before and metrics_of(finished[1])
