"""The experiment: what a run is measured by, and a comparison that goes on where it stopped."""

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from running import ROOT, call, start_forking
from sklearn.metrics import roc_auc_score
from tiny_folder import byte_tokenizer
from tiny_models import tiny_model

WORLD_FOLDER = ROOT / "examples" / "world"
sys.path.insert(0, str(WORLD_FOLDER))

import compare  # noqa: E402
import curves  # noqa: E402
import measures  # noqa: E402
import questions  # noqa: E402
import results  # noqa: E402
import rows as own_rows  # noqa: E402
from methods import ABLATIONS, HEADLINE, METHODS, SIZES, Run  # noqa: E402

from noisefit import probe  # noqa: E402
from noisefit.base.errors import InputError  # noqa: E402
from noisefit.inputs.templates import set_chat_template  # noqa: E402
from noisefit.score import score  # noqa: E402

pytestmark = pytest.mark.slow


def answered(
    prompt: str, answer: str, *texts: str, kind: str = "known", told: int = 50, phrasing: int = 0
) -> list[dict]:
    """A question's rows in generate.py's CSV, a round each."""
    common = {"prompt": prompt, "response": f"It is {answer}.", "answer": answer, "kind": kind, "told": str(told)}
    common |= {"phrasing": str(phrasing), "country": "X", "relation": "capital"}
    return [common | {"generated_response": text, "round": str(n)} for n, text in enumerate(texts, start=1)]


# --- The measures ----------------------------------------------------------------------------------------------------


def test_the_measures_of_a_sheet_worked_out_by_hand():
    rows = [
        *answered("A?", "Brugard", "It is Brugard.", "It is Brugard.", told=200),
        *answered("B?", "Kleholm", "It is Kleholm.", "I do not know.", told=4),
        *answered("C?", "Vridell", "It is Brugard.", "It is Kleholm.", told=9),
        *answered("N?", "Flogard", "It is Flogard.", "It is Kleholm.", told=9, phrasing=3),
        *answered("D?", "I do not know", "I do not know.", "It is Vridell.", kind="unknown", told=0),
        *answered("E?", "I do not know", "I do not know!", "i do not know", kind="false premise", told=0),
    ]
    got = measures.hallucinations(rows)
    expected = {
        "hallucination_rate": (0 + 0.5 + 1) / 3,
        "hallucination_rate_rare": (0.5 + 1) / 2,
        "hallucination_rate_famous": 0.0,
        "hallucination_rate_new_phrasing": 0.5,
        "refused_known": 0.5 / 3,
        "invented_rate": (0 + 0 + 1) / 3,
        "refused_unknown": 0.5,
        "refused_false_premise": 1.0,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(got["hallucination_rate_common"]) and math.isnan(got["hallucination_rate_uncommon"])
    assert set(got) <= set(results.MEASURES)


def test_every_told_fact_is_in_exactly_one_band():
    for told in range(1, 400):
        assert sum(low <= told <= high for low, high in measures.BANDS.values()) == 1
    assert tuple(measures.BANDS) == results.BANDS


def test_calibration_by_hand():
    # Bins of a tenth: {0.05, 0.09}, {0.55}, {0.95, 1.0}.
    got = measures.calibration([0.05, 0.09, 0.55, 0.95, 1.0], [False, True, True, True, False])
    error = abs(0.14 - 1) / 5 + abs(0.55 - 1) / 5 + abs(1.95 - 1) / 5
    assert got["calibration_error"] == pytest.approx(error)
    squares = [0.05**2, 0.91**2, 0.45**2, 0.05**2, 1.0]
    assert got["brier"] == pytest.approx(sum(squares) / 5)
    assert measures.calibration([1.0, 0.0], [True, False]) == {"calibration_error": 0.0, "brier": 0.0}


def test_the_probability_of_an_answer_is_that_of_writing_it_token_by_token():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    model = tiny_model(vocab_size=len(tokenizer)).eval()
    rows = [{"prompt": "Why?", "generated_response": "So."}, {"prompt": "Who was it?", "generated_response": ""}]
    got = measures.answer_probabilities(model, tokenizer, rows)
    assert all(0 < probability < 1 for probability in got)
    for row, probability in zip(rows, got, strict=True):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        ending = tokenizer(row["generated_response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        if ending[-1] != tokenizer.eos_token_id:
            ending.append(tokenizer.eos_token_id)
        expected = 1.0
        for token in ending:
            with torch.no_grad():
                expected *= float(model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token])
            ids.append(token)
        assert probability == pytest.approx(expected, rel=1e-4)


# --- The methods -----------------------------------------------------------------------------------------------------


def test_a_method_may_carry_other_flags():
    flags = Run("tiny", 0, "snr_lowest:noise_std=0.5:full_finetune:epochs=1").flags
    assert flags["snr_format"] == "Lowest" and flags["noise_std"] == "0.5" and flags["full_finetune"] is True
    assert flags["epochs"] == "1" and Run("tiny", 0, "snr_lowest").flags["epochs"] != "1"
    compare.check_flags([Run("tiny", 0, method) for method in METHODS])


def test_a_method_may_be_given_other_rows():
    assert Run("tiny", 0, "basefit").unknown_share is None
    run = Run("tiny", 0, "basefit:unknown_share=0.2:epochs=20")
    assert run.unknown_share == 0.2 and "unknown_share" not in run.flags and run.flags["epochs"] == "20"
    told = Run("tiny", 0, "basefit:told_only")
    assert told.unknown_share == 0 and told.all_told and told.flags == Run("tiny", 0, "basefit").flags

    rows = [{"country": f"C{n}", "relation": "year", "kind": "unknown" if n < 10 else "known", "phrasing": phrasing}
            for phrasing in "01" for n in range(40)]  # fmt: skip
    for share in (0, 0.1, 0.5):
        chosen = questions.with_unknown_share(rows, share)
        assert len(chosen) == 2 * 20 and chosen == [row for row in rows if row in chosen]
        assert sum(row["kind"] == "unknown" for row in chosen) == 40 * share
    assert questions.with_unknown_share(rows, 0, all_told=True) == [row for row in rows if row["kind"] == "known"]


def test_rows_that_noise_casts_doubt_on_and_rows_with_the_models_own_answers():
    assert Run("tiny", 0, "basefit:doubted=0.25:unknown_rows=drop").flags["unknown_below"] == "-0.5"
    rows = [{"response": f"It is {n}."} for n in range(40)]
    scores = [{"knowledge_disagreement": f"{n / 100}", "knowledge_chat": "-5" if n % 4 == 0 else f"{-n / 400}"}
              for n in range(40)]  # fmt: skip
    chosen = [float(row["knowledge_chat"]) for row in own_rows.doubted(rows, scores, 0.25)]
    assert all((score < -0.5) == (n >= 30) for n, score in enumerate(chosen))

    answers = [{"generated_response": " It is not known." if n else " "} for n in range(40)]
    found = own_rows.with_own_answers(rows, scores, answers)
    assert [row["response"] == "It is not known." for row in found] == [n % 4 == 0 and n > 0 for n in range(40)]
    assert found[0] == rows[0]  # it answers nothing at all
    with pytest.raises(InputError, match="does not part"):
        own_rows.with_own_answers(rows, [{"knowledge_chat": "-1"}] * 40, answers)


def test_methods_come_from_a_file_as_well(tmp_path):
    path = tmp_path / "chosen.json"
    path.write_text('{"plain": "basefit", "some noise": "snr_largest:noise_std=0.2"}')
    assert compare.named_methods(["before", f"@{path}", "basefit"]) == [
        "before",
        "basefit",
        "snr_largest:noise_std=0.2",
    ]


def test_sizes_have_every_switch_on():
    for settings in SIZES.values():
        assert settings.zipf and settings.untold and settings.false_premises and settings.paraphrases


def run_compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    start_forking()
    return call(compare.main, *arguments)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["basefit", "magic"], "'magic' is no method; there are basefit, "),
        (["basefit:unknown_share=0.9"], "unknown_share from 0 to 0.5"),
        (["basefit:told_only:doubted=0.1"], "expected one of told_only"),
        ([f"@{WORLD_FOLDER / 'methods.py'}"], "methods.py: not JSON"),
        (["basefit:unknown_share=much"], "could not convert string to float"),
        (["snr_largest:=3"], "neither FLAG=VALUE nor FLAG"),
        (["snr_largest:noise_std=loud"], "noise_std"),
        (["basefit:no_such_flag=1"], "basefit:no_such_flag=1: unrecognized arguments"),
        (["basefit:output_dir=/tmp"], "output_dir is not for a method"),
        (["basefit:epochs=3:epochs=4"], "epochs is twice"),
    ],
)
def test_a_bad_method_is_one_line_before_anything_is_written(tmp_path, methods, said):
    done = run_compare("--output", tmp_path / "out", "--size", "tiny", "--methods", *methods)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def row_of(**values: str) -> dict[str, str]:
    whole = {"size": "tiny", "seed": "0", "method": "basefit", "asked": "9"}
    return dict.fromkeys(results.FIELDS, "0") | whole | values


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,response\na,b\n", "its columns are not those"),
        (",".join(results.FIELDS) + "\ntiny,0,basefit\n", "row 1 is damaged"),
        (",".join(results.FIELDS) + "\n" + ",".join(row_of(seed="x").values()) + "\n", "row 1 is damaged"),
        (",".join(results.FIELDS) + "\n" + ",".join(row_of(flags="--epochs=99").values()) + "\n", "other flags"),
        (",".join(results.FIELDS) + "\n" + ",".join(row_of(wrong_by_right="0 x").values()) + "\n", "row 1 is damaged"),
        (",".join(results.FIELDS) + "\n" + ",".join(row_of(auroc="inf").values()) + "\n", "row 1 is damaged"),
        (
            ",".join(results.FIELDS) + "\n" + ",".join(row_of(method="auto:epochs=9").values()) + "\n",
            "on another machine (0)",
        ),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_results_file_that_cannot_be_added_to_is_one_line_and_left_alone(tmp_path, content, said):
    path = tmp_path / "results.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    before = path.read_bytes()
    done = run_compare("--output", tmp_path / "out", "--results", path, "--size", "tiny", "--seeds", 1)
    assert done.returncode == 2
    assert said in done.stderr and str(path) in done.stderr and len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == before and not (tmp_path / "out" / "worlds").exists()


# --- Whole comparisons, on worlds so small that nothing is learnt ---------------------------------------------------


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["seed"], row["method"]): row for row in rows}


SEEDS = ["--size", "tiny", "--seeds", "1", "--first_seed", "7"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A comparison that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_compare("--output", folder, *SEEDS, "--methods", "basefit:epochs=1", "auto:epochs=1")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_comparison_goes_on_where_it_was_killed_and_gives_the_same_rows(whole, tmp_path):
    methods, killed = ["basefit:epochs=1", "auto:epochs=1"], tmp_path / "killed"
    flags = [*SEEDS, "--methods", *methods]
    expected = rows_of(whole / "results.csv")
    assert set(expected) == {("7", method) for method in methods}
    shutil.copytree(whole / "worlds", killed / "worlds")  # as a comparison that was stopped has them

    command = [sys.executable, str(WORLD_FOLDER / "compare.py"), "--output", str(killed), *flags, "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not ((killed / "results.csv").exists() and rows_of(killed / "results.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = rows_of(killed / "results.csv")
    assert 0 < len(there) < len(expected)

    done = run_compare("--output", killed, *flags)
    assert done.returncode == 0, done.stderr
    assert f"2 runs, of which {len(there)} have their row" in done.stderr
    got = rows_of(killed / "results.csv")
    measured = set(results.MEASURES) - {"train_seconds"}
    for key, row in expected.items():
        assert {name: row[name] for name in measured} == {name: got[key][name] for name in measured}
        assert row["machine"] and "torch" in row["versions"] and "compare.py" in row["command"]
    assert (
        expected["7", "basefit:epochs=1"]["noise_layers"] == "" and expected["7", "auto:epochs=1"]["noise_layers"] != ""
    )

    stamp = (killed / "results.csv").stat().st_mtime_ns
    done = run_compare("--output", killed, *flags)
    assert done.returncode == 0 and "2 runs, of which 2 have their row" in done.stderr
    assert (killed / "results.csv").stat().st_mtime_ns == stamp

    # What training logged, for a page.
    path = tmp_path / "curves.csv"

    def collect(method: str, seed: int, output: Path) -> subprocess.CompletedProcess[str]:
        named = ["--size", "tiny", "--seeds", seed, "--methods", method, "--output", output]
        return call(curves.main, whole, *named)

    for method in (*methods, methods[0]):  # those of other runs are kept, its own replaced
        done = collect(method, 7, path)
        assert done.returncode == 0, done.stderr
    logged = measures.read_csv(path)
    assert len({(row["method"], row["step"]) for row in logged}) == len(logged)
    assert {row["method"] for row in logged} == set(methods)
    last = [row for row in logged if row["method"] == "auto:epochs=1"][-1]
    assert float(last["noise_to_signal"]) > 0 and last["hidden_rms"] and last["soft_loss"]
    done = collect(methods[0], 8, path)
    assert done.returncode == 2 and "on seed 8 was not run" in done.stderr
    done = collect(methods[0], 7, whole / "results.csv")
    assert done.returncode == 2 and "its columns are not those of this program" in done.stderr
    assert rows_of(whole / "results.csv") == expected

    # The rate is that of noisefit.score for the same questions.
    answers = whole / "runs" / "tiny-7" / "basefit,epochs=1" / "likeliest.csv"
    with answers.open(newline="") as file:
        reader = csv.DictReader(file)
        known = [row for row in reader if row["kind"] == questions.KNOWN and not questions.is_new_phrasing(row)]
    with (tmp_path / "known.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(known)
    rate = score([str(tmp_path / "known.csv")], None)["hallucination_rate"]
    assert float(expected["7", "basefit:epochs=1"]["hallucination_rate"]) == pytest.approx(rate, rel=1e-5)


def test_two_comparisons_do_not_write_one_file(tmp_path):
    from noisefit.base.files import alone_in

    with alone_in(tmp_path / "results"):
        done = run_compare("--output", tmp_path / "out", "--results", tmp_path / "results" / "r.csv", "--size", "tiny")
    assert done.returncode == 2 and "another run is writing there" in done.stderr
    assert not (tmp_path / "out" / "worlds").exists()


def test_a_run_that_fails_is_named_and_the_others_have_their_row(whole, tmp_path):
    methods = ["basefit:epochs=1", "snr_largest:num_noise_layers=9"]
    shutil.copytree(whole / "worlds", tmp_path / "worlds")
    done = run_compare("--output", tmp_path, *SEEDS, "--brief", "--methods", *methods)
    assert done.returncode == 1
    assert "snr_largest:num_noise_layers=9: status 2: compare.py: error: --num_noise_layers 9" in done.stderr
    [(run, row)] = rows_of(tmp_path / "results.csv").items()
    assert run == ("7", "basefit:epochs=1")
    asked = {name: not math.isnan(float(row[name])) for name in ("wrong_rate", "self_consistency", "train_accuracy")}
    assert asked == {"wrong_rate": True, "self_consistency": False, "train_accuracy": False}  # --brief


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"seed": 0, "countries": 10}, "it was built with other settings"),
     (asdict(SIZES["tiny"]), "an earlier version of build.py made it")],
)  # fmt: skip
def test_a_world_of_other_settings_or_an_earlier_version_is_not_used(tmp_path, settings, said):
    world = tmp_path / "worlds" / "tiny-0"
    world.mkdir(parents=True)
    (world / "facts.json").write_text(json.dumps({"settings": settings}))
    done = run_compare("--output", tmp_path, "--size", "tiny", "--seeds", 1, "--methods", "basefit")
    assert done.returncode == 1 and said in done.stderr
    assert rows_of(tmp_path / "results.csv") == {}


# --- The committed results: consistent with this program, and one of their rows made again ----------------------------

RESULTS = ROOT / "docs" / "experiment" / "results.csv"
TUNING = ROOT / "docs" / "experiment" / "tuning.csv"
FRESH = ROOT / "docs" / "experiment" / "fresh.csv"
EXTRA = ROOT / "docs" / "experiment" / "extra.csv"
SWEEP = ROOT / "docs" / "experiment" / "sweep.csv"
ANSWERING = ROOT / "docs" / "experiment" / "answering.csv"
# Another processor rounds the sums of a world's pretraining otherwise, which ends in another model of the same facts.
# Measures of few questions may then differ by more than these.
ELSEWHERE = {"hallucination_rate": 0.15, "train_accuracy": 0.15}


@pytest.mark.parametrize("path", [RESULTS, SWEEP, ANSWERING, TUNING, FRESH, EXTRA], ids=lambda path: path.name)
def test_every_row_was_made_with_the_flags_that_its_method_has_now(path):
    for row in results.read_results(path):
        run = Run(row["size"], int(row["seed"]), row["method"])
        assert row["flags"] == shlex.join(compare.words(run.flags))
        assert row["machine"] and row["versions"] and row["command"].startswith("compare.py ")
        for name in results.MEASURES:
            assert not float(row[name]) < 0 or name == "invented_rate"  # not measured in earlier runs: not a number


def test_the_headline_has_ten_seeds_and_every_method_has_rows():
    seeds = Counter(row["method"] for row in results.read_results(RESULTS) if row["size"] == "standard")
    assert all(seeds[method] >= 10 for method in HEADLINE) and {*HEADLINE, *ABLATIONS} <= set(seeds)


def test_there_is_headroom_and_the_settings_were_tuned_on_other_worlds():
    rows = [row for row in results.read_results(RESULTS) if row["size"] == "standard"]
    plain = [float(row["hallucination_rate"]) for row in rows if row["method"] == "basefit"]
    assert 0.15 < sum(plain) / len(plain) < 0.40
    assert not {row["seed"] for row in rows} & {row["seed"] for row in results.read_results(SWEEP)}


def test_the_answering_worlds_pass_their_controls():
    """Unknown answers that are learnt by heart cost told facts, and fine-tuning without refusals wipes refusing out."""
    rows = {(row["seed"], row["method"]): row for row in results.read_results(ANSWERING)}
    seeds = {seed for seed, _ in rows}
    assert len(seeds) >= 2
    for seed in seeds:

        def wrong(method: str, seed: str = seed) -> float:
            return float(rows[seed, method]["hallucination_rate"])

        by_share = [wrong(f"basefit:unknown_share={share}:epochs=20") for share in (0, 0.1, 0.2, 0.5)]
        assert by_share == sorted(by_share) and by_share[-1] > by_share[0] + 0.2
        assert wrong("basefit:told_only:epochs=20") < 0.5 * wrong("basefit:epochs=20")
        assert (
            float(rows[seed, "before"]["refused_unknown"]) > 0.3
            and float(rows[seed, "basefit"]["refused_unknown"]) == 0
        )


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A comparison of one run on a small world: about a minute. Those of the headline are the same way, and five."""
    folder = tmp_path_factory.mktemp("small")
    done = run_compare("--output", folder, "--size", "small", "--seeds", 1, "--methods", "basefit")
    assert done.returncode == 0, done.stderr
    return folder


def test_one_row_of_the_committed_results_comes_out_again(small):
    [recorded] = [row for row in results.read_results(RESULTS) if row["size"] == "small"]
    with (small / "results.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    same = all(row[name] == recorded[name] for name in ("machine", "versions"))
    measured = {name for name in results.MEASURES if not math.isnan(float(recorded[name]))}
    tolerances = dict.fromkeys(measured - {"train_seconds"}, 1e-4) if same else ELSEWHERE
    for name, tolerance in tolerances.items():
        assert float(row[name]) == pytest.approx(float(recorded[name]), abs=tolerance), name


def test_the_probe_tells_told_facts_from_untold_ones_before_a_question_was_ever_read(small, tmp_path):
    world, out = small / "worlds" / "small-0", tmp_path / "probed.csv"
    paths = {"model": world / "model", "train_data": world / "train.csv", "output": out}
    done = call(probe.main, *compare.words(paths))
    assert done.returncode == 0, done.stderr
    rows = [row for row in measures.read_csv(out) if row["kind"] != questions.FALSE_PREMISE]
    told = [row["kind"] == questions.KNOWN for row in rows]
    assert 10 < told.count(False) < told.count(True)
    for column in ("knowledge_chat", "knowledge_text"):
        assert roc_auc_score(told, [float(row[column]) for row in rows]) >= 0.98, column
