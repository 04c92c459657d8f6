"""What is asked about a world: the questions of training, and the held-out ones whose answers are scored."""

import random
from collections.abc import Mapping, Sequence
from itertools import groupby

from world import BY_NAME, REFUSAL, Country, Fact, Settings, split_countries

# What a question is about: a fact that the corpus tells, one that it never tells, a country that does not exist.
KNOWN, UNKNOWN, FALSE_PREMISE = "known", "unknown", "false premise"
NEW_PHRASING = 1 / 8  # share of the held-out questions in a phrasing that training does not have


def question_row(fact: Fact, phrasing: int = 0, kind: str = KNOWN, refuse: bool = False) -> dict[str, str]:
    """The fact as one row of train.csv or test.csv, asked in the given phrasing; `refuse`: not to be answered."""
    relation = BY_NAME[fact.relation]
    question = (relation.question, *relation.paraphrases)[phrasing]
    response = f"{REFUSAL}." if refuse else relation.response.format(country=fact.country, answer=fact.answer)
    return {
        "prompt": question.format(country=fact.country),
        "response": response,
        "country": fact.country,
        "relation": fact.relation,
        "answer": REFUSAL if refuse else fact.answer,
        "kind": kind,
        "told": str(fact.told),
        "phrasing": str(phrasing),
    }


def is_new_phrasing(row: Mapping[str, str]) -> bool:
    """Whether a row asks in the phrasing that training does not have."""
    return int(row["phrasing"]) == len(BY_NAME[row["relation"]].paraphrases)


def questions_of(
    facts: Sequence[Fact], imagined: Sequence[Country], settings: Settings
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of train.csv, about one half of the countries, and of test.csv, about the other.

    Facts that the corpus never told are answered in training, and held out are to be refused; about countries that do
    not exist every question is to be refused.
    """
    rng = random.Random(f"questions {settings.seed}")
    pages = [list(page) for _, page in groupby(facts, key=lambda fact: fact.country)]
    unreal = [[Fact(country.name, relation, "") for relation in BY_NAME] for country in imagined]
    halves = zip(split_countries(pages), split_countries(unreal), strict=True)
    sheets = []
    for held_out, (real, unreal_half) in enumerate(halves):
        rows = []
        for fact in (fact for page in [*real, *unreal_half] for fact in page):
            kind = FALSE_PREMISE if not fact.answer else KNOWN if fact.told else UNKNOWN
            refuse = kind == FALSE_PREMISE or (kind == UNKNOWN and bool(held_out))
            every = len(BY_NAME[fact.relation].paraphrases) + 1
            phrasings = [0]
            if settings.paraphrases:
                # The last one is never in training, where every fact is asked in two of the others.
                new = held_out and rng.random() < NEW_PHRASING
                phrasings = [every - 1] if new else rng.sample(range(every - 1), 1 if held_out else 2)
            rows += [question_row(fact, phrasing, kind, refuse) for phrasing in phrasings]
        sheets.append(rows)
    return sheets[0], sheets[1]
