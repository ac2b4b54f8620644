# SPDX-License-Identifier: Apache-2.0
"""Whether a few updates on one prompt raise its reward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from chunkgrpo.core.advantages import group_advantages
from chunkgrpo.doctor.findings import Measured, ok, skipped, warning
from chunkgrpo.doctor.patient import Patient
from chunkgrpo.rewards.scoring import scores_of
from chunkgrpo.runtime.optimizers import make_optimizer
from chunkgrpo.runtime.weights import swapped
from chunkgrpo.types import Experience

ITERATIONS, FASTER = 8, 10


def overfit(patient: Patient) -> Iterator[Measured]:
    """Train copies of the weights on one prompt, ten times as fast as the run will."""
    policy, trainer = patient.policy, patient.trainer
    prompt = patient.prompts[:1]
    size = trainer.budget.group_size
    algorithm = patient.algorithm()
    algorithm.begin(0, patient.generator(9))
    if getattr(algorithm, "second", None) is not None:
        yield skipped("the method samples with a second policy, which this check does not move")
        return
    values = [p.detach().clone() for p in policy.parameters()]
    means, error = [], 0.0
    with patient.no_gradients(), swapped(policy.parameters(), values):
        parameters = policy.parameters()
        rate = FASTER * trainer.optimization.learning_rate
        optimizer = make_optimizer("adamw", parameters, rate)
        for iteration in range(ITERATIONS + 1):
            trajectory = patient.rollout(prompt, size, 10)
            scores = total(patient, policy.decode(trajectory.final), prompt[0].text, size)
            means.append(float(scores.mean()))
            error = float(scores.std()) / math.sqrt(size)
            if iteration == ITERATIONS:
                break
            found = group_advantages(scores, 1, "group_std").values.to(trajectory.device)
            drawn: Generator = patient.generator(11, iteration)
            algorithm.begin(0, patient.generator(9))
            for part in algorithm.losses(policy, Experience(trajectory, found), drawn):
                part.backward()
                if part.ends_update:
                    norm = trainer.optimization.max_grad_norm
                    torch.nn.utils.clip_grad_norm_(parameters, norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
    said = (
        f"reward of {prompt[0].text!r:.60}: {means[0]:.4g} at first, {means[-1]:.4g} after "
        f"{ITERATIONS} iterations at {FASTER} times the learning rate"
    )
    if means[-1] > means[0] + error or max(means[1:]) > means[0] + 2 * error:
        yield ok(said, "a rise")
        return
    yield warning(
        said,
        "a rise",
        "one prompt cannot be overfitted: try another learning rate, and see whether the reward "
        "depends on what the model can change",
    )


def total(patient: Patient, images: Tensor, text: str, size: int) -> Tensor:
    """Return the combined reward of images of one prompt, [B]."""
    scorer = patient.trainer.scorer
    prepared = scorer.prepare(images)
    columns = {
        r.name: scores_of(r, prepared, [text] * len(images), size) for r in scorer.everything
    }
    return scorer.combined(columns).total
