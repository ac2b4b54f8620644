# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image (``QwenImagePipeline``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chunkgrpo.policies.adaptation import BOTH_STREAMS
from chunkgrpo.policies.encoding import with_negative
from chunkgrpo.policies.pipeline import PipelinePolicy, renormalised
from chunkgrpo.types import Conditioning


class QwenImagePolicy(PipelinePolicy):
    """The network predicts +v from packed latents [B, L, 4 C] and a time of sigma.

    ``guidance`` is the pipeline's ``true_cfg_scale``; the guided velocity of each token keeps the
    norm of the conditional one. The pipeline guides only where it is given a negative prompt.
    """

    lora_targets = BOTH_STREAMS

    @property
    def latent_channels(self) -> int:
        """Four latent pixels are one token."""
        return self.pipe.transformer.config.in_channels // 4

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode in the pipeline's chat template, without the template's own tokens."""

        def encoded(texts: list[str]) -> dict[str, Tensor]:
            joint, mask = self.pipe.encode_prompt(
                texts, device=self.device, max_sequence_length=self.max_sequence_length
            )
            if mask is None:  # the pipeline's way to say that no row is padded
                mask = torch.ones(joint.shape[:2], dtype=torch.long, device=joint.device)
            return {"joint": joint, "mask": mask}

        negative = encoded(negative_prompts) if self.guided else {}
        return with_negative(encoded(prompts), negative)

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Call the network, with time in thousandths like the pipeline."""
        step = self.size_step
        # One synchronisation with the device for both lengths.
        shortest, longest = torch.stack(texts["mask"].sum(1).aminmax()).tolist()
        mask = texts["mask"][:, :longest]
        return self.network(
            hidden_states=x,
            timestep=1000 * sigma / 1000,
            encoder_hidden_states=texts["joint"][:, :longest],
            encoder_hidden_states_mask=None if shortest == longest else mask,
            img_shapes=[[(1, self.size[0] // step, self.size[1] // step)]] * len(x),
        )

    def guide(self, without: Tensor, with_prompt: Tensor) -> Tensor:
        """Guide, then give each token the norm of the conditional velocity."""
        return renormalised(super().guide(without, with_prompt), with_prompt)

    def vae_input(self, x: Tensor) -> Tensor:
        """Unpack tokens to one frame, then scale each channel."""
        z = self.pipe._unpack_latents(x, *self.size, self.pipe.vae_scale_factor)
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values, device=z.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return z * std + mean

    def vae_images(self, z: Tensor) -> Tensor:
        """Decode the only frame."""
        return super().vae_images(z)[:, :, 0]
