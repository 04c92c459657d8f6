"""A stand-in for vLLM where it is not installed: the signatures of its documentation (0.33), strict, and beneath them a
real model that generates token by token, one request at a time, with a generator for each.

Nothing of it is known to `noisefit`; the same program was run on the real vLLM 0.32 on a CPU by hand.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        assert self.stop is None or not self.stop or self.detokenize  # as the real one demands
        assert self.seed is None or -(2**63) <= self.seed < 2**63


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class LLM:
    made: ClassVar[list[LLM]] = []

    def __init__(
        self, model: str, *, tokenizer: str | None = None, trust_remote_code: bool = False, dtype: str = "auto",
        tensor_parallel_size: int = 1, quantization: str | None = None, seed: int = 0, max_model_len: int | None = None,
        enable_lora: bool = False, max_loras: int = 1, max_lora_rank: int = 16, logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
    ):  # fmt: skip
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        assert logprobs_mode in ("raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs")
        assert (logprobs_mode, generation_config) == ("raw_logprobs", "vllm")  # else logprobs would be others
        self.given = dict(locals())
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self.adapted, self.asked = False, []
        LLM.made.append(self)

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert len(prompts) == len(sampling_params)
        if lora_request is not None and not self.adapted:
            assert self.given["enable_lora"] and lora_request.lora_int_id >= 1
            self.model = PeftModel.from_pretrained(self.model, lora_request.lora_path).eval()
            self.adapted = True
        self.asked += sampling_params
        pairs = zip(prompts, sampling_params, strict=True)
        return [types.SimpleNamespace(outputs=[self._one(p["prompt_token_ids"], params)]) for p, params in pairs]

    def _one(self, prompt, params):
        assert len(prompt) + params.max_tokens <= self.given["max_model_len"]
        generator = torch.Generator().manual_seed(params.seed)
        warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
        if params.temperature > 0:
            warpers.append(TemperatureLogitsWarper(max(params.temperature, 0.01)))
            warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
            warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        tokens, found = [], []
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        while len(tokens) < params.max_tokens:
            ids = torch.tensor([[*prompt, *tokens]])
            logits = self.model(input_ids=ids).logits[:, -1].float()
            scores = warpers(ids, logits.clone())
            p = scores.softmax(-1)
            token = int(torch.multinomial(p, 1, generator=generator) if params.temperature > 0 else p.argmax())
            tokens.append(token)
            raw = logits.log_softmax(-1)[0, token]
            found.append({token: Logprob(float(raw), int((logits > logits[0, token]).sum()) + 1)})
            text = self.tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
            if token in params.stop_token_ids or any(stop in text for stop in stops):
                break
            if not params.ignore_eos and token == self.tokenizer.eos_token_id:
                break
        return types.SimpleNamespace(index=0, text="", token_ids=tokens, logprobs=found, cumulative_logprob=None)


def install(monkeypatch) -> type[LLM]:
    """Let `import vllm` find this, for the test."""
    package, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for module in (package, lora, request):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    LLM.made = []
    return LLM
