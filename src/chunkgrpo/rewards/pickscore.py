# SPDX-License-Identifier: Apache-2.0
"""Which image people would pick for a prompt, by PickScore."""

from __future__ import annotations

from chunkgrpo.rewards.clip import ClipReward


class PickScoreReward(ClipReward):
    """Cosine of PickScore's embeddings, a CLIP-H trained on people's choices between two images.

    The score is the raw cosine, about 0.17 to 0.26, or with ``scaled`` that times the trained
    logit scale, about 17 to 26, which is how the paper and its demos print it. The checkpoint has
    no processor of its own; it is CLIP-H's.

    Args:
        model: Checkpoint folder or hub id of the weights.
        processor: Where CLIP-H's tokenizer and image processor are; None for the same place as
            the weights.
        scaled: Whether to multiply by the trained logit scale.
        precision: ``"fp32"`` or ``"bf16"``.
        device: Where to compute; None follows the images.
        batch_size: Images embedded at once.
        name: What metrics are filed under.

    Raises:
        OSError: If the checkpoint cannot be loaded.
        ValueError: If an option is out of its range.

    Reference: Pick-a-Pic, arXiv:2305.01569, section 3.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scaled: bool = False,
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 32,
        name: str = "pickscore",
    ) -> None:
        super().__init__(model, processor, scaled, precision, device, batch_size, name)
