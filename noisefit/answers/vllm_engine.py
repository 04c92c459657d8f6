"""Answers through vLLM (`--engine vllm`): faster, and with a weaker promise.

Each answer has a seed of its own, of `--seed`, its prompt and its round. vLLM seeds a generator on the device with it,
and its logits depend on what is in the batch. So the same seed gives the same answers on the same machine, with the
same versions and the same batches, at best; they are not those of the other engine.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedTokenizerBase

from noisefit.answers.ending import Ending, asked_for
from noisefit.answers.gumbel import answer_key
from noisefit.answers.jobs import Answer, Answered, Job
from noisefit.answers.loading import answer_dtype, base_config, base_revision
from noisefit.answers.probability import round_log_p
from noisefit.answers.settings import AnswerSettings
from noisefit.base.errors import InputError, LocalError
from noisefit.inputs.model_checks import loading
from noisefit.inputs.prompts import check_tokens, stop_token_ids

AT_ONCE = 4096  # answers that are handed over together; vLLM makes batches of them, and then they go to disk
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has room for
LEAST_TEMPERATURE = 0.01  # it takes this for any that is lower


def check_vllm(settings: AnswerSettings, accelerator: Accelerator) -> None:
    """Refuse, before anything is loaded, what vLLM cannot do. Flags that do not go with it are refused earlier.

    Raises:
        InputError: it is not installed, or the launch has several processes.
    """
    if settings.engine != "vllm":
        return
    if accelerator.num_processes > 1:
        raise InputError(f"--engine vllm is one process, and the launch has {accelerator.num_processes}; start "
                         "generate.py with python, and give --tensor_parallel for several GPUs")  # fmt: skip
    if importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm needs vLLM: pip install vllm")
    if not settings.greedy and settings.temperature < LEAST_TEMPERATURE:
        raise InputError(f"--temperature {settings.temperature:g}: vLLM takes {LEAST_TEMPERATURE:g} for any that is "
                         "lower; give that, or --greedy")  # fmt: skip


class VllmAnswerer:
    """Answers batches of prompts as `Answerer` does.

    Args:
        settings: of the program.
        base: the base model's folder or name.
        tokenizer: with the chat template of the prompts.
        jobs: all that will be asked: the longest decides how much room a prompt has.
        device: which decides the dtype where none is given.

    Raises:
        InputError: a prompt's token has no embedding, the adapter's rank is too large, or vLLM cannot load the model.
    """

    def __init__(
        self, settings: AnswerSettings, base: str, tokenizer: PreTrainedTokenizerBase, jobs: Sequence[Job],
        device: torch.device,
    ):  # fmt: skip
        self.sampling, self.device, self.base_flag, self.base = settings, torch.device("cpu"), settings.base_flag, base
        revision = base_revision(settings, base)
        stop_token_ids(base, revision)  # an error where they cannot be read
        config = base_config(settings, base)
        for job in jobs:
            check_tokens(job.input_ids, config.vocab_size, f"prompt {job.index + 1}")
        try:
            of_model = GenerationConfig.from_pretrained(base, revision=revision or "main")
        except OSError:
            of_model = GenerationConfig.from_model_config(config)
        self.ending, self.not_applied = Ending(tokenizer, of_model), asked_for(of_model)
        options: dict[str, Any] = {} if revision is None else {"revision": revision, "tokenizer_revision": revision}
        folder = settings.model_path
        if folder:
            options |= dict(enable_lora=True, max_loras=1, max_lora_rank=rank_of(Path(folder)))
        with loading(self.base_flag, base, "a model of vLLM"):
            from vllm import LLM
            from vllm.lora.request import LoRARequest

            self.lora = LoRARequest("adapter", 1, str(Path(folder).resolve())) if folder else None
            self.llm = LLM(
                model=base,
                trust_remote_code=settings.trust_remote_code,
                dtype=str(answer_dtype(settings, device)).removeprefix("torch."),
                tensor_parallel_size=settings.tensor_parallel,
                max_model_len=max(len(job.input_ids) for job in jobs) + settings.max_new_tokens,
                seed=0,  # of what has no seed of its own: nothing
                logprobs_mode="raw_logprobs",  # of the model's own distribution
                generation_config="vllm",  # the model's own settings are not applied
                **options,
            )

    def answer(self, batch: Sequence[Job]) -> list[Answered]:
        """Answer every round of every job; an answer is the new tokens alone.

        Raises:
            InputError: vLLM cannot, which is often an adapter that it does not support.
            LocalError: the model's logits are no numbers.
        """
        tasks = [(job, number) for job in batch for number in job.rounds]
        with loading(self.base_flag, self.base, "a model that vLLM answers with"):
            outputs = self.llm.generate(
                [{"prompt_token_ids": job.input_ids} for job, _ in tasks],
                [self._params(job, number) for job, number in tasks],
                use_tqdm=False,
                lora_request=self.lora,
            )
        found = zip(tasks, outputs, strict=True)
        return [(job.index, number, self._answer(output.outputs[0])) for (job, number), output in found]

    def _params(self, job: Job, number: int) -> Any:
        from vllm import SamplingParams

        s = self.sampling
        drawn = dict(temperature=0.0) if s.greedy else dict(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
        return SamplingParams(
            **drawn,
            repetition_penalty=s.repetition_penalty,
            seed=answer_key(s.seed, job.prompt, number, job.occurrence) & (2**63 - 1),
            max_tokens=s.max_new_tokens,
            stop_token_ids=self.ending.stop_ids,
            stop=self.ending.stop_strings,
            ignore_eos=True,  # ours are all that end an answer
            logprobs=0,  # of the drawn token alone
            detokenize=self.ending.stop_strings is not None,  # the text is ours to make
        )

    def _answer(self, output: Any) -> Answer:
        tokens = self.ending.own_tokens(list(output.token_ids))
        own = zip(tokens, output.logprobs, strict=False)  # behind the end they are not its own
        value = sum(at_position[token].logprob for token, at_position in own)
        if not math.isfinite(value):
            raise LocalError("the model's logits are not finite numbers; look for NaN in the weights of model and "
                             "adapter, or try --dtype float32")  # fmt: skip
        return Answer(self.ending.text(tokens), round_log_p(value), len(tokens))


def rank_of(folder: Path) -> int:
    """The least room that vLLM has for an adapter's rank. Raises `InputError` where it has none, or is none."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f"--model_path {folder}: its adapter_config.json has no rank, and vLLM takes LoRA alone"
        ) from None
    room = next((room for room in RANKS if room >= rank), None)
    if room is None:
        raise InputError(f"--model_path {folder}: an adapter of rank {rank}; vLLM has room for {RANKS[-1]}")
    return room
