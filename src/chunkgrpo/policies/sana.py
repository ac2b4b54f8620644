# SPDX-License-Identifier: Apache-2.0
"""Sana (``SanaPipeline``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.encoding import with_negative
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.types import Conditioning


class SanaPolicy(PipelinePolicy):
    """The network predicts +v from latents [B, C, h, w] and 1000 sigma times its time scale.

    Sizes are exact, as with the pipeline's ``use_resolution_binning=False``. Released models come
    with a DPM solver; the loop here is Euler's, so compare with
    ``FlowMatchEulerDiscreteScheduler``.

    Args:
        pipe: The loaded pipeline.
        adaptation: Which weights are trained.
        instruction: Put the pipeline's instruction to its language model before each prompt.
        options: Of :class:`PipelinePolicy`.
    """

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        instruction: bool = True,
        **options: Any,
    ) -> None:
        self.instruction = instruction
        super().__init__(pipe, adaptation, **options)

    def encoding_settings(self) -> dict[str, Any]:
        """Also whether the instruction is put before each prompt."""
        return {**super().encoding_settings(), "instruction": self.instruction}

    @property
    def size_step(self) -> int:
        """The pipeline's rule."""
        return 32

    def default_side(self) -> int:
        """The size the network was trained for."""
        return self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """The scheduler's own grid, whose end points FlowMatchEuler shifts once more."""
        return {}

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode with Gemma."""
        instruction = self.stock_default("complex_human_instruction") if self.instruction else None
        captions, mask, negative, negative_mask = self.pipe.encode_prompt(
            prompts,
            self.guided,
            negative_prompt=negative_prompts,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        unconditional = {"captions": negative, "mask": negative_mask} if self.guided else {}
        return with_negative({"captions": captions, "mask": mask}, unconditional)

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Call the network; a variance that some also predict is ignored."""
        config = self.pipe.transformer.config
        v = self.network(
            hidden_states=x,
            timestep=1000 * sigma * config.timestep_scale,
            encoder_hidden_states=texts["captions"],
            encoder_attention_mask=texts["mask"],
        )
        return v[:, : x.shape[1]] if config.out_channels == 2 * x.shape[1] else v
