"""Fused functions as if none had been compiled yet: what another test compiled, and how, is forgotten."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from noisefit.base import compiling, precision
from noisefit.method import losses, noise

FUSED = [
    value
    for module in (precision, losses, noise)
    for value in vars(module).values()
    if hasattr(value, "__wrapped__") and hasattr(value, "cache_clear")
]


def forget() -> None:
    for function in FUSED:
        function.cache_clear()
    compiling.forget_failures()
    torch._dynamo.reset()


@contextmanager
def afresh() -> Iterator[None]:
    forget()
    try:
        yield
    finally:
        forget()
