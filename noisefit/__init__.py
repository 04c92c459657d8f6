"""NoiseFiT (arXiv 2504.03302) on a hand-written Accelerate loop.

from noisefit import Settings, train

train(Settings(model="Qwen/Qwen2.5-0.5B", train_data="questions.csv", output_model="my_adapter"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from generate import generate
    from noisefit.answers.settings import AnswerSettings
    from noisefit.run.settings import Settings
    from train_loop import train

__version__ = "0.1.0"
__all__ = ["AnswerSettings", "Settings", "generate", "train"]
_HOMES = {
    "AnswerSettings": "noisefit.answers.settings",
    "Settings": "noisefit.run.settings",
    "generate": "generate",
    "train": "train_loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)  # now, and not with each part of the package: seconds
