# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 (``StableDiffusion3Pipeline``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chunkgrpo.policies.adaptation import BOTH_STREAMS
from chunkgrpo.policies.encoding import with_negative
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.types import Conditioning


class StableDiffusion3Policy(PipelinePolicy):
    """The network predicts +v from latents [B, C, h, w] and a timestep of 1000 sigma."""

    lora_targets = BOTH_STREAMS

    @property
    def size_step(self) -> int:
        """One patch of latent pixels."""
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """The end points are shifted once more than the rest; dynamic shifting is optional."""
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = self.latent_shape
        patch = self.pipe.transformer.config.patch_size
        return {"mu": self.linear_mu((height // patch) * (width // patch))}

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode with both CLIPs and T5, and the negative prompt where guidance needs it."""
        joint, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            negative_prompt=negative_prompts,
            do_classifier_free_guidance=self.guided,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        texts = {"joint": joint, "pooled": pooled}
        unconditional = {"joint": negative, "pooled": negative_pooled} if self.guided else {}
        return with_negative(texts, unconditional)

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Call the network."""
        return self.network(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=texts["joint"],
            pooled_projections=texts["pooled"],
        )
