# SPDX-License-Identifier: Apache-2.0
"""The method itself, in torch and nothing else: pure functions and frozen values.

To learn Chunk-GRPO (arXiv:2510.21583) from the code, read the files in this order:

1. :mod:`.schedules`: the grid of noise levels that a sampler visits.
2. :mod:`.sde`: one stochastic step between two of them, a Gaussian with a density.
3. :mod:`.dynamics`: how fast a trajectory moves along the grid.
4. :mod:`.plans`: cutting the steps into chunks; :mod:`.measured_plans`, chunks of similar dynamics;
   :mod:`.plan_rules`, how a run gets its plan.
5. :mod:`.selection`: which chunks are trained; :mod:`.plackett_luce`, weighted draws;
   :mod:`.learned`, a selection that adapts while training.
6. :mod:`.advantages`: from rewards to advantages; :mod:`.combination`, several rewards;
   :mod:`.subset`, which samples are trained on.
7. :mod:`.ratios`: one importance ratio per chunk and its gradient; :mod:`.trust`, its clipped loss;
   :mod:`.step_weights`, :mod:`.kl` and :mod:`.consistency`, what can be added to it.
8. :mod:`.windows`: noise and training in some of the steps only.
9. :mod:`.forward_process`, :mod:`.nft`, :mod:`.awm`: the relatives that train finished images,
   noised again, and no steps at all.

Beside them: :mod:`.precision`, the one rule of arithmetic, and :mod:`.names`, vocabularies.

Nothing here reads files, moves tensors between devices or draws from global random state.
"""

from .advantages import (
    CONVENTIONS,
    Advantages,
    Convention,
    chunk_advantages,
    chunk_gains,
    group_advantages,
    group_correlation,
)
from .awm import (
    GeneralHuberLogProb,
    HuberLogProb,
    LinearLogProb,
    QuadraticLogProb,
    UniformLogProb,
    ghuber_log_prob,
    huber_log_prob,
    linear_log_prob,
    quadratic_log_prob,
    scaled_advantages,
    stratified_times,
    uniform_log_prob,
)
from .combination import (
    COMBINATIONS,
    Combination,
    combined_advantages,
    combined_chunk_advantages,
    combined_rewards,
    reward_shares,
    weighted_minimum,
    weighted_product,
    weighted_sum,
)
from .consistency import consistency
from .dynamics import DISTANCES, cosine_distance, mean_curve, relative_l1, relative_l2
from .forward_process import matching_error, noisy, velocity_distance
from .kl import NoKl, RateKl, TransitionKl, k3_kl, k3_slope, reference_kl
from .learned import Learned, LearnedSelection, gradient_usefulness, reward_usefulness
from .measured_plans import DIFFERENCES, adaptive_plan, explained_variation, optimal_plan
from .nft import nft_pair_loss, optimality, shuffled_times
from .plackett_luce import plackett_luce_draw, plackett_luce_inclusion
from .plan_rules import (
    AdaptivePlan,
    EqualPlan,
    ExplicitPlan,
    OptimalPlan,
    PaperPlan,
    StepPlan,
    WholePlan,
)
from .plans import (
    PAPER_SIZES,
    ChunkPlan,
    equal_plan,
    explicit_plan,
    paper_plan,
    restrict_plan,
    step_plan,
    whole_plan,
)
from .precision import at_least_float32, beside
from .ratios import (
    RATIO_FORMS,
    chunk_log_ratio,
    ratio_scale,
    step_coefficients,
    transition_scale,
)
from .schedules import (
    TIMESTEP_ROUNDINGS,
    MergeEntropy,
    MergeSizes,
    Native,
    NoMerge,
    Shifted,
    TimestepRounding,
    entropy_merges,
    exact_timestep,
    floor1000_timestep,
    make_sigmas,
    merge_sigmas,
    shift_sigmas,
    validate_sigmas,
)
from .sde import (
    CpsTransition,
    DanceDiffusion,
    Diffusion,
    FlowDiffusion,
    Gaussian,
    Kernel,
    OdeDiffusion,
    Transition,
    kernel_of,
    predict_clean,
    predict_noise,
    transition,
)
from .selection import (
    ListedSelection,
    Selection,
    UniformSelection,
    WeightedSelection,
    chosen_mask,
    chunk_weights,
    importance_weights,
    num_selected,
    unit_weights,
)
from .step_weights import (
    INNER_WEIGHTS,
    ChunkSizeWeights,
    ImplicitWeights,
    InverseDtWeights,
    NoiseLevelWeights,
    NoOuterWeights,
    chunk_size_weights,
    equal_kappa_weights,
    implicit_weights,
    inverse_dt_weights,
    noise_level_weights,
)
from .subset import largest_advantages, num_chosen, project_out
from .trust import (
    Clip,
    KlMask,
    NoTrustRegion,
    TrustRegion,
    clipped_surrogate,
    gradient_is_cut,
    region_slope,
    surrogate_slope,
)
from .windows import AllSteps, ChunkWindow, FixedWindow, RandomWindow, SlidingWindow, WindowSchedule

__all__ = [
    "COMBINATIONS",
    "CONVENTIONS",
    "DIFFERENCES",
    "DISTANCES",
    "INNER_WEIGHTS",
    "PAPER_SIZES",
    "RATIO_FORMS",
    "TIMESTEP_ROUNDINGS",
    "AdaptivePlan",
    "Advantages",
    "AllSteps",
    "ChunkPlan",
    "ChunkSizeWeights",
    "ChunkWindow",
    "Clip",
    "Combination",
    "Convention",
    "CpsTransition",
    "DanceDiffusion",
    "Diffusion",
    "EqualPlan",
    "ExplicitPlan",
    "FixedWindow",
    "FlowDiffusion",
    "Gaussian",
    "GeneralHuberLogProb",
    "HuberLogProb",
    "ImplicitWeights",
    "InverseDtWeights",
    "Kernel",
    "KlMask",
    "Learned",
    "LearnedSelection",
    "LinearLogProb",
    "ListedSelection",
    "MergeEntropy",
    "MergeSizes",
    "Native",
    "NoKl",
    "NoMerge",
    "NoOuterWeights",
    "NoTrustRegion",
    "NoiseLevelWeights",
    "OdeDiffusion",
    "OptimalPlan",
    "PaperPlan",
    "QuadraticLogProb",
    "RandomWindow",
    "RateKl",
    "Selection",
    "Shifted",
    "SlidingWindow",
    "StepPlan",
    "TimestepRounding",
    "Transition",
    "TransitionKl",
    "TrustRegion",
    "UniformLogProb",
    "UniformSelection",
    "WeightedSelection",
    "WholePlan",
    "WindowSchedule",
    "adaptive_plan",
    "at_least_float32",
    "beside",
    "chosen_mask",
    "chunk_advantages",
    "chunk_gains",
    "chunk_log_ratio",
    "chunk_size_weights",
    "chunk_weights",
    "clipped_surrogate",
    "combined_advantages",
    "combined_chunk_advantages",
    "combined_rewards",
    "consistency",
    "cosine_distance",
    "entropy_merges",
    "equal_kappa_weights",
    "equal_plan",
    "exact_timestep",
    "explained_variation",
    "explicit_plan",
    "floor1000_timestep",
    "ghuber_log_prob",
    "gradient_is_cut",
    "gradient_usefulness",
    "group_advantages",
    "group_correlation",
    "huber_log_prob",
    "implicit_weights",
    "importance_weights",
    "inverse_dt_weights",
    "k3_kl",
    "k3_slope",
    "kernel_of",
    "largest_advantages",
    "linear_log_prob",
    "make_sigmas",
    "matching_error",
    "mean_curve",
    "merge_sigmas",
    "nft_pair_loss",
    "noise_level_weights",
    "noisy",
    "num_chosen",
    "num_selected",
    "optimal_plan",
    "optimality",
    "paper_plan",
    "plackett_luce_draw",
    "plackett_luce_inclusion",
    "predict_clean",
    "predict_noise",
    "project_out",
    "quadratic_log_prob",
    "ratio_scale",
    "reference_kl",
    "region_slope",
    "relative_l1",
    "relative_l2",
    "restrict_plan",
    "reward_shares",
    "reward_usefulness",
    "scaled_advantages",
    "shift_sigmas",
    "shuffled_times",
    "step_coefficients",
    "step_plan",
    "stratified_times",
    "surrogate_slope",
    "transition",
    "transition_scale",
    "uniform_log_prob",
    "unit_weights",
    "validate_sigmas",
    "velocity_distance",
    "weighted_minimum",
    "weighted_product",
    "weighted_sum",
    "whole_plan",
]
