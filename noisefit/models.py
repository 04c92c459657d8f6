"""Loading the base model and its tokenizer, checking what can be checked before, and adding the adapter."""

from __future__ import annotations

import importlib.util
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from noisefit.decoder import find_decoder_layers
from noisefit.errors import InputError, is_out_of_memory, notice, on_main_process
from noisefit.files import check_regular

LARGEST = {"num_hidden_layers": 10**4, "vocab_size": 10**8, "hidden_size": 10**7, "max_position_embeddings": 10**10}


def load_config(args: Namespace) -> PreTrainedConfig:
    """The base model's configuration. Raises `InputError` as `check_model_name`, or if it is none."""
    check_model_name("--model", args.model)
    with loading("--model", args.model, "a model"):
        return checked_config(AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code))


def checked_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration itself. Raises `ValueError` where its sizes are none: a module would be made for each layer."""
    sizes = config.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings"):
        value = getattr(sizes, name, None)
        if value is not None and (type(value) is not int or not 0 <= value <= LARGEST[name]):
            raise ValueError(f"{name} is {value!r} in its config.json")
    return config


def check_model_name(flag: str, name: str) -> None:
    """Raise `InputError` where `name` can only be a folder, and there is none."""
    path = Path(name)
    try:
        exists = path.exists()
    except OSError as error:  # a name too long, a folder that cannot be entered
        raise InputError(f"{flag} {name}: {error.strerror or error}") from None
    if not exists and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"{flag} {name}: no such folder")
    if path.is_file():
        raise InputError(f"{flag} {name}: a file, expected a folder in the Hugging Face format")
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors"):  # what a model's folder is read for
            check_regular(file, f"{flag}: ")


def load_tokenizer(args: Namespace) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises `InputError` where there is none."""
    with loading("--model", args.model, "a tokenizer"):
        return AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)


def check_model(args: Namespace, config: PreTrainedConfig) -> tuple[int, int]:
    """Build the model without weights, and refuse what cannot be trained as asked.

    Returns:
        Its number of decoder layers, and of token embeddings.

    Raises:
        InputError: not a causal language model, no decoder layers, target modules that match nothing, quantization
            that this machine cannot do.
    """
    check_quantization(args.quantization, training=True)
    with loading("--model", args.model, "a causal language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    num_layers, embeddings = len(find_decoder_layers(model)), model.get_input_embeddings()
    if not args.full_finetune:
        add_adapter(args, model)
    return num_layers, len(embeddings.weight)


def limit_length(args: Namespace, config: PreTrainedConfig) -> None:
    """Lower `--max_length` to the model's positions, with a line: a row past them could not be computed."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and args.max_length > limit:
        notice(
            f"rows are cut at {limit} tokens, as {args.model} has no more positions (--max_length {args.max_length})"
        )
        args.max_length = limit


def check_quantization(quantization: str, training: bool) -> None:
    """Raise `InputError` where `--quantization` asks for what is not installed or not possible here."""
    if quantization == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--quantization {quantization} needs bitsandbytes: pip install bitsandbytes")
    import bitsandbytes

    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None else accelerator.type
    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device not in supported:
        devices = ", ".join(sorted(supported))
        raise InputError(f"--quantization {quantization}: bitsandbytes works on {devices}, this machine has {device}")
    if training and (device, quantization) == ("cpu", "4bit"):
        # After one pass in eval mode it repacks the weights for inference, and gradients are zero without an error.
        raise InputError("--quantization 4bit: bitsandbytes does not train 4-bit models on a CPU; use 8bit or a GPU")


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


def load_model(args: Namespace, accelerator: Accelerator, checkpoint: Path | None = None) -> nn.Module:
    """The base model with its adapter, or all of it trainable under `--full_finetune`.

    Frozen weights are loaded in the launch's mixed-precision dtype; weights that are trained are float32, as an
    update is too small a change for 16 bits.

    Args:
        args: the run's settings.
        accelerator: of the run.
        checkpoint: its weights are the ones that the training begins with.

    Raises:
        InputError: no such model in safetensors, or the checkpoint's adapter is not of this model.
    """
    frozen_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    options: dict[str, Any] = {"dtype": torch.float32 if args.full_finetune else frozen_dtype}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    options |= quantization_options(args.quantization, frozen_dtype, accelerator.device)
    whole = checkpoint if args.full_finetune else None
    with loading("--model", str(whole or args.model), "weights as safetensors"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            whole or args.model, use_safetensors=True, trust_remote_code=args.trust_remote_code,
            output_loading_info=True, **options,
        )  # fmt: skip
        model, report = loaded
        check_weights(report, str(whole or args.model))
        if whole is not None:
            wrong = [*report["unexpected_keys"]]
            wrong += [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
            if wrong:
                raise ValueError(f"{wrong[0]} is not of this model or not finite")
    if args.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if args.gradient_checkpointing:
        # Newer transformers have another name for it, and warn of this one.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if args.full_finetune:
        return model
    adapted = add_adapter(args, model)
    if checkpoint is not None:
        _restore_adapter(adapted, checkpoint)
    return adapted


@torch.no_grad()
def try_out(model: nn.Module, batch: Mapping[str, Tensor], flag: str, name: str) -> None:
    """Compute with the model once, so that settings in its files with which it cannot are told as such.

    Args:
        model: on its device; of a launch all processes call it.
        batch: `input_ids` and `attention_mask`, `[B, L]`.
        flag, name: by which the user gave the model.

    Raises:
        InputError: its own code fails.
    """
    was_training = model.training
    with loading(flag, name, "a model that computes"):
        model.eval()
        model(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1])
    model.train(was_training)


def check_weights(report: Mapping[str, Any], name: str) -> None:
    """Refuse a model of which some weights were not found: transformers leaves them random, with a warning.

    Args:
        report: `from_pretrained`'s loading info.
        name: of the model, for the line about tensors that have no place in it.

    Raises:
        ValueError: as said, with the names.
    """
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        hint = f"; the files hold {_first(surplus)} instead" if surplus else ""
        raise ValueError(f"its files lack {_first(missing)}{hint}")
    if surplus:
        notice(f"{name}: its files hold tensors that this architecture has no place for: {_first(surplus)}")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _restore_adapter(model: nn.Module, checkpoint: Path) -> None:
    with loading("--resume_from_checkpoint", str(checkpoint), "this model's adapter"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        unmatched = weights.keys() ^ get_peft_model_state_dict(model).keys()
        if unmatched:
            raise ValueError(f"{len(unmatched)} tensors are in one of the two only, {min(unmatched)} for one")
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{bad[0]} is not finite")
        set_peft_model_state_dict(model, weights)


def add_adapter(args: Namespace, model: PreTrainedModel) -> nn.Module:
    """Put a LoRA adapter on the model.

    Raises:
        InputError: `--target_modules` matches nothing, or none is given and PEFT knows none for the architecture.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.target_modules,
    )
    names = [name for name, _ in model.named_modules()]
    try:
        if isinstance(args.target_modules, list):
            for target in args.target_modules:  # of several, PEFT passes over those that match nothing
                if not any(name == target or name.endswith(f".{target}") for name in names):
                    raise ValueError(f"no module is called {target}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers, nothing to do with the user
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT corrects it by itself
            adapted = get_peft_model(model, lora)
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise InputError(f"--lora_r {args.lora_r}: no memory for an adapter of that rank") from None
        wanted = " ".join(args.target_modules) if isinstance(args.target_modules, list) else args.target_modules
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        what = f"--target_modules {wanted}" if wanted else "no adapter can be put on the model"
        if "specify `target_modules`" in str(error):
            what = f"PEFT has no default target modules for {model.config.model_type}, give --target_modules"
        raise InputError(f"{what}: {error}; linear modules found: {', '.join(linear)}") from None
    # The adapter must find its base again from whatever folder it is loaded.
    if os.path.isdir(args.model):
        adapted.peft_config["default"].base_model_name_or_path = os.path.abspath(args.model)
    return adapted


@contextmanager
def loading(flag: str, name: str, what: str) -> Iterator[None]:
    """Turn what a library raises while it loads `name` as `what` into an `InputError` that names the flag."""
    if not on_main_process():
        disable_progress_bar()  # the main process shows one for all
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a library makes of files that anybody may have written
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{flag} {name}: not to be loaded as {what}: {reason}") from None
