# SPDX-License-Identifier: Apache-2.0
"""AdamW, with optimizer states in 32 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from chunkgrpo.core.names import OneOf, check_name

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
        kind: ``"adamw"``: two float32 numbers per weight. ``"adamw8bit"``: two bytes per weight,
            with a scale for each block (bitsandbytes; tensors below 4096 weights stay in float32).
            ``"paged_adamw8bit"``: the same in memory that CUDA can move to the host when the device
            is full; on CPUs, and after resuming from a checkpoint, it is not paged.
        parameters: What is trained.
        learning_rate, betas, eps, weight_decay: Hyperparameters of AdamW.

    Raises:
        ValueError: If the kind is unknown.
        ImportError: If it needs bitsandbytes, which is not installed.
    """
    check_name("optimizer", kind, OPTIMIZERS)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, learning_rate, betas, eps, weight_decay)
    try:
        import bitsandbytes  # type: ignore[import-not-found] # an extra
    except ImportError as error:
        raise ImportError(
            f"optimizer.name {kind!r} needs bitsandbytes: pip install 'chunkgrpo[adamw8bit]', or "
            "use 'adamw'"
        ) from error
    chosen: Any = getattr(bitsandbytes.optim, BITSANDBYTES[kind])
    return chosen(
        list(parameters), lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay
    )


@dataclass(frozen=True)
class Optimization:
    """AdamW, its learning rate over the run, and gradient clipping.

    Attributes:
        name: Variant of AdamW; those with 8-bit states need chunkgrpo[adamw8bit].
        learning_rate: Peak learning rate, above 0.
        betas: Decays of the two moments, in [0, 1).
        eps: Added to the denominator, above 0.
        weight_decay: Weight decay, at least 0.
        warmup: Optimizer steps over which the learning rate rises linearly.
        fall: Share of the run, at its end, over which the learning rate falls linearly towards 0.
        max_grad_norm: Gradient clipping: larger norms are scaled down to this; above 0.
    """

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    warmup: int = 0
    fall: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_name("optimizer", self.name, OPTIMIZERS)
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not self.weight_decay >= 0 or self.warmup < 0:
            raise ValueError(
                f"weight_decay is {self.weight_decay} and warmup {self.warmup}; neither may be "
                "negative"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"learning_rate {self.learning_rate} times weight_decay {self.weight_decay} is the "
                "share of each weight that a step takes away, and must be below 1; lower one"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; decays of moments lie in [0, 1)")
        if not 0 <= self.fall <= 1:
            raise ValueError(f"fall is {self.fall}; it is a share of the run, in [0, 1]")

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer over some parameters.

        Raises:
            ImportError: If it needs bitsandbytes, which is not installed.
        """
        return make_optimizer(
            self.name, parameters, self.learning_rate, self.betas, self.eps, self.weight_decay
        )

    def rate(self, num_updates: int, left: float) -> float:
        """Return the learning rate.

        Args:
            num_updates: Optimizer steps taken so far.
            left: Share of the run that is left, in (0, 1].
        """
        rise = min(1.0, (num_updates + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * rise * (min(1.0, left / self.fall) if self.fall else 1.0)
