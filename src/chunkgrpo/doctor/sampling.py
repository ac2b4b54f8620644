# SPDX-License-Identifier: Apache-2.0
"""Whether trajectories are sampled as the settings say, by formulas of the doctor's own.

Means, spreads and densities are worked out here from the published formulas in float64, not by the
functions that sampling and training call.

Axis names: B samples, N transitions, D latent elements, P prompts, G samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkgrpo.config.derived import merge_sizes
from chunkgrpo.core.schedules import Native
from chunkgrpo.doctor.findings import Measured, failure, judged, ok, skipped
from chunkgrpo.doctor.patient import Patient

SIGMAS = 5  # standard errors that a statistic of noise may be off
ROUNDING = 1e-4  # relative error of float32 sums
REBUILD = "the schedule is not the one of the settings: rebuild it (config.build.build_sigmas)"


def schedule(patient: Patient) -> Iterator[Measured]:
    """Compare the noise levels with those that the settings stand for."""
    s = patient.config.sampling
    found = patient.trainer.sampler.sigmas.detach().double().cpu()
    stated = stated_sigmas(patient)
    if stated is None:
        stated = found
    bound = f"{len(stated) - 1} steps, strictly decreasing to 0, each within 1e-6 of the formula"
    shown = f"{len(found) - 1} steps from {found[0]:.4g} to {found[-1]:.4g}"
    if len(found) != len(stated):
        yield failure(shown, bound, f"sampling.steps is {s.steps}; {REBUILD}")
        return
    decreasing = bool((found.diff() < 0).all()) and float(found[-1]) == 0
    apart = float((found - stated).abs().max())
    where = int((found - stated).abs().argmax())
    shown += f", largest difference from the formula {apart:.1e}"
    shown += f" at level {where}" if apart > 1e-6 else ""
    yield judged(decreasing and apart <= 1e-6, shown, bound, REBUILD)
    judge = patient.trainer.evaluator.sigmas.detach().double().cpu()
    alike = len(judge) == len(found) and bool(torch.equal(judge, found))
    if not alike:
        yield failure(
            f"evaluations use other noise levels than training: {judge.tolist()[:4]}...",
            "the same levels",
            "hand the sampler's schedule to the evaluator",
        )


def stated_sigmas(patient: Patient) -> Tensor | None:
    """Return the schedule of the settings in float64; None where nothing states one."""
    s = patient.config.sampling
    if isinstance(s.schedule, Native):
        if patient.pipeline is None:
            return None
        levels = patient.pipeline.native_scheduler(s.steps).sigmas.double().cpu()
    else:
        u = 1 - torch.arange(s.steps + 1, dtype=torch.float64) / s.steps
        levels = s.schedule.shift * u / (1 + (s.schedule.shift - 1) * u)
    places = [0]
    for size in merge_sizes(patient.config) or [1] * s.steps:
        places.append(places[-1] + size)
    return levels[places]


# --- one transition -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stated:
    """The formula of a step: mean = keep * x + move * v, and its standard deviation."""

    keep: float
    move: float
    std: float


def stated_step(patient: Patient, sigma: float, after: float) -> Stated:
    r"""Return the formula of the step between two noise levels.

    With :math:`g` the diffusion coefficient and :math:`\Delta` the step, flow and Dance SDE have
    :math:`\mu = x - \Delta [v + g^2 (x + (1-\sigma) v) / (2\sigma)]` and :math:`s = g\sqrt\Delta`;
    Flow-CPS mixes predicted image and noise.
    """
    t, dt = patient.config.sampling.transition, sigma - after
    if t.kind == "cps":
        angle = t.eta * math.pi / 2
        kept = after * math.cos(angle)
        move = -(1 - after) * sigma + kept * (1 - sigma)
        return Stated(1 - after + kept, move, after * math.sin(angle))
    g = 0.0
    if t.kind == "flow":
        g = t.eta * math.sqrt(sigma / (1 - (after if sigma > 1 - 1e-6 else sigma)))
    elif t.kind == "dance":
        g = t.eta
    half = g * g / (2 * sigma)
    return Stated(1 - dt * half, -dt * (1 + half * (1 - sigma)), g * math.sqrt(dt))


def transition(patient: Patient) -> Iterator[Measured]:
    """Compare sampled steps, and the objects that sample and train, with the formulas."""
    trainer = patient.trainer
    yield from kernels(patient)
    if not trainer.sampler.transition.has_density:
        yield skipped("steps are deterministic, without a spread to measure")
        return
    trajectory = patient.trial
    levels = trajectory.trained_sigmas.double().cpu().tolist()
    worst_mean = worst_std = worst_density = 0.0
    step_mean = step_std = step_density = 0
    for i in range(trajectory.num_trained):
        z_BD, std = standardised(patient, i, levels)
        number = z_BD.numel()
        # Rounded states add an error of their own, relative to the state's size.
        extra = rounded(patient, std)
        off_mean = float(z_BD.mean().abs()) / (SIGMAS / math.sqrt(number) + extra)
        off_std = float((z_BD.square().mean() - 1).abs()) / (
            SIGMAS * math.sqrt(2 / number) + ROUNDING + extra
        )
        density_B = -0.5 * z_BD.square().mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)
        told_B = trajectory.old_log_prob[:, i].double().cpu()
        off = float((density_B - told_B).abs().max()) / (1e-3 + extra)
        worst_mean, step_mean = worse(worst_mean, step_mean, off_mean, i)
        worst_std, step_std = worse(worst_std, step_std, off_std, i)
        worst_density, step_density = worse(worst_density, step_density, off, i)
    bound = f"within {SIGMAS} standard errors of the formula at every step"
    fix = "sampling draws other noise than its transition states: look at rollout.Sampler"
    first = trajectory.offset
    yield judged(
        worst_mean <= 1,
        f"mean of the noise of {trajectory.num_trained} steps: at most "
        f"{SIGMAS * worst_mean:.1f} standard errors off, at step {first + step_mean}",
        bound,
        fix,
    )
    yield judged(
        worst_std <= 1,
        f"its variance: at most {SIGMAS * worst_std:.1f} standard errors off, at step "
        f"{first + step_std}",
        bound,
        fix,
    )
    yield judged(
        worst_density <= 1,
        f"stored log-densities: at most {1e-3 * worst_density:.1e} off, at step "
        f"{first + step_density}",
        "within 1e-3 nats an element",
        "the density that training starts from is not that of the sampled step",
    )


def worse(worst: float, where: int, value: float, here: int) -> tuple[float, int]:
    """Return the larger of two values, NaN counting as the largest, and its place."""
    return (worst, where) if value <= worst else (value if value == value else math.inf, here)


def rounded(patient: Patient, std: float) -> float:
    """Return the error that the stored type adds to noise of a standard deviation of 1."""
    if patient.trainer.sampler.store.dtype == "float32":
        return ROUNDING
    size = float(patient.trial.states.abs().float().max())
    return 2**-8 * size / std


def standardised(patient: Patient, i: int, levels: list[float]) -> tuple[Tensor, float]:
    """Return the noise of a step in units of its stated spread, [B, D], and the spread."""
    trajectory, every = patient.trial, slice(None)
    stated = stated_step(patient, levels[i], levels[i + 1])
    x, after, v = (
        each.double().cpu().flatten(1)
        for each in (
            trajectory.state(every, i),
            trajectory.state(every, i + 1),
            trajectory.velocity(every, i),
        )
    )
    return (after - stated.keep * x - stated.move * v) / stated.std, stated.std


def kernels(patient: Patient) -> Iterator[Measured]:
    """Compare what sampling and training call with the formulas, at every step of the schedule."""
    trainer = patient.trainer
    sigmas = trainer.sampler.sigmas.cpu()
    held = {"sampling": trainer.sampler.transition}
    chunks = patient.chunks
    if chunks is not None:
        held["training"] = chunks.transition
    generator = patient.generator(5)
    x, v = (torch.randn(1, 64, generator=generator) for _ in range(2))
    for who, kernel in held.items():
        worst, where, zero = 0.0, 0, []
        for i in range(len(sigmas) - 2):
            stated = stated_step(patient, float(sigmas[i]), float(sigmas[i + 1]))
            step = kernel(x, v, sigmas[i], sigmas[i + 1])
            mean = stated.keep * x.double() + stated.move * v.double()
            scale = float(mean.abs().max())
            off = float((step.mean.double() - mean).abs().max()) / scale
            off = max(off, abs(float(step.std.double().max()) - stated.std) / max(stated.std, 1e-9))
            worst, where = worse(worst, where, off if math.isfinite(off) else math.inf, i)
            zero += [i] if kernel.has_density and not bool((step.std > 0).all()) else []
        if zero:
            yield failure(
                f"steps {zero} have a spread of 0 where a density is asked for",
                "above 0",
                "raise sampling.transition.eta, or leave these steps out of the window",
            )
        yield judged(
            worst <= ROUNDING,
            f"mean and spread of the transition of {who}: largest relative error {worst:.1e}"
            + (f", at step {where}" if worst > ROUNDING else ""),
            f"at most {ROUNDING:g}",
            f"the transition of {who} is not sampling.transition of the settings",
        )


# --- noise --------------------------------------------------------------------------------------


def noise(patient: Patient) -> Iterator[Measured]:
    """Look for noise that is shared where it should not be, and the reverse."""
    trajectory, same = patient.trial, patient.config.sampling.same_noise
    yield from first_states(patient)
    if not patient.trainer.sampler.transition.has_density:
        yield ok("the steps draw no noise")
        return
    levels = trajectory.trained_sigmas.double().cpu().tolist()
    z_NBD = torch.stack(
        [standardised(patient, i, levels)[0] for i in range(trajectory.num_trained)]
    )
    steps, samples, elements = z_NBD.shape
    flat_BX = z_NBD.transpose(0, 1).flatten(1)
    among_samples = correlation(flat_BX)
    bound = correlation_bound(steps * elements, samples)
    yield judged(
        among_samples <= bound,
        f"largest correlation of the noise of two images: {among_samples:.3f}",
        f"at most {bound:.3f}, that of independent noise",
        "images of one group explore alike, so that their rewards say nothing: give every sample "
        "its own random stream",
    )
    if steps > 1:
        among_steps = correlation(z_NBD.flatten(1))
        bound = correlation_bound(samples * elements, steps)
        yield judged(
            among_steps <= bound,
            f"of two steps: {among_steps:.3f}",
            f"at most {bound:.3f}, that of independent noise",
            "a step repeats the noise of another one: do not seed a stream anew in every step",
        )
    yield ok(f"images of a prompt {'share' if same else 'do not share'} their first state")


def first_states(patient: Patient) -> Iterator[Measured]:
    """Check which images begin alike."""
    trajectory, same = patient.trial, patient.config.sampling.same_noise
    start_BD = trajectory.state(slice(None), 0).double().cpu().flatten(1)
    start_PGD = start_BD.unflatten(0, (trajectory.num_prompts, -1))
    spread = float((start_PGD - start_PGD[:, :1]).abs().max())
    if same and spread > 0:
        yield failure(
            f"images of a prompt begin up to {spread:.2g} apart",
            "one first state for each prompt, as sampling.same_noise asks for",
            "start a group from the noise of its first sample",
        )
    if not same and trajectory.group_size > 1:
        equal = (start_PGD[:, 1:] == start_PGD[:, :1]).flatten(2).all(2).sum()
        if equal:
            yield failure(
                f"{int(equal)} images begin exactly as another one of their prompt",
                "a first state of its own for each image, as sampling.same_noise false asks for",
                "derive the first noise from each sample's own seed",
            )
    firsts_PD = start_PGD[:, 0]
    apart = firsts_PD.unique(dim=0)
    if len(apart) < len(firsts_PD):
        yield failure(
            f"{len(firsts_PD) - len(apart)} prompts begin exactly as another one",
            "different first states",
            "derive seeds from the number of the sample, not from that within its group",
        )


def correlation(rows: Tensor) -> float:
    """Return the largest absolute correlation of two rows; infinity where one is not finite."""
    unit = torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    found = (unit @ unit.T).fill_diagonal_(0).abs().max()
    return float(found) if bool(found.isfinite()) else math.inf


def correlation_bound(number: int, rows: int) -> float:
    """Return the largest correlation that independent noise may show among some rows."""
    return min(0.95, (SIGMAS + math.sqrt(2 * math.log(max(2, rows)))) / math.sqrt(number))
