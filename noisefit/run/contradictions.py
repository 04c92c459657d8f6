"""Settings that contradict each other, and those of the objective that have no effect beside the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huggingface_hub.utils import HFValidationError, validate_repo_id

from noisefit.base.errors import InputError
from noisefit.base.settings import fields_of, not_default
from noisefit.fork.branches import DROPOUT, NOISY
from noisefit.method.objectives import OBJECTIVES
from noisefit.method.policy import ALL
from noisefit.method.teacher import BASE, EMA, SELF
from noisefit.run.method_settings import POLICIES, CalibrationSettings
from noisefit.run.run_settings import HubSettings

if TYPE_CHECKING:
    from noisefit.run.settings import Settings


def check_hub(settings: HubSettings) -> None:
    """Refuse a repository's name that the hub would not take.

    Raises:
        InputError: as said.
    """
    if settings.push_to_hub is None:
        if settings.hub_private:
            raise InputError("--hub_private says how --push_to_hub makes a repository; give it one, or leave it out")
        return
    try:
        validate_repo_id(settings.push_to_hub)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub: no name of a repository: {error}") from None


def check_objective(settings: Settings) -> None:
    """Refuse settings of the objective that contradict each other.

    Raises:
        InputError: as said.
    """
    objective, policy, given = settings.objective, settings.noise_policy, not_default(settings)
    _check_teacher(settings)
    if policy != "snr":
        chosen = "auto finds layers and their number by trying" if policy == "auto" else "the file says which layers"
        for flag in ("snr_format", "num_noise_layers"):
            if flag in given:
                raise InputError(f"--{flag} goes with --noise_policy snr alone: {chosen}; leave one of them out")
        if policy not in POLICIES and settings.snr_every:
            raise InputError("--snr_every measures the layers again, which --noise_policy FILE fixes; leave one out")
    if settings.noise_tokens != ALL and settings.loss_on == "all" and objective.noise == "layers":
        raise InputError(f"--noise_tokens {settings.noise_tokens}: under --loss_on all a row is one text, without a "
                         "prompt and a response; leave one of them out")  # fmt: skip
    noiseless = [flag for flag in ("noise_std", "num_noise_layers") if policy == "snr" and not getattr(settings, flag)]
    softened = _is_softened(settings) and settings.teacher == SELF
    if objective.noise == "layers" and noiseless and softened and "soft" in objective.losses:
        raise InputError(
            f"--temperature_on teacher with --temperature {settings.temperature:g} is a loss without noise, too, but "
            f"--{noiseless[0]} 0 asks for plain fine-tuning; leave one of them out"
        )
    if objective.noise == "layers" and "ce" not in objective.losses and noiseless:
        raise InputError(f"--{noiseless[0]} 0 leaves --loss_mode {settings.loss_mode} nothing to learn; give it noise")


def check_evaluation(settings: Settings) -> None:
    """Refuse settings of the evaluation that cannot do anything.

    Raises:
        InputError: as said.
    """
    wanted = [name for name in ("sample_steps", "keep_best", "patience") if getattr(settings, name)]
    wanted += ["eval_metric"] if settings.scores_answers else []
    if wanted and not settings.eval_data and not settings.eval_split:
        raise InputError(f"--{wanted[0]} goes by evaluation rows, and there are none; give --eval_data or --eval_split")
    if settings.loss_on == "all" and (settings.sample_steps or settings.scores_answers):
        flag = "sample_steps" if settings.sample_steps else f"eval_metric {settings.eval_metric}"
        raise InputError(f"--{flag} answers prompts, and under --loss_on all a row is one text, without a prompt and a "
                         "response; leave one of them out")  # fmt: skip


def _check_teacher(settings: Settings) -> None:
    objective, flag = settings.objective, f"--teacher {settings.teacher}"
    if settings.cache_teacher and settings.teacher != BASE:
        raise InputError(f"--cache_teacher keeps predictions that do not change, and those of {flag} do; give "
                         "--teacher base, or leave it out")  # fmt: skip
    if settings.teacher == SELF:
        if "soft" in objective.losses and NOISY not in objective.branches:
            raise InputError(f"--loss_mode {settings.loss_mode} has nobody to learn from under --teacher self: without "
                             "noise its predictions are the teacher's; give --teacher base or ema")  # fmt: skip
        return
    if "soft" not in objective.losses:
        having = ", ".join(name for name, other in OBJECTIVES.items() if "soft" in other.losses)
        raise InputError(f"{flag} is the teacher of the soft term, which --loss_mode {settings.loss_mode} does not "
                         f"have; leave one of them out ({having} have it)")  # fmt: skip
    if settings.full_finetune:
        what = "the model with its adapter off" if settings.teacher == BASE else "an average of the adapter"
        raise InputError(f"{flag} is {what}, and --full_finetune trains without one; leave one of them out")


def _is_softened(settings: Settings) -> bool:
    return settings.temperature_on == "teacher" and settings.temperature != 1


def without_effect(settings: Settings) -> str | None:
    """A line that names the settings which are not at their default and change nothing; `None` where there are none."""
    objective, policy = settings.objective, settings.noise_policy
    layers, measured = objective.noise == "layers", policy in POLICIES
    used = dict.fromkeys(("noise_policy", "num_noise_layers", "snr_format", "snr_every"), layers)
    used |= {field.name: layers and policy == "auto" for field in fields_of(CalibrationSettings)}
    used |= dict.fromkeys((name for o in OBJECTIVES.values() for name in o.reads), False)
    used |= dict.fromkeys(objective.reads, True)
    if "temperature_on" in objective.reads:
        used["temperature_on"] = settings.temperature != 1
        used["temperature"] = settings.temperature_on == "both" or "soft" in objective.losses
    if settings.teacher != SELF:  # no gradient flows there: the consistency term alone has one then
        used["teacher_gradient"] &= "consistency" in objective.losses
    noisy = layers and (policy != "snr" or bool(settings.num_noise_layers and settings.noise_std))
    used |= {
        "noise_std": layers and policy == "snr",
        # A calibrated base scale is a number, so it is frozen as it is.
        "noise_scale": noisy and (policy == "snr" or settings.noise_scale == "relative"),
        "noise_gradient": noisy,
        "max_noise_to_signal": noisy,
        "noise_tokens": noisy,
        "prefer_late_layers": layers and measured,
        "unknown_below": settings.unknown_rows != "keep",
        "refusal": settings.unknown_rows == "refuse",
        "unknown_weight": settings.unknown_rows == "weight",
        "snr_batches": not layers or measured,
        "branches": len(objective.branches) > 1,
        "teacher_decay": settings.teacher == EMA,
        "rdrop_dropout": DROPOUT in objective.branches,
        "sample_prompts": bool(settings.sample_steps),
        "sample_tokens": bool(settings.sample_steps) or settings.scores_answers,
    }
    changed = not_default(settings)
    idle = [f"--{name}" for name in settings.record() if name in changed and not used.get(name, True)]
    if not idle:
        return None
    how = {"--loss_mode": settings.loss_mode, "--noise_policy": policy, "--unknown_rows": settings.unknown_rows}
    if not {"--unknown_below", "--refusal", "--unknown_weight"} & {*idle}:
        del how["--unknown_rows"]
    return f"without effect under {', '.join(f'{flag} {value}' for flag, value in how.items())}: {', '.join(idle)}"
