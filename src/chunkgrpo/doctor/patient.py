# SPDX-License-Identifier: Apache-2.0
"""A run that is about to start, and the few images that it is examined with.

Nothing of the run changes: random numbers are drawn from generators of their own, algorithms are
copied, weights are perturbed by swapping their storage, and gradients are removed again.

Axis names: P prompts, B samples, N transitions, D latent elements.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.config import Config
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.runtime.weights import swapped
from chunkgrpo.train.loop import Trainer
from chunkgrpo.types import Experience, Prompt, Trajectory

PROMPTS, GROUP = 4, 4
"""Prompts, and images of each, that a run is examined with unless thoroughly."""

SEED = 7_041_776
"""Part of the seed of everything that the doctor draws."""

LOW_PRECISION, HIGH_PRECISION = 2.0**-5, 1e-4
"""Relative error of a velocity that rounding explains, with bfloat16 networks and with others."""

LOW_REPEATED, HIGH_REPEATED = 2.0**-8, 1e-5
"""The same between two calls with equal batches, where most kernels agree to the last bit."""


@dataclass
class Patient:
    """What checks look at.

    Attributes:
        trainer: The run.
        config: What it shall be.
        thorough: Whether a whole rollout is examined.
        seconds: Seconds of each check so far.
    """

    trainer: Trainer
    config: Config
    thorough: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self.trainer.policy

    @property
    def pipeline(self) -> PipelinePolicy | None:
        """The policy where it is a diffusers pipeline."""
        policy = self.trainer.policy
        return policy if isinstance(policy, PipelinePolicy) else None

    @property
    def low(self) -> bool:
        """Whether the network computes in less than float32."""
        return self.pipeline is not None and self.pipeline.dtype != torch.float32

    @property
    def rounding(self) -> float:
        """Relative error of a velocity that rounding explains."""
        return LOW_PRECISION if self.low else HIGH_PRECISION

    @property
    def repeated(self) -> float:
        """The same between two calls with equal batches."""
        return LOW_REPEATED if self.low else HIGH_REPEATED

    @property
    def chunks(self) -> ChunkGRPO | None:
        """A copy of the algorithm where it trains chunks."""
        algorithm = self.algorithm()
        return algorithm if isinstance(algorithm, ChunkGRPO) else None

    def algorithm(self, **changes: Any) -> Any:
        """Return a copy of the algorithm, with other fields of its loss where given.

        What the copy chooses for an iteration stays with the copy; states are shared and not
        changed, as long as nobody calls its ``finish``.
        """
        found = copy.copy(self.trainer.algorithm)
        if changes:
            found.loss = replace(found.loss, **changes)  # type: ignore[attr-defined]
        return found

    def generator(self, *parts: int) -> Generator:
        """Return a source of random numbers that nothing else draws from."""
        return Generator().manual_seed(derive_seed(self.trainer.budget.seed, SEED, *parts))

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Different prompts of the first iterations."""
        wanted = self.trainer.budget.prompts if self.thorough else PROMPTS
        found: dict[str, Prompt] = {}
        for iteration in range(min(self.trainer.budget.iterations, wanted)):
            for prompt in self.trainer.prompts_of(iteration):
                found.setdefault(prompt.text, prompt)
        return list(found.values())[: min(wanted, self.trainer.budget.prompts)]

    @property
    def group_size(self) -> int:
        """Images of each prompt."""
        size = self.trainer.budget.group_size
        return size if self.thorough else min(size, GROUP)

    @cached_property
    def trial(self) -> Trajectory:
        """A rollout by the policy as it is."""
        return self.rollout(self.prompts, self.group_size, 0)

    @cached_property
    def images(self) -> Tensor:
        """The images of the trial, [B, 3, H, W]."""
        size = self.trainer.sampler.batch_size
        return torch.cat([self.policy.decode(part) for part in self.trial.final.split(size)])

    def rollout(self, prompts: list[Prompt], group_size: int, number: int) -> Trajectory:
        """Sample as training does; velocities are stored too."""
        algorithm, generator = self.algorithm(), self.generator(1, number)
        request = algorithm.begin(0, generator)  # as in begun
        sampler: Sampler = replace(
            self.trainer.sampler, window=request.window, keep_velocities=True
        )
        with algorithm.sampling(self.policy):
            return sampler.rollout(self.policy, prompts, group_size, generator=generator)

    def begun(self, number: int, **changes: Any) -> Any:
        """Return a copy of the algorithm that has chosen what a rollout of that number sampled."""
        found = self.algorithm(**changes)
        found.begin(0, self.generator(1, number))
        return found

    def experience(self, trajectory: Trajectory, scale: float = 1.0) -> Experience:
        """Return a trajectory with random advantages, all of them different from 0."""
        drawn = torch.randn(trajectory.num_samples, generator=self.generator(2))
        away = torch.where(drawn < 0, drawn - 0.1, drawn + 0.1)
        return Experience(trajectory, (scale * away).to(trajectory.device))

    def gradient(
        self, trajectory: Trajectory, number: int, scale: float, **changes: Any
    ) -> Gradient:
        """Back-propagate all pieces of the loss, without an optimizer step.

        Args:
            trajectory: Of the present weights.
            number: Of its rollout.
            scale: Factor of the advantages; with 0 nothing but penalties has a gradient.
            changes: Fields of the loss.
        """
        algorithm, generator = self.begun(number, **changes), self.generator(3)
        parts = []
        experience = self.experience(trajectory, scale)
        with self.no_gradients():
            for part in algorithm.losses(self.policy, experience, generator):
                if part.loss.requires_grad:  # a loss without a gradient is found by its absence
                    part.backward()
                parts.append({k: v.detach() for k, v in part.diagnostics.items()})
            named = self.policy.named_parameters()
            found = {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}
            strangers = [n for n, p in self.frozen().items() if p.grad is not None]
        return Gradient(found, strangers, parts)

    def frozen(self) -> dict[str, Tensor]:
        """Every weight of the policy's networks that is not trained, by name."""
        trained = {id(p) for p in self.policy.parameters()}
        pipe = getattr(self.policy, "pipe", None)
        parts = {} if pipe is None else dict(pipe.components)
        found = {
            f"{name}.{key}": parameter
            for name, module in parts.items()
            if isinstance(module, torch.nn.Module)
            for key, parameter in module.named_parameters()
        }
        if pipe is None:
            found = {k: v for k, v in vars(self.policy).items() if torch.is_tensor(v)}
        return {name: p for name, p in found.items() if id(p) not in trained}

    @contextmanager
    def no_gradients(self) -> Iterator[None]:
        """Take the gradients away, and put them back at the end."""
        every = [*self.policy.parameters(), *self.frozen().values()]
        kept = [p.grad for p in every]
        for p in every:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in zip(every, kept, strict=True):
                p.grad = grad

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Inside this context every trained weight differs a little from what it was."""
        generator, parameters = self.generator(4), self.policy.parameters()
        values = []
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            # Half of a LoRA is zeros, and has to differ from them for the other half to count.
            typical = p.detach().float().square().mean().sqrt()
            size = torch.where(typical > 0, 0.03 * typical, 0.01).to(p.dtype)
            values.append(p.detach() + size * noise)
        with swapped(parameters, values):
            yield


@dataclass(frozen=True)
class Gradient:
    """The gradient of a loss.

    Attributes:
        by_name: Of each trained parameter; None where there is none.
        strangers: Names of parameters that are not trained and have one.
        diagnostics: Of the loss's pieces.
    """

    by_name: dict[str, Tensor | None]
    strangers: list[str]
    diagnostics: list[dict[str, Tensor]]

    def column(self, name: str) -> Tensor | None:
        """Return a diagnostic of all pieces, on the CPU; None where no piece has it."""
        found = [d[name].flatten().cpu() for d in self.diagnostics if name in d]
        return torch.cat(found) if found else None


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global random states of torch, numpy and Python as they are."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
