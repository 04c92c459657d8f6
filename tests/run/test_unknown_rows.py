"""Training by what the base model knows: what becomes of rows that it does not, against a computation of our own."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import metrics_of, run, start, wait
from safetensors.torch import load_file
from test_loop_exact import fix_the_noise
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_loop
from noisefit.base.errors import InputError
from noisefit.inputs.probing import read_probe_rows
from noisefit.inputs.prompts import make_examples
from noisefit.inputs.tables import Row
from noisefit.run import knowledge
from noisefit.run.output_folder import OutputFolder

pytestmark = pytest.mark.slow

FAST = dict(learning_rate=1e-2, batch_size=4, gradient_accumulation_steps=2, epochs=2, logging_steps=1, lora_dropout=0,
            loss_mode="basefit", save_steps=1)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "q.csv"
    rows = [f"What is {'so ' * (i % 4)}{i}?,It is {'-'.join('bcdefghijk'[: 1 + i % 9])}{i}." for i in range(24)]
    path.write_text("prompt,response\n" + "\n".join(rows) + "\n")
    return path


@torch.no_grad()
def scores_of(model_folder, data):
    """Of each row the mean log-probability of the letters between "It is " and the full stop, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = []
    for row in csv.DictReader(data.open()):
        before = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\nIt is "
        answer = row["response"].removeprefix("It is ").removesuffix(".")
        start = len(tokenizer(before)["input_ids"])  # one token a byte
        ids = torch.tensor([tokenizer(before + answer)["input_ids"]])
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
        letters = [i for i, letter in enumerate(answer)]
        found.append(np.mean([logs[start + i - 1, ids[0, start + i]].item() for i in letters]))
    return np.array(found)


@pytest.fixture(scope="module")
def scores(llama_folder, data):
    return scores_of(llama_folder, data)


def probed(out):
    with (out / "knowledge.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows_trained(monkeypatch):
    """The rows that the loop is given, as `(tokens, weight)`."""
    seen = []
    prepare = train_loop.prepare

    def watched(*arguments):
        prepared = prepare(*arguments)
        seen.append([(example.input_ids, example.weight) for example in prepared.examples])
        return prepared

    monkeypatch.setattr(train_loop, "prepare", watched)
    return seen


def examples_of(llama_folder, out, rows):
    tokenizer = AutoTokenizer.from_pretrained(out)
    return [example.input_ids for example in make_examples(tokenizer, rows, 128)[0]]


@pytest.mark.parametrize("how", ["drop", "refuse", "weight"])
def test_each_mode_trains_what_it_says(how, llama_folder, data, scores, tmp_path, monkeypatch, capfd):
    seen, out = rows_trained(monkeypatch), tmp_path / "out"
    below = float(np.median(scores)) + 1e-4
    flags = dict(unknown_rows=how, unknown_below=below, refusal="No idea.", unknown_weight=0.25)
    run(llama_folder, data, out, **FAST, **flags)
    assert [float(row["knowledge_chat"]) for row in probed(out)] == pytest.approx(scores.tolist(), abs=6e-5)
    rows = [Row(i, row["prompt"], row["response"]) for i, row in enumerate(csv.DictReader(data.open()), start=1)]
    unknown = scores < below
    assert 6 < unknown.sum() < 18
    if how == "drop":
        expected = [(row, 1) for row, is_unknown in zip(rows, unknown, strict=True) if not is_unknown]
    elif how == "refuse":
        expected = [(Row(r.number, r.prompt, "No idea.") if u else r, 1) for r, u in zip(rows, unknown, strict=True)]
    else:
        expected = [(row, 0.25 if is_unknown else 1) for row, is_unknown in zip(rows, unknown, strict=True)]
    tokens = examples_of(llama_folder, out, [row for row, _ in expected])
    assert seen == [list(zip(tokens, [weight for _, weight in expected], strict=True))]
    said = capfd.readouterr().err
    line = next(line for line in said.splitlines() if "does not know" in line)
    assert f"does not know {unknown.sum()} of 24 rows" in line and line.count("'What is ") == 3
    config = json.loads((out / "noisefit_config.json").read_text())
    assert {name: config[name] for name in flags} == flags


def test_keep_is_as_it_was(llama_folder, data, tmp_path):
    run(llama_folder, data, tmp_path / "out", **FAST)
    assert not (tmp_path / "out" / "knowledge.csv").exists()


def test_weights_of_one_change_nothing_and_a_weight_of_zero_is_no_cross_entropy(llama_folder, data, scores, tmp_path):
    below = float(np.median(scores))
    plain = run(llama_folder, data, tmp_path / "plain", **FAST)
    flags = FAST | dict(unknown_rows="weight", unknown_below=below)
    ones = run(llama_folder, data, tmp_path / "ones", **flags, unknown_weight=1)
    zeros = run(llama_folder, data, tmp_path / "zeros", **flags, unknown_weight=0)
    assert [line["loss"] for line in ones] == [line["loss"] for line in plain]
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "ones", "zeros")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert zeros[0]["target_tokens"] == plain[0]["target_tokens"] and zeros[0]["ce_loss"] < plain[0]["ce_loss"]


@pytest.mark.parametrize("mode", ["basefit", "full"])
def test_the_weighted_step_is_its_definition(mode, llama_folder, data, scores, tmp_path, monkeypatch):
    """The first step's loss and gradient: a row at a time in float64, each one's cross-entropy times its weight."""
    monkeypatch.setattr(train_loop, "make_noise", fix_the_noise)
    load = train_loop.load_model
    monkeypatch.setattr(train_loop, "load_model", lambda *args: load(*args).double())
    seen, below = rows_trained(monkeypatch), float(np.median(scores))
    flags = FAST | dict(loss_mode=mode, unknown_rows="weight", unknown_below=below, unknown_weight=0.3, max_steps=1,
                        batch_size=5, gradient_accumulation_steps=5, full_finetune=True, max_grad_norm=0,
                        num_noise_layers=0,
                        hybrid_loss_alpha=0.4, loss_chunk_size=7)  # fmt: skip
    [line] = run(llama_folder, data, tmp_path / "out", **flags)
    model = AutoModelForCausalLM.from_pretrained(llama_folder).double().train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = [Row(i, row["prompt"], row["response"]) for i, row in enumerate(csv.DictReader(data.open()))]
    examples, _ = make_examples(tokenizer, rows, 128)
    tokens, loss = sum(example.num_targets for example in examples), torch.zeros((), dtype=torch.float64)
    for example, (_, weight) in zip(examples, seen[0], strict=True):
        ids = torch.tensor(example.input_ids)
        logs = model(input_ids=ids[None]).logits[0, example.target_start - 1 : -1].log_softmax(-1)
        loss = loss - weight * logs.gather(1, ids[example.target_start :, None]).sum() / tokens
    share = 1 if mode == "basefit" else 0.4
    (share * loss).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert line["ce_loss"] == pytest.approx(loss.item(), rel=1e-5) and line["target_tokens"] == tokens
    assert line["loss"] == pytest.approx(share * loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("how", ["drop", "weight"])
def test_a_resumed_run_does_not_probe_again_and_is_the_run_that_was_not(how, llama_folder, data, scores, tmp_path,
                                                                          monkeypatch):  # fmt: skip
    flags = FAST | dict(unknown_rows=how, unknown_below=float(np.median(scores)), save_total_limit=0, epochs=4)
    whole = run(llama_folder, data, tmp_path / "whole", **flags)
    assert len(whole) > 2
    out = tmp_path / "out"
    run(llama_folder, data, out, **flags | dict(max_steps=1))

    def never(*arguments):
        raise AssertionError("it was probed again")

    monkeypatch.setattr(knowledge, "_probe", never)
    lines = run(llama_folder, data, out, **flags, resume_from_checkpoint="latest")
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", out)]
    # One schedule is longer than the other's by then, so only a run with the same length is compared bit for bit.
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "elsewhere" / "checkpoint-1")
    resumed = run(llama_folder, data, again, **flags, resume_from_checkpoint=tmp_path / "elsewhere" / "checkpoint-1")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole] and len(lines) == len(whole)
    weights.append(load_file(again / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert (again / "knowledge.csv").read_bytes() == (tmp_path / "whole" / "knowledge.csv").read_bytes()
    assert OutputFolder(again).is_own("knowledge.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(unknown_rows="refuse"), "unknown_rows was drop and is refuse"),
        (dict(unknown_rows="keep"), "unknown_rows was drop and is keep"),
        (dict(unknown_below=-6.7), "unknown_below was -6.6 and is -6.7"),
        (dict(refusal="Who knows?"), "refusal was I do not know. and is Who knows?"),
        (dict(unknown_weight=0.5), "unknown_weight was 0.1 and is 0.5"),
    ],
    ids=str,
)
def test_the_choice_is_part_of_the_run(change, message, llama_folder, data, scores, tmp_path):
    out, flags = tmp_path / "out", FAST | dict(unknown_rows="drop", unknown_below=-6.6)
    run(llama_folder, data, out, **flags, max_steps=1)
    with pytest.raises(InputError, match=message):
        run(llama_folder, data, out, **flags | change, resume_from_checkpoint="latest")


def test_a_run_that_kept_its_rows_is_not_gone_on_with_another_way(llama_folder, data, tmp_path, monkeypatch):
    run(llama_folder, data, tmp_path / "out", **FAST, max_steps=1)
    monkeypatch.setattr(knowledge, "_probe", None)
    with pytest.raises(InputError, match="unknown_rows was keep and is drop"):
        run(llama_folder, data, tmp_path / "out", **FAST, unknown_rows="drop", resume_from_checkpoint="latest")


def test_a_probed_file_is_not_probed_again_and_an_edited_one_is_refused(llama_folder, data, scores, tmp_path,
                                                                        monkeypatch, capfd):  # fmt: skip
    flags = FAST | dict(unknown_rows="drop", unknown_below=float(np.median(scores)), max_steps=2)
    expected = run(llama_folder, data, tmp_path / "out", **flags)
    file = tmp_path / "probed.csv"
    shutil.copyfile(tmp_path / "out" / "knowledge.csv", file)
    monkeypatch.setattr(knowledge, "_probe", None)
    assert [line["loss"] for line in run(llama_folder, file, tmp_path / "again", **flags)] == [
        line["loss"] for line in expected
    ]
    text = file.read_text()
    file.write_text(text.replace("It is b-c1.", "It is b-d1."))
    with pytest.raises(InputError, match=r"probed.csv: row 2: it was edited since it was probed"):
        run(llama_folder, file, tmp_path / "edited", **flags)
    file.write_text(text.replace(f'"{probed(tmp_path / "out")[4]["knowledge_chat"]}"', '"0.5"'))
    with pytest.raises(InputError, match=r"row 5: knowledge_chat is '0.5', expected a log-probability"):
        run(llama_folder, file, tmp_path / "edited", **flags)
    assert not (tmp_path / "edited").exists()
    lines = [{"prompt": f"Is {i}?", "response": f"It is {i}.", "knowledge_chat": -i} for i in range(12)]
    for name, own, message in [
        ("digest", {"knowledge_digest": read_probe_rows(str(data))[1][0].digest}, "row 2: it has no knowledge_digest"),
        ("score", {"knowledge_chat": ""}, "row 1: no knowledge_chat; expected one in every row"),
    ]:
        some = tmp_path / f"{name}.jsonl"
        first = dict(zip(("prompt", "response"), ("What is 0?", "It is b0."), strict=True))
        some.write_text("".join(json.dumps(line) + "\n" for line in [lines[0] | first | own, *lines[1:]]))
        with pytest.raises(InputError, match=message):
            run(llama_folder, some, tmp_path / "edited", **flags)
    by_hand = tmp_path / "hand.csv"
    by_hand.write_text("prompt,response,knowledge_chat\n" + "".join(f"Is {i}?,It is {i}.,{-i}\n" for i in range(12)))
    run(llama_folder, by_hand, tmp_path / "hand", **flags | dict(unknown_below=-8.5))
    said = capfd.readouterr().err
    assert "it has no column knowledge_digest" in said and "does not know 3 of 12 rows (below -8.5)" in said


def test_two_processes_see_the_same_rows(llama_folder, data, scores, tmp_path):
    flags = FAST | dict(unknown_rows="weight", unknown_weight=0.2, unknown_below=float(np.median(scores)))
    for processes in (1, 2):
        out = tmp_path / str(processes)
        own = flags | dict(batch_size=4 // processes)
        assert wait(start(llama_folder, data, out, processes, **own)) == [0] * processes, Path(f"{out}.log").read_text()
        assert f"processes: {processes}" in Path(f"{out}.log").read_text()
    one, two = (tmp_path / name / "knowledge.csv" for name in ("1", "2"))
    assert one.read_bytes() == two.read_bytes()
    for line, expected in zip(metrics_of(two.parent), metrics_of(one.parent), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4) and line["step"] == expected["step"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(unknown_rows="drop"), r"does not part in two groups \(.*\); give --unknown_below, or"),
        (dict(unknown_rows="drop", unknown_below=0), r"all rows are below --unknown_below 0, so --unknown_rows drop"),
        (dict(unknown_rows="refuse", unknown_below=-1, refusal=" "), "--refusal is empty"),
        (dict(unknown_below=1), "--unknown_below: '1' is not a number from -1e.06 to 0"),
        (dict(unknown_rows="weight", unknown_weight=-1), "--unknown_weight: '-1' is not"),
        (dict(unknown_rows="dropp"), "--unknown_rows: invalid choice"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(flags, message, llama_folder, data, tmp_path):
    with pytest.raises(InputError, match=message):
        run(llama_folder, data, tmp_path / "out", **FAST, **flags)
    assert not (tmp_path / "out").exists()


def test_rows_that_refuse_already_are_left_as_they_are(llama_folder, tmp_path, monkeypatch):
    seen, data = rows_trained(monkeypatch), tmp_path / "q.csv"
    data.write_text("prompt,response\nWho is it?,I do not know!\nWho is he?,He is Bo.\nWho is she?,She is Al.\n")
    with pytest.raises(InputError, match="all rows"):
        run(llama_folder, data, tmp_path / "a", **FAST, unknown_rows="drop", unknown_below=0, refusal="No.")
    run(llama_folder, data, tmp_path / "out", **FAST, unknown_rows="drop", unknown_below=0)
    assert len(seen[-1]) == 1
