"""An adapter merged into the weights of its base model, and what that changes in the model's logits.

All is computed in float32 on the CPU. The merged model is the one that was loaded, changed in place: its weights
are in memory once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from noisefit.answers.loading import DTYPES, base_revision
from noisefit.answers.settings import AnswerSettings
from noisefit.base.errors import InputError, in_a_line, is_out_of_memory
from noisefit.base.files import give_usual_mode
from noisefit.inputs.model_checks import check_weights, checked_config, loading
from noisefit.inputs.prompts import prompt_ids, token_ids
from noisefit.inputs.templates import set_chat_template

QUESTIONS = ("Who wrote Emma?", "What is the capital of Portugal?", "How many legs does a spider have, and why?")
RANDOM_ROWS, LENGTH, SEED = 4, 32, 0
# Of the size of the logits: what the other order of the sums in a merged layer may change. Float32 keeps 6e-8 of a
# number; tiny models differ by 4e-7 to 9e-7, one of 24 layers and width 1024 by 1.7e-6.
ROUNDING = 1e-5
# Of what the adapter does: a merge that is wrong in one layer loses more.
SHARE = 0.01


@dataclass(frozen=True)
class Change:
    """How far logits are from others.

    Attributes:
        largest: of the differences, each the absolute one of two logits.
        rms: their root mean square.
    """

    largest: float
    rms: float


def probes(tokenizer: PreTrainedTokenizerBase, vocabulary: int, limit: int | None) -> list[Tensor]:
    """Token ids `[L]` to compare logits on: some questions in the chat format, and random tokens, always the same.

    Args:
        tokenizer: with its chat template, or without one.
        vocabulary: tokens that the model has an embedding for.
        limit: the most tokens that the model takes; `None` for no limit.
    """
    asking = copy.deepcopy(tokenizer)
    try:
        set_chat_template(asking)
        rows = [prompt_ids(asking, question) for question in QUESTIONS]
    except InputError:  # a template that is no chat's, of an adapter for something else
        rows = [token_ids(tokenizer, question) for question in QUESTIONS]
    rows = [[token for token in row if token < vocabulary] for row in rows]
    generator = torch.Generator().manual_seed(SEED)
    known = min(vocabulary, len(tokenizer))
    rows += torch.randint(0, known, (RANDOM_ROWS, LENGTH), generator=generator).tolist()
    return [torch.tensor(row[: limit or None]) for row in rows if row]


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """The logits `[L, V]` of each row of token ids, float32."""
    return [model(input_ids=row[None]).logits[0].float() for row in rows]


def logits_without(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """The same of a `PeftModel` with its adapter off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # biases that it changed stay as they are: a small part of what it does
        with model.disable_adapter():
            return logits_of(model, rows)


def change(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Change:
    """How far the one logits are from the others."""
    differences = [one - other for one, other in zip(found, expected, strict=True)]
    count = sum(d.numel() for d in differences)
    total = sum(d.double().square().sum().item() for d in differences)
    return Change(max(d.abs().max().item() for d in differences), (total / count) ** 0.5)


def size_of(logits: Sequence[Tensor]) -> float:
    """The root mean square of logits, from each position's mean: a constant changes no prediction."""
    centred = [z - z.mean(-1, keepdim=True) for z in logits]
    return change(centred, [torch.zeros_like(z) for z in centred]).rms


def saved_dtype(settings: AnswerSettings, base: str, asked: str) -> torch.dtype:
    """What the weights are to be saved in: as `asked`, `auto` for what the base model's are in.

    Raises:
        InputError: the base model is quantized, or its dtype is none of ours.
    """
    revision = base_revision(settings, base)
    with loading(settings.base_flag, base, "a model", revision):
        how: Any = {"trust_remote_code": settings.trust_remote_code, "revision": revision or "main"}
        config = checked_config(AutoConfig.from_pretrained(base, **how))
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"the base model {base} is quantized, and nothing can be added to its weights; give the model "
                         "that it was made from as --model_id")  # fmt: skip
    own: Any = config.dtype if config.dtype is not None else config.get_text_config(decoder=True).dtype
    if asked == "auto" and own not in (None, *DTYPES.values()):
        raise InputError(f"the base model {base} has weights in {own}; give a --dtype")
    return DTYPES.get(asked) or own or torch.float32


def check_kind(model: Any, where: str) -> None:
    """Raise `InputError` where a `PeftModel`'s adapter is of a kind that adds nothing to weights; `where` begins the
    line."""
    if not hasattr(model, "merge_and_unload"):  # prompt tuning, for one
        kind = model.active_peft_config.peft_type
        raise InputError(f"{where}: an adapter of the kind {getattr(kind, 'value', kind)} adds nothing to the weights, "
                         "so it cannot be merged")  # fmt: skip


def merge_adapter(model: Any, where: str) -> PreTrainedModel:
    """The base model with the adapter added to its weights, in place.

    Args:
        model: a `PeftModel` in eval mode, its weights float32.
        where: begins the line of an error.

    Raises:
        InputError: the adapter cannot be merged.
    """
    _untie(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.merge_and_unload(safe_merge=True)
    except Exception as error:  # some kinds of adapters cannot be merged
        if is_out_of_memory(error):
            raise
        reason = in_a_line(error)
        raise InputError(f"{where}: cannot be merged into the weights: {reason}") from None


def _untie(model: Any) -> None:
    """Give the head a weight of its own where it shares the embedding's, and the adapter changes one of the two: merged
    into the shared weight it would change the other, too."""
    base = model.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    if inputs is None or outputs is None:
        return
    layers = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in (inputs, outputs)]
    adapted = any(layer is not module for layer, module in zip(layers, (inputs, outputs), strict=True))
    if adapted and layers[0].weight is layers[1].weight:
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
        base.config.get_text_config(decoder=True).tie_word_embeddings = False


def round_weights(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> None:
    """Round the weights to what `dtype` has numbers for, but for those that the architecture keeps in float32.

    Args:
        model: changed in place.
        dtype: of 16 bits, or float32, which changes nothing.
        keep: the tensors stay float32, so that the model still computes in it; else they are of `dtype` then.

    Raises:
        InputError: a weight is too large for `dtype`.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    saved = set(model.state_dict())  # names alone: the tensors are to go
    tensors = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in saved)]
    for name, tensor in tensors:
        if not tensor.is_floating_point() or any(f".{part}." in f".{name}." for part in kept):
            continue
        rounded = tensor.data.to(dtype)
        if not rounded.isfinite().all():
            raise InputError(f"{name} has weights that {str(dtype).removeprefix('torch.')} has no numbers for; give "
                             "another --dtype")  # fmt: skip
        tensor.data = rounded.to(torch.float32) if keep else rounded


def write_merged(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shard: str | None) -> None:
    """Write model, generation settings and tokenizer to an empty folder, as transformers reads them."""
    how: dict[str, Any] = {} if shard is None else {"max_shard_size": shard}
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        give_usual_mode(path)


def read_merged(folder: Path, trust_remote_code: bool) -> Any:
    """The model in `folder`, in float32 and eval mode.

    Raises:
        InputError: it is not to be loaded, or lacks weights or has too many.
    """
    with loading("what was saved in", str(folder), "a causal language model in safetensors"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        model, report = loaded
        check_weights(report | {"unexpected_keys": ()}, str(folder))
        if report["unexpected_keys"]:
            raise ValueError(f"its files hold {min(report['unexpected_keys'])}, which has no place in it")
    return model.eval()


def check_saved(
    folder: Path, expected: Sequence[Tensor], rows: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype, tolerance: float, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Refuse what was saved where it is not what was in memory.

    Args:
        folder: of the saved model.
        expected: logits of the model in memory, its weights rounded to `dtype`. So the tolerance need not allow for
            what a dtype loses, and a small difference is found under any.
        rows: the token ids that they are of.
        tokenizer: that was saved.
        dtype: of the saved weights.
        tolerance: for the root mean square of the differences.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: as said.
    """
    off = change(logits_of(read_merged(folder, trust_remote_code), rows), expected)
    if not off.rms <= tolerance:
        raise InputError(f"loaded back, the model's logits differ by up to {off.largest:.2g} from those before it was "
                         "saved")  # fmt: skip
    with loading("what was saved in", str(folder), "the same model"):
        found = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).dtype
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if found != dtype:
            raise ValueError(f"its configuration has the dtype {found}, and its weights are {dtype}")
        if again.chat_template != tokenizer.chat_template or any(again(q) != tokenizer(q) for q in QUESTIONS):
            raise ValueError("its tokenizer is another one")
