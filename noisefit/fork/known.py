"""Blocks whose output is known: others stand in their places, and answer it without computing anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from noisefit.fork.decoder import find_decoder_layers
from noisefit.fork.hooks import layer_hooks


class KnownBlock(nn.Module):
    """Answers `output` in place of a block. It has the block's attributes, and none of its weights and hooks."""

    def __init__(self, block: nn.Module, output: Any):
        super().__init__()
        vars(self).update(block=block, output=output, training=block.training)  # the block not as a module of its own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


@contextmanager
def knowing(model: nn.Module, outputs: Sequence[Any]) -> Iterator[None]:
    """Let the first blocks answer what they did before, and the last of them get its noise as ever.

    Not by another `forward` of the blocks themselves: FSDP's hooks would gather their weights all the same, so that
    noise in each layer alone would gather as many blocks as the square of the layers.

    Args:
        model: as `layer_hooks` takes it.
        outputs: of the first blocks, in order.
    """
    blocks, hooks = find_decoder_layers(model), layer_hooks(model)
    replaced = list(blocks[: len(outputs)])
    try:
        for index, (block, output) in enumerate(zip(replaced, outputs, strict=True)):
            blocks[index] = KnownBlock(block, output)
            hooks.register(index, blocks[index])
        yield
    finally:
        for index, block in enumerate(replaced):
            blocks[index] = block
