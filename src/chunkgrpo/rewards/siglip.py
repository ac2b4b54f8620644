# SPDX-License-Identifier: Apache-2.0
"""How well an image matches its prompt, by SigLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chunkgrpo.rewards.clip_features import DualEncoder
from chunkgrpo.rewards.loading import dtype_of, load_model

OUTPUTS = ("cosine", "logit", "probability")


class SiglipReward:
    r"""SigLIP's judgement whether image and prompt belong together.

    .. math:: c = \cos(f(image), g(prompt)), \quad l = e^{t} c + b, \quad p = \sigma(l)

    with the trained temperature t and bias b. ``"cosine"`` is c, ``"logit"`` l, ``"probability"``
    p in (0, 1), which saturates at both ends: a group of equally good images then has no spread.

    Args:
        model: Checkpoint folder or hub id of a ``SiglipModel`` (SigLIP 2 with a fixed size too).
        output: ``"cosine"``, ``"logit"`` or ``"probability"``.
        precision: ``"fp32"`` or ``"bf16"``.
        device: Where to compute; None follows the images.
        batch_size: Images embedded at once.
        name: What metrics are filed under.

    Raises:
        OSError: If the checkpoint cannot be loaded.
        ValueError: If an option is out of its range.

    Reference: SigLIP, arXiv:2303.15343, section 3.
    """

    def __init__(
        self,
        model: str = "google/siglip-so400m-patch14-384",
        output: str = "cosine",
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 32,
        name: str = "siglip",
    ) -> None:
        from transformers import SiglipModel

        if output not in OUTPUTS:
            raise ValueError(f"unknown output {output!r}; known: {', '.join(OUTPUTS)}")
        self.name, self.output = name, output
        network = load_model(name, model, SiglipModel, dtype_of(precision))
        self.encoder = DualEncoder(
            name, network, model, device, batch_size, pad_to_full_length=True
        )
        self.scale = float(network.logit_scale.float().exp())
        self.bias = float(network.logit_bias.float())

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        cosines = self.encoder.cosines(images, prompts)
        if self.output == "cosine":
            return cosines
        logits = self.scale * cosines + self.bias
        return logits if self.output == "logit" else logits.sigmoid()
