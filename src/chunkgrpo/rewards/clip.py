# SPDX-License-Identifier: Apache-2.0
"""How well an image matches its prompt, by CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chunkgrpo.rewards.clip_features import DualEncoder
from chunkgrpo.rewards.loading import dtype_of, load_model

EMBEDDED = "shapes"


class ClipReward:
    r"""Cosine of the image's and the prompt's CLIP embeddings.

    .. math:: r = s\,\frac{f(image) \cdot g(prompt)}{|f(image)|\,|g(prompt)|}

    s is 1, or with ``scaled`` the model's trained logit scale (100 for OpenAI's). Any checkpoint
    of ``CLIPModel`` will do: OpenAI's, or OpenCLIP's and DFN's in transformers' format. Without
    one it is the small CLIP of the embedded world, which ships with this package and knows the
    words of that world only: for other prompts name a checkpoint, such as
    ``openai/clip-vit-large-patch14``.

    Args:
        model: Checkpoint folder or hub id; ``"shapes"`` for the embedded world's.
        processor: Where tokenizer and image processor are; None for the same place.
        scaled: Whether to multiply by the trained logit scale.
        precision: ``"fp32"``, or ``"bf16"`` for half the memory and cosines exact to about 0.01
            only, which is coarse against the spread within a group.
        device: Where to compute; None follows the images.
        batch_size: Images embedded at once.
        name: What metrics are filed under.

    Raises:
        OSError: If the checkpoint cannot be loaded.
        ValueError: If an option is out of its range.

    Reference: CLIP, arXiv:2103.00020; as a score of images, CLIPScore, arXiv:2104.08718.
    """

    def __init__(
        self,
        model: str = EMBEDDED,
        processor: str | None = None,
        scaled: bool = False,
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 32,
        name: str = "clip",
    ) -> None:
        from transformers import CLIPModel

        from chunkgrpo.shapes import clip_path

        self.name, self.scaled = name, scaled
        self.embedded = model == EMBEDDED
        source = str(clip_path()) if self.embedded else model
        network = load_model(name, source, CLIPModel, dtype_of(precision))
        self.encoder = DualEncoder(name, network, processor or source, device, batch_size)
        self.scale = float(network.logit_scale.float().exp()) if scaled else 1.0

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse words that the embedded CLIP does not know.

        Raises:
            ValueError: Naming the first such prompt.
        """
        if self.embedded:
            check_words(self.name, prompts)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B].

        Raises:
            ValueError: If the embedded CLIP is asked about words it does not know.
        """
        self.check_prompts(prompts)
        return self.scale * self.encoder.cosines(images, prompts)


def check_words(reward: str, prompts: Sequence[str]) -> None:
    """Refuse prompts with words that the embedded CLIP has never seen.

    It would split them into letters and return a meaningless score.

    Raises:
        ValueError: Naming the first such prompt and its words.
    """
    from chunkgrpo.shapes.grammar import words

    known = set(words())
    for prompt in dict.fromkeys(prompts):
        strange = [word for word in prompt.lower().split() if word.strip(".") not in known]
        if strange:
            raise ValueError(
                f"reward {reward!r} without a checkpoint is the embedded world's small CLIP, which "
                f"does not know {', '.join(map(repr, strange[:3]))} of the prompt {prompt!r}; name "
                "a checkpoint: options: {model: openai/clip-vit-large-patch14}"
            )
