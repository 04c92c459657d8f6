"""Answers drawn again by the settings that stand beside them: what has changed since, and would make them others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "vllm")  # whose versions may change answers


def versions() -> dict[str, str]:
    """Those of the installed libraries that may change answers, by name."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True)
class Repeated:
    """The answers whose settings `--config` names.

    Attributes:
        file: with their settings.
        about: what it says of them besides flags.
        given: the flags of the command line, which win over the file's.
    """

    file: Path
    about: Mapping[str, Any]
    given: Collection[str]

    @classmethod
    def by(cls, file: str | None, about: str, given: Collection[str]) -> Repeated | None:
        """Of a file for `--config`; `None` where it has flags alone. `about` is what the rest is called there."""
        content = None
        if file is not None:
            with suppress(ValueError, RecursionError):  # YAML, which has flags alone
                content = json.loads(Path(file).read_text(encoding="utf-8"))
        if file is None or not isinstance(content, dict) or not isinstance(content.get(about), dict):
            return None
        return cls(Path(file), content[about], given)

    def changes(self, input_sha256: str, model_fingerprint: str, of_model: Collection[str]) -> str | None:
        """A line that says what is not as it was, and not by a flag of the command line; `None` where all is.

        Args:
            input_sha256, model_fingerprint: as they are now; the file has them by these names.
            of_model: the flags that decide on the model, and how it is computed.
        """
        changed = list(self._changed(input_sha256, model_fingerprint, of_model))
        if not changed:
            return None
        return f"--config {self.file}: answers may be others than its own, as {' and '.join(changed)}"

    def _changed(self, input_sha256: str, model_fingerprint: str, of_model: Collection[str]) -> Iterator[str]:
        if self.about.get("input_sha256") != input_sha256 and not {"input_csv", "columns"}.intersection(self.given):
            yield "the input has changed"
        if self.about.get("model_fingerprint") != model_fingerprint and not set(of_model).intersection(self.given):
            yield "the model, or what it is computed on, has changed"
        before, now = self.about.get("versions"), versions()
        for name, was in before.items() if isinstance(before, dict) else ():
            if now.get(name) != was:
                yield f"{name} was {was} and is {now.get(name, 'not there')}"
