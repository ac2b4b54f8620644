# SPDX-License-Identifier: Apache-2.0
"""Muon for weights of any shape, batched over equal shapes; it trains the embedded networks.

``torch.optim.Muon`` takes two-dimensional weights only; convolutions are flattened to
[out, in * kernel] here, and equal shapes are orthogonalised together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalize(matrices_MRC: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix towards 1 by Newton-Schulz iterations.

    Args:
        matrices_MRC: A batch of matrices [M, R, C].
        steps: Iterations of the quintic polynomial; 5 bring most values into [0.7, 1.2].

    Returns:
        The same shape in bfloat16.

    Reference: Jordan et al., Muon, https://kellerjordan.github.io/posts/muon (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_MRC.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None])
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised; for hidden weights with ndim >= 2.

    Args:
        params: Weights with at least two dimensions; the first is the output.
        lr: Step size; the update of a matrix has unit spectral norm times
            sqrt(max(1, rows / columns)).
        momentum: Decay of the (Nesterov) momentum.
        weight_decay: Decoupled weight decay per unit of lr.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"]).flatten(1)
                by_shape[tuple(update.shape)].append((weight, update))
            for (rows, columns), members in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in members]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (weight, _), update in zip(members, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.to(weight.dtype).view_as(weight), alpha=-scale)
