# SPDX-License-Identifier: Apache-2.0
"""Whether training evaluates the policy that sampled.

Axis names: B samples, N transitions, C chunks, D latent elements, Q pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.core.ratios import ratio_scale, transition_scale
from chunkgrpo.core.step_weights import INNER_WEIGHTS
from chunkgrpo.doctor.findings import Measured, judged, ok, skipped, warning
from chunkgrpo.doctor.patient import Gradient, Patient
from chunkgrpo.doctor.sampling import stated_step


def modes(patient: Patient) -> Iterator[Measured]:
    """Evaluate the network twice, with gradients and without, on the same latents."""
    trajectory, policy = patient.trial, patient.policy
    number = min(4, trajectory.num_samples)
    rows = slice(0, number)
    last = trajectory.num_trained - 1
    places = sorted({0, last // 2, last})
    again = grad = 0.0
    for i in places:
        x = trajectory.state(rows, i)
        sigma = trajectory.trained_sigmas[i].expand(number)
        texts = trajectory.conditioning_of(rows)
        with torch.no_grad():
            first, second = (policy.velocity(x, sigma, texts).float() for _ in range(2))
        with torch.enable_grad():
            third = policy.velocity(x, sigma, texts).detach().float()
        again = larger(again, relative(second, first))
        grad = larger(grad, relative(third, first))
    bound = patient.repeated
    dropping = dropouts(patient)
    yield judged(
        again <= bound and not dropping,
        f"two calls with the same latents: relative difference {again:.1e}"
        + (
            f"; active dropout in {len(dropping)} modules, such as {dropping[0]}"
            if dropping
            else ""
        ),
        f"at most {bound:.1e}, and no active dropout",
        "the network draws random numbers: put it into evaluation mode (module.eval()) and set "
        "its dropout to 0",
    )
    yield judged(
        grad <= bound,
        f"with gradients and without: relative difference {grad:.1e}",
        f"at most {bound:.1e}",
        "training and sampling run different networks: use one mode, one set of weights and one "
        "precision for both",
    )


def dropouts(patient: Patient) -> list[str]:
    """Return the names of the transformer's dropouts that are active."""
    pipe = patient.pipeline
    if pipe is None:
        return []
    kinds = torch.nn.modules.dropout._DropoutNd
    named = pipe.pipe.transformer.named_modules()
    return [name for name, m in named if isinstance(m, kinds) and m.training and m.p > 0]


def larger(first: float, second: float) -> float:
    """Return the larger number; infinity where one is not finite."""
    return max(first, second) if math.isfinite(first) and math.isfinite(second) else math.inf


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of a difference in units of what was expected."""
    scale = expected.double().norm().clamp(min=1e-12)
    value = float((found.double() - expected.double()).norm() / scale)
    return value if math.isfinite(value) else math.inf


def ratio_one(patient: Patient) -> Iterator[Measured]:
    """Run the loss of one iteration without a step, and look at its ratios."""
    gradient = patient.gradient(patient.trial, 0, 1.0)
    log_ratio = gradient.column("log_ratio")
    if log_ratio is None:
        yield skipped(f"objective.kind {patient.config.objective.kind!r} has no ratios")
        return
    if patient.chunks is None:
        worst = largest(log_ratio)
        yield judged(
            worst <= 10 * patient.rounding,
            f"{len(log_ratio)} ratios differ from 1 by at most {worst:.1e}",
            f"at most {10 * patient.rounding:.0e}, what rounding explains",
            "the loss evaluates another policy than the one before its first update",
        )
        return
    step = gradient.column("step")
    assert step is not None
    allowed_N = rounding_bounds(patient)
    excess = log_ratio.abs().double() / allowed_N[step]
    worst = int(torch.where(excess.isfinite(), excess, math.inf).argmax())
    by_step = [largest(log_ratio[step == i]) for i in range(len(allowed_N)) if (step == i).any()]
    offset = patient.trial.offset
    yield judged(
        bool(excess[worst] <= 1),
        f"log-ratios of {len(log_ratio)} (image, step) pairs: largest {largest(log_ratio):.1e}, by "
        f"step {', '.join(f'{each:.0e}' for each in by_step)}",
        f"{allowed_N[step[worst]]:.0e} at step {offset + int(step[worst])}, what rounding explains",
        "the policy in training is not the one that sampled: look for another mode, precision, "
        "noise level or prompt",
    )
    yield against_clip(patient, patient.begun(0), gradient)


def largest(values: Tensor) -> float:
    """Return the largest absolute value; infinity where one is not finite."""
    found = float(values.abs().max())
    return found if math.isfinite(found) else math.inf


def rounding_bounds(patient: Patient) -> Tensor:
    r"""Return the largest log-ratio that rounding of the velocity explains, [N].

    A velocity that is off by a relative :math:`\epsilon` moves the mean by
    :math:`r = \epsilon\, |\partial\mu/\partial v|\, rms(v) / s` standard deviations, which changes
    the log-density of an element by about :math:`r^2/2`, plus noise of :math:`r/\sqrt D`.
    """
    trajectory = patient.trial
    levels = trajectory.trained_sigmas.double().cpu().tolist()
    elements = trajectory.final[0].numel()
    bounds = []
    for i in range(trajectory.num_trained):
        stated = stated_step(patient, levels[i], levels[i + 1])
        size = float(trajectory.velocity(slice(None), i).float().square().mean().sqrt())
        moved = patient.rounding * abs(stated.move) * size / stated.std
        # Sums of float32 have an error of their own.
        bounds.append(6 * moved / math.sqrt(elements) + moved**2 + 1e-6)
    return torch.tensor(bounds, dtype=torch.float64)


def chunk_log_ratios(patient: Patient, algorithm: ChunkGRPO, gradient: Gradient) -> Tensor:
    """Return the log-ratio of every chunk whose steps were all evaluated, [any number]."""
    trajectory, plan = patient.trial, algorithm.present
    shape = (trajectory.num_samples, trajectory.num_trained)
    table_BN = torch.full(shape, math.nan, dtype=torch.float64)
    sample, step, value = (gradient.column(name) for name in ("sample", "step", "log_ratio"))
    assert sample is not None and step is not None and value is not None
    table_BN[sample, step] = value.double()
    sigmas, kernel = trajectory.sigmas[:-1].cpu(), algorithm.transition
    std_N = kernel.std(sigmas[:-1], sigmas[1:])
    scale_N = ratio_scale(algorithm.loss.ratio, std_N, trajectory.final[0].numel())
    scale_N = scale_N * INNER_WEIGHTS[algorithm.loss.inner_weights](
        transition_scale(kernel, sigmas)
    )
    window = slice(trajectory.offset, trajectory.offset + trajectory.num_trained)
    ratios_BC = plan.reduce(scale_N[window].double() * table_BN)
    return ratios_BC[ratios_BC.isfinite()]


def against_clip(patient: Patient, algorithm: ChunkGRPO, gradient: Gradient) -> Measured:
    """Compare the ratios of chunks with the trust region."""
    ratios = chunk_log_ratios(patient, algorithm, gradient)
    told = gradient.column("chunk_log_ratio")
    if told is not None:
        ratios = torch.cat([ratios, told.double()])
    worst = largest(ratios)
    shown = f"ratios of chunks differ from 1 by at most {worst:.1e}"
    trust = patient.config.objective.trust  # type: ignore[union-attr] # of chunks only
    width = min(getattr(trust, "low", math.inf), getattr(trust, "high", math.inf))
    if math.isinf(width):
        return ok(f"{shown}; the trust region {trust.kind!r} has no clip range")
    typical = largest(ratios.square().mean().sqrt())
    shown += (
        f", {100 * worst / width:.2g} % of the clip range {width:g}, and by {typical:.1e} in the "
        "root mean square"
    )
    bound = "less than the clip range, and half of it in the root mean square"
    if worst < width and typical < width / 2:  # beyond, one in twenty
        return ok(shown, bound)
    return warning(
        shown,
        bound,
        "rounding decides what is clipped: set objective.anchor to replay, model.precision to "
        "fp32, or widen objective.trust",
    )
