# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 dev and schnell (``FluxPipeline``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.policies.adaptation import BOTH_STREAMS, Adaptation
from chunkgrpo.policies.encoding import with_negative
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.types import Conditioning


class FluxPolicy(PipelinePolicy):
    """The network predicts +v from packed latents [B, L, 4 C] and a time of sigma.

    dev takes ``guidance`` as an input (3.5 is the pipeline's default); schnell has no guidance.

    Args:
        pipe: The loaded pipeline.
        adaptation: Which weights are trained.
        true_cfg: Scale of classifier-free guidance on top; on above 1, the pipeline's
            ``true_cfg_scale`` with a ``negative_prompt``.
        options: Of :class:`PipelinePolicy`.
    """

    lora_targets = BOTH_STREAMS
    guided_by = "true_cfg"

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        true_cfg: float = 1.0,
        **options: Any,
    ) -> None:
        self.true_cfg = true_cfg
        super().__init__(pipe, adaptation, **options)

    @property
    def latent_channels(self) -> int:
        """Four latent pixels are one token."""
        return self.pipe.transformer.config.in_channels // 4

    @property
    def cfg_scale(self) -> float:
        """``true_cfg``, not ``guidance``, which is an input of the network."""
        return self.true_cfg

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode with CLIP and T5."""

        def encoded(texts: list[str]) -> dict[str, Tensor]:
            joint, pooled, ids = self.pipe.encode_prompt(
                texts, device=self.device, max_sequence_length=self.max_sequence_length
            )
            return {"joint": joint, "pooled": pooled, "ids": ids.expand(len(texts), -1, -1)}

        negative = encoded(negative_prompts) if self.guided else {}
        return with_negative(encoded(prompts), negative)

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Call the network, with time in thousandths like the pipeline."""
        embedded = self.pipe.transformer.config.guidance_embeds
        return self.network(
            hidden_states=x,
            timestep=1000 * sigma / 1000,
            guidance=torch.full_like(sigma, self.guidance) if embedded else None,
            pooled_projections=texts["pooled"],
            encoder_hidden_states=texts["joint"],
            txt_ids=texts["ids"][0],
            img_ids=self.image_ids,
        )

    def vae_input(self, x: Tensor) -> Tensor:
        """Unpack tokens, then scale."""
        z = self.pipe._unpack_latents(x, *self.size, self.pipe.vae_scale_factor)
        return super().vae_input(z)
