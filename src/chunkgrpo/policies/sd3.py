# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 (``StableDiffusion3Pipeline``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.types import Conditioning


class StableDiffusion3Policy(PipelinePolicy):
    """The network predicts +v from latents [B, C, h, w] and a timestep of 1000 sigma."""

    def __init__(self, pipe: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(pipe, *args, **kwargs)
        height, width = self.size
        step = pipe.vae_scale_factor * pipe.patch_size
        if height % step or width % step:
            raise ValueError(f"image size {height} x {width} must be divisible by {step}")
        self.latent_shape = (
            pipe.transformer.config.in_channels,
            height // pipe.vae_scale_factor,
            width // pipe.vae_scale_factor,
        )

    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """Encode with both CLIPs and T5, and the empty prompt where guidance needs it."""
        guided = self.guidance > 1
        joint, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.max_sequence_length,
        )
        tensors = {"joint": joint, "pooled": pooled}
        if guided:
            tensors |= {"negative": negative, "negative_pooled": negative_pooled}
        return Conditioning(tensors)

    def predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the velocity, both halves of guidance in one forward."""
        t = conditioning.tensors
        joint, pooled = t["joint"], t["pooled"]
        guided = self.guidance > 1
        if guided:
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
            joint = torch.cat([t["negative"], joint])
            pooled = torch.cat([t["negative_pooled"], pooled])
        v = self.network(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=joint,
            pooled_projections=pooled,
        )
        if guided:
            without, with_prompt = v.float().chunk(2)
            v = without + self.guidance * (with_prompt - without)
        return v
