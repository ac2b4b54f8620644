# SPDX-License-Identifier: Apache-2.0
"""From prompts to trajectories: policy and transition, step by step.

Axis names: P prompts, B samples, R distinct rows, M samples of one batch, N transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Generator, Tensor

from chunkgrpo.core.dynamics import DISTANCES
from chunkgrpo.core.names import OneOf, check_name
from chunkgrpo.core.schedules import validate_sigmas
from chunkgrpo.core.sde import Kernel, OdeDiffusion, Transition, predict_clean
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.seeds import NoiseSource, derive_seed
from chunkgrpo.types import Conditioning, ProgressHook, Prompt, Trajectory, as_prompts

PREFIXES = ("ode", "sde")
"""How the steps before the window are taken."""

Tail = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]
"""Finishes a trajectory without noise: (velocity(x, sigma), x, remaining sigmas) -> x0."""

FinishedHook = Callable[[slice, Tensor], None]
"""Called with finished samples and their clean latents [M, *latent]."""

STORE_PLACES = ("device", "host")
STORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Store:
    """How a trajectory's states are stored until they are trained on.

    With bfloat16 the sampler itself continues from the rounded state, and the log-density is that
    of the rounded state. So what is stored is what was sampled, and ratios before an update are as
    exact as in float32. The noise is rounded, too: its standard deviation is the transition's up to
    one part in 256 of the latent's size, and samples differ from those of float32.

    Attributes:
        place: ``device``, or ``host`` for host memory, with the same values.
        dtype: ``float32``, or ``bfloat16`` for half the memory.
    """

    place: Annotated[str, OneOf(STORE_PLACES)] = "device"
    dtype: Annotated[str, OneOf(STORE_DTYPES)] = "float32"

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        check_name("place of stored trajectories", self.place, STORE_PLACES)
        check_name("type of stored trajectories", self.dtype, STORE_DTYPES)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of stored states."""
        return STORE_DTYPES[self.dtype]

    def empty(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return an empty tensor to store states or velocities in."""
        if self.place == "device":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def rounded(self, x: Tensor) -> Tensor:
        """Return a state as it will be read back: rounded to the type of the store."""
        return x if self.dtype == "float32" else x.to(self.torch_dtype).float()


@dataclass(frozen=True)
class Sampler:
    """How images are sampled, and what is stored for training.

    Every step of the window but the last of the schedule draws from ``transition``; the last is
    deterministic, x0 = x - sigma v, and is not stored. Only the states of the window are stored,
    from which the algorithm can choose the steps that it trains on. Each sample has its own random
    streams, so ``batch_size`` and the order of prompts change nothing but rounding.

    With ``same_noise`` a group also shares all steps before the window, so its samples are one
    network row until the window begins: the window's first state is a branching point, and the
    prefix costs one row per prompt instead of one per sample. From there, ``batch_size`` samples
    at a time are sampled to the end, so that finished ones can be decoded and scored while the
    others are still being sampled.

    Attributes:
        transition: Shared with the algorithm, so that sampling and training cannot disagree.
        sigmas: [K+1] decreasing to 0; K-1 transitions can be trained.
        window: Sampler steps that are stochastic, stored and trained on, within 0..K-2; all of
            them where None; ``range(0)`` where finished images are all that is needed. Outside
            it, steps follow the ODE.
        prefix: ``"ode"``, or ``"sde"``: steps before the window draw noise too, and where the group
            shares its first noise it shares this noise as well.
        tail: Solver of the steps after the window, of all steps where that is empty; Euler where
            None.
        same_noise: Start the whole group from one noise.
        store: Where and in which type states are stored.
        keep_velocities: Store the policy's velocities too.
        batch_size: Largest number of samples in one forward.

    Raises:
        ValueError: If the schedule or the window does not fit.
    """

    transition: Kernel
    sigmas: Tensor
    window: range | None = None
    prefix: str = "ode"
    tail: Tail | None = None
    same_noise: bool = False
    store: Store = field(default_factory=Store)
    keep_velocities: bool = False
    batch_size: int = 64

    def __post_init__(self) -> None:
        validate_sigmas(self.sigmas)
        check_name("prefix", self.prefix, PREFIXES)
        window, num_steps = self.stochastic, self.num_steps
        inside = 0 <= window.start < window.stop < num_steps and window.step == 1
        # range(3, 3) == range(0), so the ends are compared.
        if not inside and (window.start, window.stop) != (0, 0):
            raise ValueError(
                f"the window of stochastic steps is {window}, but a schedule of {num_steps} steps "
                f"has the trained steps 0 to {num_steps - 2}; move or shorten it"
            )

    @property
    def num_steps(self) -> int:
        """K, the sampler steps."""
        return len(self.sigmas) - 1

    @property
    def stochastic(self) -> range:
        """The window."""
        return range(self.num_steps - 1) if self.window is None else self.window

    def rollout(
        self,
        policy: Policy,
        prompts: Iterable[Prompt | str],
        group_size: int = 1,
        *,
        generator: Generator | None = None,
        seeds: Sequence[int] | None = None,
        progress: ProgressHook | None = None,
        finished: FinishedHook | None = None,
    ) -> Trajectory:
        """Sample ``group_size`` images of each prompt and store what training needs.

        Args:
            policy: The sampling policy.
            prompts: P prompts.
            group_size: G >= 1 samples per prompt.
            generator: Source of the samples' seeds where ``seeds`` is None.
            seeds: One per sample, prompt-major.
            progress: Called after each forward with (done, expected) network rows.
            finished: Called with each batch of samples as it is finished, in order.

        Returns:
            The trajectory, prompt-major.

        Raises:
            ValueError: If the group size or the seeds do not fit.
        """
        records = as_prompts(prompts)
        num_samples = len(records) * group_size
        if not records or group_size < 1:
            raise ValueError(
                f"need at least one prompt and one image, got {len(records)}, {group_size}"
            )
        if seeds is None:
            base = int(torch.randint(2**62, (), generator=generator))
            seeds = [derive_seed(base, b) for b in range(num_samples)]
        if len(seeds) != num_samples:
            raise ValueError(f"{len(seeds)} seeds for {num_samples} samples; give one per sample")
        with torch.no_grad():
            run = _Rollout(self, policy, records, group_size, list(seeds), progress)
            return run.trajectory(finished)


class _Rollout:
    """The state of one rollout in progress."""

    def __init__(
        self,
        sampler: Sampler,
        policy: Policy,
        prompts: tuple[Prompt, ...],
        group_size: int,
        seeds: list[int],
        progress: ProgressHook | None,
    ) -> None:
        self.sampler, self.policy, self.group_size = sampler, policy, group_size
        self.seeds, self.progress = seeds, progress
        self.window, self.num_prompts = sampler.stochastic, len(prompts)
        self.sigmas = sampler.sigmas.to(policy.device)
        self.conditioning = policy.encode(prompts)
        self.ode = Transition(OdeDiffusion())
        # Samples of a group are one row until their own noise makes them differ.
        self.fold = group_size if sampler.same_noise else 1
        latent, device, store = policy.latent_shape, policy.device, sampler.store
        number, trained = len(seeds), len(self.window)
        shape = (number, trained + 1, *latent)
        self.states_BN = store.empty(shape, device, store.torch_dtype)
        self.velocities_BN = None
        if sampler.keep_velocities:
            # Always float32: a rounded velocity would look like a changed policy.
            shape = (number, trained, *latent)
            self.velocities_BN = store.empty(shape, device, torch.float32)
        self.log_prob_BN = torch.zeros((number, trained), device=device)
        self.final_B = torch.empty((number, *latent), device=device)
        shared, steps = self.window.start + 1, sampler.num_steps
        self.num_evaluations = 0
        self.expected = number // self.fold * shared + number * (steps - shared)

    def trajectory(self, finished: FinishedHook | None) -> Trajectory:
        """Sample everything; return the trajectory."""
        seeds, number, size = self.seeds, len(self.seeds), self.sampler.batch_size
        shared = None
        if self.fold > 1:
            one_each = seeds[:: self.fold]
            x_P = self.to_window(self.first(one_each), one_each, self.conditioning)
            v_P = self.velocity(x_P, self.sigmas[self.window.start], self.conditioning)
            shared = tuple(each.repeat_interleave(self.fold, 0) for each in (x_P, v_P))
        for begin in range(0, number, size):
            rows = slice(begin, min(begin + size, number))
            texts = self.texts_of(rows)
            if shared is None:
                x_M = self.to_window(self.first(seeds[rows]), seeds[rows], texts)
                v_M = self.velocity(x_M, self.sigmas[self.window.start], texts)
            else:
                x_M, v_M = (each[rows] for each in shared)
            self.final_B[rows] = self.to_end(x_M, v_M, rows, texts).float()
            if finished:
                finished(rows, self.final_B[rows])
        return Trajectory(
            states=self.states_BN,
            sigmas=self.sigmas,
            old_log_prob=self.log_prob_BN,
            final=self.final_B,
            conditioning=self.conditioning,
            num_prompts=self.num_prompts,
            num_evaluations=self.num_evaluations,
            offset=self.window.start,
            shared_start=self.sampler.same_noise,
            velocities=self.velocities_BN,
        )

    def texts_of(self, rows: slice) -> Conditioning:
        """Return the encoded prompts of some samples."""
        index = torch.arange(rows.start, rows.stop, device=self.policy.device) // self.group_size
        return self.conditioning[index]

    def velocity(self, x: Tensor, sigma: Tensor, texts: Conditioning) -> Tensor:
        """Evaluate the policy, in batches."""
        parts, size = [], self.sampler.batch_size
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            rows = x[part]
            parts.append(self.policy.velocity(rows, sigma.expand(len(rows)), texts[part]))
            self.num_evaluations += len(rows)
            if self.progress:
                self.progress(self.num_evaluations, self.expected)
        return torch.cat(parts)

    def first(self, seeds: Sequence[int]) -> Tensor:
        """Draw the noise that samples start from."""
        own = seeds if self.sampler.same_noise else [derive_seed(seed, 1) for seed in seeds]
        return self.sigmas[0] * self.draw(NoiseSource(own))

    def draw(self, source: NoiseSource) -> Tensor:
        """Draw the next noise of each sample."""
        return source.draw(self.policy.latent_shape, self.policy.device)

    def to_window(self, x_R: Tensor, seeds: Sequence[int], texts: Conditioning) -> Tensor:
        """Take the steps before the window."""
        before = NoiseSource([derive_seed(seed, 3) for seed in seeds])
        for i in range(self.window.start):
            here = (self.sigmas[i], self.sigmas[i + 1])
            v_R = self.velocity(x_R, here[0], texts)
            if self.sampler.prefix == "sde":
                step = self.sampler.transition(x_R, v_R, *here)
                x_R = step.sample(noise=self.draw(before)).float()
            else:
                x_R = self.ode(x_R, v_R, *here).mean.float()
        return self.sampler.store.rounded(x_R)

    def to_end(self, x_M: Tensor, v_M: Tensor, rows: slice, texts: Conditioning) -> Tensor:
        """Take the steps from the window on; ``v_M`` is the velocity of its first."""
        sampler, window, sigmas = self.sampler, self.window, self.sigmas
        own = self.seeds[rows]
        inside = NoiseSource([derive_seed(s, 2) for s in own] if sampler.same_noise else own)
        for i in range(window.start, sampler.num_steps):
            here = (sigmas[i], sigmas[i + 1])
            if i == window.stop and sampler.tail is not None:
                self.states_BN[rows, len(window)] = x_M
                # Where the window is empty, the first velocity is known already.
                known = [v_M] if i == window.start else []
                return self.finished(sampler.tail, x_M, sigmas[i:], texts, known)
            if i > window.start:
                v_M = self.velocity(x_M, here[0], texts)
            if i <= window.stop:
                self.states_BN[rows, i - window.start] = x_M
            if i in window and self.velocities_BN is not None:
                self.velocities_BN[rows, i - window.start] = v_M
            if i == sampler.num_steps - 1:
                x_M = predict_clean(x_M, v_M, here[0])
            elif i in window:
                x_M = self.stochastic_step(x_M, v_M, i, rows, inside)
            else:
                x_M = self.ode(x_M, v_M, *here).mean.float()
        return x_M

    def finished(
        self, tail: Tail, x_M: Tensor, sigmas: Tensor, texts: Conditioning, known: list[Tensor]
    ) -> Tensor:
        """Take all remaining steps by another solver; ``known`` holds velocities it begins with."""

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return known.pop(0) if known else self.velocity(x, sigma, texts)

        return tail(velocity, x_M, sigmas)

    def stochastic_step(
        self, x_M: Tensor, v_M: Tensor, i: int, rows: slice, inside: NoiseSource
    ) -> Tensor:
        """Take a step of the window and record its log-density."""
        rounded = self.sampler.store.rounded
        step = self.sampler.transition(x_M, v_M, self.sigmas[i], self.sigmas[i + 1])
        if not step.has_density:
            return rounded(step.mean.float())
        x_M = rounded(step.sample(noise=self.draw(inside)).float())
        self.log_prob_BN[rows, i - self.window.start] = step.log_prob_per_dim(x_M).float()
        return x_M


def measured_speed(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    sampler: Sampler,
    seeds: Sequence[int],
    distance: str = "l1",
) -> Tensor:
    """Roll trajectories out and measure how fast their states move.

    Args:
        policy: Any policy.
        prompts: P prompts.
        sampler: How; its transition may be that of the ODE. Only its window's N steps are measured.
        seeds: One per trajectory, prompt-major; a multiple of P.
        distance: A key of :data:`~chunkgrpo.core.dynamics.DISTANCES`.

    Returns:
        [len(seeds), N] >= 0.
    """
    plain = replace(sampler, same_noise=False, keep_velocities=False, store=Store())
    trajectory = plain.rollout(policy, prompts, len(seeds) // len(prompts), seeds=seeds)
    return DISTANCES[distance](trajectory.states)
