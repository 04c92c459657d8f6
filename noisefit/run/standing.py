"""How a run stands by its evaluations: which was the best one, how many came since, and the model that goes with it.

The best model lies in the folder `best` of the output, whole, and in the same folder of each checkpoint: so a
checkpoint knows all that the run did until then, wherever it is and whatever came after it. On one disk the two are the
same files.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisefit.base.errors import LocalError
from noisefit.base.files import sync_folder
from noisefit.base.schema import COUNT, NUMBER, Maybe

if TYPE_CHECKING:
    from noisefit.run.output_folder import OutputFolder

BEST = "best"
STANDING_SHAPE = {"stale": COUNT, "best": Maybe({"step": COUNT, "value": NUMBER, "tokens": COUNT})}


@dataclass(frozen=True)
class Best:
    """The best evaluation: of which step, its metric, and the supervised tokens that the run had trained on."""

    step: int
    value: float
    tokens: int


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        best: `None` before the first evaluation whose metric is a number.
        stale: evaluations in a row since that were no better.
    """

    best: Best | None = None
    stale: int = 0

    def after(self, step: int, value: float, tokens: int) -> Standing:
        """How it stands after another evaluation. Of equal ones the first stays the best; NaN is no better."""
        if math.isfinite(value) and (self.best is None or value < self.best.value):
            return Standing(Best(step, value, tokens))
        return Standing(self.best, self.stale + 1)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Standing:
        """Undo of `state_dict`."""
        return cls(None if state["best"] is None else Best(**state["best"]), state["stale"])


def copy_best(output: OutputFolder, target: Path, linked: bool = True) -> None:
    """Put the files of the output's best model into another folder: as the same files where `linked` and possible, as
    is right for one that nobody edits.

    Raises:
        LocalError: somebody changed them.
    """
    if not output.is_whole(BEST):
        raise LocalError(f"{output.path / BEST} was changed while the run went on, which keeps its best model there; "
                         "the last checkpoint has it, too: --resume_from_checkpoint latest")  # fmt: skip
    _copy(output.path / BEST, output.parts(BEST), target, linked)


def bring_best(output: OutputFolder, checkpoint: Path | None, names: Iterable[str]) -> None:
    """Give the output the best model that a checkpoint holds, or none where it holds none.

    Args:
        output: the run's folder.
        checkpoint: that the run goes on from; `None` for none.
        names: of the files in it.
    """
    parts = [name.removeprefix(f"{BEST}/") for name in names if name.startswith(f"{BEST}/")]
    if checkpoint is None or not parts:
        drop_best(output)
        return
    with output.staging(BEST) as staged:
        _copy(checkpoint / BEST, parts, staged, linked=True)
        output.place_folder(staged, BEST)


def _copy(source: Path, parts: Iterable[str], target: Path, linked: bool) -> None:
    """A run only ever replaces files whole, so of the same files neither folder sees a change in the other."""
    target.mkdir(exist_ok=True)
    for part in parts:
        (target / part).parent.mkdir(exist_ok=True)
        if not (linked and _link(source / part, target / part)):
            shutil.copyfile(source / part, target / part)
    sync_folder(target)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without such links
        return False
    return True


def drop_best(output: OutputFolder) -> None:
    """Remove the best model from the output, if a run put it there."""
    if output.is_own(f"{BEST}/") and os.path.lexists(output.path / BEST):
        output.remove_folder(output.path / BEST)
