"""Scores: normalisation, the decisive part of a reference, averages, intervals, paired comparisons."""

import json
from dataclasses import replace

import numpy as np
import pytest
from running import call

from noisefit.answers.scoring import (
    Prompt,
    compare,
    decisive_parts,
    holds,
    normalize,
    score_prompt,
    summarize,
    token_f1,
)
from noisefit.base.errors import InputError
from noisefit.inputs.tables import read_rows
from noisefit.score import main, score


def test_squad_normalisation_and_f1():
    assert normalize("  The  Gateway of India, a “landmark”. ") == "gateway of india landmark"
    assert token_f1("Lisbon is the capital.", "The capital is Lisbon") == 1.0
    assert token_f1("It is Lisbon", "capital is Lisbon") == pytest.approx(2 / 3)
    assert token_f1("Porto Porto", "Porto") == pytest.approx(2 / 3)
    assert token_f1("", "Porto") == 0.0 and token_f1("the", "a") == 1.0


@pytest.mark.parametrize(
    "prompt, reference, parts",
    [
        ("What is the capital of Portugal?", "The capital of Portugal is Lisbon.", ["lisbon"]),
        ("Who wrote Emma?", "Jane Austen wrote Emma.", ["jane austen"]),
        ("Where is the Parthenon located?", "The Parthenon is located in Greece.", ["greece"]),
        ("What landmark is in Mumbai?", "The landmark in Mumbai is Gateway of India.", ["gateway of india"]),
        ("When was the ENIAC invented?", "The ENIAC was invented in 1946 by J. Eckert.", ["1946"]),
        ("Who invented the ENIAC?", "The ENIAC was invented in 1946 by J. Eckert.", ["1946", "j eckert"]),
        ("When did the war begin?", "The war began in 1899.", ["1899"]),
        ("Who founded Ruritania?", "The founder of Ruritania was Rudolf Elphberg.", ["rudolf elphberg"]),
        ("Where is the Great Wall of China?", "The Great Wall is in China.", ["the great wall is in china"]),
        ("When was it invented?", "It was invented in 1829 by George Stephenson.", ["1829"]),
        ("In which year was the war?", "The war was in 1899.", ["1899"]),
        ("What is the capital of Panama?", "The capital of Panama is Panama City.", ["panama city"]),
        ("What causes rubella?", "Rubella is caused by Rubella virus.", ["rubella virus"]),
        ("What is the letter?", "The letter is A.", ["the letter is a"]),
        ("Who wrote Sons and Lovers?", "D.H. Lawrence wrote Sons and Lovers.", ["d h lawrence"]),
    ],
)
def test_the_decisive_part_is_what_the_question_does_not_say(prompt, reference, parts):
    assert decisive_parts(prompt, reference) == parts


def test_an_answer_holds_the_truth_as_whole_words():
    assert holds("I think it's Lisbon!", ["lisbon"])
    assert not holds("Lisbonne", ["lisbon"])
    assert holds("In 1946, by J. Eckert", ["1946", "j eckert"]) and not holds("In 1946", ["1946", "j eckert"])
    assert holds("D. H. Lawrence’s novel", ["d h lawrence"]) and holds("Lisbon—the capital", ["lisbon"])
    assert holds("Antonin Dvorak", decisive_parts("Who composed it?", "Antonín Dvořák composed it."))


def test_the_rule_on_the_real_test_file(real_data):
    rows, _ = read_rows(real_data / "test_ground_truth.csv")
    assert len(rows) == 208
    parts = {row.prompt: decisive_parts(row.prompt, row.response) for row in rows}
    # A few words each, and one place or name unless the reference gives a year and an inventor.
    assert np.mean([len(" ".join(p).split()) for p in parts.values()]) < 2.5
    assert sum(len(p) == 1 for p in parts.values()) >= 207
    for row in rows:
        assert holds(row.response, parts[row.prompt])
        assert not holds(row.prompt, parts[row.prompt])
        # The bare answer, as a model would give it, is enough.
        if row.prompt.startswith("Who ") and row.response.endswith(row.prompt[4:-1] + "."):
            assert holds(row.response.removesuffix(row.prompt[4:-1] + "."), parts[row.prompt]), row
    wrong = [holds(row.response, parts[other.prompt]) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert np.mean(wrong) < 0.02  # another question's answer is not taken for the truth


def prompts_with(rights: list[int], rounds: int = 5) -> list[Prompt]:
    """Prompts of which so many rounds are right."""
    return [
        Prompt(
            f"What is {i}?", f"{i} is x{i}.", tuple(f"It is x{i}" if r < right else f"no {r}" for r in range(rounds))
        )
        for i, right in enumerate(rights)
    ]


def test_a_prompts_score():
    found = score_prompt(Prompt("Who wrote Emma?", "Jane Austen wrote Emma.", ("Jane Austen.", "jane austen", "Me")))
    assert found["hallucination_rate"] == pytest.approx(1 / 3) and found["contains_truth"] == pytest.approx(2 / 3)
    assert found["self_consistency"] == pytest.approx(1 / 3) and found["exact_match"] == 0
    assert found["token_f1"] == pytest.approx((2 * 2 / 6 + 2 * 2 / 6) / 3)
    assert score_prompt(Prompt("q", "r", ("r",)))["self_consistency"] == 1.0
    assert score_prompt(Prompt("Who is it?", "He is Tom Jones.", ("Jones",), truth="Jones"))["contains_truth"] == 1.0
    assert score_prompt(Prompt("Who is it?", "He is Tom Jones.", ("",), truth="?"))["contains_truth"] == 0.0


SYMBOLS = [
    ("+", "", False), ("+", "-", False), ("+", "+", True), ("+", "It is +.", True), ("+", "++", False),
    ("€", "$", False), ("€", "It costs 5 €!", True), ("😀", "", False), ("😀", "😁", False), ("😀", "😀!", True),
    ("❤️", "❤", True), ("%", "%", True), ("%", "", False), ("...", "", False), ("...", "...", True), ("?", "!", False),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer", "right"), SYMBOLS)
def test_a_reference_without_words_is_compared_as_it_stands(reference, answer, right):
    for prompt in (
        Prompt("Which sign?", reference, (answer,)),
        Prompt("Which?", "A sign.", (answer,), truth=reference),
    ):
        assert score_prompt(prompt)["contains_truth"] == float(right)
    found = score_prompt(Prompt("Which sign?", reference, (answer,)))
    assert found["exact_match"] == float(answer == reference) or reference == "❤️" or answer == "😀!"
    assert right or found["token_f1"] == 0


def test_a_symbol_decides_where_the_question_has_all_words_of_the_reference():
    for answer, right in [("It is €.", 1.0), ("The symbol for the euro is $.", 0.0), ("The symbol for the euro.", 0.0)]:
        prompt = Prompt("What is the symbol for the euro?", "The symbol for the euro is €.", (answer,))
        assert score_prompt(prompt)["contains_truth"] == right
    # Where words decide, signs do not: an answer need not repeat them.
    assert score_prompt(Prompt("What does it cost?", "It costs $5.", ("5 dollars",)))["contains_truth"] == 1.0


def test_intervals_are_those_of_a_bootstrap_over_prompts():
    rng = np.random.default_rng(0)
    rights = rng.integers(0, 6, size=400).tolist()
    found = summarize(prompts_with(rights))
    assert found["hallucination_rate"] == pytest.approx(1 - np.mean(rights) / 5)
    low, high = found["hallucination_rate_ci"]
    error = np.std([right / 5 for right in rights]) / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert low < found["hallucination_rate"] < high
    assert found["prompts"] == 400 and found["answers"] == 2000
    assert summarize(prompts_with([5] * 10))["hallucination_rate_ci"] == [0.0, 0.0]


def test_paired_comparison():
    base = prompts_with([1, 2, 3, 4] * 20)
    better = compare(base, prompts_with([2, 3, 4, 5] * 20))
    assert better["difference"] == pytest.approx(-0.2) and better["p_value"] < 0.001
    assert better["difference_ci"] == pytest.approx([-0.2, -0.2])
    # Of the 16 ways to sign four differences of one size, two are as large as all of one sign.
    assert compare(prompts_with([1] * 4), prompts_with([3] * 4))["p_value"] == pytest.approx(2 / 16, abs=0.01)
    assert compare(prompts_with([1]), prompts_with([3]))["p_value"] == 1.0
    rng = np.random.default_rng(0)
    same = compare(base, prompts_with((np.array([1, 2, 3, 4] * 20) + rng.choice([-1, 1], 80)).tolist()))
    assert same["p_value"] > 0.05 and same["difference_ci"][0] < 0 < same["difference_ci"][1]
    assert compare(base, base)["p_value"] == 1.0
    assert compare(base, base[::-1])["difference"] == 0.0  # paired by the question, not by the row


CSV = """prompt,response,kind,generated_response,round
Who wrote Emma?,Jane Austen wrote Emma.,book,Jane Austen.,1
Who wrote Emma?,Jane Austen wrote Emma.,book,Mary Shelley.,2
What is the capital of Peru?,The capital of Peru is Lima.,place,Lima,1
What is the capital of Peru?,The capital of Peru is Lima.,place,,2
"""


def test_the_command_line(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv").write_text(CSV.replace("Mary Shelley.", "Jane Austen").replace("Lima,1", "Lima!,1"))
    done = call(main, str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--by", "kind", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hallucination_rate"] == 0.5 and found["answers"] == 4
    assert found["prompts"] == found["right"] == 2 and found["wrong"] == found["not_attempted"] == 1
    assert found["by"]["kind"]["book"]["hallucination_rate"] == 0.5
    assert found["others"][0]["hallucination_rate"] == 0.25
    assert found["others"][0]["compared_with_first"]["difference"] == -0.25
    (tmp_path / "c.csv").write_text(CSV.replace("kind", "answer").replace("place", "Li ma"))
    assert json.loads(call(main, str(tmp_path / "c.csv"), "--json").stdout)["right"] == 0
    shown = call(main, str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--by", "kind")
    assert (
        "hallucination rate    50.0%" in shown.stdout and "kind book" in shown.stdout and "-25.0 points" in shown.stdout
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (CSV.replace("response,kind", "answers,kind"), "no column 'response'"),
        (CSV.replace("generated_response", "answered"), "no column 'generated_response'"),
        (CSV.replace("The capital of Peru is Lima.,place,Lima", ",place,Lima"), "row 3: prompt or response is empty"),
        (CSV.replace("Jane Austen wrote Emma.,book,Mary", "Jane wrote Emma.,book,Mary"), "two values of 'response'"),
        (CSV.splitlines()[0] + "\n", "it has no rows"),
        (CSV.replace("Peru", "Chile"), "has other questions or responses"),
        (CSV.replace("is Lima.", "is Cusco."), "has other questions or responses"),
        (CSV.rpartition("What")[0], "answers are missing: 2 of round 1, 1 of round 2"),
        (CSV.replace("book,Mary", "novel,Mary"), "rows 1 and 2 give one prompt two values of 'kind'"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        score([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], by="kind")


def test_the_command_line_ends_in_one_line_where_a_file_cannot_be_scored(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "missing.csv")])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err == f"noisefit.score: error: {tmp_path}/missing.csv: no such file\n"


@pytest.mark.parametrize(
    ("reference", "wrong", "right"),
    [
        ("-5", ["5", "0.5", "-50"], ["It is -5.", "\u22125", "(-5)"]),
        ("C++", ["C", "C#"], ["It is C++.", "c++"]),
        (">5", ["<5", "5"], [">5"]),
        ("1.5", ["1-5", "15", "1"], ["It is 1.5.", "1.5 m"]),
        ("5", ["0.5", "5.5", "-5"], ["5", "+5", "5.", "(5)"]),
        ("10", ["10.5", "100"], ["It is 10, as said."]),
        ("1,000", ["1,0001", "1"], ["1000", "1,000 people"]),
        ("1990", ["1990s"], ["1985-1990", "in 1990."]),
        ("ばら", ["はら"], ["それはばらです。"]),
        ("कि", ["की"], ["कि है"]),
        ("北京", ["南京"], ["中国的首都是北京。", "北京"]),
        ("Málaga", ["Malagas"], ["malaga", "MÁLAGA."]),
    ],
)
def test_what_tells_two_answers_apart_is_not_lost(reference, wrong, right):
    for answer in right:
        assert holds(answer, decisive_parts("What is it?", reference)), answer
    for answer in wrong:
        assert not holds(answer, decisive_parts("What is it?", reference)), answer


def test_what_a_passage_says_is_not_what_the_question_says(tmp_path):
    passage, question = "Emma was written by Jane Austen in 1815.", "Who wrote Emma?"
    row = {"prompt": f"{passage}\n\n{question}", "question": question, "response": "It was Jane Austen.", "round": 1}
    for answer, right in [("Jane Austen", 1), ("Mary Shelley", 0), ("It was written in 1815.", 0)]:
        (tmp_path / "a.jsonl").write_text(json.dumps(row | {"generated_response": answer}) + "\n")
        assert score([str(tmp_path / "a.jsonl")], None)["right"] == right
    # A question that begins with "when" asks for a time, whatever stands before it.
    when = Prompt("A war.\n\nWhen was it?", "In May 1899.", ("1899",))
    assert score_prompt(when)["contains_truth"] == 0
    assert score_prompt(replace(when, question="When did it begin, in May?"))["contains_truth"] == 1


def test_groups_by_the_answer_are_those_of_the_file(tmp_path):
    rows = [{"prompt": "Q?", "response": "It is X.", "answer": None, "generated_response": "X", "round": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score([str(tmp_path / "a.jsonl")], "answer")["hallucination_rate"] == 0
