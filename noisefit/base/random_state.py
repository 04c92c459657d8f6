"""The state of this process's random generators, as tensors: what a resumed run needs to draw what it would have."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators of torch (on the CPU and on `device`), NumPy and Python.

    The training itself draws from torch's alone; an edited loop may draw from the others.
    """
    version, python, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *python], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([numpy["state"]["pos"], numpy["has_gauss"], *numpy["state"]["key"].tolist()]),
        "numpy_gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
    }
    if device.type != "cpu":
        state[device.type] = _module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo of `random_state`. A generator of another kind of device than the state has is left as it is."""
    torch.set_rng_state(state["torch"])
    version, *python = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(python), gauss[0] if gauss else None))
    position, has_gauss, *keys = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if device.type in state:
        _module(device).set_rng_state(state[device.type])


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)  # torch.cuda, torch.xpu, torch.mps, ...
