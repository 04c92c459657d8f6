"""Loading the base model and its tokenizer, checking what can be checked before, and adding the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from noisefit.base.settings import setting
from noisefit.fork.decoder import find_decoder_layers
from noisefit.inputs.adapters import add_adapter, restore_adapter
from noisefit.inputs.model_checks import (
    check_model_name,
    check_no_adapter_in,
    check_quantization,
    check_revision,
    check_weights,
    checked_config,
    loading,
)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model, and what of it is trained."""

    lora_r: int = setting(8, "rank of the LoRA adapter: more learns more, and costs little more", low=1, high=2**16)
    lora_alpha: float = setting(
        16.0, "the adapter is scaled by lora_alpha / lora_r; twice the rank is usual", low=0, high=1e6, open_low=True
    )
    lora_dropout: float = setting(
        0.05, "dropout before the adapter; up to the first noisy layer a fork's branches share its mask", low=0,
        high=0.99,
    )  # fmt: skip
    target_modules: list[str] | None = setting(
        None, 
        "modules that get an adapter, or all-linear, which learns most; default: PEFT's own choice for "
        "the architecture",
        metavar="NAME",
    )  # fmt: skip
    lora: list[str] | None = setting(
        None, "other options of PEFT's LoraConfig, such as use_dora=true (a step takes 7% longer, on all-linear half "
        "as long again), init_lora_weights=pissa, modules_to_save=lm_head (a float32 copy)", metavar="KEY=VALUE",
        whole_words=True,
    )  # fmt: skip
    full_finetune: bool = setting(
        False, "train all weights, without an adapter: in float32 with gradients and moments some 16 bytes a weight"
    )
    gradient_checkpointing: bool = setting(
        False,
        "keep few activations and compute them again: a tenth to a third of the memory, a third more "
        "computing. The first thing to try when memory runs out",
    )
    attn_implementation: str | None = setting(
        None, "attention of the model: eager, sdpa, flash_attention_2 (on a GPU, for --packing), ...; default: its own"
    )
    quantization: str = setting(
        "none", 
        "load the frozen base model in 8 or 4 bits: a half or a quarter of its memory, and slower steps "
        "(needs: pip install bitsandbytes)",
        choices=("none", "8bit", "4bit"),
    )  # fmt: skip
    model_revision: str | None = setting(
        None, "branch, tag or commit of a model on the hub; default: main. The run's record has the commit either way",
        metavar="REV",
    )  # fmt: skip


def load_config(model: str, trust_remote_code: bool, revision: str | None = None) -> PreTrainedConfig:
    """The base model's configuration. Raises `InputError` as `check_model_name`, or if it is none."""
    check_model_name("--model", model)
    check_revision(model, revision)
    check_no_adapter_in("--model", model)
    with loading("--model", model, "a model", revision):
        how: Any = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
        return checked_config(AutoConfig.from_pretrained(model, **how))


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit that a branch, tag or commit of a model on the hub stands for; `None` for a folder, and where the
    hub's client does not know. Raises `InputError` as `load_config`."""
    check_model_name("--model", model)
    check_revision(model, revision)
    if Path(model).is_dir():
        return None
    with loading("--model", model, "a model", revision):
        # Where its files lie in the cache: newer transformers keep it nowhere else.
        return extract_commit_hash(cached_file(model, "config.json", revision=revision or "main"), None)


def load_tokenizer(model: str, trust_remote_code: bool, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises `InputError` where there is none."""
    with loading("--model", model, "a tokenizer", revision):
        how: Any = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
        return AutoTokenizer.from_pretrained(model, **how)


def check_model(
    settings: ModelSettings, model: str, config: PreTrainedConfig, trust_remote_code: bool
) -> tuple[int, int]:
    """Build the model without weights, and refuse what cannot be trained as asked.

    Returns:
        Its number of decoder layers, and of token embeddings.

    Raises:
        InputError: not a causal language model, no decoder layers, target modules that match nothing, quantization
            that this machine cannot do.
    """
    check_quantization(settings.quantization, training=True)
    empty = build_empty(settings, model, config, trust_remote_code)
    num_layers, embeddings = len(find_decoder_layers(empty)), empty.get_input_embeddings()
    if not settings.full_finetune:
        add_adapter(settings, empty, model, resumed=True, told=True)
    return num_layers, len(embeddings.weight)


def build_empty(
    settings: ModelSettings, name: str, config: PreTrainedConfig, trust_remote_code: bool, **options: Any
) -> Any:
    """The model on the `meta` device, without weights. Raises `InputError` where it is no causal language model."""
    code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if settings.model_revision and trust_remote_code and str(code).partition("--")[0] == name:
        options["code_revision"] = settings.model_revision  # else the code would be that of the main branch
    with loading("--model", name, "a causal language model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def length_limit(config: PreTrainedConfig) -> int | None:
    """The most tokens of a row that the model has positions for; `None` where it names no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or None


def attention_options(settings: ModelSettings) -> dict[str, Any]:
    """What transformers is to be told for `--attn_implementation`."""
    wanted = settings.attn_implementation
    return {} if wanted is None else {"attn_implementation": wanted}


def quantization_options(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is to be told for `--quantization`."""
    if quantization == "none":
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == torch.float32 else dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of weights that are not trained: the launch's mixed precision."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def load_base(
    settings: ModelSettings, name: str, accelerator: Accelerator, dtype: torch.dtype, trust_remote_code: bool = False,
    finite: bool = False,
) -> Any:  # fmt: skip
    """A causal language model as it is, without an adapter, on the CPU unless it is quantized.

    Args:
        settings: how it is loaded.
        name: of the model, or its folder.
        accelerator: of the run.
        dtype: of its weights.
        trust_remote_code: whether code that comes with the model may run.
        finite: whether to refuse weights that are not finite, or that the model has no place for.

    Raises:
        InputError: no such model in safetensors.
    """
    options = {"dtype": dtype} | attention_options(settings)
    options |= quantization_options(settings.quantization, frozen_dtype(accelerator), accelerator.device)
    if settings.model_revision is not None and not Path(name).is_dir():  # a folder: a checkpoint of --full_finetune
        options["revision"] = settings.model_revision
    with loading("--model", name, "weights as safetensors"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
        model, report = loaded
        check_weights(report, name)
        if finite:
            wrong = [*report["unexpected_keys"]]
            wrong += [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
            if wrong:
                raise ValueError(f"{wrong[0]} is not of this model or not finite")
    return model


def load_model(
    settings: ModelSettings, name: str, accelerator: Accelerator, checkpoint: Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:  # fmt: skip
    """The base model with its adapter, or all of it trainable under `--full_finetune`.

    Frozen weights are loaded in the launch's mixed-precision dtype; weights that are trained are float32, as an
    update is too small a change for 16 bits. That goes for what is not quantized of a quantized model, too: PEFT's
    `prepare_model_for_kbit_training` would make it float32, and at a vocabulary of 128,256 and width 4096 embedding and
    head would take 2 GiB more.

    Args:
        settings: what of it is trained, and how it is loaded.
        name: of the base model, or its folder.
        accelerator: of the run.
        checkpoint: its weights are the ones that the training begins with.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: no such model in safetensors, or the checkpoint's adapter is not of this model.
    """
    whole = checkpoint if settings.full_finetune else None
    dtype = torch.float32 if settings.full_finetune else frozen_dtype(accelerator)
    model = load_base(settings, str(whole or name), accelerator, dtype, trust_remote_code, finite=whole is not None)
    adapted = make_trainable(settings, model, name, resumed=checkpoint is not None)
    if checkpoint is not None and not settings.full_finetune:
        restore_adapter(adapted, checkpoint)
    return adapted


def make_trainable(settings: ModelSettings, model: PreTrainedModel, name: str, resumed: bool = False) -> nn.Module:
    """The base model with a new adapter, or as it is under `--full_finetune`. Arguments and errors of `add_adapter`."""
    if settings.gradient_checkpointing:
        # Newer transformers have another name for it, and warn of this one.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model if settings.full_finetune else add_adapter(settings, model, name, resumed)
