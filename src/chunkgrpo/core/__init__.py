# SPDX-License-Identifier: Apache-2.0
"""The method itself, in torch and nothing else: pure functions and frozen values.

To learn Chunk-GRPO (arXiv:2510.21583) from the code, read the files in this order:

1. :mod:`.schedules`: the grid of noise levels that a sampler visits.
2. :mod:`.sde`: one stochastic step between two of them, a Gaussian with a density.
3. :mod:`.dynamics`: how fast a trajectory moves along the grid.
4. :mod:`.chunks`: cutting the steps into chunks of similar dynamics, and choosing some.
5. :mod:`.learned`: a choice of chunks that adapts while training.
6. :mod:`.credit`: from rewards to advantages.
7. :mod:`.objectives`: one importance ratio per chunk, its clipped loss, and its gradient.

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
    explained_variation,
    explicit_plan,
    importance_weights,
    num_selected,
    optimal_plan,
    paper_plan,
    plackett_luce_draw,
    plackett_luce_inclusion,
    step_plan,
    unit_weights,
    whole_plan,
)
from .credit import CONVENTIONS, Advantages, Convention, group_advantages
from .dynamics import DISTANCES, cosine_distance, mean_curve, relative_l1, relative_l2
from .learned import LearnedSelection, gradient_usefulness, reward_usefulness
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
    "DISTANCES",
    "PAPER_SIZES",
    "TIMESTEP_ROUNDINGS",
    "Advantages",
    "ChunkPlan",
    "Convention",
    "DanceDiffusion",
    "Diffusion",
    "FlowDiffusion",
    "Gaussian",
    "LearnedSelection",
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
    "explained_variation",
    "explicit_plan",
    "floor1000_timestep",
    "gradient_is_cut",
    "gradient_usefulness",
    "group_advantages",
    "importance_weights",
    "k3_kl",
    "make_sigmas",
    "mean_curve",
    "network_timestep",
    "num_selected",
    "optimal_plan",
    "paper_plan",
    "plackett_luce_draw",
    "plackett_luce_inclusion",
    "policy_gradient_scale",
    "predict_clean",
    "predict_noise",
    "ratio_diagnostics",
    "reference_kl",
    "relative_l1",
    "relative_l2",
    "reward_usefulness",
    "shift_sigmas",
    "step_coefficients",
    "step_plan",
    "surrogate_slope",
    "transition",
    "unit_weights",
    "validate_sigmas",
    "whole_plan",
]
