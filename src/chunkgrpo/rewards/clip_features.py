# SPDX-License-Identifier: Apache-2.0
"""What rewards over image and text embeddings share: CLIP, PickScore, HPSv2, SigLIP, aesthetics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkgrpo.rewards.images import check_batch
from chunkgrpo.rewards.loading import fix_attention, freeze, load, place
from chunkgrpo.rewards.preprocess import Preprocess


class DualEncoder:
    """An image and a text encoder with a common space, as CLIP and SigLIP of transformers are.

    Args:
        reward: Name of the reward, for messages.
        model: ``CLIPModel``, ``SiglipModel`` or another with ``vision_model`` and ``text_model``;
            without ``text_model`` only images are embedded.
        source: Checkpoint folder or hub id of its image processor and its tokenizer.
        device: Where to compute; None follows the images.
        batch_size: Images embedded at once.
        pad_to_full_length: Whether texts are padded to the model's length (SigLIP was trained so,
            and reads the last position) or to the longest of the batch.

    Raises:
        OSError: If something cannot be loaded.
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        reward: str,
        model: Any,
        source: str | Path,
        device: str | None = None,
        batch_size: int = 32,
        pad_to_full_length: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        self.model = model
        fix_attention(model)
        freeze(model)
        self.tokenizer: Any = None
        if hasattr(model, "text_model"):
            self.tokenizer = load(reward, source, AutoTokenizer.from_pretrained)
        self.preprocess = Preprocess.from_source(reward, source)
        self.device, self.batch_size = device, batch_size
        self.pad_to_full_length = pad_to_full_length

    @property
    def text_length(self) -> int:
        """Longest text in tokens; longer ones are truncated."""
        longest = int(self.model.config.text_config.max_position_embeddings)
        return min(int(self.tokenizer.model_max_length), longest)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, D] of images [B, 3, H, W] in [0, 1]; float32."""
        device = place(self.model, self.device, images)
        rows = []
        for part in images.split(self.batch_size):
            pixels = self.preprocess(part.to(device)).to(self.model.dtype)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            if hasattr(self.model, "visual_projection"):
                pooled = self.model.visual_projection(pooled)
            rows.append(F.normalize(pooled.float(), dim=-1))
        return torch.cat(rows)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Return unit embeddings [B, D] of texts; float32. Equal texts are embedded once."""
        unique = list(dict.fromkeys(texts))
        rows = []
        for start in range(0, len(unique), self.batch_size):
            tokens = self.tokenizer(
                unique[start : start + self.batch_size],
                padding="max_length" if self.pad_to_full_length else True,
                truncation=True,
                max_length=self.text_length,
                return_tensors="pt",
            ).to(device)
            inputs = {"input_ids": tokens["input_ids"]}
            if not self.pad_to_full_length:
                inputs["attention_mask"] = tokens["attention_mask"]
            pooled = self.model.text_model(**inputs).pooler_output
            if hasattr(self.model, "text_projection"):
                pooled = self.model.text_projection(pooled)
            rows.append(F.normalize(pooled.float(), dim=-1))
        place_of = {text: i for i, text in enumerate(unique)}
        return torch.cat(rows)[[place_of[text] for text in texts]]

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its own prompt; float32 [B] on the CPU.

        Raises:
            ValueError: If ``images`` is not [B, 3, H, W] or the numbers differ.
        """
        check_batch(images, prompts)
        image_BD = self.embed_images(images)
        text_BD = self.embed_texts(prompts, image_BD.device)
        return (image_BD * text_BD).sum(dim=-1).cpu()


def num_cut(reward: object, texts: Sequence[str]) -> int | None:
    """Return how many texts are longer than a reward reads; None where it does not say.

    Args:
        reward: Any reward; those over embeddings have an ``encoder``.
        texts: The prompts.
    """
    encoder = getattr(reward, "encoder", None)
    if not isinstance(encoder, DualEncoder) or encoder.tokenizer is None:
        return None
    rows = encoder.tokenizer(list(texts))["input_ids"]
    return sum(len(row) > encoder.text_length for row in rows)
