"""Checks of a model's files: names, sizes, weights, and whatever libraries raise over them, as one line each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from noisefit.base.errors import InputError, in_a_line, is_out_of_memory, notice, on_main_process
from noisefit.base.files import check_regular

LARGEST = {"num_hidden_layers": 10**4, "vocab_size": 10**8, "hidden_size": 10**7, "max_position_embeddings": 10**10}


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


def check_revision(name: str, revision: str | None, flag: str = "--model_revision") -> None:
    """Raise `InputError` where a revision is given and the model is a folder, which has none."""
    if revision is not None and Path(name).is_dir():
        raise InputError(f"{flag} {revision} is of a model on the hub, and {name} is a folder; leave it out")


def check_no_adapter_in(flag: str, name: str) -> None:
    """Raise `InputError` where a model's folder holds an adapter, too, which transformers would apply."""
    if (Path(name) / "adapter_config.json").exists():
        whole = (Path(name) / "config.json").exists()
        what = "a whole model and an adapter, which would be applied to it" if whole else "an adapter"
        raise InputError(f"{flag} {name}: the folder holds {what}; expected a model alone")


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


def check_checkpointing(gradient_checkpointing: bool, device: torch.device) -> None:
    """Raise `InputError` where a block that is computed again would get other noise and dropout than before.

    torch's checkpointing gives the random state back where the device's module says that it is initialized, which
    Apple's never does (torch 2.13): gradients would be wrong without an error.
    """
    if gradient_checkpointing and device.type != "cpu" and not hasattr(torch.get_device_module(device), "_initialized"):
        raise InputError(f"--gradient_checkpointing: on {device.type} torch does not draw the same noise and dropout "
                         "again when it computes a block again; leave it out")  # fmt: skip


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


@contextmanager
def loading(flag: str, name: str, what: str, revision: str | None = None) -> Iterator[None]:
    """Turn what a library raises while it loads `name` as `what` into an `InputError` that names the flag."""
    if not on_main_process():
        disable_progress_bar()  # the main process shows one for all
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its tables of weights; what is wrong with them is our line
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a library makes of files that anybody may have written
        if is_out_of_memory(error):
            raise
        reason = in_a_line(error, 300)
        at = "" if revision is None else f" at --model_revision {revision}"
        raise InputError(f"{flag} {name}: not to be loaded as {what}{at}: {reason}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
