# SPDX-License-Identifier: Apache-2.0
"""Z-Image and Z-Image-Turbo (``ZImagePipeline``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.encoding import with_negative
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.types import Conditioning


class ZImagePolicy(PipelinePolicy):
    """The network predicts -v from lists of latents [C, 1, h, w] and a time of 1 - sigma.

    Guidance is c + g (c - u), so it is on above 0 and the usual scale minus one; Turbo wants 0.

    Args:
        pipe: The loaded pipeline.
        adaptation: Which weights are trained.
        cfg_normalization: Bound on a guided velocity's norm, in norms of the conditional one; 0 is
            none.
        options: Of :class:`PipelinePolicy`.
    """

    guided_above = 0.0

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        cfg_normalization: float = 0.0,
        **options: Any,
    ) -> None:
        self.cfg_normalization = cfg_normalization
        super().__init__(pipe, adaptation, **options)

    def default_side(self) -> int:
        """What the pipeline's call falls back to."""
        return 1024

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """The pipeline's own unshifted grid; its shift is static unless the scheduler says so."""
        _, height, width = self.latent_shape
        return {
            "sigmas": self.stock_module.get_default_z_image_sigmas(num_steps),
            "mu": self.linear_mu((height // 2) * (width // 2)),
        }

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode in the tokenizer's chat template; rows have as many tokens as their text."""

        def encoded(texts: list[str]) -> dict[str, Tensor]:
            rows, _ = self.pipe.encode_prompt(
                list(texts),  # the pipeline overwrites the list it is given
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.max_sequence_length,
            )
            masks = [row.new_ones(len(row), dtype=torch.long) for row in rows]
            return {
                "captions": pad_sequence(rows, batch_first=True),
                "mask": pad_sequence(masks, batch_first=True),
            }

        negative = encoded(negative_prompts) if self.guided else {}
        return with_negative(encoded(prompts), negative)

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Call the network, which pads its lists itself."""
        lengths = texts["mask"].sum(1).tolist()
        rows = self.network(
            x=list(x.unsqueeze(2).unbind()),
            t=(1000 - 1000 * sigma) / 1000,
            cap_feats=[row[:n] for row, n in zip(texts["captions"], lengths)],
        )
        return -torch.stack(rows).squeeze(2)

    def guide(self, without: Tensor, with_prompt: Tensor) -> Tensor:
        """Guide away from the unconditional velocity, and bound the norm if set."""
        v = with_prompt + self.cfg_scale * (with_prompt - without)
        if self.cfg_normalization <= 0:
            return v
        before, after = (w.flatten(1).norm(dim=1) for w in (with_prompt, v))
        ratio = self.cfg_normalization * before / after
        return v * ratio.clamp(max=1).view(-1, 1, 1, 1)
