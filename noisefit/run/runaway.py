"""Noise that runs away: a model drowns it by growing its hidden states, and the noise grows faster than they do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisefit.method.policy import LIVE

GROWN = 3.0  # times the noise to signal of the run's first line


class Runaway:
    """Watches the noise to signal of each layer, and says once that it has grown.

    What it goes by is in the lines of metrics.jsonl, so a run that is resumed knows its start, and whether it was told.

    Args:
        path: of metrics.jsonl; read when the first line is watched.
        noise_scale: the value of `--noise_scale`.
    """

    def __init__(self, path: Path, noise_scale: str):
        self.path, self.noise_scale = path, noise_scale
        self.start: dict[str, float] | None = None
        self.told = False

    def watch(self, line: Mapping[str, Any]) -> str | None:
        """What to say of a line that is about to be written, if anything."""
        if self.start is None:
            self.start = {}
            for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
                self._grown(json.loads(text))
        found = self._grown(line)
        if found is None:
            return None
        layer, ratio, start = found
        why = ", as its base scale grows with the hidden states" if self.noise_scale == LIVE else ""
        helps = ["--noise_scale frozen or relative"] if self.noise_scale == LIVE else []
        helps += ["--noise_gradient", "--max_noise_to_signal", "a lower --noise_std or --learning_rate"]
        return (
            f"step {line['step']}: the noise runs away: in layer {layer} it is {ratio:.3g} of the signal, "
            f"{ratio / start:.1f} times its start{why}; what helps: {', '.join(helps)}"
        )

    def _grown(self, line: Mapping[str, Any]) -> tuple[str, float, float] | None:
        """The layer that has grown most, its noise to signal and what it was at the start; `None` if none has, or that
        was found before."""
        assert self.start is not None
        grown = []
        for layer, ratio in (line.get("layer_noise_to_signal") or {}).items():
            if not ratio:
                continue
            start = self.start.setdefault(layer, ratio)
            if ratio > GROWN * start:
                grown.append((ratio / start, layer, ratio, start))
        if not grown or self.told:
            return None
        self.told = True
        _, layer, ratio, start = max(grown)
        return layer, ratio, start
