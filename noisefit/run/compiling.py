"""What a launch's `--dynamo_backend` asks for: the decoder's blocks compiled, each by itself."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from noisefit.fork.decoder import find_decoder_layers


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
    how = plugin.to_kwargs()
    for block in find_decoder_layers(model):
        block.forward = torch.compile(block.forward, **how)  # type: ignore[method-assign]
    plugin.backend = DynamoBackend.NO
