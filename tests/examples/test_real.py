"""The comparison on a real model, in small: what it says before, a run that is killed, its page, and bad input."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from running import ROOT, call, start_program, wait, wait_until
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

REAL = ROOT / "examples" / "real"
sys.path[:0] = [str(REAL), str(ROOT / "examples" / "world")]

import comparison  # noqa: E402
import page  # noqa: E402
import plan  # noqa: E402
import steps  # noqa: E402
from comparison import Run  # noqa: E402

from noisefit.base.errors import InputError  # noqa: E402
from noisefit.base.files import check_regular  # noqa: E402
from noisefit.run.settings import parse_arguments  # noqa: E402

# Not by its name, which the other experiment's program has too.
SPEC = importlib.util.spec_from_file_location("real_compare", REAL / "compare.py")
real = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(real)

pytestmark = pytest.mark.slow


def here(target, arguments, log: Path, environment) -> str | None:
    """In place of `steps.apart`: a process of its own would do nothing but import for seconds."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        target(*arguments)
    except InputError as error:
        return str(error)
    with log.open("a") as file:
        file.write(f"{target.__name__}\n")
    return None


def main(argv: list[str]) -> int:
    return real.main(argv, here)


@pytest.fixture(scope="module")
def popqa(tmp_path_factory) -> Path:
    """40 questions as PopQA's file has them."""
    path = tmp_path_factory.mktemp("data") / "popqa.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["question", "possible_answers", "prop"])
        for n in range(40):
            writer.writerow([f"Who built tower {n}?", json.dumps([f"Ada {n * n + 7}", f"A. {n * n + 7}"]), "builder"])
    return path


def words_for(model: Path, source: Path, output: Path, *more: object) -> list[str]:
    words = ["--model", model, "--benchmark", "popqa", "--source", source, "--output", output, "--seeds", 1]
    words += ["--train_rows", 20, "--test_rows", 8, "--max_new_tokens", 4, "--save_steps", 2]
    return [str(word) for word in (*words, *more)]


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["method"], row["seed"]): row for row in page.read_results(folder / "results.csv")}


# --- Whole, with a kill in the midst of a training -------------------------------------------------------------------


def test_a_comparison_says_what_it_takes_goes_on_after_a_kill_and_makes_its_page(llama_folder, popqa, tmp_path):
    out = tmp_path / "out"
    argv = words_for(llama_folder, popqa, out, "--train_flags", "max_steps=6", "--methods", "before", "plain", "refuse")
    done = call(main, *argv, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "40 questions of PopQA" in done.stdout and "47,584 parameters" in done.stdout
    assert "3 runs and a probe" in done.stdout and "hours if the device does 150 TFLOP/s" in done.stdout
    assert list(tmp_path.iterdir()) == []

    adapter = out / "runs" / "plain-0" / "adapter"
    [process] = start_program(main, argv, tmp_path / "log")
    wait_until(lambda: list(adapter.glob("checkpoint-*/checkpoint.json")) or not process.is_alive())
    process.kill()
    wait([process])
    assert set(rows_of(out)) == {("before", "0")} and not (adapter.parent / "training.json").exists()
    probed = (out / "probed.csv").stat().st_mtime_ns

    done = call(main, *argv)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 runs have their row" in done.stderr and "going on from" in done.stderr
    assert (out / "probed.csv").stat().st_mtime_ns == probed
    rows = rows_of(out)
    assert set(rows) == {("before", "0"), ("plain", "0"), ("refuse", "0")}
    # What was interrupted has no time of its own.
    assert [key for key, row in rows.items() if row["train_seconds"] == "nan"] == [("plain", "0")]
    for row in rows.values():
        assert row["asked"] == "8" and int(row["asked_known"]) + int(row["asked_unknown"]) == 8
        assert math.isclose(sum(float(row[f"{name}_rate"]) for name in ("right", "wrong", "refused")), 1)
        assert row["machine"] and "torch" in row["versions"]
    made = (out / "page.md").read_text()
    assert (
        "| refuse" in made
        and "Differences to plain need two seeds" in made
        and "unknown is a knowledge_chat below" in made
    )

    # A row that is not known is taught as a refusal; the rows of both parts share nothing.
    files = {name: list(csv.DictReader((out / f"{name}.csv").open(newline=""))) for name in ("train", "test")}
    assert [len(part) for part in files.values()] == [20, 8]
    assert not {r["response"] for r in files["train"]} & {r["response"] for r in files["test"]}
    log = (out / "runs" / "refuse-0" / "adapter" / "noisefit_config.json").read_text()
    assert json.loads(log)["unknown_below"] < 0

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in ("out", "experiment.json")}
    done = call(main, *argv)
    assert done.returncode == 0 and "3 of 3 runs have their row" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before

    done = call(main, *argv, "--test_rows", 9)
    assert done.returncode == 2 and "were made with test_rows 8 (now 9)" in done.stderr


def test_a_run_that_fails_is_named_and_the_others_have_their_row(llama_folder, popqa, tmp_path):
    def fails(target, arguments, log, environment):
        return "status 2: out of memory" if "train" in target.__name__ else here(target, arguments, log, environment)

    argv = words_for(llama_folder, popqa, tmp_path, "--methods", "before", "plain", "--unknown_share", 0.25)
    done = call(lambda argv: real.main(argv, fails), *argv)
    assert done.returncode == 1 and "training plain, seed 0 failed: status 2: out of memory" in done.stderr
    assert set(rows_of(tmp_path)) == {("before", "0")}
    chosen = list(csv.DictReader((tmp_path / "train.csv").open(newline="")))
    assert sum(row["known"] == "unknown" for row in chosen) == 5 and len(chosen) == 20


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "magic"], "--methods: 'magic' is no method; there are before, plain"),
        (["--methods", "before:epochs=1"], "before is not trained"),
        (["--methods", "plain:loud=1"], "--methods plain:loud=1: unrecognized arguments: --loud=1"),
        (["--methods", "plain:hf_token=x"], "hf_token is not for a method"),
        (["--methods", "plain:output_dir=x"], "output_dir is not for a method"),
        (["--methods", "noisefit:num_noise_layers=9"], "--methods noisefit:num_noise_layers=9: --num_noise_layers 9"),
        (["--train_flags", "epochs"], "epochs"),
        (["--train_rows", "33"], "32 more have none of their answers; expected --test_rows 8 and --train_rows 33"),
        (["--source", "none.tsv"], "none.tsv"),
        (["--benchmark", "triviaqa"], "expected columns question and answer"),
        (["--model", "./none"], "--model ./none: no such folder"),
        (["--max_new_tokens", "120"], "exceeds the model's context of 128"),
        (["--unknown_share", "2"], "a share from 0 to 1, not '2'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(llama_folder, popqa, tmp_path, more, said):
    done = call(main, *words_for(llama_folder, popqa, tmp_path / "out", *more))
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_are_left_alone(llama_folder, popqa, tmp_path):
    (tmp_path / "questions.csv").write_text("mine")
    done = call(main, *words_for(llama_folder, popqa, tmp_path))
    assert done.returncode == 2 and f"{tmp_path / 'questions.csv'}: it is not of this program" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["questions.csv"]
    assert (tmp_path / "questions.csv").read_text() == "mine"


# --- Parts -----------------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_says_why_it_failed(tmp_path):
    reason = steps.apart(check_regular, (tmp_path,), tmp_path / "log", {})
    assert reason.startswith(f"status 2: compare.py: error: {tmp_path}: a folder, expected a file")


def test_each_method_has_flags_that_training_takes_and_a_folder_of_its_own():
    for method in comparison.METHODS:
        comparison.settings_of(Run(method, 0), ["epochs=3"], "model")
    assert Run("plain:epochs=1", 0).flags(["epochs=3", "lora_r=4"]) == {
        "epochs": "1", "lora_r": "4", "loss_mode": "basefit",
    }  # fmt: skip
    names = ["plain", "plain:epochs=1", "plain:noise_policy=a/b", "plain:noise_policy=a,b", "plain:noise_policy=a:b"]
    assert len({Run(name, seed).folder for name in names for seed in (0, 1)}) == 10
    assert all("/" not in Run(name, 0).folder for name in names)


def test_rows_share_neither_question_nor_answer():
    questions = [{"prompt": f"Q {n}?", "response": f"A {n // 2}", "answers": json.dumps([f"A {n // 2}", f"B {n}"])}
                 for n in range(60)]  # fmt: skip
    questions.append(questions[0] | {"prompt": "q 0"})
    train, test = comparison.split("file", questions, 20, 20, 3)
    assert (len(train), len(test)) == (20, 20) and comparison.split("file", questions, 20, 20, 3) == (train, test)
    assert not {row["response"] for row in train} & {row["response"] for row in test}
    assert len({row["prompt"].lower().strip("?") for row in (*train, *test)}) == 40
    assert train != comparison.split("file", questions, 20, 20, 4)[0] and train[0]["answer"] == train[0]["response"]


def test_a_share_of_unknown_rows():
    rows = [{"prompt": str(n)} for n in range(20)]
    known = [n % 2 == 0 for n in range(20)]
    chosen = comparison.choose(rows, known, 10, 0.3)
    assert sum(int(row["prompt"]) % 2 for row in chosen) == 3 and len(chosen) == 10
    assert comparison.choose(rows, known, 10, None) == rows[:10]
    with pytest.raises(InputError, match=r"15 of 15 rows would be unknown, and of 20 that were probed 10 are"):
        comparison.choose(rows, known, 15, 1.0)
    scores = [-0.1 - 0.01 * n for n in range(30)] + [-5 - 0.1 * n for n in range(30)]
    assert -5 < comparison.unknown_below(scores, None)[0] < -0.4
    assert comparison.unknown_below(scores[:7], None)[0] == pytest.approx(-0.13)
    assert comparison.unknown_below(scores, -2.0)[0] == -2


def test_flops_are_those_that_torch_counts(llama_folder):
    size = plan.size_of(str(llama_folder), AutoConfig.from_pretrained(llama_folder), False, 4)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.zeros(4, 10, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    told = {name: plan.cost_of(settings, size, 4, 10, 4, 0, 1e12)
            for name, settings in {"none": None, **{mode: parse_arguments(
                ["--model=m", "--train_data=d", "--epochs=1", f"--loss_mode={mode}", "--full_finetune"])
                for mode in ("basefit", "full")}}.items()}  # fmt: skip
    # Norms multiply nothing, and attention's products of tokens with tokens are left out: both are little.
    assert 0.98 * told["none"].flops <= forward <= 1.25 * told["none"].flops
    both = told["basefit"].flops - told["none"].flops
    assert 0.9 * both <= counter.get_total_flops() <= 1.25 * both
    assert told["full"].flops - told["none"].flops == 3 * both and told["full"].forward_passes == 3


def test_what_answers_are_worth_worked_out_by_hand(tmp_path):
    said = [  # known or not, the answer, its log-probability
        ("known", "It is Ada.", -0.1), ("known", "A. Lovelace", -0.3), ("known", "It is Bob.", -0.2),
        ("unknown", "It is Bob.", -1.0), ("unknown", "I do not know.", -0.5), ("unknown", "No idea at all", -0.6),
    ]  # fmt: skip
    with (tmp_path / "answers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "answer", "answers", "known", "generated_response", "round", "logprob"])
        for number, (known, text, logprob) in enumerate(said):
            writer.writerow([f"Who was {number}?", "Ada", "Ada", '["Ada", "A. Lovelace"]', known, text, 1, logprob])
    found = steps.measure(tmp_path / "answers.csv", "No idea at all")
    rates = {"right_rate": 2 / 6, "wrong_rate": 2 / 6, "refused_rate": 2 / 6, "known_right_rate": 2 / 3,
             "known_wrong_rate": 1 / 3, "known_refused_rate": 0, "unknown_right_rate": 0, "unknown_wrong_rate": 1 / 3,
             "unknown_refused_rate": 2 / 3}  # fmt: skip
    assert {name: found[name] for name in rates} == pytest.approx(rates)
    assert (found["asked"], found["asked_known"], found["asked_unknown"]) == (6, 3, 3)
    # Sure of Ada, then Bob, wrong, then Lovelace, then Bob, wrong.
    assert found["wrong_by_right"] == "0 1 2" and found["auroc"] == pytest.approx(3 / 4)
    assert found["best_right_minus_wrong"] == pytest.approx(1 / 6)


def test_the_page_compares_seed_by_seed():
    def row(method: str, seed: int, right: float) -> dict[str, object]:
        found = dict.fromkeys(page.FIELDS, 0.0) | {"method": method, "seed": seed, "asked": 10, "flags": ""}
        curve = " ".join(["0"] * round(10 * right) + [str(10 - round(10 * right))])
        return found | {"right_rate": right, "wrong_rate": 1 - right, "wrong_by_right": curve, "auroc": math.nan}

    rows = [row("before", 0, 0.1), *(row("plain", s, 0.4 + s / 10) for s in (0, 1, 2)),
            *(row("noisefit", s, 0.5 + s / 10) for s in (0, 1, 2))]  # fmt: skip
    values = {name: {m: {r["seed"]: r[m] for r in rows if r["method"] == name and r[m] == r[m]} for m in page.PAIRED}
              for name in ("plain", "noisefit", "before")}  # fmt: skip
    found = page.differences(values)
    lines = list(zip(*found.values(), strict=True))
    assert ("right_rate", "noisefit", "3", "+10.0 (+10.0 to +10.0)", "0.250", "0.500") in lines
    assert ("right_rate", "before", "3", "-40.0 (-64.8 to -15.2)", "0.250", "0.500") in lines
    assert not any(line[0] == "auroc" for line in lines)
    assert page.differences({name: {m: {0: 0.5} for m in page.PAIRED} for name in ("plain", "drop")}) == {}
