"""What a run finds out about itself while it trains: accuracy and entropy, the best model, and when to end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from running import metrics_of, run, start, wait
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from noisefit.base.errors import InputError
from noisefit.inputs.prompts import Example, make_examples
from noisefit.inputs.tables import read_rows
from noisefit.run.evaluation import check_answering
from noisefit.run.settings import Settings
from noisefit.run.standing import Best, Standing

pytestmark = pytest.mark.slow

# The learning rate rises until the model is worse off than before.
RISING = dict(
    learning_rate=0.3, warmup_ratio=1.0, batch_size=2, gradient_accumulation_steps=2, epochs=9, max_steps=6,
    noise_scale="frozen", lora_dropout=0.1, logging_steps=1, eval_steps=1, save_steps=1, save_total_limit=0,
    sample_steps=2, sample_prompts=2, sample_tokens=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.csv").write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}.\n" for i in range(12)))
    (folder / "eval.csv").write_text("prompt,response\n" + "".join(f"Is it {i}?,No: {i + 5}!\n" for i in range(4)))
    return {"data": folder / "train.csv", "eval_data": folder / "eval.csv"}


@pytest.fixture(scope="module")
def kept(llama_folder, files, tmp_path_factory) -> Path:
    """The output of a run that keeps its best model, with a checkpoint after each step; the best is neither the first
    nor the last. A seed has other random numbers on another processor, so the first such one is taken."""
    folder = tmp_path_factory.mktemp("kept")
    for seed in range(1, 9):
        RISING["seed"] = seed
        run(llama_folder, output=(out := folder / str(seed)), **files, **RISING, keep_best=True)
        if 1 < best_of(out)["step"] < RISING["max_steps"]:
            return out
    raise AssertionError("no seed's best model is in its midst")


def evaluations(out: Path, name: str = "eval_ce_loss") -> list[float]:
    return [json.loads(line)[name] for line in (out / "eval_metrics.jsonl").read_text().splitlines()]


def best_of(out: Path) -> dict:
    return json.loads((out / "noisefit_config.json").read_text())["best"]


# --- How it stands ----------------------------------------------------------------------------------------------------


def test_the_best_is_the_first_of_the_lowest_and_what_is_no_number_is_no_better():
    standing = Standing()
    stale = []
    for step, value in enumerate([float("nan"), 3.0, 2.0, 2.0, float("inf"), 2.5, 1.0, float("nan")], 1):
        standing = standing.after(step, value, 10 * step)
        stale.append(standing.stale)
    assert standing.best == Best(7, 1.0, 70) and stale == [1, 0, 0, 1, 2, 3, 0, 1]
    assert Standing.of(json.loads(json.dumps(standing.state_dict()))) == standing
    assert Standing.of(Standing().state_dict()) == Standing()


# --- The best model ---------------------------------------------------------------------------------------------------


def test_the_output_is_the_model_of_the_best_evaluation_and_says_so(kept, capsys):
    found = evaluations(kept)
    best = found.index(min(found)) + 1
    assert best_of(kept) == {"step": best, "eval_metric": "ce", "value": min(found)}
    weights = (kept / "adapter_model.safetensors").read_bytes()
    assert weights == (kept / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    assert weights != (kept / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    card = (kept / "README.md").read_text()
    seen = sum(line["target_tokens"] for line in metrics_of(kept)[:best])
    assert f"It saw {seen} supervised tokens. It is that of step {best}, whose evaluation was the best." in card
    assert not (kept / "best").exists()
    # Somebody who edits the output edits no checkpoint.
    assert {path.stat().st_nlink for path in kept.iterdir() if path.is_file()} == {1}
    for step in range(1, 7):  # each checkpoint knows the best until then
        lowest = found.index(min(found[:step])) + 1
        there = (kept / f"checkpoint-{step}" / "best" / "adapter_model.safetensors").read_bytes()
        assert there == (kept / f"checkpoint-{lowest}" / "adapter_model.safetensors").read_bytes()


def in_its_place(kept: Path, folder: Path) -> tuple[Path, Path]:
    out = shutil.copytree(kept, folder / "out")
    return out, out


def in_another_place(kept: Path, folder: Path) -> tuple[Path, Path]:
    """From a checkpoint that was copied to some other disk, say, without the run that it is of."""
    moved = folder / "moved"
    shutil.copytree(kept, moved, ignore=lambda at, names: [n for n in names if Path(at) == kept and "check" not in n])
    return moved, folder / "new"


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("where", [in_its_place, in_another_place], ids=lambda where: where.__name__)
def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_best_model_answers_and_evaluations(
    where: Callable, step, kept, llama_folder, files, tmp_path
):
    held, out = where(kept, tmp_path)
    run(llama_folder, output=out, **files, **RISING, keep_best=True, resume_from_checkpoint=held / f"checkpoint-{step}")
    for name in ("adapter_model.safetensors", "eval_metrics.jsonl", "samples.jsonl", "adapter_config.json"):
        assert (out / name).read_bytes() == (kept / name).read_bytes(), name
    assert best_of(out) == best_of(kept)
    for name in ("processes.safetensors", "best/adapter_model.safetensors"):
        assert (out / "checkpoint-6" / name).read_bytes() == (kept / "checkpoint-6" / name).read_bytes()


def test_a_checkpoint_without_its_best_model_is_none(kept, llama_folder, files, tmp_path, capsys):
    out = shutil.copytree(kept, tmp_path / "out")
    (out / "checkpoint-6" / "best" / "adapter_model.safetensors").unlink()
    run(llama_folder, output=out, **files, **RISING, keep_best=True, resume_from_checkpoint="latest")
    said = capsys.readouterr().err
    assert "checkpoint-6 is passed over: best/adapter_model.safetensors is missing" in said
    assert f"the adapter is that of step {best_of(kept)['step']}, with the lowest eval_ce_loss" in said
    assert (out / "adapter_model.safetensors").read_bytes() == (kept / "adapter_model.safetensors").read_bytes()


def test_other_evaluation_rows_or_another_metric_are_another_best(kept, llama_folder, files, tmp_path):
    out = shutil.copytree(kept, tmp_path / "out")
    flags = RISING | dict(keep_best=True, resume_from_checkpoint="latest")
    with pytest.raises(InputError, match="the rows of --eval_data have changed"):
        run(llama_folder, output=out, data=files["data"], eval_data=files["data"], **flags)
    with pytest.raises(InputError, match="eval_metric was ce and is wrong_rate"):
        run(llama_folder, output=out, **files, **flags, eval_metric="wrong_rate")


def test_its_configuration_repeats_the_run(kept, llama_folder, files, tmp_path):
    run(llama_folder, output=tmp_path / "again", **files, config=kept / "noisefit_config.json")
    assert best_of(tmp_path / "again") == best_of(kept)


def test_somebody_s_folder_of_that_name_is_refused_and_ours_is_removed(kept, llama_folder, files, tmp_path):
    out = tmp_path / "out"
    (out / "best").mkdir(parents=True)
    (out / "best" / "mine").write_text("mine")
    flags = RISING | dict(max_steps=1, save_steps=0)
    with pytest.raises(InputError, match="holds a best/ that is not of such a run"):
        run(llama_folder, output=out, **files, **flags, keep_best=True)
    run(llama_folder, output=out, **files, **flags)  # which needs no such name
    assert (out / "best" / "mine").read_text() == "mine"
    other = tmp_path / "other"
    run(llama_folder, output=other, **files, **flags, keep_best=True)
    assert not (other / "best").exists() and best_of(other)["step"] == 1


def test_a_whole_model_is_kept_as_well(llama_folder, files, tmp_path):
    flags = RISING | dict(max_steps=3, learning_rate=0.3, full_finetune=True, keep_best=True)
    out, again = tmp_path / "out", tmp_path / "again"
    run(llama_folder, output=out, **files, **flags)
    found = evaluations(out)
    best = best_of(out)["step"]
    assert best == found.index(min(found)) + 1 < 3
    of_best = load_file(out / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(of_best[name], tensor) for name, tensor in load_file(out / "model.safetensors").items())
    run(llama_folder, output=again, **files, **flags, resume_from_checkpoint=out / "checkpoint-2")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


# --- Patience ---------------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_whole_and_a_resume_of_it_does_not_train_on(kept, llama_folder, files, tmp_path, capsys):
    out, flags = tmp_path / "out", RISING | dict(max_steps=20, epochs=9, logging_steps=50, patience=2, keep_best=True)
    run(llama_folder, output=out, **files, **flags)
    found = evaluations(out)
    best, last = found.index(min(found)) + 1, len(found)
    assert last == best + 2 < 20
    line = f"after step {last} the training ends: 2 evaluations in a row had no lower eval_ce_loss than"
    assert f"{line} {min(found):.6g}, of step {best} (--patience 2)" in capsys.readouterr().err
    assert [row["step"] for row in metrics_of(out)] == [last]  # its line is there, though none was due
    assert {json.loads(row)["step"] for row in (out / "samples.jsonl").read_text().splitlines()} >= {2, last}
    assert (out / f"checkpoint-{last}").is_dir()
    before = {path: path.read_bytes() for path in out.rglob("*.json*") if path.name != "noisefit_files.json"}
    weights = (out / "adapter_model.safetensors").read_bytes()
    run(llama_folder, output=out, **files, **flags, resume_from_checkpoint="latest")
    assert line in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    # With more of it, the run goes on.
    flags |= dict(patience=4, max_steps=20)
    assert metrics_of(out)[-1]["step"] == last
    run(llama_folder, output=out, **files, **flags, resume_from_checkpoint="latest")
    assert len(evaluations(out)) > last


# --- Accuracy and entropy ---------------------------------------------------------------------------------------------

ALL_ROWS = dict(learning_rate=1e-2, epochs=30, warmup_ratio=0.1, logging_steps=1, save_total_limit=0, lora_dropout=0)


@pytest.fixture(scope="module")
def trained(llama_folder, files, tmp_path_factory) -> Path:
    """A run whose steps have all rows, and where some tokens are predicted right; the checkpoint is one before its
    end."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = ALL_ROWS | dict(max_steps=13, save_steps=12, batch_size=12, gradient_accumulation_steps=1)
    run(llama_folder, output=out, data=files["data"], eval_data=files["data"], **flags)
    return out


def expected(model_folder: Path, adapter: Path, data: Path) -> tuple[float, float]:
    """Accuracy and entropy over the rows of a file, by transformers and in float64."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).double().eval()
    examples, _ = make_examples(tokenizer, read_rows(data)[0], 128)
    hits, entropies = [], []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, example.target_start - 1 : -1]
        hits += (logits.argmax(dim=-1) == torch.tensor(example.input_ids[example.target_start :])).tolist()
        entropies += torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).tolist()
    return sum(hits) / len(hits), sum(entropies) / len(entropies)


@pytest.mark.parametrize(
    "cut",
    [
        dict(batch_size=12, gradient_accumulation_steps=1),
        dict(batch_size=3, gradient_accumulation_steps=4, loss_chunk_size=7),
        dict(batch_size=6, gradient_accumulation_steps=2, loss_chunk_size=5, gradient_checkpointing=True),
    ],
    ids=str,
)
def test_accuracy_and_entropy_are_those_of_the_model_however_a_step_is_cut(cut, trained, llama_folder, files, tmp_path):
    flags = ALL_ROWS | dict(max_steps=13, save_steps=0, eval_data=files["data"]) | cut
    checkpoint = trained / "checkpoint-12"
    [*_, line] = run(llama_folder, files["data"], tmp_path / "o", **flags, resume_from_checkpoint=checkpoint)
    accuracy, entropy = expected(llama_folder, checkpoint, files["data"])
    assert 0.1 < accuracy < 1
    assert line["token_accuracy"] == pytest.approx(accuracy) and line["entropy"] == pytest.approx(entropy, rel=1e-5)
    accuracy, entropy = expected(llama_folder, tmp_path / "o", files["data"])  # after that step
    assert evaluations(tmp_path / "o", "eval_token_accuracy")[-1] == pytest.approx(accuracy)
    assert evaluations(tmp_path / "o", "eval_entropy")[-1] == pytest.approx(entropy, rel=1e-5)


def test_rows_that_are_packed_and_two_processes_have_the_same(llama_folder, files, tmp_path):
    flags = dict(max_steps=2, epochs=9, learning_rate=1e-2, logging_steps=1, save_steps=0, lora_dropout=0,
                 num_noise_layers=0)  # fmt: skip
    plain = run(llama_folder, files["data"], tmp_path / "a", **flags, batch_size=6, gradient_accumulation_steps=2)
    packed = dict(batch_size=6, gradient_accumulation_steps=2, packing=True)
    lines = {"packed": run(llama_folder, files["data"], tmp_path / "b", **flags, **packed)}
    both = start(llama_folder, files["data"], tmp_path / "c", 2, **flags, batch_size=3, gradient_accumulation_steps=2)
    assert wait(both) == [0, 0], Path(f"{tmp_path / 'c'}.log").read_text()[-2000:]
    lines["two processes"] = metrics_of(tmp_path / "c")
    for how, found in lines.items():
        for one, other in zip(plain, found, strict=True):
            for name in ("token_accuracy", "entropy"):
                assert other[name] == pytest.approx(one[name], rel=1e-5), (how, name)


# --- What is refused, each before the model is loaded -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(sample_steps=5), "--sample_steps goes by evaluation rows, and there are none; give --eval_data"),
        (dict(keep_best=True), "--keep_best goes by evaluation rows"),
        (dict(patience=1), "--patience goes by evaluation rows"),
        (dict(eval_metric="wrong_rate"), "--eval_metric goes by evaluation rows"),
        (dict(sample_steps=5, loss_on="all", eval_data="e"), "--sample_steps answers prompts, and under --loss_on all"),
        (dict(eval_metric="hallucination_rate", loss_on="all", eval_data="e"), "--eval_metric hallucination_rate answ"),
        (dict(patience=-1, eval_data="e"), "--patience: "),
    ],
    ids=str,
)
def test_settings_that_cannot_do_anything_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        Settings(model="m", train_data="t", **flags)


def test_a_prompt_that_leaves_no_positions_for_an_answer_is_refused(llama_folder, files, tmp_path):
    with pytest.raises(InputError, match=r"tokens, which with --sample_tokens 100 exceeds the model's 128 positions"):
        run(llama_folder, output=tmp_path / "o", **files, sample_steps=1, sample_tokens=100)
    assert not (tmp_path / "o").exists()


def test_a_sharded_model_does_not_answer():
    settings = Settings(model="m", train_data="t", eval_data="e", eval_metric="wrong_rate")
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=None))
    for kind, refused in ((DistributedType.FSDP, True), (DistributedType.MULTI_GPU, False)):
        accelerator = SimpleNamespace(distributed_type=kind)
        try:
            check_answering(settings, config, accelerator, [Example([1, 2], 1)])
            assert not refused
        except InputError as error:
            assert refused and "which FSDP shards" in str(error)
