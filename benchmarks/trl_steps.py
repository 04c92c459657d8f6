"""TRL's `SFTTrainer` on the benchmark's model, rows and supervised tokens, stopped between its steps.

Optional: `pip install trl`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from generate_speed import byte_tokenizer
from transformers import TrainerCallback
from ways import Size, build_model, example_rows


class _Turns(TrainerCallback):
    def __init__(self, begin: Callable[[], None], end: Callable[[], None], between: Callable[[], None]):
        self.begin, self.end, self.between = begin, end, between

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end()
        self.between()


def train_with_trl(
    size: Size, device: str, steps: int, begin: Callable[[], None], end: Callable[[], None], between: Callable[[], None]
) -> str:
    """Run `steps` steps of `SFTTrainer`, calling `begin` and `end` around each and `between` after it.

    Its own checkpointing and logging are off, and so is the gradient checkpointing that it turns on by default.

    Returns:
        Its version.
    """
    import trl
    from datasets import Dataset

    rows = example_rows(size)
    data = {
        "input_ids": [row.input_ids for row in rows],
        "completion_mask": [[int(i >= row.target_start) for i in range(size.length)] for row in rows],
    }
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder, per_device_train_batch_size=size.rows, max_steps=steps, max_length=None,
            gradient_checkpointing=False, bf16=False, use_cpu=device == "cpu", learning_rate=1e-4, max_grad_norm=1.0,
            completion_only_loss=True, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=build_model(size, device),
            args=config,
            train_dataset=Dataset.from_dict(data),
            processing_class=byte_tokenizer(),
            callbacks=[_Turns(begin, end, between)],
        )
        trainer.train()
    return trl.__version__
