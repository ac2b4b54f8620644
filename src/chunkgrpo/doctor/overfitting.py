# SPDX-License-Identifier: Apache-2.0
"""Whether a few updates on one prompt raise its reward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from chunkgrpo.core.advantages import group_advantages
from chunkgrpo.core.sde import OdeDiffusion, Transition
from chunkgrpo.doctor.findings import Measured, ok, skipped, warning
from chunkgrpo.doctor.patient import Patient
from chunkgrpo.rewards.images import quantised
from chunkgrpo.rewards.scoring import scores_of
from chunkgrpo.runtime.optimizers import make_optimizer
from chunkgrpo.runtime.weights import swapped
from chunkgrpo.types import Experience, Prompt

ITERATIONS, FASTER = 12, 10


def overfit(patient: Patient) -> Iterator[Measured]:
    """Train copies of the weights on one prompt, ten times as fast as the run will."""
    policy, trainer = patient.policy, patient.trainer
    prompt, size = patient.prompts[:1], trainer.budget.group_size
    if getattr(patient.algorithm(), "second", None) is not None:
        yield skipped("the method samples with a second policy, which this check does not move")
        return
    values = [p.detach().clone() for p in policy.parameters()]
    with patient.no_gradients(), swapped(policy.parameters(), values):
        parameters = policy.parameters()
        optimizer = make_optimizer("adamw", parameters, FASTER * trainer.optimization.learning_rate)
        before = evaluated(patient, prompt, size)
        for iteration in range(ITERATIONS):
            # New noise in each: the same would be fitted in place of the reward.
            trajectory = patient.rollout(prompt, size, 10 + iteration)
            scores = total(patient, policy.decode(trajectory.final), prompt, size)
            found = group_advantages(scores, 1, "group_std").values.to(trajectory.device)
            algorithm = patient.begun(10 + iteration)
            drawn = patient.generator(11, iteration)
            for part in algorithm.losses(policy, Experience(trajectory, found), drawn):
                part.backward()
                if part.ends_update:
                    norm = trainer.optimization.max_grad_norm
                    torch.nn.utils.clip_grad_norm_(parameters, norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        after = evaluated(patient, prompt, size)
    gain = (after - before).double()
    error = float(gain.std()) / math.sqrt(size)
    said = (
        f"reward of {prompt[0].text!r:.60} without noise: {before.mean():.4g} at first, "
        f"{after.mean():.4g} after {ITERATIONS} iterations at {FASTER} times the learning rate"
    )
    if float(gain.mean()) > error:
        yield ok(said, "a rise of more than its standard error")
        return
    yield warning(
        said,
        f"a rise of more than its standard error, {error:.2g}",
        "one prompt cannot be overfitted: try another learning rate, and see whether the reward "
        "depends on what the model can change",
    )


def evaluated(patient: Patient, prompt: list[Prompt], size: int) -> Tensor:
    """Return the combined reward of images from the same first noises, sampled without noise."""
    trainer = patient.trainer
    sampler = replace(
        trainer.sampler,
        transition=Transition(OdeDiffusion()),
        window=None,
        prefix="ode",
        tail=None,
        same_noise=False,
    )
    trajectory = sampler.rollout(patient.policy, prompt, size, generator=patient.generator(9))
    return total(patient, patient.policy.decode(trajectory.final), prompt, size)


def total(patient: Patient, images: Tensor, prompt: list[Prompt], size: int) -> Tensor:
    """Return the combined reward of images of one prompt, [B]."""
    scorer = patient.trainer.scorer
    prepared = quantised(images) if scorer.quantise else images
    prompts = prompt * len(images)
    columns = {r.name: scores_of(r, prepared, prompts, size) for r in scorer.everything}
    return scorer.combined(columns).total
