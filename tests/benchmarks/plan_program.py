"""Run by `test_plan.py` on two processes of a CPU: `main([RESULTS.json])` writes what one of them holds and sends."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from noisefit.base.precision import keep_float32_when_sharded
from noisefit.fork.branches import CLEAN, NOISY, BranchedModel
from noisefit.fork.decoder import find_decoder_layers
from noisefit.inputs.batches import collate
from noisefit.inputs.models import ModelSettings, make_trainable
from noisefit.inputs.prompts import Example
from noisefit.method.losses import cross_entropy
from noisefit.method.noise import TokenScaledNoise

LAYERS, ROWS, LENGTH, MICRO = 4, 2, 32, 3
CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
CASES = [
    dict(sharding=sharding, strategy=strategy, precision=precision, flags=flags)
    for sharding, strategy, precision, flags in (
        ("ddp", "fork", "no", {}),
        ("ddp", "fork", "no", {"full_finetune": True}),
        ("fsdp", "fork", "no", {}),
        ("fsdp", "separate", "bf16", {}),
        ("fsdp", "separate", "no", {"gradient_checkpointing": True}),
        ("fsdp", "fork", "bf16", {"full_finetune": True}),
        ("fsdp", "separate", "no", {"full_finetune": True}),
    )
]


class Sent(TorchDispatchMode):
    """Bytes of what goes through each kind of collective, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.bytes[function.overloadpacket.__name__] += max(sizes)
        return function(*args, **(kwargs or {}))


def build(precision: str, **flags: Any) -> BranchedModel:
    """As `load_model` and accelerate make it."""
    torch.manual_seed(0)
    settings = ModelSettings(**flags)
    frozen = torch.bfloat16 if precision == "bf16" and not settings.full_finetune else torch.float32
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=frozen)
    return BranchedModel(make_trainable(settings, model, "tiny"), 64).train()


def losses(logits: Any, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"ce": sum(cross_entropy(z, targets) for z in (*logits[CLEAN], *logits[NOISY]))}  # type: ignore[dict-item]


def policy_of(precision: str) -> MixedPrecisionPolicy:
    """What a launch of FSDP2 has in this precision, as the loop leaves it."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if precision != "no":
        plugin.set_mixed_precision(precision)
    launch: Any = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    keep_float32_when_sharded(launch)
    return plugin.mixed_precision_policy or MixedPrecisionPolicy()


def step(sharding: str, strategy: str, precision: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Two steps of a model under one launch: what the second one sends, and what is held after it."""
    branched = build(precision, **flags)
    model: Any = branched
    if sharding == "ddp":
        model = DistributedDataParallel(branched)
    else:
        policy = policy_of(precision)
        for layer in find_decoder_layers(branched):
            fully_shard(layer, mp_policy=policy)
        fully_shard(branched, mp_policy=policy)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = collate([Example([1 + i for i in range(LENGTH)], 8)] * ROWS, 0)
    noise = {1: TokenScaledNoise(0.1)}
    for _ in range(2):
        optimizer.zero_grad()
        with Sent() as sent:
            for micro in range(MICRO):
                waits = sharding == "ddp" and micro < MICRO - 1  # as `noisefit.run.processes.reduction` has it
                with model.no_sync() if waits else nullcontext():
                    found = model(**batch, noise=noise, strategy=strategy, chunk_losses=losses)
                    found["ce"].backward()
        optimizer.step()
    local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters() if p.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "weights": sum(part.nbytes for part in local),
        "gradients": sum(part.nbytes for part in gradients),
        "optimizer": sum(getattr(value, "_local_tensor", value).nbytes for value in states),
        "sent": dict(sent.bytes),
        "loss": str(found["ce"].dtype),
    }


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [step(**case) for case in CASES]
    if dist.get_rank() == 0:
        Path(argv[0]).write_text(json.dumps({"processes": dist.get_world_size(), "cases": found}))
    dist.barrier()
    dist.destroy_process_group()
