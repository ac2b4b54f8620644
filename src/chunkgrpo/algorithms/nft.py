# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT (arXiv:2509.16117): contrast a velocity with the old policy's on noised latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, ClassVar

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
from chunkgrpo.algorithms.pairs import check_counts
from chunkgrpo.core.forward_process import velocity_distance
from chunkgrpo.core.names import ByKind
from chunkgrpo.core.nft import nft_pair_loss, optimality
from chunkgrpo.core.times import AnyTimes, ShuffledTimes
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.types import Experience, LossPart


@dataclass(frozen=True)
class NFTLoss:
    r"""The contrastive objective on the forward process.

    .. math:: L = \frac1Q \sum_{\text{pairs}} \left[ c\,L_{NFT}(v, v_{old}, x_0; r)
              + \beta_{kl} \frac{\|v - v_{ref}\|^2}{D} \right], \qquad
              r = \mathrm{clip}\!\left(\frac{A}{2c} + \frac12, 0, 1\right)

    with the pair's loss of :func:`~chunkgrpo.core.nft.nft_pair_loss`.

    Attributes:
        beta: b > 0 of the pair's loss: distance of the two mixtures from the old velocity.
        advantage_clip: c > 0, the advantage from which on a sample's optimality is 1.
        times: Which times of the schedule each sample is trained at.
        shared_noise: Draw times and noise once for all samples of a prompt: what their gradients
            have in common then cancels, as their advantages sum to 0.
        kl: Weight of the squared distance from the reference's velocity; with 0 the reference is
            not evaluated.
        updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, time) pairs per forward and backward.
    """

    beta: float = 1.0
    advantage_clip: float = 5.0
    times: Annotated[AnyTimes, ByKind()] = ShuffledTimes()
    shared_noise: bool = False
    kl: float = 1e-4
    updates: int = 1
    micro_batch: int = 64

    def __post_init__(self) -> None:
        """Refuse numbers outside their ranges."""
        check_counts(self.updates, self.micro_batch)
        check_positive("beta", self.beta)
        check_positive("advantage_clip", self.advantage_clip)
        check_not_negative("kl", self.kl)


@dataclass
class DiffusionNFT(ForwardMethod):
    """Pull towards good samples and away from bad ones, relative to the old policy.

    ``old`` is the policy that samples, and the loss contrasts with its velocity. Where None, the
    policy itself samples; a copy of it is then the old policy of the later updates.

    Args:
        loss: The objective.
        old: The old policy, which samples; None: the policy itself.
        by_chunk: Whether credit differs by chunk of ``loss.times``.
        by_ode: Whether rollouts follow the ODE.
    """

    loss: NFTLoss
    old: OldPolicy | None = None
    by_chunk: bool = False
    by_ode: bool = False
    method: ClassVar[str] = "diffusion_nft"

    @property
    def second(self) -> OldPolicy | None:
        """The policy that follows."""
        return self.old

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        """The old policy samples."""
        return nullcontext() if self.old is None else self.old.applied(policy.parameters())

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield pieces of ``updates`` losses; see :class:`~.protocol.Algorithm`."""
        trajectory, loss = experience.trajectory, self.loss
        deal = Deal.draw(loss, experience, generator)
        advantages_BT = advantages_by_slot(experience, loss.times, deal.times.shape[1])
        optimality_BT = optimality(advantages_BT, loss.advantage_clip)
        old = self.old
        if old is None and loss.updates > 1:
            old = OldPolicy(policy.named_parameters())
        for update, batches in enumerate(deal.updates):
            # Before the first update the policy is its own old one and need not be evaluated twice.
            anchor = None if self.old is None and update == 0 else old
            for index, slots in enumerate(batches):
                pairs = deal.pairs(trajectory, slots)
                total, diagnostics = self.pair_loss(policy, pairs, optimality_BT, anchor)
                ends = index == len(batches) - 1
                yield LossPart(total / num_pairs(batches), ends, diagnostics)

    def pair_loss(
        self, policy: Policy, pairs: NoisedPairs, optimality_BT: Tensor, old: OldPolicy | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of some pairs; the policy is its own anchor where old is None."""
        loss, v_old, v_ref = self.loss, None, None
        if old is not None:
            v_old = pairs.velocity_within(policy, old.applied(policy.parameters()))
        if loss.kl > 0:
            v_ref = pairs.velocity_within(policy, policy.reference())
        v = pairs.velocity(policy)
        v_old = v.detach() if v_old is None else v_old
        good = optimality_BT[pairs.sample, pairs.slot]
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
