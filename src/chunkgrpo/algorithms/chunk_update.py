# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of the chunk loss, piece by piece.

Axis names: B samples, N transitions, C chunks, S samples of one update, Q (sample, step) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from chunkgrpo.algorithms.pairs import MicroBatch, Pairs, split_pairs, split_rows
from chunkgrpo.core.consistency import consistency
from chunkgrpo.core.kl import k3_kl, k3_slope
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.core.ratios import ratio_scale, step_coefficients, transition_scale
from chunkgrpo.core.sde import Gaussian, Kernel
from chunkgrpo.core.selection import Selection
from chunkgrpo.core.step_weights import INNER_WEIGHTS
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.transfer import send
from chunkgrpo.types import Experience, LossPart, Trajectory

if TYPE_CHECKING:
    from chunkgrpo.algorithms.chunk_loss import ChunkLoss


@dataclass(frozen=True)
class Chunks:
    """What an iteration trains on, and how its steps are sampled.

    Attributes:
        plan: The chunks within the window.
        selection: Which of them are trained on, sample by sample.
        transition: The one the rollout used.
        apart: Let every micro-batch hold steps of one chunk only, so that gradients can be
            measured by chunk.
    """

    plan: ChunkPlan
    selection: Selection
    transition: Kernel
    apart: bool = False


def joined(batch: list[MicroBatch]) -> Pairs:
    """Return the pairs of some micro-batches, on the host."""
    sample, step = (torch.cat(column) for column in zip(*(part.planned for part in batch)))
    return sample, step


def pairs_of(share_S: Tensor, mask_BC: Tensor, plan: ChunkPlan, generator: Generator) -> Pairs:
    """List the (sample, step) pairs of one update."""
    row, step = mask_BC[share_S][:, plan.chunk_of_step].nonzero(as_tuple=True)
    # Shuffled, so that every micro-batch holds all noise levels.
    order = torch.randperm(len(step), generator=generator)
    return share_S[row][order], step[order]


@dataclass(frozen=True)
class Densities:
    """Log-probabilities per dimension, and divergences from the old policy, [B, N] each."""

    log_prob: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class Scales:
    """Factors per step or chunk that are known before training.

    Attributes:
        inner_N: a, the factor of a step's log-ratio inside its chunk.
        outer_C: lambda, the factor of a chunk's loss.
        kl_N: Factor of a step's KL to the reference.
        single_N: Whether a step is a chunk by itself, bool.
    """

    inner_N: Tensor
    outer_C: Tensor
    kl_N: Tensor
    single_N: Tensor

    @staticmethod
    def of(loss: ChunkLoss, trajectory: Trajectory, chunks: Chunks) -> Scales:
        """Compute the factors for a trajectory's schedule."""
        # Over all trainable steps, also with a window: weights have mean 1 over the schedule, or
        # those of a window of one step would always be 1.
        sigmas, kernel = trajectory.sigmas[:-1], chunks.transition
        window = slice(trajectory.offset, trajectory.offset + trajectory.num_trained)
        dt_N = sigmas[:-1] - sigmas[1:]
        std_N = kernel.std(sigmas[:-1], sigmas[1:])
        inner_N = ratio_scale(loss.ratio, std_N, trajectory.final[0].numel())
        inner_N = inner_N * INNER_WEIGHTS[loss.inner_weights](transition_scale(kernel, sigmas))
        outer_N = loss.outer_weights(std_N, dt_N, window, chunks.plan)
        outer_C = chunks.plan.reduce(outer_N[None])[0]
        single_N = torch.tensor(chunks.plan.sizes)[chunks.plan.chunk_of_step] == 1
        kl_N = loss.kl.scale(dt_N)[window]
        return Scales(inner_N[window], outer_C, kl_N, send(single_N, trajectory.device))


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the current policy at the pairs of one rollout."""

    loss: ChunkLoss
    policy: Policy
    trajectory: Trajectory
    chunks: Chunks

    def cut(self, pairs: Pairs) -> list[MicroBatch]:
        """Cut pairs into the fewest equal micro-batches."""
        size = self.loss.micro_batch
        if not self.chunks.apart:
            parts = split_rows(pairs, size, self.trajectory)
        else:
            sample, step = pairs
            chunk, every = self.chunks.plan.chunk_of_step[step], range(self.chunks.plan.num_chunks)
            masks = [chunk == c for c in every]
            parts = [part for m in masks for part in split_pairs((sample[m], step[m]), size)]
        return MicroBatch.place(parts, self.trajectory)

    def transition(self, part: MicroBatch) -> Gaussian:
        """Return the policy's transition of each pair."""
        trajectory, (sample, step) = self.trajectory, part.pairs
        x, sigmas = part.state(trajectory), trajectory.trained_sigmas
        if part.alike is None:
            texts = trajectory.conditioning_of(sample)
            v = self.policy.velocity(x, sigmas[step], texts)
        else:
            first, row = part.alike
            sigma, texts = sigmas[0].expand(len(first)), trajectory.conditioning_of(sample[first])
            v = self.policy.velocity(x[first], sigma, texts)[row]
        return self.chunks.transition(x, v, sigmas[step], sigmas[step + 1])

    def log_prob(self, part: MicroBatch, step: Gaussian) -> Tensor:
        """Return each pair's log-probability per dimension, [Q]."""
        return step.log_prob_per_dim(part.state(self.trajectory, ahead=1)).float()

    def divergence(self, part: MicroBatch, step: Gaussian) -> Tensor:
        """Return each pair's KL(new || old) per dimension, [Q]."""
        trajectory, where = self.trajectory, part.pairs[1]
        sigmas = trajectory.trained_sigmas
        before = self.chunks.transition(
            part.state(trajectory), part.velocity(trajectory), sigmas[where], sigmas[where + 1]
        )
        return step.kl_per_dim(before).float()

    @torch.no_grad()
    def measured(self, batch: list[MicroBatch], start: Densities) -> Densities:
        """Return the current policy's densities at some pairs, and ``start`` elsewhere."""
        filled = Densities(start.log_prob.clone(), start.divergence.clone())
        for part in batch:
            step = self.transition(part)
            filled.log_prob[part.pairs] = self.log_prob(part, step)
            if self.loss.needs_divergence:
                filled.divergence[part.pairs] = self.divergence(part, step)
        return filled


@dataclass(frozen=True)
class Tables:
    """The loss and its coefficients, for all pairs at once.

    Attributes:
        value_BN, slope_BN: A step's share of the loss, and the coefficient of its log-probability
            in the gradient.
        log_ratio_BC, cut_BC: Log-ratio of each chunk, and whether its gradient is cut.
    """

    value_BN: Tensor
    slope_BN: Tensor
    log_ratio_BC: Tensor
    cut_BC: Tensor


@dataclass(frozen=True)
class Update:
    """The pieces of one optimizer step."""

    loss: ChunkLoss
    evaluator: Evaluator
    experience: Experience
    share_S: Tensor
    mask_BC: Tensor
    weight_BC: Tensor
    scales: Scales
    old: Densities
    moved: bool

    @property
    def plan(self) -> ChunkPlan:
        return self.evaluator.chunks.plan

    # Sent once an update: tables are worked out anew for every micro-batch of single steps.
    @cached_property
    def sent_mask_BC(self) -> Tensor:
        return send(self.mask_BC, self.evaluator.trajectory.device)

    @cached_property
    def sent_weight_BC(self) -> Tensor:
        return send(self.weight_BC, self.evaluator.trajectory.device) * self.scales.outer_C

    def parts(self, batch: list[MicroBatch]) -> Iterator[LossPart]:
        """Yield the pieces; only an updated policy can have ratios other than 1."""
        loss, number = self.loss, sum(len(part) for part in batch)
        # The ratio of a longer chunk must be known before its first step is back-propagated.
        longer = self.by_size(batch, single=False) if self.moved else []
        new = self.evaluator.measured(longer, self.old)
        tables, idle = self.tables(new), None
        if not loss.kl.weight:  # with a KL term every pair has a gradient
            batch, idle = self.without_idle(batch, tables)
        if self.moved and idle is not None:  # ratios are reported of all pairs
            quiet = self.by_size(self.evaluator.cut(idle.planned), single=True)
            new = self.evaluator.measured(quiet, new)
        neighbours = self.neighbours() if loss.consistency > 0 and self.moved else []
        total = len(batch) + len(neighbours) + (idle is not None)
        for index in range(total):
            if index < len(batch):
                value, diagnostics = self.pair_part(batch[index], new, tables, number)
            elif index < len(batch) + len(neighbours):
                value, diagnostics = self.neighbour_part(neighbours[index - len(batch)])
            else:
                assert idle is not None
                value, diagnostics = self.idle_part(idle, new, tables)
            ends = index == total - 1
            last = self.chunk_diagnostics(self.tables(new)) if ends else {}
            yield LossPart(value, ends, diagnostics | last)

    def by_size(self, batch: list[MicroBatch], single: bool) -> list[MicroBatch]:
        """Return the pairs whose step is a chunk by itself, or the others."""
        sizes_N = torch.tensor(self.plan.sizes)[self.plan.chunk_of_step]
        sample, step = joined(batch)
        wanted = (sizes_N[step] == 1) == single
        return batch if wanted.all() else self.evaluator.cut((sample[wanted], step[wanted]))

    def tables(self, new: Densities) -> Tables:
        """Compute the loss of every chunk from the densities of its steps."""
        loss, plan, scales = self.loss, self.plan, self.scales
        advantages = self.experience.advantages
        bias_BN = new.divergence if loss.ratio == "guard" else 0.0
        ratio_BN = scales.inner_N * (new.log_prob - self.old.log_prob + bias_BN)
        log_ratio_BC, divergence_BC = plan.reduce(ratio_BN), plan.reduce(new.divergence)
        mask_BC, weight_BC = self.sent_mask_BC, self.sent_weight_BC.to(ratio_BN.dtype)
        value_BC = loss.trust.value(log_ratio_BC, advantages, divergence_BC)
        slope_BC = loss.trust.slope(log_ratio_BC, advantages, divergence_BC)
        if loss.old_kl:
            value_BC = value_BC + loss.old_kl * k3_kl(log_ratio_BC)
            slope_BC = slope_BC + loss.old_kl * k3_slope(log_ratio_BC)
        denominator = int(self.mask_BC[self.share_S].sum())
        # Each step has its part of the chunk's loss, so that the pieces sum to the loss.
        value_BN = step_coefficients(mask_BC, weight_BC * value_BC, plan, denominator)
        slope_BN = step_coefficients(mask_BC, weight_BC * slope_BC, plan, denominator)
        cut_BC = loss.trust.is_cut(log_ratio_BC, advantages, divergence_BC)
        return Tables(value_BN, slope_BN * scales.inner_N, log_ratio_BC, cut_BC)

    def pair_part(
        self, part: MicroBatch, new: Densities, tables: Tables, number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the piece of a micro-batch, and write densities of single steps to ``new``."""
        loss, evaluator, pairs = self.loss, self.evaluator, part.pairs
        step = evaluator.transition(part)
        log_prob = moving = evaluator.log_prob(part, step)
        found = Densities(log_prob.detach(), new.divergence[pairs])
        if loss.needs_divergence:
            divergence = evaluator.divergence(part, step)
            found = Densities(log_prob.detach(), divergence.detach())
            moving = moving + divergence if loss.ratio == "guard" else moving
        if self.moved and 1 in self.plan.sizes:
            single = self.scales.single_N[pairs[1]]
            for table_BN, found_Q in (
                (new.log_prob, found.log_prob),
                (new.divergence, found.divergence),
            ):
                table_BN[pairs] = torch.where(single, found_Q, table_BN[pairs])
            tables = self.tables(new)
        slope_Q, value_Q = tables.slope_BN[pairs], tables.value_BN[pairs]
        total = (slope_Q * (moving - moving.detach())).sum() + value_Q.sum()
        diagnostics = {
            "sample": part.planned[0],
            "step": part.planned[1],
            "log_ratio": found.log_prob - self.old.log_prob[pairs],
        }
        if not loss.kl.weight:
            return total, diagnostics | {"idle": slope_Q == 0}
        with torch.no_grad(), evaluator.policy.reference():
            reference = evaluator.transition(part)
        kl = step.kl_per_dim(reference)
        total = total + loss.kl.weight * (kl * self.scales.kl_N[pairs[1]]).sum() / number
        return total, diagnostics | {"reference_kl": kl.detach()}

    def idle_part(
        self, idle: MicroBatch, new: Densities, tables: Tables
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the piece of idle pairs: their value, without a forward."""
        nothing = 0.0 * self.evaluator.policy.parameters()[0].float().sum()
        diagnostics = {
            "sample": idle.planned[0],
            "step": idle.planned[1],
            "log_ratio": new.log_prob[idle.pairs] - self.old.log_prob[idle.pairs],
            "skipped": torch.ones(len(idle)),
        }
        return nothing + tables.value_BN[idle.pairs].sum(), diagnostics

    def neighbours(self) -> list[MicroBatch]:
        """List the pairs of neighbouring chunks' first steps, the earlier ones first."""
        number = self.plan.num_chunks - 1
        sample = self.share_S.repeat_interleave(number)
        chunk = torch.arange(number).repeat(len(self.share_S))
        starts = torch.tensor(self.plan.starts)
        parts = split_pairs((sample, chunk), max(1, self.loss.micro_batch // 2))
        both = [(s.repeat(2), torch.cat([starts[c], starts[c + 1]])) for s, c in parts]
        return MicroBatch.place(both, self.evaluator.trajectory)

    def neighbour_part(self, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the piece of some neighbours' consistency."""
        trajectory = self.evaluator.trajectory
        sample, step = part.pairs
        sigma = trajectory.trained_sigmas[step]
        texts = trajectory.conditioning_of(sample)
        v = self.evaluator.policy.velocity(part.state(trajectory), sigma, texts)
        term = consistency(v, part.velocity(trajectory), sigma)
        total = len(self.share_S) * (self.plan.num_chunks - 1)
        return self.loss.consistency * term.sum() / total, {"consistency": term.detach()}

    def without_idle(
        self, batch: list[MicroBatch], tables: Tables
    ) -> tuple[list[MicroBatch], MicroBatch | None]:
        """Separate the idle pairs, and form new micro-batches of the others.

        Pairs of clipped chunks and of samples with advantage 0 have no gradient, so they need no
        forward. Whether a chunk of one step is clipped in a later update is known only after its
        forward; its gradient is then 0.
        """
        sample, step = joined(batch)
        pulls = torch.cat([tables.slope_BN[part.pairs] != 0 for part in batch]).cpu()
        if self.moved and self.loss.old_kl:
            pulls |= torch.tensor(self.plan.sizes)[self.plan.chunk_of_step[step]] == 1
        if pulls.all():
            return batch, None
        alive = self.evaluator.cut((sample[pulls], step[pulls]))
        [idle] = MicroBatch.place([(sample[~pulls], step[~pulls])], self.evaluator.trajectory)
        return alive, idle

    def chunk_diagnostics(self, tables: Tables) -> dict[str, Tensor]:
        """Return the log-ratio of each selected chunk, and whether its gradient is cut."""
        row, chunk = self.mask_BC[self.share_S].nonzero(as_tuple=True)
        device = tables.cut_BC.device
        where = (self.share_S[row].to(device), chunk.to(device))
        advantages = self.experience.advantages.to(device)
        credit = advantages[where[0]] if advantages.ndim == 1 else advantages[where]
        return {
            "chunk_log_ratio": tables.log_ratio_BC[where],
            "cut": tables.cut_BC[where],
            "chunk": chunk,
            "chunk_advantage": credit,
        }
