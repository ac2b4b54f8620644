# SPDX-License-Identifier: Apache-2.0
"""Weights that lie in host memory and visit the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor's values in host memory, page-locked where that speeds up copies.

    Args:
        tensor: Anywhere.
        device: Where it will be copied to.
    """
    home = tensor.detach().to("cpu")
    return home.pin_memory() if device.type == "cuda" else home


class Offloaded:
    """Frozen modules whose weights are on the device inside ``at_work()`` and nowhere else.

    Copies go one way: as nothing changes the weights, the ones on the device are dropped after
    use. On a machine without a second memory, values and results are the same and nothing is
    copied.

    Args:
        modules: Frozen; their parameters and buffers move.
        device: Where they work.

    Attributes:
        visits: How often the weights were brought to the device.
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
