"""Memory on the device: what one drafter's engine takes, whatever else is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch

from speculens.drafters import Drafter


def peak(device: torch.device, others: Iterable[Drafter], work: Callable[[], object]) -> int | None:
    """Most bytes on the device while `work` runs, the target's weights included; None on a CPU, where it runs as well.

    others  drafters that are loaded but have no part in it: their weights are left out
    """
    free(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - sum(map(weights, others)) if on_gpu else None


def weights(part: object) -> int:
    """Bytes of a drafter's or a layer's own weights, of which those in 8 bits are buffers; nothing else has any."""
    if not isinstance(part, torch.nn.Module):
        return 0
    return sum(one.nbytes for one in (*part.parameters(), *part.buffers()))


def allocated(device: torch.device) -> int:
    """Bytes that were asked for and not given back: without what the allocator adds to round them up."""
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.current"]) if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    """Give back what nobody uses: engines that are gone keep their graphs and caches until they are collected."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
