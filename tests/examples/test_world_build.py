"""The example world: its facts are unambiguous, its questions fair, its build all or nothing."""

import csv
import hashlib
import json
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from running import call

# The scripts of the example run from their own folder, which is no package.
WORLD_FOLDER = Path(__file__).resolve().parents[2] / "examples" / "world"
sys.path.insert(0, str(WORLD_FOLDER))

import questions  # noqa: E402

import build as world_build  # noqa: E402
import pretrain  # noqa: E402
import world  # noqa: E402
from noisefit.inputs.templates import set_chat_template  # noqa: E402
from world import Settings  # noqa: E402

pytestmark = pytest.mark.slow

COUNTRIES = 20
HARD = Settings(seed=2, countries=60, zipf=True, untold=0.2, false_premises=0.2, paraphrases=True)


@pytest.fixture
def countries() -> list[world.Country]:
    return world.make_countries(0, COUNTRIES)


def of(settings: Settings) -> tuple[list[world.Fact], list[dict[str, str]], list[dict[str, str]]]:
    """The facts of a world, its training questions and the held-out ones."""
    imagined = round(settings.false_premises * settings.countries)
    atlas = world.make_countries(settings.seed, settings.countries, imagined)
    facts = world.facts_of(atlas[: settings.countries], settings)
    return facts, *questions.questions_of(facts, atlas[settings.countries :], settings)


def written(folder: Path, settings: Settings) -> bytes:
    _, train, test = of(settings)
    path = folder / "questions.csv"
    world_build.write_questions(path, train + test)
    return path.read_bytes()


@pytest.mark.parametrize("settings", [Settings(countries=COUNTRIES), HARD])
def test_the_same_seed_gives_the_same_bytes(tmp_path, settings):
    assert written(tmp_path, settings) == written(tmp_path, settings)
    first, second = (world.corpus_of(of(settings)[0], settings) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("settings", [Settings(countries=COUNTRIES), HARD])
def test_another_seed_gives_another_world(tmp_path, settings):
    other = replace(settings, seed=settings.seed + 1)
    assert written(tmp_path, settings) != written(tmp_path, other)


@pytest.mark.parametrize("count", [world.MIN_COUNTRIES, 11, world.MAX_COUNTRIES])
def test_every_country_is_in_exactly_one_half(count):
    countries = world.make_countries(1, count)
    train, test = world.split_countries(countries)
    assert train + test == countries
    assert not {country.name for country in train} & {country.name for country in test}
    assert abs(len(train) - len(test)) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_no_name_is_contained_in_another(seed):
    names: list[str] = []
    for country in world.make_countries(seed, world.MAX_COUNTRIES):
        names += [country.name, country.capital, country.language, country.year]
        names += country.founder.split()
    names = [name.lower() for name in names]
    assert len(set(names)) == len(names)
    # A name in the joined text more than once is contained in some other name.
    joined = "\n".join(names)
    assert [name for name in names if joined.count(name) > 1] == []


def test_every_fact_is_told_equally_often_in_every_phrasing(countries):
    facts = world.facts_of(countries)
    corpus = "\n".join(world.corpus_of(facts, Settings(countries=COUNTRIES)))
    statements = [statement for fact in facts for statement in world.statements_of(fact)]
    counts = Counter(corpus.count(statement) for statement in statements)
    assert list(counts) == [world.READINGS * world.READINGS_FOR // COUNTRIES]


def test_the_corpus_asks_nothing_and_knows_no_chat(countries):
    corpus = "\n".join(world.corpus_of(world.facts_of(countries), Settings(countries=COUNTRIES)))
    assert "?" not in corpus
    assert "<|" not in corpus


def test_an_answer_is_in_its_response_and_not_in_its_prompt(countries):
    for fact in world.facts_of(countries):
        row = questions.question_row(fact)
        assert row["answer"] in row["response"]
        assert row["answer"] not in row["prompt"]
        assert row["country"] in row["prompt"]
        assert row["prompt"].endswith("?")


def test_every_statement_ends_in_its_answer(countries):
    # What "the model completes the statement" means rests on this.
    for fact in world.facts_of(countries):
        statements = world.statements_of(fact)
        assert len(set(statements)) == len(statements) == 5
        assert all(statement.endswith(f"{fact.answer}.") for statement in statements)
        assert all(statement.count(fact.answer) == 1 for statement in statements)


# --- What makes models hallucinate, each a switch --------------------------------------------------------------------


def test_fame_falls_from_200_to_4_and_is_the_same_in_both_halves():
    times = world.tellings(replace(HARD, untold=0))
    assert max(times) == world.MOST_TOLD and min(times) == world.LEAST_TOLD
    train, test = (sorted(half) for half in world.split_countries(times))
    assert train[-1] != test[-1] and abs(sum(train) - sum(test)) < 0.1 * sum(times)
    gaps = [a - b for a, b in zip(sorted(times, reverse=True), sorted(times, reverse=True)[1:], strict=False)]
    assert gaps[0] > gaps[len(gaps) // 2] >= gaps[-1] >= 0  # steep at the top, a long tail


@pytest.mark.parametrize("settings", [HARD, Settings(countries=11, zipf=True)])
def test_the_corpus_tells_every_fact_as_often_as_it_says(settings):
    facts = of(settings)[0]
    corpus = "\n".join(world.corpus_of(facts, settings))
    for fact in facts:
        counts = [corpus.count(statement) for statement in world.statements_of(fact)]
        assert sum(counts) == fact.told
        assert max(counts) - min(counts) <= 1  # its phrasings in turn


def test_the_share_of_untold_facts_is_that_of_the_settings():
    facts = of(replace(HARD, countries=500))[0]
    assert 0.17 < sum(fact.told == 0 for fact in facts) / len(facts) < 0.23


def test_untold_facts_are_answered_in_training_and_refused_held_out():
    facts, train, test = of(HARD)
    truth = {(fact.country, fact.relation): fact for fact in facts}
    for rows, refused in ((train, False), (test, True)):
        unknown = [row for row in rows if row["kind"] == questions.UNKNOWN]
        assert unknown
        for row in unknown:
            assert truth[row["country"], row["relation"]].told == 0
            expected = world.REFUSAL if refused else truth[row["country"], row["relation"]].answer
            assert row["answer"] == expected and expected in row["response"]
    known = [row for row in train + test if row["kind"] == questions.KNOWN]
    assert all(truth[row["country"], row["relation"]].answer == row["answer"] for row in known)


def test_false_premises_name_countries_that_nothing_else_names():
    facts, train, test = of(HARD)
    corpus = "\n".join(world.corpus_of(facts, HARD))
    for rows in (train, test):
        false = [row for row in rows if row["kind"] == questions.FALSE_PREMISE]
        asked = {(row["country"], row["relation"]) for row in false}
        assert len(asked) == 0.2 * HARD.countries / 2 * len(world.RELATIONS)
        assert all(row["response"] == "I do not know." and row["country"] not in corpus for row in false)
    assert not {row["country"] for row in train} & {row["country"] for row in test}


def test_one_phrasing_is_kept_out_of_training_and_no_question_is_asked_twice():
    _, train, test = of(HARD)
    assert {row["phrasing"] for row in train} == {"0", "1", "2"}
    assert {row["phrasing"] for row in test} == {"0", "1", "2", "3"}
    asked = [row["prompt"] for row in train + test]
    assert len(set(asked)) == len(asked)
    assert {row["phrasing"] for rows in of(replace(HARD, paraphrases=False))[1:] for row in rows} == {"0"}


ANSWERING = replace(HARD, countries=40, untold=0.3, false_premises=0.5, answering=True)


def chats_and_sheets(settings: Settings) -> list[list[dict[str, str]]]:
    """The rows of chats.csv, train.csv and test.csv."""
    atlas = world.make_countries(settings.seed, settings.countries, round(settings.false_premises * settings.countries))
    chats = questions.chats_of(of(settings)[0], atlas[settings.countries :], settings)
    return [[row | {"times": str(times)} for row, times in chats], *of(settings)[1:]]


def test_the_corpus_of_an_answering_world_asks_about_countries_of_its_own():
    sheets = chats_and_sheets(ANSWERING)
    countries = [{row["country"] for row in rows} for rows in sheets]
    assert not countries[0] & countries[1] and not countries[0] & countries[2] and not countries[1] & countries[2]
    real = [{row["country"] for row in rows if row["kind"] != questions.FALSE_PREMISE} for rows in sheets]
    assert [len(group) for group in real] == [20, 10, 10]
    fame = [sorted(int(row["told"]) for row in rows if row["kind"] == questions.KNOWN) for rows in sheets]
    assert all(0.5 < statistics.mean(times) / statistics.mean(fame[0]) < 2 for times in fame)


def test_an_answering_world_refuses_in_its_corpus_and_held_out_and_never_in_training():
    chats, train, test = chats_and_sheets(ANSWERING)
    for rows in (chats, test):
        assert {row["kind"] for row in rows} == {questions.KNOWN, questions.UNKNOWN, questions.FALSE_PREMISE}
        assert all((row["answer"] == ANSWERING.refusal) == (row["kind"] != questions.KNOWN) for row in rows)
    assert {row["kind"] for row in train} == {questions.KNOWN, questions.UNKNOWN}
    assert all(row["answer"] != ANSWERING.refusal for row in train)


def test_the_chats_are_in_the_corpus_as_training_and_generation_write_them():
    settings = replace(ANSWERING, seed=4)
    atlas = world.make_countries(settings.seed, settings.countries, 20)
    chats = questions.chats_of(of(settings)[0], atlas[settings.countries :], settings)
    texts = questions.texts_of(chats)
    counts = Counter(texts)
    assert sum(counts.values()) == sum(times for _, times in chats)
    tokenizer = pretrain.train_tokenizer(texts)
    set_chat_template(tokenizer)
    for row, times in chats[::7]:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        assert counts[tokenizer.apply_chat_template(messages, tokenize=False).removeprefix("<s>")] == times
    of_one = [times for row, times in chats if row["country"] == chats[0][0]["country"] and row["relation"] == "year"]
    assert len(of_one) == 3 and max(of_one) - min(of_one) <= 1


def test_the_corpus_of_a_world_without_switches_is_what_it_was():
    # The figures of the README are of this world.
    text = "\n".join(world.corpus_of(world.facts_of(world.make_countries(0, 60)), Settings())) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest().startswith("f4e2e826b91e3f21")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return call(world_build.main, *arguments)


@pytest.mark.parametrize(
    "flags",
    [
        ["--countries", "3"],
        ["--countries", "-5"],
        ["--countries", "100000"],
        ["--countries", "many"],
        ["--seed", "-1"],
        ["--seed", "0.5"],
        ["--untold", "1.5"],
        ["--false_premises", "nan"],
        ["--layers", "0"],
        ["--nonsense"],
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(tmp_path, flags):
    result = run("--output", tmp_path / "world", *flags)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert flags[-1] in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("facts", [None, "{}", "not json", '{"settings": []}'])
def test_a_folder_that_is_no_world_is_left_alone(tmp_path, flags, facts):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.txt").write_text("years of work")
    if facts is not None:
        (output / "facts.json").write_text(facts)
    before = sorted(output.iterdir())
    with pytest.raises(world_build.BuildError) as raised:
        world_build.build(output, Settings(countries=COUNTRIES), overwrite=bool(flags))
    assert raised.value.status == 2
    assert sorted(output.iterdir()) == before
    assert list(tmp_path.iterdir()) == [output]


def test_a_refusal_is_one_line_on_the_command_line(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "world", tmp_path):
        result = run("--output", output, "--overwrite")
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("untold", "said"), [(1.0, "tells no fact at all"), (0.9, "shorter than a step")])
def test_a_corpus_that_tells_too_little_is_one_line_and_nothing_is_kept(tmp_path, untold, said):
    settings = ["--countries", 10, "--zipf", "--untold", untold, "--seed", 4]
    result = run("--output", tmp_path / "world", *settings)
    assert result.returncode == 2 and said in result.stderr
    assert len(result.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_model_that_knows_too_little_is_not_kept(tmp_path, capsys):
    with pytest.raises(world_build.BuildError, match="nothing was kept") as raised:
        world_build.build(tmp_path / "world", Settings(countries=world.MIN_COUNTRIES), max_steps=1)
    assert raised.value.status == 1
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_dies_leaves_the_old_world(tmp_path, monkeypatch):
    output = tmp_path / "world"
    output.mkdir()
    (output / "facts.json").write_text('{"settings": {"seed": 0, "countries": 10}}')

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(world_build, "fill", die)
    with pytest.raises(KeyboardInterrupt):
        world_build.build(output, Settings(countries=world.MIN_COUNTRIES), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert [path.name for path in output.iterdir()] == ["facts.json"]


def test_a_short_build_writes_a_whole_world_once(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "build" / "world"
    short = {"max_steps": 3, "required": 0.0}
    world_build.build(output, Settings(5, world.MIN_COUNTRIES), **short)
    assert sorted(path.name for path in output.iterdir()) == [
        "corpus.txt",
        "facts.json",
        "model",
        "test.csv",
        "train.csv",
    ]
    assert [path.name for path in output.parent.iterdir()] == ["world"]

    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert tokenizer.chat_template is None
    for name in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        assert getattr(model.generation_config, f"{name}_token_id") == token_id
    # The chat markers are one token each, text survives the round trip, and begins with `<s>`.
    text = "<|im_start|>user\nIn which year, 1789?<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == "<s>" + text
    assert len(tokenizer("<|im_start|><|im_end|></s><pad>")["input_ids"]) == 5

    facts = json.loads((output / "facts.json").read_text())
    with (output / "test.csv").open(newline="") as file:
        asked = [row["answer"] for row in csv.DictReader(file)]
    assert asked == [fact["answer"] for fact in facts["facts"] if fact["split"] == "test"]

    stamp = (output / "facts.json").stat().st_mtime_ns
    capsys.readouterr()
    assert world_build.main(["--output", str(output), "--seed", "6"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and "seed 5" in said
    assert (output / "facts.json").stat().st_mtime_ns == stamp

    world_build.build(output, Settings(6, world.MIN_COUNTRIES), overwrite=True, **short)
    assert json.loads((output / "facts.json").read_text())["settings"]["seed"] == 6
    assert [path.name for path in output.parent.iterdir()] == ["world"]
