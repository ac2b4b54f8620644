# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages: how much better than its siblings an image is.

G images of one prompt form a group; an image's advantage is its reward relative to the group.
Published code differs in what the difference is divided by, and each variant is one function
here, registered by name in ``CONVENTIONS``.

Rounding is not signal: rewards that differ by less than a millionth of their size count as equal,
in every convention (:func:`~.rounding.settled`). Divided by their own deviation, the last bits of a
float32 would otherwise become advantages as large as any.

An image without a usable reward is dropped: inside the conventions its reward is NaN, which no
mean and no deviation counts, and its advantage is 0.

Axes: P prompts, G images per prompt, B = P * G samples, prompt-major; C chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import at_least_float32
from .rounding import settled, without_spread

# The two guards against division by zero found in published code.
TINY = 1e-8


SMALL = 1e-4


@dataclass(frozen=True, eq=False)
class Advantages:
    """What the policy gradient is weighted with, and how informative the groups were.

    Attributes:
        values: One advantage per sample, [B], or [B, C] where credit differs by chunk.
        spread: Unbiased standard deviation of the raw rewards within each group, [P].
        num_zero_spread: Number of groups whose rewards are all equal up to rounding, or of which
            fewer than two images are left, and which therefore teach nothing (0-dim integer
            tensor).
        chosen: Indices of the samples that are trained on, ascending; all where None.
    """

    values: Tensor
    spread: Tensor
    num_zero_spread: Tensor
    chosen: Tensor | None = None


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


def group_mean(rewards_PG: Tensor) -> Tensor:
    # Without NaN, nanmean may round differently from mean.
    if rewards_PG.isnan().any():
        return rewards_PG.nanmean(dim=1, keepdim=True)
    return rewards_PG.mean(dim=1, keepdim=True)


def group_centred(rewards_PG: Tensor) -> Tensor:
    return rewards_PG - group_mean(rewards_PG)


def group_spread(rewards_PG: Tensor, correction: int = 1) -> Tensor:
    """Standard deviation of each group [P, 1]; NaN of groups with ``correction`` images or less."""
    if not rewards_PG.isnan().any():
        return rewards_PG.std(dim=1, keepdim=True, correction=correction)
    # In float64, as std does, so that the square of no float32 overflows.
    squares_P1 = group_centred(rewards_PG).double().square().nansum(dim=1, keepdim=True)
    freedom_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True) - correction
    return (squares_P1 / freedom_P1.clamp(min=0)).sqrt().to(rewards_PG.dtype)


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
    return group_centred(rewards_PG) / (group_spread(rewards_PG) + TINY)


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
    return group_centred(rewards_PG) / (group_spread(rewards_PG, correction=0) + SMALL)


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
    return group_centred(rewards_PG) / (_batch_spread(rewards_PG) + TINY)


def flow_grpo(rewards_PG: Tensor) -> Tensor:
    r"""Each group by its own mean, all by the batch's population standard deviation.

    .. math:: A_i = \frac{r_i - \bar r_{group}}{s_{B} + 10^{-4}}

    Args:
        rewards_PG: [P, G].

    Returns:
        [P, G].

    Reference: Flow-GRPO, arXiv:2505.05470, default of its code.
    """
    return group_centred(rewards_PG) / (_batch_spread(rewards_PG, correction=0) + SMALL)


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
    return group_centred(rewards_PG)


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


def validated_groups(rewards_B: Tensor, num_prompts: int, kept_B: Tensor | None) -> Tensor:
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
    if not rewards_B.abs().nansum().isfinite():
        largest = rewards_B.abs().nan_to_num(0.0).max().item()
        raise ValueError(
            f"rewards are as large as {largest:.3g}, and the sum of {num_samples} overflows; scale "
            "the reward down"
        )
    return rewards_B.reshape(num_prompts, group_size)


def validated_clip(clip: float | None) -> None:
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
    A group whose rewards are equal up to rounding (:func:`~.rounding.settled`) gets exactly 0 under
    every convention that centres groups: the mean of equal float32 numbers may miss them by one
    rounding, and dividing that by 1e-8 would make an advantage out of nothing. Under one that does
    not, the whole batch gets 0 where all its rewards are equal in this sense.

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
        ValueError: If the shapes do not form groups of at least two, a kept reward is not finite or
            so large that their sum is not, the convention is unknown, or ``clip`` is not positive.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 4; GRPO, arXiv:2402.03300.
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"the advantage convention is {convention!r}; it must be one of "
            f"{sorted(CONVENTIONS)}; choose one of these"
        )
    validated_clip(clip)
    rewards_PG = settled(validated_groups(rewards_B, num_prompts, kept_B))
    rule = CONVENTIONS[convention]
    advantages_PG = rule.normalise(rewards_PG)
    flat_P = without_spread(rewards_PG)
    # A group whose rewards are all equal, or all of them where groups are not told apart.
    silent_P = flat_P if rule.centres_groups else without_spread(rewards_PG.reshape(1, -1))
    advantages_PG = advantages_PG.masked_fill(silent_P[:, None], 0.0)
    dropped_PG = rewards_PG.isnan()
    # One sample has no deviation, not even under a convention that ignores groups.
    too_few = (~dropped_PG).sum() < 2
    advantages_PG = advantages_PG.masked_fill(dropped_PG | too_few, 0.0)
    if clip is not None:
        advantages_PG = advantages_PG.clamp(-clip, clip)
    return Advantages(
        values=advantages_PG.reshape(-1),
        spread=torch.where(flat_P, 0.0, group_spread(rewards_PG)[:, 0]),
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
    groups = [settled(validated_groups(v, num_prompts, kept_B)) for v in (first_B, second_B)]
    c, d = (
        group_centred(each_PG).double().masked_fill(without_spread(each_PG)[:, None], 0.0)
        for each_PG in groups
    )
    return (c * d).nansum() / (c.square().nansum() * d.square().nansum()).sqrt()
