"""Run by `test_fsdp.py` on two processes of a CPU: `fsdp_program.py RESULTS.json FLAGS_OF_TRAIN_LOOP...`

First `RESULTS.json`, unless it is `none`, gets the differences between sharded losses and gradients and those of the
plain model; then train_loop.py runs with these flags, sharded by accelerate as the launch's configuration says. Each
process says which safetensors files it took tensors from.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
import transformers.modeling_utils
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from peft import LoraConfig, get_peft_model
from tiny_models import fixed_noise, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import train_loop
from noisefit.fork.branches import CLEAN, NOISY, BranchedModel, Logits, Losses
from noisefit.fork.decoder import find_decoder_layers
from noisefit.inputs.batches import collate
from noisefit.inputs.prompts import Example
from noisefit.method.losses import consistency_loss, cross_entropy, soft_target_loss
from noisefit.run import processes
from noisefit.run.settings import parse_arguments
from noisefit.run.weights import gather_weights

SECONDS = 280  # a process whose partner is gone would wait for it half an hour
NOISE = {1: fixed_noise(1), 2: fixed_noise(2)}
LENGTHS = [(11, 4, 9), (6,)]  # of the rows of each process: three chunks of targets on one, one on the other


def branched_model(kind: str) -> BranchedModel:
    if kind == "tied":  # all weights trained, of which the head's are the embedding's
        return BranchedModel(tiny_model(tie_word_embeddings=True), loss_chunk_size=6)
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and with it the gradient of lora_A
            nn.init.normal_(parameter, std=0.1)
    return BranchedModel(model.double(), loss_chunk_size=6)


def batch_of(process: int, empty: bool) -> dict[str, Tensor]:
    if empty and process == 1:
        return collate([], pad_token_id=0)
    ids = tiny_batch(LENGTHS[process], seed=process)["input_ids"]
    rows = zip(ids.tolist(), LENGTHS[process], strict=True)
    return collate([Example(tuple(row[:length]), target_start=3) for row, length in rows], pad_token_id=0)


def chunk_losses(logits: Logits, targets: Tensor) -> Losses:
    [clean], (noisy_1, noisy_2) = logits[CLEAN], logits[NOISY]
    soft = soft_target_loss(clean, noisy_1, 2.0) + soft_target_loss(clean, noisy_2, 2.0)
    consistency = consistency_loss(noisy_1, noisy_2, 2.0)
    return {"ce": cross_entropy(clean, targets), "soft": soft / 2, "consistency": consistency}


def loss_sums(model: nn.Module, batch: dict[str, Tensor], strategy: str) -> Tensor:
    return torch.stack(list(model(**batch, noise=NOISE, strategy=strategy, chunk_losses=chunk_losses).values()))


def sharded(model: BranchedModel, checkpointing: bool) -> BranchedModel:
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (2,))
    for layer in find_decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def differences(
    accelerator: Accelerator, kind: str, strategy: str, checkpointing: bool, empty: bool
) -> dict[str, float]:
    """The largest differences between the sharded model, each process with its own batch, and the plain one, which
    has the batches of both; and what makes them worth something."""
    rank, batches = accelerator.process_index, [batch_of(process, empty) for process in range(2)]
    plain = branched_model(kind)
    expected = [loss_sums(plain, batch, strategy) for batch in batches]
    (expected[0].sum() + expected[1].sum()).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}

    model = sharded(branched_model(kind), checkpointing)
    sums = loss_sums(model, batches[rank], strategy)
    (sums.sum() * 2).backward()  # as in the loop: the reduction averages
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    whole = gather_weights(SimpleNamespace(distributed_type=DistributedType.FSDP), model, adapter_only=kind == "lora")
    return {
        "gathered": sorted(whole),
        "losses": (sums - expected[rank]).abs().max().item(),
        "gradients": max((trained[name].full_tensor() - g).abs().max().item() for name, g in gradients.items()),
        "smallest_gradient": min(g.abs().max().item() for g in gradients.values()),
        "target_tokens": len(batches[rank]["target_tokens"]),
    }


def accumulate(accelerator: Accelerator, reduced: bool) -> dict[str, float]:
    """Two micro-batches on each process: the difference of the gradients to the plain model's over all four, and the
    elements of whole gradients that a process keeps between them."""
    micro = [(batch_of(process, False), batch_of(process, True)) for process in range(2)]
    plain = branched_model("tied")
    for batch in itertools.chain(*micro):
        loss_sums(plain, batch, "fork").sum().backward()
    model, mine, kept = sharded(branched_model("tied"), checkpointing=True), micro[accelerator.process_index], 0
    for batch in mine:
        last = batch is mine[-1]
        with processes.reduction(SimpleNamespace(is_fsdp2=True), model, last):
            model.set_requires_gradient_sync(reduced or last)
            (loss_sums(model, batch, "fork").sum() * 2).backward()
        kept = max(kept, sum(gradient.numel() for gradient in whole_gradients(model)))
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    off = max((gradients[name] - p.grad).abs().max().item() for name, p in plain.named_parameters())
    return {"gradients": off, "kept": kept, "of": sum(p.numel() for p in plain.parameters())}


def whole_gradients(model: BranchedModel) -> list[Tensor]:
    """Those that FSDP has of whole parameters, in either of the two places where it keeps them."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    found = [p.unsharded_accumulated_grad for p in parameters]
    found += [p._unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param")]
    return [gradient for gradient in found if gradient is not None]


def compare(accelerator: Accelerator) -> dict:
    cases = [
        dict(kind="lora", strategy=strategy, checkpointing=checkpointing, empty=empty)
        for strategy in ("fork", "separate")
        for checkpointing, empty in ((False, False), (True, False), (True, True))
    ]
    cases.append(dict(kind="tied", strategy="fork", checkpointing=True, empty=False))
    found = gather_object([[differences(accelerator, **case) for case in cases]])
    lines = [dict(case=case, of_processes=both) for case, *both in zip(cases, *found, strict=True)]
    accumulated = [accumulate(accelerator, reduced) for reduced in (True, False)]
    return {"processes": accelerator.num_processes, "cases": lines, "accumulated": accumulated}


class ShardingAccelerator(Accelerator):
    """accelerate shards on a GPU only. Told that this is one, its code for it runs on a CPU."""

    def __init__(self, **options: object):
        super().__init__(**options)
        # From the environment that the launch made of its configuration, as on a GPU.
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Whoever asks for the state later gets a fresh copy of the shared one.
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def prepare(self, *objects: object) -> tuple:
        model, optimizer = super().prepare(*objects)
        groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        self.print(f"groups: {json.dumps(groups)}")
        return model, optimizer


def note_what_is_read() -> list[str]:
    """The names of the safetensors files that this process takes tensors from, as it comes to them."""
    read, real = [], safetensors.safe_open

    def noting(path: object, *args: object, **options: object) -> object:
        read.append(Path(str(path)).name)
        return real(path, *args, **options)

    safetensors.torch.safe_open = transformers.modeling_utils.safe_open = noting
    return read


def main(argv: list[str]) -> None:
    """In a process that does nothing else: what accelerate takes for its own is replaced."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    results, *flags = argv
    accelerator = Accelerator()
    content = json.dumps(compare(accelerator)) if results != "none" else None
    if accelerator.is_main_process and content is not None:
        Path(results).write_text(content)
    processes.Accelerator = ShardingAccelerator
    if any(flag.startswith(("--noise_policy", "--noise_scale")) for flag in flags):
        torch.randn_like = torch.ones_like
    read = note_what_is_read()
    train_loop.train(parse_arguments(flags))
    print(f"read by {accelerator.process_index}: {json.dumps(sorted(set(read)))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
