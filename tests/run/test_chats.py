"""Training on conversations, the answers of `generate.py` to them, and their score: against computations of our own."""

import csv
import json

import pytest
import torch
from running import call, metrics_of, run, words
from tiny_folder import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
from noisefit.answers.judging import read_cases
from noisefit.answers.reading import read_answers
from noisefit.answers.settings import parse_arguments
from noisefit.inputs.probing import read_probe_rows, read_scores
from noisefit.inputs.prompts import Example
from noisefit.inputs.tables import read_rows
from noisefit.probe import main as probe_main
from noisefit.run.teacher_cache import _digest
from noisefit.score import main as score_main

FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, logging_steps=1, lora_dropout=0,
            max_steps=2)  # fmt: skip


def chat(i: int) -> list[dict[str, str]]:
    """One to three answers; some with a system prompt."""
    turns = [{"role": "system", "content": f"Say {i}."}] * (i % 2)
    for j in range(1 + i % 3):
        turns += [{"role": "user", "content": f"Is it {i}{'?' * (j + 1)}"},
                  {"role": "assistant", "content": f"It is {'so ' * j}{i}."}]  # fmt: skip
    return turns


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """A model with places for a conversation of bytes."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=512)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": i, "messages": chat(i)}) + "\n" for i in range(4)))
    return path


@torch.no_grad()
def cross_entropy_of(folder, tokenizer, turns, last_alone):
    """The sum over the supervised tokens of a conversation, answer by answer, each a text of its own; and their number.

    ChatML's end of a turn is text to this tokenizer, so the last answer has the end of the text behind it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    loss = count = 0
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    for i in places[-1:] if last_alone else places:
        before = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, return_dict=False)
        text = turns[i]["content"] + "<|im_end|>" + ("</s>" if i == places[-1] else "")
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        logs = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        loss -= logs.gather(1, torch.tensor(answer)[:, None]).sum().item()
        count += len(answer)
    return loss, count


@pytest.mark.parametrize("loss_on", ["response", "last"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_a_step_is_that_of_its_answers_one_by_one(loss_on, packing, long_folder, chats, tmp_path):
    flags = dict(packing=True) if packing else {}
    [line, _] = run(long_folder, chats, tmp_path / "out", **FAST, **flags, loss_on=loss_on, loss_mode="basefit")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    parts = [cross_entropy_of(long_folder, tokenizer, chat(i), loss_on == "last") for i in range(4)]
    loss, count = map(sum, zip(*parts, strict=True))
    assert line["target_tokens"] == count and line["ce_loss"] == pytest.approx(loss / count, rel=1e-5)


def test_rows_of_conversations_are_the_same_as_the_teacher_s(long_folder, chats, tmp_path):
    flags = FAST | dict(loss_mode="ce_teacher", teacher="base")
    plain = run(long_folder, chats, tmp_path / "plain", **flags)
    kept = run(long_folder, chats, tmp_path / "kept", **flags, cache_teacher=10**6)
    for line, other in zip(plain, kept, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "grad_norm", "target_tokens"):
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), name


def test_predictions_are_of_the_gaps_too():
    rows = [Example([1, 2, 3, 4, 5], 1), Example([1, 2, 3, 4, 5], 1, gaps=((2, 3),)),
            Example([1, 2, 3, 4, 5], 1, gaps=((2, 4),))]  # fmt: skip
    assert len(set(map(_digest, rows))) == 3


@pytest.fixture(scope="module")
def adapter(long_folder, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "adapter"
    run(long_folder, chats, out, **FAST, eval_data=chats, save_steps=1)
    assert len(metrics_of(out)) == 2
    return out


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ask(output, **flags):
    generate.generate(parse_arguments(words(output_csv=output, max_new_tokens=12, **flags)))
    return rows_of(output)


def test_the_same_file_is_answered_and_scored(adapter, long_folder, chats, tmp_path, capsys):
    rows = ask(tmp_path / "a.csv", model_path=adapter, input_csv=chats, greedy=True, no_merge=True)
    assert "next, how many are true" in capsys.readouterr().err
    assert list(rows[0])[:4] == ["id", "messages", "generated_response", "round"]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(long_folder)
    model.load_adapter(str(adapter))
    for i, row in enumerate(rows[:: len(rows) // 4]):
        assert json.loads(row["messages"]) == chat(i)
        before = tokenizer.apply_chat_template(
            chat(i)[:-1], add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        answer = model.generate(before, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(before))
        text = tokenizer.decode(answer[0, before.shape[1] :], skip_special_tokens=True)
        assert row["generated_response"] == text.partition("<|im_end|>")[0].strip()

    for row in rows:  # now all are right but those of the last one
        row["generated_response"] = f"Yes. {chat(int(row['id']))[-1]['content']}" if int(row["id"]) < 3 else "No."
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    done = call(score_main, tmp_path / "a.csv", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompts"] == 4 and found["right_rate"] == 0.75 and found["hallucination_rate"] == 0.25
    prompts = read_answers(str(tmp_path / "a.csv"), None)
    assert [prompt.reference for prompt in prompts] == [chat(i)[-1]["content"] for i in range(4)]
    assert [prompt.question for prompt in prompts] == ["", "Is it 1??", "Is it 2???", "Is it 3?"]
    assert prompts[1].prompt == "system: Say 1.\nuser: Is it 1?\nassistant: It is 1.\nuser: Is it 1??"
    cases = read_cases(str(tmp_path / "a.csv"))
    assert cases[-1].case.question == prompts[3].prompt and cases[-1].case.true_answers == ("It is 3.",)


def test_a_column_response_is_the_reference_and_conversations_may_end_with_a_question(adapter, tmp_path):
    path = tmp_path / "asked.jsonl"
    shares = [[{"from": "human", "value": "A?"}, {"from": "gpt", "value": f"a {i}"}, {"from": "human", "value": "B?"}]
              for i in range(2)]  # fmt: skip
    path.write_text("".join(json.dumps({"conversations": c, "response": "It is b."}) + "\n" for c in shares))
    rows = ask(tmp_path / "a.csv", model_path=adapter, input_csv=path, rounds=2, temperature=2.0)
    assert json.loads(rows[0]["conversations"]) == shares[0] and len(rows) == 4
    assert len({row["generated_response"] for row in rows}) == 4  # of the same last question, so of another key
    prompts = read_answers(str(tmp_path / "a.csv"), None)
    assert [(p.reference, p.question, len(p.answers)) for p in prompts] == [("It is b.", "B?", 2)] * 2
    path.write_text(json.dumps({"conversations": shares[0]}) + "\n")
    ask(tmp_path / "b.csv", model_path=adapter, input_csv=path, rounds=1)
    done = call(score_main, tmp_path / "b.csv")
    assert done.returncode == 2 and "row 1: prompt or response is empty: nothing to compare with" in done.stderr


def test_a_prompt_in_messages_is_answered_as_one_in_a_column(adapter, tmp_path):
    (tmp_path / "q.csv").write_text("prompt\nA?\nB?\n")
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in ("A?", "B?"))
    )
    one, two = (ask(tmp_path / f"{name}.csv", model_path=adapter, input_csv=tmp_path / f"q.{name}", rounds=2)
                for name in ("csv", "jsonl"))  # fmt: skip
    answers = [[row["generated_response"] for row in rows] for rows in (one, two)]
    assert answers[0] == answers[1] and len(set(answers[0])) == 4


def test_the_last_answer_is_probed_behind_the_turns_before_it(long_folder, chats, tmp_path):
    """The probe, a run that refuses what it finds, and one that goes on from there."""
    out = tmp_path / "probed.csv"
    done = call(probe_main, *words(model=long_folder, train_data=chats, output=out, samples=1, max_new_tokens=4))
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert [json.loads(row["messages"]) for row in rows] == [chat(i) for i in range(4)]
    tokenizer, model = AutoTokenizer.from_pretrained(long_folder), AutoModelForCausalLM.from_pretrained(long_folder)
    for i, row in enumerate(rows):
        text = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in chat(i)[:-1])
        before = tokenizer(text + "<|im_start|>assistant\n")["input_ids"]
        answer = tokenizer(chat(i)[-1]["content"])["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        each = logs.gather(1, torch.tensor(answer)[:, None])[:, 0]
        _, probed, _ = read_probe_rows(str(chats))
        letters = [place for start, end in probed[i].spans for place in range(start, end)]  # one token a byte
        assert float(row["knowledge_chat"]) == pytest.approx(each[letters].mean().item(), abs=6e-5)
    assert read_scores(str(out)) is not None

    flags = FAST | dict(unknown_rows="refuse", unknown_below=0.0, refusal="No.", save_steps=1)
    run(long_folder, chats, tmp_path / "run", **flags)
    kept = tmp_path / "run" / "knowledge.csv"
    assert read_rows(kept)[0] == read_rows(chats)[0]
    assert [row.get("knowledge_digest") for row in rows_of(kept)] == [row["knowledge_digest"] for row in rows]
    again = run(long_folder, chats, tmp_path / "run", **flags | dict(max_steps=3), resume_from_checkpoint="latest")
    assert [line["step"] for line in again] == [1, 2, 3]
