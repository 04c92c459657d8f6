"""What a large file of rows takes before training begins, as lists and as stored rows: seconds, and memory a process.

    python benchmarks/data_scale.py [--rows 100000] [--folder build/data_scale] [--lists no]

Rows of about 200 tokens of a small BPE tokenizer, made from a seed. Each way is a process of its own: lists, as small
files are kept; stored rows on their first start, which tokenizes them on all cores, and on the second; and a process
beside the first of its machine. Seconds of processors are those of all cores together, which a busy machine stretches
less. Memory is private (`RssAnon` of Linux, which no other process shares), its peak while the rows are made and what
is left then; with it the pages of files (`RssFile`), which all processes of a machine share and the system takes back
when it needs them, after an epoch's first 200 steps of 64 rows. What Python and the libraries take is told first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from noisefit.base.errors import InputError, one_line_errors
from noisefit.inputs import stored
from noisefit.inputs.batches import collate, count_tokens, epoch_steps
from noisefit.inputs.prompts import PromptSettings
from noisefit.inputs.stored import StoredExamples, cache_folder
from noisefit.inputs.templates import set_chat_template
from noisefit.run.rows import list_rows, make_rows

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("nothing", "lists", "stored, first start", "stored, second start", "stored, another process")
PROMPT, RESPONSE = 75, 87  # words
STEPS, STEP_ROWS = 200, 64


def make_file(path: Path, rows: int) -> None:
    """A CSV of questions and answers in invented words, and a tokenizer that learnt them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    with path.open("w", encoding="utf-8") as file:
        file.write("prompt,response\n")
        for number in range(rows):
            prompt, response = (" ".join(draw.choices(words, k=count)) for count in (PROMPT, RESPONSE))
            file.write(f"{number} {prompt}?,{response}.\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((f" {word}" for word in words for _ in range(2)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path.parent / "tokenizer")


def memory() -> dict[str, int]:
    """Bytes of this process's memory by kind, of Linux alone."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0].startswith("Rss")}


class Peak:
    """The most private memory within a block, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        self.most, self._end = memory()["RssAnon"], threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, memory()["RssAnon"])

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()


def measure(way: str, path: Path) -> dict[str, float]:
    """One way in this process."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent / "tokenizer")
    set_chat_template(tokenizer)
    alone, stored.LARGE = SimpleNamespace(is_local_main_process=True), 0 if way != "lists" else sys.maxsize
    start, worked = time.monotonic(), sum(os.times()[:4])
    with Peak() as peak:
        if way == "nothing":
            examples = []
        elif way == "stored, another process":
            [folder] = cache_folder().iterdir()
            examples = StoredExamples(folder)
        else:
            rows = list_rows(str(path))
            examples = make_rows(str(path), rows, tokenizer, PromptSettings(), len(tokenizer), [], alone)
            del rows
            _ = examples.digest
    found = {"seconds": time.monotonic() - start, "peak": peak.most, "left": memory()["RssAnon"], "tokens": 0.0}
    found["of processors"] = sum(os.times()[:4]) - worked  # its children's too, and they have ended
    start, steps, rows = time.monotonic(), 0, 0
    for step in itertools.islice(epoch_steps(examples, STEP_ROWS, seed=0, epoch=0) if examples else (), STEPS):
        collate(step, tokenizer.pad_token_id)
        found["tokens"] += count_tokens(step)
        steps, rows = steps + 1, rows + len(step)
    found["tokens"] /= max(rows, 1)
    return found | {"files": memory()["RssFile"], "a step": (time.monotonic() - start) / max(steps, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="what is made lies there, and is removed")
    parser.add_argument("--lists", choices=("yes", "no"), default="yes", help="whether lists take part")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.folder / "data.csv")))
        return
    if not Path("/proc/self/status").exists():
        raise InputError("memory is told apart on Linux alone")
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="data_scale-", dir=options.folder) as folder:
        compare(Path(folder), options.rows, lists=options.lists == "yes")


def compare(folder: Path, rows: int, lists: bool) -> None:
    """Measure each way in a process of its own, on a file made in `folder`, and print a line each."""
    data = folder / "data.csv"
    make_file(data, rows)
    print(f"{rows} rows, {data.stat().st_size / 2**20:.0f} MiB; memory in MiB a process", flush=True)
    print(
        f"{'':<26}{'seconds':>9}{'of processors':>15}{'private, peak':>15}{'left':>7}{'of files':>10}{'ms a step':>11}"
    )
    own, found = {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}, {}
    for way in WAYS:
        if way == "lists" and not lists:
            continue
        command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
        done = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True)
        row = found[way] = json.loads(done.stdout)
        sizes = (f"{row[name] / 2**20:.0f}" for name in ("peak", "left", "files"))
        times = row["seconds"], row["of processors"]
        line = "{:<26}{:>9.1f}{:>15.1f}{:>15}{:>7}{:>10}{:>11.2f}"
        print(line.format(way, *times, *sizes, 1000 * row["a step"]), flush=True)
    if "lists" in found:
        nothing, listed, first, other = (found[WAYS[i]] for i in (0, 1, 2, 4))
        left = (listed["left"] - nothing["left"]) / max(other["left"] - nothing["left"], 1)
        seconds = listed["of processors"] / first["of processors"]
        print(f"lists over stored rows: seconds of processors {seconds:.2f}, private memory a process {left:.0f}")
    print(f"{found[WAYS[-1]]['tokens']:.0f} tokens a row")


if __name__ == "__main__":
    with one_line_errors("data_scale.py"):
        main()
