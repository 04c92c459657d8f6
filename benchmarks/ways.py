"""The ways of making one optimizer step that the benchmarks compare, and the models that they compare them on.

Each way is a method of `Steps` that makes one step (forward, backward, clip, AdamW) on the same model, batch and LoRA
adapter, and returns its loss.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from sizes import LLAMA_1B, QWEN_HALF_B, SIZES, TINY, Size  # noqa: F401 - for those who look for them here
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM

from noisefit.base.compiling import chunk_size_on, fused_losses
from noisefit.fork.branches import CLEAN, NOISY, TEACHER, BranchedModel, Logits, Losses
from noisefit.fork.decoder import find_decoder_layers
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.fork.tally import TokenTally
from noisefit.inputs.batches import Batch, collate, count_targets
from noisefit.inputs.prompts import Example
from noisefit.method.losses import consistency_loss, cross_entropy, soft_target_loss
from noisefit.method.noise import TokenScaledNoise
from noisefit.method.teacher import BaseModel, MovingAverage, OtherTeacher
from noisefit.method.top_k import TopK

NOISE_STD = 0.1
CACHED = 64  # tokens that are kept of a teacher's predictions


def build_model(size: Size, device: str, gradient_checkpointing: bool = False) -> nn.Module:
    """A random model of this size with LoRA on q_proj and v_proj, in training mode; on `meta`, its shapes alone."""
    torch.manual_seed(0)
    config = copy.deepcopy(size.config)
    if device == "meta":
        config._attn_implementation = "in_shape_alone"
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore", FutureWarning)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"])
        # The adapter in the model's dtype, in which mixed precision computes with it.
        base = AutoModelForCausalLM.from_config(config, dtype=size.dtype)  # made in it: 7B in float32 would take 28 GB
        model = get_peft_model(base, lora, autocast_adapter_dtype=False).train()
        model.config.use_cache = False
        if gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
    return model


def example_rows(size: Size) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size.config.vocab_size, (size.rows, size.length), generator=generator)
    return [Example(row, size.length - size.supervised) for row in ids.tolist()]


def other_noise() -> dict[str, TokenScaledNoise]:
    """By name, each way in which the noise's scale can live other than live."""
    kinds = {
        "frozen": TokenScaledNoise(base_std=NOISE_STD**2),
        "relative": TokenScaledNoise(NOISE_STD, relative=True),
        "live, with its gradient": TokenScaledNoise(NOISE_STD),
        "live, with a limit": TokenScaledNoise(NOISE_STD),
    }
    kinds["live, with its gradient"].gradient = True
    kinds["live, with a limit"].max_to_signal = 10.0  # is looked at, and never reached
    return kinds


class Steps:
    """The ways of ours, and the published one, on one model and batch."""

    def __init__(
        self, size: Size, device: str, gradient_checkpointing: bool = False, model: nn.Module | None = None
    ):  # fmt: skip
        self.model = build_model(size, device, gradient_checkpointing) if model is None else model
        self.chunk = chunk_size_on(device)  # the default of train_loop.py
        self.branched = BranchedModel(self.model, self.chunk)
        self.rows = example_rows(size)
        self.target_tokens = count_targets(self.rows)
        self.device = device
        self.teachers: dict[str, OtherTeacher] = {
            "base": BaseModel(self.branched), "ema": MovingAverage(self.branched, 0.99),
            "cached base": BaseModel(self.branched, CACHED),
        }  # fmt: skip
        self.top_k: TopK | None = None
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def batch(self) -> Batch:
        return collate(self.rows, 0, self.device)

    def ours(
        self, layers: Sequence[int] = (), strategy: str = "fork", kind: TokenScaledNoise | None = None,
        counting: bool = False, chunk: int = 0,
    ) -> Tensor:  # fmt: skip
        """A step as in `train_loop.py`; without noisy layers, plain fine-tuning. `kind` is the noise, if not live;
        `counting` accuracy and entropy, as a step does whose metrics are logged; `chunk` the `--loss_chunk_size`."""
        self.branched.loss_chunk_size = chunk or self.chunk
        noise = {layer: kind or TokenScaledNoise(NOISE_STD) for layer in layers}
        losses = noisefit_losses if noise else plain_losses
        tally = TokenTally(self.device) if counting else None
        sums = self.branched(**self.batch(), noise=noise, strategy=strategy, chunk_losses=losses, tally=tally)
        pop_noise_sizes(self.model)
        return self._update(sum(sums.values()) / self.target_tokens)

    def taught(self, name: str) -> Tensor:
        """A step of `--loss_mode ce_teacher` with this `--teacher`."""
        batch, teacher = self.batch(), self.teachers[name]
        if isinstance(teacher, BaseModel) and teacher.cached:
            self.top_k = self.top_k or teacher.top_k(batch, "fork", CACHED, 1.0)
            batch["teacher"] = self.top_k
        batch |= teacher.predictions(batch, "fork")
        sums = self.branched(**batch, branches=(CLEAN,), chunk_losses=teacher_losses)
        loss = self._update(sum(sums.values()) / self.target_tokens)
        teacher.follow()
        return loss

    def published(self, layers: Sequence[int]) -> Tensor:
        """The published way: three passes through the whole model, each of which forms the cross-entropy of all its
        logits, and KL terms over all positions, of which the supervised ones are kept. As in that program, gradients
        also flow through the distributions that are the targets."""
        batch = self.batch()
        labels = torch.full(batch["input_ids"].shape, -100, device=self.device)
        labels.view(-1)[batch["target_positions"] + 1] = batch["target_tokens"]  # the model shifts them back
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        clean = self.model(**inputs)
        blocks = find_decoder_layers(self.model)
        hooks = [blocks[i].register_forward_hook(_add_noise) for i in layers]
        try:
            noisy_1, noisy_2 = (self.model(**inputs).logits for _ in range(2))
        finally:  # memory may run out in between, and the next step is to have no noise of this one
            for hook in hooks:
                hook.remove()
        supervised = F.pad(labels[:, 1:] != -100, (0, 1))

        def kl(target: Tensor, predicted: Tensor) -> Tensor:
            divergence = F.kl_div(F.log_softmax(predicted, dim=-1), F.softmax(target, dim=-1), reduction="none")
            return (divergence.sum(dim=-1) * supervised).sum() / self.target_tokens

        soft = (kl(clean.logits, noisy_1) + kl(clean.logits, noisy_2)) / 2
        return self._update(0.5 * clean.loss + 0.5 * soft + 0.1 * kl(noisy_2, noisy_1))

    def _update(self, loss: Tensor) -> Tensor:
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@fused_losses
def plain_losses(logits: Logits, targets: Tensor) -> Losses:
    return {"ce": cross_entropy(logits[CLEAN][0], targets)}


@fused_losses
def teacher_losses(logits: Logits, targets: Tensor) -> Losses:
    [clean], [teacher] = logits[CLEAN], logits[TEACHER]
    return {"ce": 0.5 * cross_entropy(clean, targets), "soft": 0.5 * soft_target_loss(teacher, clean, 1.0)}


@fused_losses
def noisefit_losses(logits: Logits, targets: Tensor) -> Losses:
    [clean], (noisy_1, noisy_2) = logits[CLEAN], logits[NOISY]
    soft = soft_target_loss(clean, noisy_1, 1.0) + soft_target_loss(clean, noisy_2, 1.0)
    consistency = consistency_loss(noisy_1, noisy_2, 1.0)
    return {"ce": 0.5 * cross_entropy(clean, targets), "soft": 0.25 * soft, "consistency": 0.1 * consistency}


@torch.no_grad()
def _plain_sigma(hidden: Tensor) -> Tensor:
    """The noise's scale with torch's own medians, as the formulas read; there is no padding here."""
    h = hidden.float()
    variance = h.var(dim=-1, keepdim=True)
    factor = torch.exp(variance / (variance.mean() + 1e-6)).clamp(max=5)
    distance = (h - h.median(dim=-1, keepdim=True).values).abs()
    mad = torch.maximum(distance.median(dim=-1, keepdim=True).values, 1e-6 * h.norm(dim=-1, keepdim=True))
    return (NOISE_STD**2 * h.std() * mad * factor * torch.exp(-0.1 * distance / (mad + 1e-6))).to(hidden.dtype)


def _add_noise(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output + torch.randn_like(output) * _plain_sigma(output)


def floor(size: Size, first_noisy: int, head_share: float) -> float:
    """What the fork must cost, as a ratio to plain fine-tuning, by counting.

    With `p = (k + 1) / n`, the layers up to the first noisy one run once and the others three times: `p + 3 (1 - p)`.
    The head runs three times whichever layer is noisy.

    Args:
        size: has `n` layers.
        first_noisy: `k`.
        head_share: the head's share of the plain step's FLOPs.
    """
    share = (first_noisy + 1) / size.layers
    return (share + 3 * (1 - share)) * (1 - head_share) + 3 * head_share


def head_share(steps: Steps) -> float:
    """The LM head's share of the FLOPs of a plain step, forward and backward, as torch counts them."""
    # On a GPU, torch 2.11 cannot count fused attention that has fewer heads of keys than of queries.
    plain = sdpa_kernel(SDPBackend.MATH) if steps.device == "cuda" else contextlib.nullcontext()
    with plain, FlopCounterMode(display=False) as counter:
        steps.ours()
    counts = counter.get_flop_counts()
    heads = [sum(flops.values()) for name, flops in counts.items() if name.endswith("lm_head")]
    return max(heads) / counter.get_total_flops()


def check_picture(parser: argparse.ArgumentParser, name: str | None) -> None:
    """End the program in a line where the picture that is asked for could not be drawn, before anything is timed."""
    if name is None:
        return
    path = Path(name).resolve()
    if not path.parent.is_dir():
        parser.error(f"--picture: there is no folder {path.parent}")
    if path.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--picture: {path.name} is no .png, .pdf or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")


def attention_in_shape_alone(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """SDPA's kernel that keeps no scores. On `meta`, torch would count the one that keeps all of them."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = 1 / math.sqrt(query.shape[-1])
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("in_shape_alone", attention_in_shape_alone)
