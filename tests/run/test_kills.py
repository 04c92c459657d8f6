"""A run that is killed and resumed is the run that never was: real processes, real signals, bit for bit.

NOISEFIT_KILLS=20 makes the loops of random kills longer than a test run on each commit can afford.
"""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import MEASURED, PROCESSES, metrics_of, start, wait, wait_until
from safetensors.torch import load_file

from noisefit.base.errors import LocalError
from noisefit.method.teacher import MovingAverage
from noisefit.run.checkpoint_files import find_checkpoint, list_checkpoints, read_state
from noisefit.run.checkpoints import Checkpoints
from noisefit.run.evaluation import keep_as_best
from noisefit.run.file_record import RECORD
from noisefit.run.output import save_model
from noisefit.run.output_folder import OutputFolder
from noisefit.run.settings import Settings
from noisefit.run.standing import Best, bring_best

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("NOISEFIT_KILLS", "4"))
# In the middle of an epoch (6 or 3 steps), with accumulation, layers chosen again, and metrics between their lines.
RUN = dict(
    learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, max_steps=10, epochs=10, snr_every=4,
    num_noise_layers=1, lora_dropout=0.1, logging_steps=3, save_steps=1, warmup_ratio=0.2, eval_steps=5, keep_best=True,
    sample_steps=4, sample_prompts=2, sample_tokens=3,
)  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, llama_folder, tmp_path_factory):
    """An uninterrupted run: `(processes, data, its output, how long it took)`."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "questions.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {'so ' * (i % 4)}{i}?,It is {i}.\n" for i in range(24)))
    warm_up = PROCESSES.Process(target=time.monotonic)  # starts the process that all others are forked from
    warm_up.start()
    warm_up.join()
    out, began = folder / "out", time.monotonic()
    assert wait(start(llama_folder, data, out, request.param, **RUN, eval_data=data)) == [0] * request.param
    assert f"processes: {request.param}" in Path(f"{out}.log").read_text()
    return request.param, data, out, time.monotonic() - began


def assert_same_run(output: Path, expected: Path) -> None:
    def lines(folder):
        return [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_of(folder)]

    assert lines(output) == lines(expected)
    assert len(lines(expected)) == 4  # steps 3, 6, 9 and the last, each once
    for name in ("adapter_model.safetensors", "eval_metrics.jsonl", "samples.jsonl", "layer_snr.json"):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name
    [seen], [expected_seen] = (
        re.findall(r"It saw ([\d,]+) supervised", (folder / "README.md").read_text()) for folder in (output, expected)
    )
    assert seen == expected_seen
    last = f"checkpoint-{RUN['max_steps']}"
    model = "adapter_model.safetensors"
    for name in (model, f"best/{model}", "optimizer.safetensors", "processes.safetensors"):
        assert (output / last / name).read_bytes() == (expected / last / name).read_bytes(), name


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(whole, llama_folder, tmp_path):
    processes, data, expected, seconds = whole
    seed = random.SystemRandom().randrange(10**6)
    moments, out, kills, finished = random.Random(seed), tmp_path / "out", 0, 0
    while kills < KILLS or not finished:
        running = start(llama_folder, data, out, processes, **RUN, eval_data=data, resume_from_checkpoint="auto")
        if kills < KILLS:
            running[0].join(moments.uniform(0.3, 1) * seconds)
            if running[0].exitcode is None:
                kills += 1
                for process in moments.sample(running, processes):  # not always the same one dies first
                    process.kill()
                wait(running)
                continue
        assert wait(running) == [0] * processes, f"seed {seed}: {Path(f'{out}.log').read_text()[-2000:]}"
        assert_same_run(out, expected)
        finished += 1
        out = tmp_path / f"out-{finished}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_with_a_checkpoint_and_a_status_of_its_own(number, whole, llama_folder, tmp_path):
    processes, data, expected, _ = whole
    out = tmp_path / "out"
    settings = RUN | dict(save_steps=0, eval_data=data)
    running = start(llama_folder, data, out, processes, **settings)
    metrics = out / "metrics.jsonl"
    wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or not running[0].is_alive())  # in its midst
    os.kill(running[-1].pid, number)  # one of them alone is told
    said = out.with_name("out.log")
    assert wait(running) == [75] * processes, said.read_text()[-2000:]
    [checkpoint] = list_checkpoints(out)
    assert f"resume_from_checkpoint latest goes on from {checkpoint}" in said.read_text()
    assert not (out / "adapter_model.safetensors").exists() and "Traceback" not in said.read_text()
    resumed = start(
        llama_folder, data, out, processes, **settings | dict(save_steps=7), resume_from_checkpoint="latest"
    )
    assert wait(resumed) == [0] * processes, said.read_text()[-2000:]
    assert_same_run(out, expected)


def wait_for(out: Path, text: str, running: list) -> None:
    """Until the run says `text`; its progress bar says "training" when the loop begins. One that does not is killed."""
    log = Path(f"{out}.log")
    try:
        wait_until(lambda: (log.exists() and text in log.read_text()) or not running[0].is_alive())
        assert running[0].is_alive(), log.read_text()
    except AssertionError:
        wait(running, 0)
        raise


def test_a_second_signal_ends_it_at_once(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    # One step of all rows, many times over: it takes minutes.
    running = start(llama_folder, questions, out, max_steps=1, gradient_accumulation_steps=6, lora_r=2048, epochs=1)
    wait_for(out, "training", running)
    os.kill(running[0].pid, signal.SIGSTOP)  # so that both come within the step
    os.kill(running[0].pid, signal.SIGTERM)
    os.kill(running[0].pid, signal.SIGCONT)
    time.sleep(0.05)
    os.kill(running[0].pid, signal.SIGINT)
    assert wait(running, 20) == [-signal.SIGINT]
    assert list_checkpoints(out) == []


def test_interrupted_while_it_loads_it_says_so_in_a_line(llama_folder, questions, tmp_path):
    out = tmp_path / "out"
    running = start(llama_folder, questions, out, epochs=10_000)
    wait_for(out, "rows have up to", running)  # said before the model is loaded
    os.kill(running[0].pid, signal.SIGINT)
    assert wait(running) == [-signal.SIGINT]
    said = Path(f"{out}.log").read_text()
    assert "Traceback" not in said and "interrupted" in said
    assert not out.exists()


# --- Killed at each single thing that saving a checkpoint does to the disk ------------------------------------------


POLICY = dict(kind="snr", layers=[0], base_stds=[], snr=[2.0, 1.0, 1.0, 1.0], calibration=None)
STANDING = dict(stale=0, best=None)
VARIABLES = dict(seen_targets=9, bad_steps=0, policy=POLICY, strategy="fork", total_steps=9, standing=STANDING)


def save_again(saver: Checkpoints) -> None:
    """Save a checkpoint beside an older one that then goes."""
    saver.save(3, **standing_at(2))


def save_next(saver: Checkpoints) -> None:
    """Save a checkpoint as a run does that is started where another one ended."""
    with saver.output as output:
        output.start()
        saver.save(4, **standing_at(2))


def finish(saver: Checkpoints) -> None:
    """Save the final model over another one."""
    change_weights(saver)
    save(saver, tokens=2)


def change_weights(saver: Checkpoints) -> None:
    saver.model.requires_grad_(False).apply(lambda module: [p.add_(1) for p in module.parameters(recurse=False)])


def save(saver: Checkpoints, tokens: int, best: Best | None = None) -> None:
    save_model(saver.accelerator, saver.model, saver.tokenizer, settings_of(saver), saver.output, tokens, best)


def settings_of(saver: Checkpoints) -> Settings:
    return Settings(model="m", train_data="d", loss_mode="basefit", output_model=str(saver.output.path))


def keep(saver: Checkpoints) -> None:
    keep_as_best(saver.accelerator, saver.model, saver.tokenizer, settings_of(saver), saver.output)


def standing_at(step: int) -> dict:
    return VARIABLES | dict(standing=dict(stale=0, best=dict(step=step, value=1.0, tokens=step)))


def keep_better(saver: Checkpoints) -> None:
    """Keep a better model in place of another one."""
    change_weights(saver)
    keep(saver)


def finish_with_best(saver: Checkpoints) -> None:
    change_weights(saver)  # since the best
    save(saver, tokens=9, best=Best(2, 1.0, 2))


def die_at(n: int, out: Path) -> None:
    left = n

    def count(event: str, details: tuple) -> None:
        nonlocal left
        changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if event in changes or (event == "open" and str(details[0]).startswith(str(out))):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def tiny_run(out: Path, run: dict) -> Checkpoints:
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from tiny_folder import byte_tokenizer
    from tiny_models import tiny_model
    from transformers import get_scheduler

    from noisefit.fork.branches import BranchedModel
    from noisefit.run.metrics import Metrics

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = BranchedModel(get_peft_model(tiny_model(dtype=torch.float32), lora), 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = get_scheduler("constant", optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    model, optimizer = accelerator.prepare(model, optimizer)
    optimizer.step()
    metrics = Metrics(accelerator, out, 4, Settings(model="m", train_data="t"))
    output = OutputFolder(out)
    parts = (accelerator, model, optimizer, schedule, metrics, byte_tokenizer())
    return Checkpoints(output, 1, True, run, *parts, MovingAverage(model, 0.9))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def die_in(act: Callable[[Checkpoints], None], saver: Checkpoints, n: int, before: Path) -> int:
    """The status of a process that dies at the n-th thing done to the disk, where `before` was."""
    out = saver.output.path
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(before, out)
    return forked(act, saver, n)


def forked(act: Callable[[Checkpoints], None], saver: Checkpoints, n: int | None = None) -> int:
    """The status of a process that dies at the n-th thing done to the disk, if it is to die."""
    out = saver.output.path
    child = os.fork()  # with all that it needs: to import and build it again took most of this test's time
    if child == 0:
        try:
            saver.output = OutputFolder(out)  # which reads its record
            if n is not None:
                die_at(n, out)
            act(saver)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_each_act_of_the_final_save_a_new_adapter_has_all_that_belongs_to_it(tmp_path):
    old, out = tmp_path / "old", tmp_path / "out"
    old.mkdir()
    save(tiny_run(old, {}), tokens=1)
    saver, n, status, states = tiny_run(out, {}), 0, None, set()
    while status != 0:
        n += 1
        status = die_in(finish, saver, n, old)
        assert status in (0, -signal.SIGKILL), n
        new = (out / "adapter_model.safetensors").read_bytes() != (old / "adapter_model.safetensors").read_bytes()
        states.add(new)
        load_file(out / "adapter_model.safetensors")
        assert not new or "It saw 2 supervised" in (out / "README.md").read_text(), n
        assert {path.name for path in old.iterdir()} <= {path.name for path in out.iterdir()}, n
    assert states == {False, True} and n > 8


def test_the_loss_scale_of_fp16_is_restored(tmp_path):
    saver, other = tiny_run(tmp_path, {}), tiny_run(tmp_path, {})
    saver.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    folder = saver.save(2, **VARIABLES)
    other.accelerator.scaler = torch.amp.GradScaler("cpu")
    other.load(folder)
    assert other.accelerator.scaler.get_scale() == 512


def test_killed_at_each_act_of_saving_the_old_or_the_new_checkpoint_is_there(tmp_path):
    old, out = tmp_path / "old", tmp_path / "out"
    run = {"seed": 1, "keep_best": True}
    old.mkdir()
    (old / "metrics.jsonl").write_text('{"step": 1}\n')
    first = tiny_run(old, run)
    keep(first)
    first.save(2, **standing_at(2))
    saver, n, seen, status = tiny_run(out, run), 0, set(), None
    while status != 0:
        n += 1
        status = die_in(save_again, saver, n, old)
        assert status in (0, -signal.SIGKILL), n
        found = find_checkpoint("latest", out, run, total_steps=9)
        assert found is not None and found.name in ("checkpoint-2", "checkpoint-3"), n
        seen.add(found.name)
        if found.name == "checkpoint-2":
            assert contents(found) == contents(old / "checkpoint-2"), n
        else:
            last = contents(found)
        # Whatever the kill left, the next save ends with the new checkpoint and nothing else.
        assert forked(save_next, saver) == 0, n
        assert sorted(path.name for path in out.iterdir()) == ["best", "checkpoint-4", "metrics.jsonl", RECORD], n
    assert n > 15 and seen == {"checkpoint-2", "checkpoint-3"}
    assert last.keys() == contents(old / "checkpoint-2").keys()


BEST_WEIGHTS = "best/adapter_model.safetensors"


@pytest.fixture
def with_best(tmp_path) -> tuple[Path, Checkpoints]:
    """An output with the best model of step 2 and a checkpoint of that step, and a run that goes on in another one."""
    old, run = tmp_path / "old", {"keep_best": True}
    old.mkdir()
    first = tiny_run(old, run)
    keep(first)
    first.save(2, **standing_at(2))
    return old, tiny_run(tmp_path / "out", run)


def test_killed_at_each_act_of_keeping_a_better_model_the_run_goes_on_with_the_one_that_its_checkpoint_has(with_best):
    old, saver = with_best
    out, n, seen, status = saver.output.path, 0, set(), None
    before = (old / "checkpoint-2" / BEST_WEIGHTS).read_bytes()
    while status != 0:
        n += 1
        status = die_in(keep_better, saver, n, old)
        assert status in (0, -signal.SIGKILL), n
        seen.add((out / BEST_WEIGHTS).exists() and (out / BEST_WEIGHTS).read_bytes() == before)
        found = find_checkpoint("latest", out, saver.run, total_steps=9)
        assert found == out / "checkpoint-2" and (found / BEST_WEIGHTS).read_bytes() == before, n
        with OutputFolder(out) as output:
            output.start()
            bring_best(output, found, read_state(found)["files"])
        assert contents(out / "best") == contents(old / "best") and len(contents(out / "best")) > 3, n
    assert n > 10 and seen == {True, False}


def test_killed_at_each_act_of_the_final_save_the_best_model_comes_out_in_the_end(with_best):
    old, saver = with_best
    out, n, status = saver.output.path, 0, None
    expected = (old / "checkpoint-2" / BEST_WEIGHTS).read_bytes()
    while status != 0:
        n += 1
        status = die_in(finish_with_best, saver, n, old)
        assert status in (0, -signal.SIGKILL), n
        if (out / "adapter_model.safetensors").exists():
            assert (out / "adapter_model.safetensors").read_bytes() == expected, n
            assert "It saw 2 supervised tokens. It is that of step 2" in (out / "README.md").read_text(), n
        found = find_checkpoint("latest", out, saver.run, total_steps=9)
        assert found is not None, n
        with OutputFolder(out) as saver.output:
            saver.output.start()
            bring_best(saver.output, found, read_state(found)["files"])
            save(saver, tokens=9, best=Best(2, 1.0, 2))
        assert (out / "adapter_model.safetensors").read_bytes() == expected and not (out / "best").exists(), n
    assert n > 10


def test_a_best_model_that_somebody_changed_is_told_and_not_taken(with_best):
    old, saver = with_best
    shutil.copytree(old, saver.output.path, dirs_exist_ok=True)
    saver.output = OutputFolder(saver.output.path)
    (saver.output.path / "best" / "adapter_config.json").write_text("{}")
    for act in (finish_with_best, lambda saver: saver.save(3, **standing_at(2))):
        with pytest.raises(LocalError, match=r"best was changed while the run went on.*latest"):
            act(saver)
    assert not (saver.output.path / "adapter_model.safetensors").exists()
    assert [path.name for path in list_checkpoints(saver.output.path)] == ["checkpoint-2"]
