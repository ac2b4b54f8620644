# SPDX-License-Identifier: Apache-2.0
"""Chunk-GRPO (arXiv:2510.21583): one clipped importance ratio per chunk of steps.

Step-level GRPO is a plan of chunks of one and sequence-level GRPO a plan of one chunk; neither is
code of its own. Nor are the neighbours that differ in the ratio's form, the trust region or the
weights of steps: all are this loss with other parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Generator, Tensor

from chunkgrpo.core.chunks import ChunkPlan, Selection, UniformSelection, chosen_mask
from chunkgrpo.core.credit import num_kept, strongest
from chunkgrpo.core.objectives import (
    INNER_WEIGHTS,
    OUTER_WEIGHTS,
    PLAN_WEIGHTS,
    RATIO_FORMS,
    Clip,
    TrustRegion,
    k3_kl,
    k3_slope,
    ratio_scale,
    step_coefficients,
    transition_scale,
)
from chunkgrpo.core.sde import Gaussian, Kernel
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.transfer import send
from chunkgrpo.types import Experience, LossPart, Trajectory

# Axis names: B samples, N transitions, C chunks, S samples of one update, Q (sample, step) pairs.

ANCHORS = ("rollout", "replay")
KL_FORMS = ("transition", "rate")

Pairs = tuple[Tensor, Tensor]
"""Sample and step of Q (sample, step) pairs."""


@dataclass(frozen=True)
class MicroBatch:
    """The pairs that go through the network together, where they are planned and where computed.

    An index that lies elsewhere than what it picks from makes the host wait for the device each
    time it is used; so the indices of all micro-batches are sent ahead, in one piece.

    Attributes:
        planned: The pairs on the host.
        pairs: The same on the trajectory's device.
        alike: Where pairs of one prompt are one row of the network: the first pair of each prompt,
            and the row of each pair among these, [Q]. On the device.
    """

    planned: Pairs
    pairs: Pairs
    alike: Pairs | None = None

    @staticmethod
    def place(parts: Sequence[Pairs], trajectory: Trajectory) -> list[MicroBatch]:
        """Send pairs to the device of a trajectory."""
        columns: list[Tensor] = []
        for sample, step in parts:
            columns += [sample, step]
            if trajectory.shared_start and len(step) and bool((step == 0).all()):
                prompt, row = (sample // trajectory.group_size).unique(return_inverse=True)
                first = (row == torch.arange(len(prompt))[:, None]).int().argmax(1)
                columns += [first, row]
            else:
                columns += [step[:0], step[:0]]
        if not columns:
            return []
        flat = send(torch.cat(columns), trajectory.device)
        there = flat.split([len(column) for column in columns])
        return [
            MicroBatch(
                pairs,
                (there[4 * i], there[4 * i + 1]),
                (there[4 * i + 2], there[4 * i + 3]) if len(there[4 * i + 2]) else None,
            )
            for i, pairs in enumerate(parts)
        ]

    def __len__(self) -> int:
        return len(self.planned[0])

    def state(self, trajectory: Trajectory, ahead: int = 0) -> Tensor:
        """Return the states that the pairs start from, or those ``ahead`` steps later."""
        sample, step = self._kept(trajectory)
        return trajectory.state(sample, step + ahead)

    def velocity(self, trajectory: Trajectory) -> Tensor:
        """Return the sampling policy's velocities at the pairs."""
        return trajectory.velocity(*self._kept(trajectory))

    def _kept(self, trajectory: Trajectory) -> Pairs:
        """Return the pairs where states and velocities are kept: on the device or on the host."""
        return self.pairs if trajectory.states.device == trajectory.device else self.planned


@dataclass(frozen=True)
class ChunkGRPO:
    r"""The chunk-level clipped surrogate with its exact, memory-bounded gradient.

    .. math:: L = \frac{1}{S M} \sum_{b,j\,\text{chosen}} \lambda_{bj}
              \max(-A_b s_{bj}, -A_b\,\mathrm{clip}(s_{bj}, 1-\epsilon_l, 1+\epsilon_h)),
              \qquad \log s_{bj} = \frac{1}{cs_j} \sum_{i \in ch_j} a_i
              (\ell_{bi} - \ell^{old}_{bi} + b_{bi})

    with S samples per update and M chosen chunks per sample. As published for Chunk-GRPO, a = 1,
    b = 0 and lambda = 1; ``ratio``, ``inner_weights``, ``outer_weights``, ``trust`` and the
    selection's own weights change them. A pass without gradient finds the ratios (none is needed
    while the policy is still the one the anchor was computed with); the second back-propagates
    (sample, step) pairs in equal micro-batches of any size, so memory does not depend on how long
    chunks are.

    Args:
        plan: How the trained steps form chunks.
        transition: The one the rollout used.
        selection: Which chunks of a sample are trained.
        clip_low, clip_high: Clip range of the ratio, below and above 1; unused with ``trust``.
        num_updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, step) pairs per forward and backward.
        anchor: ``"rollout"`` uses the log-densities the rollout computed; ``"replay"`` recomputes
            them in the very micro-batches that will be trained, so that ratios start at exactly 1
            in any precision, for one more forward a pair.
        kl_coefficient: Weight of KL(new || reference), per dimension, averaged over trained pairs.
        kl_form: ``"transition"``, the KL between the two transitions, or ``"rate"``, that times
            dt (Flow-GRPO divides by g^2 and not by g^2 dt).
        old_kl_coefficient: Weight of the k3 estimate of KL to the sampling policy, per chunk.
        trust: Trust region in place of the clip.
        ratio: Form of the ratio, see :func:`~chunkgrpo.core.objectives.ratio_scale`.
        inner_weights: ``"equal_kappa"`` weights the steps inside a chunk's ratio.
        outer_weights: ``"noise_level"`` or ``"inverse_dt"`` weights the loss of a step; of a chunk,
            with the mean over its steps. ``"chunk_size"`` weights that of a chunk by its size
            (:func:`~chunkgrpo.core.objectives.chunk_size_weights`), and ``"implicit"`` that of a
            step as ``implicit`` would (:func:`~chunkgrpo.core.objectives.implicit_weights`).
        implicit: The plan that ``outer_weights`` ``"implicit"`` takes the steps' weights from; it
            covers the same steps as ``plan``, whose chunks are then single steps.
        consistency: Weight of the temporal consistency term. For neighbouring chunks with first
            steps i < k it is the mean square of how far the update has moved the two clean-image
            predictions apart,

            .. math:: \frac1D \| (\hat x_0^k - \hat x_0^i) - (\hat x_0^{k,old} -
                      \hat x_0^{i,old}) \|^2,

            averaged over samples and neighbours. It is zero, and so is its gradient, until the
            first update has moved the policy.
        group_by_chunk: Let every micro-batch hold steps of one chunk, so that gradients can be
            told apart by chunk.
        keep: Share of the rollout's samples that is trained, in (0, 1]: the
            :func:`~chunkgrpo.core.credit.strongest`. The loss, KL included, is then their mean.
    """

    plan: ChunkPlan
    transition: Kernel
    selection: Selection = field(default_factory=UniformSelection)
    clip_low: float = 5e-5
    clip_high: float = 5e-5
    num_updates: int = 2
    micro_batch: int = 64
    anchor: str = "rollout"
    kl_coefficient: float = 0.0
    kl_form: str = "transition"
    old_kl_coefficient: float = 0.0
    trust: TrustRegion | None = None
    ratio: str = "per_dimension"
    inner_weights: str = "none"
    outer_weights: str = "none"
    implicit: ChunkPlan | None = None
    consistency: float = 0.0
    group_by_chunk: bool = False
    keep: float = 1.0

    needs_trajectory = True
    samples_old = False
    old = None

    def __post_init__(self) -> None:
        if not self.transition.has_density:
            raise ValueError(
                "Chunk-GRPO needs a density of each trained step, and an ODE step (eta 0) has "
                "none; use a flow or dance diffusion with eta > 0"
            )
        for name, value, known in (
            ("anchor", self.anchor, ANCHORS),
            ("KL form", self.kl_form, KL_FORMS),
            ("ratio form", self.ratio, RATIO_FORMS),
            ("inner weighting", self.inner_weights, INNER_WEIGHTS),
            ("outer weighting", self.outer_weights, OUTER_WEIGHTS | PLAN_WEIGHTS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if self.num_updates < 1 or self.micro_batch < 1:
            raise ValueError(
                f"num_updates and micro_batch must be at least 1, got {self.num_updates} and "
                f"{self.micro_batch}"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; it is a share of the samples, in (0, 1]")
        if (self.outer_weights == "implicit") != (self.implicit is not None):
            raise ValueError(
                f"outer weighting {self.outer_weights!r} with implicit {self.implicit}: weights "
                "'implicit' need the plan they are taken from, and nothing else reads it; give "
                "both or none"
            )
        if self.implicit is not None:
            self.implicit.validate_for(self.plan.num_steps)
            if max(self.plan.sizes) > 1:
                raise ValueError(
                    f"outer weighting 'implicit' gives single steps the weights that chunks have "
                    f"anyhow, and the plan is {self.plan}; use chunks of one, or no weights"
                )

    @property
    def region(self) -> TrustRegion:
        """The trust region in force."""
        return self.trust or Clip(self.clip_low, self.clip_high)

    @property
    def needs_divergence(self) -> bool:
        """Whether the mean of each step is compared with the sampling policy's."""
        return self.ratio == "guard" or self.region.needs_divergence

    @property
    def needs_velocities(self) -> bool:
        """Whether the rollout must keep the sampling policy's velocities."""
        return self.needs_divergence or self.consistency > 0

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
        if self.needs_velocities and trajectory.velocities is None:
            raise ValueError(
                "this objective compares the policy's predictions with those of the sampling "
                "policy, and the rollout kept none; roll out with keep_velocities=True"
            )
        # Everything that decides which pairs are trained stays on the CPU, with the generator.
        curve_BN = trajectory.dynamics.cpu()
        chosen_BM = self.selection(plan, curve_BN, generator)
        mask_BC = chosen_mask(chosen_BM, plan.num_chunks)
        weight_BC = self.selection.loss_weights(plan, curve_BN, chosen_BM)
        order = torch.randperm(num_samples, generator=generator)
        if self.keep < 1:
            order = order[self.chosen(experience.advantages.cpu()[order])]
        shares = order.tensor_split(self.num_updates)
        batches = [self._pairs(trajectory, share, mask_BC, plan, generator) for share in shares]
        old = _Anchor(trajectory.old_log_prob, torch.zeros_like(trajectory.old_log_prob))
        if self.anchor == "replay":
            replayed = self._measure(policy, trajectory, list(chain(*batches)), old)
            old = _Anchor(replayed.log_prob, old.divergence)
        scales = _Scales.of(self, trajectory, plan)
        for update, (share, batch) in enumerate(zip(shares, batches, strict=True)):
            # Only the moved policy can have ratios other than 1.
            new = self._measure(policy, trajectory, batch, old) if update else old
            step = _Update(self, experience, plan, share, mask_BC, weight_BC, scales, old, new)
            yield from step.parts(policy, batch, moved=update > 0)

    def chosen(self, advantages: Tensor) -> Tensor:
        """Return which samples are trained, ascending, from advantages [B] or [B, C]."""
        return strongest(advantages, num_kept(len(advantages), self.keep, self.num_updates))

    def _pairs(
        self,
        trajectory: Trajectory,
        share_S: Tensor,
        mask_BC: Tensor,
        plan: ChunkPlan,
        generator: Generator,
    ) -> list[MicroBatch]:
        """List the (sample, step) pairs of one update, in micro-batches."""
        row, step = mask_BC[share_S][:, plan.chunk_of_step].nonzero(as_tuple=True)
        sample = share_S[row]
        # Shuffled, so that every micro-batch holds all noise levels and all are alike in size.
        order = torch.randperm(len(step), generator=generator)
        return MicroBatch.place(self.cut(trajectory, (sample[order], step[order])), trajectory)

    def cut(self, trajectory: Trajectory, pairs: Pairs) -> list[Pairs]:
        """Cut pairs into the fewest equal micro-batches of at most ``micro_batch`` network rows.

        Where the samples of a prompt start from one state, their first steps are one row: those
        pairs go together, prompt by prompt, and are evaluated once.
        """
        sample, step = pairs
        if self.group_by_chunk:
            chunk = self.plan.chunk_of_step[step]
            parts = [(sample[chunk == c], step[chunk == c]) for c in range(self.plan.num_chunks)]
            return [part for each in parts for part in split_pairs(each, self.micro_batch)]
        if not trajectory.shared_start:
            return split_pairs(pairs, self.micro_batch)
        first = step == 0
        prompt = sample[first] // trajectory.group_size
        together = torch.argsort(prompt, stable=True)
        rest = split_pairs((sample[~first], step[~first]), self.micro_batch)
        alike = (sample[first][together], step[first][together])
        distinct = prompt.unique()
        number = -(-len(distinct) // self.micro_batch)
        if not number:
            return rest
        starts = torch.stack([part[0] for part in distinct.tensor_split(number)])
        cuts = torch.searchsorted(prompt[together], starts[1:]).tolist()
        columns = (part.tensor_split(cuts) for part in alike)
        return [*rest, *zip(*columns, strict=True)]

    @torch.no_grad()
    def _measure(
        self, policy: Policy, trajectory: Trajectory, batch: list[MicroBatch], start: _Anchor
    ) -> _Anchor:
        """Return the present policy's log-probabilities and divergences of some pairs, [B, N]."""
        filled = _Anchor(start.log_prob.clone(), start.divergence.clone())
        for part in batch:
            step = self.step_of(policy, trajectory, part)
            filled.log_prob[part.pairs] = self.log_prob(trajectory, part, step)
            if self.needs_divergence:
                filled.divergence[part.pairs] = self.divergence(trajectory, part, step)
        return filled

    def step_of(self, policy: Policy, trajectory: Trajectory, part: MicroBatch) -> Gaussian:
        """Return the current policy's transition of each pair."""
        sample, step = part.pairs
        x, sigmas = part.state(trajectory), trajectory.trained_sigmas
        if part.alike is None:
            v = policy.velocity(x, sigmas[step], trajectory.conditioning_of(sample))
        else:
            first, row = part.alike
            sigma = sigmas[0].expand(len(first))
            v = policy.velocity(x[first], sigma, trajectory.conditioning_of(sample[first]))[row]
        return self.transition(x, v, sigmas[step], sigmas[step + 1])

    def log_prob(self, trajectory: Trajectory, part: MicroBatch, step: Gaussian) -> Tensor:
        """Return each pair's log-probability per dimension, [Q]."""
        return step.log_prob_per_dim(part.state(trajectory, ahead=1)).float()

    def divergence(self, trajectory: Trajectory, part: MicroBatch, step: Gaussian) -> Tensor:
        """Return each pair's KL(new || sampling policy) per dimension, [Q]."""
        sigmas, where = trajectory.trained_sigmas, part.pairs[1]
        before = self.transition(
            part.state(trajectory), part.velocity(trajectory), sigmas[where], sigmas[where + 1]
        )
        return step.kl_per_dim(before).float()


def split_pairs(pairs: Pairs, size: int) -> list[Pairs]:
    """Cut pairs into the fewest equal parts of at most ``size``."""
    number = -(-len(pairs[0]) // size)
    if not number:
        return []
    return list(zip(pairs[0].tensor_split(number), pairs[1].tensor_split(number), strict=True))


@dataclass(frozen=True)
class _Anchor:
    """Log-probabilities per dimension and divergences from the sampling policy, [B, N] each."""

    log_prob: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class _Scales:
    """Numbers per step that are known before training.

    Attributes:
        inner_N: a, the factor of a step's log-ratio inside its chunk.
        outer_C: lambda, the factor of a chunk's loss.
        kl_N: Factor of a step's KL to the reference.
    """

    inner_N: Tensor
    outer_C: Tensor
    kl_N: Tensor

    @staticmethod
    def of(algorithm: ChunkGRPO, trajectory: Trajectory, plan: ChunkPlan) -> _Scales:
        # Of all steps that can be trained, also where a window trains a few: weights have mean 1
        # over the schedule, or those of a window of one step would always be 1.
        sigmas = trajectory.sigmas[:-1]
        window = slice(trajectory.offset, trajectory.offset + trajectory.num_trained)
        dt_N = sigmas[:-1] - sigmas[1:]
        std_N = algorithm.transition.std(sigmas[:-1], sigmas[1:])
        num_elements = trajectory.final[0].numel()
        kappa_N = transition_scale(algorithm.transition, sigmas)
        inner_N = ratio_scale(algorithm.ratio, std_N, num_elements)
        inner_N = inner_N * INNER_WEIGHTS[algorithm.inner_weights](kappa_N)
        if algorithm.outer_weights in PLAN_WEIGHTS:
            # Of the steps that are cut into chunks, which are those of the window.
            cut = algorithm.implicit or plan
            outer_N = PLAN_WEIGHTS[algorithm.outer_weights](cut).to(std_N)
        else:
            outer_N = OUTER_WEIGHTS[algorithm.outer_weights](std_N, dt_N)[window]
        kl_N = dt_N if algorithm.kl_form == "rate" else torch.ones_like(dt_N)
        return _Scales(inner_N[window], plan.reduce(outer_N[None])[0], kl_N[window])


@dataclass(frozen=True)
class _Update:
    """The pieces of one optimizer step."""

    algorithm: ChunkGRPO
    experience: Experience
    plan: ChunkPlan
    share_S: Tensor
    mask_BC: Tensor
    weight_BC: Tensor
    scales: _Scales
    old: _Anchor
    new: _Anchor

    def parts(self, policy: Policy, batch: list[MicroBatch], moved: bool) -> Iterator[LossPart]:
        a, plan, scales = self.algorithm, self.plan, self.scales
        advantages = self.experience.advantages
        bias_BN = self.new.divergence if a.ratio == "guard" else 0.0
        ratio_BN = scales.inner_N * (self.new.log_prob - self.old.log_prob + bias_BN)
        log_ratio_BC = plan.reduce(ratio_BN)
        divergence_BC = plan.reduce(self.new.divergence)
        region, mask = a.region, self.mask_BC.to(ratio_BN.device)
        weight_BC = self.weight_BC.to(ratio_BN) * scales.outer_C
        value_BC = region.value(log_ratio_BC, advantages, divergence_BC)
        slope_BC = region.slope(log_ratio_BC, advantages, divergence_BC)
        if a.old_kl_coefficient:
            value_BC = value_BC + a.old_kl_coefficient * k3_kl(log_ratio_BC)
            slope_BC = slope_BC + a.old_kl_coefficient * k3_slope(log_ratio_BC)
        denominator = int(self.mask_BC[self.share_S].sum())
        # Each step carries its part of the chunk's loss, so that the pieces sum to the loss.
        value_BN = step_coefficients(mask, weight_BC * value_BC, plan, denominator)
        slope_BN = step_coefficients(mask, weight_BC * slope_BC, plan, denominator)
        slope_BN = slope_BN * scales.inner_N
        cut_BC = region.is_cut(log_ratio_BC, advantages, divergence_BC)
        num_pairs = sum(len(part) for part in batch)
        # Chunks that are cut and groups of equal rewards pull nowhere: no need to go there.
        idle = None
        if a.kl_coefficient == 0:
            batch, idle = self.without_idle(batch, slope_BN)
        neighbours = self.neighbours() if a.consistency > 0 and moved else []
        number = len(batch) + len(neighbours) + (idle is not None)
        last = self.chunk_diagnostics(log_ratio_BC, cut_BC)
        for index in range(number):
            if index < len(batch):
                loss, diagnostics = self.pair_part(
                    policy, batch[index], slope_BN, value_BN, num_pairs
                )
            elif index < len(batch) + len(neighbours):
                loss, diagnostics = self.neighbour_part(policy, neighbours[index - len(batch)])
            else:
                assert idle is not None
                nothing = 0.0 * policy.parameters()[0].float().sum()
                loss = nothing + value_BN[idle.pairs].sum()
                diagnostics = {
                    "sample": idle.planned[0],
                    "step": idle.planned[1],
                    "log_ratio": self.new.log_prob[idle.pairs] - self.old.log_prob[idle.pairs],
                    "idle": torch.ones(len(idle)),
                }
            ends = index == number - 1
            yield LossPart(loss, ends, diagnostics | last if ends else diagnostics)

    def pair_part(
        self,
        policy: Policy,
        part: MicroBatch,
        slope_BN: Tensor,
        value_BN: Tensor,
        num_pairs: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        a, trajectory, pairs = self.algorithm, self.experience.trajectory, part.pairs
        step = a.step_of(policy, trajectory, part)
        log_prob = a.log_prob(trajectory, part, step)
        moving = log_prob
        if a.ratio == "guard":
            moving = moving + a.divergence(trajectory, part, step)
        loss = (slope_BN[pairs] * (moving - moving.detach())).sum() + value_BN[pairs].sum()
        diagnostics = {
            "sample": part.planned[0],
            "step": part.planned[1],
            "log_ratio": log_prob.detach() - self.old.log_prob[pairs],
        }
        if a.kl_coefficient > 0:
            with torch.no_grad(), policy.reference():
                reference = a.step_of(policy, trajectory, part)
            kl = step.kl_per_dim(reference)
            weighted = (kl * self.scales.kl_N[pairs[1]]).sum()
            loss = loss + a.kl_coefficient * weighted / num_pairs
            diagnostics["reference_kl"] = kl.detach()
        return loss, diagnostics

    def neighbours(self) -> list[MicroBatch]:
        """List the pairs of neighbouring chunks' first steps, the earlier ones first."""
        number = self.plan.num_chunks - 1
        sample = self.share_S.repeat_interleave(number)
        chunk = torch.arange(number).repeat(len(self.share_S))
        starts = torch.tensor(self.plan.starts)
        parts = split_pairs((sample, chunk), max(1, self.algorithm.micro_batch // 2))
        both = [(s.repeat(2), torch.cat([starts[c], starts[c + 1]])) for s, c in parts]
        return MicroBatch.place(both, self.experience.trajectory)

    def neighbour_part(self, policy: Policy, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        trajectory = self.experience.trajectory
        sample, step = part.pairs
        sigma = trajectory.trained_sigmas[step]
        v = policy.velocity(part.state(trajectory), sigma, trajectory.conditioning_of(sample))
        # x0 = x - sigma v, so the clean prediction moves by -sigma times the velocity's change.
        moved = (v - part.velocity(trajectory)).flatten(1) * sigma[:, None]
        early, late = moved.chunk(2)
        term = (late - early).square().mean(1)
        total = len(self.share_S) * (self.plan.num_chunks - 1)
        loss = self.algorithm.consistency * term.sum() / total
        return loss, {"consistency": term.detach()}

    def without_idle(
        self, batch: list[MicroBatch], slope_BN: Tensor
    ) -> tuple[list[MicroBatch], MicroBatch | None]:
        """Take out the pairs whose coefficient is 0; return the others in equal micro-batches."""
        trajectory = self.experience.trajectory
        sample, step = (torch.cat(column) for column in zip(*(p.planned for p in batch)))
        pulls = torch.cat([slope_BN[part.pairs] != 0 for part in batch]).cpu()
        if pulls.all():
            return batch, None
        alive = self.algorithm.cut(trajectory, (sample[pulls], step[pulls]))
        *rest, idle = MicroBatch.place([*alive, (sample[~pulls], step[~pulls])], trajectory)
        return rest, idle

    def chunk_diagnostics(self, log_ratio_BC: Tensor, cut_BC: Tensor) -> dict[str, Tensor]:
        """Return the log-ratio of each trained chunk, and whether it is cut."""
        row, chunk = self.mask_BC[self.share_S].nonzero(as_tuple=True)
        where = (self.share_S[row].to(log_ratio_BC.device), chunk.to(log_ratio_BC.device))
        advantages = self.experience.advantages.to(log_ratio_BC.device)
        credit = advantages[where[0]] if advantages.ndim == 1 else advantages[where]
        return {
            "chunk_log_ratio": log_ratio_BC[where],
            "cut": cut_BC[where],
            "chunk": chunk,
            "chunk_advantage": credit,
        }
