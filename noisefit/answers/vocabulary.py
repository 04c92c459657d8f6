"""Adapters that come with embeddings of their own, for more tokens than the base model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel


def fit_vocabulary(model: PreTrainedModel, folder: Path) -> None:
    """Give the model as many token embeddings as the adapter in `folder` brings along, if it brings any: programs that
    add tokens save them with the adapter. The new rows are the adapter's, once it is loaded.

    Args:
        model: the base model, changed in place.
        folder: the adapter's, with its `adapter_model.safetensors`.
    """
    embeddings: Any = model.get_input_embeddings()
    [name] = [name for name, module in model.named_modules() if module is embeddings]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        if (key := f"base_model.model.{name}.weight") not in set(file.keys()):
            return
        rows = file.get_slice(key).get_shape()[0]
    if rows != len(embeddings.weight):
        model.resize_token_embeddings(rows, mean_resizing=False)
