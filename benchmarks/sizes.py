"""The models and batches that the benchmarks measure on, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config


@dataclass(frozen=True)
class Size:
    """A model and a batch: `rows` rows of `length` tokens, the last `supervised` of each supervised."""

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    rows: int
    length: int
    supervised: int

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def __str__(self) -> str:
        c = self.config
        return (
            f"{self.name} ({self.layers} layers, width {c.hidden_size}, vocabulary {c.vocab_size:,}, "
            f"{str(self.dtype).removeprefix('torch.')}), {self.rows} rows of {self.length} tokens, "
            f"{self.supervised} of them supervised"
        )


SMALL = Size(
    "a small Llama",
    LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        max_position_embeddings=128,
    ),
    torch.float32, rows=4, length=128, supervised=32,
)  # fmt: skip
SMALL_128K = replace(
    SMALL,
    name="a small Llama with a large vocabulary",
    config=LlamaConfig(**SMALL.config.to_dict() | {"vocab_size": 128_256}),
)
LLAMA_1B = Size(
    "Llama-3.2-1B's shape",
    LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    torch.bfloat16, rows=8, length=1024, supervised=1023,
)  # fmt: skip
QWEN_HALF_B = Size(
    "Qwen2.5-0.5B's shape",
    Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    torch.bfloat16, rows=8, length=1024, supervised=1023,
)  # fmt: skip
LLAMA_7B = Size(
    "Llama-2-7B's shape",
    LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    torch.bfloat16, rows=4, length=1024, supervised=1023,
)  # fmt: skip
TINY = Size(
    "a tiny Llama",
    LlamaConfig(
        vocab_size=4099, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    torch.float32, rows=2, length=64, supervised=32,
)  # fmt: skip
SIZES = {
    "tiny": TINY, "small": SMALL, "small-128k": SMALL_128K, "llama-1b": LLAMA_1B, "qwen-0.5b": QWEN_HALF_B,
    "llama-7b": LLAMA_7B,
}  # fmt: skip
# Shapes by name, of which those too large for a step here have no batch.
SHAPES: dict[str, PreTrainedConfig] = {name: size.config for name, size in SIZES.items()} | {
    "llama-70b": LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192,
    ),
}  # fmt: skip
