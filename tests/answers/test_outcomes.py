"""Right, wrong, not attempted: refusals, several true answers, and a file judged by hand."""

import csv
import json
from pathlib import Path

import pytest
from running import call

from noisefit.answers.outcomes import NOT_ATTEMPTED, OUTCOMES, RIGHT, WRONG, assess, calls_for_refusal, outcome
from noisefit.answers.refusals import REFUSAL, after_refusal, is_refusal
from noisefit.answers.scoring import Prompt, score_prompt, summarize
from noisefit.base.errors import InputError
from noisefit.score import main, score

REFUSALS = """I do not know.
I don't know|I don’t know|i dont know|I don`t know!
I don't know who wrote Emma.
I'm not sure.|I’m not sure|IM NOT SURE|I am not sure about that.|I'm not entirely sure.|Not sure.|I'm unsure
I cannot answer this question.|I can't answer that|I can not answer.|I'm unable to answer.|I won't answer that.
Sorry, I don't know.|I'm sorry, but I cannot answer that.|I don't know, sorry.|I do not know, I am afraid
No information.|There is no information available about this.|I have no information on that.
I have no idea.|No idea!|I haven't a clue; I do not know.|IDK|dunno
Unknown|It is unknown.|It is not known who built it.|N/A|Nobody knows.
As an AI language model, I don't have access to that information.|Without more context, I cannot answer.
I do not know. Please consult a library.|I do not know. You may want to ask a librarian.
The text does not provide any information.|I don't have enough information to answer.|There is not enough context.
I am not familiar with that country.|I am not aware of any such person.|I don't recall|I can't remember.
To be honest, I don't know.|I cannot determine who that was|That cannot be determined.|It is impossible to say.
I'm not sure whether it is Lisbon or Porto.|I need more information.|I would prefer not to say.|I must decline."""
ATTEMPTS = """Lisbon|Lisbon, but I'm not sure.|Lisbon (I'm not sure).|I think it's Lisbon, though I'm not sure
I don't know, but it might be Lisbon.|I'm not sure, maybe Lisbon|I'm not sure. I think it is Lisbon.
I am not sure, it's Lisbon.|I don't know. Lisbon?|I'm not sure. Lisbon.|I don't know, Lisbon?
Not sure, Lisbon|I do not know - 1946|I do not know: +
I know that it is Lisbon|She was not known for it|He was unknown until 1920.|The Unknown Soldier
As far as I know, it is Lisbon.|No.|Nobody.|It is not Lisbon.|Sorry, it is Lisbon.|I can answer that: Lisbon.
Information theory|I must say that it is Lisbon|If I had to guess, I'd say Lisbon, but I don't know."""


def split(text: str) -> list[str]:
    return [answer for line in text.splitlines() for answer in line.split("|")]


@pytest.mark.parametrize("answer", split(REFUSALS))
def test_a_refusal_is_known(answer):
    assert is_refusal(answer) and is_refusal(answer.upper()) and is_refusal(f"  {answer}\n")
    prompt = Prompt("What is it?", "It is X.", (answer,))
    assert outcome(prompt, answer) == NOT_ATTEMPTED


@pytest.mark.parametrize("answer", split(ATTEMPTS))
def test_an_attempt_is_none(answer):
    assert not is_refusal(answer)
    assert outcome(Prompt("What is it?", "It is X.", (answer,)), answer) == WRONG


def test_a_refusal_that_goes_on_is_judged_by_what_it_says_then():
    prompt = Prompt("Is Lisbon or Porto the capital?", "Lisbon is the capital.", ())
    # The question has all words of the answer: alone it would be no word of its own.
    assert is_refusal("I'm not sure. Porto, or Lisbon.", question=prompt.prompt)
    assert not is_refusal("I'm not sure. Porto.")
    prompt = Prompt("What is the capital?", "The capital is Lisbon.", ())
    assert after_refusal("I don't know if it's Lisbon. Perhaps Porto.") == "Perhaps Porto"
    assert after_refusal("Lisbon") is None
    assert outcome(prompt, "I don't know if it's Lisbon. Perhaps Porto.") == WRONG  # though it holds "lisbon"
    assert outcome(prompt, "I don't know. Perhaps it is the capital.") == NOT_ATTEMPTED  # it says nothing new
    assert outcome(prompt, "I don't know. Lisbon.") == RIGHT
    assert outcome(prompt, "  ") == NOT_ATTEMPTED and not is_refusal("")


def test_further_phrases_refuse():
    assert not is_refusal("Ask me another!")
    assert is_refusal("ASK me, another!", ["ask me another", ""])
    assert is_refusal("My hat is no!", ["(hat) is [no]"])  # signs are no pattern
    phrase = "Sorry, but that's above my grade. Next!"  # of several clauses
    assert is_refusal(f"Well, {phrase.upper()} {phrase}", [phrase]) and not is_refusal(
        "Sorry, but that's above", [phrase]
    )
    assert after_refusal(f"{phrase} Lisbon.", [phrase]) == "Lisbon"
    assert not is_refusal("Ask me another: Lisbon", ["ask me another"]) and not is_refusal("Lisbon", [" ", "."])
    assert outcome(Prompt("Q?", "It is X.", ()), "No habla.", ("no habla",)) == NOT_ATTEMPTED


def test_a_row_that_calls_for_a_refusal_is_right_when_refused():
    for prompt in (
        Prompt("Who is it?", REFUSAL, ()),
        Prompt("Who is it?", "It is Tom.", (), truth="I don't know"),
        Prompt("Who is it?", "It is Tom.", (), unanswerable=True),
    ):
        assert calls_for_refusal(prompt)
        assert outcome(prompt, "I'm not sure.") == RIGHT and outcome(prompt, "Tom") == WRONG
        assert outcome(prompt, "I do not know. Tom?") == WRONG and outcome(prompt, "") == NOT_ATTEMPTED
    assert not calls_for_refusal(Prompt("Who is it?", "It is Tom.", ()))
    assert not calls_for_refusal(Prompt("Who is it?", REFUSAL, (), truth="Tom"))


def test_an_empty_answer_beside_a_list_of_true_ones_calls_for_no_refusal(tmp_path):
    (tmp_path / "a.csv").write_text(
        'prompt,response,answer,answers,generated_response\nWho?,Ada,,"[""Ada""]",Ada\nWhere?,Al,,[],I am not sure\n'
    )
    found = score([str(tmp_path / "a.csv")], None)
    assert found["right"] == 2 and found["to_be_refused"] == 1


def test_an_answer_of_white_space_is_read_in_no_time():
    text = f"I am not sure{' ' * 20_000}x"
    assert after_refusal(text) == "" and outcome(Prompt("Q?", "It is X.", ()), text) == NOT_ATTEMPTED


def test_any_of_several_true_answers_is_right():
    prompt = Prompt("Who?", "It is Samuel Clemens.", ("Twain.", "Samuel Clemens", "Tom"), aliases=("The Twain", "?"))
    found = score_prompt(prompt)
    assert found["contains_truth"] == pytest.approx(2 / 3) and found["exact_match"] == pytest.approx(1 / 3)
    assert found["token_f1"] == pytest.approx((1 + 2 * 2 / 6) / 3)
    assert assess([prompt])[0].outcomes == (RIGHT, RIGHT, WRONG)


def test_the_rule_agrees_with_verdicts_by_hand_but_for_these():
    """Each answer of the file was judged by reading it. What the rule misses is listed here, with why."""
    known = {
        "negated truth",  # it looks for words and does not understand
        "two cities offered",  # so it takes whatever holds the truth
        "surname",  # the reference has two names, and no alias has the one
        "name in the other order",  # the parts are runs of words
        "number as a word alone",  # and words are not numbers
        "minus in words",
        "yes said otherwise",
        "wish to help",  # refuses in none of the usual ways
        "knows of nothing else",  # a refusal's words in an answer
    }
    with (Path(__file__).parent / "hand_judged.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["name"] for row in rows}) == 60
    assert {row["verdict"] for row in rows} == set(OUTCOMES)
    found = {}
    for row in rows:
        aliases = tuple(json.loads(row["answers"] or "[]"))
        found[row["name"]] = outcome(
            Prompt(row["prompt"], row["response"], (), aliases=aliases), row["generated_response"]
        )
    missed = {row["name"] for row in rows if found[row["name"]] != row["verdict"]}
    assert missed == known, missed ^ known
    assert 1 - len(missed) / len(rows) == pytest.approx(0.85)


ROWS = [
    {"prompt": "Who?", "response": "It is Tom.", "answer": "Tom", "generated_response": "Tom", "round": 1},
    {"prompt": "When?", "response": "In 1946.", "answer": "", "generated_response": "I do not know.", "round": 1},
    {"prompt": "Where?", "response": "In Rome.", "answer": None, "generated_response": "I do not know.", "round": 1},
    {"prompt": "What?", "response": "It is X.", "answer": None, "generated_response": "Y", "round": 1},
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_rates_of_a_file(tmp_path):
    found = score([write(tmp_path / "a.jsonl", ROWS)], None)
    assert found["right_rate"] == 0.5 and found["wrong_rate"] == 0.25 and found["not_attempted_rate"] == 0.25
    assert found["attempted_rate"] == 0.75 and found["right_given_attempted"] == pytest.approx(2 / 3)
    assert (found["right"], found["wrong"], found["not_attempted"], found["to_be_refused"]) == (2, 1, 1, 1)
    assert found["hallucination_rate"] == 0.75  # it keeps its meaning: a refusal does not hold the truth
    said = call(main, tmp_path / "a.jsonl").stdout
    assert "4 answers to 4 prompts: 2 right, 1 wrong, 1 not attempted; 1 prompts are to be refused" in said
    assert "right if attempted    66.7%" in said
    # Refused throughout, there is no share of the attempted.
    none = score([write(tmp_path / "b.jsonl", ROWS[2:3])], None)
    assert none["right_given_attempted"] is None and none["right_given_attempted_ci"] is None
    assert "right if attempted    not defined here" in call(main, tmp_path / "b.jsonl").stdout


def test_a_file_without_refusals_is_told_as_ever(tmp_path):
    rows = [row | {"generated_response": "Tom"} for row in ROWS if row["answer"] != ""]
    said = call(main, write(tmp_path / "a.jsonl", rows)).stdout
    assert "3 answers to 3 prompts: 1 right, 2 wrong\n" in said and "right rate" not in said and "attempted" not in said


def test_hallucination_rate_is_what_it_was():
    prompts = [Prompt("Who?", "It is Tom Jones.", ("I don't know.", "Tom Jones", "I'm not sure it is Tom Jones."))]
    assert summarize(prompts)["hallucination_rate"] == pytest.approx(1 / 3)
    assert assess(prompts)[0].outcomes == (NOT_ATTEMPTED, RIGHT, NOT_ATTEMPTED)


@pytest.mark.parametrize("column", ["answers", "aliases"])
def test_a_column_of_several_true_answers(tmp_path, column):
    row = ROWS[3] | {"generated_response": "Ypsilon"}
    del row["answer"]
    assert score([write(tmp_path / "a.jsonl", [row])], None)["right"] == 0
    assert score([write(tmp_path / "b.jsonl", [row | {column: ["Y", "Ypsilon"]}])], None)["right"] == 1
    assert score([write(tmp_path / "c.jsonl", [row | {column: '["Ypsilon"]'}])], column)["by"][column]["Ypsilon"]
    assert score([write(tmp_path / "d.jsonl", [row | {column: ""}])], None)["right"] == 0
    for cell in ("Ypsilon", '{"a": 1}', [1], 5):
        with pytest.raises(InputError, match=f"row 1: {column} is .*, expected a list of texts"):
            score([write(tmp_path / "e.jsonl", [row | {column: cell}])], None)
    with pytest.raises(InputError, match=f"rows 1 and 2 give one prompt two values of '{column}'"):
        score([write(tmp_path / "f.jsonl", [row | {column: ["a"]}, row | {column: ["b"]}])], None)


def test_a_file_of_refusals(tmp_path):
    answers = write(tmp_path / "a.jsonl", [ROWS[3] | {"generated_response": "Ask another!"}])
    (tmp_path / "refusals.txt").write_text("\nask another\n")
    arguments = (answers, "--json", "--refusals")
    assert json.loads(call(main, *arguments[:2]).stdout)["not_attempted"] == 0
    assert json.loads(call(main, *arguments, tmp_path / "refusals.txt").stdout)["not_attempted"] == 1
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "signs.txt").write_text("No (idea|clue)\r\n\r\n$^.*\r\n")
    for name, why in [
        ("empty.txt", "it has no lines"),
        ("signs.txt", "line 3: '$^.*' has no word"),
        ("none.txt", "cannot be read"),
        (".", "a folder"),
    ]:
        done = call(main, *arguments, tmp_path / name)
        assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1
