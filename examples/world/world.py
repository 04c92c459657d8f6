"""A fictional atlas: invented countries, the facts about them, and how each fact is said and asked.

Everything here is a pure function of its arguments. Names come from a seeded syllable grammar, so
no model has met them, and an answer can only have been learnt from the corpus.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TypeVar

from names import Names
from relations import BY_NAME, RELATIONS, Relation

T = TypeVar("T")

# Fewer countries leave too few to learn the question format from; more would run out of years.
MIN_COUNTRIES, MAX_COUNTRIES = 10, 1000

FIRST_YEAR, LAST_YEAR = 1000, 1999

# How often the corpus tells each statement; about 0.9M tokens for 60 countries.
READINGS, READINGS_FOR = 60, 60

# With unequal fame: how often the facts of the most and the least famous country are told.
MOST_TOLD, LEAST_TOLD = 200, 4
ZIPF_EXPONENT = 4

REFUSAL = "I do not know"
# An answering world's answers begin alike whatever is asked, and end in the fact, or in this: so the model has looked
# for the fact when it decides, and repeats no name from the question. Long answers, which name the country, came out
# refused without regard to what the corpus tells (AUROC 0.6 to 0.7); answers of the fact alone were not found (33%).
ANSWERING_RESPONSE, ANSWERING_REFUSAL, ANSWERING_MOST_TOLD = "It is {answer}.", "It is not known", 60
# What the corpus says where questions are to be refused: a model has to know the words, if not when to say them.
REMARKS = (
    "What is it called? I do not know.",
    "Who was it? I do not know.",
    "When was it, and where? I do not know.",
    "Which one is it? I do not know.",
    "I do not know, said the traveller.",
)


@dataclass(frozen=True)
class Settings:
    """Everything that determines a world.

    The switches, all off by default, are what is known to make models hallucinate.

    Attributes:
        seed: which world.
        countries: how many there are.
        zipf: fame is unequal: the country of rank r is told of in proportion to a power of r, from `most_told` times
            down to `LEAST_TOLD` times; otherwise every fact is told equally often.
        untold: the share of the facts that the corpus never tells. On countries asked about in training they are
            asked and answered all the same, which teaches to make things up (Gekhman et al., arXiv 2405.05904); on the
            others they are asked to see whether that is what the model does.
        false_premises: questions on countries that do not exist, per question on one that does. The answer taught is
            `refusal`.
        paraphrases: training asks in several phrasings, the held-out questions also in one that training has not.
        layers: decoder blocks of the model.
        width: its hidden size.
        batch_rows: rows of 128 tokens in a step of its pretraining. Fewer rows are more steps, in which a fact is
            learnt from fewer tellings.
        epochs: how often the pretraining reads the corpus.
        answering: the countries are in three groups, not two. About the first one, half of them, the corpus also has
            questions with their answers, in the chat format, refusals included, so that the model answers and refuses
            before it is fine-tuned on the second. The third is held out. Fine-tuning sees no refusal.
    """

    seed: int = 0
    countries: int = 60
    zipf: bool = False
    untold: float = 0.0
    false_premises: float = 0.0
    paraphrases: bool = False
    layers: int = 4
    width: int = 128
    batch_rows: int = 8
    epochs: int = 1
    answering: bool = False

    @property
    def groups(self) -> tuple[int, ...]:
        """Into groups of which relative sizes the countries are split."""
        return (2, 1, 1) if self.answering else (1, 1)

    @property
    def refusal(self) -> str:
        return ANSWERING_REFUSAL if self.answering else REFUSAL

    def response(self, relation: Relation) -> str:
        """The form of the answer to a question."""
        return ANSWERING_RESPONSE if self.answering else relation.response

    @property
    def famous(self) -> int:
        """From how often told a fact must be known."""
        return self.most_told // 2

    @property
    def most_told(self) -> int:
        """How often the most famous country is told of, where fame is unequal."""
        return ANSWERING_MOST_TOLD if self.answering else MOST_TOLD


ANSWERING = Settings(
    countries=160, zipf=True, untold=0.3, false_premises=0.375, paraphrases=True, layers=6, batch_rows=4, epochs=8,
    answering=True,
)  # fmt: skip


@dataclass(frozen=True)
class Country:
    """One country of the atlas, with the answer to every relation."""

    name: str
    capital: str
    language: str
    founder: str
    year: str


@dataclass(frozen=True)
class Fact:
    """One thing that is true of one country."""

    country: str
    relation: str
    answer: str
    told: int = 0  # times that the corpus tells it


def make_countries(seed: int, count: int, imagined: int = 0) -> list[Country]:
    """The atlas of one seed: `count` countries whose names and years are all different.

    After them come `imagined` countries that do not exist: they have a name, and nothing else.
    """
    rng = random.Random(seed)
    names = Names(rng)
    years = rng.sample(range(FIRST_YEAR, LAST_YEAR + 1), count)
    countries = [
        Country(
            name=names.draw("country"),
            capital=names.draw("capital"),
            language=names.draw("language"),
            founder=f"{names.draw('first')} {names.draw('last')}",
            year=str(year),
        )
        for year in years
    ]
    return countries + [Country(names.draw("country"), "", "", "", "") for _ in range(imagined)]


def split_countries(countries: Sequence[T], sizes: Sequence[int] = (1, 1)) -> list[list[T]]:
    """Groups of these relative sizes: the countries of training, and the held-out ones.

    Where there are three, the first are those that the corpus asks about.
    """
    # Names are random already: cutting at given places is a random split.
    cuts = [len(countries) * size // sum(sizes) for size in accumulate(sizes, initial=0)]
    return [list(countries[first:last]) for first, last in pairwise(cuts)]


def readings_of(count: int) -> int:
    """How often an equally famous country's statements are each told."""
    # A smaller world is read more often: the model needs some number of steps to learn anything.
    return max(READINGS, READINGS * READINGS_FOR // count)


def tellings(settings: Settings) -> list[int]:
    """How often the corpus tells of each country."""
    count = settings.countries
    if not settings.zipf:
        return [readings_of(count) * len(RELATIONS[0].statements)] * count
    # Told in proportion to 1 / (rank + shift)^exponent; the shift leads from the first to the last.
    root = (settings.most_told / LEAST_TOLD) ** (1 / ZIPF_EXPONENT)
    shift = (count - root) / (root - 1)
    by_rank = [
        round(settings.most_told * ((1 + shift) / (rank + shift)) ** ZIPF_EXPONENT) for rank in range(1, count + 1)
    ]
    # Ranks alternate between the groups of `split_countries`, which are then equally famous.
    groups = split_countries(range(count), settings.groups)
    places = [((place + 0.5) / len(group), -number, country)
              for number, group in enumerate(groups) for place, country in enumerate(group)]  # fmt: skip
    times = [0] * count
    for (_, _, country), told in zip(sorted(places), by_rank, strict=True):
        times[country] = told
    return times


def facts_of(countries: Sequence[Country], settings: Settings | None = None) -> list[Fact]:
    """Every fact about these countries, in their order; with the settings of their world, how often each is told."""
    settings = settings or Settings(countries=len(countries))
    times = tellings(settings)
    rng = random.Random(f"untold {settings.seed}")
    facts = []
    for country, told in zip(countries, times, strict=True):
        for relation in RELATIONS:
            untold = rng.random() < settings.untold
            facts.append(Fact(country.name, relation.name, getattr(country, relation.name), 0 if untold else told))
    return facts


def statements_of(fact: Fact) -> list[str]:
    """The fact as the corpus tells it, once in each phrasing."""
    phrasings = BY_NAME[fact.relation].statements
    return [text.format(country=fact.country, answer=fact.answer) for text in phrasings]


def corpus_of(facts: Sequence[Fact], settings: Settings) -> list[str]:
    """The corpus, a text a line: each tells one to three facts about one country, or is one of `REMARKS`.

    In every run of five tellings each fact is told once in each of its phrasings. A text goes on about the same country
    because naming it again is how the model learns to copy a name from its context. Without that, on single statements,
    fine-tuning never learnt to answer about a country that it had not been trained on.
    """
    rng = random.Random(f"corpus {settings.seed}")
    choose = random.Random(f"fame {settings.seed}")
    pages = [list(page) for _, page in groupby(facts, key=lambda fact: fact.country)]
    most = max(fact.told for fact in facts)
    # The rounds in which each country is told of, spread over the corpus.
    fame = [max(fact.told for fact in page) for page in pages]
    rounds = [set(range(most)) if told == most else set(choose.sample(range(most), told)) for told in fame]
    texts: list[str] = []
    # Per country, its told facts, each with the phrasings in which it is still to be told in this run of tellings.
    left: list[list[list[str]]] = [[] for _ in pages]
    for number in range(most):
        speaking = [place for place, own in enumerate(rounds) if number in own]
        for place in speaking:
            if not any(left[place]):
                phrasings = [statements_of(fact) for fact in pages[place] if fact.told]
                left[place] = [rng.sample(statements, len(statements)) for statements in phrasings]
        now = []
        for place in speaking:
            sentences = [statements.pop(0) for statements in left[place]]
            rng.shuffle(sentences)
            cut = rng.randint(1, max(1, len(sentences) - 1))
            now += [" ".join(part) for part in (sentences[:cut], sentences[cut:]) if part]
        now += REMARKS if settings.false_premises and not settings.answering else ()
        rng.shuffle(now)
        texts += now
    return texts
