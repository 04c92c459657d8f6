"""`--cache_teacher`: the same run without the teacher's passes, no stale predictions, and nobody's files lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import MEASURED, metrics_of, run, start, wait
from safetensors.torch import load_file, save_file

from noisefit.base.errors import InputError
from noisefit.method.teacher import BaseModel
from noisefit.run import teacher_cache
from noisefit.run.settings import Settings

pytestmark = pytest.mark.slow

FAST = dict(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, logging_steps=1, epochs=1, save_steps=2,
            loss_mode="ce_teacher", teacher="base", max_steps=4, temperature=1.5, loss_chunk_size=16)  # fmt: skip
WHOLE = 10**6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "q.csv"
    path.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}{' or so' * (i % 3)}.\n" for i in range(18)))
    return path


def losses(lines):
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def no_pass(monkeypatch):
    """From now on the teacher computes nothing."""

    def never(*arguments):
        raise AssertionError("a pass of the teacher")

    monkeypatch.setattr(BaseModel, "passing", never)


@pytest.fixture(scope="module")
def cached(llama_folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached") / "out"
    run(llama_folder, data, out, **FAST, cache_teacher=WHOLE, save_total_limit=0)
    return out


def test_with_the_whole_vocabulary_it_is_the_same_run(cached, llama_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "PART_ROWS", 5)
    plain = run(llama_folder, data, tmp_path / "plain", **FAST)
    parts = run(llama_folder, data, tmp_path / "parts", **FAST, cache_teacher=WHOLE)
    assert len(list((tmp_path / "parts" / "teacher_cache").glob("part-*"))) == 4
    for line, other, third in zip(plain, metrics_of(cached), parts, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), name
            assert other[name] == pytest.approx(third[name], rel=1e-5, abs=1e-6), name
    assert plain[-1]["soft_loss"] > 1e-3


def test_a_few_tokens_are_a_smaller_file_and_a_smaller_divergence(cached, llama_folder, data, tmp_path):
    lines = run(llama_folder, data, tmp_path / "out", **FAST, cache_teacher=8)
    sizes = [(out / "teacher_cache" / "part-00000.safetensors").stat().st_size for out in (tmp_path / "out", cached)]
    assert sizes[0] < sizes[1] / 20
    whole = metrics_of(cached)
    assert lines[1]["ce_loss"] == pytest.approx(whole[1]["ce_loss"], rel=1e-4)  # the soft term begins at 0
    assert 0 < lines[1]["soft_loss"] < whole[1]["soft_loss"]
    tensors = load_file(tmp_path / "out" / "teacher_cache" / "part-00000.safetensors")
    assert torch.allclose(tensors["log_probs"].exp().sum(-1), torch.ones(()), atol=1e-5)
    with pytest.raises(InputError, match="cache_teacher was 8 and is 9"):
        run(llama_folder, data, tmp_path / "out", **FAST, cache_teacher=9, resume_from_checkpoint="latest")


def test_a_run_that_is_resumed_or_repeated_computes_nothing_again(cached, llama_folder, data, tmp_path, monkeypatch,
                                                                  capsys):  # fmt: skip
    out = shutil.copytree(cached, tmp_path / "out")
    no_pass(monkeypatch)
    flags = FAST | dict(cache_teacher=WHOLE, save_total_limit=0)
    run(llama_folder, data, out, **flags, resume_from_checkpoint=out / "checkpoint-2")
    assert losses(metrics_of(out)) == losses(metrics_of(cached))
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (cached / name).read_bytes()
    run(llama_folder, data, out, **flags, overwrite_output=True)
    assert (out / name).read_bytes() == (cached / name).read_bytes()
    assert capsys.readouterr().err.count("the teacher's predictions of 18 rows are those in") == 2


def test_its_files_are_the_run_s_and_go_with_it(cached, llama_folder, data, tmp_path):
    out = shutil.copytree(cached, tmp_path / "out")
    entry = json.loads((out / "noisefit_files.json").read_text())["files"]["teacher_cache/"]
    assert entry.keys() == {"about.json", "part-00000.safetensors"}
    run(llama_folder, data, out, **FAST, overwrite_output=True)
    assert not (out / "teacher_cache").exists()
    (out / "teacher_cache").mkdir()
    (out / "teacher_cache" / "mine").write_text("mine")
    with pytest.raises(InputError, match="holds a teacher_cache/ that is not of such a run"):
        run(llama_folder, data, out, **FAST, cache_teacher=WHOLE, overwrite_output=True)
    run(llama_folder, data, out, **FAST, overwrite_output=True)
    assert (out / "teacher_cache" / "mine").read_text() == "mine"


def edit_rows(out, data, model):
    data.write_text(data.read_text().replace("It is 7 or so.", "It is 8 or so."))


def damage(out, data, model):
    path = out / "teacher_cache" / "part-00000.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"log_probs": tensors["log_probs"] * 2}, path)


def cut(out, data, model):
    path = out / "teacher_cache" / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def add_a_part(out, data, model):
    """Of the same rows, with other predictions: it is no file of the run's."""
    tensors = load_file(out / "teacher_cache" / "part-00000.safetensors")
    save_file(tensors | {"log_probs": tensors["log_probs"] * 2}, out / "teacher_cache" / "part-00001.safetensors")


def other_weights(out, data, model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [edit_rows, damage, cut, add_a_part, other_weights])
def test_predictions_of_something_else_are_not_used(change, cached, llama_folder, data, tmp_path):
    out, model = shutil.copytree(cached, tmp_path / "out"), shutil.copytree(llama_folder, tmp_path / "model")
    rows = tmp_path / "q.csv"
    shutil.copyfile(data, rows)
    change(out, rows, model)
    before = (cached / "teacher_cache" / "part-00000.safetensors").read_bytes()
    lines = run(model, rows, out, **FAST, cache_teacher=WHOLE, overwrite_output=True)
    fresh = run(model, rows, tmp_path / "fresh", **FAST, cache_teacher=WHOLE)
    assert losses(lines) == losses(fresh)
    now = (out / "teacher_cache" / "part-00000.safetensors").read_bytes()
    assert (now == before) == (change in (damage, cut, add_a_part))


def test_two_processes_make_the_cache_of_one(llama_folder, tmp_path):
    """9 rows: in the second step a process has none."""
    data = tmp_path / "data.csv"
    data.write_text("prompt,response\n" + "".join(f"Is it {i}?,It is {i}{' or so' * i}.\n" for i in range(9)))
    flags = FAST | dict(lora_dropout=0, epochs=2, cache_teacher=20)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = wait(start(llama_folder, data, out, processes, **flags | dict(batch_size=4 // processes)))
        assert done == [0] * processes, Path(f"{out}.log").read_text()
    one, two = (metrics_of(tmp_path / name) for name in ("1", "2"))
    for line, other in zip(one, two, strict=True):
        for name in ("loss", "ce_loss", "soft_loss", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-7), (line["step"], name)
    assert one[-1]["soft_loss"] > 1e-4
    found = [dict(rows_of(tmp_path / name)) for name in ("1", "2")]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 9
    for digest, log_probs in found[0].items():
        torch.testing.assert_close(found[1][digest], log_probs, rtol=1e-4, atol=1e-4)


def rows_of(out):
    tensors = load_file(out / "teacher_cache" / "part-00000.safetensors")
    parts = tensors["log_probs"].split(tensors["counts"].tolist())
    return zip([bytes(digest) for digest in tensors["digests"].tolist()], parts, strict=True)


@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_predictions_that_change_are_not_kept(teacher):
    with pytest.raises(InputError, match=f"--cache_teacher keeps .* those of --teacher {teacher} do; give"):
        Settings(model="m", train_data="t", teacher=teacher, cache_teacher=5)
