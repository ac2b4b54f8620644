# SPDX-License-Identifier: Apache-2.0
"""AWM (arXiv:2509.25050): a policy gradient whose log-probability is the pretraining loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor

from chunkgrpo.algorithms.forward_method import ForwardMethod
from chunkgrpo.algorithms.noised_pairs import (
    Deal,
    NoisedPairs,
    advantages_by_slot,
    check_not_negative,
    check_positive,
    num_pairs,
)
from chunkgrpo.algorithms.pairs import Pairs, check_counts
from chunkgrpo.core.awm import (
    AnyPseudoLogProb,
    GeneralHuberLogProb,
    scaled_advantages,
)
from chunkgrpo.core.forward_process import matching_error, velocity_distance
from chunkgrpo.core.names import ByKind, OneOf, check_name
from chunkgrpo.core.times import AnyTimes, StratifiedTimes
from chunkgrpo.core.trust import clipped_surrogate, gradient_is_cut, surrogate_slope
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.types import Experience, LossPart, Trajectory

MODES = ("exp_first", "sum_first")
"""One ratio per pair, or one per sample."""


@dataclass(frozen=True)
class AWMLoss:
    r"""The clipped surrogate on log-probabilities derived from the pretraining loss.

    .. math:: L = \frac1Q \sum_{\text{pairs}} \left[
              \max(-A\rho, -A\,\mathrm{clip}(\rho, 1-\epsilon_l, 1+\epsilon_h))
              + \beta \frac{\|v - v_{ref}\|^2}{D}
              + \beta_{ema} \frac{\|v - v_{ema}\|^2}{D} \right], \quad
              \rho = e^{\ell - \ell_{old}}

    Attributes:
        log_prob: The pseudo-log-probability.
        mode: ``exp_first``, a ratio per pair, or ``sum_first``, a ratio per sample.
        times: Which times of the schedule each sample is trained at.
        shared_noise: Draw times and noise once for all samples of a prompt: what their gradients
            have in common then cancels, as their advantages sum to 0.
        clip_low: Clip range of the ratio below 1; at 1.0 the clip binds only for ratios above 2.
        clip_high: Clip range above 1.
        advantage_clip: Advantages are clamped to this absolute value.
        advantage_max: They are then scaled so that the clamp is at this value.
        kl: Weight of the squared distance from the reference's velocity; with 0 the reference is
            not evaluated. 1e-3 to 3e-3 in the published runs.
        ema_weight: The same for the averaged policy; 1 in the published runs.
        updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, time) pairs per forward and backward.
    """

    log_prob: AnyPseudoLogProb = GeneralHuberLogProb()
    mode: Annotated[str, OneOf(MODES)] = "exp_first"
    times: Annotated[AnyTimes, ByKind()] = StratifiedTimes()
    shared_noise: bool = False
    clip_low: float = 1.0
    clip_high: float = 1.0
    advantage_clip: float = 5.0
    advantage_max: float = 1.0
    kl: float = 0.0
    ema_weight: float = 0.0
    updates: int = 1
    micro_batch: int = 64

    def __post_init__(self) -> None:
        """Refuse numbers outside their ranges."""
        check_counts(self.updates, self.micro_batch)
        check_name("mode", self.mode, MODES)
        check_positive("advantage_clip", self.advantage_clip)
        check_positive("advantage_max", self.advantage_max)
        for name in ("clip_low", "clip_high", "kl", "ema_weight"):
            check_not_negative(name, getattr(self, name))

    def value(self, velocity: Tensor, pairs: NoisedPairs) -> Tensor:
        """Return each pair's pseudo-log-probability, [Q]."""
        return self.log_prob(matching_error(velocity, pairs.clean, pairs.noise), pairs.sigma)


@dataclass
class AWM(ForwardMethod):
    """Policy gradient with the pretraining loss as log-probability.

    A pair's new and old log-probability share time and noise. The old policy of the ratio is the
    one that sampled, i.e. the policy when ``losses`` begins. So ratios of the first update are
    exactly 1; for later updates the old log-probabilities are computed before the first one,
    in the same micro-batches.

    With ``mode`` ``"sum_first"`` the log-ratios of a sample's T times are averaged before the
    exponential, one ratio and one clipping decision per sample, like a chunk of random times. Its
    gradient is exact in micro-batches of any shape: a pass without gradient finds the ratios
    (:func:`~chunkgrpo.core.trust.surrogate_slope`), the next one back-propagates pairs.

    Args:
        loss: The objective.
        average: The averaged policy of the last term; required if ``loss.ema_weight`` is above 0.
        by_chunk: Whether credit differs by chunk of ``loss.times``.
        by_ode: Whether rollouts follow the ODE.

    Raises:
        ValueError: If the loss has that term and there is no averaged policy.
    """

    loss: AWMLoss
    average: OldPolicy | None = None
    by_chunk: bool = False
    by_ode: bool = False
    method: ClassVar[str] = "awm"

    def __post_init__(self) -> None:
        if self.loss.ema_weight > 0 and self.average is None:
            raise ValueError(
                f"ema_weight is {self.loss.ema_weight}, but there is no averaged policy; "
                "pass one, or set the weight to 0"
            )

    @property
    def second(self) -> OldPolicy | None:
        """The policy that follows."""
        return self.average

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield pieces of ``updates`` losses; see :class:`~.protocol.Algorithm`."""
        trajectory, loss = experience.trajectory, self.loss
        deal = Deal.draw(loss, experience, generator)
        old_BT = self.log_probs(policy, trajectory, deal, list(chain(*deal.updates[1:])))
        for update in range(loss.updates):
            yield from self.update(policy, experience, deal, update, old_BT)

    def update(
        self, policy: Policy, experience: Experience, deal: Deal, update: int, old_BT: Tensor
    ) -> Iterator[LossPart]:
        """Yield the pieces of one optimizer step."""
        loss, trajectory, batches = self.loss, experience.trajectory, deal.updates[update]
        advantages_BT = scaled_advantages(
            advantages_by_slot(experience, loss.times, deal.times.shape[1]),
            loss.advantage_clip,
            loss.advantage_max,
        )
        # Only an updated policy can have ratios other than 1.
        has_moved, mean_B = update > 0, None
        if loss.mode == "sum_first":
            new_BT = self.log_probs(policy, trajectory, deal, batches) if has_moved else old_BT
            mean_B = (new_BT - old_BT).mean(1)
        for index, slots in enumerate(batches):
            pairs = deal.pairs(trajectory, slots)
            anchors = self.anchors(policy, pairs)
            v = pairs.velocity(policy)
            log_prob = loss.value(v, pairs)
            old = old_BT[pairs.sample, pairs.slot] if has_moved else log_prob.detach()
            mean = None if mean_B is None else mean_B[pairs.sample]
            each, cut = self.surrogate(log_prob, old, advantages_BT[pairs.sample, pairs.slot], mean)
            diagnostics = {
                "sample": pairs.sample,
                "step": pairs.step,
                "log_ratio": (log_prob - old).detach(),
                "cut": cut,
            }
            for name, (weight, other) in anchors.items():
                gap = velocity_distance(v, other)
                each = each + weight * gap
                diagnostics[name] = gap.detach()
            ends = index == len(batches) - 1
            yield LossPart(each.sum() / num_pairs(batches), ends, diagnostics)

    def anchors(self, policy: Policy, pairs: NoisedPairs) -> dict[str, tuple[float, Tensor]]:
        """Return the velocities that the loss pulls towards, each with its weight."""
        found: dict[str, tuple[float, Tensor]] = {}
        if self.loss.kl > 0:
            v_ref = pairs.velocity_within(policy, policy.reference())
            found["reference_gap"] = self.loss.kl, v_ref
        if self.loss.ema_weight > 0 and self.average is not None:
            applied = self.average.applied(policy.parameters())
            found["ema_gap"] = self.loss.ema_weight, pairs.velocity_within(policy, applied)
        return found

    def surrogate(
        self, log_prob: Tensor, old: Tensor, advantages: Tensor, mean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return each pair's loss and whether its gradient is cut, [Q] each.

        Args:
            log_prob: Pseudo-log-probability of the current policy, with gradient.
            old: That of the old policy.
            advantages: Scaled, one per pair.
            mean: Log-ratio of each pair's sample, where a sample has one ratio; else None.
        """
        clip = (self.loss.clip_low, self.loss.clip_high)
        if mean is None:
            ratio = log_prob - old
            each = clipped_surrogate(ratio, advantages, *clip)
            return each, gradient_is_cut(ratio.detach(), advantages, *clip)
        # Each pair carries its share of the sample's loss and of its gradient.
        slope = surrogate_slope(mean, advantages, *clip)
        each = clipped_surrogate(mean, advantages, *clip) + slope * (log_prob - log_prob.detach())
        return each, gradient_is_cut(mean, advantages, *clip)

    @torch.no_grad()
    def log_probs(
        self, policy: Policy, trajectory: Trajectory, deal: Deal, batches: Sequence[Pairs]
    ) -> Tensor:
        """Return the current policy's pseudo-log-probabilities at some pairs, [B, T], else 0."""
        filled_BT = torch.zeros(deal.times.shape, device=trajectory.final.device)
        for slots in batches:
            pairs = deal.pairs(trajectory, slots)
            log_prob = self.loss.value(pairs.velocity(policy), pairs)
            filled_BT = filled_BT.to(log_prob.dtype)
            filled_BT[pairs.sample, pairs.slot] = log_prob
        return filled_BT
