"""Metrics: a line a logged step in `metrics.jsonl`, and the same numbers to wandb or TensorBoard where asked."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from noisefit.errors import InputError, notice
from noisefit.noise import TokenScaledNoise
from noisefit.outputs import append_json_line

LOSSES = ("ce_loss", "soft_loss", "consistency_loss")


def check_tracker(args: Namespace) -> None:
    """Raise `InputError` where `--report_to` names a tracker that is not installed."""
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to}: not installed; pip install {args.report_to}")


def start_trackers(accelerator: Accelerator, args: Namespace) -> None:
    """Start what `--report_to` asks for. A tracker that fails costs a warning and not the run."""
    if args.report_to == "none":
        return
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
    name = args.run_name or Path(args.output_model).resolve().name
    try:
        accelerator.init_trackers("noisefit", config=plain, init_kwargs={"wandb": {"name": name}})
    except Exception as error:  # whatever a tracker's client raises: no network, no key, a full disk
        accelerator.trackers = []
        notice(f"--report_to {args.report_to} failed, training goes on without it: {error}")


def progress_bar(accelerator: Accelerator, total: int, what: str, unit: str) -> tqdm:
    """A bar on the main process; in a log file, which keeps every update, a rarely updated one."""
    interval = 0.1 if sys.stderr.isatty() else 20
    main = accelerator.is_main_process
    return tqdm(total=total, desc=what, unit=unit, mininterval=interval, disable=not main)


class Metrics:
    """Sums of the losses since the last logged line, kept on the device until that line is due."""

    def __init__(self, accelerator: Accelerator, args: Namespace):
        self.accelerator = accelerator
        self.path = Path(args.output_model) / "metrics.jsonl"
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(LOSSES), device=self.accelerator.device)
        self._targets = self._tokens = 0
        self._since = time.perf_counter()

    def add_losses(self, sums: Tensor) -> None:
        """Add a micro-batch's sums, `[3]`: cross-entropy, soft, consistency, of this process."""
        self._sums += sums.detach()

    def add_step(self, target_tokens: int, tokens: int) -> None:
        """Count a step's supervised and real tokens, over all processes."""
        self._targets += target_tokens
        self._tokens += tokens

    def log(
        self, step: int, epoch: float, weights: Iterable[float], learning_rate: float, grad_norm: Tensor,
        noise: Mapping[int, TokenScaledNoise],
    ) -> dict[str, Any]:  # fmt: skip
        """Write the line of a step. All processes call it.

        Args:
            step, epoch: how far the training is, in optimizer steps and passes over the data.
            weights: of the three losses in the whole.
            learning_rate, grad_norm: of this step; the norm before clipping.
            noise: the noisy layers' noise, read for `noise_to_signal`.

        Returns:
            The line. Losses are means over the supervised tokens since the last line; `target_tokens` counts these;
            `tokens_per_second` counts real tokens, prompts included, over all processes.
        """
        ratios = [layer.pop_noise_to_signal() for layer in noise.values()]
        ratio = torch.stack(ratios).mean() if ratios else torch.zeros(())
        sums = self.accelerator.reduce(self._sums, "sum")
        ratio = self.accelerator.reduce(ratio.to(sums), "mean")
        means = [total / max(self._targets, 1) for total in sums.tolist()]
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": sum(weight * mean for weight, mean in zip(weights, means, strict=True)),
            **dict(zip(LOSSES, means, strict=True)),
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm),
            "target_tokens": self._targets,
            "tokens_per_second": round(self._tokens / max(time.perf_counter() - self._since, 1e-9), 1),
            "noise_to_signal": ratio.item(),
        }
        self._reset()
        if not math.isfinite(line["grad_norm"]) and self.accelerator.optimizer_step_was_skipped:
            line["grad_norm"] = None  # fp16's loss scale was too large for once, and is lowered
        elif not all(map(math.isfinite, (line["loss"], line["grad_norm"]))):
            raise InputError(
                f"step {step}: the loss or its gradient is not a finite number, and no adapter was written; lower "
                "--learning_rate or --noise_std, or use bf16 instead of fp16"
            )
        if self.accelerator.is_main_process:
            append_json_line(self.path, line)
        self._track(line)
        return line

    def log_evaluation(self, step: int, epoch: float, ce_loss: float, target_tokens: int, seconds: float) -> None:
        """Write a line to `eval_metrics.jsonl`; its seconds do not count as training. All processes call it."""
        line = {"step": step, "epoch": round(epoch, 4), "eval_ce_loss": ce_loss, "eval_target_tokens": target_tokens}
        if self.accelerator.is_main_process:
            append_json_line(self.path.with_name("eval_metrics.jsonl"), line)
        self._track(line)
        self._since += seconds

    def _track(self, line: dict[str, Any]) -> None:
        try:
            self.accelerator.log(line, step=line["step"])
        except Exception as error:  # as in start_trackers
            self.accelerator.trackers = []
            notice(f"the tracker failed at step {line['step']}, training goes on without it: {error}")
