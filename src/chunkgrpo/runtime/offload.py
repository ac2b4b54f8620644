# SPDX-License-Identifier: Apache-2.0
"""Weights that stay in host memory and are on the device only while in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in host memory, page-locked where that makes copies faster.

    Args:
        tensor: On any device.
        device: Where it will be copied to.
    """
    home = tensor.detach().to("cpu")
    return home.pin_memory() if device.type == "cuda" else home


class Offloaded:
    """Frozen modules whose weights are on the device inside ``at_work()`` and nowhere else.

    Copies go one way: since the weights are frozen, those on the device are discarded after use.
    On CPUs nothing is copied, and results are the same.

    Args:
        modules: Frozen modules, whose parameters and buffers are moved.
        device: Device that they are used on.

    Attributes:
        visits: How often the weights were moved to the device.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], device: torch.device) -> None:
        self.device = device
        self.visits = 0
        self._depth = 0
        found = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self._tensors = list({id(t): t for t in found}.values())
        self._homes = [host_copy(t, device) for t in self._tensors]
        self._send_home()

    def fetch(self, home: Tensor) -> Tensor:
        """Return a copy on the device."""
        return home.to(self.device, non_blocking=True)

    def _send_home(self) -> None:
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside this context the modules are on the device; contexts may be nested."""
        if not self._depth:
            self.visits += 1
            for tensor, home in zip(self._tensors, self._homes, strict=True):
                tensor.data = self.fetch(home)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._send_home()
