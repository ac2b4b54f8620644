# SPDX-License-Identifier: Apache-2.0
"""AdamW, in the forms that differ in what they keep of each weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
OPTIMIZERS = ("adamw", *BITSANDBYTES)
"""Names of a configuration."""


def make_optimizer(
    kind: str,
    parameters: Sequence[Tensor],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Return AdamW over some parameters.

    Args:
        kind: ``"adamw"``: two float32 numbers a weight. ``"adamw8bit"``: two bytes a weight, with
            a scale for each block (bitsandbytes; tensors below 4096 weights stay in float32).
            ``"paged_adamw8bit"``: the same in memory that CUDA moves to the host when the device
            is full; on CPUs, and after resuming from a checkpoint, it is not paged.
        parameters: What is trained.
        learning_rate, betas, eps, weight_decay: Of AdamW.

    Raises:
        ValueError: If the kind is unknown.
        ImportError: If it needs bitsandbytes, which is not installed.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {kind!r}; known: {', '.join(OPTIMIZERS)}")
    if kind == "adamw":
        return torch.optim.AdamW(parameters, learning_rate, betas, eps, weight_decay)
    try:
        import bitsandbytes  # type: ignore[import-not-found] # an extra
    except ImportError as error:
        raise ImportError(
            f"optimizer.kind {kind!r} needs bitsandbytes: pip install 'chunkgrpo[adamw8bit]', or "
            "use 'adamw'"
        ) from error
    chosen: Any = getattr(bitsandbytes.optim, BITSANDBYTES[kind])
    return chosen(
        list(parameters), lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay
    )
