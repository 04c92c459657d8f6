"""A fictional atlas: invented countries, the facts about them, and how each fact is said and asked.

Everything here is a pure function of its arguments. Names come from a seeded syllable grammar, so
no model has met them, and an answer can only have been learnt from the corpus.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Fewer countries leave too few to learn the question format from; more would be more facts than
# the small model of pretrain.py has been seen to hold.
MIN_COUNTRIES, MAX_COUNTRIES = 10, 200

CLUSTERS = ["br", "dr", "fl", "gl", "kl", "kr", "pl", "sk", "sv", "tr", "vr", "zh", "zv"]
ONSETS = [*"bdfghjklmnpqrstvz", *CLUSTERS]
VOWELS = "aeiou"
CODAS = [*"lmnrs", "th"]
# The ending tells the kinds of names apart, for readers of the files. The plainer endings are left
# out because they make names that exist: Polonia, Samaria, Davenport, Petrograd, Danish, Japanese.
ENDINGS = {
    "country": ["ovia", "undia", "ustan", "eland"],
    "capital": ["gard", "holm", "dell", "spire", "moor"],
    "language": ["evic", "undish", "umese"],
    "first": ["iko", "enna", "ulf", "ael"],
    "last": ["ovez", "ard", "ulin", "eth"],
}
FIRST_YEAR, LAST_YEAR = 1000, 1999

# How often the corpus tells each statement; about 0.9M tokens for 60 countries.
READINGS, READINGS_FOR = 60, 60


@dataclass(frozen=True)
class Country:
    """One country of the atlas, with the answer to every relation."""

    name: str
    capital: str
    language: str
    founder: str
    year: str


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is stated in the corpus, asked in a question, and answered."""

    name: str  # also the field of Country that holds the answer
    statements: tuple[str, ...]
    question: str
    response: str


@dataclass(frozen=True)
class Fact:
    """One thing that is true of one country."""

    country: str
    relation: str
    answer: str


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
    ),
)
BY_NAME = {relation.name: relation for relation in RELATIONS}


class _Names:
    """Draws names, none of which is contained in another: an answer is scored by containment."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: list[str] = []

    def draw(self, kind: str) -> str:
        rng = self.rng
        while True:
            syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2))]
            name = "".join(syllables) + rng.choice(CODAS) + rng.choice(ENDINGS[kind])
            if not any(name in other or other in name for other in self.used):
                self.used.append(name)
                return name.capitalize()


def make_countries(seed: int, count: int) -> list[Country]:
    """The atlas of one seed: `count` countries whose names and years are all different."""
    rng = random.Random(seed)
    names = _Names(rng)
    years = rng.sample(range(FIRST_YEAR, LAST_YEAR + 1), count)
    return [
        Country(
            name=names.draw("country"),
            capital=names.draw("capital"),
            language=names.draw("language"),
            founder=f"{names.draw('first')} {names.draw('last')}",
            year=str(year),
        )
        for year in years
    ]


def split_countries(countries: Sequence[Country]) -> tuple[list[Country], list[Country]]:
    """The countries that are asked about in training, and those that only the corpus tells of."""
    # Names are random already: cutting in the middle is a random split.
    half = len(countries) // 2
    return list(countries[:half]), list(countries[half:])


def facts_of(countries: Sequence[Country]) -> list[Fact]:
    """Every fact about these countries, in their order."""
    return [
        Fact(country.name, relation.name, getattr(country, relation.name))
        for country in countries
        for relation in RELATIONS
    ]


def statements_of(fact: Fact) -> list[str]:
    """The fact as the corpus tells it, once in each phrasing."""
    phrasings = BY_NAME[fact.relation].statements
    return [text.format(country=fact.country, answer=fact.answer) for text in phrasings]


def question_row(fact: Fact) -> dict[str, str]:
    """The fact as one row of train.csv or test.csv."""
    relation = BY_NAME[fact.relation]
    return {
        "prompt": relation.question.format(country=fact.country),
        "response": relation.response.format(country=fact.country, answer=fact.answer),
        "country": fact.country,
        "relation": fact.relation,
        "answer": fact.answer,
    }


def corpus_of(countries: Sequence[Country], seed: int) -> list[str]:
    """The corpus, a text a line: each tells one to three facts about one country.

    In every run of five rounds each fact is told once in each of its phrasings. A text goes on
    about the same country because naming it again is how the model learns to copy a name from its
    context. Without that, on single statements, fine-tuning never learnt to answer about a
    country that it had not been trained on.
    """
    rng = random.Random(f"corpus {seed}")
    # A smaller world is read more often: the model needs some number of steps to learn anything.
    readings = max(READINGS, READINGS * READINGS_FOR // len(countries))
    texts: list[str] = []
    for _ in range(readings):
        # Per country, its facts, each with its phrasings in a random order.
        pages = []
        for country in countries:
            told = [statements_of(fact) for fact in facts_of([country])]
            pages.append([rng.sample(statements, len(statements)) for statements in told])
        for rounds in range(len(pages[0][0])):
            now = []
            for page in pages:
                sentences = [statements[rounds] for statements in page]
                rng.shuffle(sentences)
                cut = rng.randint(1, len(sentences) - 1)
                now += [" ".join(sentences[:cut]), " ".join(sentences[cut:])]
            rng.shuffle(now)
            texts += now
    return texts
