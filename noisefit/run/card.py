"""The model card that stands beside an adapter or model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

import noisefit
from noisefit.base.settings import words_of
from noisefit.fork.branches import NOISY
from noisefit.run.settings import Settings


def model_card(settings: Settings, tokens: int) -> str:
    """The model card, Markdown with the hub's metadata header.

    Args:
        settings: of the run.
        tokens: supervised tokens that it trained on.
    """
    whole, name = settings.full_finetune, settings.model
    tags = ["noisefit"] if whole else ["noisefit", "lora"]
    library = "transformers" if whole else "peft"
    metadata = ModelCardData(base_model=name, library_name=library, pipeline_tag="text-generation", tags=tags)
    base, output = json.dumps(name), json.dumps(settings.output_model)
    load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {output})"
    if whole:
        load = f"AutoModelForCausalLM.from_pretrained({output})"
    words = words_of(settings.train_data)  # of files and folders the names, as paths say nothing elsewhere
    data = ", ".join(code(Path(word).name if Path(word).exists() else word) for word in words)
    rows = "\n".join(f"| {code(name)} | {code(value)} |" for name, value in sorted(settings.record().items()))
    return f"""---
{metadata.to_yaml()}
---

# {code(Path(settings.output_model).resolve().name)}

{"A full model" if whole else "A LoRA adapter"} for {code(name)}, trained on {data} with
the NoiseFiT trainer ([arXiv 2504.03302](https://arxiv.org/abs/2504.03302)), `--loss_mode {settings.loss_mode}`:
{what_it_learnt(settings)}.
It saw {tokens:,} supervised tokens. `layer_snr.json` has the signal-to-noise ratio of every layer and the layers that
got noise, `metrics.jsonl` the losses. The tokenizer's chat template is the prompt format of the training.

{fence(f"model = {load}")}

## Settings

| setting | value |
|---|---|
{rows}

NoiseFiT {noisefit.__version__}, torch {torch.__version__.split("+")[0]}.
"""


def what_it_learnt(settings: Settings) -> str:
    """The objective in words: its losses with their weights, and its branches."""
    objective = settings.objective
    losses = " + ".join(f"{weight:g} {name}" for name, weight in objective.weights(settings).items())
    noise = f", with noise in the {objective.noise}" if NOISY in objective.branches else ""
    return f"the loss is {losses}, of the branches {', '.join(kind.value for kind in objective.branches)}{noise}"


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
