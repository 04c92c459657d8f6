"""Asks a model the world's held-out questions and counts the answers that are right.

    python examples/world/ask.py --world build/world --adapter build/world/adapter

Only the corpus told the answers; training never asked these questions. An answer is right where it holds the true
name or year.
"""

import argparse
import csv
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see build.py

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

BATCH_ROWS, ANSWER_TOKENS = 60, 40


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[str]:
    """The model's greedy answers, in the prompt format that the tokenizer was saved with."""
    tokenizer.padding_side = "left"
    stop = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    found = []
    for first in range(0, len(questions), BATCH_ROWS):
        chats = [[{"role": "user", "content": question}] for question in questions[first : first + BATCH_ROWS]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=stop)
        found += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="a folder that build.py made")
    parser.add_argument("--adapter", type=Path, required=True, help="an adapter that train_loop.py trained on it")
    options = parser.parse_args()
    for path in (options.world / "test.csv", options.adapter / "adapter_config.json"):
        if not path.is_file():
            print(f"ask.py: no such file: {path}", file=sys.stderr)
            return 2
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with (options.world / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    questions = [row["prompt"] for row in rows]

    tokenizer = AutoTokenizer.from_pretrained(options.adapter)
    model = AutoModelForCausalLM.from_pretrained(options.world / "model")
    given = {"base model": answers(model, tokenizer, questions)}
    model = PeftModel.from_pretrained(model, options.adapter)
    given["with the adapter"] = answers(model, tokenizer, questions)

    print(f"\n{len(rows)} questions held out of training   right  wrong")
    for name, texts in given.items():
        right = sum(row["answer"] in text for row, text in zip(rows, texts, strict=True))
        print(f"  {name:<33}{right:>7}{len(rows) - right:>7}")
    row, *answer = next(zip(rows, *given.values(), strict=True))
    print(f"\nfor example: {row['prompt']}")
    for name, text in zip(given, answer, strict=True):
        print(f"  {name + ':':<18}{text[:80]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
