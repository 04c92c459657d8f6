"""What is compared: methods, as the flags of train_loop.py, and the sizes of the worlds that they are compared on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from world import Settings

# What every method is trained with; plain fine-tuning did best with this learning rate and so many epochs.
COMMON = {
    "target_modules": "all-linear", "learning_rate": "3e-3", "epochs": "5", "batch_size": "16",
    "gradient_accumulation_steps": "1",
}  # fmt: skip

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
METHODS = HEADLINE | ABLATIONS
GROUPS = {"headline": list(HEADLINE), "ablations": list(ABLATIONS), "all": list(METHODS)}

# The switches that make a model hallucinate, so that plain fine-tuning has something to be better than.
HARD = Settings(zipf=True, untold=0.2, false_premises=0.2, paraphrases=True)
SIZES = {
    "tiny": replace(HARD, countries=12, layers=4, width=32, batch_rows=4),  # in seconds: it learns nothing
    "small": replace(HARD, countries=30, layers=4, width=64, batch_rows=2, epochs=4),  # in a minute: it learns a little
    "standard": replace(HARD, countries=100, layers=6, width=128, batch_rows=2, epochs=4),
    "large": replace(HARD, countries=1000, layers=12, width=512, batch_rows=8, epochs=4),  # for a GPU
}


@dataclass(frozen=True)
class Run:
    """One row of the results: a method on a world."""

    size: str
    seed: int
    method: str  # a name of METHODS, then any flags of train_loop.py: `snr_largest:noise_std=1:num_noise_layers=2`

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
        name, *changes = self.method.split(":")
        if name not in METHODS:
            raise ValueError(f"{name!r} is no method; there are {', '.join([*METHODS, *GROUPS])}")
        flags: dict[str, str | bool] = {**COMMON, **METHODS[name]}
        for change in changes:
            flag, equals, value = change.partition("=")
            if not flag or bool(equals) != bool(value):
                raise ValueError(f"{change!r} in {self.method!r} is neither FLAG=VALUE nor FLAG")
            flags[flag] = value or True
        return flags

    @property
    def world_name(self) -> str:
        return f"{self.size}-{self.seed}"


def describe_world(settings: Settings) -> str:
    """A world's settings as the flags of build.py."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in asdict(settings).items()
                    if value is not False)  # fmt: skip
