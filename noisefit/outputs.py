"""The output folder: what may be there before, and what a run leaves in it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

import noisefit
from noisefit.checkpoints import remove_checkpoint
from noisefit.errors import InputError
from noisefit.files import sync_folder, write_json, writing
from noisefit.objectives import NOISY, OBJECTIVES
from noisefit.policy import NoisePolicy, as_file
from noisefit.resuming import STATE, last_whole, list_checkpoints
from noisefit.tracking import LINES
from noisefit.weights import gather_weights, write_model

ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "model.safetensors.index.json")
CONFIGURATIONS = ("config.json", "generation_config.json")  # of a whole model
RECORDS = ("noisefit_config.json", "layer_snr.json", "noise_policy.json", *LINES)
# The other files of a model's folder that a new run writes again, whatever the tokenizer.
TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
PREVIOUS = "previous_run"  # what --overwrite_output replaces, until it is replaced


def check_output(args: Namespace) -> None:
    """Refuse an output folder that cannot be written or holds another run's model. Writes nothing.

    Raises:
        InputError: as said.
    """
    if not args.output_model.strip():
        raise InputError("--output_model is empty; give a folder")
    args.output_model = os.path.expanduser(args.output_model)
    output = Path(args.output_model)
    wanted = args.resume_from_checkpoint
    if wanted is not None:
        try:
            if not wanted.strip():
                raise ValueError("is empty; give a path, latest or auto")
            Path(wanted).expanduser().resolve().exists()
        except (OSError, RuntimeError, ValueError) as error:  # a home of nobody, links in a circle, a name too long
            raise InputError(f"--resume_from_checkpoint {wanted[:200]}: {error}") from None
    try:
        _check_folder(args, output)
    except OSError as error:  # a name too long, a link to nowhere, a folder that cannot be entered
        raise InputError(f"--output_model {output}: {error.strerror or error}") from None


def _check_folder(args: Namespace, output: Path) -> None:
    if output.is_symlink() and not output.exists():
        raise InputError(f"--output_model {output}: a link to a folder that does not exist")
    held = [name for name in ADAPTER if (output / name).exists()]
    checkpoints = list_checkpoints(output)
    wanted = args.resume_from_checkpoint
    resuming = wanted == "latest" or (wanted == "auto" and bool(checkpoints))
    resuming = resuming or (wanted is not None and _is_inside(Path(wanted), output))
    if (held or checkpoints) and not resuming and not args.overwrite_output:
        what = held[0] if held else checkpoints[-1].name
        resume = ", or go on with it: --resume_from_checkpoint latest" if checkpoints else ""
        raise InputError(
            f"--output_model {output} already holds {what} of another run; choose another folder, or give "
            f"--overwrite_output{resume}"
        )
    if os.path.isdir(args.model) and output.exists() and output.samefile(args.model):
        raise InputError(f"--output_model {output} is the base model's own folder; choose another one")
    mine = any((folder / "noisefit_config.json").exists() for folder in (output, *output.glob(f"{PREVIOUS}*")))
    others = [name for name in ("README.md", "tokenizer.json", "config.json") if (output / name).exists()]
    if others and not mine:
        raise InputError(
            f"--output_model {output} holds a {others[0]} that is not of such a run; choose a folder of its own"
        )
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"--output_model {output}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output_model {output}: no permission to write in {existing}")


def _is_inside(path: Path, folder: Path) -> bool:
    return path.expanduser().absolute().parent.resolve() == folder.resolve()


def start_output(args: Namespace, checkpoint: Path | None) -> None:
    """Make the folder ready for a run, and write its settings there.

    Args:
        args: the run's settings.
        checkpoint: the run goes on from it, and its records with it; `None`: it starts afresh. What another run left
            is set aside as `previous_run`, until this one is saved.

    Raises:
        LocalError: it cannot be written.
    """
    output = Path(args.output_model)
    with writing(output):
        if checkpoint is None or not _is_inside(checkpoint, output):
            _set_aside(output)
        if checkpoint is not None:
            for name in LINES:
                _restore(checkpoint / name, output / name)
    write_json(output / "noisefit_config.json", {"noisefit_version": noisefit.__version__} | vars(args))


def _set_aside(output: Path) -> None:
    """Move an earlier run's model and records to `previous_run`; what there is of a run without a model is removed."""
    patterns = ("README.md", *TOKENIZER, *RECORDS, *CONFIGURATIONS, "model-*-of-*.safetensors", *ADAPTER)
    held = [path for pattern in patterns for path in sorted(output.glob(pattern)) if path.is_file()]
    aside = output / f"{PREVIOUS}.tmp"  # a kill in the midst of this leaves it for the next run to go on with
    if aside.exists() or any(path.suffix == ".safetensors" for path in held):
        aside.mkdir(exist_ok=True)
        for path in held:
            os.replace(path, aside / path.name)
        if any(aside.glob("*.safetensors")):  # else what is aside already is the last whole model
            shutil.rmtree(output / PREVIOUS, ignore_errors=True)
            os.replace(aside, output / PREVIOUS)
    else:
        for path in held:
            path.unlink()
    for folder in list_checkpoints(output):
        if (folder / STATE).exists():  # another program's are left alone
            remove_checkpoint(folder)


def _restore(source: Path, target: Path) -> None:
    if not source.exists():
        target.unlink(missing_ok=True)
        return
    beside = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, beside)
    os.replace(beside, target)


def write_policy(args: Namespace, policy: NoisePolicy) -> None:
    """`layer_snr.json`: the SNR of every layer, and the indices of those that get noise. Of a calibrated policy also
    `noise_policy.json`: the scale of each, and all that was measured."""
    output = Path(args.output_model)
    write_json(output / "layer_snr.json", {"snr": policy.snr, "selected": policy.layers})
    if policy.base_stds is not None:
        write_json(output / "noise_policy.json", as_file(policy, noisefit.__version__))


def save_model(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: Namespace, tokens: int
) -> None:
    """Save the adapter (under `--full_finetune` the model) with its tokenizer and a model card. All processes call it.

    Weights go beside the final folder first and are moved in one by one, the adapter's weights last: a folder that
    holds them holds the rest too.

    Args:
        accelerator: of the run.
        model: the prepared `BranchedModel`.
        tokenizer: with its chat template.
        args: the run's settings.
        tokens: supervised tokens that the run trained on, for the card.

    Raises:
        LocalError: it cannot be written.
    """
    weights = gather_weights(accelerator, model, adapter_only=not args.full_finetune)
    if not accelerator.is_main_process:
        return
    output = Path(args.output_model)
    beside = output / "saving.tmp"
    before = last_whole(output)
    advice = f"; free some space, and --resume_from_checkpoint latest goes on from {before}" if before else ""
    with writing(output, advice):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            write_model(beside, accelerator.unwrap_model(model).model, weights, tokenizer)
            (beside / "README.md").write_text(model_card(args, tokens), encoding="utf-8")
            sync_folder(beside)
            for path in sorted(beside.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                os.replace(path, output / path.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(output / PREVIOUS, ignore_errors=True)


def where_things_are(args: Namespace) -> list[str]:
    """What the run left and the next command, for the user's eyes."""
    output, data = shlex.quote(args.output_model), shlex.quote(args.eval_data or args.train_data)
    what, flag = ("the model", "--model_id") if args.full_finetune else ("the adapter", "--model_path")
    return [
        f"{output} holds {what} with its tokenizer and card, metrics.jsonl (losses) and layer_snr.json (layers)",
        f"pictures of it: python -m noisefit.report {output}",
        f"next, let it answer: accelerate launch generate.py {flag} {output} --input_csv {data}",
    ]


def what_it_learnt(args: Namespace) -> str:
    """The objective in words: its losses with their weights, and its branches."""
    objective = OBJECTIVES[args.loss_mode]
    losses = " + ".join(f"{weight:g} {name}" for name, weight in objective.weights(args).items())
    noise = f", with noise in the {objective.noise}" if NOISY in objective.branches else ""
    return f"the loss is {losses}, of the branches {', '.join(objective.branches)}{noise}"


def model_card(args: Namespace, tokens: int) -> str:
    """The model card, Markdown with the hub's metadata header."""
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in sorted(vars(args).items()))
    metadata = json.dumps(args.model)  # a JSON string is a YAML string, whatever characters it has
    if args.full_finetune:
        kind, load = "A full model", f'AutoModelForCausalLM.from_pretrained("{args.output_model}")'
    else:
        kind = "A LoRA adapter"
        load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{args.model}"), "{args.output_model}")'
    return f"""---
base_model: {metadata}
library_name: {"transformers" if args.full_finetune else "peft"}
pipeline_tag: text-generation
tags: [noisefit{"" if args.full_finetune else ", lora"}]
---

# {Path(args.output_model).resolve().name}

{kind} for `{args.model}`, trained on `{Path(args.train_data).name}` with the NoiseFiT trainer
([arXiv 2504.03302](https://arxiv.org/abs/2504.03302)), `--loss_mode {args.loss_mode}`: {what_it_learnt(args)}.
It saw {tokens:,} supervised tokens. `layer_snr.json` has the signal-to-noise ratio of every layer and the layers that
got noise, `metrics.jsonl` the losses. The tokenizer's chat template is the prompt format of the training.

```python
model = {load}
```

## Settings

| setting | value |
|---|---|
{settings}

NoiseFiT {noisefit.__version__}, torch {torch.__version__.split("+")[0]}.
"""
