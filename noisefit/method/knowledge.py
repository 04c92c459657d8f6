"""What a model knows: the log-probability of the tokens that decide an answer, with noise and without."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from noisefit.base.errors import InputError, LocalError
from noisefit.base.precision import at_least_float32
from noisefit.fork.branches import CLEAN, NOISY, Branch, BranchedModel, Logits, Losses
from noisefit.fork.exactness import choose_strategy
from noisefit.fork.hooks import Noise, NoiseFunction
from noisefit.method.noise import relative_scale

DIGITS = 4  # of the values
DOUBT = 5e-6  # a value this near to where rounding turns could go either way, by float32's own error
FIRST_BATCH_SIZE = 64  # rows at a time, where memory allows


@dataclass(frozen=True)
class Item:
    """A text and what of it is scored.

    Attributes:
        input_ids: the tokens.
        decisive: the places of the decisive tokens among them, ascending, each at least 1.
        answer: those of the answer's tokens, the decisive ones included.
        key: tells the noise of this text from that of others.
    """

    input_ids: list[int]
    decisive: list[int]
    answer: list[int]
    key: str = ""


class Probe:
    """Scores items under a model as it is, in eval mode.

    Args:
        model: a causal language model on its device, without an adapter or with one that is switched off.
        pad_token_id: fills padded positions.
        example: an item, on which the way of running the model is tried. All processes of a launch make the same probe.
        noise_passes: `K`; 0 scores the clean model.
        noise_layers: whose output gets noise in each of these passes.
        noise_std: its standard deviation as a share of each token's root mean square.
        seed: of the noise, which depends on it, the item's key, the layer and the pass alone.
    """

    def __init__(
        self, model: torch.nn.Module, pad_token_id: int, example: Item, noise_passes: int = 0,
        noise_layers: Sequence[int] = (), noise_std: float = 0.0, seed: int = 0, loss_chunk_size: int = 256,
    ):  # fmt: skip
        self.model = BranchedModel(model.eval(), loss_chunk_size)
        self.device = next(model.parameters()).device
        self.exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
        self.pad_token_id, self.noise_passes, self.noise_std, self.seed = pad_token_id, noise_passes, noise_std, seed
        self.branches: tuple[Branch, ...] = (NOISY,) * noise_passes or (CLEAN,)
        self.noise_layers = list(noise_layers) if noise_passes else []
        batch = self._batch([example, example])
        self.strategy, _ = choose_strategy(self.model, batch, self.noise_layers, "auto", self.branches)

    def __call__(self, items: Sequence[Item]) -> list[list[float]]:
        """Score a batch.

        Returns:
            Of each item its values, rounded to `DIGITS`. Without noise: the mean log-probability of the decisive
            tokens, in nats. With noise: its mean and standard deviation over the passes, and the Jensen-Shannon
            divergence of the passes' predictions, in nats, a mean over the answer's tokens.

            In float32 they do not depend on the batch: a value that rounding could turn either way is computed again,
            with its item alone.

        Raises:
            InputError: a value is not finite.
        """
        values = self._values(items)
        if self.exact and len(items) > 1:
            values = [self._values([item])[0] if any(map(is_doubtful, own)) else own
                      for item, own in zip(items, values, strict=True)]  # fmt: skip
        return [[round(value, DIGITS) + 0.0 for value in own] for own in values]

    @torch.no_grad()
    def _values(self, items: Sequence[Item]) -> list[list[float]]:
        log_p: list[Tensor] = []  # of the scored tokens, [branches, N] a chunk
        divergences: list[Tensor] = []

        def collect(logits: Logits, target_tokens: Tensor) -> Losses:
            logs = torch.stack([at_least_float32(z).log_softmax(-1) for z in logits[CLEAN] or logits[NOISY]])
            log_p.append(logs.gather(2, target_tokens.view(1, -1, 1).expand(len(logs), -1, 1)).squeeze(2))
            divergences.append(jensen_shannon(logs) if self.noise_passes else logs.new_zeros(logs.shape[1]))
            return {}

        noise = {layer: self._noise(layer, items) for layer in self.noise_layers}
        how = {"branches": self.branches, "noise": noise, "strategy": self.strategy}
        self.model(**self._batch(items), **how, chunk_losses=collect)
        tokens, spread = torch.cat(log_p, dim=1).cpu().double(), torch.cat(divergences).cpu().double()
        values, start = [], 0
        for item in items:
            places = self._scored(item)
            is_decisive = torch.tensor([place in set(item.decisive) for place in places])
            means = tokens[:, start : start + len(places)][:, is_decisive].mean(dim=1)
            own = [float(means.mean())]
            if self.noise_passes:
                own += [float(means.std(correction=0)), float(spread[start : start + len(places)].mean())]
            if not all(map(math.isfinite, own)):
                raise InputError("the model computes no finite log-probability: its weights are not finite, or it "
                                 "overflows in its dtype; try float32")  # fmt: skip
            values.append(own)
            start += len(places)
        return values

    def _scored(self, item: Item) -> list[int]:
        return item.answer if self.noise_passes else item.decisive

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        length = max(len(item.input_ids) for item in items)
        ids = torch.full((len(items), length), self.pad_token_id)
        mask, positions, tokens = torch.zeros_like(ids), [], []
        for row, item in enumerate(items):
            ids[row, : len(item.input_ids)] = torch.tensor(item.input_ids)
            mask[row, : len(item.input_ids)] = 1
            positions += [row * length + place - 1 for place in self._scored(item)]
            tokens += [item.input_ids[place] for place in self._scored(item)]
        batch = {"input_ids": ids, "attention_mask": mask, "target_positions": torch.tensor(positions),
                 "target_tokens": torch.tensor(tokens)}  # fmt: skip
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _noise(self, layer: int, items: Sequence[Item]) -> Noise | NoiseFunction:
        """Noise that each row draws from a generator of its own, for its own tokens."""

        def draw(hidden: Tensor, branch: int, mask: Tensor | None) -> Tensor:
            scale = relative_scale(at_least_float32(hidden), self.noise_std)
            unit = torch.zeros(hidden.shape)
            for row, item in enumerate(items):
                digest = hashlib.sha256(f"{self.seed} {layer} {branch} {item.key}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                size = len(item.input_ids), hidden.shape[-1]
                unit[row, : size[0]] = torch.randn(size, generator=generator)
            return (unit.to(hidden.device) * scale).to(hidden.dtype)

        return draw


def is_doubtful(value: float) -> bool:
    """Whether a value is so near to where rounding to `DIGITS` turns that float32's error decides."""
    scaled = value * 10**DIGITS
    return abs(abs(scaled - round(scaled)) - 0.5) < DOUBT * 10**DIGITS


def jensen_shannon(log_p: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of several distributions: the mean of their KL to their mixture.

    Args:
        log_p: `[K, N, V]`, log-probabilities.

    Returns:
        `[N]`, in nats: 0 where all are the same, at most `log K`.
    """
    mixture = log_p.logsumexp(dim=0) - torch.tensor(float(len(log_p))).log()
    return (log_p.exp() * (log_p - mixture)).sum(dim=-1).mean(dim=0).clamp(min=0)


def score_all(
    probe: Callable[[Sequence[Item]], list[list[float]]], items: Mapping[int, Item], batch_size: int
) -> Iterator[dict[int, list[float]]]:
    """Score all items, a batch of similar lengths at a time, the longest first.

    Args:
        probe: a `Probe`.
        items: by number.
        batch_size: rows at a time; 0 starts with many and halves whenever memory runs out, which changes no value.

    Yields:
        What `Probe` gives for each batch, by the items' numbers.

    Raises:
        LocalError: out of memory with the batch size asked for, or with one row at a time.
    """
    size = batch_size or FIRST_BATCH_SIZE
    left = sorted(items, key=lambda number: (-len(items[number].input_ids), number))
    while left:
        batch = left[:size]
        try:
            values = probe([items[number] for number in batch])
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size or size == 1:
                length = len(items[batch[0]].input_ids)
                raise LocalError(f"out of memory with {size} rows of up to {length} tokens at a time; give a smaller "
                                 f"{'--batch_size' if size > 1 else '--max_length'}") from None  # fmt: skip
            values = None
        if values is None:  # outside the except block, whose traceback keeps the failed batch's tensors alive
            size //= 2
            clear_device_cache(garbage_collection=True)
        else:
            left = left[size:]
            yield dict(zip(batch, values, strict=True))
