"""The loop against the definition: the same training written plainly, a row at a time, with transformers alone.

No fork, no chunks, no padding, no micro-batches: three passes of the model's own forward for every row, the losses from
the formulas, one division by the step's supervised tokens, and torch's own clipping and AdamW.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from running import metrics_of, run, start, wait
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

import train_loop
from noisefit.batches import epoch_steps
from noisefit.data import read_rows
from noisefit.prompts import make_examples

SETTINGS = dict(
    batch_size=3, gradient_accumulation_steps=2, epochs=2, learning_rate=2e-2, temperature=2.0, hybrid_loss_alpha=0.3,
    lambda_consistency=0.7, max_grad_norm=0.05, weight_decay=0.3, warmup_ratio=0.25, lora_r=4, lora_alpha=24,
    lora_dropout=0, target_modules="q_proj,down_proj", num_noise_layers=2, logging_steps=1, seed=3, loss_chunk_size=10,
)  # fmt: skip


class FixedNoise:
    """In place of `TokenScaledNoise`: what a token gets depends on its own hidden state and on being real."""

    def __init__(self, noise_std: float):
        assert noise_std == 0.1

    def __call__(self, hidden, branch, mask):
        return 0.3 * hidden.detach().roll(branch, dims=-1) * mask.unsqueeze(-1)

    def pop_noise_to_signal(self):
        return torch.tensor(0.25)


@pytest.fixture
def few_questions(questions):
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:11]))  # steps of 6 and 4 rows
    return questions


def plain_training(model_folder, output, data, selected):
    """The lines of metrics and the adapter's weights, from the definition."""
    s = SETTINGS
    tokenizer = AutoTokenizer.from_pretrained(output)
    examples, _ = make_examples(tokenizer, read_rows(data)[0], 128)
    set_seed(s["seed"])
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=24, lora_dropout=0, target_modules=["q_proj", "down_proj"]
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora).train()
    layers = model.base_model.model.model.layers
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=s["learning_rate"], weight_decay=s["weight_decay"])
    schedule = get_scheduler("cosine", optimizer, 1, 4)

    def logits_of(example, branch):
        def add(module, args, output):
            return output + 0.3 * output.detach().roll(branch, dims=-1)

        hooks = [layers[i].register_forward_hook(add) for i in selected if branch]
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, example.target_start - 1 : -1]
        for hook in hooks:
            hook.remove()
        return logits.double()

    def kl(p_logits, q_logits, t):
        log_p, log_q = (x / t - torch.logsumexp(x / t, -1, keepdim=True) for x in (p_logits.detach(), q_logits))
        return t**2 * (log_p.exp() * (log_p - log_q)).sum()

    lines, t = [], s["temperature"]
    for epoch in range(2):
        for rows in epoch_steps(examples, 6, s["seed"], epoch):
            tokens = sum(len(row.input_ids) - row.target_start for row in rows)
            sums = torch.zeros(3, dtype=torch.float64)
            for row in rows:
                z, z1, z2 = (logits_of(row, branch) for branch in (0, 1, 2))
                targets = torch.tensor(row.input_ids[row.target_start :])
                ce = (torch.logsumexp(z, -1) - z[torch.arange(len(targets)), targets]).sum()
                soft = 0.5 * (kl(z, z1, t) + kl(z, z2, t))
                consistency = kl(z2, z1, t)
                ((0.3 * ce + 0.7 * soft + 0.7 * consistency) / tokens).backward()
                sums += torch.stack([ce, soft, consistency]).detach()
            norm = torch.nn.utils.clip_grad_norm_(weights, s["max_grad_norm"])
            ce, soft, consistency = (sums / tokens).tolist()
            lines.append(
                dict(ce_loss=ce, soft_loss=soft, consistency_loss=consistency, grad_norm=norm.item(),
                     loss=0.3 * ce + 0.7 * soft + 0.7 * consistency, learning_rate=schedule.get_last_lr()[0],
                     target_tokens=tokens)
            )  # fmt: skip
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    state = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return lines, state


@pytest.mark.parametrize("flags", [{}, dict(branches="separate"), dict(gradient_checkpointing=True)], ids=str)
def test_the_loop_is_its_definition(flags, llama_folder, few_questions, tmp_path, monkeypatch):
    monkeypatch.setattr(train_loop, "TokenScaledNoise", FixedNoise)
    lines = run(llama_folder, few_questions, tmp_path / "out", **SETTINGS, **flags)
    selected = json.loads((tmp_path / "out" / "layer_snr.json").read_text())["selected"]
    expected, weights = plain_training(llama_folder, tmp_path / "out", few_questions, selected)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and len(selected) == 2
    for line, plain in zip(lines, expected, strict=True):
        for name, value in plain.items():
            assert line[name] == pytest.approx(value, rel=2e-4, abs=1e-9), (line["step"], name)
        assert line["grad_norm"] > SETTINGS["max_grad_norm"]  # so that clipping is seen too
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def on_processes(number, *arguments, **flags):
    """Train on so many processes, which say so."""
    assert wait(start(*arguments, number, **flags)) == [0] * number
    assert f"processes: {number}" in Path(f"{arguments[-1]}.log").read_text()


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


def test_measuring_the_layers_uses_real_batches_of_every_process(llama_folder, few_questions, tmp_path):
    """Two processes with one row each measure what one process measures over the same two batches."""
    flags = dict(max_steps=1, snr_batches=2, batch_size=1, noise_std=0.3, gradient_accumulation_steps=2)
    on_processes(2, llama_folder, few_questions, tmp_path / "two", **flags)
    four = flags | dict(gradient_accumulation_steps=4, snr_batches=4)
    on_processes(1, llama_folder, few_questions, tmp_path / "one", **four)
    two, one = (json.loads((tmp_path / name / "layer_snr.json").read_text()) for name in ("two", "one"))
    assert two["snr"] == pytest.approx(one["snr"], rel=1e-6) and two["selected"] == one["selected"]


def test_noise_and_dropout_differ_between_processes(llama_folder, few_questions, tmp_path):
    """With the same draws on both, two processes that hold the same row would give the loss of one, exactly."""
    few_questions.write_text("prompt,response\n" + "What is it?,It is this.\n" * 2)
    flags = dict(max_steps=1, batch_size=1, gradient_accumulation_steps=1, noise_std=1.0, lora_dropout=0)
    on_processes(2, llama_folder, few_questions, tmp_path / "two", **flags)
    on_processes(1, llama_folder, few_questions, tmp_path / "one", **flags)
    [two], [one] = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    assert two["ce_loss"] == pytest.approx(one["ce_loss"], rel=1e-5)
    assert two["soft_loss"] != pytest.approx(one["soft_loss"], rel=1e-4)
