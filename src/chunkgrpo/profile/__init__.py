# SPDX-License-Identifier: Apache-2.0
"""How fast a policy's trajectories move, whether that depends on the prompt, and where to cut.

``measuring`` rolls out and measures, ``variance`` says how much of the speed is the prompt,
``proposals`` cuts the curve into chunks, ``output`` writes and prints what was found. Axes: P
prompts x S seeds, crossed (seed s draws the same noise for every prompt); N trained steps.
"""

from chunkgrpo.profile.measuring import (
    Measurement,
    SamplerProfile,
    measure_speed,
    profile_policy,
)
from chunkgrpo.profile.output import plot_lines, print_profile, save_profile
from chunkgrpo.profile.proposals import RULES, Proposal, Window, carried_indices, propose
from chunkgrpo.profile.variance import Shares, crossed_interval, variance_shares

__all__ = [
    "Measurement",
    "SamplerProfile",
    "measure_speed",
    "profile_policy",
    "plot_lines",
    "print_profile",
    "save_profile",
    "RULES",
    "Proposal",
    "Window",
    "carried_indices",
    "propose",
    "Shares",
    "crossed_interval",
    "variance_shares",
]
