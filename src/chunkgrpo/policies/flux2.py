# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 dev (``Flux2Pipeline``) and klein (``Flux2KleinPipeline``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkgrpo.policies.adaptation import BOTH_STREAMS, Adaptation
from chunkgrpo.policies.encoding import with_negative
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.types import Conditioning


class Flux2Policy(PipelinePolicy):
    """FLUX.2 dev: +v from packed latents [B, L, 4 C], a time of sigma, and embedded guidance.

    Args:
        pipe: The loaded pipeline.
        adaptation: Which weights are trained.
        text_encoder_out_layers: Layers of the text encoder that are read; the pipeline's default
            where None. Like the pipeline's argument of that name, it is not saved.
        options: Of :class:`PipelinePolicy`.
    """

    # The single-stream blocks fuse the projections of attention and MLP.
    lora_targets = (*BOTH_STREAMS, "to_qkv_mlp_proj")
    guided_by = None

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        text_encoder_out_layers: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        self.pipe = pipe
        self.layers = text_encoder_out_layers or self.stock_default("text_encoder_out_layers")
        super().__init__(pipe, adaptation, **options)

    def encoding_settings(self) -> dict[str, Any]:
        """Also the layers that are read."""
        return {**super().encoding_settings(), "layers": list(self.layers)}

    @property
    def latent_channels(self) -> int:
        """Four latent pixels are one token."""
        return self.pipe.transformer.config.in_channels // 4

    @property
    def guided(self) -> bool:
        """Guidance is an input of the network."""
        return False

    def embedded_guidance(self, sigma: Tensor) -> Tensor | None:
        """The network's guidance input."""
        return torch.full_like(sigma, self.guidance)

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """The shift depends on the number of tokens and of steps."""
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": self.stock_module.compute_empirical_mu(self.latent_shape[0], num_steps),
        }

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode with three layers of the language model, padded to one length without a mask."""

        def encoded(texts: list[str]) -> dict[str, Tensor]:
            joint, ids = self.pipe.encode_prompt(
                texts,
                device=self.device,
                max_sequence_length=self.max_sequence_length,
                text_encoder_out_layers=tuple(self.layers),
            )
            return {"joint": joint, "ids": ids}

        negative = encoded(negative_prompts) if self.guided else {}
        return with_negative(encoded(prompts), negative)

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Call the network, with time in thousandths like the pipeline."""
        return self.network(
            hidden_states=x,
            timestep=1000 * sigma / 1000,
            guidance=self.embedded_guidance(sigma),
            encoder_hidden_states=texts["joint"],
            txt_ids=texts["ids"],
            img_ids=self.image_ids.expand(len(x), -1, -1),
        )

    def vae_input(self, x: Tensor) -> Tensor:
        """Unpack tokens to patches, undo the VAE's normalisation, and unfold the patches."""
        pipe, vae = self.pipe, self.pipe.vae
        z = pipe._unpack_latents_with_ids(x, self.image_ids.expand(len(x), -1, -1))
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(z)
        variance = vae.bn.running_var.view(1, -1, 1, 1).to(z)
        return pipe._unpatchify_latents(z * (variance + vae.config.batch_norm_eps).sqrt() + mean)


class Flux2KleinPolicy(Flux2Policy):
    """FLUX.2 klein: classifier-free guidance, off for models distilled in few steps."""

    guided_by = "guidance of a model that is not distilled"

    @property
    def guided(self) -> bool:
        """As the pipeline decides."""
        return self.guidance > 1 and not self.pipe.config.is_distilled

    def embedded_guidance(self, sigma: Tensor) -> Tensor | None:
        """None."""
        return None
