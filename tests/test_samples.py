"""Answers of a model while it trains: the same as generate.py's, scored as noisefit.score does, and of no effect."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from running import metrics_of, run, run_generate, start, wait, words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_folder import byte_tokenizer
from tiny_models import tiny_model

from noisefit import score
from noisefit.base.random_state import random_state
from noisefit.fork.branches import BranchedModel
from noisefit.inputs.conversations import Message
from noisefit.inputs.prompts import make_examples, prompt_ids
from noisefit.inputs.tables import Row
from noisefit.inputs.templates import set_chat_template
from noisefit.run.evaluation import prompt_of
from noisefit.run.settings import Settings
from noisefit.samples import TrainingSampler

TRAIN = dict(
    learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, epochs=9, max_steps=4, logging_steps=1,
    eval_steps=3, save_steps=2, save_total_limit=0, lora_dropout=0.1,
)  # fmt: skip
SAMPLED = dict(sample_steps=1, sample_prompts=3, sample_tokens=6)
ROWS = [("Who wrote Emma?", "Jane Austen wrote Emma."), ("What is 2 plus 3?", "It is 5."), ("Is it so?", "It is."),
        ("Where is Rome, in which country?", "Rome is in Italy."), ("And when?", "I don't know.")]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.csv").write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}.\n" for i in range(12)))
    with (folder / "eval.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "response"), *ROWS])
    return {"data": folder / "train.csv", "eval_data": folder / "eval.csv"}


@pytest.fixture(scope="module")
def sampled(llama_folder, files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "out"
    run(llama_folder, output=out, **files, **TRAIN, **SAMPLED, eval_metric="wrong_rate")
    return out


def lines(out: Path, name: str = "samples.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def assert_same_training(out: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    for step in (2, 4):
        for name in (*names, "optimizer.safetensors", "processes.safetensors"):
            one, two = (folder / f"checkpoint-{step}" / name for folder in (out, other))
            assert one.read_bytes() == two.read_bytes(), (step, name)


def test_a_run_that_answers_is_the_run_that_does_not(sampled, llama_folder, files, tmp_path):
    """The same adapter, optimizer, random generators and metrics: but for time and memory, which processes.safetensors
    does not have."""
    run(llama_folder, output=tmp_path / "out", **files, **TRAIN)
    assert_same_training(sampled, tmp_path / "out", "adapter_model.safetensors", "adapter_config.json")
    assert [line["loss"] for line in metrics_of(sampled)] == [line["loss"] for line in metrics_of(tmp_path / "out")]
    assert not (tmp_path / "out" / "samples.jsonl").exists()


@pytest.mark.slow
def test_nor_does_it_change_a_whole_model_s_configuration_or_checkpointing(llama_folder, files, tmp_path):
    flags = TRAIN | dict(full_finetune=True, gradient_checkpointing=True, learning_rate=1e-3)
    run(llama_folder, output=tmp_path / "a", **files, **flags)
    run(llama_folder, output=tmp_path / "b", **files, **flags, **SAMPLED)
    whole = ("model.safetensors", "config.json", "generation_config.json")
    assert_same_training(tmp_path / "a", tmp_path / "b", *whole)


def test_the_answers_are_those_of_generate_and_the_rates_those_of_score(sampled, files, tmp_path):
    found = lines(sampled)
    assert [line["step"] for line in found] == [step for step in (1, 2, 3, 4) for _ in range(3)]
    assert [(line["prompt"], line["response"]) for line in found] == ROWS[:3] * 4
    assert all(list(line)[:4] == ["step", "epoch", "prompt", "response"] for line in found)
    answers = tmp_path / "answers.csv"
    flags = dict(model_path=sampled, input_csv=files["eval_data"], output_csv=answers, rounds=1, max_new_tokens=6)
    run_generate(words(**flags, greedy=True, no_merge=True))
    with answers.open(newline="") as file:
        of_generate = list(csv.DictReader(file))
    for line, row in zip(found[-3:], of_generate, strict=False):
        assert line["generated_response"] == row["generated_response"]
        assert line["logprob"] == float(row["logprob"]) and line["tokens"] == int(row["tokens"])
    report = score.score([str(answers)], None)
    last = lines(sampled, "eval_metrics.jsonl")[-1]
    assert last["answered"] == report["answers"] == len(ROWS) and last["step"] == 4
    for name in ("right_rate", "wrong_rate", "not_attempted_rate", "hallucination_rate"):
        assert last[name] == pytest.approx(report[name]), name


def test_what_is_asked_for_decides_which_steps_have_answers(llama_folder, files, tmp_path):
    flags = TRAIN | SAMPLED | dict(sample_steps=3, save_steps=0)
    run(llama_folder, output=tmp_path / "out", **files, **flags)
    assert [line["step"] for line in lines(tmp_path / "out")] == [3] * 3 + [4] * 3  # and the last
    assert "wrong_rate" not in lines(tmp_path / "out", "eval_metrics.jsonl")[-1]


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_resume(llama_folder, files, tmp_path):
    flags = TRAIN | SAMPLED | dict(eval_metric="hallucination_rate", keep_best=True, batch_size=1)
    both = start(llama_folder, output=tmp_path / "out", processes=2, **files, **flags)
    assert wait(both) == [0, 0], Path(f"{tmp_path / 'out'}.log").read_text()[-2000:]
    again = start(llama_folder, output=tmp_path / "again", processes=2, **files, **flags,
                  resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")  # fmt: skip
    assert wait(again) == [0, 0], Path(f"{tmp_path / 'again'}.log").read_text()[-2000:]
    for name in ("samples.jsonl", "eval_metrics.jsonl", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert [line["prompt"] for line in lines(tmp_path / "out")] == [prompt for prompt, _ in ROWS[:3]] * 4
    assert lines(tmp_path / "out", "eval_metrics.jsonl")[-1]["answered"] == len(ROWS)


class Tables:
    """A client that keeps what it is given, and whose table fails at step 4."""

    requires_logging_directory = False
    made: ClassVar[list["Tables"]] = []

    def __init__(self, title, **options):
        self.logged, self.tables = {}, []
        self.made.append(self)

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)

    def log_table(self, name, columns, rows, step):
        if step == 4:
            raise OSError("no network")
        self.tables.append((name, columns, rows, step))

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass


def test_trackers_get_the_rates_and_the_texts(llama_folder, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Tables)
    out, flags = tmp_path / "out", TRAIN | SAMPLED | dict(sample_steps=2, save_steps=0, report_to="wandb,tensorboard")
    run(llama_folder, output=out, **files, **flags)
    found = lines(out)
    [tracker] = Tables.made
    [(name, columns, rows, step)] = tracker.tables
    assert (name, step) == ("samples", 2) and [dict(zip(columns, row, strict=True)) for row in rows] == found[:3]
    assert tracker.logged[2]["samples/wrong_rate"] == sum(line["outcome"] == "wrong" for line in found[:3]) / 3
    assert "--report_to wandb failed at step 4, training goes on without it: no network" in capsys.readouterr().err
    events = EventAccumulator(str(out / "noisefit"))
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    assert len(texts) == 2 and found[-1]["response"] in texts[1] and found[0]["prompt"] in texts[0]
    assert [event.step for event in events.Scalars("samples/hallucination_rate")] == [2, 4]
    assert "eval_token_accuracy" in tracker.logged[3] and "entropy" in tracker.logged[1]


# --- One model, without a run -----------------------------------------------------------------------------------------


# As Qwen3's: a place for thoughts before each answer.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sampler_of(template: str | None) -> TrainingSampler:
    AcceleratorState._reset_state(True)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    set_chat_template(tokenizer)
    model = BranchedModel(tiny_model(dtype=torch.float32, vocab_size=len(tokenizer)), 8).train()
    settings = Settings(model="m", train_data="t", eval_data="e", sample_steps=1, sample_tokens=5, batch_size=1)
    prepared = SimpleNamespace(settings=settings, tokenizer=tokenizer, accelerator=Accelerator(cpu=True))
    return TrainingSampler(prepared, model)


@pytest.fixture
def sampler():
    return sampler_of(None)


def examples_of(sampler, rows=ROWS):
    return make_examples(sampler.tokenizer, [Row(i, *row) for i, row in enumerate(rows, 1)], 200)[0]


def test_the_model_is_left_as_it_was(sampler):
    model = sampler.model
    model.model.layers[1].eval()  # one that somebody has frozen so
    model.config.use_cache, model.generation_config.temperature = False, 0.7
    before = model.generation_config, [module.training for module in model.modules()], dict(model.config.to_dict())
    random, weights = random_state(torch.device("cpu")), {k: v.clone() for k, v in model.state_dict().items()}
    own, hooks = set(vars(model)), [len(module._forward_hooks) for module in model.modules()]
    found = sampler.answer(examples_of(sampler), 1)
    assert len(found) == len(ROWS) and all(sample.tokens == 5 for sample in found)
    assert model.generation_config is before[0] and model.generation_config.temperature == 0.7
    assert [module.training for module in model.modules()] == before[1] and model.config.to_dict() == before[2]
    assert all(torch.equal(value, random_state(torch.device("cpu"))[name]) for name, value in random.items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == own and [len(module._forward_hooks) for module in model.modules()] == hooks


def test_answers_that_cannot_be_given_are_a_line_and_no_end(sampler, capsys):
    weight = sampler.model.lm_head.weight
    kept = weight.data.clone()
    weight.data[3] = float("nan")
    assert sampler.answer(examples_of(sampler), 7) == []
    assert "step 7: no prompt is answered: the model's logits are not finite numbers" in capsys.readouterr().err
    assert all(value != value for name, value in sampler.figures([]).items() if name != "answered")
    weight.data.copy_(kept)
    assert len(sampler.answer(examples_of(sampler), 8)) == len(ROWS) and sampler.model.training


def test_outcomes_are_told_apart(sampler):
    right, wrong, refused = (f"{ROWS[0][1]}", "Mary Shelley wrote Emma.", "I don't know.")
    [example] = examples_of(sampler, ROWS[:1])
    answer = SimpleNamespace(logprob=-1.5, tokens=9)
    found = [sampler._scored(example, SimpleNamespace(**vars(answer), text=text)) for text in (right, wrong, refused)]
    assert [sample.outcome for sample in found] == ["right", "wrong", "not_attempted"]
    figures = sampler.figures(found)
    assert figures == {"right_rate": 1 / 3, "wrong_rate": 1 / 3, "not_attempted_rate": 1 / 3,
                       "hallucination_rate": 2 / 3, "answered": 3}  # fmt: skip
    assert sampler.figures([replace(found[0], logprob=None)])["right_rate"] == 1 and found[0].line()["logprob"] == -1.5


@pytest.mark.parametrize("template", ["chatml", "alpaca", "plain", "thinking"])
def test_question_and_reference_are_those_of_the_file(template, sampler):
    if template == "thinking":
        sampler = sampler_of(THINKING)
    else:
        sampler.tokenizer.chat_template = None
        set_chat_template(sampler.tokenizer, template)
    rows = [*ROWS, ("Ünïcode  and\nlines §?", "So it is: «yes»\n\nit is.")]
    for example, row in zip(examples_of(sampler, rows), rows, strict=True):
        assert sampler._asked(example) == (row[0], row[0])
        assert sampler._reference(example) == row[1]


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
@pytest.mark.parametrize("loss_on", ["response", "last"])
def test_of_a_conversation_the_last_answer_is_asked_for_and_judged_by_the_last_question(loss_on, template, sampler):
    sampler.tokenizer.chat_template = None
    set_chat_template(sampler.tokenizer, template)
    turns = (Message("system", "Be brief."), Message("user", "Who wrote Emma?"), Message("assistant", "Jane Austen."))
    row = Row(1, "And where is Rome?", "Rome is in Italy.", history=turns)
    *_, example = make_examples(sampler.tokenizer, [row], 500, loss_on)[0]
    assert prompt_of(example) == prompt_ids(sampler.tokenizer, row.prompt, turns)
    shown, question = sampler._asked(example)
    assert question == row.prompt and all(turn.content in shown for turn in turns)
    answer = SimpleNamespace(logprob=-1.5, tokens=9, text="In Italy.")
    sample = sampler._scored(example, answer)
    assert sample.outcome == "right" and sample.response == row.response and sample.prompt == shown
    assert sampler._scored(example, SimpleNamespace(**vars(answer) | dict(text="Jane Austen."))).outcome == "wrong"


def test_compiled_blocks_are_not_compiled_again_for_answers(sampler):
    torch._dynamo.reset()
    expected = sampler.answer(examples_of(sampler), 1)
    for layer in sampler.model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager", dynamic=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert sampler.answer(examples_of(sampler), 2) == expected
    assert not counters["frames"]
    ids = torch.tensor([[5, 6, 7]])
    sampler.model(ids, use_cache=False)
    assert counters["frames"]["ok"]
