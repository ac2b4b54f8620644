# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0 (``Lumina2Pipeline``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.encoding import with_negative
from chunkgrpo.policies.pipeline import PipelinePolicy, renormalised
from chunkgrpo.types import Conditioning


class Lumina2Policy(PipelinePolicy):
    """The network predicts -v from latents [B, C, h, w] and a time of 1 - sigma.

    Args:
        pipe: The loaded pipeline.
        adaptation: Which weights are trained.
        cfg_normalization: Give guided velocities the norm of the conditional ones, along rows of
            latent pixels.
        system_prompt: Put before each prompt; the pipeline's own where None.
        options: Of :class:`PipelinePolicy`.
    """

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        cfg_normalization: bool = True,
        system_prompt: str | None = None,
        **options: Any,
    ) -> None:
        self.cfg_normalization = cfg_normalization
        self.system_prompt = system_prompt
        super().__init__(pipe, adaptation, **options)

    def encoding_settings(self) -> dict[str, Any]:
        """Also the system prompt."""
        return {**super().encoding_settings(), "system_prompt": self.system_prompt}

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """As elsewhere, except that the pipeline uses the channels as the number of tokens."""
        return super().schedule_options(num_steps) | {"mu": self.linear_mu(self.latent_channels)}

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode with Gemma; the negative prompt has no system prompt."""
        captions, mask, negative, negative_mask = self.pipe.encode_prompt(
            prompts,
            self.guided,
            negative_prompt=negative_prompts,
            system_prompt=self.system_prompt,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        unconditional = {"captions": negative, "mask": negative_mask} if self.guided else {}
        return with_negative({"captions": captions, "mask": mask}, unconditional)

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Call the network; rows may differ in their text's length, which its mask says."""
        return -self.network(
            hidden_states=x,
            timestep=1 - 1000 * sigma / 1000,
            encoder_hidden_states=texts["captions"],
            encoder_attention_mask=texts["mask"],
        )

    def guide(self, without: Tensor, with_prompt: Tensor) -> Tensor:
        """Guide, then renormalise unless told otherwise."""
        v = super().guide(without, with_prompt)
        return renormalised(v, with_prompt) if self.cfg_normalization else v
