# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT (arXiv:2509.16117): contrast a velocity with the old policy's, on noised images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from chunkgrpo.algorithms.noised_pairs import (
    Deal,
    NoisedPairs,
    check_not_negative,
    check_positive,
    check_sample_advantages,
    num_pairs,
)
from chunkgrpo.algorithms.pairs import check_counts
from chunkgrpo.core.forward_process import velocity_distance
from chunkgrpo.core.nft import nft_pair_loss, optimality, shuffled_times
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.types import Experience, LossPart, SamplingRequest


@dataclass(frozen=True)
class NFTLoss:
    r"""The contrastive objective on the forward process.

    .. math:: L = \frac1Q \sum_{\text{pairs}} \left[ c\,L_{NFT}(v, v_{old}, x_0; r)
              + \beta_{kl} \frac{\|v - v_{ref}\|^2}{D} \right], \qquad
              r = \mathrm{clip}\!\left(\frac{A}{2c} + \frac12, 0, 1\right)

    with the pair's loss of :func:`~chunkgrpo.core.nft.nft_pair_loss`.

    Attributes:
        beta: b > 0 of the pair's loss: how far the two velocities stand from the old one.
        advantage_clip: c > 0, the advantage from which a sample counts as wholly good.
        fraction: Trained share of the schedule's times, in (0, 1].
        kl: Weight of the squared distance from the reference's velocity; 0 turns it off, and the
            reference is then not evaluated.
        updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, time) pairs per forward and backward.
    """

    beta: float = 1.0
    advantage_clip: float = 5.0
    fraction: float = 0.99
    kl: float = 1e-4
    updates: int = 1
    micro_batch: int = 64

    def __post_init__(self) -> None:
        """Refuse numbers outside their ranges."""
        check_counts(self.updates, self.micro_batch)
        check_positive("beta", self.beta)
        check_positive("advantage_clip", self.advantage_clip)
        check_not_negative("kl", self.kl)
        shuffled_times(1, self.fraction, 1, Generator())


@dataclass
class DiffusionNFT:
    """Pull towards what good samples show and away from bad ones, relative to the old policy.

    ``old`` is the policy that samples, and its velocity anchors the loss. Without it, the old
    policy is the one found when ``losses`` starts, i.e. that of an ordinary rollout; later updates
    keep a copy of it.

    Args:
        loss: The objective.
        old: The sampling policy, or None for the current one.
    """

    loss: NFTLoss
    old: OldPolicy | None = None

    @property
    def updates(self) -> int:
        """Optimizer steps a rollout."""
        return self.loss.updates

    def begin(self, iteration: int, generator: Generator) -> SamplingRequest:
        """Only the clean latents are needed."""
        return SamplingRequest()

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        """The old policy samples."""
        return nullcontext() if self.old is None else self.old.applied(policy.parameters())

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield pieces of ``updates`` losses; see :class:`~.protocol.Algorithm`."""
        check_sample_advantages(experience)
        trajectory, loss = experience.trajectory, self.loss
        num_steps = len(trajectory.sigmas) - 1
        times_BT = shuffled_times(num_steps, loss.fraction, trajectory.num_samples, generator)
        deal = Deal.draw(times_BT, experience, loss.updates, loss.micro_batch, generator)
        optimality_B = optimality(experience.advantages, loss.advantage_clip)
        old = self.old
        if old is None and loss.updates > 1:
            old = OldPolicy(policy.named_parameters())
        for update, batches in enumerate(deal.updates):
            # A policy that has not moved is its own old one: no need to ask it twice.
            anchor = None if self.old is None and update == 0 else old
            for index, slots in enumerate(batches):
                pairs = deal.pairs(trajectory, slots)
                total, diagnostics = self.pair_loss(policy, pairs, optimality_B, anchor)
                ends = index == len(batches) - 1
                yield LossPart(total / num_pairs(batches), ends, diagnostics)

    def pair_loss(
        self, policy: Policy, pairs: NoisedPairs, optimality_B: Tensor, old: OldPolicy | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of some pairs; the policy is its own anchor where old is None."""
        loss, v_old, v_ref = self.loss, None, None
        if old is not None:
            v_old = pairs.velocity_within(policy, old.applied(policy.parameters()))
        if loss.kl > 0:
            v_ref = pairs.velocity_within(policy, policy.reference())
        v = pairs.velocity(policy)
        v_old = v.detach() if v_old is None else v_old
        good = optimality_B[pairs.sample]
        each = loss.advantage_clip * nft_pair_loss(
            v, v_old, pairs.clean, pairs.noised, pairs.sigma, good, loss.beta
        )
        diagnostics = {
            "sample": pairs.sample,
            "step": pairs.step,
            "old_gap": velocity_distance(v.detach(), v_old),
        }
        if v_ref is not None:
            gap = velocity_distance(v, v_ref)
            each = each + loss.kl * gap
            diagnostics["reference_gap"] = gap.detach()
        return each.sum(), diagnostics

    def finish(self, policy: Policy, num_updates: int) -> Mapping[str, Any]:
        """Let the old policy follow."""
        if self.old is not None:
            self.old.update(policy.parameters(), num_updates)
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the old policy's weights."""
        return ({} if self.old is None else self.old.state()), {}

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        if self.old is not None:
            self.old.load(tensors)
