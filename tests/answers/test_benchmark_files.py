"""TriviaQA, NQ-open, PopQA and SimpleQA in their published formats, as questions with all their true answers."""

import csv
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from running import call

import generate
from noisefit.answers.settings import parse_arguments
from noisefit.benchmarks import main
from noisefit.inputs.tables import read_records
from noisefit.score import score

# As in TriviaQA's own files: one object over many lines.
TRIVIAQA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["Sunset Blvd", "Sunset Boulevard", "Sunset Bulevard"],
                "MatchedWikiEntityName": "Sunset Boulevard",
                "NormalizedAliases": ["sunset blvd", "sunset boulevard", "sunset bulevard"],
                "NormalizedValue": "sunset boulevard",
                "Type": "WikipediaEntity",
                "Value": "Sunset Boulevard",
            },
            "EntityPages": [{"DocSource": "TagMe", "Filename": "A.txt", "Title": "A"}],
            "Question": " Which musical opened in 1993? ",
            "QuestionId": "tc_33",
            "QuestionSource": "http://www.example.org/",
        },
        {
            "Answer": {"HumanAnswers": ["El Tango"], "NormalizedAliases": ["tango"], "Type": "FreeForm",
                       "Value": "Tango", "Aliases": []},
            "Question": "Qué \"baile\" es?", "QuestionId": "tc_34", "SearchResults": [],
        },
    ],
    "Domain": "unfiltered", "VerifiedEval": False, "Version": 1.0,
}  # fmt: skip
TRIVIAQA_HUB = [  # as in trivia_qa, rc.nocontext, whose test rows have no answer
    {
        "question": row["Question"], "question_id": row["QuestionId"], "entity_pages": [], "search_results": [],
        "answer": {
            "aliases": row["Answer"]["Aliases"] + row["Answer"].get("HumanAnswers", []),
            "normalized_aliases": row["Answer"]["NormalizedAliases"], "value": row["Answer"]["Value"],
            "normalized_value": row["Answer"]["Value"].lower(), "type": row["Answer"]["Type"],
        },
    }
    for row in TRIVIAQA["Data"]
]  # fmt: skip
TRIVIAQA_MADE = [
    ("Which musical opened in 1993?", ["Sunset Boulevard", "Sunset Blvd", "Sunset Bulevard"]),
    ('Qué "baile" es?', ["Tango", "El Tango"]),
]
NQ_OPEN = [
    {"question": "where is the \"heart\" of it", "answer": ["Ukraine", "the steppe"]},
    {"question": "who was first", "answer": [" Ötzi "]},
]  # fmt: skip
NQ_OPEN_MADE = [(NQ_OPEN[0]["question"], ["Ukraine", "the steppe"]), ("who was first", ["Ötzi"])]
POPQA = [
    {"id": 1, "subj": "George", "prop": "occupation", "obj": "politician", "s_pop": 142,
     "question": "What is George's occupation?", "possible_answers": '["politician", "leader", "pol, \\u00e9"]'},
    {"id": 2, "subj": "It", "prop": "genre", "obj": "jazz", "s_pop": 3,
     "question": "What genre is It?", "possible_answers": '["jazz", "Jazz", "\\"cool\\" jazz"]'},
]  # fmt: skip
POPQA_MADE = [
    ("What is George's occupation?", ["politician", "leader", "pol, é"]),
    ("What genre is It?", ["jazz", '"cool" jazz']),
]
SIMPLEQA = [
    {"metadata": "{'topic': 'Art', 'answer_type': 'Date'}", "problem": "On which day, month, and year?",
     "answer": "May 4, 1913"},
    {"metadata": "{'topic': 'Other'}", "problem": 'Who sang "Yes"?', "answer": "Ada\nB."},
]  # fmt: skip
SIMPLEQA_MADE = [("On which day, month, and year?", ["May 4, 1913"]), ('Who sang "Yes"?', ["Ada\nB."])]
CASES = [
    ("triviaqa", TRIVIAQA, TRIVIAQA_MADE, ["json"]),
    ("triviaqa", TRIVIAQA_HUB, TRIVIAQA_MADE, ["csv", "jsonl", "json", "parquet"]),
    ("nq_open", NQ_OPEN, NQ_OPEN_MADE, ["csv", "jsonl", "json", "parquet"]),
    ("popqa", POPQA, POPQA_MADE, ["tsv", "csv", "jsonl", "parquet"]),
    ("simpleqa", SIMPLEQA, SIMPLEQA_MADE, ["csv", "jsonl", "parquet"]),
]


def save(path: Path, content: object, one_document: bool = False) -> Path:
    """A file of the kind that its name says; lists and objects in a table of text are JSON."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, content[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            for row in content:
                writer.writerow({k: v if isinstance(v, str | int) else json.dumps(v) for k, v in row.items()})
    elif isinstance(content, dict) or one_document:
        path.write_text("\ufeff" + json.dumps(content, indent=4), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def make(name: str, data: Path, *flags: str):
    """What the command says, and the rows that it wrote."""
    output = data.with_name("questions.csv")
    done = call(main, name, "--source", data, "--output", output, *flags)
    return done, [record for _, record in read_records(output, ())] if done.returncode == 0 else []


@pytest.mark.parametrize(
    ("name", "content", "expected", "suffix"), [(n, c, e, suffix) for n, c, e, kinds in CASES for suffix in kinds]
)
def test_a_published_file_becomes_questions_with_all_their_answers(name, content, expected, suffix, tmp_path):
    data = save(tmp_path / f"data.{suffix}", content)
    done, rows = make(name, data)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert [list(row) for row in rows] == [["prompt", "response", "answers"]] * 2
    assert [(row["prompt"], json.loads(row["answers"])) for row in rows] == expected
    assert [row["response"] for row in rows] == [answers[0] for _, answers in expected]
    assert done.stderr.splitlines() == [
        f"the questions, 2 of them, are in {tmp_path / 'questions.csv'}",
        "next, the answers: accelerate launch generate.py --model_path ADAPTER --input_csv "
        f"{tmp_path / 'questions.csv'} --greedy --rounds 1 --max_new_tokens 32",
    ]


@pytest.mark.parametrize(("name", "content", "expected"), [case[:3] for case in CASES[1:]])
def test_one_document_that_is_a_list_is_read_too(name, content, expected, tmp_path):
    _, rows = make(name, save(tmp_path / "data.json", content, one_document=True))
    assert [(row["prompt"], json.loads(row["answers"])) for row in rows] == expected


def test_each_answer_stands_there_once_and_the_first_stays_first(tmp_path):
    rng = random.Random(0)
    for _ in range(50):
        given = [rng.choice(["a", "A ", "b", " B", "ß", "SS", "", "c", "+"]) for _ in range(rng.randint(1, 7))]
        if not "".join(given):
            continue
        _, [row] = make(
            "nq_open", save(tmp_path / "d.jsonl", [{"question": "q", "answer": given}]), "--overwrite_output"
        )
        kept: list[str] = []
        for text in given:
            if text.strip() and text.strip().casefold() not in [other.casefold() for other in kept]:
                kept.append(text.strip())
        assert json.loads(row["answers"]) == kept and row["response"] == kept[0]


def test_the_published_evaluation_has_its_true_answer_in_the_same_column(tmp_path):
    rows = [{"passage": "p", "question": "Who?", "answer": 'Ada, "she"'}]
    _, [row] = make("halueval", save(tmp_path / "data.jsonl", rows))
    assert row == {"prompt": "p\n\nWho?\n\n", "response": rows[0]["answer"], "question": "Who?",
                   "answers": json.dumps([rows[0]["answer"]])}  # fmt: skip
    rows = [{"question": "So?", "choices": ["no", "yes"], "label": 1}]
    _, [row] = make("truthfulqa", save(tmp_path / "data.jsonl", rows), "--overwrite_output")
    assert row == {"prompt": "So?\nA. no\nB. yes\nAnswer:", "response": "yes", "answer": "B", "choices": "2",
                   "answers": '["yes"]'}  # fmt: skip


def hub(**cells: object) -> list[dict]:
    return [TRIVIAQA_HUB[0], TRIVIAQA_HUB[1] | cells]


def answer(**cells: object) -> list[dict]:
    return hub(answer=TRIVIAQA_HUB[1]["answer"] | cells)


ROW_2 = "data.json: row 2: "
BAD = {
    "another benchmark": ("popqa", SIMPLEQA, "expected columns question and possible_answers; columns found: metadata"),
    "no answers at all": ("triviaqa", [{"Question": "q"}], "columns question and answer, or Question and Answer"),
    "an answer that is text": ("triviaqa", hub(answer="Tango"), ROW_2 + "answer: not JSON; save the data as .jsonl"),
    "that is a list": ("triviaqa", hub(answer=["Tango"]), ROW_2 + "answer: expected an object with value and aliases"),
    "an alias that is a number": ("triviaqa", answer(aliases=["a", 1]), ROW_2 + "answer: aliases: expected a list"),
    "aliases that are text": ("triviaqa", answer(aliases='"a"'), ROW_2 + "answer: aliases: expected a list of texts"),
    "a value that is a number": ("triviaqa", answer(value=1), ROW_2 + "answer: value is int, expected text"),
    "half of a pair": ("triviaqa", {"Data": [{"Question": "\ud800"}]}, "row 1 holds half of a surrogate pair"),
    "a row that is none": ("triviaqa", {"Data": [TRIVIAQA["Data"][0], 3]}, "json: row 2 is a JSON int, expected an"),
    "no rows": ("triviaqa", {"Data": []}, "data.json: it has no rows"),
    "another document": ("triviaqa", {"data": [3]}, "data.json: row 1 is not JSON"),
    "a question that is a list": ("nq_open", [{"question": ["q"], "answer": ["a"]}], "row 1: question is list, expect"),
    "an answer without a list": ("nq_open", [{"question": "q", "answer": "a"}], "row 1: answer: not JSON; save"),
    "answers in quotes of Python": ("popqa", [{"question": "q", "possible_answers": "['a']"}], "answers: not JSON"),
    "no list of answers": ("popqa", [{"question": "q", "possible_answers": "3"}], "possible_answers: expected a list"),
    "a year that is a number": ("simpleqa", [{"problem": "q", "answer": 1913}], "row 1: answer is int, expected text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_line_and_nothing_is_written(case, tmp_path):
    name, content, message = BAD[case]
    done, _ = make(name, save(tmp_path / "data.json", content))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("noisefit.benchmarks: error: ") and message in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_a_document_that_ends_too_soon_or_is_no_text_is_one_line(tmp_path):
    whole = json.dumps(TRIVIAQA, indent=4).encode()
    for content in (whole[: len(whole) // 2], b"", b"[" * 100_000, whole.replace(b"Blvd", b"\xff")):
        (tmp_path / "data.json").write_bytes(content)
        done, _ = make("triviaqa", tmp_path / "data.json")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "data.json" in done.stderr, done.stderr


def test_rows_without_question_or_answer_are_left_out_and_counted(tmp_path):
    rows = [
        {"question": "q1", "answer": {"value": "a", "aliases": None}},
        {"question": "q2", "answer": {"value": "<unk>", "aliases": []}},
        {"question": " ", "answer": {"value": "a", "aliases": []}},
        {"question": "q3", "answer": {"value": "", "aliases": [" "]}},
        {"question": "q1 ", "answer": {"value": "b", "aliases": []}},
        {"question": "q4", "answer": None},
    ]
    data = save(tmp_path / "data.jsonl", rows)
    done, [row] = make("triviaqa", data)
    assert row == {"prompt": "q1", "response": "a", "answers": '["a"]'}
    assert done.stderr.splitlines()[:3] == [
        f"{data}: skipped 1 row whose answer is not published (row 2)",
        f"{data}: skipped 3 rows with an empty or missing cell (row 3, 4, 6)",
        f"{data}: skipped 1 row with the prompt of an earlier row (row 5)",
    ]


def test_a_table_with_tabs_says_what_its_cells_may_not_hold(tmp_path):
    (tmp_path / "data.tsv").write_text('question\tpossible_answers\nq, r\t["a"]\tb\n')
    done, _ = make("popqa", tmp_path / "data.tsv")
    assert done.returncode == 2 and 'put cells that hold tabs in "double quotes"' in done.stderr


@pytest.mark.slow
def test_from_the_file_over_the_models_answers_to_the_score(llama_folder, tmp_path):
    done, _ = make("popqa", save(tmp_path / "data.tsv", POPQA))
    advice = done.stderr.splitlines()[-1].partition("--model_path ADAPTER ")[2].split()
    words = [*advice, f"--model_id={llama_folder}", f"--output_csv={tmp_path / 'answers.csv'}"]
    done = call(lambda argv: generate.generate(parse_arguments(argv)), *words)
    assert done.returncode == 0, done.stderr
    assert f"python -m noisefit.score {tmp_path / 'answers.csv'}" in done.stderr.splitlines()[-1]
    assert score([str(tmp_path / "answers.csv")], by=None)["prompts"] == 2
