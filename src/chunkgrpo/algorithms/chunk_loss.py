# SPDX-License-Identifier: Apache-2.0
"""The chunk-level surrogate and its exact gradient in pieces of bounded memory.

Step-level GRPO is a plan of chunks of one step, sequence-level GRPO a plan of one chunk. Methods
that differ in the form of the ratio, the trust region or the weights of steps are this loss with
other parts.

Axis names: B samples, N transitions, C chunks, M selected chunks of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import torch
from torch import Generator

from chunkgrpo.algorithms.chunk_update import Chunks, Densities, Evaluator, Scales, Update, pairs_of
from chunkgrpo.algorithms.imported import ImportedTrust
from chunkgrpo.algorithms.pairs import check_counts, deal
from chunkgrpo.core.kl import AnyKl, NoKl
from chunkgrpo.core.names import ByKind, OneOf, check_name
from chunkgrpo.core.ratios import RATIO_FORMS
from chunkgrpo.core.selection import chosen_mask
from chunkgrpo.core.step_weights import INNER_WEIGHTS, AnyOuterWeights, NoOuterWeights
from chunkgrpo.core.trust import Clip, KlMask, NoTrustRegion
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.types import Experience, LossPart

ANCHORS = ("rollout", "replay")
"""Where the old log-probabilities come from."""


@dataclass(frozen=True)
class ChunkLoss:
    r"""The chunk-level clipped surrogate.

    .. math:: L = \frac{1}{S M} \sum_{b,j\,\text{selected}} \lambda_{bj}
              \max(-A_b s_{bj}, -A_b\,\mathrm{clip}(s_{bj}, 1-\epsilon_l, 1+\epsilon_h)),
              \qquad \log s_{bj} = \frac{1}{cs_j} \sum_{i \in ch_j} a_i
              (\ell_{bi} - \ell^{old}_{bi} + b_{bi})

    with S samples per update and M selected chunks per sample. As published for Chunk-GRPO, a = 1,
    b = 0 and lambda = 1; ``ratio``, ``inner_weights``, ``outer_weights``, ``trust`` and the
    selection's own weights change them.

    A chunk's loss depends on its steps only through one number, its ratio. So a pass without
    gradient finds the ratios, and (sample, step) pairs are then back-propagated with one scalar
    coefficient each, in equal micro-batches of any size: memory does not depend on the length of
    chunks. The pass is not needed for the first update, whose ratios are 1, nor for chunks of one
    step, whose ratio is known in the forward that is back-propagated.

    Attributes:
        trust: Trust region of the ratio.
        ratio: Form of the ratio, see :func:`~chunkgrpo.core.ratios.ratio_scale`.
        inner_weights: Weights of the steps inside a chunk's ratio.
        outer_weights: Weights of the losses of steps; a chunk has the mean over its steps.
        anchor: ``rollout`` uses the log-probabilities stored by the rollout; ``replay`` recomputes
            them in the micro-batches of training, so that ratios start at exactly 1 in any
            precision, at the cost of one more forward per pair.
        kl: KL(new || reference) per dimension, averaged over pairs.
        old_kl: Weight of the k3 estimate of the KL to the old policy, per chunk.
        consistency: Weight of the temporal consistency of neighbouring chunks
            (:func:`~chunkgrpo.core.consistency.consistency`), averaged over samples and
            neighbours. It and its gradient are zero before the first update.
        updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, step) pairs per forward and backward.
    """

    trust: Annotated[Clip | KlMask | NoTrustRegion | ImportedTrust, ByKind()] = Clip()
    ratio: Annotated[str, OneOf(RATIO_FORMS)] = "per_dimension"
    inner_weights: Annotated[str, OneOf(INNER_WEIGHTS)] = "none"
    outer_weights: AnyOuterWeights = NoOuterWeights()
    anchor: Annotated[str, OneOf(ANCHORS)] = "rollout"
    kl: AnyKl = NoKl()
    old_kl: float = 0.0
    consistency: float = 0.0
    updates: int = 2
    micro_batch: int = 64

    def __post_init__(self) -> None:
        """Refuse unknown names and numbers outside their ranges."""
        check_counts(self.updates, self.micro_batch)
        check_name("anchor", self.anchor, ANCHORS)
        check_name("ratio form", self.ratio, RATIO_FORMS)
        check_name("inner weighting", self.inner_weights, INNER_WEIGHTS)
        for name in ("old_kl", "consistency"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(
                    f"{name} is {value}; a weight must not be negative; 0 turns it off"
                )
            if value > 0 and self.updates < 2:
                raise ValueError(
                    f"{name} compares with the policy that sampled, from which the first update of "
                    f"a rollout does not differ, and updates is {self.updates}; set updates to 2 "
                    f"or more, or {name} to 0"
                )

    @property
    def needs_divergence(self) -> bool:
        """Whether the mean of each step is compared with the old policy's."""
        return self.ratio == "guard" or self.trust.needs_divergence

    @property
    def needs_velocities(self) -> bool:
        """Whether the rollout must store the old policy's velocities."""
        return self.needs_divergence or self.consistency > 0

    def parts(
        self,
        policy: Policy,
        experience: Experience,
        chunks: Chunks,
        generator: Generator,
    ) -> Iterator[LossPart]:
        """Yield the pieces of ``updates`` losses; see :class:`~.protocol.Algorithm`.

        Raises:
            ValueError: If the plan does not cover the window's steps, there are fewer samples than
                updates, or the loss needs velocities that the rollout has not stored.
        """
        trajectory = experience.trajectory
        plan = chunks.plan.validate_for(trajectory.num_trained)
        self.outer_weights.check(plan)
        if self.needs_velocities and trajectory.velocities is None:
            raise ValueError(
                "this objective compares the policy's predictions with those of the old policy, "
                "and the rollout stored none; sample with keep_velocities=True"
            )
        # Everything that decides which pairs are trained stays on the CPU, with the generator.
        curve_BN = trajectory.dynamics.cpu()
        chosen_BM = chunks.selection(plan, curve_BN, generator)
        mask_BC = chosen_mask(chosen_BM, plan.num_chunks)
        weight_BC = chunks.selection.loss_weights(plan, curve_BN, chosen_BM)
        shares = deal(experience, self.updates, generator)
        pairs = [pairs_of(share, mask_BC, plan, generator) for share in shares]
        evaluator = Evaluator(self, policy, trajectory, chunks)
        batches = [evaluator.cut(each) for each in pairs]
        zeros_BN = torch.zeros_like(trajectory.old_log_prob)
        old = Densities(trajectory.old_log_prob, zeros_BN)
        if self.anchor == "replay":
            old = Densities(evaluator.measured(list(chain(*batches)), old).log_prob, zeros_BN)
        scales = Scales.of(self, trajectory, chunks)
        for update, (share, batch) in enumerate(zip(shares, batches, strict=True)):
            step = Update(
                self,
                evaluator,
                experience,
                share,
                mask_BC,
                weight_BC,
                scales,
                old,
                moved=update > 0,
            )
            yield from step.parts(batch)
