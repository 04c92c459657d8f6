"""Random models small enough for a test, and batches for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from noisefit.fork.decoder import find_decoder_layers
from noisefit.method.noise import TokenScaledNoise

VOCAB = 97
_SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GPT_SIZES = dict(
    vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
CONFIGS: dict[str, dict] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "mistral": _SIZES | dict(sliding_window=5),
    "gemma2": _SIZES | dict(sliding_window=5, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gpt2": _GPT_SIZES,
    "bloom": dict(
        vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "qwen3": _SIZES,
    "cohere": _SIZES | dict(logit_scale=0.25),
    "granite": _SIZES | dict(logits_scaling=3.0),
    "opt": dict(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
        word_embed_proj_dim=24, dropout=0.0, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    ),
    "gemma3_text": _SIZES | dict(sliding_window=5, query_pre_attn_scalar=8),
    "mixtral": _SIZES | dict(num_local_experts=4),
    "glm4_moe": _SIZES | dict(
        moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    ),
    "phi": _SIZES | dict(num_key_value_heads=4),
    "falcon": dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
}  # fmt: skip


def tiny_model(
    model_type: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: object
) -> nn.Module:
    """A random model of this architecture, without dropout, whose logits are far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.3 if "embed" in name or "wte" in name else 0.2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def tiny_batch(lengths: tuple[int, ...] = (11, 7, 9), seed: int = 0) -> dict[str, Tensor]:
    """Random token ids, right-padded, with their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def supervise(batch: dict[str, Tensor], first: int = 3) -> dict[str, Tensor]:
    """Add targets: every real token from position `first` on is supervised, predicted from the one before it."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows, columns = (mask[:, first:] != 0).nonzero(as_tuple=True)
    columns = columns + first
    targets = {"target_positions": rows * ids.shape[1] + columns - 1, "target_tokens": ids[rows, columns]}
    return batch | targets


def fixed_noise(layer: int, strength: float = 0.4):
    """Noise that depends on layer, branch and hidden states alone, not on a random generator."""

    def draw(hidden: Tensor, branch: int, mask: Tensor | None = None) -> Tensor:
        pattern = torch.arange(hidden.numel(), dtype=torch.float64, device=hidden.device).view_as(hidden)
        return (strength * torch.sin(pattern * 0.7 + 3 * branch + layer)).to(hidden.dtype)

    return draw


class LaplaceNoise(TokenScaledNoise):
    """Another distribution, of as many lines as one takes: its tails are heavier, and its scale is the mean of |x|."""

    mean_of_unit = 1.0

    def draw(self, scale: Tensor) -> Tensor:
        return (torch.empty_like(scale).exponential_() - torch.empty_like(scale).exponential_()) * scale


def rows_and_calls(model: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """What passes through the decoder's blocks: rows, summed over the layers, and calls."""
    rows, calls = 0, 0

    def count(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal rows, calls
        rows, calls = rows + len(output), calls + 1

    # Put before the hooks of the branches, so that the rows are those that the block itself computed.
    hooks = [layer.register_forward_hook(count, prepend=True) for layer in find_decoder_layers(model)]
    run()
    for hook in hooks:
        hook.remove()
    return rows, calls
