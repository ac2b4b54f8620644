# SPDX-License-Identifier: Apache-2.0
"""Where gradients arrive, and whether the reference is the base.

Weights are perturbed while these checks are made, by swapping their storage: half of a LoRA is
zeros at first, which hides its other half, and a policy that is its own reference has a divergence
of 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.core.kl import NoKl
from chunkgrpo.doctor.findings import Measured, failure, judged, ok, skipped
from chunkgrpo.doctor.patient import Gradient, Patient
from chunkgrpo.doctor.ratios import larger, relative
from chunkgrpo.doctor.sampling import stated_step
from chunkgrpo.runtime.weights import swapped
from chunkgrpo.types import Trajectory

FEW = 2
"""Prompts, and images of each, that gradients are taken of."""

LOST = "something between the weights and the loss is detached, or computed without gradients"

PERTURBED = 1
"""Number of the rollout with perturbed weights."""

MOST = 16
"""Weights without a gradient that are looked at one by one."""


def perturbed_rollout(patient: Patient) -> Trajectory:
    """Sample a few images with the present, perturbed weights."""
    return patient.rollout(patient.prompts[:FEW], min(FEW, patient.group_size), PERTURBED)


def uses_reference(patient: Patient) -> bool:
    """Whether the objective pulls to the reference."""
    kl = patient.config.objective.kl
    return bool(getattr(kl, "weight", kl))


# --- the reference ------------------------------------------------------------------------------


def reference(patient: Patient) -> Iterator[Measured]:
    """Compare the reference with the untrained policy, before and after the weights change."""
    if not uses_reference(patient):
        yield skipped("objective.kl is off: no reference is evaluated")
        return
    base = velocity(patient)
    with patient.policy.reference():
        off = relative(velocity(patient), base)
    bound = patient.repeated
    yield judged(
        off <= bound,
        f"before any update the reference's prediction differs from the policy's by {off:.1e}",
        f"at most {bound:.1e}",
        "the reference is not the model that training starts from",
    )
    with patient.perturbed():
        moved = relative(velocity(patient), base)
        with patient.policy.reference():
            off = relative(velocity(patient), base)
        back = relative(velocity(patient), base)
    yield judged(
        off <= bound and moved > 0,
        f"with perturbed weights the prediction moves by {moved:.1e}, the reference's by {off:.1e}",
        f"the latter at most {bound:.1e}",
        "the reference follows the trained weights: it must have weights of its own",
    )
    yield judged(
        abs(back - moved) <= bound * max(1.0, moved),
        f"after the reference the policy is the perturbed one again: {back:.1e}",
        f"{moved:.1e}",
        "leaving the reference must bring the trained weights back",
    )


@torch.no_grad()
def velocity(patient: Patient) -> Tensor:
    """Return the present policy's velocities at a few latents of the trial."""
    trajectory = patient.trial
    rows = slice(0, min(2, trajectory.num_samples))
    middle = trajectory.num_trained // 2
    sigma = trajectory.trained_sigmas[middle].expand(rows.stop)
    texts = trajectory.conditioning_of(rows)
    return patient.policy.velocity(trajectory.state(rows, middle), sigma, texts).float()


# --- the pull to the reference ------------------------------------------------------------------


def kl_gradient(patient: Patient) -> Iterator[Measured]:
    """Take the gradient of the pull to the reference alone, at perturbed weights."""
    if not uses_reference(patient):
        yield skipped("objective.kl is off")
        return
    with patient.perturbed():
        trajectory = perturbed_rollout(patient)
        on, off = (
            patient.gradient(trajectory, PERTURBED, 0.0, **pull(patient, w)) for w in (1.0, 0.0)
        )
        told, expected = told_divergence(on), expected_divergence(patient, trajectory)
    norm = difference(on, off)
    yield judged(
        norm > 0 and math.isfinite(norm),
        f"gradient of the pull to the reference, at perturbed weights: norm {norm:.2e}",
        "more than 0",
        "the divergence is detached, or has no weight: it must keep its gradient",
    )
    if told is None or expected is None:
        return
    apart = abs(math.log(max(told, 1e-30) / max(expected, 1e-30)))
    yield judged(
        apart <= math.log(2),
        f"the loss's mean KL to the reference is {told:.2e}, worked out apart {expected:.2e}",
        "within a factor of 2",
        "the loss compares the policy with itself: weights that are swapped while autocast keeps "
        "casts of the former ones need torch.clear_autocast_cache()",
    )


def pull(patient: Patient, weight: float) -> dict[str, Any]:
    """Return the changes of the loss that give its pull a weight."""
    kl = patient.config.objective.kl
    if not hasattr(kl, "weight"):
        return {"kl": weight}
    return {"kl": replace(kl, weight=weight) if weight else NoKl()}  # type: ignore[arg-type]


def told_divergence(gradient: Gradient) -> float | None:
    """Return the mean divergence that the loss reports."""
    for name in ("reference_kl", "reference_gap"):
        found = gradient.column(name)
        if found is not None:
            return float(found.double().mean())
    return None


@torch.no_grad()
def expected_divergence(patient: Patient, trajectory: Trajectory) -> float | None:
    r"""Return the mean KL of the policy's transitions to the reference's, over all pairs.

    .. math:: KL = \frac{(\partial\mu/\partial v)^2\, mean(v - v_{ref})^2}{2 s^2}

    with both velocities from calls of their own, outside any context but the reference's.
    """
    if patient.chunks is None:
        return None
    levels = trajectory.trained_sigmas.double().cpu().tolist()
    every, found = slice(None), []
    texts = trajectory.conditioning_of(every)
    torch.clear_autocast_cache()
    for i in range(trajectory.num_trained):
        x, sigma = trajectory.state(every, i), trajectory.trained_sigmas[i]
        sigma = sigma.expand(len(x))
        v = patient.policy.velocity(x, sigma, texts)
        with patient.policy.reference():
            torch.clear_autocast_cache()
            v_ref = patient.policy.velocity(x, sigma, texts)
        stated = stated_step(patient, levels[i], levels[i + 1])
        gap = float((v.double() - v_ref.double()).square().mean())
        found.append(stated.move**2 * gap / (2 * stated.std**2))
    return trained_mean(patient, found)


def trained_mean(patient: Patient, by_step: list[float]) -> float:
    """Average over the steps, as often as the selection trains each."""
    algorithm = patient.begun(PERTURBED)
    plan, ones = algorithm.present, torch.ones(512, len(by_step))
    chosen = algorithm.selection(plan, ones, patient.generator(8))
    counts_C = torch.bincount(chosen.flatten(), minlength=plan.num_chunks).double()
    counts_N = counts_C[plan.chunk_of_step]
    return float((torch.tensor(by_step, dtype=torch.float64) * counts_N).sum() / counts_N.sum())


def difference(first: Gradient, second: Gradient) -> float:
    """Return the norm of the difference of two gradients."""
    total = 0.0
    for name, one in first.by_name.items():
        other = second.by_name[name]
        each = [g for g in (one, other) if g is not None]
        if not each:
            continue
        gap = each[0].double() - each[1].double() if len(each) == 2 else each[0].double()
        total += float(gap.square().sum())
    return math.sqrt(total) if math.isfinite(total) else math.inf


# --- where gradients arrive ---------------------------------------------------------------------


def gradients(patient: Patient) -> Iterator[Measured]:
    """Back-propagate the loss at perturbed weights; see which weights got a gradient."""
    yield from same_weights(patient)
    with patient.perturbed():
        found = patient.gradient(perturbed_rollout(patient), PERTURBED, 1.0)
        sizes = {n: magnitude(g) for n, g in found.by_name.items()}
        idle = [n for n, size in sizes.items() if size == 0]
        missed = effective(patient, idle)
    endless = [n for n, size in sizes.items() if not math.isfinite(size)]
    if endless:
        yield failure(
            f"the gradient of {len(endless)} weights is not finite, such as {endless[0]}",
            "finite",
            "lower the learning signal: a wider precision, or another form of ratio",
        )
    said = f"the loss's gradient reaches {len(sizes) - len(idle)} of {len(sizes)} trained weights"
    if idle and not missed:
        said += f"; the prediction does not depend on the others, such as {idle[0]}"
    yield judged(
        not missed and len(idle) < len(sizes),
        said + (f", not {missed[0]}, on which the prediction depends" if missed else ""),
        "every weight that the prediction depends on",
        LOST,
    )
    if found.strangers:
        yield failure(
            f"{len(found.strangers)} weights that are not trained get a gradient, such as "
            f"{found.strangers[0]}",
            "0",
            "freeze them (requires_grad_(False)), or have the policy list them as parameters",
        )


def effective(patient: Patient, names: list[str]) -> list[str]:
    """Return those of some weights whose values the prediction depends on.

    They are changed all at once, and one by one only if that shows an effect.
    """
    named = patient.policy.named_parameters()

    def changes(some: list[str]) -> bool:
        chosen = [named[name] for name in some]
        values = [p.detach() + 0.1 * (1 + p.detach().abs()) for p in chosen]
        before = velocity(patient)
        with swapped(chosen, values):
            return not torch.equal(velocity(patient), before)

    if not names or not changes(names):
        return []
    return [name for name in names[:MOST] if changes([name])] or names


def magnitude(gradient: Tensor | None) -> float:
    """Return the largest absolute value; 0 where there is no gradient."""
    if gradient is None:
        return 0.0
    value = float(gradient.abs().max())
    return larger(value, 0.0)


def same_weights(patient: Patient) -> Iterator[Measured]:
    """Check that optimizer and average hold the weights that the policy trains."""
    trainer = patient.trainer
    own = patient.policy.parameters()
    stepped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    if sorted(stepped) != sorted(map(id, own)):
        yield failure(
            f"the optimizer holds {len(stepped)} weights, the policy trains {len(own)}, and they "
            "are not the same",
            "the policy's parameters",
            "make the optimizer over policy.parameters()",
        )
    frozen = [n for n, p in patient.policy.named_parameters().items() if not p.requires_grad]
    if frozen:
        yield failure(
            f"{len(frozen)} weights that the policy trains are frozen, such as {frozen[0]}",
            "requires_grad of every trained weight",
            "leave them out of parameters(), or call requires_grad_(True)",
        )
    average = trainer.ema.values
    apart = len(average) != len(own) or any(
        a.shape != p.shape or not torch.equal(a, p.detach())
        for a, p in zip(average, own, strict=True)
    )
    if apart:
        yield failure(
            "the averaged weights are not those that training starts from",
            "equal before any update",
            "make the average after the weights are in place",
        )
    else:
        yield ok(f"optimizer and average hold the policy's {len(own)} weights")
