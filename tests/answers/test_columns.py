"""`--columns` for all that reads the rows of a training: what was trained on is answered, scored and probed."""

import csv
import json
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from running import call, words

import generate
import train_loop
from noisefit.answers.journal import Journal
from noisefit.answers.settings import parse_arguments as parse_answers
from noisefit.probe import main as probe
from noisefit.run.output import where_things_are
from noisefit.run.settings import parse_arguments as parse_training
from noisefit.score import main as score

COLUMNS = ["--columns", "prompt=my question", "response=answer"]
QA = "id,my question,answer,kind\n" + "".join(f"{i},What is {i}?,It is {i}.,k{i % 2}\n" for i in range(6))
FAST = ["--rounds", "1", "--max_new_tokens", "3"]


def main(argv):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_loop.train(parse_training(argv))


def answer(argv):
    generate.generate(parse_answers(argv))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def printed(told: str) -> list[str]:
    """The words behind `generate.py` of the command that a training ends with."""
    line = next(line for line in told.splitlines() if "next, let it answer: " in line)
    found = shlex.split(line.partition("next, let it answer: ")[2])
    assert found[:3] == ["accelerate", "launch", "generate.py"]
    return found[3:]


@pytest.mark.parametrize("several", [False, True], ids=["one file", "several"])
def test_the_printed_command_answers_the_trained_file_and_the_score_reads_it(
    llama_folder, tmp_path, monkeypatch, several
):
    monkeypatch.chdir(tmp_path)
    Path("the qa.csv").write_text(QA)
    Path("more.jsonl").write_text('{"prompt": "Who?", "response": "She."}\n' * 4)
    data = ["the qa.csv", *(["more.jsonl"] if several else [])]
    given = words(model=llama_folder, output_model="qa out", batch_size=2, max_steps=1)
    trained = call(main, "--train_data", *data, *COLUMNS, *given)
    assert trained.returncode == 0, trained.stderr
    command = printed(trained.stderr)
    assert command == ["--model_path", "qa out", "--input_csv", "the qa.csv", *COLUMNS]
    done = call(answer, *command, *FAST)
    assert done.returncode == 0, done.stderr
    rows = rows_of(Path("qa out_answers.csv"))
    assert list(rows[0])[:5] == ["id", "prompt", "response", "kind", "generated_response"]
    assert [list(row.values())[:4] for row in rows] == [line.split(",") for line in QA.splitlines()[1:]]
    assert "python -m noisefit.score 'qa out_answers.csv'" in done.stderr.replace(str(tmp_path) + "/", "")
    scored = call(score, "qa out_answers.csv", "--by", "kind", "--json")
    assert scored.returncode == 0 and json.loads(scored.stdout)["prompts"] == 6, scored.stderr
    # What is recorded repeats them.
    config = Path("qa out_answers.csv.settings.json")
    assert json.loads(config.read_text())["columns"] == COLUMNS[1:]
    again = call(answer, "--config", config, "--output_csv", "again.csv")
    assert again.returncode == 0 and Path("again.csv").read_bytes() == Path("qa out_answers.csv").read_bytes()


def test_where_no_file_was_trained_on_the_command_has_a_placeholder(tmp_path):
    for data, hint in ((["org/questions"], True), ([str(tmp_path)], True), (["org/questions", __file__], False)):
        settings = parse_training(["--model", "m", "--output_model", "o", *COLUMNS, "--train_data", *data])
        line = where_things_are(settings)[-1]
        assert ("a file of yours with a column prompt: " in line) == hint
        assert line.endswith("--input_csv QUESTIONS.csv") == hint and ("--columns" in line) != hint


def test_of_a_mixture_the_command_has_the_columns_of_its_file(tmp_path):
    (tmp_path / "ours.jsonl").write_text('{"prompt": "Who?", "answer": "She."}\n')
    (tmp_path / "qa.csv").write_text(QA)
    for name, columns in (("ours.jsonl", ["--columns", "response=answer"]), ("qa.csv", COLUMNS)):
        data = [str(tmp_path / name), str(tmp_path / "more.csv")]
        line = where_things_are(parse_training(["--model", "m", "--output_model", "o", *COLUMNS, "--train_data", *data,
                                                "other/hub"]))[-1]  # fmt: skip
        assert printed(line) == ["--model_path", "o", "--input_csv", data[0], *columns]


def test_the_answers_are_those_to_the_file_with_our_names_in_both_formats(llama_folder, tmp_path):
    lines = [{"n": i, "q": f"What is {i}?", "a": "It is.", "tags": ["x"]} for i in range(3)]
    lines.append({"n": 3, "prompt": "Ours?", "response": "Yes."})  # a row of another shape
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = [{{"q": "prompt", "a": "response"}.get(name, name): value for name, value in line.items()} for line in lines]
    (tmp_path / "ours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ours))
    for suffix in ("csv", "jsonl"):
        for name, columns in (("q", ["--columns", "prompt=q,response=a"]), ("ours", [])):
            given = words(model_id=llama_folder, input_csv=tmp_path / f"{name}.jsonl")
            given += words(output_csv=tmp_path / f"{name}_out.{suffix}")
            done = call(answer, *given, *columns, *FAST)
            assert done.returncode == 0, done.stderr
        assert (tmp_path / f"q_out.{suffix}").read_bytes() == (tmp_path / f"ours_out.{suffix}").read_bytes()
    written = [json.loads(line) for line in (tmp_path / "q_out.jsonl").read_text().splitlines()]
    assert [{name: line[name] for name in row} for line, row in zip(written, ours, strict=True)] == ours


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (QA, [], "no column 'prompt'; columns found: id, my question, answer, kind"),
        ("question,answer\na,b\n", [], "did you mean --columns prompt=question?"),
        (QA, ["prompt=qeury"], "no column 'qeury' (--columns prompt=qeury)"),
        ("prompt\na\n", ["prompt=qeury"], "--columns prompt=qeury: no column 'qeury', and "),
        (QA, ["promt=question"], "--columns promt=question: expected NAME=COLUMN"),
        (QA, ["prompt=id", "response=id"], "'id' is given twice"),
        ("prompt,question\na,b\n", ["prompt=question"], "row 1: --columns prompt=question: it has a column 'prompt'"),
        ("prompt,question,round\na,b,1\n", ["response=question"], "it has a column 'round' already"),
    ],
)  # fmt: skip
def test_bad_columns_are_one_line_before_the_model_is_loaded(
    llama_folder, tmp_path, monkeypatch, text, columns, message
):
    monkeypatch.setattr(generate, "load_answer_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "q.csv").write_text(text)
    given = words(model_id=llama_folder, input_csv=tmp_path / "q.csv", output_csv=tmp_path / "out.csv")
    done = call(answer, *given, *(["--columns", *columns] if columns else []))
    said = done.stderr.strip().splitlines()
    assert done.returncode == 2 and message in said[-1] and "Traceback" not in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["q.csv"]


def test_columns_may_be_swapped(llama_folder, tmp_path):
    (tmp_path / "q.csv").write_text("prompt,response\nb,a\n")
    given = words(model_id=llama_folder, input_csv=tmp_path / "q.csv", output_csv=tmp_path / "out.csv")
    assert call(answer, *given, *FAST, "--columns", "prompt=response", "response=prompt").returncode == 0
    assert list(rows_of(tmp_path / "out.csv")[0].items())[:2] == [("response", "b"), ("prompt", "a")]


@pytest.mark.parametrize("program", ["generate", "probe"])
def test_an_unfinished_run_goes_on_under_the_same_columns_alone(llama_folder, tmp_path, monkeypatch, program):
    """Answers are the same under all that leave the prompt; what would be written beside them is not."""
    (tmp_path / "q.csv").write_text("question,a,b\nWho?,I.,You.\nWhen?,Now.,Then.\n")
    columns = ["--columns", "prompt=question"]
    if program == "generate":
        given = [*words(model_id=llama_folder, input_csv=tmp_path / "q.csv", output_csv=tmp_path / "o.csv"), *FAST]
        main, run, module, computing = answer, answer, generate, "answer_all"
    else:
        given = words(model=llama_folder, train_data=tmp_path / "q.csv", output=tmp_path / "o.csv")
        main, module, computing = probe, sys.modules[probe.__module__], "score_batches"

        def run(argv):  # a program's `main` ends the process where it is interrupted
            module.probe(module.parse_arguments(argv))

    with monkeypatch.context() as patched:  # a kill with all answers there
        patched.setattr(Journal, "read_own", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run([*given, *columns, "response=a"])
    assert (tmp_path / "o.csv.partial").is_dir() and not (tmp_path / "o.csv").exists()
    for other in (["response=b"], *([[]] if program == "generate" else [])):
        done = call(main, *given, *columns, *other)
        assert done.returncode == 2 and "with other settings (columns" in done.stderr, done.stderr
    monkeypatch.setattr(module, computing, lambda *_: iter(()))  # nothing is left to compute
    done = call(main, *given, "--columns", "response=a", *columns[1:])  # in another order
    assert done.returncode == 0, done.stderr
    assert [row["response"] for row in rows_of(tmp_path / "o.csv")] == ["I.", "Now."]


def test_a_probe_is_that_of_the_file_with_our_names(llama_folder, tmp_path):
    (tmp_path / "q.csv").write_text(QA)
    (tmp_path / "ours.csv").write_text(QA.replace("my question,answer", "prompt,response", 1))
    for name, columns in (("q", COLUMNS), ("ours", [])):
        given = words(model=llama_folder, train_data=tmp_path / f"{name}.csv", output=tmp_path / f"{name}_out.csv")
        done = call(probe, *given, *columns)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "q_out.csv").read_bytes() == (tmp_path / "ours_out.csv").read_bytes()
    assert {"prompt", "response", "kind", "knowledge_chat"} <= rows_of(tmp_path / "q_out.csv")[0].keys()
