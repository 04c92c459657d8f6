"""The loop against the definition: the same training written plainly, a row at a time, with transformers alone.

No fork, no chunks, no padding, no micro-batches: three passes of the model's own forward for every row, the losses from
the formulas, one division by the step's supervised tokens, and torch's own clipping and AdamW.
"""

import copy
import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from running import metrics_of, run, start, wait
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

import train_loop
from noisefit.fork import hooks
from noisefit.inputs.batches import epoch_steps
from noisefit.inputs.prompts import make_examples
from noisefit.inputs.tables import read_rows
from noisefit.method.objectives import OBJECTIVES
from noisefit.method.policy import make_noise

SETTINGS = dict(
    batch_size=3, gradient_accumulation_steps=2, epochs=2, learning_rate=2e-2, temperature=2.0, hybrid_loss_alpha=0.3,
    lambda_consistency=0.7, max_grad_norm=0.05, weight_decay=0.3, warmup_ratio=0.25, lora_r=4, lora_alpha=24,
    lora_dropout=0, target_modules="q_proj,down_proj", num_noise_layers=2, logging_steps=1, seed=3, loss_chunk_size=10,
    rdrop_alpha=0.6,
)  # fmt: skip


def fixed_noise(hidden, branch, mask):
    """In place of the drawn noise: what a token gets depends on its own hidden state and on being real."""
    return 0.3 * hidden.detach().roll(branch, dims=-1) * mask.bool().unsqueeze(-1)


def fix_the_noise(settings, policy, *kind):
    return dict.fromkeys(make_noise(settings, policy), fixed_noise)


class FixedDropout:
    """In place of drawn dropout: the branches' masks by turns, each of features of its own, for all tokens."""

    def __init__(self):
        self.calls = 0

    def __call__(self, values, share, training):
        if not training:
            return values
        assert share == 0.05
        self.calls += 1
        return values * self.mask(values, 2 - self.calls % 2)

    @staticmethod
    def mask(values, branch):
        return (torch.arange(values.shape[-1]) % (branch + 2) > 0).to(values) * 1.5


@pytest.fixture
def few_questions(questions):
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:11]))  # steps of 6 and 4 rows
    return questions


def kl(p_logits, q_logits, t):
    log_p, log_q = (x / t - torch.logsumexp(x / t, -1, keepdim=True) for x in (p_logits, q_logits))
    return t**2 * (log_p.exp() * (log_p - log_q)).sum()


def losses_of(mode, logits, targets, t, teacher):
    """The losses of a row and their weights in the whole, from the definition; `logits` gives those of a branch, and
    `teacher` those of whoever teaches the soft term, without gradient."""

    def ce(z):
        return (torch.logsumexp(z, -1) - z[torch.arange(len(targets)), targets]).sum()

    if mode == "full":
        z, z1, z2 = (logits(branch) for branch in (0, 1, 2))
        soft = 0.5 * (kl(teacher(), z1, t) + kl(teacher(), z2, t))
        return dict(ce=(0.3, ce(z)), soft=(0.7, soft), consistency=(0.7, kl(z2.detach(), z1, t)))
    if mode == "ce_kl":
        return dict(ce=(0.3, ce(logits(0))), soft=(0.7, kl(teacher(), logits(1), t)))
    if mode == "ce_teacher":
        return dict(ce=(0.3, ce(logits(0))), soft=(0.7, kl(teacher(), logits(0), t)))
    if mode == "kl_only":
        return dict(soft=(1, kl(teacher(), logits(1), t)))
    if mode == "consistency_only":
        return dict(consistency=(1, kl(logits(2).detach(), logits(1), t)))
    if mode in ("ce_noisy", "neftune"):
        return dict(ce=(1, ce(logits(1))))
    if mode == "rdrop":
        z1, z2 = logits(1), logits(2)
        return dict(ce=(1, 0.5 * (ce(z1) + ce(z2))), rdrop=(0.6, 0.5 * (kl(z1, z2, t) + kl(z2, z1, t))))
    assert mode == "basefit"
    return dict(ce=(1, ce(logits(0))))


def plain_training(model_folder, output, data, selected, mode, teacher):
    """The lines of metrics and the adapter's weights, from the definition, in float64."""
    s = SETTINGS
    tokenizer = AutoTokenizer.from_pretrained(output)
    examples, _ = make_examples(tokenizer, read_rows(data)[0], 128)
    set_seed(s["seed"])
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=24, lora_dropout=0, target_modules=["q_proj", "down_proj"]
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora).double().train()
    if teacher == "base":  # a second copy of the weights, which nothing touches
        other = AutoModelForCausalLM.from_pretrained(model_folder).double().eval()
    else:
        other = copy.deepcopy(model).eval()
    decoder = model.base_model.model.model
    noisy = [decoder.embed_tokens] if mode == "neftune" else [decoder.layers[i] for i in selected]
    dropped = decoder.layers if mode == "rdrop" else []
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=s["learning_rate"], weight_decay=s["weight_decay"])
    schedule = get_scheduler("cosine", optimizer, 1, 4)

    def logits_of(example, branch):
        def add(module, args, output):
            return output + 0.3 * output.detach().roll(branch, dims=-1)

        def drop(module, args, output):
            return args[0] + (output - args[0]) * FixedDropout.mask(output, branch)

        hooks = [module.register_forward_hook(add) for module in noisy if branch]
        hooks += [module.register_forward_hook(drop) for module in dropped]
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, example.target_start - 1 : -1]
        for hook in hooks:
            hook.remove()
        return logits

    @torch.no_grad()
    def teacher_of(example):
        if teacher == "self":
            return logits_of(example, 0)
        return other(input_ids=torch.tensor([example.input_ids])).logits[0, example.target_start - 1 : -1]

    lines = []
    for epoch in range(2):
        for rows in epoch_steps(examples, 6, s["seed"], epoch):
            tokens = sum(len(row.input_ids) - row.target_start for row in rows)
            sums = Counter()
            for row in rows:
                targets = torch.tensor(row.input_ids[row.target_start :])
                who = functools.partial(teacher_of, row)
                found = losses_of(mode, functools.partial(logits_of, row), targets, s["temperature"], who)
                (sum(weight * loss for weight, loss in found.values()) / tokens).backward()
                sums.update({name: loss.item() / tokens for name, (_, loss) in found.items()})
                sums["whole"] += sum(weight * loss.item() for weight, loss in found.values()) / tokens
            norm = torch.nn.utils.clip_grad_norm_(weights, s["max_grad_norm"])
            losses = {f"{name}_loss": sums.get(name) for name in ("ce", "soft", "consistency", "rdrop")}
            lines.append(
                dict(**losses, grad_norm=norm.item(), loss=sums["whole"], learning_rate=schedule.get_last_lr()[0],
                     target_tokens=tokens)
            )  # fmt: skip
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if teacher == "ema":
                for average, weight in zip(other.parameters(), model.parameters(), strict=True):
                    average.data = 0.6 * average.data + 0.4 * weight.data
    state = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return lines, state


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        *({"loss_mode": mode} for mode in OBJECTIVES if mode != "ce_teacher"),
        *({"loss_mode": mode, "branches": "separate"} for mode in ("full", "ce_kl", "consistency_only")),
        *({"loss_mode": mode, "gradient_checkpointing": True} for mode in ("full", "kl_only", "rdrop", "neftune")),
        *({"loss_mode": mode, "teacher": "base"} for mode in ("full", "kl_only", "ce_teacher")),
        *({"loss_mode": mode, "teacher": "ema", "teacher_decay": 0.6} for mode in ("full", "ce_teacher")),
        {"loss_mode": "ce_kl", "teacher": "ema", "teacher_decay": 0.6, "branches": "separate"},
        {"loss_mode": "full", "teacher": "base", "gradient_checkpointing": True},
        {"loss_mode": "full", "teacher": "base", "cache_teacher": 259},  # all tokens
        *({"loss_mode": mode, "packing": True} for mode in ("basefit", "neftune", "rdrop")),
        {"loss_mode": "full", "packing": True, "teacher": "base", "gradient_checkpointing": True},
        {"loss_mode": "full", "packing": True, "teacher": "ema", "teacher_decay": 0.6, "branches": "separate"},
        {"loss_mode": "full", "packing": True, "teacher": "base", "cache_teacher": 259},
    ],
    ids=str,
)
def test_the_loop_is_its_definition(flags, llama_folder, few_questions, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train_loop, "make_noise", fix_the_noise)
    monkeypatch.setattr(hooks.F, "dropout", FixedDropout())
    load = train_loop.load_model
    monkeypatch.setattr(train_loop, "load_model", lambda *args: load(*args).double())  # both sides in float64
    packed, collate = [], train_loop.collate
    monkeypatch.setattr(train_loop, "collate", lambda *args: packed.append(args[-1]) or collate(*args))
    lines = run(llama_folder, few_questions, tmp_path / "out", **SETTINGS, **flags)
    assert any(packed) == flags.get("packing", False)
    assert "--packing" not in capfd.readouterr().err  # a line where it is off
    selected = json.loads((tmp_path / "out" / "layer_snr.json").read_text())["selected"]
    mode = flags["loss_mode"]
    assert len(selected) == (0 if mode in ("basefit", "neftune", "rdrop", "ce_teacher") else 2)
    teacher = flags.get("teacher", "self")
    expected, weights = plain_training(llama_folder, tmp_path / "out", few_questions, selected, mode, teacher)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, plain in zip(lines, expected, strict=True):
        for name, value in plain.items():  # the loop adds up its losses in float32
            close = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-9)
            assert line[name] == close, (line["step"], name)
        assert line["grad_norm"] > SETTINGS["max_grad_norm"]  # so that clipping is seen too
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            saved[name].double(), tensor, rtol=1e-3, atol=2e-6, msg=name
        )  # Llama forms its norms in float32


def on_processes(number, *arguments, **flags):
    """Train on so many processes, which say so."""
    assert wait(start(*arguments, number, **flags)) == [0] * number
    assert f"processes: {number}" in Path(f"{arguments[-1]}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_is_the_cross_entropy_of_the_saved_adapter(processes, llama_folder, few_questions, tmp_path):
    out = tmp_path / "out"
    flags = dict(
        learning_rate=1e-2, epochs=1, eval_data=few_questions, lora_dropout=0.9, noise_std=2.0, batch_size=2,
        logging_steps=1,
    )  # fmt: skip
    on_processes(processes, llama_folder, few_questions, out, **flags)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), out).eval()
    total = tokens = 0
    for example in make_examples(tokenizer, read_rows(few_questions)[0], 128)[0]:
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[:, : example.target_start] = -100
        count = len(example.input_ids) - example.target_start
        total += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    line = json.loads((out / "eval_metrics.jsonl").read_text().splitlines()[-1])
    assert line["eval_ce_loss"] == pytest.approx(total / tokens, rel=1e-4) and line["eval_target_tokens"] == tokens
    assert metrics_of(out)[-1]["soft_loss"] > 0  # there was noise, and evaluation saw none of it


@pytest.mark.slow
def test_measuring_the_layers_uses_real_batches_of_every_process(llama_folder, few_questions, tmp_path):
    """Two processes with one row each measure what one process measures over the same two batches."""
    flags = dict(max_steps=1, snr_batches=2, batch_size=1, noise_std=0.3, gradient_accumulation_steps=2)
    on_processes(2, llama_folder, few_questions, tmp_path / "two", **flags)
    four = flags | dict(gradient_accumulation_steps=4, snr_batches=4)
    on_processes(1, llama_folder, few_questions, tmp_path / "one", **four)
    two, one = (json.loads((tmp_path / name / "layer_snr.json").read_text()) for name in ("two", "one"))
    assert two["snr"] == pytest.approx(one["snr"], rel=1e-6) and two["selected"] == one["selected"]


@pytest.mark.slow
def test_noise_and_dropout_differ_between_processes(llama_folder, few_questions, tmp_path):
    """With the same draws on both, two processes that hold the same row would give the loss of one, exactly."""
    few_questions.write_text("prompt,response\n" + "What is it?,It is this.\n" * 2)
    flags = dict(max_steps=1, batch_size=1, gradient_accumulation_steps=1, noise_std=1.0, lora_dropout=0)
    on_processes(2, llama_folder, few_questions, tmp_path / "two", **flags)
    on_processes(1, llama_folder, few_questions, tmp_path / "one", **flags)
    [two], [one] = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    assert two["ce_loss"] == pytest.approx(one["ce_loss"], rel=1e-5)
    assert two["soft_loss"] != pytest.approx(one["soft_loss"], rel=1e-4)
