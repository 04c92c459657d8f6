"""What a NoiseFiT step costs, as a ratio to plain fine-tuning of the same model in the same run.

    python benchmarks/step_cost.py [--rounds 3]

A random Llama (12 layers, width 512, vocabulary 32,000) with LoRA on q_proj and v_proj, batch 4 x 128, 32 supervised
tokens a row, one forward and backward pass. The ways take turns, so that a machine whose speed drifts slows all of
them, and each ratio is the median over the rounds. The floor counts decoder layers: with `p = (k + 1) / n`, the share
of the layers up to the first noisy one, it is `p + 3 (1 - p)`.
"""

import argparse
import functools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from noisefit.batches import collate
from noisefit.branches import BranchedModel
from noisefit.decoder import find_decoder_layers
from noisefit.losses import consistency_loss, cross_entropy, soft_target_loss
from noisefit.noise import TokenScaledNoise
from noisefit.prompts import Example

LAYERS, WIDTH, VOCABULARY = 12, 512, 32_000
ROWS, LENGTH, SUPERVISED = 4, 128, 32


def build_model(device: str) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, max_position_embeddings=LENGTH,
    )  # fmt: skip
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(LlamaForCausalLM(config), lora).to(device).train()


def plain_losses(clean: Tensor, noisy_1: Tensor, noisy_2: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(clean, targets).unsqueeze(0)


def noisefit_losses(clean: Tensor, noisy_1: Tensor, noisy_2: Tensor, targets: Tensor) -> Tensor:
    soft = soft_target_loss(clean, noisy_1, 1.0) + soft_target_loss(clean, noisy_2, 1.0)
    return torch.stack(
        [0.5 * cross_entropy(clean, targets), 0.25 * soft, 0.1 * consistency_loss(noisy_1, noisy_2, 1.0)]
    )


def ours(model: nn.Module, batch: dict, layers: list[int], strategy: str) -> None:
    losses = noisefit_losses if layers else plain_losses
    noise = {layer: TokenScaledNoise(0.1) for layer in layers}
    BranchedModel(model, 256)(**batch, noise=noise, strategy=strategy, chunk_losses=losses).sum().backward()


def published(model: nn.Module, batch: dict, layers: list[int]) -> None:
    """Three passes through the whole model, and the losses over all its logits with the other positions masked."""
    inputs = {"input_ids": batch["input_ids"]}
    clean = model(**inputs).logits
    blocks = find_decoder_layers(model)

    def add_noise(source: TokenScaledNoise, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + source(output, 1, batch["attention_mask"])

    hooks = [blocks[i].register_forward_hook(functools.partial(add_noise, TokenScaledNoise(0.1))) for i in layers]
    noisy = [model(**inputs).logits for _ in range(2)]
    for hook in hooks:
        hook.remove()
    labels = torch.full(batch["input_ids"].shape, -100, device=clean.device).flatten()
    labels[batch["target_positions"]] = batch["target_tokens"]
    supervised = (labels != -100).unsqueeze(-1)
    ce = F.cross_entropy(clean.flatten(0, 1), labels, reduction="sum")
    logs = [F.log_softmax(logits.float().flatten(0, 1), dim=-1) for logits in (clean, *noisy)]

    def kl(target: Tensor, predicted: Tensor) -> Tensor:
        return (F.kl_div(predicted, target.detach(), reduction="none", log_target=True) * supervised).sum()

    (0.5 * ce + 0.25 * (kl(logs[0], logs[1]) + kl(logs[0], logs[2])) + 0.1 * kl(logs[2], logs[1])).backward()


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that every way takes its turn")
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build_model(device)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH)).tolist()
    batch = collate([Example(row, LENGTH - SUPERVISED) for row in ids], 0, device)

    quarters = {"9-11": [9, 10, 11], "5-7": [5, 6, 7], "0-2": [0, 1, 2]}
    ways: dict[str, Callable[[], None]] = {"plain fine-tuning": functools.partial(ours, model, batch, [], "fork")}
    floors = {"plain fine-tuning": 1.0}
    for name, layers in quarters.items():
        ways[f"fork, noise in layers {name}"] = functools.partial(ours, model, batch, layers, "fork")
        share = (layers[0] + 1) / LAYERS
        floors[f"fork, noise in layers {name}"] = share + 3 * (1 - share)
    ways["separate passes, layers 0-2"] = functools.partial(ours, model, batch, [0, 1, 2], "separate")
    ways["three passes, all logits, layers 0-2"] = functools.partial(published, model, batch, [0, 1, 2])

    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, step in ways.items():
            elapsed = seconds(step, device)
            if round_number:  # the first round warms up
                times[name].append(elapsed)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"one forward and backward pass on {where}, torch {torch.__version__}, {rounds} rounds")
    print(f"{'':<38}{'ratio to plain':>16}{'floor':>8}")
    for name, taken in times.items():
        ratios = [t / plain for t, plain in zip(taken, times["plain fine-tuning"], strict=True)]
        floor = f"{floors[name]:.2f}" if name in floors else ""
        print(f"{name:<38}{statistics.median(ratios):>16.2f}{floor:>8}")


if __name__ == "__main__":
    main()
