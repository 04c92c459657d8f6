"""The published evaluation: its files of each format, its prompts to the last byte, its letters, and bad files."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from running import call
from tiny_folder import byte_tokenizer, tiny_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import generate
from noisefit.answers.settings import parse_arguments
from noisefit.base.errors import InputError
from noisefit.benchmarks import letter_of, main, score_letters, write_questions
from noisefit.inputs.prompts import prompt_ids
from noisefit.inputs.tables import read_prompts, read_records
from noisefit.inputs.templates import set_chat_template
from noisefit.score import score

TRUTHFULQA = [
    {"question": "Is it so?", "choices": ["Yes", " No, never", "Perhaps,\nsome say", 'The "moon"'], "label": 1},
    {"question": "Où est-il?", "choices": ["Hier", "Là", "Nulle part", "Ici"], "label": 3},
]
TRUTHFULQA_PROMPTS = [
    'Is it so?\nA. Yes\nB.  No, never\nC. Perhaps,\nsome say\nD. The "moon"\nAnswer:',
    "Où est-il?\nA. Hier\nB. Là\nC. Nulle part\nD. Ici\nAnswer:",
]
MC1 = [
    {
        "question": f"What is {i}?",
        "mc1_targets": {
            "choices": [f"It is {i}"] + [f"no {j}" for j in range(1 + i % 12)],
            "labels": [1] + [0] * (1 + i % 12),
        },
    }
    for i in range(24)
]
# As in flowaicom/HaluEval; HaluBench has the same but for the score.
HALUEVAL = [
    {"id": "a", "passage": " Emma is by Jane Austen. ", "question": "Who wrote Emma? ", "answer": "Jane Austen",
     "label": "PASS", "source_ds": "halueval", "score": 1},
    {"id": "b", "passage": "Lima is in Peru.", "question": "Where is Lima?", "answer": "In Chile",
     "label": "FAIL", "source_ds": "halueval", "score": 0},
    {"id": "c", "passage": "", "question": "Where is Lima?", "answer": "Peru",
     "label": "PASS", "source_ds": "halueval", "score": 1},
]  # fmt: skip
HALUEVAL_PROMPTS = [" Emma is by Jane Austen. \n\nWho wrote Emma? \n\n", "\n\nWhere is Lima?\n\n"]
QA_DATA = [  # as in HaluEval's own qa_data.json
    {"knowledge": row["passage"], "question": row["question"], "right_answer": row["answer"],
     "hallucinated_answer": "It is not known."} for row in (HALUEVAL[0], HALUEVAL[2])
]  # fmt: skip


def save(path: Path, rows: list[dict]) -> Path:
    """Rows as a file of the kind that its name says; in a CSV, lists are JSON."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str | int) else json.dumps(v) for k, v in row.items()})
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made(name: str, data: Path) -> list[dict[str, str]]:
    output = data.with_name("questions.csv")
    write_questions(name, str(data), str(output), overwrite=True)
    return rows_of(output)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_truthfulqa_becomes_the_published_prompts(suffix, tmp_path):
    found = made("truthfulqa", save(tmp_path / f"data.{suffix}", TRUTHFULQA))
    assert [row["prompt"] for row in found] == TRUTHFULQA_PROMPTS
    assert [(row["response"], row["answer"], row["choices"]) for row in found] == [
        (" No, never", "B", "4"),
        ("Ici", "D", "4"),
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_right_one_of_mc1_targets_does_not_stay_first(suffix, tmp_path):
    found = made("truthfulqa", save(tmp_path / f"data.{suffix}", MC1))
    for row, original in zip(found, MC1, strict=True):
        choices = original["mc1_targets"]["choices"]
        question, *listed, end = row["prompt"].split("\n")
        assert question == original["question"] and end == "Answer:" and row["choices"] == str(len(choices))
        assert [line[:3] for line in listed] == [f"{letter}. " for letter in "ABCDEFGHIJKLM"[: len(choices)]]
        assert sorted(line[3:] for line in listed) == sorted(choices)
        assert f"{row['answer']}. {choices[0]}" in listed and row["response"] == choices[0]
    assert len({row["answer"] for row in found}) > 5
    # No file's place, nor its neighbours, decides on the order.
    again = made("truthfulqa", save(tmp_path / "again.jsonl", MC1[::-1]))
    assert again == found[::-1]


def test_a_choice_that_stands_there_twice_keeps_the_letter_of_the_label(tmp_path):
    rows = [{"question": "Which?", "choices": ["x", "x", "y"], "label": 1}]
    assert made("truthfulqa", save(tmp_path / "data.jsonl", rows))[0]["answer"] == "B"


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("rows", [HALUEVAL, QA_DATA], ids=["flowaicom", "qa_data"])
def test_halueval_becomes_the_published_prompts(rows, suffix, tmp_path):
    found = made("halueval", save(tmp_path / f"data.{suffix}", rows))
    assert [row["prompt"] for row in found] == HALUEVAL_PROMPTS
    assert [(row["question"], row["response"]) for row in found] == [
        ("Who wrote Emma? ", "Jane Austen"),
        ("Where is Lima?", "Peru"),
    ]


@pytest.mark.parametrize(
    "mark", [{"label": "FAIL"}, {"label": "fail "}, {"score": 0}, {"score": 0.0}, {"hallucination": "yes"}]
)
def test_what_is_no_question_is_left_out_and_counted(mark, tmp_path, capsys):
    rows = [
        {"question": "Why?", "answer": "So."},
        {"question": "How?", "answer": "Wrong."} | mark,
        {"question": "Why?", "answer": "Not so."},  # which `noisefit.score` would refuse, after all answers are made
        {"question": " ", "answer": "So."},
        {"question": "Who?", "answer": None},
        {"question": "Where?", "answer": "Here.", "label": "PASS", "score": 1, "hallucination": "no"},
    ]
    data = save(tmp_path / "data.jsonl", rows)
    assert [row["question"] for row in made("halueval", data)] == ["Why?", "Where?"]
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        f"{data}: skipped 1 row whose answer is marked as a hallucination, so no truth to compare with (row 2)",
        f"{data}: skipped 1 row with the prompt of an earlier row (row 3)",
        f"{data}: skipped 2 rows with an empty or missing cell (row 4, 5)",
    ]
    assert said[3:4] == [f"the questions, 2 of them, are in {tmp_path / 'questions.csv'}"]


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


def spaced_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer of characters that puts a space before a text's first word, as Llama 2's and Mistral's do."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(9, 256)), "▁"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    specials = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_tokenizer(),
        with_bos(byte_tokenizer()),
        spaced_tokenizer("first"),
        with_bos(spaced_tokenizer("first")),
        with_bos(spaced_tokenizer("always")),
    ],
    ids=["bytes", "bytes with start", "spaced", "spaced at the first with start", "spaced always with start"],
)
def test_the_tokens_are_the_tokenizers_own_of_the_published_text(tokenizer, tmp_path):
    published = [tokenizer(text)["input_ids"] for text in TRUTHFULQA_PROMPTS + HALUEVAL_PROMPTS]
    set_chat_template(tokenizer, "plain")
    tokenizer.save_pretrained(tmp_path / "saved")  # as an adapter that was trained so has it
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    set_chat_template(saved)
    questions = tmp_path / "questions.csv"
    found = []
    for name, rows in (("truthfulqa", TRUTHFULQA), ("halueval", HALUEVAL)):
        made(name, save(tmp_path / "data.jsonl", rows))
        for row in read_prompts(questions, strip=False)[1]:
            found.append(prompt_ids(tokenizer, row.prompt))
            assert prompt_ids(saved, row.prompt) == found[-1]
    assert found == published


def test_white_space_goes_where_it_is_not_asked_for(tmp_path):
    made("halueval", save(tmp_path / "data.jsonl", HALUEVAL))
    records, rows, _ = read_prompts(tmp_path / "questions.csv")
    assert [row.prompt for row in rows] == [prompt.strip() for prompt in HALUEVAL_PROMPTS]
    assert [record["prompt"] for record in records] == HALUEVAL_PROMPTS


def first_letter(text: str, known: str) -> str | None:
    """The published rule, read letter by letter."""
    for i, letter in enumerate(text):
        around = text[:i][-1:] + text[i + 1 :][:1]
        if letter in known and not any(sign.isalnum() or sign == "_" for sign in around):
            return letter
    return None


def test_the_letter_is_the_first_that_stands_alone():
    for text, expected in [("B", "B"), ("B.", "B"), ("(C)", "C"), ("b", None), ("BC", None), ("", None), ("A_", None),
                           ("The D, not A", "D"), ("E", None), ("E or A", "A"), ("Bé\nD", "D")]:  # fmt: skip
        for choices in (2, 3, 4):  # four letters are known whatever the question has
            assert letter_of(text, choices) == expected, (text, choices)
    assert letter_of("E or A", 5) == "E" and letter_of("I say Z", 9) == "I" and letter_of("I say Z", 8) is None
    assert letter_of("Z", 26) == "Z"
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ABCDEIZa1_é .)\n", k=rng.randint(0, 8)))
        choices = rng.randint(2, 26)
        known = "ABCD" if choices < 5 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:choices]
        assert letter_of(text, choices) == first_letter(text, known), (text, choices)


def answers_file(path: Path, given: list[list[str]], right: str = "B", choices: str = "4") -> Path:
    rows = [
        {"prompt": f"{i}?\nAnswer:", "response": "x", "answer": right, "choices": choices,
         "generated_response": text, "round": number}
        for i, rounds in enumerate(given) for number, text in enumerate(rounds, start=1)
    ]  # fmt: skip
    return save(path, rows)


def test_accuracy_is_a_mean_over_prompts_with_a_bootstrap_interval(tmp_path):
    rng = np.random.default_rng(0)
    rights = rng.random(300) < 0.4
    path = answers_file(tmp_path / "a.csv", [[" B. Yes" if right else "A cat"] for right in rights])
    found = score_letters(str(path))
    assert found["accuracy"] == pytest.approx(rights.mean())
    low, high = found["accuracy_ci"]
    error = rights.std() / np.sqrt(300)
    assert low < found["accuracy"] < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert (found["prompts"], found["answers"], found["no_letter"]) == (300, 300, 0)
    assert (found["right"], found["wrong"]) == (rights.sum(), 300 - rights.sum())


def test_the_command_scores_letters(tmp_path):
    path = answers_file(tmp_path / "a.csv", [["B", "B", "C"], ["none", "", "B"]])
    done = call(main, "letters", path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("accuracy") == pytest.approx((2 / 3 + 1 / 3) / 2) and len(found.pop("accuracy_ci")) == 2
    assert found == {"file": str(path), "prompts": 2, "answers": 6, "right": 3, "wrong": 3, "no_letter": 2}
    shown = call(main, "letters", path).stdout.splitlines()
    assert shown[0] == f"{path}: 6 answers to 2 prompts: 3 right, 3 wrong, 2 of these without a letter"
    assert "fewer than 20" in shown[1] and shown[2].split()[:2] == ["accuracy", "50.0%"] and len(shown) == 3


@pytest.mark.slow
def test_from_the_data_to_the_figures(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    with_bos(AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for name, rows, prompts, new_tokens in [
        ("truthfulqa", TRUTHFULQA, TRUTHFULQA_PROMPTS, 3),
        ("halueval", HALUEVAL, HALUEVAL_PROMPTS, 36),
    ]:
        questions, answers = tmp_path / f"{name}.csv", tmp_path / f"{name}_answers.csv"
        done = call(main, name, "--source", save(tmp_path / "data.jsonl", rows), f"--output={questions}")
        assert done.returncode == 0 and done.stdout == "", done.stderr
        advice = done.stderr.splitlines()[-1].partition("--model_path ADAPTER ")[2]
        words = [*advice.split(), f"--model_id={folder}", f"--output_csv={answers}"]
        assert f"--max_new_tokens {new_tokens}" in advice
        done = call(lambda argv: generate.generate(parse_arguments(argv)), *words)
        assert done.returncode == 0, done.stderr
        found = rows_of(answers)
        assert [row["prompt"] for row in found] == prompts
        for row in found:  # one at a time, as the published programs ask
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
            new = model.generate(ids, attention_mask=ids**0, max_new_tokens=new_tokens, do_sample=False)
            expected = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert row["generated_response"] == expected
        program = {"truthfulqa": "noisefit.benchmarks letters", "halueval": "noisefit.score"}[name]
        assert done.stderr.splitlines()[-1].endswith(f"python -m {program} {answers}")
    assert score_letters(str(tmp_path / "truthfulqa_answers.csv"))["prompts"] == 2
    assert score([str(tmp_path / "halueval_answers.csv")], by=None)["prompts"] == 2


def truthfulqa(**cells: object) -> list[dict]:
    return [TRUTHFULQA[0], {k: v for k, v in (TRUTHFULQA[1] | cells).items() if v != "GONE"}]


def mc1(**cells: object) -> list[dict]:
    return [{"question": "Why?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]} | cells}]


ROW_2, CHOICES = "data.jsonl: row 2: ", "expected a list of texts, none of them empty"
BAD = {
    "no choices at all": ("truthfulqa", HALUEVAL, r"data.jsonl: expected columns question and choices and label, or "
                          "question and mc1_targets; columns found: id, passage"),
    "no question": ("halueval", [{"answer": "a"}], "data.jsonl: expected columns question and answer, or question and"),
    "another's data": ("halueval", TRUTHFULQA, "columns found: question, choices, label"),
    "no rows": ("halueval", [], "data.jsonl: the file is empty"),
    "label too large": ("truthfulqa", truthfulqa(label=4), ROW_2 + "label is '4', expected 0 to 3"),
    "label below": ("truthfulqa", truthfulqa(label=-1), ROW_2 + "label is '-1', expected 0 to 3"),
    "label true": ("truthfulqa", truthfulqa(label=True), ROW_2 + "label is 'True', expected 0 to 3"),
    "no label": ("truthfulqa", truthfulqa(label="GONE"), ROW_2 + "label is 'None', expected 0 to 3"),
    "no choices": ("truthfulqa", truthfulqa(choices=[]), ROW_2 + "choices: 0 choices, expected 2 to 26"),
    "null choices": ("truthfulqa", truthfulqa(choices=None), ROW_2 + "choices: " + CHOICES),
    "an empty choice": ("truthfulqa", truthfulqa(choices=["a", " "]), ROW_2 + "choices: " + CHOICES),
    "a number": ("truthfulqa", truthfulqa(choices=["a", 1]), ROW_2 + "choices: " + CHOICES),
    "text": ("truthfulqa", truthfulqa(choices="['a' 'b']"), ROW_2 + "choices: not JSON; save the data as .jsonl"),
    "27": ("truthfulqa", truthfulqa(choices=["x"] * 27), ROW_2 + "choices: 27 choices, expected 2 to 26"),
    "question a list": ("truthfulqa", truthfulqa(question=["a"]), ROW_2 + "question is list, expected text"),
    "two right": ("truthfulqa", mc1(labels=[1, 1]), "row 1: mc1_targets: labels: expected a 1 for one of 2 choices"),
    "none right": ("truthfulqa", mc1(labels=[0, 0]), "row 1: mc1_targets: labels: expected a 1"),
    "labels too few": ("truthfulqa", mc1(labels=[1]), "row 1: mc1_targets: labels: expected a 1"),
    "labels no list": ("truthfulqa", mc1(labels=1), "row 1: mc1_targets: labels: expected a 1"),
    "no targets": ("truthfulqa", [{"question": "Why?", "mc1_targets": 3}], "row 1: mc1_targets: choices: expected a"),
    "only hallucinations": ("halueval", HALUEVAL[1:2], "no question to use: each row is one whose answer is marked"),
    "passage a list": ("halueval", [{"question": "q", "answer": "a", "passage": []}], "row 1: passage is list, expec"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_and_nothing_is_written(case, tmp_path):
    name, rows, message = BAD[case]
    data = save(tmp_path / "data.jsonl", rows)
    done = call(main, name, "--source", data, f"--output={tmp_path / 'questions.csv'}")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"noisefit.benchmarks: error: {data}: ") and message in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_table_without_rows_is_said_to_be_one(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer\n")
    with pytest.raises(InputError, match=r"data\.csv: it has no rows"):
        write_questions("halueval", str(tmp_path / "data.csv"), str(tmp_path / "questions.csv"))


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path):
    data, output = save(tmp_path / "data.csv", QA_DATA), tmp_path / "questions.csv"
    output.write_text("mine")
    done = call(main, "halueval", "--source", data, f"--output={output}")
    assert done.returncode == 2 and "exists; choose another name, or give --overwrite_output" in done.stderr
    assert call(main, "halueval", "--source", data, f"--output={data}", "--overwrite_output").returncode == 2
    assert output.read_text() == "mine" and len(rows_of(data)) == 2 and "knowledge" in rows_of(data)[0]
    assert call(main, "halueval", "--source", data, f"--output={output}", "--overwrite_output").returncode == 0
    assert len(rows_of(output)) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("right", "choices", "message"),
    [
        ("", "4", "a.csv: row 1: answer is '', expected a letter of 4 choices"),
        ("E", "4", "a.csv: row 1: answer is 'E', expected a letter of 4 choices"),
        ("AB", "4", "a.csv: row 1: answer is 'AB', expected a letter of 4 choices"),
        ("B", "four", "a.csv: row 1: choices is 'four', expected 2 to 26"),
        ("B", "27", "a.csv: row 1: choices is '27', expected 2 to 26"),
    ],
)
def test_answers_without_letters_are_refused(right, choices, message, tmp_path):
    path = answers_file(tmp_path / "a.csv", [["B"]], right, choices)
    with pytest.raises(InputError) as caught:
        score_letters(str(path))
    assert str(caught.value).endswith(message)


def test_answers_to_something_else_and_a_flag_that_is_none_are_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,generated_response,round\nWhy?,So.,So,1\n")
    for words, message in [
        (["letters", tmp_path / "a.csv"], "no column 'answer'"),
        (["letters", tmp_path / "a.csv", "--jsn"], "unrecognized arguments: --jsn"),
        (["mmlu", "x"], "invalid choice: 'mmlu'"),
        (["halueval", "--source", "x"], "--output"),
        ([], "COMMAND"),
    ]:
        done = call(main, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_a_label_that_pandas_made_a_float_is_a_choices_number(tmp_path):
    data = save(tmp_path / "data.jsonl", [{"question": "A?", "choices": ["x", "y"], "label": 1.0}])
    write_questions("truthfulqa", str(data), str(tmp_path / "q.csv"))
    [(_, question)] = read_records(tmp_path / "q.csv", ())
    assert question["answer"] == "B"


def test_questions_without_answers_are_said_to_be_that(tmp_path):
    (tmp_path / "q.csv").write_text("prompt,response,answer,choices\nWhy?,So.,A,2\n")
    done = call(main, "letters", tmp_path / "q.csv")
    assert done.returncode == 2 and "the questions and no answers; give them to generate.py first" in done.stderr
