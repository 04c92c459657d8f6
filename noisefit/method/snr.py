"""The signal-to-noise ratio of every layer, and the choice of the layers that get noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from noisefit.base.errors import InputError
from noisefit.base.precision import EPS, as_float64, mean_magnitude
from noisefit.fork.decoder import block_hidden_states, find_decoder_layers
from noisefit.method.noise import TokenScaledNoise, snr_base_std
from noisefit.method.policy import NoiseKind

SNR_FORMATS = ("Largest", "Lowest")
NEGLIGIBLE = 1e-3  # noise as a share of the signal


def layer_snr(
    model: nn.Module, batch: Mapping[str, Tensor], noise_std: float, kind: NoiseKind = TokenScaledNoise
) -> Tensor:
    """Signal-to-noise ratio of every decoder block's own output, from one clean forward pass in eval mode.

    `SNR = mean(|h|) / (mean(|noise|) + eps)` over real tokens (NoiseFiT, section 3). The published program samples
    ten noisy passes a layer for the denominator; here it is their exact limit, `noise.mean_size`.

    Args:
        model: a causal language model, wrapped or not.
        batch: `input_ids` and `attention_mask`, `[B, L]`, and `noise_mask` where not all tokens get noise.
        noise_std: the value of `--noise_std`.
        kind: of the noise.

    Returns:
        `[num_layers]`, float32 or wider, on the model's device; ratios, without a unit.
    """
    return _snr_of(model, batch, [kind(noise_std=noise_std)] * len(find_decoder_layers(model)))


def _snr_of(model: nn.Module, batch: Mapping[str, Tensor], noise: Sequence[TokenScaledNoise]) -> Tensor:
    """`layer_snr` with the noise of each layer."""

    def ratio(layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        scale = noise[layer].capped(noise[layer].scale(hidden, mask), hidden, mask)
        return mean_magnitude(hidden, mask) / (noise[layer].mean_size(scale, mask) + EPS)

    return _of_each_layer(model, batch, ratio)


@torch.no_grad()
def _of_each_layer(
    model: nn.Module, batch: Mapping[str, Tensor], measure: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:  # fmt: skip
    """`measure(layer, hidden states [B, L, H], mask)`, a scalar, of every decoder block's own output in eval mode."""
    layers = find_decoder_layers(model)
    found: dict[int, Tensor] = {}

    def hook(index: int, layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        found[index] = measure(index, block_hidden_states(output), batch.get("noise_mask", batch["attention_mask"]))

    was_training = model.training
    handles = [layer.register_forward_hook(functools.partial(hook, i)) for i, layer in enumerate(layers)]
    try:
        model.eval()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return torch.stack([found[index] for index in sorted(found)])


def select_layers(snr: Tensor, count: int, snr_format: str, first: int = 0) -> list[int]:
    """The `count` layers of largest or lowest SNR, in ascending order; of equal ones the earlier.

    Args:
        snr: `[num_layers]`.
        count: how many, 0 to the layers from `first` on.
        snr_format: `Largest` or `Lowest`.
        first: layers before it are not chosen.

    Raises:
        ValueError: `count` or `snr_format` is out of range.
        InputError: a ratio is not finite, so layers cannot be ranked.
    """
    if snr_format not in SNR_FORMATS:
        raise ValueError(f"snr_format is {snr_format!r}, expected one of {SNR_FORMATS}")
    if not 0 <= count <= len(snr) - first:
        raise ValueError(f"count is {count}, expected 0 to {len(snr) - first}")
    if not torch.isfinite(snr).all():
        bad = (~torch.isfinite(snr)).nonzero().flatten().tolist()
        raise InputError(
            f"the signal-to-noise ratio of layers {bad} is not finite: the model's hidden states overflow. "
            "Try bf16 instead of fp16, or check the model"
        )
    order = torch.argsort(snr[first:], descending=snr_format == "Largest", stable=True)
    return sorted(first + layer for layer in order[:count].tolist())


def average_snr(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], noise_std: float, kind: NoiseKind = TokenScaledNoise,
    base_stds: Sequence[float] = (),
) -> Tensor:  # fmt: skip
    """`layer_snr` averaged over batches and over all processes of the launch; `[num_layers]`, on the CPU, float64.

    Every process passes as many batches as the others. Where base scales of the layers are given, they take the place
    of `noise_std`.
    """
    if not base_stds:
        return _average(layer_snr(model, batch, noise_std, kind) for batch in batches)
    noise = [kind(base_std=base_std) for base_std in base_stds]
    return _average(_snr_of(model, batch, noise) for batch in batches)


def average_base_std(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], noise_std: float) -> Tensor:
    """`snr_base_std` of every decoder block's own output, measured and averaged as `average_snr` does."""

    def base_std(layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        return snr_base_std(hidden, noise_std, mask)

    return _average(_of_each_layer(model, batch, base_std) for batch in batches)


def _average(measured: Iterable[Tensor]) -> Tensor:
    total = torch.stack([as_float64(of_layers) for of_layers in measured]).mean(dim=0)
    return reduce(total, reduction="mean").cpu()


def negligible_noise(snr: Tensor, layers: Sequence[int], grows: str = "whose square it grows with") -> str | None:
    """One line where the noise is under 0.1% of the signal in every chosen layer; else `None`.

    Args:
        snr: `[num_layers]`.
        layers: the chosen ones.
        grows: how the noise grows with `--noise_std`, for the line.
    """
    if not layers or snr[list(layers)].min() <= 1 / NEGLIGIBLE:
        return None
    share = 1 / snr[list(layers)].min().item()
    return (
        f"the noise is at most {share:.2g} of the signal in every chosen layer: it does nearly nothing. "
        f"Raise --noise_std, {grows}"
    )
