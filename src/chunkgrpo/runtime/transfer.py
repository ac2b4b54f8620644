# SPDX-License-Identifier: Apache-2.0
"""Copying from the host to the device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["send"]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a copy of a host tensor on a device, without synchronising with the device.

    A plain ``tensor.to("cuda")`` waits until all work queued there is done; from page-locked memory
    the copy is queued behind that work instead. On CPUs the tensor itself is returned.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
