# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages: how much better than its siblings an image is.

G images of one prompt form a group; an image's advantage is its reward relative to the group.
Published code differs in what the difference is divided by, and each variant is one function
here, registered by name in ``CONVENTIONS``. Several rewards become one advantage in one of the
ways of ``COMBINATIONS``.

An image without a usable reward is dropped: inside the conventions its reward is NaN, which no
mean and no deviation counts, and its advantage is 0.

Axes: P prompts, G images per prompt, B = P * G samples, prompt-major; R rewards, C chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .chunks import COUNT_TOLERANCE
from .precision import at_least_float32

# The two guards against division by zero found in published code.
TINY = 1e-8
SMALL = 1e-4


@dataclass(frozen=True, eq=False)
class Advantages:
    """What the policy gradient is weighted with, and how informative the groups were.

    Attributes:
        values: One advantage per sample, [B].
        spread: Unbiased standard deviation of the raw rewards within each group, [P].
        num_zero_spread: Number of groups whose rewards are all equal, or of which fewer than two
            images are left, and which therefore teach nothing (0-dim integer tensor).
    """

    values: Tensor
    spread: Tensor
    num_zero_spread: Tensor


@dataclass(frozen=True)
class Convention:
    """One way to normalise rewards.

    Attributes:
        normalise: [P, G] rewards, NaN where an image is dropped -> [P, G] advantages, NaN there.
        centres_groups: Whether each group is compared with its own mean. Then a group whose
            rewards are all equal has advantage exactly 0.
    """

    normalise: Callable[[Tensor], Tensor]
    centres_groups: bool = True


def _group_mean(rewards_PG: Tensor) -> Tensor:
    # Without NaN, nanmean may round differently from mean.
    if rewards_PG.isnan().any():
        return rewards_PG.nanmean(dim=1, keepdim=True)
    return rewards_PG.mean(dim=1, keepdim=True)


def _group_centred(rewards_PG: Tensor) -> Tensor:
    return rewards_PG - _group_mean(rewards_PG)


def _group_spread(rewards_PG: Tensor, correction: int = 1) -> Tensor:
    """Standard deviation of each group [P, 1]; NaN of groups with ``correction`` images or less."""
    if not rewards_PG.isnan().any():
        return rewards_PG.std(dim=1, keepdim=True, correction=correction)
    squares_P1 = _group_centred(rewards_PG).square().nansum(dim=1, keepdim=True)
    freedom_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True) - correction
    return (squares_P1 / freedom_P1.clamp(min=0)).sqrt()


def _batch_spread(rewards_PG: Tensor, correction: int = 1) -> Tensor:
    kept = rewards_PG[~rewards_PG.isnan()]
    if len(kept) <= correction:
        return torch.full_like(rewards_PG[0, 0], float("nan"))
    return kept.std(correction=correction)


def group_std(rewards_PG: Tensor) -> Tensor:
    r"""Each group by its own mean and unbiased standard deviation.

    .. math:: A_i = \frac{r_i - \bar r}{s_{G-1} + 10^{-8}}

    Bounded by (G - 1) / sqrt(G): 3.175 for G = 12, so a clip at 5 never binds.

    Args:
        rewards_PG: [P, G], G >= 2.

    Returns:
        [P, G].

    Reference: DanceGRPO, arXiv:2505.07818; Chunk-GRPO, arXiv:2510.21583.
    """
    return _group_centred(rewards_PG) / (_group_spread(rewards_PG) + TINY)


def group_population_std(rewards_PG: Tensor) -> Tensor:
    r"""Each group by its own mean and population standard deviation.

    .. math:: A_i = \frac{r_i - \bar r}{s_{G} + 10^{-4}}

    Bounded by sqrt(G - 1).

    Args:
        rewards_PG: [P, G].

    Returns:
        [P, G].

    Reference: Flow-GRPO, arXiv:2505.05470, eq. 5, per-prompt variant.
    """
    return _group_centred(rewards_PG) / (_group_spread(rewards_PG, correction=0) + SMALL)


def global_std(rewards_PG: Tensor) -> Tensor:
    r"""Each group by its own mean, all by the batch's unbiased standard deviation.

    .. math:: A_i = \frac{r_i - \bar r_{group}}{s_{B-1} + 10^{-8}}

    The deviation is that of the raw rewards, so differences between prompts enlarge it.

    Args:
        rewards_PG: [P, G].

    Returns:
        [P, G].

    Reference: an option of the DanceGRPO line of code, arXiv:2505.07818.
    """
    return _group_centred(rewards_PG) / (_batch_spread(rewards_PG) + TINY)


def flow_grpo(rewards_PG: Tensor) -> Tensor:
    r"""Each group by its own mean, all by the batch's population standard deviation.

    .. math:: A_i = \frac{r_i - \bar r_{group}}{s_{B} + 10^{-4}}

    Args:
        rewards_PG: [P, G].

    Returns:
        [P, G].

    Reference: Flow-GRPO, arXiv:2505.05470, default of its code.
    """
    return _group_centred(rewards_PG) / (_batch_spread(rewards_PG, correction=0) + SMALL)


def group_std_median(rewards_PG: Tensor) -> Tensor:
    r"""As :func:`group_std`, then shifted so that half of each group is positive.

    .. math:: A_i = A^{std}_i - \mathrm{median}_{group}\, A^{std}

    The median of an even group is the mean of its two middle values. Advantages no longer sum
    to zero when rewards are skewed.

    Args:
        rewards_PG: [P, G], G >= 2.

    Returns:
        [P, G].

    Reference: an option of the Chunk-GRPO code, arXiv:2510.21583.
    """
    advantages_PG = group_std(rewards_PG)
    return advantages_PG - advantages_PG.nanquantile(0.5, dim=1, keepdim=True)


def ungrouped(rewards_PG: Tensor) -> Tensor:
    r"""All samples by the batch's mean and unbiased standard deviation; prompts are ignored.

    .. math:: A_i = \frac{r_i - \bar r_{batch}}{s_{B-1} + 10^{-8}}

    An easy prompt then looks like a good policy; kept for comparison.

    Args:
        rewards_PG: [P, G].

    Returns:
        [P, G].

    Reference: an option of the DanceGRPO line of code, arXiv:2505.07818.
    """
    mean = rewards_PG[~rewards_PG.isnan()].mean()
    return (rewards_PG - mean) / (_batch_spread(rewards_PG) + TINY)


def mean_only(rewards_PG: Tensor) -> Tensor:
    r"""Each group by its own mean, undivided.

    .. math:: A_i = r_i - \bar r

    Keeps the reward's unit, so the learning rate must fit it; does not amplify groups whose
    rewards barely differ.

    Args:
        rewards_PG: [P, G].

    Returns:
        [P, G].

    Reference: Dr. GRPO, arXiv:2503.20783.
    """
    return _group_centred(rewards_PG)


CONVENTIONS: dict[str, Convention] = {
    "group_std": Convention(group_std),
    "group_population_std": Convention(group_population_std),
    "global_std": Convention(global_std),
    "flow_grpo": Convention(flow_grpo),
    "group_std_median": Convention(group_std_median),
    "ungrouped": Convention(ungrouped, centres_groups=False),
    "mean_only": Convention(mean_only),
}
"""Normalisations by the name a configuration uses."""


def _validated_groups(rewards_B: Tensor, num_prompts: int, kept_B: Tensor | None) -> Tensor:
    """[B] -> [P, G], float32 or better with NaN where dropped, or the reason why not."""
    if rewards_B.ndim != 1:
        raise ValueError(
            f"rewards have shape {tuple(rewards_B.shape)}; one reward per sample is needed, [B]; "
            "add up several rewards first"
        )
    num_samples = len(rewards_B)
    if num_prompts < 1 or num_samples == 0 or num_samples % num_prompts:
        raise ValueError(
            f"{num_samples} rewards do not form {num_prompts} equal groups; pass all images of "
            "every prompt, prompt after prompt"
        )
    group_size = num_samples // num_prompts
    if group_size < 2:
        raise ValueError(
            "the group size is 1; an advantage compares images of one prompt, so a group needs "
            "at least 2; raise group_size"
        )
    if kept_B is not None and (kept_B.shape != rewards_B.shape or kept_B.dtype != torch.bool):
        raise ValueError(
            f"the kept samples are {kept_B.dtype} of shape {tuple(kept_B.shape)}; one boolean per "
            f"sample is needed, {tuple(rewards_B.shape)}"
        )
    finite_B = rewards_B.isfinite() if kept_B is None else rewards_B.isfinite() | ~kept_B
    if not finite_B.all():
        index = int((~finite_B).nonzero()[0])
        raise ValueError(
            f"rewards[{index}] is {rewards_B[index].item()} (prompt {index // group_size}, image "
            f"{index % group_size}); every reward must be finite; fix the reward function, "
            "or drop failed images"
        )
    rewards_B = at_least_float32(rewards_B)
    if kept_B is not None:
        rewards_B = rewards_B.masked_fill(~kept_B, float("nan"))
    return rewards_B.reshape(num_prompts, group_size)


def _without_spread(rewards_PG: Tensor) -> Tensor:
    """Say which groups teach nothing, [P]: all rewards equal, or fewer than two left."""
    dropped_PG = rewards_PG.isnan()
    highest_P = rewards_PG.masked_fill(dropped_PG, -torch.inf).amax(dim=1)
    lowest_P = rewards_PG.masked_fill(dropped_PG, torch.inf).amin(dim=1)
    return (highest_P == lowest_P) | ((~dropped_PG).sum(dim=1) < 2)


def _validated_clip(clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"the advantage clip is {clip}; it must be above 0; None turns it off")


def group_advantages(
    rewards_B: Tensor,
    num_prompts: int,
    convention: str = "group_std",
    clip: float | None = 5.0,
    kept_B: Tensor | None = None,
) -> Advantages:
    """Group-relative advantages of one reward.

    Rewards come prompt after prompt: samples ``p * G`` to ``p * G + G - 1`` belong to prompt p.
    A group whose rewards are all equal gets exactly 0 under every convention that centres groups:
    the mean of equal float32 numbers may miss them by one rounding, and dividing that by 1e-8
    would make an advantage out of nothing.

    Args:
        rewards_B: [B], finite where kept, any unit.
        num_prompts: P >= 1, a divisor of B; groups have G = B / P >= 2 samples.
        convention: A name in ``CONVENTIONS``.
        clip: Advantages are clamped to [-clip, clip]; None leaves them alone. A clamp that binds
            breaks the zero sum.
        kept_B: False for samples that are dropped, [B]; all are kept where None. Statistics are
            those of the kept ones, as if a group had never had the others, whose advantage is 0.
            A group with fewer than two left has no spread.

    Returns:
        Advantages [B] with the groups' spread [P] and the number of groups without any.

    Raises:
        ValueError: If the shapes do not form groups of at least two, a kept reward is not finite,
            the convention is unknown, or ``clip`` is not positive.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 4; GRPO, arXiv:2402.03300.
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"the advantage convention is {convention!r}; it must be one of "
            f"{sorted(CONVENTIONS)}; choose one of these"
        )
    _validated_clip(clip)
    rewards_PG = _validated_groups(rewards_B, num_prompts, kept_B)
    rule = CONVENTIONS[convention]
    advantages_PG = rule.normalise(rewards_PG)
    flat_P = _without_spread(rewards_PG)
    if rule.centres_groups:
        advantages_PG = advantages_PG.masked_fill(flat_P[:, None], 0.0)
    dropped_PG = rewards_PG.isnan()
    # One sample has no deviation, not even under a convention that ignores groups.
    too_few = (~dropped_PG).sum() < 2
    advantages_PG = advantages_PG.masked_fill(dropped_PG | too_few, 0.0)
    if clip is not None:
        advantages_PG = advantages_PG.clamp(-clip, clip)
    return Advantages(
        values=advantages_PG.reshape(-1),
        spread=torch.where(flat_P, 0.0, _group_spread(rewards_PG)[:, 0]),
        num_zero_spread=flat_P.sum(),
    )


def chunk_gains(rewards_BE: Tensor) -> Tensor:
    r"""What each chunk added to the reward of the predicted clean image.

    .. math:: \Delta_j = r(\hat x_0 \text{ at the end of chunk } j)
              - r(\hat x_0 \text{ at its start})

    Gains sum to the final reward minus that of the first prediction, whatever the sampler. That
    each is what its own chunk's noise does to the image holds for a reward that is linear in the
    latent, short steps, and one noise level: the flow coefficient with eta = sqrt(2), under which
    sampling is the time reversal of noising and the prediction a martingale. With less noise the
    ODE's part of the later steps goes on amplifying what a chunk has drawn, and credits it to
    them: on Gaussian data a chunk that ends at e receives the share :math:`k_e^{1 - \eta^2/2}` of
    its due, k being the correlation of the state at e with the image. For a curved reward a
    blurred early prediction moreover scores differently from the images it stands for.

    Args:
        rewards_BE: Rewards of the predictions at the E = C + 1 chunk boundaries, the last being
            that of the final image, [B, C+1].

    Returns:
        [B, C].

    Raises:
        ValueError: If there is no chunk.
    """
    if rewards_BE.ndim != 2 or rewards_BE.shape[1] < 2:
        raise ValueError(
            f"boundary rewards have shape {tuple(rewards_BE.shape)}; one column per chunk boundary "
            "is needed, [B, C+1] with at least one chunk"
        )
    return at_least_float32(rewards_BE).diff(dim=1)


def chunk_advantages(
    gains_BC: Tensor,
    num_prompts: int,
    convention: str = "group_std",
    clip: float | None = 5.0,
    kept_B: Tensor | None = None,
) -> Tensor:
    """Group-relative advantages of each chunk by its own gain.

    Every chunk is compared with the same chunk of its siblings, as :func:`group_advantages` does
    with the final reward.

    Args:
        gains_BC: :func:`chunk_gains`, [B, C].
        num_prompts: P.
        convention: A name in ``CONVENTIONS``.
        clip, kept_B: As in :func:`group_advantages`.

    Returns:
        [B, C].

    Reference: Stepwise-Flow-GRPO, arXiv:2603.28718 (gains by step); the chunk form is ours.
    """
    columns = [
        group_advantages(gain_B, num_prompts, convention, clip, kept_B).values
        for gain_B in gains_BC.unbind(1)
    ]
    return torch.stack(columns, dim=1)


# --- several rewards --------------------------------------------------------------------------


def weighted_sum(rewards_RB: Tensor, weights_R: Tensor) -> Tensor:
    r"""Rewards added by weight.

    .. math:: T_b = \sum_k w_k r_{kb}

    The reward of the larger spread decides, whatever the weights were meant to say.

    Args:
        rewards_RB: [R, B].
        weights_R: [R], any sign.

    Returns:
        [B].
    """
    total_B = torch.zeros_like(rewards_RB[0])
    for weight, rewards_B in zip(weights_R, rewards_RB, strict=True):
        total_B = total_B + weight * rewards_B
    return total_B


def weighted_product(rewards_RB: Tensor, weights_R: Tensor) -> Tensor:
    r"""Rewards multiplied, their weights being exponents.

    .. math:: T_b = \prod_k r_{kb}^{w_k}

    A zero in one reward can not be made up for by another. Only relative differences count, so
    units do not matter.

    Args:
        rewards_RB: [R, B], not negative: the product of two bad scores must not be a good one.
        weights_R: [R], positive.

    Returns:
        [B].
    """
    return (rewards_RB ** weights_R[:, None]).prod(dim=0)


def weighted_minimum(rewards_RB: Tensor, weights_R: Tensor) -> Tensor:
    r"""The worst reward after scaling.

    .. math:: T_b = \min_k w_k r_{kb}

    Weights bring rewards to one scale; one that is never the smallest teaches nothing.

    Args:
        rewards_RB: [R, B].
        weights_R: [R], positive.

    Returns:
        [B].
    """
    return (rewards_RB * weights_R[:, None]).amin(dim=0)


@dataclass(frozen=True)
class Combination:
    """One way to make one learning signal of several rewards.

    Attributes:
        total: [R, B] rewards and [R] weights -> [B].
        by_reward: Whether each reward becomes advantages of its own, which are then added by
            weight; ``total`` is then what is reported, not what is trained on.
        rescaled: Whether the sum of advantages is brought to unit deviation over the batch.
        positive: Whether weights must be positive.
    """

    total: Callable[[Tensor, Tensor], Tensor]
    by_reward: bool = False
    rescaled: bool = False
    positive: bool = False


COMBINATIONS: dict[str, Combination] = {
    "sum": Combination(weighted_sum),
    "advantage": Combination(weighted_sum, by_reward=True),
    "gdpo": Combination(weighted_sum, by_reward=True, rescaled=True),
    "product": Combination(weighted_product, positive=True),
    "minimum": Combination(weighted_minimum, positive=True),
}
"""Combinations by the name a configuration uses."""


def _validated_combination(
    rewards_RB: Tensor, weights_R: Tensor, combination: str, kept_B: Tensor | None
) -> Combination:
    if combination not in COMBINATIONS:
        raise ValueError(
            f"the combination of rewards is {combination!r}; it must be one of "
            f"{sorted(COMBINATIONS)}; choose one of these"
        )
    if rewards_RB.ndim != 2 or weights_R.shape != rewards_RB.shape[:1] or not len(weights_R):
        raise ValueError(
            f"rewards of shape {tuple(rewards_RB.shape)} and weights of shape "
            f"{tuple(weights_R.shape)} do not fit; pass [R, B] and [R], at least one reward"
        )
    rule = COMBINATIONS[combination]
    if rule.positive and not (weights_R > 0).all():
        raise ValueError(
            f"reward weights are {weights_R.tolist()}; combination {combination!r} needs positive "
            "ones; use 'sum' to subtract a reward"
        )
    if rule.total is weighted_product:
        wrong_RB = rewards_RB < 0
        if kept_B is not None:
            wrong_RB = wrong_RB & kept_B
        if wrong_RB.any():
            reward, sample = wrong_RB.nonzero()[0].tolist()
            raise ValueError(
                f"reward {reward} scored {rewards_RB[reward, sample].item():g} for sample "
                f"{sample}; a product needs scores that are not negative; shift the reward, or "
                "combine by 'advantage'"
            )
    return rule


def combined_rewards(
    rewards_RB: Tensor, weights_R: Tensor, combination: str = "sum", kept_B: Tensor | None = None
) -> Tensor:
    """One number per sample from several rewards.

    Args:
        rewards_RB: [R, B], finite where kept.
        weights_R: [R].
        combination: A name in ``COMBINATIONS``.
        kept_B: False for dropped samples, [B]; all are kept where None.

    Returns:
        [B], NaN where dropped.

    Raises:
        ValueError: If the combination is unknown, or weights or scores are not allowed in it.
    """
    rule = _validated_combination(rewards_RB, weights_R, combination, kept_B)
    return _total(rule, rewards_RB, weights_R, kept_B)


def _total(
    rule: Combination, rewards_RB: Tensor, weights_R: Tensor, kept_B: Tensor | None
) -> Tensor:
    total_B = rule.total(rewards_RB, weights_R)
    return total_B if kept_B is None else total_B.masked_fill(~kept_B, float("nan"))


def combined_advantages(
    rewards_RB: Tensor,
    weights_R: Tensor,
    num_prompts: int,
    combination: str = "sum",
    convention: str = "group_std",
    clip: float | None = 5.0,
    kept_B: Tensor | None = None,
) -> Advantages:
    r"""Group-relative advantages of several rewards.

    By reward (``"advantage"``, ``"gdpo"``), with :math:`A_k` the advantages of reward k alone:

    .. math:: A_b = \sum_k w_k A_{kb}, \qquad
              A^{gdpo}_b = \frac{A_b - \bar A}{s_{B-1} + 10^{-4}}

    so weights say what they seem to, whatever the rewards' units; else those of the combined
    reward. Under a convention that centres groups, a group in which no reward has any spread keeps
    advantage exactly 0, also where the batch's mean is not 0 (``group_std_median`` of skewed
    rewards). The clamp is applied to the result.

    Args:
        rewards_RB: [R, B], finite where kept.
        weights_R: [R].
        num_prompts: P.
        combination: A name in ``COMBINATIONS``.
        convention, clip, kept_B: As in :func:`group_advantages`.

    Returns:
        Advantages. By reward, a group has no spread where no reward has any; the spread is that
        of the weighted sum.

    Raises:
        ValueError: As :func:`group_advantages` and :func:`combined_rewards`.

    Reference: GDPO, arXiv:2601.05242, for the normalisation by reward and the rescaling.
    """
    rule = _validated_combination(rewards_RB, weights_R, combination, kept_B)
    total_B = _total(rule, rewards_RB, weights_R, kept_B)
    whole = group_advantages(total_B, num_prompts, convention, clip, kept_B)
    if not rule.by_reward:
        return whole
    each = [group_advantages(r_B, num_prompts, convention, None, kept_B) for r_B in rewards_RB]
    values_B = weighted_sum(torch.stack([part.values for part in each]), weights_R)
    if rule.rescaled:
        counted_B = slice(None) if kept_B is None else kept_B
        rest_B = values_B[counted_B]
        if len(rest_B) > 1:
            scaled_B = (values_B - rest_B.mean()) / (rest_B.std() + SMALL)
            values_B = scaled_B if kept_B is None else scaled_B.masked_fill(~kept_B, 0.0)
    flat_P = torch.stack([part.spread == 0 for part in each]).all(dim=0)
    if rule.rescaled and CONVENTIONS[convention].centres_groups:
        # The batch's mean is 0 only where each group's is; a group that teaches nothing stays at 0.
        values_PG = values_B.reshape(num_prompts, -1).masked_fill(flat_P[:, None], 0.0)
        values_B = values_PG.flatten()
    if clip is not None:
        values_B = values_B.clamp(-clip, clip)
    return Advantages(values_B, whole.spread, flat_P.sum())


def combined_chunk_advantages(
    rewards_RBE: Tensor,
    weights_R: Tensor,
    num_prompts: int,
    combination: str = "sum",
    convention: str = "group_std",
    clip: float | None = 5.0,
    kept_B: Tensor | None = None,
) -> Tensor:
    """Group-relative advantages of each chunk by what it adds to several rewards.

    By reward, a chunk's gains in each reward are normalised before they are added; else the
    combined reward's gains are those of :func:`chunk_gains`.

    Args:
        rewards_RBE: Each reward of the predictions at the chunk boundaries, [R, B, C+1].
        weights_R, num_prompts, combination, convention, clip, kept_B: As in
            :func:`combined_advantages`.

    Returns:
        [B, C].
    """
    boundaries = rewards_RBE.unbind(2)
    rule, *_ = [_validated_combination(r_RB, weights_R, combination, kept_B) for r_RB in boundaries]
    if rule.by_reward:
        columns = [
            combined_advantages(
                after - before, weights_R, num_prompts, combination, convention, clip, kept_B
            ).values
            for before, after in pairwise(boundaries)
        ]
        return torch.stack(columns, dim=1)
    totals = [_total(rule, r_RB, weights_R, kept_B) for r_RB in boundaries]
    gains_BC = chunk_gains(torch.stack(totals, dim=1))
    return chunk_advantages(gains_BC, num_prompts, convention, clip, kept_B)


def num_kept(num_samples: int, share: float, num_updates: int = 1) -> int:
    r"""How many samples of a rollout are trained.

    .. math:: \max(U, \lceil f B \rceil)

    The product is taken up to rounding, so 0.28 of 25 is 7; each of U updates gets a sample.

    Args:
        num_samples: B >= U.
        share: f in (0, 1].
        num_updates: U >= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of samples that is kept is {share}; it must be in (0, 1]")
    return max(num_updates, math.ceil(share * num_samples - COUNT_TOLERANCE))


def strongest(advantages: Tensor, number: int) -> Tensor:
    """Choose the samples whose advantages are largest in size, whatever their sign.

    A sample pulls in proportion to its advantage. Where advantages are normally distributed, the
    half that is largest in size holds 93 % of the sum of their squares, and training it costs half.
    The groups share the number: one in which a single image stands out gives that one.

    Args:
        advantages: [B], or [B, C] where they differ by chunk: then by the norm over chunks.
        number: Samples to choose, 1 to B.

    Returns:
        Their indices, ascending. Sizes are compared to four decimals, so that rounding does not
        decide between, say, the right and the wrong half of a group; of equal ones the first are
        chosen.

    Reference: Xu et al., PODS, arXiv:2504.13818, which keeps those of largest reward variance in
    each group.
    """
    size_B = at_least_float32(advantages).reshape(len(advantages), -1).norm(dim=1)
    return size_B.round(decimals=4).argsort(descending=True, stable=True)[:number].sort().values


def hold_still(advantages: Tensor, held_RB: Tensor, num_prompts: int, chosen: Tensor) -> Tensor:
    r"""Take out of advantages what says anything about other scores.

    .. math:: A' = A - X X^+ A, \qquad X_{br} = h_{rb} - \bar h_{r,group(b)}

    A policy gradient moves the mean of a score h in proportion to the sum of A h over samples. With
    A' that sum is zero: what a rollout says of h by chance, or because h and the reward go together
    in it, no longer adds up to a drift. It costs one dimension in B a score.

    Args:
        advantages: [B], or [B, C] where they differ by chunk.
        held_RB: The scores to hold, [R, B]; one that is not finite counts as its group's mean.
        num_prompts: P.
        chosen: Indices of the samples that are trained; the others get 0.

    Returns:
        As ``advantages``, in float32.
    """
    centred_RB = torch.stack([
        _group_centred(_validated_groups(held_B, num_prompts, held_B.isfinite())).nan_to_num(0)
        for held_B in held_RB.double()
    ]).flatten(1)  # fmt: skip
    all_BC = advantages.double().reshape(len(advantages), -1)
    x_SR, a_SC = centred_RB.T[chosen], all_BC[chosen]
    left_BC = torch.zeros_like(all_BC)
    left_BC[chosen] = a_SC - x_SR @ (torch.linalg.pinv(x_SR) @ a_SC)
    return left_BC.reshape(advantages.shape).float()


def reward_shares(
    rewards_RB: Tensor,
    weights_R: Tensor,
    num_prompts: int,
    combination: str = "sum",
    convention: str = "group_std",
    kept_B: Tensor | None = None,
) -> Tensor:
    r"""How much of the advantages' variance each reward brings.

    .. math:: \rho_k = \frac{\sum_b a_{kb}^2}{\sum_j \sum_b a_{jb}^2}

    with :math:`a_k` the reward's own part of the advantage: of a sum, its weighted deviation from
    the group's mean over what the group is divided by; by reward, its weighted advantage; of a
    product, to first order, its weighted deviation relative to the group's mean, times the mean
    product. A minimum has no parts: there :math:`\rho_k` is the share of samples in which reward k
    is the smallest, ties divided. Parts may cancel (two rewards that disagree); shares do not show
    it, correlations do.

    Args:
        rewards_RB, weights_R, num_prompts, combination, convention, kept_B: As in
            :func:`combined_advantages`.

    Returns:
        [R], summing to 1; NaN where no group teaches anything.
    """
    rule = _validated_combination(rewards_RB, weights_R, combination, kept_B)
    if kept_B is None:
        kept_B = torch.ones_like(rewards_RB[0], dtype=torch.bool)
    groups_RPG = torch.stack([_validated_groups(r_B, num_prompts, kept_B) for r_B in rewards_RB])
    if rule.total is weighted_minimum:
        scaled_RB = (rewards_RB * weights_R[:, None])[:, kept_B]
        lowest_RB = (scaled_RB == scaled_RB.amin(dim=0)).float()
        return (lowest_RB / lowest_RB.sum(dim=0)).mean(dim=1)
    weights_R11 = weights_R[:, None, None]
    if rule.by_reward:
        each = [group_advantages(r, num_prompts, convention, None, kept_B) for r in rewards_RB]
        shape = groups_RPG.shape
        parts_RPG = weights_R11 * torch.stack([part.values for part in each]).reshape(shape)
    else:
        total_B = rule.total(rewards_RB, weights_R)
        whole = group_advantages(total_B, num_prompts, convention, None, kept_B)
        total_PG = total_B.masked_fill(~kept_B, float("nan")).reshape(num_prompts, -1)
        advantage_PG = whole.values.masked_fill(~kept_B, float("nan")).reshape(num_prompts, -1)
        # What a group is divided by, without asking the convention; groups without spread count 0.
        factor_P1 = (_group_spread(advantage_PG) / _group_spread(total_PG)).nan_to_num(0, 0, 0)
        factor_P1 = factor_P1.masked_fill(_without_spread(total_PG)[:, None], 0.0)
        mean_RP1 = torch.stack([_group_mean(r_PG) for r_PG in groups_RPG])
        parts_RPG = weights_R11 * (groups_RPG - mean_RP1) * factor_P1
        if rule.total is weighted_product:
            level_P1 = weighted_product(mean_RP1.flatten(1), weights_R)[:, None]
            parts_RPG = (parts_RPG * level_P1 / mean_RP1).nan_to_num(0, 0, 0)
    power_R = parts_RPG.square().flatten(1).nansum(dim=1)
    return power_R / power_R.sum()


def group_correlation(
    first_B: Tensor, second_B: Tensor, num_prompts: int, kept_B: Tensor | None = None
) -> Tensor:
    r"""Correlation of two rewards within groups.

    .. math:: \frac{\sum_b c_b d_b}{\sqrt{\sum_b c_b^2 \sum_b d_b^2}}

    with c and d the deviations from each group's mean: what prompts have in common does not count.

    Args:
        first_B, second_B: [B], finite where kept.
        num_prompts: P.
        kept_B: False for dropped samples, [B]; all are kept where None.

    Returns:
        0-dim, in [-1, 1]; NaN where either has no spread.
    """
    c, d = (
        _group_centred(_validated_groups(values_B, num_prompts, kept_B)).double()
        for values_B in (first_B, second_B)
    )
    flat = [_without_spread(_validated_groups(v, num_prompts, kept_B)) for v in (first_B, second_B)]
    c, d = (x.masked_fill(f[:, None], 0.0) for x, f in zip((c, d), flat, strict=True))
    return (c * d).nansum() / (c.square().nansum() * d.square().nansum()).sqrt()
