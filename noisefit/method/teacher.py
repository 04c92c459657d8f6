"""Whose predictions the soft term pulls to: the clean branch's own, or those of another teacher, from its own pass.

That pass is one through the same weights, so there is no second copy of the model: the base model is the model with its
adapter switched off (learning without forgetting, arXiv 1606.09282), and the moving average is an adapter's worth of
weights that take the place of the trained ones meanwhile (mean teacher, arXiv 1703.01780). It runs without gradient,
noise and dropout, and what is kept of it are the final hidden states at the supervised positions: the teacher's logits
are formed chunk by chunk, with those of the branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from noisefit.base.errors import InputError
from noisefit.fork.branches import CLEAN, Logits, Losses
from noisefit.fork.decoder import find_causal_lm
from noisefit.method.top_k import TopK

SELF, BASE, EMA = TEACHERS = ("self", "base", "ema")  # of --teacher
INPUTS = ("input_ids", "attention_mask", "target_positions", "packing")  # what a pass needs of a batch, as it has it


class Teacher:
    """The clean branch itself, of `--teacher self`: it takes no pass, and nothing is kept of it.

    Args:
        model: the prepared `BranchedModel`, with an adapter.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def predictions(self, batch: Mapping[str, Any], strategy: str) -> dict[str, Any]:
        """What a batch gets for the teacher's logits to be formed of: `teacher`, or nothing.

        Args:
            batch: as `collate` made it.
            strategy: that the branches are run with.
        """
        return {}

    def follow(self) -> None:
        """Take note of an optimizer step that was taken."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs, whole and on the CPU, by name. All processes call it."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo of `state_dict`. Raises `ValueError` where the tensors are not of this model, or not finite."""


class OtherTeacher(Teacher):
    """One whose predictions come from a pass of its own.

    Raises:
        InputError: the head is trained, which forms the logits of the teacher and of the branches at the same time.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        head = find_causal_lm(model).get_output_embeddings()
        if any(weight.requires_grad for weight in head.parameters()):
            raise InputError("--target_modules or --lora trains the model's head, which forms a teacher's logits as "
                             "well; leave it out, or --teacher")  # fmt: skip

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model is the teacher."""
        yield

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Within it the model is the teacher, in eval mode and without gradient."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.in_place():
                yield
        finally:
            self.model.train(was_training)

    def predictions(self, batch: Mapping[str, Any], strategy: str) -> dict[str, Any]:
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        with self.passing():
            return {"teacher": self.model(**inputs, strategy=strategy)}


class BaseModel(OtherTeacher):
    """The model as it was before the training: its adapter is switched off.

    Args:
        model: the prepared `BranchedModel`, with an adapter.
        cached: of how many tokens its predictions are known and come with the batch; 0: they do not.
    """

    def __init__(self, model: nn.Module, cached: int = 0):
        super().__init__(model)
        self.cached = cached
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # the latter of modules that are trained whole
        self.adapters = [module for module in model.modules() if isinstance(module, kinds)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        for adapter in self.adapters:
            adapter.enable_adapters(False)
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter.enable_adapters(True)

    def predictions(self, batch: Mapping[str, Any], strategy: str) -> dict[str, Any]:
        if not self.cached:
            return super().predictions(batch, strategy)
        return {"teacher": batch["teacher"] if "teacher" in batch else TopK.none(self.cached)}  # a batch without rows

    def top_k(self, batch: Mapping[str, Any], strategy: str, k: int, temperature: float) -> TopK:
        """Its predictions at the supervised positions of a batch, for `TopK`; other arguments as for `predictions`."""
        found: list[TopK] = []

        def collect(logits: Logits, target_tokens: Tensor) -> Losses:
            found.append(TopK.of(logits[CLEAN][0], k, temperature))
            return {}

        inputs = {name: batch[name] for name in (*INPUTS, "target_tokens") if name in batch}
        with self.passing():
            self.model(**inputs, branches=(CLEAN,), strategy=strategy, chunk_losses=collect)
        return TopK.joined(found)


class MovingAverage(OtherTeacher):
    """The model with an exponential moving average of its adapter's weights, which begins as the adapter does.

    Args:
        model: the prepared `BranchedModel`, with an adapter.
        decay: what the average keeps of itself in each step.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay
        named = {name.removeprefix("module."): weight for name, weight in model.named_parameters()}
        self.weights = {name: weight for name, weight in named.items() if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        # Copied, not exchanged: what wraps a model may have views of its weights.
        trained = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    @torch.no_grad()
    def follow(self) -> None:
        for name, weight in self.weights.items():
            self.averages[name].mul_(self.decay).add_(weight, alpha=1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        whole = {n: a.full_tensor() if isinstance(a, DTensor) else a for n, a in self.averages.items()}
        return {name: average.cpu() for name, average in whole.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        if unmatched := tensors.keys() ^ self.averages.keys():
            raise ValueError(f"the teacher's {min(unmatched)} is in one of the two only")
        for name, average in self.averages.items():
            tensor = tensors[name]
            if tensor.shape != average.shape or not tensor.isfinite().all():
                raise ValueError(f"the teacher's {name} of shape {tuple(tensor.shape)} is not of this model or finite")
            tensor = tensor.to(average.device, average.dtype)
            if isinstance(average, DTensor):
                tensor = distribute_tensor(tensor, average.device_mesh, average.placements)
            average.copy_(tensor)


def make_teacher(settings: Any, model: nn.Module) -> Teacher:
    """The teacher of a run.

    Args:
        settings: its `teacher`, `teacher_decay` and `cache_teacher`.
        model: the prepared `BranchedModel`.
    """
    if settings.teacher == EMA:
        return MovingAverage(model, settings.teacher_decay)
    return BaseModel(model, settings.cache_teacher) if settings.teacher == BASE else Teacher(model)
