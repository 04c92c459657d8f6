"""Policy `auto`: noise in each layer alone, at several scales, and the layers and scales that this speaks for.

The rules are those of the authors' second program. It pays a full forward pass for each layer, scale and batch; here
a layer's blocks before the noise are not computed again, and the scales are branches of one pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from noisefit.base.errors import InputError
from noisefit.base.precision import as_float64, without_tf32
from noisefit.fork.branches import CLEAN, NOISY, Logits, Losses
from noisefit.fork.decoder import find_decoder, find_decoder_layers
from noisefit.fork.exactness import ROWS, TOKENS, tolerance_of
from noisefit.fork.known import knowing
from noisefit.method.losses import cross_entropy, symmetric_kl
from noisefit.method.noise import TokenScaledNoise
from noisefit.method.policy import NoiseKind


@dataclass(frozen=True)
class Responses:
    """How the model answers to noise in one layer alone, on average over supervised tokens; float64 on the CPU.

    Attributes:
        layers: the layers that were tried, ascending.
        factors, scales: the base scales that were tried, ascending; `scale = factor / sqrt(H)`.
        kl: `[layers, scales]`, symmetric KL between noisy and clean predictions, nats a token.
        ce_change: `[layers, scales]`, the increase of the cross-entropy, nats a token, 0 where it fell.
        clean_ce: the cross-entropy without noise, nats a token.
        tokens: the supervised tokens.
        hidden_size: `H`.
    """

    layers: list[int]
    factors: list[float]
    scales: list[float]
    kl: Tensor
    ce_change: Tensor
    clean_ce: float
    tokens: int
    hidden_size: int


@dataclass(frozen=True)
class Rules:
    """By what `choose` goes.

    Attributes:
        penalty: divides a scale's score by `1 + penalty * log2(factor)^2`.
        max_ce_ratio: scales that raise the cross-entropy by a larger share are out.
        depth_bands: bands of depth that the layers are spread over.
        max_layers: at the most; 0: the square root of the model's.
        target_kl: a layer's scale is the smallest whose KL is this share of the chosen layers' median.
    """

    penalty: float = 0.05
    max_ce_ratio: float = 0.02
    depth_bands: int = 3
    max_layers: int = 0
    target_kl: float = 0.75


@dataclass(frozen=True)
class Choice:
    """What `choose` made of the responses.

    Attributes:
        layers: the chosen ones, ascending.
        scales: the base scale of each.
        score: `[layers, scales]` of the responses.
        allowed: `[layers, scales]`, whether the scale leaves the cross-entropy nearly as it is.
        threshold: the best score that a layer must reach.
    """

    layers: list[int]
    scales: list[float]
    score: Tensor
    allowed: Tensor
    threshold: float


@torch.no_grad()
def measure(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], layers: Sequence[int], factors: Sequence[float],
    strategy: str, step: Callable[[], object] = lambda: None, kind: NoiseKind = TokenScaledNoise,
) -> Responses:  # fmt: skip
    """Try noise in each layer alone, at each scale, in eval mode. All processes call it, with as many batches.

    All scales of a layer and batch share one draw, so that they differ by their strength and not by chance.

    Args:
        model: a `BranchedModel`, wrapped or not.
        batches: as `collate` makes them.
        layers: to try.
        factors: the scales to try, in units of `1 / sqrt(H)`, ascending.
        strategy: of `BranchedModel.forward`. With `fork` the tails alone are computed, where that is exact.
        step: called after each layer of each batch.
        kind: of the noise.

    Raises:
        InputError: the responses are not finite, or there is no supervised token.
    """
    blocks = find_decoder_layers(model)
    was_training = model.training
    model.eval()
    hidden_size: int = find_decoder(model).config.get_text_config(decoder=True).hidden_size
    scales = [factor / math.sqrt(hidden_size) for factor in factors]
    noise = kind(base_std=1.0)
    found: list[Tensor] = []  # of each batch, [layers, 2 * scales + 1]
    try:
        reusing = strategy == "fork" and _reusable(model, batches[0], blocks, layers, noise)
        if strategy == "fork" and not reusing:
            strategy = "separate"  # what goes from block to block besides may not allow a fork after each of them
        how: dict[str, Any] = {"branches": (CLEAN, *[NOISY] * len(scales)), "strategy": strategy}
        for batch in batches:
            outputs, clean = _clean_pass(model, batch, blocks) if reusing else ([], None)
            run = functools.partial(model, **batch, **how, chunk_losses=_sum_responses, clean_states=clean)
            of_layers = []
            for layer in layers:
                with knowing(model, outputs[: layer + 1]):
                    of_layers.append(run(noise={layer: _OneDraw(noise, scales)})[RESPONSES])
                step()
            found.append(as_float64(torch.stack(of_layers)))
    finally:
        model.train(was_training)
    sums = functools.reduce(torch.add, found)
    tokens = sums.new_tensor([sum(len(batch["target_tokens"]) for batch in batches)])
    *_, count = total = reduce(torch.cat([sums.flatten(), tokens]), "sum").cpu()
    means = (total[:-1] / count).view(sums.shape)
    if not means.isfinite().all():
        what = "the model's answers to noise are not finite" if count else "its batches have no supervised token"
        raise InputError(f"--noise_policy auto: {what}; raise --auto_calib_batches, try bf16 instead of fp16, or snr")
    clean_ce, ce, kl = means.split([1, len(scales), len(scales)], dim=1)
    change = (ce - clean_ce).clamp(min=0)
    return Responses(list(layers), list(factors), scales, kl, change, clean_ce[0].item(), int(count), hidden_size)


def choose(found: Responses, num_layers: int, rules: Rules) -> Choice:
    """The layers that get noise, and the scale of each.

    With `r` the increase of the cross-entropy as a share of the clean one, a scale's score is `kl / (1 + r) /
    (1 + penalty * log2(factor)^2)`; scales with a larger `r` than allowed are out, unless a layer has none left. Layers
    whose best score reaches median + MAD of all (the lower medians) are candidates, of which at most
    `ceil(sqrt(num_layers))` are taken, spread over bands of depth. Their scale is the smallest that reaches a
    fraction of the median KL that they have at their best ones; where none does, the allowed one of largest KL.

    Args:
        found: by `measure`.
        num_layers: of the model.
        rules: by what.
    """
    ratio = found.ce_change / max(found.clean_ce, 1e-8)
    octaves = torch.tensor(found.factors, dtype=torch.float64).log2()
    score = found.kl / (1 + ratio) / (1 + rules.penalty * octaves**2)
    allowed = ratio <= rules.max_ce_ratio
    allowed |= ~allowed.any(dim=1, keepdim=True)
    best, at = score.masked_fill(~allowed, -math.inf).max(dim=1)
    threshold = best.median() + (best - best.median()).abs().median()
    candidates = [row for row in range(len(best)) if best[row] >= threshold and best[row] > 0] or [int(best.argmax())]
    limit = rules.max_layers or math.ceil(math.sqrt(num_layers))
    rows = _spread(candidates, best.tolist(), rules.depth_bands, limit)

    target = rules.target_kl * found.kl[rows, at[rows]].median()
    scales = []
    for row in rows:
        fitting = [j for j in range(len(found.scales)) if allowed[row, j]]
        reaching = [j for j in fitting if found.kl[row, j] >= target]
        scales.append(found.scales[reaching[0] if reaching else max(fitting, key=lambda j: found.kl[row, j].item())])
    return Choice([found.layers[row] for row in rows], scales, score, allowed, threshold.item())


def _spread(candidates: Sequence[int], best: Sequence[float], bands: int, limit: int) -> list[int]:
    """At most `limit` candidates, ascending: of each band of depth its share of the best, then the best of the rest.

    A band's share is `ceil(limit / bands)`. Where not every band can have its share, all have the first of it before
    any has the second, so that no band is left out for being the last.
    """
    share, taken = math.ceil(limit / bands), [0] * bands
    order = []
    for row in sorted(candidates, key=lambda row: -best[row]):
        band = row * bands // len(best)
        order.append((min(taken[band], share), -best[row], row))
        taken[band] += 1
    return sorted(row for _, _, row in sorted(order)[:limit])


def record(found: Responses, choice: Choice) -> dict[str, Any]:
    """Everything that was measured and chosen, as JSON values: the part of `noise_policy.json` that explains it."""
    base_stds = dict(zip(choice.layers, choice.scales, strict=True))
    tried = []
    for row, layer in enumerate(found.layers):
        columns = zip(found.factors, found.scales, found.kl[row].tolist(), found.ce_change[row].tolist(),
                      choice.score[row].tolist(), choice.allowed[row].tolist(), strict=True)  # fmt: skip
        grid = [dict(zip(("factor", "scale", "kl", "ce_change", "score", "allowed"), c, strict=True)) for c in columns]
        best = max(entry["score"] for entry in grid if entry["allowed"])
        scale = base_stds.get(layer)
        tried.append({"layer": layer, "selected": scale is not None, "scale": scale, "best_score": best, "grid": grid})
    about = {"hidden_size": found.hidden_size, "tokens": found.tokens, "clean_ce": found.clean_ce}
    return about | {"threshold": choice.threshold, "layers": tried}


class _OneDraw:
    """Noise of one draw: noisy branch `j` gets it at the `j`-th of the base scales."""

    def __init__(self, noise: TokenScaledNoise, scales: Sequence[float]):
        self.noise, self.scales = noise, scales

    def __call__(self, hidden_states: Tensor, branch: int, mask: Tensor | None) -> Tensor:
        if branch == 1:
            scale = self.noise.scale(hidden_states, mask)
            self.unit, self.most = self.noise.draw(scale), math.inf
            if self.noise.max_to_signal:
                self.most = self.noise.limit(scale, hidden_states, mask).item()
        return self.unit * min(self.scales[branch - 1], self.most)


RESPONSES = "responses"


def _sum_responses(logits: Logits, target_tokens: Tensor, target_weights: Tensor | None = None) -> Losses:
    """Of one chunk: the clean cross-entropy, that at each scale, and the symmetric KL at each; sums over tokens, which
    count alike, whatever their rows' weights in training."""
    [clean], noisy = logits[CLEAN], logits[NOISY]
    ce = [cross_entropy(branch, target_tokens) for branch in (clean, *noisy)]
    return {RESPONSES: torch.stack([*ce, *(symmetric_kl(clean, branch, 1.0) for branch in noisy)])}


def _clean_pass(model: nn.Module, batch: Mapping[str, Tensor], blocks: nn.ModuleList) -> tuple[list[Any], Tensor]:
    """Every block's own output, and the final hidden states `[B, L, H]`."""
    outputs: list[Any] = []
    handles = [block.register_forward_hook(lambda block, args, output: outputs.append(output)) for block in blocks]
    try:
        return outputs, _final_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _final_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    # As in the fork, attention is not told of padding: what it makes of padded tokens is then finite, here as there.
    final: Tensor = model(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["attention_mask"]))
    return final


@without_tf32()
def _reusable(
    model: nn.Module, batch: Mapping[str, Tensor], blocks: nn.ModuleList, layers: Sequence[int], noise: TokenScaledNoise
) -> bool:
    """Whether the blocks up to a layer can answer what they did before: whether nothing but hidden states goes from
    block to block, also where the rows then part.

    Tried after each layer on a slice of the batch, with noise of strength 0. All processes get the same answer.
    """
    ids, mask = (batch[name][:ROWS, :TOKENS] for name in ("input_ids", "attention_mask"))
    positions = mask.flatten().nonzero().flatten()
    small = {"input_ids": ids, "attention_mask": mask, "target_positions": positions}
    small["target_tokens"] = ids.flatten()[positions]
    dtypes: list[torch.dtype] = []

    def watch(logits: Logits, target_tokens: Tensor) -> Losses:
        dtypes.append(logits[NOISY][0].dtype)
        return _sum_responses(logits, target_tokens)

    try:
        outputs, clean = _clean_pass(model, small, blocks)
        how: dict[str, Any] = {"branches": (CLEAN, NOISY, NOISY), "strategy": "fork", "chunk_losses": watch}
        largest = 0.0
        for layer in layers:
            with knowing(model, outputs[: layer + 1]):
                sums = model(**small, **how, noise={layer: _OneDraw(noise, [0.0, 0.0])}, clean_states=clean)[RESPONSES]
            largest = max(largest, (sums[-2:].max() / len(positions)).item())
        same = largest <= tolerance_of(model, dtypes[0]) ** 2  # a KL is quadratic in what the logits differ by
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an architecture's own code runs here without some of its blocks
        same = False
    return all(gather_object([same]))
