"""How much memory a run takes, and how much there is."""

from __future__ import annotations

import math
import sys

import psutil  # accelerate needs it, so it is there
import torch


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: the device's, or on a CPU the process's own."""
    if device.type != "cpu":
        most = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return most(device) / 2**30 if most is not None else math.nan  # Apple's has none
    try:
        import resource  # not on Windows
    except ImportError:
        return float(psutil.Process().memory_info().rss) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_memory(device: torch.device) -> float:
    """The memory in GiB that this process can still get, of its device or machine; NaN where that is not known."""
    if device.type == "cpu":
        return float(psutil.virtual_memory().available) / 2**30
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return math.nan
    kept = module.memory_reserved(device) - module.memory_allocated(device)  # by the allocator, for tensors to come
    return float(module.mem_get_info(device)[0] + kept) / 2**30
