"""Trackers: several at once, each with the run's name, and none that fails costs the run or another tracker."""

import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from running import metrics_of, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noisefit.base.errors import InputError
from noisefit.run.run_settings import TRACKERS
from noisefit.run.settings import Settings
from noisefit.run.trackers import check_trackers, make_tracker, start_trackers

FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, max_steps=3, logging_steps=1)


class Failing:
    """A client that fails where it is told to."""

    requires_logging_directory = False
    made: list["Failing"]

    def __init__(self, title, **options):
        self.called, self.options = [], options
        self.made.append(self)

    def __getattr__(self, name):
        def act(*args, **options):
            self.called.append(name)
            if self.where == f"{name}{options.get('step', '')}":
                raise OSError(f"no network for {name}")

        return act


def losses_of(out):
    """The losses that TensorBoard has of a run, by step."""
    events = EventAccumulator(str(out / "noisefit"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


@pytest.mark.parametrize("where", ["start", "store_init_configuration", "log2", "finish"])
def test_one_that_fails_costs_a_line_and_not_the_run_nor_the_other(
    where, llama_folder, questions, tmp_path, monkeypatch, capfd
):
    client = type("Client", (Failing,), {"where": where, "made": []})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", client)
    lines = run(llama_folder, questions, tmp_path / "out", **FAST, report_to="wandb,tensorboard", run_name="a-name")
    said = capfd.readouterr().err
    how = {"log2": "failed at step 2", "finish": "failed at the end"}.get(where, "failed")
    assert said.count(f"--report_to wandb {how}, training goes on without it: no network for") == 1, said
    [tracker], last = client.made, where.rstrip("2")
    assert said.count("goes on without it") == 1 and tracker.options == {"name": "a-name"}
    assert tracker.called[-1] == last and tracker.called.count(last) == (2 if where == "log2" else 1)
    assert losses_of(tmp_path / "out") == pytest.approx({line["step"]: line["loss"] for line in lines})


def test_a_tracker_that_cannot_write_is_left_alone(llama_folder, questions, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "noisefit").write_text("a file where TensorBoard wants its folder")
    assert len(run(llama_folder, questions, tmp_path / "out", **FAST, report_to="tensorboard")) == 3
    assert "--report_to tensorboard failed, training goes on without it: " in capfd.readouterr().err


def test_every_tracker_of_accelerate_is_known_and_gets_the_name_of_the_run(tmp_path):
    assert TRACKERS.keys() == LOGGER_TYPE_TO_CLASS.keys()
    settings = Settings(model="m", train_data="t", output_model=str(tmp_path / "a-run"), report_to=list(TRACKERS))
    named = {}
    for name in TRACKERS.keys() - {"comet_ml"}:  # whose client makes the name's own object
        tracker = make_tracker(name, settings, resumed=True)
        assert tracker.name == name
        own = vars(tracker)
        named[name] = "a-run" in (own.get("run_name"), *own.get("init_kwargs", {}).values())
    assert {name for name, has in named.items() if not has} == {"tensorboard", "dvclive"}  # in the run's own folder
    assert make_tracker("dvclive", settings, False).init_kwargs["dir"] == str(tmp_path / "a-run" / "dvclive")
    for resumed, way in ((True, "allow"), (False, "never")):
        assert make_tracker("trackio", settings, resumed).init_kwargs["resume"] == way


def test_the_main_process_alone_has_trackers(tmp_path):
    settings = Settings(model="m", train_data="t", output_model=str(tmp_path), report_to="tensorboard")
    accelerator = SimpleNamespace(is_main_process=False, trackers=["of another run"])
    start_trackers(accelerator, settings)
    assert accelerator.trackers == [] and not list(tmp_path.iterdir())


def test_names_are_checked_before_anything_is_loaded(llama_folder, questions, tmp_path, monkeypatch):
    assert Settings(model="m", train_data="t").report_to == ["none"]
    check_trackers(["none"])
    with pytest.raises(InputError, match=r"--report_to none wandb: none is none; leave it or the others out"):
        check_trackers(["none", "wandb"])
    with pytest.raises(InputError, match=r"invalid choice: 'all' \(choose from none, wandb, tensorboard, trackio"):
        Settings(model="m", train_data="t", report_to="all")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "comet_ml" else "there")
    with pytest.raises(InputError, match="--report_to comet_ml: not installed; pip install comet-ml"):
        run("no-such-model", questions, tmp_path / "out", report_to="tensorboard,comet_ml")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="not installed")
def test_trackio_is_local_and_goes_on_with_a_resumed_run(llama_folder, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.utils
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    flags = FAST | dict(report_to="trackio", save_steps=2, lr_scheduler_type="constant")
    run(llama_folder, questions, tmp_path / "out", **flags | dict(max_steps=2))
    run(llama_folder, questions, tmp_path / "out", **flags, resume_from_checkpoint="latest")
    assert SQLiteStorage.get_runs("noisefit") == ["out"]
    logged = {row["step"]: row["loss"] for row in SQLiteStorage.get_logs("noisefit", "out") if "loss" in row}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in metrics_of(tmp_path / "out")})
    assert json.loads((tmp_path / "out" / "noisefit_config.json").read_text())["report_to"] == ["trackio"]
    assert "HF_TOKEN" not in os.environ
