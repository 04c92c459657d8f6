"""How much faster `generate.py` answers than a loop over one prompt at a time, side by side in one run.

    python benchmarks/generate_speed.py [--rounds 5] [--prompts 208] [--share 0.1]

A random Llama (4 layers, width 256, vocabulary 32,000), prompts of 20 to 40 tokens, 50 new tokens an answer, and the
sampling settings of `generate.py`'s defaults on both sides. The loop is the published way: `generate` with
`do_sample`, for one prompt and one round at a time. It is timed on a share of the work, spread evenly over it, as the
whole takes long; the ratio is of answers a second. Two lines say what `logprob` costs: its share of the time of
`generate.py`, and how many answers were near a border of its rounding and took a pass of their own. The last ones are
of a token's draw alone from logits over 128,000 tokens, with `--top_k 0`: top-p among the likeliest first, against a
sort of the whole vocabulary. The logits are random: of a sharpness at which top-p leaves some dozens, and flat, where
it leaves most and all is sorted in both.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)

from noisefit.answers import generation, gumbel, probability
from noisefit.answers.generation import Answerer, answer_all
from noisefit.answers.jobs import Job
from noisefit.answers.settings import DrawSettings
from noisefit.inputs.prompts import prompt_ids
from noisefit.inputs.templates import set_chat_template

SAMPLING = DrawSettings(seed=0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def one_at_a_time(answerer: Answerer, jobs: list[Job]) -> int:
    """The published loop; returns how many answers it made."""
    s, made = answerer.sampling, 0
    for job in jobs:
        for _ in job.rounds:
            ids = torch.tensor([job.input_ids], device=answerer.device)
            answerer.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=s.max_new_tokens,
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, repetition_penalty=s.repetition_penalty,
                eos_token_id=answerer.stop_ids, pad_token_id=answerer.tokenizer.pad_token_id,
            )  # fmt: skip
            made += 1
    return made


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, adding what each call takes to `seconds`."""

    def call(*args: Any) -> Any:
        start = now()
        result = function(*args)
        seconds.append(now() - start)
        return result

    return call


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def draws(device: str, rows: int, vocabulary: int) -> list[str]:
    """Lines of what a draw costs with top-p and no top-k."""
    lines = []
    keys = torch.arange(rows, device=device)
    ids = torch.zeros(rows, 10, dtype=torch.long, device=device)
    for kind, sharpness in (("sharp", 6.0), ("flat", 0.5)):
        torch.manual_seed(0)
        logits = torch.randn(rows, vocabulary, device=device) * sharpness
        found, seconds = [], []
        for likeliest in (gumbel.LIKELIEST, vocabulary):
            with mock.patch.object(gumbel, "LIKELIEST", likeliest):
                sampler = gumbel.GumbelSampling(keys, 5, TopPLogitsWarper(SAMPLING.top_p))
                sampler(ids, logits)  # warms up
                start = now()
                found.append(sampler(ids, logits))
                seconds.append(now() - start)
        if not torch.equal(*found):
            raise SystemExit("the two ways draw other tokens")
        lines.append(f"{'top-p, ' + kind + ' logits':<24}{seconds[1] / seconds[0]:>9.1f} times faster than by a sort "
                     f"({seconds[0] * 1000:.0f} against {seconds[1] * 1000:.0f} ms for {rows} tokens)")  # fmt: skip
    return lines


def measure(
    config: PreTrainedConfig, dtype: torch.dtype, device: str, prompts: int, rounds: int, share: float
) -> dict[str, Any]:  # fmt: skip
    """Answers a second of both, on a random model of this configuration; the loop is timed on a share of the prompts.

    Returns:
        Also what `logprob` costs, as shares of the time of `generate.py`.
    """
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    answerer = Answerer(model, tokenizer, SAMPLING)
    jobs = [
        Job(i, text, prompt_ids(tokenizer, text), tuple(range(1, rounds + 1))) for i, text in enumerate(texts(prompts))
    ]
    some = jobs[:: max(1, round(1 / share))]

    one_at_a_time(answerer, some[:1])  # warms up
    start = now()
    alone = one_at_a_time(answerer, some) / (now() - start)
    of_tokens: list[float] = []
    again: list[float] = []
    reader = probability.ReadDrawn
    with (
        mock.patch.object(generation, "answer_log_p", timed(generation.answer_log_p, again)),
        mock.patch.object(reader, "__call__", timed(reader.__call__, of_tokens)),
    ):
        start = now()
        answers = sum(len(batch) for batch in answer_all(answerer, jobs, 0))
        took = now() - start
    return {
        "one at a time": alone, "timed on": len(some), "together": answers / took, "answers": answers,
        "logprob": sum(of_tokens) / took, "again": sum(again) / took, "passes again": len(again),
    }  # fmt: skip


def texts(count: int) -> list[str]:
    return ["What is " + "so " * (i % 8) + f"{i}?" for i in range(count)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=208)
    parser.add_argument("--rounds", type=int, default=5, help="answers to each prompt")
    parser.add_argument("--share", type=float, default=0.1, help="share of the prompts that the loop is timed on")
    parser.add_argument("--rows", type=int, default=32, help="tokens drawn at once, in the last lines")
    parser.add_argument("--vocabulary", type=int, default=128_000, help="of the last lines")
    args = parser.parse_args(arguments)
    device, tokenizer = "cuda" if torch.cuda.is_available() else "cpu", byte_tokenizer()
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    speed = measure(config, torch.float32, device, args.prompts, args.rounds, args.share)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.prompts} prompts x {args.rounds} rounds of {SAMPLING.max_new_tokens} tokens on {where}")
    alone, together = speed["one at a time"], speed["together"]
    print(f"{'one prompt at a time':<24}{alone:>9.1f} answers a second (timed on {speed['timed on']} prompts)")
    print(f"{'generate.py':<24}{together:>9.1f} answers a second")
    print(f"{'ratio':<24}{together / alone:>9.1f}")
    print(f"{'logprob, each token':<24}{speed['logprob']:>9.1%} of the time")
    passes = f"{speed['passes again']} of {speed['answers']} answers"
    print(f"{'logprob, passes again':<24}{speed['again']:>9.1%} of the time, for {passes}")
    print(*draws(device, args.rows, args.vocabulary), sep="\n")


if __name__ == "__main__":
    main()
