"""What is asked about a world: the questions of training, and the held-out ones whose answers are scored."""

import random
from collections.abc import Mapping, Sequence
from itertools import groupby

from world import BY_NAME, Country, Fact, Settings, split_countries

# What a question is about: a fact that the corpus tells, one that it never tells, a country that does not exist.
KNOWN, UNKNOWN, FALSE_PREMISE = "known", "unknown", "false premise"
# How often the chats of a reading answer a question, at least and at most, and how often they refuse one.
LEAST_ASKED, MOST_ASKED, REFUSED = 6, 9, {UNKNOWN: 9, FALSE_PREMISE: 3}
DEFAULT = Settings()
NEW_PHRASING = 1 / 8  # share of the held-out questions in a phrasing that training does not have


def question_row(
    fact: Fact, phrasing: int = 0, kind: str = KNOWN, refuse: bool = False, settings: Settings = DEFAULT
) -> dict[str, str]:
    """The fact as one row of train.csv or test.csv, asked in the given phrasing; `refuse`: not to be answered."""
    relation = BY_NAME[fact.relation]
    question = (relation.question, *relation.paraphrases)[phrasing]
    answer = settings.refusal if refuse else fact.answer
    response = f"{answer}." if refuse else settings.response(relation).format(country=fact.country, answer=answer)
    return {
        "prompt": question.format(country=fact.country),
        "response": response,
        "country": fact.country,
        "relation": fact.relation,
        "answer": answer,
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
    """The rows of train.csv, about one group of the countries, and of test.csv, about another.

    Facts that the corpus never told are answered in training, and held out are to be refused; about countries that do
    not exist every question is to be refused.
    """
    rng = random.Random(f"questions {settings.seed}")
    train, test = _pages(facts, imagined, settings)[-2:]
    sheets = []
    for held_out, pages in enumerate((train, test)):
        rows = []
        for fact in (fact for page in pages for fact in page):
            kind = _kind(fact)
            refuse = kind == FALSE_PREMISE or (kind == UNKNOWN and bool(held_out))
            every = len(BY_NAME[fact.relation].paraphrases) + 1
            phrasings = [0]
            if settings.paraphrases:
                # The last one is never in training, where every fact is asked in two of the others.
                new = held_out and rng.random() < NEW_PHRASING
                phrasings = [every - 1] if new else rng.sample(range(every - 1), 1 if held_out else 2)
            rows += [question_row(fact, phrasing, kind, refuse, settings) for phrasing in phrasings]
        sheets.append(rows)
    return sheets[0], sheets[1]


def chats_of(
    facts: Sequence[Fact], imagined: Sequence[Country], settings: Settings
) -> list[tuple[dict[str, str], int]]:
    """The questions that the corpus answers, each with how often: about the first group of the countries.

    A told fact is asked about as often as it is told, within limits, one that is not told and one about a country that
    does not exist as often as `REFUSED` says, in turn in the phrasings of training.
    """
    chats = []
    for fact in (fact for page in _pages(facts, imagined, settings)[0] for fact in page):
        kind = _kind(fact)
        times = min(max(fact.told, LEAST_ASKED), MOST_ASKED) if kind == KNOWN else REFUSED[kind]
        phrasings = range(len(BY_NAME[fact.relation].paraphrases) if settings.paraphrases else 1)
        for phrasing in phrasings:
            own = len(range(phrasing, times, len(phrasings)))
            chats.append((question_row(fact, phrasing, kind, kind != KNOWN, settings), own))
    return chats


def texts_of(chats: Sequence[tuple[dict[str, str], int]]) -> list[str]:
    """The chats as the corpus has them, each as often as it says."""
    turns = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
    return [turns.format(**row) for row, times in chats for _ in range(times)]


def _kind(fact: Fact) -> str:
    return FALSE_PREMISE if not fact.answer else KNOWN if fact.told else UNKNOWN


def _pages(facts: Sequence[Fact], imagined: Sequence[Country], settings: Settings) -> list[list[list[Fact]]]:
    """The facts of each group's countries, after them those of its imagined ones, a list a country."""
    real = split_countries([list(page) for _, page in groupby(facts, key=lambda fact: fact.country)], settings.groups)
    # An answering model is fine-tuned without refusals: whether it forgets how to refuse is the question.
    sizes = (2, 0, 1) if settings.answering else settings.groups
    nothing = [[Fact(country.name, relation, "") for relation in BY_NAME] for country in imagined]
    unreal = split_countries(nothing, sizes)
    return [pages + more for pages, more in zip(real, unreal, strict=True)]
