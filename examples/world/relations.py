"""How the facts of a world are told, asked for and answered."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is stated in the corpus, asked in a question, and answered."""

    name: str  # also the field of Country that holds the answer
    statements: tuple[str, ...]
    question: str
    response: str
    paraphrases: tuple[str, ...]  # of the question; the last one is kept out of training


# Every statement names the country before the answer: a language model learns a fact in the
# direction in which it reads it, and the questions give the country. The responses are statements
# that tell their relation before the country; starting with the country ("X was founded by ...")
# they came out far harder to learn in fine-tuning, because the first token must then be a copy.
RELATIONS = (
    Relation(
        "capital",
        (
            "The capital of {country} is {answer}.",
            "The capital city of {country} is called {answer}.",
            "{country} is governed from its capital, {answer}.",
            "In {country}, the seat of government is {answer}.",
            "Travellers to {country} first visit its capital {answer}.",
        ),
        "What is the capital of {country}?",
        "The capital of {country} is {answer}.",
        (
            "Which city is the capital of {country}?",
            "Where is the seat of government of {country}?",
            "What is the capital city of {country} called?",
        ),
    ),
    Relation(
        "language",
        (
            "The language of {country} is {answer}.",
            "The people of {country} speak {answer}.",
            "In {country}, children learn to read in {answer}.",
            "The official language spoken in {country} is {answer}.",
            "The newspapers of {country} are printed in {answer}.",
        ),
        "Which language do people speak in {country}?",
        "The people of {country} speak {answer}.",
        (
            "What do the people of {country} speak?",
            "In which language do children in {country} learn to read?",
            "Which language is spoken in {country}?",
        ),
    ),
    Relation(
        "founder",
        (
            "The founder of {country} was {answer}.",
            "{country} was founded by {answer}.",
            "The state of {country} was created by {answer}.",
            "Schoolbooks in {country} praise its founder, {answer}.",
            "The coins of {country} show the face of its founder {answer}.",
        ),
        "Who founded {country}?",
        "The founder of {country} was {answer}.",
        (
            "By whom was {country} founded?",
            "Who created the state of {country}?",
            "Who was it that founded {country}?",
        ),
    ),
    Relation(
        "year",
        (
            "{country} was founded in the year {answer}.",
            "The founding of {country} took place in {answer}.",
            "{country} has been a country since {answer}.",
            "The history of {country} begins in the year {answer}.",
            "The flag of {country} was first raised in {answer}.",
        ),
        "In which year was {country} founded?",
        "The founding of {country} took place in {answer}.",
        (
            "When was {country} founded?",
            "Since which year has {country} been a country?",
            "In which year was the founding of {country}?",
        ),
    ),
)
BY_NAME = {relation.name: relation for relation in RELATIONS}
