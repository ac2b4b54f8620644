# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a piece of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["peak_memory"]


def peak_memory(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Call a function and return the peak of torch's allocations above those at its start.

    On CUDA the allocator counts; on CPUs the allocations listed by ``torch.profiler`` are added up,
    which slows the work down. Memory that torch did not allocate is not counted.

    Args:
        work: Called once.
        device: Device whose memory is measured.

    Returns:
        Bytes, at least 0.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    results: Any = found.profiler.kineto_results  # type: ignore[union-attr] # set when it ends
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
