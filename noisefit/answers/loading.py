"""Loading a model to answer with: an adapter on its base, or a base model alone."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from noisefit.answers.jobs import Job
from noisefit.answers.probability import input_device
from noisefit.answers.settings import AnswerSettings
from noisefit.answers.vocabulary import fit_vocabulary
from noisefit.base.errors import InputError, in_a_line, is_out_of_memory
from noisefit.inputs.adapters import check_adapter_names
from noisefit.inputs.model_checks import (
    check_model_name,
    check_no_adapter_in,
    check_quantization,
    check_revision,
    check_weights,
    checked_config,
    loading,
    try_out,
)
from noisefit.inputs.models import quantization_options
from noisefit.inputs.prompts import check_tokens, stop_token_ids

SAMPLES, SAMPLE_BYTES = 512, 2**14  # of a file of weights: 8 MiB
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


def find_base(settings: AnswerSettings) -> str:
    """The base model's folder or name: `--model_id`, else what the adapter records.

    Raises:
        InputError: `--model_path` is no adapter's folder, its weights are no safetensors, or the base is missing or
            not named.
    """
    recorded = None
    if settings.model_path:
        folder = Path(settings.model_path)
        if not folder.is_dir():
            raise InputError(f"--model_path {folder}: no such folder")
        if not (folder / "adapter_config.json").is_file():
            whole = "; it holds a whole model: give it as --model_id" if (folder / "config.json").is_file() else ""
            raise InputError(f"--model_path {folder}: no adapter_config.json in it, so it is no adapter{whole}")
        if not (folder / "adapter_model.safetensors").is_file():
            raise InputError(f"--model_path {folder}: no adapter_model.safetensors (pickles are not loaded)")
        recorded = recorded_base(folder)
        check_model_name("--model_path", settings.model_path)
    base = settings.model_id or recorded
    if base is None:
        raise InputError(f"--model_path {settings.model_path}: its adapter_config.json names no base model; give it as "
                         "--model_id")  # fmt: skip
    flag = settings.base_flag if settings.model_id else f"--model_path {settings.model_path}: its base model"
    check_model_name(flag, base)
    check_no_adapter_in(flag, base)
    check_revision(base, settings.model_revision)
    return base


def base_revision(settings: AnswerSettings, base: str) -> str | None:
    """The base model's branch, tag or commit on the hub: `--model_revision`, else what the adapter records of this
    model; `None` for its main branch, and for a folder."""
    if Path(base).is_dir():
        return None
    folder = Path(settings.model_path) if settings.model_path else None
    if settings.model_revision is not None or folder is None or recorded_base(folder) != base:
        return settings.model_revision
    return _recorded(folder, "revision")


def recorded_base(folder: Path) -> str | None:
    """The base model that an adapter records, if any. Raises `InputError` where its configuration is no JSON."""
    return _recorded(folder, "base_model_name_or_path")


def _recorded(folder: Path, key: str) -> str | None:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        text = config.get(key)
        return text if isinstance(text, str) else None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder}/adapter_config.json: not readable as a JSON object: {error}") from None


def load_answer_tokenizer(settings: AnswerSettings, base: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, with the prompt format of its training; else the base model's."""
    folder = Path(settings.model_path) if settings.model_path else None
    source = str(folder) if folder and (folder / "tokenizer_config.json").is_file() else base
    revision = base_revision(settings, base) if source == base else None
    with loading("--model_path" if folder else settings.base_flag, source, "a tokenizer", revision):
        how: Any = {"trust_remote_code": settings.trust_remote_code, "revision": revision or "main"}
        return AutoTokenizer.from_pretrained(source, **how)


def base_config(settings: AnswerSettings, base: str) -> PretrainedConfig:
    """The configuration of the base model's decoder."""
    revision = base_revision(settings, base)
    with loading(settings.base_flag, base, "a model", revision):
        how: Any = {"trust_remote_code": settings.trust_remote_code, "revision": revision or "main"}
        config = checked_config(AutoConfig.from_pretrained(base, **how))
    decoder: PretrainedConfig = config.get_text_config(decoder=True)
    return decoder


def context_length(settings: AnswerSettings, base: str) -> int | None:
    """The most tokens that the base model takes, prompt and answer together; `None` if it names no limit."""
    return getattr(base_config(settings, base), "max_position_embeddings", None)


def model_fingerprint(settings: AnswerSettings, base: str, device: torch.device) -> str:
    """A hash of what determines the model's numbers, by which unfinished answers are told from another run's.

    It is the same on every machine that has a copy of the same files, wherever and whenever it got them. Of large files
    it takes their size and samples of their content all over, as to read them whole would take long.
    """
    facts: list[Any] = [str(answer_dtype(settings, device)), device.type]
    facts += [settings.quantization, settings.attn_implementation, settings.no_merge, settings.engine]
    facts += [settings.device_map, settings.static_cache]
    if settings.model_path:
        paths = [Path(settings.model_path) / name for name in (*ADAPTER, *TOKENIZER)]
        facts += [(path.name, digest(path.read_bytes())) for path in paths if path.is_file()]
    if not Path(base).is_dir():
        facts += [base, *filter(None, [base_revision(settings, base)])]
    for path in sorted(Path(base).glob("*")) if Path(base).is_dir() else ():
        if path.suffix in (".json", ".safetensors"):
            facts.append((path.name, sampled_digest(path)))
    return digest(repr(facts).encode())


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's size, its end, and pieces at equal distances from its start on: all of it if it is small.

    A layer of weights is megabytes, so each gets some; what training or a merge changes is all over them.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        found = hashlib.sha256(f"{size} ".encode())
        step = max(size // SAMPLES, SAMPLE_BYTES)
        for start in (*range(0, size, step), max(size - SAMPLE_BYTES, 0)):
            file.seek(start)
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def answer_dtype(settings: AnswerSettings, device: torch.device) -> torch.dtype:
    """The dtype of the weights: `auto` is bfloat16 on a GPU, else float32."""
    return DTYPES.get(settings.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)


def check_device_map(settings: AnswerSettings) -> None:
    """Raise `InputError` where `--device_map` would give each of several processes all GPUs of the machine."""
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if settings.device_map is not None and on_machine > 1:
        raise InputError(f"--device_map {settings.device_map} is one process on a machine, and the launch has "
                         f"{on_machine}; launch with --num_processes 1, or leave it out")  # fmt: skip


def why_answers_differ(settings: AnswerSettings, device: torch.device) -> str | None:
    """A line where the same command may give other answers, if it may."""
    if settings.engine == "vllm":
        return ("--engine vllm: the same seed gives the same answers on this machine, with these versions and the same "
                "batches at best, and not those of transformers")  # fmt: skip
    dtype = str(answer_dtype(settings, device)).removeprefix("torch.")
    low = settings.quantization if settings.quantization != "none" else dtype
    if low == "float32":
        return None
    return f"in {low} answers may differ with the batch size and the number of processes; in float32 they do not"


def load_answer_model(settings: AnswerSettings, base: str, device: torch.device) -> PreTrainedModel:
    """The model in eval mode on its device, or on those of `--device_map`; the adapter is merged into float32 weights
    unless `--no_merge` is given.

    Weights of fewer bits are never merged: to round the sum would lose digits of the adapter. Nor are sharded ones, of
    which some may be on a disk.

    Raises:
        InputError: no causal language model in safetensors, or the adapter does not fit it.
    """
    check_quantization(settings.quantization, training=False)
    tensors = _adapter_tensors(settings.model_path) if settings.model_path else set()
    revision = base_revision(settings, base)
    stop_token_ids(base, revision)  # an error where they cannot be read, which transformers passes over
    dtype = answer_dtype(settings, device)
    options: dict[str, Any] = {"dtype": dtype} | quantization_options(settings.quantization, dtype, device)
    if settings.device_map is not None:
        options["device_map"] = settings.device_map
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if revision is not None:
        options["revision"] = revision
    with loading(settings.base_flag, base, "a causal language model in safetensors", revision):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **options,
        )
        model, report = loaded
        check_weights(report, base)
    if settings.model_path:
        model = _with_adapter(model, settings, settings.model_path, base, tensors)
    placed = settings.quantization != "none" or settings.device_map is not None
    model = model.eval() if placed else model.to(device).eval()
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    try_out(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, settings.base_flag, base)
    return model


def _adapter_tensors(folder: str) -> set[str]:
    """The names of an adapter's tensors; raises `InputError` where its file is damaged or of another kind."""
    path = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file, and nothing else is loaded ({error})") from None


def _with_adapter(model: PreTrainedModel, settings: AnswerSettings, folder: str, base: str, tensors: set[str]) -> Any:
    if {"cpu", "disk"} & set(map(str, (getattr(model, "hf_device_map", None) or {}).values())):
        # PEFT would write the files of the weights anew, with the adapter among them.
        raise InputError(f"--device_map {settings.device_map}: {base} does not fit the machine's GPUs, and with an "
                         "adapter none of it can be elsewhere; give --quantization, or use more GPUs")  # fmt: skip
    recorded = recorded_base(Path(folder)) or "an unknown model"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of weights that have no place; they are an error below
            fit_vocabulary(model, Path(folder))
            adapted = PeftModel.from_pretrained(model, folder)
        check_adapter_names(adapted, tensors)
    except Exception as error:  # whatever PEFT makes of files that anybody may have written
        if is_out_of_memory(error):
            raise
        reason = in_a_line(error)
        raise InputError(
            f"--model_path {folder}: does not fit {base}; it was trained on {recorded} ({reason})"
        ) from None
    can_merge = hasattr(adapted, "merge_and_unload")  # prompt tuning, for one, adds nothing to the weights
    as_they_are = settings.no_merge or settings.quantization != "none" or settings.device_map is not None
    if not can_merge or as_they_are or model.dtype != torch.float32:
        return adapted
    try:
        return adapted.merge_and_unload()
    except Exception as error:  # some kinds of adapters cannot be merged
        if is_out_of_memory(error):
            raise
        reason = in_a_line(error)
        raise InputError(f"--model_path {folder}: not to be merged into the weights ({reason}); give "
                         "--no_merge") from None  # fmt: skip


def check_vocabulary(model: PreTrainedModel, jobs: Iterable[Job]) -> None:
    """Raise `InputError` where a prompt has tokens that the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()
    for job in jobs:
        check_tokens(job.input_ids, len(embeddings.weight), f"prompt {job.index + 1}")
