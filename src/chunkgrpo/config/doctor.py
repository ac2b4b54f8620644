# SPDX-License-Identifier: Apache-2.0
"""Settings of the doctor, and the names of its checks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from chunkgrpo.config.section import Section
from chunkgrpo.core.names import OneOf

CHECKS = {
    "resources": "there are memory and disk space for the run, and its folder can be written to",
    "prompts": "text encoders and rewards read the prompts to the end, and held-out ones are held "
    "out",
    "schedule": "the noise levels are those of the schedule, decreasing to 0",
    "encoding": "each sample is conditioned on its own prompt",
    "modes": "the network answers alike twice, and with gradients as without",
    "guidance": "guidance and negative prompts have an effect where they are given",
    "stock": "without noise, images are those of the model's own pipeline",
    "transition": "sampled steps have the mean, the spread and the density of their formulas",
    "noise": "noise is shared where it should be, and nowhere else",
    "rewards": "rewards are finite, differ within groups, and none drowns another",
    "reference": "the reference is the untrained model, also after the weights have changed",
    "ratio_one": "before any update every importance ratio is 1, within the clip range",
    "gradients": "gradients reach every trained weight and no other",
    "kl_gradient": "the pull to the reference has a gradient",
    "overfit": "a few updates on one prompt raise its reward",
}
"""The checks, in the order in which they are made, and what each asserts."""


class DoctorConfig(Section):
    """The examination before training."""

    skip: tuple[Annotated[str, OneOf(CHECKS)], ...] = Field(
        default=(), description="Checks that are left out, by name (docs/doctor.md)."
    )
    thorough: bool = Field(
        default=False,
        description="Examine a whole rollout instead of a few images, and overfit one prompt.",
    )
