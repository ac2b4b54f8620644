# SPDX-License-Identifier: Apache-2.0
"""Sending what the host drew or planned to where it is computed with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["send"]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the host on a device, without waiting for what the device is at.

    A plain ``tensor.to("cuda")`` waits until all work queued there is done; from page-locked memory
    the copy is queued behind that work like everything else. On CPUs it is the tensor itself.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
