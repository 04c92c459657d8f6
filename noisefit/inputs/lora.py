"""What `--lora` may say: the options of PEFT's `LoraConfig` that are right in this trainer, under PEFT's names.

An option is accepted once it is known here: what it trains must be float32, saved, resumed bit for bit, switched off
where the base model teaches, and loaded by PEFT alone as it was trained. `tests/inputs/test_lora.py` and
`tests/run/test_adapters.py` hold each of them to that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig

from noisefit.base.errors import InputError
from noisefit.base.key_values import (
    Kind,
    above_zero,
    as_words,
    converted,
    count,
    did_you_mean,
    key_values,
    list_of,
    mapping_to,
    one_of,
    text,
    truth,
)

FLAG = "--lora"
INITS = (True, False, "gaussian", "orthogonal", "olora", "pissa")


def _initialisation(value: Any) -> bool | str:
    parts = value.rpartition("_niter_") if isinstance(value, str) else ("", "", "")
    if parts[0] == "pissa" and parts[2].isdecimal() and int(parts[2]) < 10**6:
        return str(value)
    if value in NOT_HERE:
        raise ValueError(f"one that needs the model alone: {value} {NOT_HERE[value]}")
    try:
        return one_of(*INITS)(value)
    except ValueError as error:
        raise ValueError(f"{error}, or pissa_niter_N") from None


def _tokens(value: Any) -> list[int] | dict[str, list[int]]:
    of_tokens = list_of(count(0))
    return mapping_to(of_tokens)(value) if isinstance(value, dict) else of_tokens(value)


ACCEPTED: dict[str, Kind] = {
    "use_rslora": truth,
    "use_dora": truth,
    "init_lora_weights": _initialisation,
    "modules_to_save": list_of(text),
    "exclude_modules": list_of(text),
    "layers_to_transform": list_of(count(0)),
    "layers_pattern": list_of(text),
    "rank_pattern": mapping_to(count(1)),
    "alpha_pattern": mapping_to(above_zero),
    "bias": one_of("none", "all", "lora_only"),
    "lora_bias": truth,
    "trainable_token_indices": _tokens,
    "target_parameters": list_of(text),
    "ensure_weight_tying": truth,
}
# Initialisations that need more than the model.
NOT_HERE = {
    "eva": "looks at the data first",
    "corda": "looks at the data first",
    "lora_ga": "looks at gradients first",
    "loftq": "quantizes the weights itself; give --quantization with another one",
    "mica": "freezes a part of the adapter, which a sharded checkpoint would lack",
}
OWN_FLAGS = {
    "r": "--lora_r",
    "lora_alpha": "--lora_alpha",
    "lora_dropout": "--lora_dropout",
    "target_modules": "--target_modules",
    "base_model_name_or_path": "--model",
    "revision": "--model_revision",
}
_LOSS, _SET = "adds a term to the loss, which is this trainer's own", "is set by the trainer"
REFUSED = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), _SET),
    "fan_in_fan_out": "is found out by PEFT",
    "runtime_config": "is not kept with the adapter",
    "layer_replication": "makes other layers than those that the noise is measured in",
    "alora_invocation_tokens": "adapts from a token on that PEFT looks for in another forward pass than the fork's",
    "monteclora_config": _LOSS,
    "kasa_config": _LOSS,
    "eva_config": "goes with init_lora_weights=eva, which looks at the data first",
    "corda_config": "goes with init_lora_weights=corda, which looks at the data first",
    "lora_ga_config": "goes with init_lora_weights=lora_ga, which looks at gradients first",
    "loftq_config": "goes with init_lora_weights=loftq, which quantizes the weights itself",
    "megatron_config": "is for Megatron's layers",
    "megatron_core": "is for Megatron's layers",
    "use_qalora": "is for GPTQ weights",
    "qalora_group_size": "is for GPTQ weights",
}


def lora_options(words: Sequence[str] | None) -> dict[str, Any]:
    """The options by their names, as `LoraConfig` takes them.

    Raises:
        InputError: an option is unknown to PEFT or to this trainer, has a flag of its own, or an impossible value.
    """
    found = key_values(FLAG, words or ())
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key in found:
        if key in OWN_FLAGS:
            raise InputError(f"{FLAG} {key}: give {OWN_FLAGS[key]} instead")
        if key not in known:
            hint = "the installed PEFT has none" if key in ACCEPTED else did_you_mean(key, ACCEPTED)
            raise InputError(f"{FLAG} {key}: PEFT's LoraConfig has no such option; {hint}")
        if key not in ACCEPTED:
            why = REFUSED.get(key, "has not been tried with this trainer")
            raise InputError(f"{FLAG} {key}: it {why}; leave it out ({did_you_mean('', ACCEPTED)})")
    return {key: converted(FLAG, key, value, ACCEPTED[key]) for key, value in found.items()}


def check_lora(settings: Any) -> list[str] | None:
    """The words of `--lora`, written in one way; `None` where there are none.

    Args:
        settings: of the run: `lora`, `full_finetune`, `quantization`, `teacher` and `lora_dropout`.

    Raises:
        InputError: as `lora_options`, or an option contradicts another one or another flag.
    """
    options = lora_options(settings.lora)
    if not options:
        return None
    words, init = as_words(options), options.get("init_lora_weights", True)
    if settings.full_finetune:
        raise InputError(f"{FLAG} is about an adapter, and --full_finetune trains without one; leave one of them out")
    if moves_base(options):
        where = f"{FLAG} init_lora_weights={init} takes a part of the base model's weights into the adapter"
        if settings.quantization != "none":
            raise InputError(f"{where}, which --quantization {settings.quantization} rounds; leave one of them out")
        if settings.teacher == "base":
            raise InputError(f"{where}, so without its adapter the model is not the base model that --teacher base is; "
                             "leave one of them out")  # fmt: skip
        if options.get("use_rslora") and {"rank_pattern", "alpha_pattern"} & options.keys():
            raise InputError(f"{where}, and is saved as an adapter of twice the rank: under use_rslora no rank_pattern "
                             "or alpha_pattern says that; leave one of them out")  # fmt: skip
    if options.get("bias", "none") != "none" and settings.teacher == "base":
        raise InputError(f"{FLAG} bias={options['bias']} trains biases of the base model, so without its adapter it is "
                         "not the base model that --teacher base is; leave one of them out")  # fmt: skip
    if "layers_to_transform" in options and settings.target_modules == ["all-linear"]:
        raise InputError(f"{FLAG} layers_to_transform goes with the names of modules; name them in --target_modules")
    if "layers_pattern" in options and "layers_to_transform" not in options:
        raise InputError(f"{FLAG} layers_pattern is the name of the layers that layers_to_transform counts; give that")
    if "target_parameters" in options and settings.lora_dropout:
        raise InputError(f"{FLAG} target_parameters has no place for dropout; give --lora_dropout 0")
    return words


def check_sharded(settings: Any, config: Any) -> None:
    """Refuse what does not go with a model that is sharded over the processes (FSDP).

    Args:
        settings: of the run.
        config: the base model's.

    Raises:
        InputError: as said.
    """
    options = lora_options(settings.lora)
    tied = config.get_text_config(decoder=True).tie_word_embeddings
    whole = [key for key in ("modules_to_save", "trainable_token_indices") if key in options]
    if whole and tied:
        # Each process but one ties the weights of an empty model, and one of the two is then another module's.
        raise InputError(f"{FLAG} {whole[0]} does not go with FSDP where embedding and head are one; use DDP, or leave "
                         "it out")  # fmt: skip
    if "target_parameters" in options:
        raise InputError(f"{FLAG} target_parameters has not been tried with FSDP; use DDP, or leave it out")


def moves_base(options: dict[str, Any]) -> bool:
    """Whether an adapter of these options begins with a part of the base model's weights, and leaves them the rest."""
    init = options.get("init_lora_weights", True)
    return isinstance(init, str) and init.startswith(("pissa", "olora"))
