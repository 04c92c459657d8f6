"""Accelerate's trackers, by name and several at once: each gets what `metrics.jsonl` gets, in its own way.

A tracker is a record more, and no reason to lose a run: one that fails costs a line, and is left alone from then on,
while training and the others go on. It is the main process alone that has any.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from noisefit.base.errors import InputError, in_a_line, notice
from noisefit.run.run_settings import NO_TRACKER, TRACKERS
from noisefit.run.settings import Settings

PROJECT = "noisefit"


def check_trackers(names: list[str]) -> None:
    """Raise `InputError` where `--report_to` names a tracker that is not installed, or none beside another one."""
    if NO_TRACKER in names and len(set(names)) > 1:
        raise InputError(f"--report_to {' '.join(names)}: {NO_TRACKER} is none; leave it or the others out")
    for name in names:
        if name != NO_TRACKER and importlib.util.find_spec(name) is None:
            raise InputError(f"--report_to {name}: not installed; pip install {TRACKERS[name]}")


def start_trackers(accelerator: Accelerator, settings: Settings, resumed: bool = False) -> None:
    """Start what `--report_to` asks for, on the main process, where `accelerator.log` will find it.

    Args:
        accelerator: of the run.
        settings: of the run. The token is none of them.
        resumed: whether the run goes on from a checkpoint; trackio then goes on with the run of the same name, and the
            others begin another one.
    """
    accelerator.trackers = []
    names = dict.fromkeys(name for name in settings.report_to if name != NO_TRACKER)
    if not accelerator.is_main_process:
        return
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.record().items()}
    for name in names:
        tracker = Tracker(name)
        tracker.begin(settings, plain, resumed)
        accelerator.trackers.append(tracker)


class Tracker:
    """One of accelerate's trackers, with what `Accelerator` asks of one.

    Args:
        name: of `TRACKERS`.
    """

    def __init__(self, name: str):
        self.name = name
        self.tracker: Any = None  # from its start until it fails

    def begin(self, settings: Settings, config: dict[str, Any], resumed: bool) -> None:
        """Start it, and give it the run's settings."""
        try:
            tracker: Any = make_tracker(self.name, settings, resumed)
            tracker.start()
            tracker.store_init_configuration(config)
            self.tracker = tracker
        except Exception as error:  # whatever a tracker's client raises: no network, no key, a full disk
            self._fail("failed", error)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """A line of metrics, numbers by their names."""
        if self.tracker is not None:
            if self.name == "trackio":  # which keeps the step itself, and warns of another
                values = {name: value for name, value in values.items() if name != "step"}
            try:
                self.tracker.log(values, step=step)
            except Exception as error:  # as in `begin`
                self._fail(f"failed at step {step}", error)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Answers to sampled prompts, where it has a place for texts: a table, or in TensorBoard a text."""
        try:
            if hasattr(self.tracker, "log_table"):
                rows = [list(sample.values()) for sample in samples]
                self.tracker.log_table("samples", list(samples[0]), rows, step=step)
            elif self.tracker is not None and self.name == "tensorboard":
                texts = [f"{sample['prompt']}\n\n> {sample['generated_response']}\n\n({sample['outcome']}; reference: "
                         f"{sample['response']})" for sample in samples]  # fmt: skip
                self.tracker.log({"samples": "\n\n---\n\n".join(texts)}, step=step)
        except Exception as error:  # as in `begin`
            self._fail(f"failed at step {step}", error)

    def finish(self) -> None:
        """The run is at its end."""
        if self.tracker is not None:
            try:
                self.tracker.finish()
            except Exception as error:  # as in `begin`; the model is saved
                self._fail("failed at the end", error)

    def _fail(self, how: str, error: Exception) -> None:
        self.tracker = None
        reason = in_a_line(error, 300)
        notice(f"--report_to {self.name} {how}, training goes on without it: {reason}")


def make_tracker(name: str, settings: Settings, resumed: bool) -> Any:
    """The tracker, not started, of the project `noisefit` and with the run's name, as its client has these."""
    run, output = settings.run_name or Path(settings.output_model).resolve().name, settings.output_model
    known: dict[str, dict[str, Any]] = {
        "wandb": {"name": run},
        "trackio": {"name": run, "resume": "allow" if resumed else "never"},
        "mlflow": {"run_name": run},
        "clearml": {"project_name": PROJECT, "task_name": run},
        "swanlab": {"experiment_name": run},
        "aim": {"experiment": PROJECT},
        # Else it removes what lies there, and writes to the repository that it is called in.
        "dvclive": {"dir": str(Path(output) / "dvclive"), "resume": True, "save_dvc_exp": False, "dvcyaml": None},
    }
    options = known.get(name, {})
    if name == "comet_ml":
        import comet_ml

        options = {"experiment_config": comet_ml.ExperimentConfig(name=run)}
    cls: Any = LOGGER_TYPE_TO_CLASS[name]
    title = run if name == "aim" else PROJECT  # what accelerate calls a project is the run there
    return cls(title, output, **options) if cls.requires_logging_directory else cls(title, **options)
