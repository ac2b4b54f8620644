# SPDX-License-Identifier: Apache-2.0
"""The method itself, in torch and nothing else: pure functions and frozen values.

To learn Chunk-GRPO (arXiv:2510.21583) from the code, read the files in this order:

1. :mod:`.schedules`: the grid of noise levels that a sampler visits.
2. :mod:`.sde`: one stochastic step between two of them, a Gaussian with a density.
3. :mod:`.dynamics`: how fast a trajectory moves along the grid.
4. :mod:`.chunks`: cutting the steps into chunks of similar dynamics, and choosing some.
5. :mod:`.credit`: from rewards to advantages.
6. :mod:`.objectives`: one importance ratio per chunk, its clipped loss, and its gradient.
7. :mod:`.forward`: the relatives that train finished images, noised again, and no steps at all.

Nothing here reads files, moves tensors between devices or draws from global random state.
"""

from .chunks import (
    DIFFERENCES,
    PAPER_SIZES,
    ChunkPlan,
    ListedSelection,
    Selection,
    UniformSelection,
    WeightedSelection,
    adaptive_plan,
    chosen_mask,
    chunk_weights,
    equal_plan,
    explicit_plan,
    num_selected,
    optimal_plan,
    paper_plan,
    plackett_luce_inclusion,
    step_plan,
    whole_plan,
)
from .credit import CONVENTIONS, Advantages, Convention, group_advantages
from .dynamics import cosine_distance, mean_curve, relative_l1, relative_l2
from .forward import (
    PSEUDO_LOG_PROBS,
    matching_error,
    nft_pair_loss,
    noisy,
    optimality,
    pseudo_log_prob,
    scaled_advantages,
    shuffled_times,
    stratified_times,
    velocity_distance,
)
from .objectives import (
    chunk_log_ratio,
    clipped_surrogate,
    gradient_is_cut,
    k3_kl,
    policy_gradient_scale,
    ratio_diagnostics,
    reference_kl,
    step_coefficients,
    surrogate_slope,
)
from .precision import at_least_float32
from .schedules import (
    TIMESTEP_ROUNDINGS,
    TimestepRounding,
    exact_timestep,
    floor1000_timestep,
    make_sigmas,
    network_timestep,
    shift_sigmas,
    validate_sigmas,
)
from .sde import (
    DanceDiffusion,
    Diffusion,
    FlowDiffusion,
    Gaussian,
    OdeDiffusion,
    Transition,
    predict_clean,
    predict_noise,
    transition,
)

__all__ = [
    "CONVENTIONS",
    "DIFFERENCES",
    "PAPER_SIZES",
    "PSEUDO_LOG_PROBS",
    "TIMESTEP_ROUNDINGS",
    "Advantages",
    "ChunkPlan",
    "Convention",
    "DanceDiffusion",
    "Diffusion",
    "FlowDiffusion",
    "Gaussian",
    "ListedSelection",
    "OdeDiffusion",
    "Selection",
    "TimestepRounding",
    "Transition",
    "UniformSelection",
    "WeightedSelection",
    "adaptive_plan",
    "at_least_float32",
    "chosen_mask",
    "chunk_log_ratio",
    "chunk_weights",
    "clipped_surrogate",
    "cosine_distance",
    "equal_plan",
    "exact_timestep",
    "explicit_plan",
    "floor1000_timestep",
    "gradient_is_cut",
    "group_advantages",
    "k3_kl",
    "make_sigmas",
    "matching_error",
    "mean_curve",
    "network_timestep",
    "nft_pair_loss",
    "noisy",
    "num_selected",
    "optimal_plan",
    "optimality",
    "paper_plan",
    "plackett_luce_inclusion",
    "policy_gradient_scale",
    "predict_clean",
    "predict_noise",
    "pseudo_log_prob",
    "ratio_diagnostics",
    "reference_kl",
    "relative_l1",
    "relative_l2",
    "scaled_advantages",
    "shift_sigmas",
    "shuffled_times",
    "step_coefficients",
    "step_plan",
    "stratified_times",
    "surrogate_slope",
    "transition",
    "validate_sigmas",
    "velocity_distance",
    "whole_plan",
]
