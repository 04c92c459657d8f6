"""What is compared: methods, as the flags of train_loop.py, and the sizes of the worlds that they are compared on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from world import ANSWERING, Settings

# What every method is trained with; plain fine-tuning did best with this learning rate and so many epochs.
COMMON = {
    "target_modules": "all-linear", "learning_rate": "3e-3", "epochs": "5", "batch_size": "16",
    "gradient_accumulation_steps": "1",
}  # fmt: skip

# Not flags of train_loop.py: which rows it is given; see rows.py.
OWN = ("told_only", "unknown_share", "doubted", "own_answers")
DOUBTED = -0.5  # the score between the rows that are doubted and those that are not
OF_SIZE = {"answering": {"learning_rate": "1e-3"}}
# The headline: NoiseFiT with its published settings, and what it is compared with.
HEADLINE = {
    "basefit": {"loss_mode": "basefit"},
    "neftune": {"loss_mode": "neftune"},
    "rdrop": {"loss_mode": "rdrop"},
    "snr_largest": {},
    "snr_lowest": {"snr_format": "Lowest"},
    "auto": {"noise_policy": "auto"},
}
# Parts of the loss.
ABLATIONS = {
    "ce_kl": {"loss_mode": "ce_kl"},
    "kl_only": {"loss_mode": "kl_only"},
    "ce_noisy": {"loss_mode": "ce_noisy"},
    "consistency_only": {"loss_mode": "consistency_only"},
}
# An adapter on the later half of six layers alone.
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
LATE = ",".join(f"{layer}.{module}" for layer in (3, 4, 5) for module in MODULES)
PLAINER = {"basefit_late": {"loss_mode": "basefit", "target_modules": LATE}}
# The model as it was: what such a step changes is lost in rounding.
BEFORE = {"before": {"loss_mode": "basefit", "learning_rate": "1e-30", "max_steps": "1"}}
METHODS = HEADLINE | ABLATIONS | PLAINER | BEFORE
GROUPS = {"headline": list(HEADLINE), "ablations": list(ABLATIONS), "all": [*HEADLINE, *ABLATIONS]}

# The switches that make a model hallucinate, so that plain fine-tuning has something to be better than.
HARD = Settings(zipf=True, untold=0.2, false_premises=0.2, paraphrases=True)
SIZES = {
    "tiny": replace(HARD, countries=12, layers=4, width=32, batch_rows=4),  # in seconds: it learns nothing
    "small": replace(HARD, countries=30, layers=4, width=64, batch_rows=2, epochs=4),  # in a minute: it learns a little
    "standard": replace(HARD, countries=100, layers=6, width=128, batch_rows=2, epochs=4),
    "answering": ANSWERING,
    "large": replace(HARD, countries=1000, layers=12, width=512, batch_rows=8, epochs=4),  # for a GPU
}


@dataclass(frozen=True)
class Run:
    """One row of the results: a method on a world."""

    size: str
    seed: int
    # A name of METHODS, then any flags of train_loop.py (`snr_largest:noise_std=1:num_noise_layers=2`), and of the
    # experiment's own: `told_only` trains without the rows on untold facts, `unknown_share=0.2` with so many of them;
    # with `doubted=0.2` the unknown rows of --unknown_rows are so many, on which noisy passes of the base model
    # disagree most; with `own_answers` those that it does not know have its own answer as the response.
    method: str

    @property
    def settings(self) -> Settings:
        """Of the world."""
        return replace(SIZES[self.size], seed=self.seed)

    @property
    def flags(self) -> dict[str, str | bool]:
        """Of train_loop.py, but for the paths.

        Raises:
            ValueError: not a method, or a part of it is neither `FLAG=VALUE` nor `FLAG`.
        """
        name = self.method.partition(":")[0]
        if name not in METHODS:
            raise ValueError(f"{name!r} is no method; there are {', '.join([*METHODS, *GROUPS])}")
        changes = {flag: value for flag, value in self._changes().items() if flag not in OWN}
        doubted = {"unknown_below": str(DOUBTED)} if "doubted" in self.own else {}
        return {**COMMON, **OF_SIZE.get(self.size, {}), **METHODS[name], **doubted, **changes}

    @property
    def own(self) -> dict[str, str | bool]:
        """What the method says of its rows.

        Raises:
            ValueError: it is not as `OWN` has it.
        """
        own = {flag: value for flag, value in self._changes().items() if flag in OWN}
        for flag, value in own.items():
            if len(own) > 1 or (value is not True if flag in ("told_only", "own_answers") else not _is_share(value)):
                raise ValueError(f"{self.method!r}: expected one of told_only, own_answers, unknown_share from 0 to "
                                 "0.5, and doubted from 0 to 0.5")  # fmt: skip
        return own

    @property
    def unknown_share(self) -> float | None:
        """Of the training's facts, the share that the corpus never tells; `None` for that of the world."""
        share = 0.0 if self.all_told else self.own.get("unknown_share")
        return None if share is None else float(share)

    @property
    def all_told(self) -> bool:
        """Whether all rows on told facts are trained on, and not as few as with any `unknown_share`."""
        return "told_only" in self.own

    def _changes(self) -> dict[str, str | bool]:
        changes: dict[str, str | bool] = {}
        for change in self.method.split(":")[1:]:
            flag, equals, value = change.partition("=")
            if not flag or bool(equals) != bool(value):
                raise ValueError(f"{change!r} in {self.method!r} is neither FLAG=VALUE nor FLAG")
            if flag in changes:
                raise ValueError(f"{flag} is twice in {self.method!r}")
            changes[flag] = value or True
        return changes

    @property
    def world_name(self) -> str:
        return f"{self.size}-{self.seed}"


def _is_share(value: str | bool) -> bool:
    return value is not True and 0 <= float(value) <= 0.5


def describe_world(settings: Settings) -> str:
    """A world's settings as the flags of build.py."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in asdict(settings).items()
                    if value is not False)  # fmt: skip
