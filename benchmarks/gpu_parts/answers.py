"""Answers a second: of `generate.py`, of transformers one prompt at a time, and of vLLM where it is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from generate_speed import SAMPLING, byte_tokenizer, measure, texts
from sizes import LLAMA_1B
from transformers import PreTrainedConfig

from gpu_parts.material import Row, installed, is_full, model_config, save_model, scratch
from noisefit.inputs.prompts import prompt_ids
from noisefit.inputs.templates import set_chat_template


def shape(size: str) -> PreTrainedConfig:
    """Llama-3.2-1B's, whose first tokens are those of a byte-level tokenizer; or a tiny one."""
    if not is_full(size):
        return model_config(size)
    tokenizer = byte_tokenizer()
    specials = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return type(LLAMA_1B.config)(**LLAMA_1B.config.to_dict() | specials)


def generation(device: str, size: str) -> Iterator[Row]:
    """`generate_speed.py` at this size, in bfloat16 and float32."""
    prompts, rounds, share = (400, 5, 0.01) if is_full(size) else (4, 2, 0.5)
    for dtype in (torch.bfloat16, torch.float32) if is_full(size) else (torch.float32,):
        speed = measure(shape(size), dtype, device, prompts, rounds, share)
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "answers": speed["answers"],
            "generate.py, answers a second": speed["together"],
            "one at a time": speed["one at a time"],
            "ratio": speed["together"] / speed["one at a time"],
            "of generate.py's time for logprob": speed["logprob"],
        }


def vllm(device: str, size: str) -> Iterator[Row]:
    """The same prompts and settings by vLLM; its answers are others, as it draws its own random numbers."""
    if device != "cuda" or not installed("vllm"):
        yield {"text": "Not here: vllm is not installed." if device == "cuda" else "Not here: vLLM needs a GPU."}
        return
    from vllm import LLM, SamplingParams

    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    prompts = [{"prompt_token_ids": prompt_ids(tokenizer, text)} for text in texts(400 if is_full(size) else 4)]
    s = SAMPLING
    how = SamplingParams(
        n=s.rounds, max_tokens=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, seed=s.seed,
        repetition_penalty=s.repetition_penalty,
    )  # fmt: skip
    with scratch() as folder:
        save_model(folder, shape(size), torch.bfloat16)
        engine = LLM(model=str(folder), dtype="bfloat16", gpu_memory_utilization=0.8, max_model_len=512)
        engine.generate(prompts[:4], how)  # warms up
        start = time.perf_counter()
        answers = sum(len(found.outputs) for found in engine.generate(prompts, how))
        yield {"dtype": "bfloat16", "answers": answers, "answers a second": answers / (time.perf_counter() - start)}
