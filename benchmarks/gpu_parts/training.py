"""Trainings by `train_loop.py` in every precision, stopped by a signal and resumed; and FSDP2 on one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from gpu_parts.material import (
    ROOT,
    Row,
    difference,
    is_full,
    launch_environment,
    metrics_of,
    model_config,
    save_model,
    save_rows,
    scratch,
    speed,
    train,
)
from noisefit.base.errors import InputError, Stopped
from noisefit.run.checkpoint_files import list_checkpoints


def flags(folder: Path, size: str) -> dict[str, Any]:
    """Of a short training with noise in two layers; the model and the rows are made in `folder`."""
    rows, longest, steps = (256, 500, 40) if is_full(size) else (8, 40, 8)
    return dict(
        model=str(save_model(folder / "model", model_config(size))),
        train_data=str(save_rows(folder / "rows.jsonl", rows, longest)),
        num_noise_layers=2, batch_size=4 if is_full(size) else 2, gradient_accumulation_steps=2, max_steps=steps,
        epochs=steps, learning_rate=1e-3, logging_steps=1, save_steps=3,
    )  # fmt: skip


def train_and_resume(device: str, size: str, precision: str, **more: Any) -> Iterator[Row]:
    """Train; train the same again, stopped after its first checkpoint and resumed; compare the two. `more`: flags."""
    with scratch() as folder:
        settings = flags(folder, size) | more
        try:
            whole = train(device, precision, **settings, output_model=str(folder / "whole"))
        except InputError as error:  # a library or a device that is not there
            yield {"text": f"Not here: {str(error).replace(str(folder), '')}"}
            return
        output = folder / "resumed"
        stopped_after, resumed = None, []
        try:
            with ending_at_checkpoint(output):
                resumed = train(device, precision, **settings, output_model=str(output))
        except Stopped:
            stopped_after = metrics_of(output)[-1]["step"]
            resumed = train(
                device, precision, **settings, output_model=str(output), resume_from_checkpoint="latest"
            )  # fmt: skip
        adapters = [load_file(path / "adapter_model.safetensors") for path in (folder / "whole", output)]
        apart = max((adapters[0][name].float() - adapters[1][name].float()).abs().max().item() for name in adapters[0])
        yield {
            "steps": len(whole),
            "first loss": whole[0]["loss"],
            "last loss": whole[-1]["loss"],
            "skipped steps": sum(line["skipped_steps"] for line in whole),
            "stopped after step": stopped_after if stopped_after is not None else "never, it was too fast",
            "resumed run against the whole one": difference(whole, resumed),
            "adapters differ by": apart,
            "tokens a second": speed(whole),
            "peak GiB": whole[-1]["peak_memory_gib"],
        }


@contextmanager
def ending_at_checkpoint(output: Path) -> Iterator[None]:
    """Send this process a SIGTERM, as a scheduler does, once the training in it has written a checkpoint."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            if output.is_dir() and list_checkpoints(output):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal that comes after the last step
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def fsdp(device: str, size: str) -> Iterator[Row]:
    """A launch with `configs/accelerate/fsdp.yaml` and one process, against a plain run in the same precision."""
    if device != "cuda":
        yield {"text": "Not here: accelerate shards on a GPU alone. (tests/run/test_fsdp.py does it on CPUs.)"}
        return
    with scratch() as folder:
        # Without dropout and noise of their own, so that the two draw nothing that could differ.
        settings = flags(folder, size) | {"lora_dropout": 0.0, "loss_mode": "basefit", "save_steps": 0}
        plain = train(device, "bf16", **settings, output_model=str(folder / "plain"))
        output = folder / "sharded"
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            str(ROOT / "configs" / "accelerate" / "fsdp.yaml"), "--num_processes", "1", "--mixed_precision", "bf16",
            str(ROOT / "train_loop.py"), *words(settings), f"--output_model={output}",
        ]  # fmt: skip
        environment = os.environ | launch_environment(device, "bf16")
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="\n")  # into the part's log
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            raise RuntimeError(f"the launch ended with status {done.returncode}: {last[:200]}")
        sharded = metrics_of(output)
        yield {
            "steps": len(sharded),
            "last loss, plain": plain[-1]["loss"],
            "last loss, FSDP2": sharded[-1]["loss"],
            "the two": difference(plain, sharded),
            "saved tensors": len(load_file(output / "adapter_model.safetensors")),
            "tokens a second, plain": speed(plain),
            "FSDP2": speed(sharded),
            "peak GiB, plain": plain[-1]["peak_memory_gib"],
            "peak GiB, FSDP2": sharded[-1]["peak_memory_gib"],
        }


def words(settings: dict[str, Any]) -> list[str]:
    """The command line of these settings."""
    return [f"--{name}={value}" for name, value in settings.items()]
