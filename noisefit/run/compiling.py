"""What a launch's `--dynamo_backend` asks for: the decoder's blocks compiled, each by itself."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from noisefit.base.compiling import FRAMES
from noisefit.base.errors import InputError
from noisefit.fork.decoder import find_decoder_layers


def check_compiling(accelerator: Accelerator, gradient_checkpointing: bool) -> None:
    """Raise `InputError` where the blocks cannot be compiled as the launch asks.

    In newer transformers a block's `forward` holds the checkpointing, which looks at the block's class to find out
    whether it is its turn; FSDP gives the block another class. Compiled, it would compute nothing again.
    """
    plugin: Any = accelerator.state.dynamo_plugin
    others = {"--gradient_checkpointing": gradient_checkpointing, "FSDP": accelerator.is_fsdp2}
    for other in (name for name, given in others.items() if given and plugin.backend != DynamoBackend.NO):
        raise InputError(f"--dynamo_backend {plugin.backend.value.lower()} does not go with {other}; leave one of them "
                         "out")  # fmt: skip


def compile_blocks(model: nn.Module, accelerator: Accelerator) -> None:
    """Compile what each block computes, where the launch asks for it. To be called before `prepare`.

    Accelerate would compile the whole model, in which hooks decide where the branches part, what gets noise, and what
    the decoder answers. Around a block's own `forward` they stay what they are.

    Args:
        model: with its hooks or before.
        accelerator: of the run; it is told that nothing is left to compile.
    """
    plugin: Any = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    from torch._dynamo import config as dynamo  # here, as it takes a second to import

    # Lengths differ from batch to batch; training and measuring, one branch's rows and all, are frames of their own.
    how = {"dynamic": True} | plugin.to_kwargs()
    dynamo.recompile_limit = max(dynamo.recompile_limit, FRAMES)
    for block in find_decoder_layers(model):
        block.forward = torch.compile(block.forward, **how)
    plugin.backend = DynamoBackend.NO
