"""How probable an answer is under noise in the layers that its model was trained with noise in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from noisefit.answers.probability import answer_logits, token_log_p
from noisefit.fork.hooks import INPUT, NoiseFunction, Pass, layer_hooks
from noisefit.method.noise import TokenScaledNoise

AT_ONCE = 8  # passes that are rows of one: their memory does not grow with --noise_passes


class NoisyPasses:
    """Passes over a prompt and its answer, each with noise of its own.

    The noise of a layer is a function of the answer's key, the pass and the layer, and its scale one of the hidden
    states of this prompt and answer: so it depends neither on other answers nor on how many passes there are.

    Args:
        model: a causal language model in eval mode.
        noise: a layer's index, or `EMBEDDING`, to its noise.
        count: passes for an answer, at least one.
    """

    def __init__(self, model: Any, noise: Mapping[int, TokenScaledNoise], count: int):
        self.model, self.noise, self.count = model, noise, count
        self.hooks = layer_hooks(model)

    @torch.no_grad()
    def log_p(self, prompt: list[int], answer: list[int], key: int) -> list[float]:
        """`log p` of an answer in each pass, summed over its tokens.

        Args:
            prompt: its tokens.
            answer: its tokens, at least one.
            key: of the answer, see `noisefit.answers.gumbel.answer_key`.
        """
        found: list[float] = []
        for start in range(1, self.count + 1, AT_ONCE):
            numbers = tuple(range(start, min(start + AT_ONCE, self.count + 1)))
            noise = {layer: keyed_noise(of_layer, key, layer) for layer, of_layer in self.noise.items()}
            # Rows of their own from the tokens on: so it is exact for every architecture, as the fork may not be.
            with self.hooks.applying(Pass(noise, numbers, batch_size=1, fork_layer=INPUT)):
                logits = answer_logits(self.model, prompt, answer, len(numbers))
            tokens = torch.tensor(answer, device=logits.device)
            found += [float(token_log_p(of_pass, tokens)[0].sum()) for of_pass in logits]
        return found


def keyed_noise(noise: TokenScaledNoise, key: int, layer: int) -> NoiseFunction:
    """The noise of a layer, drawn as in training, from a generator that is seeded for each answer, pass and layer."""

    def draw(hidden_states: Tensor, branch: int, mask: Tensor | None) -> Tensor:
        scale = noise.capped(noise.scale(hidden_states, mask), hidden_states, mask)
        device = hidden_states.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(noise_seed(key, branch, layer))
            return noise.draw(scale)

    return draw


def noise_seed(key: int, number: int, layer: int) -> int:
    """The generator's seed for a layer in a pass, the first of which is 1: of 63 bits."""
    digest = hashlib.sha256(f"noise\0{key}\0{number}\0{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
