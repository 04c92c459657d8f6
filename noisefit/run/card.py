"""The model card that stands beside an adapter or model, with the evaluation in the metadata that the hub shows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

import noisefit
from noisefit.base.errors import in_a_line, notice
from noisefit.base.settings import words_of
from noisefit.fork.branches import NOISY
from noisefit.run.settings import Settings

NAMES = {"eval_ce_loss": "cross-entropy, nats a token"}  # of figures that have another name for people
NO_RESULTS = ("step", "epoch", "eval_target_tokens")
CARRIED = ("datasets", "language", "license", "license_name", "license_link")  # from an adapter's card to a model's
LOADERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def model_card(
    settings: Settings, tokens: int, *, evaluation: Mapping[str, Any] | None = None, best_step: int | None = None
) -> str:
    """The model card, Markdown with the hub's metadata header.

    Args:
        settings: of the run.
        tokens: supervised tokens that it trained on.
        evaluation: the line of `eval_metrics.jsonl` that belongs to these weights.
        best_step: of which step they are, where they are those of the best evaluation.
    """
    whole, name = settings.full_finetune, settings.model
    base, output = json.dumps(name), json.dumps(settings.push_to_hub or settings.output_model)
    pinned, at = base, ""
    if settings.model_revision is not None:
        pinned, at = f"{base}, revision={json.dumps(settings.model_revision)}", f" at {code(settings.model_revision)}"
    load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({pinned}), {output})"
    if whole:
        load = f"AutoModelForCausalLM.from_pretrained({output})"
    words = words_of(settings.train_data)  # of files and folders the names, as paths say nothing elsewhere
    data = ", ".join(code(Path(word).name if Path(word).exists() else word) for word in words)
    kept = f" It is that of step {best_step}, whose evaluation was the best." if best_step is not None else ""
    rows = "\n".join(f"| {code(name)} | {code(value)} |" for name, value in sorted(settings.record().items()))
    results = evaluation_results(settings, evaluation or {})
    metadata = ModelCardData(
        base_model=hub_name(name), library_name="transformers" if whole else "peft", pipeline_tag="text-generation",
        tags=["noisefit"] if whole else ["noisefit", "lora"], datasets=hub_names(settings.train_data),
        eval_results=results or None, model_name=Path(settings.output_model).resolve().name if results else None,
    )  # fmt: skip
    return f"""---
{metadata.to_yaml()}
---

# {code(Path(settings.output_model).resolve().name)}

{"A full model" if whole else "A LoRA adapter"} for {code(name)}{at}, trained on {data} with the NoiseFiT trainer
([arXiv 2504.03302](https://arxiv.org/abs/2504.03302)), `--loss_mode {settings.loss_mode}`:
{what_it_learnt(settings)}.
It saw {tokens:,} supervised tokens.{kept} `layer_snr.json` has the signal-to-noise ratio of every layer and the layers
that got noise, `metrics.jsonl` the losses. The tokenizer's chat template is the prompt format of the training.

{fence(f"model = {load}")}
{evaluation_table(results)}
## Settings

| setting | value |
|---|---|
{rows}

NoiseFiT {noisefit.__version__}, torch {torch.__version__.split("+")[0]}.
"""


def merged_card(name: str, base: str, revision: str | None, adapter: Path, dtype: str, lines: Iterable[str]) -> str:
    """The card of a model that an adapter was merged into; what the adapter's card says of data, evaluation, language
    and license goes along.

    Args:
        name: of the merged model.
        base, revision: the model that it was merged into, and which of its revisions on the hub.
        adapter: its folder.
        dtype: of the saved weights.
        lines: what was found in merging, in words.
    """
    known, recorded = card_data(adapter), (adapter / "noisefit_config.json").is_file()
    results = known.get("eval_results") or []
    metadata = ModelCardData(
        base_model=hub_name(base), library_name="transformers", pipeline_tag="text-generation",
        tags=["noisefit", "merged"] if recorded else ["merged"], eval_results=results or None,
        model_name=name if results else None, **{key: known.get(key) for key in CARRIED},
    )  # fmt: skip
    at = f" at {code(revision)}" if revision else ""
    own = " `noisefit_config.json` has the settings of the adapter's training." if recorded else ""
    found = "\n".join(f"- {line[0].upper()}{line[1:]}." for line in lines)
    return f"""---
{metadata.to_yaml()}
---

# {code(name)}

{code(base)}{at} with the adapter {code(adapter.resolve().name)} merged into its weights, in {dtype}, by the NoiseFiT
trainer ([arXiv 2504.03302](https://arxiv.org/abs/2504.03302)).{own}

{found}

{fence(f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})")}
{evaluation_table(results, "Measured with the adapter, before it was merged:")}
NoiseFiT {noisefit.__version__}, torch {torch.__version__.split("+")[0]}.
"""


def card_data(folder: Path) -> Any:
    """The metadata of the card in a folder, empty where there is none. What cannot be read is left out, with a line."""
    path, reason = folder / "README.md", ""
    for lenient in (False, True) if path.exists() else ():
        try:
            found = ModelCard.load(path, ignore_metadata_errors=lenient).data
        except Exception as error:  # whatever is in a file that anybody may have written
            reason = reason or in_a_line(error).partition(". ")[0]
            continue
        if lenient:
            notice(f"{path}: the new card goes without what cannot be read of its metadata: {reason}")
        return found
    if reason:
        notice(f"{path}: the new card goes without its metadata, which cannot be read: {reason}")
    return {}


def what_it_learnt(settings: Settings) -> str:
    """The objective in words: its losses with their weights, and its branches."""
    objective = settings.objective
    losses = " + ".join(f"{weight:g} {name}" for name, weight in objective.weights(settings).items())
    noise = f", with noise in the {objective.noise}" if NOISY in objective.branches else ""
    return f"the loss is {losses}, of the branches {', '.join(kind.value for kind in objective.branches)}{noise}"


def evaluation_of(path: Path, step: int | None = None) -> dict[str, Any]:
    """The line of an `eval_metrics.jsonl` that is of this step, by default the last one; empty where there is none."""
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        of_step = [line for line in lines if step in (None, line["step"])]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return of_step[-1] if of_step else {}


def evaluation_results(settings: Settings, line: Mapping[str, Any]) -> list[EvalResult]:
    """The figures of a line of `eval_metrics.jsonl` as the hub's metadata has them: what is measured, and no counts.

    The data is named by its file, or its name on the hub, and never by its whole path.
    """
    data = words_of(settings.eval_data or settings.train_data)
    kind = hub_name(data[0]) or LOADERS.get(Path(data[0]).suffix.lower(), "text")
    named = ", ".join(hub_name(word) or Path(word).name for word in data)
    named += "" if settings.eval_data else " (held out)"
    figures = {name: value for name, value in line.items() if isinstance(value, float) and name not in NO_RESULTS}
    return [
        EvalResult(
            task_type="text-generation", task_name="Text Generation", dataset_type=kind, dataset_name=named,
            metric_type=name.removeprefix("eval_"), metric_value=value,
            metric_name=NAMES.get(name, name.removeprefix("eval_").replace("_", " ")),
        )
        for name, value in figures.items()
    ]  # fmt: skip


def evaluation_table(results: Iterable[EvalResult], about: str = "") -> str:
    """The same for people, as a part of a card; empty where nothing was measured."""
    rows = [f"| {code(r.dataset_name)} | {code(r.metric_name)} | {_shown(r.metric_value)} |" for r in results]
    head = ["", "## Evaluation", "", *([about, ""] if about else []), "| data | figure | value |", "|---|---|---|"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _shown(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else code(value)


def hub_name(name: str) -> str | None:
    """The name of a model or of a data set, where it can only be one on the hub: the hub refuses paths in a card."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if os.path.lexists(name) or Path(name).suffix.lower() in LOADERS else name


def hub_names(names: str | Sequence[str]) -> list[str] | None:
    """Those of the names that are the hub's; `None` where none is, for a card that then does not have them."""
    return [found for found in map(hub_name, words_of(names)) if found] or None


def code(value: object) -> str:
    """A value as code in a line or a table of Markdown, whatever it holds."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value)).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}" if text else ""


def fence(text: str, language: str = "python") -> str:
    """A block of code in Markdown, whatever it holds."""
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"
