# SPDX-License-Identifier: Apache-2.0
"""Chunk-GRPO (arXiv:2510.21583): one clipped importance ratio per chunk of steps.

Step-level GRPO is a plan of chunks of one and sequence-level GRPO a plan of one chunk; neither is
code of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Generator, Tensor

from chunkgrpo.core.chunks import ChunkPlan, Selection, UniformSelection, chosen_mask
from chunkgrpo.core.objectives import (
    chunk_log_ratio,
    clipped_surrogate,
    gradient_is_cut,
    step_coefficients,
    surrogate_slope,
)
from chunkgrpo.core.sde import Gaussian, Transition
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.types import Experience, LossPart, Trajectory

# Axis names: B samples, N transitions, C chunks, S samples of one update, Q (sample, step) pairs.

ANCHORS = ("rollout", "replay")


@dataclass(frozen=True)
class ChunkGRPO:
    r"""The chunk-level clipped surrogate with its exact, memory-bounded gradient.

    .. math:: L = \frac{1}{S M} \sum_{b,j\,\text{chosen}}
              \max(-A_b s_{bj}, -A_b\,\mathrm{clip}(s_{bj}, 1-\epsilon_l, 1+\epsilon_h))

    with S samples per update, M chosen chunks per sample, and :math:`s_{bj}` the chunk's ratio
    (:func:`~chunkgrpo.core.objectives.chunk_log_ratio`). A pass without gradient finds the ratios
    (none is needed while the policy is still the one the anchor was computed with); the second
    back-propagates (sample, step) pairs in equal micro-batches of any size, so memory does not
    depend on how long chunks are.

    Args:
        plan: How the trained steps form chunks.
        transition: The one the rollout used.
        selection: Which chunks of a sample are trained.
        clip_low, clip_high: Clip range of the ratio, below and above 1.
        num_updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, step) pairs per forward and backward.
        anchor: ``"rollout"`` uses the log-densities the rollout computed; ``"replay"`` recomputes
            them in the very micro-batches that will be trained, so that ratios start at exactly 1
            in any precision, for one more forward a pair.
        kl_coefficient: Weight of KL(new || reference), per dimension, averaged over trained pairs.
    """

    plan: ChunkPlan
    transition: Transition
    selection: Selection = field(default_factory=UniformSelection)
    clip_low: float = 5e-5
    clip_high: float = 5e-5
    num_updates: int = 2
    micro_batch: int = 64
    anchor: str = "rollout"
    kl_coefficient: float = 0.0

    needs_trajectory = True

    def __post_init__(self) -> None:
        if not self.transition.has_density:
            raise ValueError(
                "Chunk-GRPO needs a density of each trained step, and an ODE step (eta 0) has "
                "none; use a flow or dance diffusion with eta > 0"
            )
        if self.anchor not in ANCHORS:
            raise ValueError(f"unknown anchor {self.anchor!r}; known: {', '.join(ANCHORS)}")
        if self.num_updates < 1 or self.micro_batch < 1:
            raise ValueError(
                f"num_updates and micro_batch must be at least 1, got {self.num_updates} and "
                f"{self.micro_batch}"
            )

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield pieces of ``num_updates`` losses; see :class:`~.protocol.Algorithm`."""
        trajectory = experience.trajectory
        plan = self.plan.validate_for(trajectory.num_trained)
        num_samples = trajectory.num_samples
        if self.num_updates > num_samples:
            raise ValueError(
                f"{self.num_updates} updates need as many samples, the rollout has {num_samples}"
            )
        # Everything that decides which pairs are trained stays on the CPU, with the generator.
        chosen_BM = self.selection(plan, trajectory.dynamics.cpu(), generator)
        mask_BC = chosen_mask(chosen_BM, plan.num_chunks)
        order = torch.randperm(num_samples, generator=generator)
        shares = order.chunk(self.num_updates)
        batches = [self._pairs(share, mask_BC, plan, generator) for share in shares]
        old_BN = trajectory.old_log_prob
        if self.anchor == "replay":
            old_BN = self._log_probs(policy, trajectory, list(chain(*batches)))
        for update, (share, batch) in enumerate(zip(shares, batches, strict=True)):
            # Only the moved policy can have ratios other than 1.
            new_BN = self._log_probs(policy, trajectory, batch, old_BN) if update else old_BN
            yield from self._update(policy, experience, plan, share, batch, mask_BC, old_BN, new_BN)

    def _update(
        self,
        policy: Policy,
        experience: Experience,
        plan: ChunkPlan,
        share_S: Tensor,
        batch: list[tuple[Tensor, Tensor]],
        mask_BC: Tensor,
        old_BN: Tensor,
        new_BN: Tensor,
    ) -> Iterator[LossPart]:
        """Yield the pieces of one optimizer step, ratios already known in ``new_BN``."""
        trajectory, advantages = experience.trajectory, experience.advantages
        clip = (self.clip_low, self.clip_high)
        mask = mask_BC.to(old_BN.device)
        log_ratio_BC = chunk_log_ratio(new_BN, old_BN, plan)
        denominator = int(mask_BC[share_S].sum())
        slope_BC = surrogate_slope(log_ratio_BC, advantages, *clip)
        coefficient_BN = step_coefficients(mask, slope_BC, plan, denominator)
        # Each step carries its part of the chunk's loss, so that the pieces sum to the loss.
        value_BC = clipped_surrogate(log_ratio_BC, advantages, *clip)
        value_BN = step_coefficients(mask, value_BC, plan, denominator)
        cut_BC = gradient_is_cut(log_ratio_BC, _per_chunk(advantages, plan), *clip)
        num_pairs = sum(len(pairs[0]) for pairs in batch)
        # Chunks that are cut and groups of equal rewards pull nowhere: no need to go there.
        idle = None
        if self.kl_coefficient == 0:
            batch, idle = self._without_idle(batch, coefficient_BN)
        for index, pairs in enumerate(batch):
            log_prob, step = self._log_prob(policy, trajectory, pairs)
            weight = coefficient_BN[pairs]
            loss = (weight * (log_prob - log_prob.detach())).sum() + value_BN[pairs].sum()
            diagnostics = {
                "sample": pairs[0],
                "step": pairs[1],
                "log_ratio": log_prob.detach() - old_BN[pairs],
            }
            if self.kl_coefficient > 0:
                with torch.no_grad(), policy.reference():
                    reference = self._transition(policy, trajectory, pairs)
                kl = step.kl_per_dim(reference)
                loss = loss + self.kl_coefficient * kl.sum() / num_pairs
                diagnostics["reference_kl"] = kl.detach()
            ends = idle is None and index == len(batch) - 1
            if ends:
                diagnostics |= _chunk_diagnostics(share_S, mask_BC, log_ratio_BC, cut_BC)
            yield LossPart(loss, ends, diagnostics)
        if idle is not None:
            nothing = 0.0 * policy.parameters()[0].float().sum()
            diagnostics = {
                "sample": idle[0],
                "step": idle[1],
                "log_ratio": new_BN[idle] - old_BN[idle],
                "idle": torch.ones(len(idle[0])),
            }
            diagnostics |= _chunk_diagnostics(share_S, mask_BC, log_ratio_BC, cut_BC)
            yield LossPart(nothing + value_BN[idle].sum(), True, diagnostics)

    def _without_idle(
        self, batch: list[tuple[Tensor, Tensor]], coefficient_BN: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor] | None]:
        """Take out the pairs whose coefficient is 0; return the others in equal micro-batches."""
        sample = torch.cat([pairs[0] for pairs in batch])
        step = torch.cat([pairs[1] for pairs in batch])
        alive = (coefficient_BN[sample, step] != 0).cpu()
        if alive.all():
            return batch, None
        left, at = sample[alive], step[alive]
        num_batches = -(-len(at) // self.micro_batch)
        parts = (
            list(zip(left.tensor_split(num_batches), at.tensor_split(num_batches), strict=True))
            if num_batches
            else []
        )
        return parts, (sample[~alive], step[~alive])

    def _pairs(
        self, share_S: Tensor, mask_BC: Tensor, plan: ChunkPlan, generator: Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """List the (sample, step) pairs of one update, in equal micro-batches."""
        row, step = mask_BC[share_S][:, plan.chunk_of_step].nonzero(as_tuple=True)
        sample = share_S[row]
        num_batches = -(-len(step) // self.micro_batch)
        # Shuffled, so that every micro-batch holds all noise levels and all are alike in size.
        order = torch.randperm(len(step), generator=generator)
        return [(sample[part], step[part]) for part in order.tensor_split(num_batches)]

    @torch.no_grad()
    def _log_probs(
        self,
        policy: Policy,
        trajectory: Trajectory,
        batch: list[tuple[Tensor, Tensor]],
        elsewhere_BN: Tensor | None = None,
    ) -> Tensor:
        """Return the present policy's log-probabilities of some pairs, [B, N]."""
        filled_BN = (trajectory.old_log_prob if elsewhere_BN is None else elsewhere_BN).clone()
        for pairs in batch:
            filled_BN[pairs] = self._log_prob(policy, trajectory, pairs)[0]
        return filled_BN

    def _transition(
        self, policy: Policy, trajectory: Trajectory, pairs: tuple[Tensor, Tensor]
    ) -> Gaussian:
        """Return the current policy's transition of each pair."""
        sample, step = pairs
        x = trajectory.states[sample, step]
        sigma, sigma_next = trajectory.sigmas[step], trajectory.sigmas[step + 1]
        v = policy.velocity(x, sigma, trajectory.conditioning[sample])
        return self.transition(x, v, sigma, sigma_next)

    def _log_prob(
        self, policy: Policy, trajectory: Trajectory, pairs: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Gaussian]:
        """Return each pair's log-probability per dimension and its transition."""
        step = self._transition(policy, trajectory, pairs)
        value = trajectory.states[pairs[0], pairs[1] + 1]
        return step.log_prob_per_dim(value).float(), step


def _chunk_diagnostics(
    share_S: Tensor, mask_BC: Tensor, log_ratio_BC: Tensor, cut_BC: Tensor
) -> dict[str, Tensor]:
    """Return the log-ratio of each trained chunk of an update, and whether it is cut."""
    row, chunk = mask_BC[share_S].nonzero(as_tuple=True)
    where = (share_S[row].to(log_ratio_BC.device), chunk.to(log_ratio_BC.device))
    return {"chunk_log_ratio": log_ratio_BC[where], "cut": cut_BC[where], "chunk": chunk}


def _per_chunk(advantages: Tensor, plan: ChunkPlan) -> Tensor:
    """[B] -> [B, C]; [B, C] stays."""
    if advantages.ndim == 1:
        return advantages[:, None].expand(-1, plan.num_chunks)
    return advantages
