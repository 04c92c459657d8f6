"""What a comparison takes: its size, steps, time and disk, all known before a model's weights are loaded."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison import BEFORE, METHODS, Question, Run, settings_of, split
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.answers.generation import FIRST_BATCH_SIZE
from noisefit.answers.loading import digest
from noisefit.base.errors import InputError
from noisefit.inputs.batches import steps_per_epoch
from noisefit.inputs.benchmark_data import BENCHMARKS, read_questions
from noisefit.inputs.model_checks import loading
from noisefit.inputs.models import add_adapter, check_model, length_limit, load_config, load_tokenizer
from noisefit.inputs.prompts import check_tokens, make_examples, prompt_ids, stop_token_ids
from noisefit.inputs.tables import Row
from noisefit.inputs.templates import check_chat_template, set_chat_template
from noisefit.method.teacher import SELF
from noisefit.run.noise_policy import check_policy
from noisefit.run.settings import Settings

TEMPLATE = "chat_template.jinja"  # in the output folder: with the date of the first start, where it asks for one
DTYPES = {"no": ("float32", 4), "bf16": ("bfloat16", 2), "fp16": ("float16", 2)}  # by mixed precision; bytes a weight
POOL = 3  # so many rows are probed for one to train on, where --unknown_share chooses among them
# What an output folder is for. Methods and seeds may come later.
FIXED = ("model", "benchmark", "train_rows", "test_rows", "split_seed", "unknown_share", "unknown_below", "train_flags",
         "max_new_tokens", "chat_template", "mixed_precision")  # fmt: skip
# What hours are estimated with, besides the FLOPs: launching a layer's kernels, forward (backward takes as long twice);
# starting a process; reading weights.
LAYER_SECONDS, START_SECONDS, READ_BYTES = 0.5e-3, 20.0, 1e9
STATE_BYTES = 12  # on the disk for a trained parameter: in float32, with Adam's two moments


@dataclass(frozen=True)
class Plan:
    """What is known before the first run.

    Attributes:
        lines: for the user.
        settings: of the runs that are wanted, in the order in which they are made.
        seconds: that each is expected to take.
        pool, test: questions to train on, or to choose these from, and questions to answer.
        template: the chat template, with its date.
        fixed: by which the output folder is known again.
    """

    lines: list[str]
    settings: dict[Run, Settings]
    seconds: dict[Run, float]
    pool: list[Question]
    test: list[Question]
    template: str
    fixed: dict[str, Any]


def make_plan(options: argparse.Namespace) -> Plan:
    """Checks what can be checked without the model's weights, and says what the comparison takes. Writes nothing.

    Raises:
        InputError: something is not as it should be; the line says what, and what to do.
    """
    kind, model, trusted = BENCHMARKS[options.benchmark], options.model, options.trust_remote_code
    new_tokens = options.max_new_tokens
    settings = {run: settings_of(run, options.train_flags, model) for run in _runs(options)}
    check_chat_template(options.chat_template)
    questions, left_out = read_questions(options.source, kind)
    pool, test = split(options.source, questions, options.train_rows, options.test_rows, options.split_seed,
                       POOL if options.unknown_share is not None else 1)  # fmt: skip
    config, tokenizer = load_config(model, trusted), load_tokenizer(model, trusted)
    kept = options.output / TEMPLATE
    set_chat_template(tokenizer, str(kept) if kept.is_file() else options.chat_template)
    size = size_of(model, config, trusted, DTYPES[options.mixed_precision][1])
    row_tokens, longest = count_tokens(options.source, tokenizer, [*pool, *test], model, config, new_tokens)
    trained = {run: trained_by(run.method, settings[run], config, trusted) if run.is_trained else 0
               for run in {run.method: run for run in settings}.values()}  # fmt: skip
    by_method = {
        run.method: cost_of(settings[run] if run.is_trained else None, size, options.train_rows, row_tokens,
                            options.test_rows, new_tokens, options.tflops * 1e12)
        for run in trained
    }  # fmt: skip
    costs = {run: by_method[run.method] for run in settings}
    probed = len(pool) + len(test)
    probe_flops = 2 * 2.0 * size.multiplied * row_tokens * probed  # with the prompt, and without it
    hours = (sum(cost.seconds for cost in costs.values()) + probe_flops / (options.tflops * 1e12)) / 3600
    lines = [
        f"{model}: {size.parameters:,} parameters, {size.layers} layers; its weights take "
        f"{size.parameters * size.weight_bytes / 2**30:.1f} GiB in {DTYPES[options.mixed_precision][0]}, gradient and "
        f"optimizer of what is trained at most {max(trained.values()) * 16 / 2**30:.2f} GiB; activations are more",
        f"{options.source}: {len(questions):,} questions of {kind.title} ({sum(map(len, left_out.values())):,} rows "
        f"left out); {len(pool):,} are probed for {options.train_rows:,} to train on, and {len(test):,} to answer; no "
        f"answer is in both; {row_tokens:.0f} tokens a row, at most {longest} a prompt",
        f"{'method':<32}{'runs':>5}{'steps':>8}{'forward passes':>16}{'tokens':>13}{'FLOPs':>10}{'hours a run':>13}",
        *(f"{method:<32}{sum(run.method == method for run in costs):>5}{cost.steps:>8,}{cost.forward_passes:>16,}"
          f"{cost.tokens:>13,}{cost.flops:>10.1e}{cost.seconds / 3600:>13.2f}" for method, cost in by_method.items()),
        f"{len(costs)} runs and a probe: {sum(cost.flops for cost in costs.values()) + probe_flops:.1e} FLOPs, "
        f"{hours:.1f} hours if the device does {options.tflops:g} TFLOP/s (--tflops), takes {LAYER_SECONDS * 1e3:g} ms "
        f"to launch a layer and reads weights at {READ_BYTES / 1e9:g} GB/s: assumptions, until a run has been measured",
    ]  # fmt: skip
    _check_disk(options.output, sum(2 * STATE_BYTES * trained[run] * _count(run, costs) for run in trained))
    fixed = {name: getattr(options, name) for name in FIXED} | {"source": digest(Path(options.source).read_bytes())}
    seconds = {run: cost.seconds for run, cost in costs.items()}
    return Plan(lines, settings, seconds, pool, test, str(tokenizer.chat_template), fixed)


def _runs(options: argparse.Namespace) -> list[Run]:
    """What is not trained is the same for all seeds; it comes first, as it tells at once how the model answers."""
    methods = list(dict.fromkeys(options.methods or METHODS))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = [Run(method, seed) for seed in seeds for method in methods if method != BEFORE]
    return [Run(BEFORE, 0), *runs] if BEFORE in methods else runs


def _count(run: Run, runs: dict[Run, Any]) -> int:
    return sum(other.method == run.method for other in runs)


def _check_disk(output: Path, needed: int) -> None:
    there = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(f"--output {output}: the adapters and their checkpoints take {needed / 2**30:.1f} GiB, and "
                         f"{free / 2**30:.1f} are free; choose another disk, or fewer methods or seeds")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A model's: parameters, those that a token is multiplied with, decoder layers, bytes of a weight."""

    parameters: int
    multiplied: int
    layers: int
    weight_bytes: int


@dataclass(frozen=True)
class Cost:
    """What a run takes."""

    steps: int
    forward_passes: int  # of a micro-batch and branch
    tokens: int  # of the rows, prompts included
    flops: float
    seconds: float


def size_of(name: str, config: PreTrainedConfig, trust_remote_code: bool, weight_bytes: int) -> Size:
    """The size of a model, which is made without weights. Raises `InputError` where it cannot be."""
    layers, _ = check_model(Settings(model=name, train_data="-", full_finetune=True), name, config, trust_remote_code)
    empty = _without_weights(name, config, trust_remote_code)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    table, head = empty.get_input_embeddings().weight, empty.get_output_embeddings()
    tied = head is not None and head.weight is table  # then the head multiplies with what the embedding looks up
    return Size(parameters, parameters - (0 if tied else table.numel()), layers, weight_bytes)


def trained_by(method: str, settings: Settings, config: PreTrainedConfig, trust_remote_code: bool) -> int:
    """How many parameters a method trains; raises `InputError` where the model cannot be trained so."""
    try:
        layers, _ = check_model(settings, settings.model, config, trust_remote_code)
        check_policy(settings, layers)
    except InputError as error:
        raise InputError(f"--methods {method}: {error}") from None
    model: Any = _without_weights(settings.model, config, trust_remote_code)
    if not settings.full_finetune:
        model = add_adapter(settings, model, settings.model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _without_weights(name: str, config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    with loading("--model", name, "a causal language model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def count_tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], model: str, config: PreTrainedConfig,
    new_tokens: int,
) -> tuple[float, int]:  # fmt: skip
    """Tokens a row on average, and of the longest prompt, which must leave the model place for an answer.

    Raises:
        InputError: it does not, or the tokenizer is of another model.
    """
    table = [Row(number, row["prompt"], row["response"]) for number, row in enumerate(rows, start=1)]
    limit, vocabulary, longest = length_limit(config), config.get_text_config(decoder=True).vocab_size, 0
    for row in table:
        where = f"{source}: the question {row.prompt[:60]!r}"
        try:
            ids = prompt_ids(tokenizer, row.prompt)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        check_tokens(ids, vocabulary, where)
        if limit is not None and len(ids) + new_tokens > limit:
            raise InputError(f"{where} has {len(ids)} tokens, which with --max_new_tokens {new_tokens} exceeds the "
                             f"model's context of {limit}")  # fmt: skip
        longest = max(longest, len(ids))
    examples = make_examples(tokenizer, table, 10**9, stop_ids=stop_token_ids(model))[0]
    return sum(len(example.input_ids) for example in examples) / len(examples), longest


def cost_of(
    settings: Settings | None, size: Size, rows: int, row_tokens: float, test_rows: int, new_tokens: int,
    flops_a_second: float,
) -> Cost:  # fmt: skip
    """What a training and its answers take, or the answers alone where `settings` is `None`.

    FLOPs are 2 a parameter and token forward, and backward as many again for the activations and, where all weights are
    trained, for these. Each branch counts whole, which a forked pass does not take before its first noisy layer.
    """
    forward = 2.0 * size.multiplied
    answers = forward * test_rows * (row_tokens + new_tokens)
    batches = math.ceil(test_rows / FIRST_BATCH_SIZE) * new_tokens
    loading = START_SECONDS + size.parameters * size.weight_bytes / READ_BYTES
    seconds = max(answers / flops_a_second, batches * size.layers * LAYER_SECONDS) + loading
    if settings is None:
        return Cost(0, 0, 0, answers, seconds)
    branches, again = len(settings.objective.branches), settings.gradient_checkpointing
    teacher = settings.teacher != SELF and not settings.cache_teacher
    per_step = min(rows, settings.batch_size * settings.gradient_accumulation_steps)
    steps = settings.epochs * steps_per_epoch(rows, settings.batch_size * settings.gradient_accumulation_steps)
    steps = steps if settings.max_steps == -1 else min(steps, settings.max_steps)
    micro_batches = steps * math.ceil(per_step / settings.batch_size)
    tokens = round(min(settings.epochs * rows, steps * per_step) * row_tokens)
    backward = 2 if settings.full_finetune else 1
    flops = forward * tokens * (branches * (1 + backward + again) + teacher)
    launches = micro_batches * size.layers * (3 + again + teacher) * LAYER_SECONDS
    seconds += max(flops / flops_a_second, launches) + loading
    return Cost(steps, micro_batches * (branches + teacher), tokens, flops + answers, seconds)
