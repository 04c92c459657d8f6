"""The settings of a run: what goes in and what comes out, its steps, its kills, its records, and the hub."""

from __future__ import annotations

from dataclasses import dataclass

from noisefit.base.settings import setting
from noisefit.run.method_settings import ABOVE_ZERO, COUNT, NON_NEGATIVE, POSITIVE, SHARE
from noisefit.run.optimizers import OPTIMIZERS

# Schedules that need no further numbers.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
NO_TRACKER = "none"
# Accelerate's names, which are those of the modules, and what installs each.
TRACKERS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """What goes in and what comes out."""

    model: str = setting(
        help="the base model: a folder in the Hugging Face format, or a name on the hub (required)", is_path=True
    )
    train_data: str | list[str] = setting(
        help="files, folders or names on the hub, with columns prompt and response (required); see docs/data.md",
        is_path=True,
    )
    output_model: str = setting(
        "output_model", "folder for the adapter, its tokenizer and the run's records", is_path=True
    )
    overwrite_output: bool = setting(
        False,
        "replace an adapter that is already there: of what lies in the folder, only what a run's record "
        "says a run wrote",
    )
    eval_data: str | list[str] | None = setting(
        None, "held-out rows, as --train_data; their cross-entropy, without noise, is measured in training",
        is_path=True,
    )  # fmt: skip
    trust_remote_code: bool = setting(
        False, "run code that comes with the base model: only for authors whom you trust with this machine"
    )


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The steps."""

    batch_size: int = setting(
        4,
        "rows a micro-batch, on each device. Memory grows with it: as large as fits, with fewer "
        "--gradient_accumulation_steps for the same step",
        **POSITIVE,
    )
    gradient_accumulation_steps: int = setting(
        4, "micro-batches an optimizer step. A step has this x --batch_size x processes rows", **POSITIVE
    )
    packing: bool = setting(
        False,
        "no padding: rows one behind the other. For rows of mixed lengths: 0.6 to 0.8 of the time on a "
        "CPU; on a GPU with --attn_implementation flash_attention_2 alone, else twice the time",
    )
    epochs: int = setting(
        5,
        "passes over the data; more learn more by heart: after 20 instead of 5 our models were wrong more often",
        **POSITIVE,
    )
    max_steps: int = setting(
        -1, 
        "optimizer steps; training ends at this or --epochs, whichever comes first; -1 for no limit. For "
        "a look at cost and memory: 3", low=1,
        also=(-1,),
    )  # fmt: skip
    learning_rate: float = setting(
        5e-5,
        "highest learning rate of the schedule; for LoRA often 1e-4 to 1e-3, for --full_finetune 1e-5",
        **ABOVE_ZERO,
    )
    lr_scheduler_type: str = setting("cosine", "how the learning rate falls", choices=SCHEDULES)
    warmup_ratio: float = setting(
        0.0, "share of the steps in which the learning rate rises; 0.03 to 0.1 where the first steps are rough", **SHARE
    )
    weight_decay: float = setting(
        0.0, "weight decay of the optimizer; 0.01 to 0.1 for --full_finetune, little use to an adapter", **NON_NEGATIVE
    )
    optim: str = setting(
        "adamw_torch", "the optimizer, as transformers names it: adafactor keeps next to nothing, 8-bit ones a quarter "
        "of AdamW's memory, paged ones share it with the CPU (both need: pip install bitsandbytes); with an adapter "
        "there is little to save", choices=tuple(OPTIMIZERS),
    )  # fmt: skip
    optim_args: list[str] | None = setting(
        None, "further arguments of the optimizer's class, such as betas=0.9,0.95 momentum=0.9", metavar="KEY=VALUE",
        whole_words=True,
    )  # fmt: skip
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0: never", **NON_NEGATIVE)
    max_bad_steps: int = setting(
        10, "a step whose loss or gradient is not finite is skipped; so many in a row end the run", **POSITIVE
    )
    seed: int = setting(
        42,
        "determines adapter, order of the rows, dropout and noise; on CPUs the same seed gives the same bytes",
        **COUNT,
    )


@dataclass(frozen=True, kw_only=True)
class KillSettings:
    """Kills."""

    save_steps: int = setting(
        100,
        "a checkpoint every so many steps and after the last; 0: none, and a killed run begins anew. With "
        "an adapter one takes about three times its size, with --full_finetune three times the model's",
        **COUNT,
    )
    save_total_limit: int = setting(2, "so many checkpoints are kept, the last ones; 0: all", **COUNT)
    resume_from_checkpoint: str | None = setting(
        None, "go on from a checkpoint; latest: of --output_model; auto: that, or afresh where none is",
        metavar="PATH|latest|auto", is_path=True,
    )  # fmt: skip


METRICS = {"ce": "eval_ce_loss", "wrong_rate": "wrong_rate", "hallucination_rate": "hallucination_rate"}
"""What --eval_metric may be, and what eval_metrics.jsonl calls it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is looked at while it trains, on the rows of `--eval_data`."""

    eval_steps: int = setting(
        0,
        "evaluate every so many steps, each time a forward pass over the evaluation rows; 0: after each epoch",
        **COUNT,
    )
    eval_metric: str = setting(
        "ce", "what --keep_best and --patience go by, the lower the better: the cross-entropy, or a rate of "
        "noisefit.score, for which each evaluation answers all prompts: some forward passes a token of each answer",
        choices=tuple(METRICS),
    )  # fmt: skip
    keep_best: bool = setting(
        False, "the output is the model of the best evaluation, not the last one; it lies in best/ of the output, and "
        "in each checkpoint"
    )  # fmt: skip
    patience: int = setting(
        0, "end the training after so many evaluations in a row that are no better than the best one; 0: never", **COUNT
    )
    sample_steps: int = setting(
        0, "answer a few prompts of --eval_data every so many steps and after the last, for samples.jsonl; 0: never",
        **COUNT,
    )  # fmt: skip
    sample_prompts: int = setting(4, "so many of them, the first ones", **POSITIVE)
    sample_tokens: int = setting(50, "tokens an answer at the most, of samples and of --eval_metric", low=1, high=10**6)

    @property
    def scores_answers(self) -> bool:
        """Whether each evaluation answers all prompts."""
        return self.eval_metric != "ce"


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """Records."""

    logging_steps: int = setting(5, "a line of metrics every so many steps; each waits for the device once", **POSITIVE)
    report_to: list[str] = setting(
        [NO_TRACKER], "where metrics go besides metrics.jsonl, one or several of accelerate's trackers; trackio needs "
        "no account and no network", choices=(NO_TRACKER, *TRACKERS),
    )  # fmt: skip
    run_name: str | None = setting(None, "name of the run in trackers; default: the output folder's")


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """The hub."""

    push_to_hub: str | None = setting(
        None, "push what is left, once it is whole, to this repository: NAME, or ORGANIZATION/NAME; that it can be is "
        "checked first, and needs a token that may write", metavar="REPO",
    )  # fmt: skip
    hub_private: bool = setting(False, "a repository that --push_to_hub makes is private")
