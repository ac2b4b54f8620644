# SPDX-License-Identifier: Apache-2.0
"""The reward of the embedded world: whether the image holds what the prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chunkgrpo.rewards.images import refuse_nonfinite
from chunkgrpo.shapes.grammar import parse
from chunkgrpo.shapes.verifier import Verdict, verify_batch

MODES = ("soft", "strict")
MAX_EXTRA = 3  # further surplus objects are not penalised, so that the score is bounded


@dataclass
class ShapesReward:
    """Score images of the embedded world with its verifier.

    The score is

        soft_weight * soft + strict_weight * strict - extra_penalty * min(extra, 3)

    with ``soft`` the verdict's partial credit in [0, 1], ``strict`` 1 where the image holds exactly
    what was asked and 0 elsewhere, and ``extra`` the number of surplus objects. The mode sets the
    first two weights: (1, ``strict_bonus``) for ``"soft"``, (0, 1) for ``"strict"``. So the range
    is [-3 extra_penalty, 1 + strict_bonus], or [-3 extra_penalty, 1] where strict.

    Attributes:
        mode: ``"soft"`` gives a dense signal, ``"strict"`` the benchmark's pass or fail.
        extra_penalty: Penalty for each surplus object, in addition to that in ``soft``.
        strict_bonus: Bonus for being exactly right, added to ``soft``; mode ``"soft"`` only.
        name: What metrics are filed under.
    """

    mode: str = "soft"
    extra_penalty: float = 0.0
    strict_bonus: float = 0.0
    name: str = "shapes"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known: {', '.join(MODES)}")
        for field in ("extra_penalty", "strict_bonus"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 0 or more")

    @property
    def share(self) -> bool:
        """Whether the score is a share in [0, 1], to be shown in per cent."""
        return not self.extra_penalty and self.soft_weight + self.strict_weight == 1

    @property
    def soft_weight(self) -> float:
        """Weight of the partial credit."""
        return 1.0 if self.mode == "soft" else 0.0

    @property
    def strict_weight(self) -> float:
        """Weight of being exactly right."""
        return self.strict_bonus if self.mode == "soft" else 1.0

    def verdicts(self, images: torch.Tensor, prompts: Sequence[str]) -> list[Verdict]:
        """Return the verifier's verdicts on images [B, 3, 64, 64] in [0, 1].

        Raises:
            NonFiniteError: If a pixel is not finite.
            ValueError: If the grammar cannot produce a prompt, the numbers differ, or the images
                are not 64 x 64.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W]")
        refuse_nonfinite(images, prompts)
        asks = [parse(prompt).ask for prompt in prompts]
        pixels = images.detach().to("cpu", torch.float32).permute(0, 2, 3, 1).numpy()
        return verify_batch(pixels, asks)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the grammar cannot produce.

        Raises:
            ValueError: Naming the first one.
        """
        for prompt in prompts:
            parse(prompt)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, 64, 64] in [0, 1] against B prompts; return float32 [B]."""
        scores = [
            self.soft_weight * verdict.soft
            + self.strict_weight * verdict.strict
            - self.extra_penalty * min(verdict.extra, MAX_EXTRA)
            for verdict in self.verdicts(images, prompts)
        ]
        return torch.tensor(scores, dtype=torch.float32)
