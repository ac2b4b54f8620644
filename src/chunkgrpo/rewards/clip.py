# SPDX-License-Identifier: Apache-2.0
"""How well an image matches its prompt, by CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chunkgrpo.rewards.clip_features import DualEncoder
from chunkgrpo.rewards.loading import dtype_of, load_model


class ClipReward:
    r"""Cosine of the image's and the prompt's CLIP embeddings.

    .. math:: r = s\,\frac{f(image) \cdot g(prompt)}{|f(image)|\,|g(prompt)|}

    s is 1, or with ``scaled`` the model's trained logit scale (100 for OpenAI's). Any checkpoint
    of ``CLIPModel`` will do: OpenAI's, or OpenCLIP's and DFN's in transformers' format.

    Args:
        model: Checkpoint folder or hub id.
        processor: Where tokenizer and image processor are; None for the same place.
        scaled: Whether to multiply by the trained logit scale.
        precision: ``"fp32"``, or ``"bf16"`` for half the memory and cosines exact to about 0.01
            only, which is much against the spread inside a group.
        device: Where to compute; None follows the images.
        batch_size: Images embedded at once.
        name: What metrics are filed under.

    Raises:
        OSError: If the checkpoint can not be loaded.
        ValueError: If an option is out of its range.

    Reference: CLIP, arXiv:2103.00020; as a score of images, CLIPScore, arXiv:2104.08718.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        scaled: bool = False,
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 32,
        name: str = "clip",
    ) -> None:
        from transformers import CLIPModel

        self.name, self.scaled = name, scaled
        network = load_model(name, model, CLIPModel, dtype_of(precision))
        self.encoder = DualEncoder(name, network, processor or model, device, batch_size)
        self.scale = float(network.logit_scale.float().exp()) if scaled else 1.0

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        return self.scale * self.encoder.cosines(images, prompts)
