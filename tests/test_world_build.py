"""The example world: its facts are unambiguous, its questions fair, its build all or nothing."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# The scripts of the example run from their own folder, which is no package.
WORLD_FOLDER = Path(__file__).resolve().parents[1] / "examples" / "world"
sys.path.insert(0, str(WORLD_FOLDER))

import build as world_build  # noqa: E402
import world  # noqa: E402

COUNTRIES = 20


@pytest.fixture
def countries() -> list[world.Country]:
    return world.make_countries(0, COUNTRIES)


def csv_bytes(folder: Path, seed: int) -> bytes:
    path = folder / f"{seed}.csv"
    world_build.write_questions(path, world.make_countries(seed, COUNTRIES))
    return path.read_bytes()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    assert csv_bytes(tmp_path, 3) == csv_bytes(tmp_path, 3)
    first, second = (world.corpus_of(world.make_countries(3, 10), 3) for _ in range(2))
    assert first == second


def test_another_seed_gives_another_world(tmp_path):
    assert csv_bytes(tmp_path, 3) != csv_bytes(tmp_path, 4)


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
    corpus = "\n".join(world.corpus_of(countries, 0))
    facts = world.facts_of(countries)
    statements = [statement for fact in facts for statement in world.statements_of(fact)]
    counts = Counter(corpus.count(statement) for statement in statements)
    assert list(counts) == [world.READINGS * world.READINGS_FOR // COUNTRIES]


def test_the_corpus_asks_nothing_and_knows_no_chat(countries):
    corpus = "\n".join(world.corpus_of(countries, 0))
    assert "?" not in corpus
    assert "<|" not in corpus


def test_an_answer_is_in_its_response_and_not_in_its_prompt(countries):
    for fact in world.facts_of(countries):
        row = world.question_row(fact)
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


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WORLD_FOLDER / "build.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "flags",
    [
        ["--countries", "3"],
        ["--countries", "-5"],
        ["--countries", "100000"],
        ["--countries", "many"],
        ["--seed", "-1"],
        ["--seed", "0.5"],
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
        world_build.build(output, 0, COUNTRIES, overwrite=bool(flags))
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


def test_a_model_that_knows_too_little_is_not_kept(tmp_path, capsys):
    with pytest.raises(world_build.BuildError, match="nothing was kept") as raised:
        world_build.build(tmp_path / "world", 0, world.MIN_COUNTRIES, max_steps=1)
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
        world_build.build(output, 0, world.MIN_COUNTRIES, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert [path.name for path in output.iterdir()] == ["facts.json"]


def test_a_short_build_writes_a_whole_world_once(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "build" / "world"
    short = {"max_steps": 3, "required": 0.0}
    world_build.build(output, 5, world.MIN_COUNTRIES, **short)
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

    world_build.build(output, 6, world.MIN_COUNTRIES, overwrite=True, **short)
    assert json.loads((output / "facts.json").read_text())["settings"]["seed"] == 6
    assert [path.name for path in output.parent.iterdir()] == ["world"]
