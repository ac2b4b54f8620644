# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT (arXiv:2509.16117) and AWM (arXiv:2509.25050): training on the forward process.

Both take a rollout's clean latents and advantages and nothing else of it, so any solver may have
sampled them. The formulas are in :mod:`chunkgrpo.core.forward`; here they become pieces of a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Generator, Tensor

from chunkgrpo.core.forward import (
    matching_error,
    nft_pair_loss,
    noisy,
    optimality,
    pseudo_log_prob,
    scaled_advantages,
    shuffled_times,
    stratified_times,
    velocity_distance,
)
from chunkgrpo.core.objectives import clipped_surrogate, gradient_is_cut, surrogate_slope
from chunkgrpo.core.precision import at_least_float32
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.old_policy import Old
from chunkgrpo.runtime.seeds import NoiseSource
from chunkgrpo.runtime.transfer import send
from chunkgrpo.types import Conditioning, Experience, LossPart, Trajectory

# Axis names: B samples, T times per sample, Q (sample, time) pairs of one micro-batch.

MODES = ("exp_first", "sum_first")

Slots = tuple[Tensor, Tensor]
"""Which pairs: rows and columns of [B, T]."""


# ---------------------------------------------------------------------------------------------
# What both share: pairs of a sample and a time


@dataclass(frozen=True)
class Pairs:
    """Some (sample, time) pairs, noised and ready for the network.

    Attributes:
        sample, step: [Q]: rows of the trajectory, indices into its schedule.
        slot: [Q], column of [B, T].
        clean, noise, noised: [Q, *latent].
        sigma: [Q].
        conditioning: Q rows.
    """

    sample: Tensor
    step: Tensor
    slot: Tensor
    clean: Tensor
    noise: Tensor
    noised: Tensor
    sigma: Tensor
    conditioning: Conditioning

    def velocity(self, policy: Policy) -> Tensor:
        """Return the policy's velocity at the noised latents, with gradient where it is on."""
        return at_least_float32(policy.velocity(self.noised, self.sigma, self.conditioning))

    @torch.no_grad()
    def velocity_within(self, policy: Policy, context: AbstractContextManager[None]) -> Tensor:
        """Return, without gradient, the velocity the policy answers with inside ``context``."""
        with context:
            return self.velocity(policy)


@dataclass(frozen=True)
class Deal:
    """Everything random about one rollout's training, drawn before it starts.

    Noise is kept as one seed per pair: it costs no memory, comes back the same in a second pass,
    and does not depend on the micro-batches.

    Attributes:
        times: [B, T], indices into the schedule.
        seeds: [B, T], of each pair's noise.
        updates: For each optimizer step its micro-batches.
    """

    times: Tensor
    seeds: Tensor
    updates: list[list[Slots]]

    @staticmethod
    def draw(times_BT: Tensor, num_updates: int, micro_batch: int, generator: Generator) -> Deal:
        """Deal samples to updates at random, and each update's pairs to equal micro-batches."""
        num_samples, num_times = times_BT.shape
        seeds_BT = torch.randint(2**62, times_BT.shape, generator=generator)
        updates = []
        for share in torch.randperm(num_samples, generator=generator).tensor_split(num_updates):
            sample = share.repeat_interleave(num_times)
            slot = torch.arange(num_times).repeat(len(share))
            # Shuffled, so that every micro-batch holds all noise levels.
            order = torch.randperm(len(sample), generator=generator)
            parts = order.tensor_split(-(-len(order) // micro_batch))
            updates.append([(sample[part], slot[part]) for part in parts])
        return Deal(times_BT, seeds_BT, updates)

    def pairs(self, trajectory: Trajectory, slots: Slots) -> Pairs:
        """Noise the clean latents of some pairs."""
        # One piece, and not waited for: an index from the host would be, each time it is used.
        where = send(torch.stack([*slots, self.times[slots]]), trajectory.device)
        sample, slot, step = where.unbind()
        clean = trajectory.final[sample]
        source = NoiseSource(self.seeds[slots].tolist())
        noise = source.draw(tuple(clean.shape[1:]), clean.device)
        sigma = trajectory.sigmas[step]
        noised = noisy(clean, noise, sigma)
        conditioning = trajectory.conditioning_of(sample)
        return Pairs(sample, step, slot, clean, noise, noised, sigma, conditioning)


def _num_pairs(batches: Sequence[Slots]) -> int:
    return sum(len(sample) for sample, _ in batches)


def _validate_sizes(num_updates: int, micro_batch: int) -> None:
    if num_updates < 1 or micro_batch < 1:
        raise ValueError(
            f"num_updates and micro_batch must be at least 1, got {num_updates} and {micro_batch}"
        )


def _validate_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} is {value}; a penalty must not be negative; 0 turns it off")


def _validate_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")


def _validate_experience(experience: Experience, num_updates: int) -> None:
    shape, num_samples = tuple(experience.advantages.shape), experience.trajectory.num_samples
    if shape != (num_samples,):
        raise ValueError(
            f"advantages have shape {shape}; a method that trains clean latents has one a sample, "
            f"({num_samples},); credit by chunk needs Chunk-GRPO"
        )
    if num_updates > num_samples:
        raise ValueError(
            f"{num_updates} updates need as many samples, the rollout has {num_samples}"
        )


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiffusionNFT:
    r"""Contrast the velocity with the old policy's, by how good each sample is.

    .. math:: L = \frac1Q \sum_{\text{pairs}} \left[ c\,L_{NFT}(v, v_{old}, x_0; r)
              + \beta_{kl} \frac{\|v - v_{ref}\|^2}{D} \right], \qquad
              r = \mathrm{clip}\!\left(\frac{A}{2c} + \frac12, 0, 1\right)

    with the pair's loss of :func:`~chunkgrpo.core.forward.nft_pair_loss`.

    ``old`` is the policy that sampled, and its velocity anchors the loss: with ``old`` given, roll
    out inside ``old.applied(parameters)`` and call ``old.update`` after the last optimizer step
    of the rollout. Without it, the old policy is the one found when ``losses`` starts, i.e. that
    of an ordinary rollout; later updates keep a copy of it.

    Args:
        old: The sampling policy, or None for the current one.
        beta: b > 0 of the pair's loss.
        advantage_clip: c > 0, the advantage from which a sample is wholly good.
        fraction: Trained share of the schedule's times, in (0, 1].
        num_updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, time) pairs per forward and backward.
        kl_coefficient: Weight of the squared distance from the reference's velocity; 0 turns it
            off, and the reference is then not evaluated.
    """

    old: Old | None = None
    beta: float = 1.0
    advantage_clip: float = 5.0
    fraction: float = 0.99
    num_updates: int = 1
    micro_batch: int = 64
    kl_coefficient: float = 1e-4

    needs_trajectory = False
    needs_velocities = False
    samples_old = True

    def __post_init__(self) -> None:
        _validate_sizes(self.num_updates, self.micro_batch)
        _validate_positive("beta", self.beta)
        _validate_positive("advantage_clip", self.advantage_clip)
        _validate_not_negative("kl_coefficient", self.kl_coefficient)

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield pieces of ``num_updates`` losses; see :class:`~.protocol.Algorithm`."""
        _validate_experience(experience, self.num_updates)
        trajectory = experience.trajectory
        num_steps = len(trajectory.sigmas) - 1
        times_BT = shuffled_times(num_steps, self.fraction, trajectory.num_samples, generator)
        deal = Deal.draw(times_BT, self.num_updates, self.micro_batch, generator)
        optimality_B = optimality(experience.advantages, self.advantage_clip)
        parameters = policy.parameters()
        old = self.old
        if old is None and self.num_updates > 1:
            old = Old(parameters)
        for update, batches in enumerate(deal.updates):
            num_pairs = _num_pairs(batches)
            # A policy that has not moved is its own old one: no need to ask it twice.
            is_old = self.old is None and update == 0
            for index, slots in enumerate(batches):
                pairs = deal.pairs(trajectory, slots)
                v_old = None
                if old is not None and not is_old:
                    v_old = pairs.velocity_within(policy, old.applied(parameters))
                v_ref = None
                if self.kl_coefficient > 0:
                    v_ref = pairs.velocity_within(policy, policy.reference())
                v = pairs.velocity(policy)
                v_old = v.detach() if v_old is None else v_old
                good = optimality_B[pairs.sample]
                loss = self.advantage_clip * nft_pair_loss(
                    v, v_old, pairs.clean, pairs.noised, pairs.sigma, good, self.beta
                )
                diagnostics = {
                    "sample": pairs.sample,
                    "step": pairs.step,
                    "old_gap": velocity_distance(v.detach(), v_old),
                }
                if v_ref is not None:
                    gap = velocity_distance(v, v_ref)
                    loss = loss + self.kl_coefficient * gap
                    diagnostics["reference_gap"] = gap.detach()
                ends = index == len(batches) - 1
                yield LossPart(loss.sum() / num_pairs, ends, diagnostics)


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AWM:
    r"""The clipped surrogate on log-probabilities read off the pretraining loss.

    .. math:: L = \frac1Q \sum_{\text{pairs}} \left[
              \max(-A\rho, -A\,\mathrm{clip}(\rho, 1-\epsilon_l, 1+\epsilon_h))
              + \beta \frac{\|v - v_{ref}\|^2}{D}
              + \beta_{ema} \frac{\|v - v_{ema}\|^2}{D} \right], \quad
              \rho = e^{\ell - \ell_{old}}

    A pair's :math:`\ell` and :math:`\ell_{old}` share its time and its noise. The old policy
    of the *ratio* is the one that sampled, taken to be the policy as ``losses`` finds it: roll
    out with the current parameters. So ratios of the first update are exactly 1; for later
    updates the old log-probabilities are computed before the first one, in the micro-batches
    that will be trained.

    With ``mode="sum_first"`` the log-ratios of a sample's T times are averaged before the
    exponential, one ratio and one clipping decision per sample, like a chunk of random times. Its
    gradient is exact in micro-batches of any shape: a pass without gradient finds the ratios
    (:func:`~chunkgrpo.core.objectives.surrogate_slope`), the next one back-propagates pairs.

    ``old`` is the EMA policy of the last term, *not* the one of the ratio. Call ``old.update``
    after the last optimizer step of each rollout.

    Args:
        old: The averaged policy; needed where ``ema_coefficient`` is above 0.
        log_prob: Which pseudo-log-probability (``core.forward.PSEUDO_LOG_PROBS``).
        power: p > 0 of ``"ghuber"``.
        mode: ``"exp_first"``, a ratio per pair, or ``"sum_first"``, a ratio per sample.
        num_times: T, times per sample (:func:`~chunkgrpo.core.forward.stratified_times`).
        clip_low, clip_high: Clip range of the ratio, below and above 1; at 1.0 the clip binds
            only for ratios above 2.
        advantage_clip, advantage_max: Advantages are clamped to the first, then scaled so that
            this becomes the second.
        num_updates: Optimizer steps per rollout; samples are dealt to them at random.
        micro_batch: (sample, time) pairs per forward and backward.
        kl_coefficient: Weight of the squared distance from the reference's velocity; 0 turns it
            off, and the reference is then not evaluated. 1e-3 to 3e-3 in the published runs.
        ema_coefficient: The same for the averaged policy; 1 in the published runs.
    """

    old: Old | None = None
    log_prob: str = "ghuber"
    power: float = 0.25
    mode: str = "exp_first"
    num_times: int = 6
    clip_low: float = 1.0
    clip_high: float = 1.0
    advantage_clip: float = 5.0
    advantage_max: float = 1.0
    num_updates: int = 1
    micro_batch: int = 64
    kl_coefficient: float = 0.0
    ema_coefficient: float = 0.0

    needs_trajectory = False
    needs_velocities = False
    samples_old = False

    def __post_init__(self) -> None:
        _validate_sizes(self.num_updates, self.micro_batch)
        pseudo_log_prob(self.log_prob, self.power)
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known: {', '.join(MODES)}")
        _validate_positive("advantage_clip", self.advantage_clip)
        _validate_positive("advantage_max", self.advantage_max)
        for name in ("clip_low", "clip_high", "kl_coefficient", "ema_coefficient"):
            _validate_not_negative(name, getattr(self, name))
        if self.ema_coefficient > 0 and self.old is None:
            raise ValueError(
                f"ema_coefficient is {self.ema_coefficient}, but there is no averaged policy to "
                "stay near; give one as old, or set the coefficient to 0"
            )

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield pieces of ``num_updates`` losses; see :class:`~.protocol.Algorithm`."""
        _validate_experience(experience, self.num_updates)
        trajectory = experience.trajectory
        num_steps = len(trajectory.sigmas) - 1
        times_BT = stratified_times(num_steps, self.num_times, trajectory.num_samples, generator)
        deal = Deal.draw(times_BT, self.num_updates, self.micro_batch, generator)
        later = list(chain(*deal.updates[1:]))
        old_BT = self._log_probs(policy, trajectory, deal, later)
        for update in range(self.num_updates):
            yield from self._update(policy, experience, deal, update, old_BT)

    def _update(
        self, policy: Policy, experience: Experience, deal: Deal, update: int, old_BT: Tensor
    ) -> Iterator[LossPart]:
        """Yield the pieces of one optimizer step."""
        trajectory, batches = experience.trajectory, deal.updates[update]
        advantages_B = scaled_advantages(
            experience.advantages, self.advantage_clip, self.advantage_max
        )
        clip = (self.clip_low, self.clip_high)
        num_pairs = _num_pairs(batches)
        parameters = policy.parameters()
        # Only the moved policy can have ratios other than 1.
        has_moved = update > 0
        mean_B = None
        if self.mode == "sum_first":
            new_BT = self._log_probs(policy, trajectory, deal, batches) if has_moved else old_BT
            mean_B = (new_BT - old_BT).mean(1)
        for index, slots in enumerate(batches):
            pairs = deal.pairs(trajectory, slots)
            v_ref = v_ema = None
            if self.kl_coefficient > 0:
                v_ref = pairs.velocity_within(policy, policy.reference())
            if self.ema_coefficient > 0 and self.old is not None:
                v_ema = pairs.velocity_within(policy, self.old.applied(parameters))
            v = pairs.velocity(policy)
            log_prob = self._log_prob(v, pairs)
            old = old_BT[pairs.sample, pairs.slot] if has_moved else log_prob.detach()
            log_ratio = log_prob - old
            advantages = advantages_B[pairs.sample]
            if mean_B is None:
                loss = clipped_surrogate(log_ratio, advantages, *clip)
                cut = gradient_is_cut(log_ratio.detach(), advantages, *clip)
            else:
                # Each pair carries its share of the sample's loss and of its gradient.
                mean = mean_B[pairs.sample]
                slope = surrogate_slope(mean, advantages, *clip)
                value = clipped_surrogate(mean, advantages, *clip)
                loss = value + slope * (log_prob - log_prob.detach())
                cut = gradient_is_cut(mean, advantages, *clip)
            diagnostics = {
                "sample": pairs.sample,
                "step": pairs.step,
                "log_ratio": log_ratio.detach(),
                "cut": cut,
            }
            if v_ref is not None:
                gap = velocity_distance(v, v_ref)
                loss = loss + self.kl_coefficient * gap
                diagnostics["reference_gap"] = gap.detach()
            if v_ema is not None:
                gap = velocity_distance(v, v_ema)
                loss = loss + self.ema_coefficient * gap
                diagnostics["ema_gap"] = gap.detach()
            ends = index == len(batches) - 1
            yield LossPart(loss.sum() / num_pairs, ends, diagnostics)

    def _log_prob(self, velocity: Tensor, pairs: Pairs) -> Tensor:
        """Return each pair's pseudo-log-probability, [Q]."""
        error = matching_error(velocity, pairs.clean, pairs.noise)
        return pseudo_log_prob(self.log_prob, self.power)(error, pairs.sigma)

    @torch.no_grad()
    def _log_probs(
        self, policy: Policy, trajectory: Trajectory, deal: Deal, batches: Sequence[Slots]
    ) -> Tensor:
        """Return the present policy's pseudo-log-probabilities of some pairs, [B, T], else 0."""
        filled_BT = torch.zeros(deal.times.shape, device=trajectory.final.device)
        for slots in batches:
            pairs = deal.pairs(trajectory, slots)
            log_prob = self._log_prob(pairs.velocity(policy), pairs)
            filled_BT = filled_BT.to(log_prob.dtype)
            filled_BT[pairs.sample, pairs.slot] = log_prob
        return filled_BT
