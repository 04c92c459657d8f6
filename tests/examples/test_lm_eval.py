"""The standard benchmarks' program loads our adapter as it is and scores it as we do. It is an optional install."""

import importlib.util
import json
import os
from types import ModuleType

import pytest
import yaml
from running import ROOT, launch, python, words

pytestmark = pytest.mark.slow

WORLD = ROOT / "build" / "world"
TASKS = ROOT / "examples" / "world" / "harness"

ROWS = [
    f"What is the capital of {country}?,The capital of {country} is {answer}.,{country},capital,{answer},{kind}"
    for country, answer, kind in [
        *((f"Land{i}", f"Town{i}", "known") for i in range(5)),
        ("Nowhere", "I do not know", "false premise"),
    ]
]


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    """The tasks' own module, loaded as the harness does it: from its file."""
    spec = importlib.util.spec_from_file_location("harness_utils", TASKS / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_world(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "test.csv").write_text("\n".join(["prompt,response,country,relation,answer,kind", *ROWS]) + "\n")
    return folder


class Loader(yaml.SafeLoader):
    """Reads `!function utils.name` as that text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("name", ["noisefit_world", "noisefit_world_mc"])
def test_task_files_name_what_exists(name, utils, small_world):
    task = yaml.load((TASKS / f"{name}.yaml").read_text(), Loader)
    assert task["task"] == name
    used = [value.removeprefix("utils.") for value in task.values() if str(value).startswith("utils.")]
    assert used and all(callable(getattr(utils, function)) for function in used)
    split = getattr(utils, task["custom_dataset"].removeprefix("utils."))(world=small_world)[task["test_split"]]
    asked = {task[key] for key in ("doc_to_text", "doc_to_target", "doc_to_choice") if key in task}
    assert asked <= set(split.column_names)
    if "process_results" in task:
        assert {metric["metric"] for metric in task["metric_list"]} == set(utils.process_results(split[0], [""]))


@pytest.mark.parametrize(
    "answer, contains_truth, exact_match",
    [
        ("The capital of Land1 is Town1.", 1, 1),
        ("the capital of land1 is town1", 1, 1),
        ("It is called Town1, I think.", 1, 0),
        ("The capital of Land1 is Town2.", 0, 0),
        ("The capital of Land1 is Town11.", 0, 0),
        ("", 0, 0),
    ],
)
def test_an_answer_counts_if_it_holds_the_truth(utils, small_world, answer, contains_truth, exact_match):
    question = utils.held_out_questions(world=small_world)["test"][1]
    scores = utils.process_results(question, [answer])
    assert scores == {"contains_truth": contains_truth, "exact_match": exact_match}


def test_choices_are_the_truth_and_three_answers_of_other_countries(utils, small_world):
    questions = utils.choice_questions(world=small_world, pretrained="model", version=1.0)["test"]
    assert [row["country"] for row in questions] == [f"Land{i}" for i in range(5)]  # none that is to be refused
    for row in questions:
        assert row["choices"][row["gold"]] == row["response"]
        assert len(set(row["choices"])) == 4
        assert all(choice.startswith(f"The capital of {row['country']} is Town") for choice in row["choices"])
    assert questions.to_list() == utils.choice_questions(world=small_world)["test"].to_list()


def test_the_world_is_the_one_asked_for(utils, small_world, tmp_path, monkeypatch):
    monkeypatch.setenv("NOISEFIT_WORLD", str(small_world))
    assert len(utils.held_out_questions()["test"]) == len(ROWS)
    with pytest.raises(utils.InputError, match="elsewhere: no world there"):
        utils.held_out_questions(world=str(tmp_path / "elsewhere"))
    (small_world / "test.csv").write_text("\n".join(["prompt,response,country,relation,answer,kind", *ROWS[:3]]) + "\n")
    with pytest.raises(utils.InputError, match="has 2 wrong answers to choose from, not 3"):
        utils.choice_questions()
    monkeypatch.delenv("NOISEFIT_WORLD")
    assert utils.DEFAULT_WORLD == WORLD


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is an optional install")
@pytest.mark.skipif(not WORLD.is_dir(), reason="no world; `make test` builds it")
def test_lm_evaluation_harness_agrees_with_our_scores_on_base_and_adapters(tmp_path):
    for epochs in (3, 20):  # the first has only begun to learn, so its score is neither 0 nor 1
        trained = launch(
            "train_loop.py",
            *words(model=WORLD / "model", train_data=WORLD / "train.csv", output_model=tmp_path / f"after{epochs}"),
            *words(learning_rate=3e-3, epochs=epochs),
        )
        assert trained.returncode == 0, trained.stderr
    base = f"pretrained={WORLD}/model"
    models = {
        "base": (f"{base},tokenizer={tmp_path}/after20", words(model_id=WORLD / "model")),
        **{
            name: (f"{base},peft={tmp_path}/{name},tokenizer={tmp_path}/{name}", words(model_path=tmp_path / name))
            for name in ("after3", "after20")
        },
    }
    truth, choice = {}, {}
    for name, (theirs, ours) in models.items():
        done = python(
            *("-m", "lm_eval", "--model", "hf", "--model_args", theirs, "--apply_chat_template"),
            *("--include_path", str(TASKS), "--tasks", "noisefit_world,noisefit_world_mc"),
            *("--batch_size", "32", "--device", "cpu", "--output_path", str(tmp_path / f"{name}-results")),
            PYTHONPATH=os.environ.get("PYTHONPATH", ""),
            NOISEFIT_WORLD=str(WORLD),
        )
        assert done.returncode == 0, done.stderr
        [file] = (tmp_path / f"{name}-results").rglob("results_*.json")
        results = json.loads(file.read_text())["results"]
        truth[name] = results["noisefit_world"]["contains_truth,none"]
        choice[name] = results["noisefit_world_mc"]["acc,none"]

        answers = tmp_path / f"{name}.csv"
        done = python(
            *("generate.py", *ours, "--greedy", "--repetition_penalty", "1.0", "--rounds", "1"),
            *words(input_csv=WORLD / "test.csv", output_csv=answers),
        )
        assert done.returncode == 0, done.stderr
        done = python("-m", "noisefit.score", str(answers), "--json")
        score = json.loads(done.stdout)
        assert truth[name] == pytest.approx(score["contains_truth"]), name
        assert results["noisefit_world"]["exact_match,none"] == pytest.approx(score["exact_match"]), name
    assert truth["base"] < 0.05 and truth["after20"] > 0.8, truth
    assert min(choice.values()) > 0.8, choice  # all of them know the facts
