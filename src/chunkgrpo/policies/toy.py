# SPDX-License-Identifier: Apache-2.0
"""Closed-form policies: Gaussian data whose exact velocity is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from chunkgrpo.policies.protocol import without_images
from chunkgrpo.runtime.finite import check_finite
from chunkgrpo.types import Conditioning, Prompt


class GaussianPolicy:
    r"""The exact velocity of data :math:`x_0 \sim N(m, s^2)`, with m learned.

    .. math:: v(x, \sigma) = \frac{\sigma - (1-\sigma) s^2}{(1-\sigma)^2 s^2 + \sigma^2}
              (x - (1-\sigma) m) - m

    Prompts have no effect. ``decode`` maps latents through a sigmoid to
    three-channel images, so that every reward works on it.

    Args:
        mean: Initial m, shape [latent].
        std: s > 0.
        dtype: Precision of the arithmetic.
    """

    reads_images: ClassVar[bool] = False

    def __init__(self, mean: Tensor, std: float = 0.5, dtype: torch.dtype = torch.float64) -> None:
        self.mean = mean.detach().to(dtype, copy=True).requires_grad_()
        self._base = self.mean.detach().clone()
        self.std, self.dtype = std, dtype
        self.latent_shape = tuple(mean.shape)
        self.device = mean.device
        self.calls: list[int] = []

    def encode(self, prompts: Sequence[Prompt | str]) -> Conditioning:
        """Return one zero row per prompt.

        Raises:
            ValueError: If a prompt has images.
        """
        number = len(without_images(prompts))
        return Conditioning({"rows": torch.zeros(number, 1, device=self.device)})

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the exact velocity; ``calls`` records the rows of each call."""
        self.calls.append(len(x))
        x = x.to(self.dtype)
        s = sigma.to(self.dtype).view(-1, *[1] * (x.ndim - 1))
        variance = (1 - s) ** 2 * self.std**2 + s**2
        slope = (s - (1 - s) * self.std**2) / variance
        return slope * (x - (1 - s) * self.mean) - self.mean

    def decode(self, x: Tensor) -> Tensor:
        """Return grey images [M, 3, 1, D] of the latent's sigmoid."""
        grey = torch.sigmoid(x.detach().flatten(1).float())
        return grey[:, None, None, :].expand(-1, 3, -1, -1).contiguous()

    def parameters(self) -> list[Tensor]:
        """Return [m]."""
        return [self.mean]

    def named_parameters(self) -> dict[str, Tensor]:
        """Return m by its name."""
        return {"mean": self.mean}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Use the initial mean inside this context."""
        trained = self.mean
        self.mean = self._base
        try:
            yield
        finally:
            self.mean = trained

    def save(self, folder: str | Path) -> None:
        """Write ``mean.pt``, if it is finite."""
        check_finite("weights", self.named_parameters())
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.mean.detach(), folder / "mean.pt")


class CountingPolicy:
    """A policy of one weight that counts the rows it is evaluated on.

    Latents have one element, so sampling and training take almost no time, and code that uses a
    policy can be run for its counts.

    Attributes:
        quiet_rows: Rows evaluated without gradient.
        trained_rows: Rows evaluated with gradient.
        decoded: Images decoded.
    """

    reads_images: ClassVar[bool] = False

    def __init__(self) -> None:
        self.weight = torch.zeros(1, requires_grad=True)
        self.latent_shape, self.device = (1,), torch.device("cpu")
        self.reset()

    def reset(self) -> None:
        """Count from 0 again."""
        self.quiet_rows = self.trained_rows = self.decoded = 0

    def encode(self, prompts: Sequence[Prompt | str]) -> Conditioning:
        """Return one zero row per prompt."""
        return Conditioning({"rows": torch.zeros(len(prompts), 1)})

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the weight for every row."""
        if torch.is_grad_enabled():
            self.trained_rows += len(x)
        else:
            self.quiet_rows += len(x)
        return self.weight.expand(len(x), 1)

    def decode(self, x: Tensor) -> Tensor:
        """Return one grey pixel per latent."""
        self.decoded += len(x)
        return torch.sigmoid(x.detach().float())[:, :, None, None].expand(-1, 3, -1, -1)

    def parameters(self) -> list[Tensor]:
        """Return the weight."""
        return [self.weight]

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the weight by its name."""
        return {"weight": self.weight}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Do nothing: the weight never changes."""
        yield

    def save(self, folder: str | Path) -> None:
        """Save nothing."""
