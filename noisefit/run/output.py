"""The output folder: what may be there before, and what a run leaves in it."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

import noisefit
from noisefit.base.errors import InputError, on_main_process
from noisefit.base.files import alone_in, sync_folder, write_json, writing
from noisefit.base.meeting import apart
from noisefit.base.settings import words_of
from noisefit.inputs.readers import column_names
from noisefit.method.policy import CALIBRATED, FROZEN, NoisePolicy
from noisefit.run.card import evaluation_of, model_card
from noisefit.run.checkpoint_files import SCORES, STATE, latest_whole, list_checkpoints, read_state
from noisefit.run.hub import push
from noisefit.run.left_out import ROWS
from noisefit.run.metrics import LINES
from noisefit.run.noise_policy import as_file
from noisefit.run.output_folder import PREVIOUS, SCRATCH, OutputFolder
from noisefit.run.run_settings import METRICS, KillSettings
from noisefit.run.settings import Settings
from noisefit.run.standing import BEST, Best, bring_best, copy_best, drop_best
from noisefit.run.weights import gather_weights, write_model

# Every name that a run may write, besides those of its tokenizer's files.
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "model.safetensors.index.json")
CONFIGURATIONS = ("config.json", "generation_config.json")  # of a whole model
CONFIG = "noisefit_config.json"
RECORDS = (CONFIG, "layer_snr.json", "noise_policy.json", SCORES, ROWS, *LINES)
CARD = ("README.md",)
CACHE = "teacher_cache"  # of --cache_teacher, a folder


@contextmanager
def open_output(settings: Settings) -> Iterator[OutputFolder]:
    """The output folder, to this run alone: nobody else writes there while it is open.

    Raises:
        InputError: it cannot be one, or another run has it.
    """
    _check_path(settings.output_model, settings.resume_from_checkpoint)
    with alone_in(Path(settings.output_model), on_main_process()), OutputFolder(settings.output_model) as output:
        yield output


def _check_path(output_model: str, wanted: str | None) -> None:
    output = Path(output_model)
    if not output_model.strip():
        raise InputError("--output_model is empty; give a folder")
    if wanted is not None:
        try:
            if not wanted.strip():
                raise ValueError("is empty; give a path, latest or auto")
            Path(wanted).resolve().exists()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long
            raise InputError(f"--resume_from_checkpoint {wanted[:200]}: {error}") from None
    try:
        if output.is_symlink() and not output.exists():
            raise InputError(f"--output_model {output}: a link to a folder that does not exist")
        existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    except OSError as error:  # a name too long, a folder that cannot be entered
        raise InputError(f"--output_model {output}: {error.strerror or error}") from None
    if not existing.is_dir():
        raise InputError(f"--output_model {output}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output_model {output}: no permission to write in {existing}")


def check_output(settings: Settings, output: OutputFolder) -> None:
    """Refuse an output folder that holds another run's model, or anything that the run would have to remove and that
    is not surely a run's own. Writes nothing.

    Raises:
        InputError: as said.
    """
    flag, path = f"--output_model {output.path}", output.path
    if os.path.isdir(settings.model) and path.exists() and path.samefile(settings.model):
        raise InputError(f"{flag} is the base model's own folder; choose another one")
    shards = [shard.name for shard in path.glob("model-*-of-*.safetensors")]
    kept = [*([f"{CACHE}/"] if settings.cache_teacher else []), *([f"{BEST}/"] if settings.keep_best else [])]
    _refuse_foreign(output, [*CARD, *RECORDS, *CONFIGURATIONS, *ADAPTER, *shards, f"{SCRATCH}/", *kept])
    held, checkpoints = [name for name in ADAPTER if (path / name).exists()], list_checkpoints(path)
    wanted = settings.resume_from_checkpoint
    resuming = wanted == "latest" or (wanted == "auto" and bool(checkpoints))
    resuming = resuming or (wanted is not None and _is_inside(Path(wanted), path))
    held += [PREVIOUS] if output.holds_previous() else []  # of a run that was to be replaced by one that was killed
    if (held or checkpoints) and not resuming and not settings.overwrite_output:
        what = held[0] if held else checkpoints[-1].name
        resume = ", or go on with it: --resume_from_checkpoint latest" if checkpoints else ""
        raise InputError(f"{flag} already holds {what} of another run; choose another folder, or give "
                         f"--overwrite_output{resume}")  # fmt: skip
    if not resuming:
        _check_replaced(settings.model, output, flag)


def check_tokenizer_names(tokenizer: PreTrainedTokenizerBase, output: OutputFolder) -> None:
    """The same for the names of the tokenizer's files, which it alone knows."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _refuse_foreign(output, [f"{path.name}/" if path.is_dir() else path.name for path in Path(folder).iterdir()])


def _refuse_foreign(output: OutputFolder, names: Iterable[str]) -> None:
    if others := output.foreign(names):
        raise InputError(f"--output_model {output.path} holds a {others[0]} that is not of such a run, or was changed "
                         "since the run wrote it; move it away, or choose another folder")  # fmt: skip


def _check_replaced(model_name: str, output: OutputFolder, flag: str) -> None:
    """Refuse where what the run replaces holds the base model, or where there is no place to set it aside."""
    goes = [*(folder.resolve() for folder in output.checkpoints()), (output.path / PREVIOUS).resolve()]
    goes += [(output.path / BEST).resolve()] if output.is_own(f"{BEST}/") else []
    model = Path(os.path.realpath(model_name))
    files = [Path(os.path.realpath(path)) for path in (model, *model.iterdir())] if model.is_dir() else []
    in_output = [path for path in files if path.parent == output.path.resolve() and output.is_own(path.name)]
    if in_output or any(folder in (path, *path.parents) for path in files for folder in goes):
        raise InputError(f"--model {model_name} lies in {flag}, which the run would replace; move it to a folder of "
                         "its own, or choose another output")  # fmt: skip
    if output.holds_model() and (taken := output.foreign_in_previous()):
        raise InputError(f"{flag}/{taken} is not of such a run, and --overwrite_output needs {PREVIOUS} for what it "
                         "replaces; move it away, or choose another folder")  # fmt: skip


def check_checkpoint_names(settings: KillSettings, output: OutputFolder, total_steps: int) -> None:
    """Refuse an output folder in which another program's checkpoint has the name of one that this run will save.

    Raises:
        InputError: as said.
    """
    due = (
        {total_steps, *range(settings.save_steps, total_steps + 1, settings.save_steps)}
        if settings.save_steps
        else set()
    )
    for path in set(output.path.glob("checkpoint-*")) - set(output.checkpoints()):
        step = path.name.removeprefix("checkpoint-")
        saved = step.isdecimal() and step.isascii() and step == str(int(step)) and int(step) in due
        if saved and not (settings.resume_from_checkpoint and (path / STATE).exists()):
            raise InputError(f"{path} is not of such a run, which will save one of that name; move it away, or "
                             "choose another --output_model")  # fmt: skip


def _is_inside(path: Path, folder: Path) -> bool:
    """Also where it is a link there to another disk, or one from elsewhere to there."""
    return folder.resolve() in (path.absolute().parent.resolve(), path.resolve().parent)


def start_output(
    accelerator: Accelerator, settings: Settings, output: OutputFolder, policy: NoisePolicy, checkpoint: Path | None,
    scores: str | None = None, rows: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Make the folder ready for a run, and write its settings and noise policy there. All processes call it.

    Args:
        accelerator: of the run.
        settings: of the run.
        output: its folder.
        policy: that the run begins with.
        checkpoint: the run goes on from it, and its records with it; `None`: it starts afresh. What another run left
            is set aside as `previous_run`, until this one is saved.
        scores: the content of `knowledge.csv`; `None` where the run goes by no probe.
        rows: the content of `rows.json`.

    Raises:
        LocalError: it cannot be written.
    """
    with apart("making the output folder ready") as is_main:
        if is_main:
            _start_output(settings, output, checkpoint, scores)
            if rows is not None:
                output.write_json(ROWS, rows)
            write_policy(output, policy)


def _start_output(settings: Settings, output: OutputFolder, checkpoint: Path | None, scores: str | None) -> None:
    output.start()
    with writing(output.path):
        if checkpoint is None or not _is_inside(checkpoint, output.path):
            output.set_aside()
        if checkpoint is not None:
            for name in LINES:
                if (checkpoint / name).exists():
                    output.copy(checkpoint / name, name)
                else:
                    output.remove(name)
        bring_best(output, checkpoint, read_state(checkpoint)["files"] if checkpoint is not None else ())
        output.expect(*LINES)
    if scores is not None:
        output.write_text(SCORES, scores)
    output.write_json(CONFIG, _config(settings))


def _config(settings: Settings) -> dict[str, Any]:
    return {"noisefit_version": noisefit.__version__} | settings.record()


def write_policy(output: OutputFolder, policy: NoisePolicy) -> None:
    """`layer_snr.json`: the SNR of every layer, the indices of those that get noise, and where they are frozen the base
    scales of all. Of a calibrated policy also `noise_policy.json`: the scale of each, and all that was measured."""
    frozen = {"base_stds": policy.start_stds} if policy.kind == FROZEN else {}
    output.write_json("layer_snr.json", {"snr": policy.snr, "selected": policy.layers} | frozen)
    if policy.kind == CALIBRATED:
        output.write_json("noise_policy.json", as_file(policy, noisefit.__version__))


def save_model(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Settings,
    output: OutputFolder, tokens: int, best: Best | None = None,
) -> None:  # fmt: skip
    """Save the adapter (under `--full_finetune` the model) with its tokenizer and a model card. All processes call it.

    Under `--keep_best` that is the one of the best evaluation, and its step is told in card and configuration.

    Weights go beside the final folder first and are moved in one by one, the adapter's weights last: a folder that
    holds them holds the rest too.

    Args:
        accelerator: of the run.
        model: the prepared `BranchedModel`.
        tokenizer: with its chat template.
        settings: of the run.
        output: its folder.
        tokens: supervised tokens that the run trained on, for the card.
        best: the best evaluation, whose model is kept; `None` where it is not, or there was none.

    Raises:
        InputError: it was trained on none.
        LocalError: it cannot be written, or somebody changed the one that was kept.
    """
    if not tokens:
        raise InputError("no step could be taken, so nothing was learnt and no model is saved; see the lines above")
    weights = {} if best else gather_weights(accelerator, model, adapter_only=not settings.full_finetune)
    with apart("saving the model") as is_main:
        if is_main:
            before = latest_whole(output.path)
            go_on = f"; free some space, and --resume_from_checkpoint latest goes on from {before and before.name}"
            with writing(output.path, go_on if before else ""), output.staging("model") as staged:
                if best:
                    copy_best(output, staged, linked=False)  # files that people edit
                    write_json(staged / CONFIG, _config(settings) | {"best": _told(settings, best)})
                    tokens = best.tokens
                else:
                    write_model(staged, accelerator.unwrap_model(model).model, weights, tokenizer)
                step = best.step if best else None
                evaluation = evaluation_of(output.path / "eval_metrics.jsonl", step)
                card = model_card(settings, tokens, evaluation=evaluation, best_step=step)
                (staged / "README.md").write_text(card, encoding="utf-8")
                sync_folder(staged)
                output.move_in(staged)
                output.drop_previous()
                drop_best(output)


def _told(settings: Settings, best: Best) -> dict[str, Any]:
    return {"step": best.step, "eval_metric": settings.eval_metric, "value": best.value}


def where_things_are(settings: Settings, best: Best | None = None) -> list[str]:
    """What the run left and the next command, for the user's eyes."""
    files = [word for word in words_of(settings.eval_data) + words_of(settings.train_data) if Path(word).is_file()]
    output, data = shlex.quote(settings.output_model), "QUESTIONS.csv"
    whose = "" if files else " a file of yours with a column prompt"
    if files:
        columns = settings.columns or []
        with suppress(InputError):  # of a mixture's file those that it has
            columns = [word for word in columns if word.partition("=")[2] in column_names(files[0])]
        data = shlex.join([files[0], *(["--columns", *columns] if columns else [])])
    what, flag = ("the model", "--model_id") if settings.full_finetune else ("the adapter", "--model_path")
    metric = METRICS[settings.eval_metric]
    kept = [f"{what} is that of step {best.step}, with the lowest {metric}: {best.value:.6g}"] if best else []
    return [
        *kept,
        f"{output} holds {what} with its tokenizer and card, metrics.jsonl (losses) and layer_snr.json (layers)",
        f"pictures of it: python -m noisefit.report {output}",
        f"next, let it answer{whose}: accelerate launch generate.py {flag} {output} --input_csv {data}",
    ]


def push_output(settings: Settings, output: OutputFolder) -> None:
    """Under `--push_to_hub`, push what the run left: it is whole by now, and stays so whatever comes of the push. The
    main process does it; the others may end meanwhile.

    Raises:
        LocalError: it is not pushed; the line says why, and how to push it again.
    """
    if settings.push_to_hub is not None and on_main_process():
        push(settings, output, RECORDS)
