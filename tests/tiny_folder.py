"""Model folders in the Hugging Face format, small and random, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "</s>"]


def byte_tokenizer(**specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte and no chat template; `<|im_end|>` is many tokens to it."""
    vocabulary = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = specials or dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def tiny_folder(path: Path, model_type: str = "llama", **overrides: object) -> Path:
    """Save a random float32 model of 4 layers and its tokenizer to `path`."""
    tokenizer = byte_tokenizer()
    overrides = dict(vocab_size=len(tokenizer)) | overrides
    model = tiny_model(model_type, torch.float32, **overrides)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


if __name__ == "__main__":
    import sys

    torch.manual_seed(0)
    tiny_folder(Path(sys.argv[1]), *sys.argv[2:])
