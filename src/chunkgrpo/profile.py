# SPDX-License-Identifier: Apache-2.0
"""How fast a policy's trajectories move, whether that depends on the prompt, and where to cut.

Axes: P prompts x S seeds, crossed (seed s draws the same noise for every prompt); N trained steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from chunkgrpo.core.measured_plans import adaptive_plan, explained_variation, optimal_plan
from chunkgrpo.core.plans import PAPER_SIZES, ChunkPlan, equal_plan, paper_plan
from chunkgrpo.core.sde import Kernel
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.report.curves import CurvePanel, save_profile_curves
from chunkgrpo.rollout import measured_speed
from chunkgrpo.runtime.files import atomic_write
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.types import ProgressHook, Prompt

if TYPE_CHECKING:
    from rich.console import Console

PAPER_CHUNKS = len(PAPER_SIZES)
RULES = (
    "optimal", "optimal-4", "adaptive-forward", "adaptive-backward", "adaptive-central", "equal",
    "paper",
)  # fmt: skip
"""Names of the proposals, in the order shown; the paper's plan fits one schedule only."""


LABELS = {
    "l1": "relative L1 change in a step",
    "l2": "relative L2 change in a step",
    "cosine": "cosine distance of a step",
}


# --- measuring -----------------------------------------------------------------------------------


def measure_speed(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    transition: Kernel,
    sigmas: Tensor,
    num_seeds: int,
    *,
    distance: str = "l1",
    seed: int = 0,
    batch_size: int = 64,
    window: range | None = None,
    prefix: str = "ode",
    progress: ProgressHook | None = None,
) -> NDArray:
    """Roll out every prompt with every seed and measure how fast the states move.

    Prompts are rolled out one after another, so that only one prompt's states are held.

    Args:
        policy: Any policy.
        prompts: P of them.
        transition: The sampler; its diffusion may be that of the ODE.
        sigmas: [K+1], the schedule; its N = K-1 trained steps are measured.
        num_seeds: S; seed s is the same noise for every prompt.
        distance: A key of :data:`~chunkgrpo.core.dynamics.DISTANCES`.
        seed: Seed of the seeds.
        batch_size: Most samples in one forward.
        window, prefix: See :func:`~chunkgrpo.rollout.measured_speed`.
        progress: Called after each prompt with (done, total) prompts.

    Returns:
        [P, S, N] float64 >= 0.
    """
    seeds = [derive_seed(seed, s) for s in range(num_seeds)]
    rows = []
    for index, prompt in enumerate(prompts):
        speed_SN = measured_speed(
            policy,
            [prompt],
            transition,
            sigmas,
            seeds,
            distance=distance,
            batch_size=batch_size,
            window=window,
            prefix=prefix,
        )
        rows.append(speed_SN.double().cpu())
        if progress:
            progress(index + 1, len(prompts))
    return torch.stack(rows).numpy()


# --- prompt-invariance ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Where the variance of log speed comes from; the four shares sum to 1.

    Attributes:
        step: Which step of the sampler it is.
        prompt: Which prompt, at a given step.
        seed: Which noise, at a given step.
        residual: Prompt and noise together.
        prompt_std: Standard deviation between prompts, of log speed: 0.01 is one per cent.
    """

    step: float
    prompt: float
    seed: float
    residual: float
    prompt_std: float

    @property
    def sentence(self) -> str:
        """The answer to whether the dynamics depend on the prompt."""
        return (
            f"the step explains {100 * self.step:.1f} % of the variance of log speed, the prompt "
            f"{100 * self.prompt:.2f} %; at a given step, prompts differ by "
            f"{100 * np.expm1(self.prompt_std):.1f} %"
        )


def _mean_squares(values_PSN: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Mean squares of prompts, seeds and their interaction at each step, [N] each."""
    if values_PSN.ndim != 3 or min(values_PSN.shape[:2]) < 2 or not np.isfinite(values_PSN).all():
        raise ValueError(
            f"speeds have shape {values_PSN.shape}; to tell prompts from noise they must be "
            "finite, [P, S, N], of at least 2 prompts and 2 seeds"
        )
    num_prompts, num_seeds, _ = values_PSN.shape
    mean_N = values_PSN.mean((0, 1))
    prompt_PN, seed_SN = values_PSN.mean(1) - mean_N, values_PSN.mean(0) - mean_N
    rest_PSN = values_PSN - mean_N - prompt_PN[:, None] - seed_SN[None]
    return (
        num_seeds * np.square(prompt_PN).sum(0) / (num_prompts - 1),
        num_prompts * np.square(seed_SN).sum(0) / (num_seeds - 1),
        np.square(rest_PSN).sum((0, 1)) / ((num_prompts - 1) * (num_seeds - 1)),
    )


def variance_shares(speed_PSN: ArrayLike) -> Shares:
    r"""Decompose the variance of log speed into step, prompt, seed and residual.

    At each step, :math:`\log L_{psi} = \mu_i + a_{pi} + b_{si} + e_{psi}` with random effects of
    the prompt, the seed and the rest. With the mean squares of the crossed design at step i,
    averaged over the steps,

    .. math:: \sigma_e^2 = MS_e, \quad
              \sigma_a^2 = \max\Big(0, \frac{MS_a - MS_e}{S}\Big), \quad
              \sigma_b^2 = \max\Big(0, \frac{MS_b - MS_e}{P}\Big), \quad
              \sigma_\mu^2 = \frac1N \sum_i (\bar\mu_i - \bar\mu)^2,

    and each share is its variance over the sum of the four. Prompt and seed thus include how they
    change the curve's shape, not only its level. The estimates of the effects are unbiased but for
    the cut at 0: few prompts and seeds do not inflate them. That of the step includes the error of
    the means, which is of the order of the others over P or S.

    Args:
        speed_PSN: Speeds > 0, [P, S, N] with P, S >= 2.

    Returns:
        The shares. A speed that never varies counts as all step.

    Raises:
        ValueError: If a speed is not positive and finite, or there are too few prompts or seeds.

    Reference: Brennan, Generalizability Theory (2001), chapter 3 (the crossed p x i design).
    """
    speed_PSN = np.asarray(speed_PSN, dtype=np.float64)
    if not speed_PSN.size or not speed_PSN.min() > 0:
        raise ValueError(
            "shares of the variance of log speed need speeds above 0; measure with distance l1 or "
            "l2, on a sampler that moves at every step"
        )
    logs_PSN = np.log(speed_PSN)
    num_prompts, num_seeds, _ = logs_PSN.shape if logs_PSN.ndim == 3 else (0, 0, 0)
    of_prompt, of_seed, of_rest = (float(ms.mean()) for ms in _mean_squares(logs_PSN))
    variances = np.array(
        [
            logs_PSN.mean((0, 1)).var(),
            max(0.0, (of_prompt - of_rest) / num_seeds),
            max(0.0, (of_seed - of_rest) / num_prompts),
            of_rest,
        ]
    )
    total = variances.sum()
    shares = variances / total if total > 0 else np.array([1.0, 0.0, 0.0, 0.0])
    return Shares(*(float(share) for share in shares), prompt_std=float(variances[1] ** 0.5))


def crossed_interval(
    values_PSN: ArrayLike, level: float = 0.95
) -> tuple[NDArray, NDArray, NDArray]:
    r"""Mean at each step over prompts and seeds, with an interval that counts both as random.

    .. math:: \bar y_i \pm t_\nu \sqrt{V_i}, \qquad V_i = a_i + b_i + e_i, \qquad
              \nu = \frac{V_i^2}{\frac{a_i^2}{P-1} + \frac{b_i^2}{S-1} + \frac{e_i^2}{(P-1)(S-1)}}

    with :math:`a = \max(0, MS_a - MS_e)/PS` the part of the prompts, b that of the seeds and
    :math:`e = MS_e/PS` (Satterthwaite's degrees of freedom). The trajectories of one prompt, and
    those of one seed, are alike; counting all P S of them as independent would make it too short.

    Args:
        values_PSN: [P, S, N] with P, S >= 2.
        level: Confidence level, inside (0, 1).

    Returns:
        Mean, lower and upper end, [N] each.

    Raises:
        ValueError: If there are too few prompts or seeds.

    Reference: Satterthwaite, Biometrics Bulletin 2 (1946), 110-114.
    """
    from scipy.stats import t as student

    values_PSN = np.asarray(values_PSN, dtype=np.float64)
    of_prompt, of_seed, of_rest = _mean_squares(values_PSN)
    num_prompts, num_seeds, _ = values_PSN.shape
    count = num_prompts * num_seeds
    by_prompt = np.maximum(of_prompt - of_rest, 0.0) / count
    by_seed = np.maximum(of_seed - of_rest, 0.0) / count
    by_rest = of_rest / count
    variance = by_prompt + by_seed + by_rest
    spread = (
        by_prompt**2 / (num_prompts - 1)
        + by_seed**2 / (num_seeds - 1)
        + by_rest**2 / ((num_prompts - 1) * (num_seeds - 1))
    )
    freedom = np.divide(variance**2, spread, out=np.ones_like(variance), where=spread > 0)
    half = student.ppf(0.5 + level / 2, freedom) * np.sqrt(variance)
    mean = values_PSN.mean((0, 1))
    return mean, mean - half, mean + half


# --- proposals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """Chunks that a rule proposes.

    Attributes:
        rule: One of ``RULES``.
        plan: The chunks.
        reason: One sentence.
    """

    rule: str
    plan: ChunkPlan
    reason: str


@dataclass(frozen=True)
class Window:
    """The steps that a recipe samples with noise and trains, where these are not all.

    Attributes:
        size: Number of steps, W.
        places: Every first step that they can have, with its share of the iterations.
        prefix: How the steps before are taken, see :func:`~chunkgrpo.rollout.rollout`.
    """

    size: int
    places: Mapping[int, float]
    prefix: str = "ode"

    def __str__(self) -> str:
        """The steps in words."""
        first = min(self.places)
        if len(self.places) == 1:
            return f"steps {first} to {first + self.size - 1}"
        return (
            f"{self.size} steps that begin at one of {len(self.places)} places, step {first} to "
            f"step {max(self.places)}"
        )


def propose(
    curve: Sequence[float] | NDArray, min_size: int = 4, shares: Sequence[float] = (1.0,)
) -> tuple[Proposal, ...]:
    r"""Cut a curve by every rule that fits it.

    Steps that are now here, now there, have a curve for each place a, and chunks of them have
    sizes relative to their start. These are cut from the geometric mean

    .. math:: \log \bar L_k = \sum_a w_a \log L_{ak}

    and the reasons also say how much they explain at the place that they fit worst.

    Args:
        curve: Mean speed per trained step, [N], or at each place, [A, N]; > 0.
        min_size: Of the adaptive rule, cut to N: groups this small are not cut again.
        shares: Weight w of each place, [A], with sum 1.

    Returns:
        The proposals, in the order of ``RULES``.

    Raises:
        ValueError: If the curve is not positive and finite.
    """
    places_AN = torch.tensor(np.atleast_2d(np.asarray(curve, dtype=np.float64)))
    weights_A1 = torch.tensor(shares, dtype=torch.float64)[:, None]
    curve_N = places_AN[0] if len(places_AN) == 1 else (weights_A1 * places_AN.log()).sum(0).exp()
    num_steps = len(curve_N)
    few = min(PAPER_CHUNKS, num_steps)
    least = min(min_size, num_steps)

    def share(plan: ChunkPlan) -> str:
        text = f"{100 * explained_variation(curve_N, plan):.0f} % of the variation"
        if len(places_AN) == 1:
            return text
        worst = min(explained_variation(place_N, plan) for place_N in places_AN)
        return f"{text} in the mean over the places, {100 * worst:.0f} % at the worst one"

    optimal = optimal_plan(curve_N)
    proposals = [
        Proposal(
            "optimal",
            optimal,
            f"{optimal.num_chunks} is the fewest chunks that explain 95 % of the variation of log "
            f"speed, and no other {optimal.num_chunks} explain more than these: {share(optimal)}.",
        )
    ]
    plan = optimal_plan(curve_N, few)
    proposals.append(
        Proposal("optimal-4", plan, f"No other {few} chunks explain more: {share(plan)}.")
    )
    for difference in ("forward", "backward", "central"):
        plan = adaptive_plan(curve_N, least, difference)
        proposals.append(
            Proposal(
                f"adaptive-{difference}",
                plan,
                f"The published rule: cut where {difference} differences change sign, and again "
                f"in groups of more than {least}; explains {share(plan)}.",
            )
        )
    plan = equal_plan(-(-num_steps // few), num_steps)
    proposals.append(
        Proposal(
            "equal", plan, f"No measurement and no reweighting of steps; explains {share(plan)}."
        )
    )
    if num_steps == sum(PAPER_SIZES):
        plan = paper_plan(num_steps)
        proposals.append(
            Proposal("paper", plan, f"The published chunks fit; here they explain {share(plan)}.")
        )
    return tuple(proposals)


def carried_indices(old: ChunkPlan, indices: Sequence[int], new: ChunkPlan) -> tuple[int, ...]:
    """Chunks of a new plan that hold the steps that listed chunks of an old one held.

    Args:
        old: The plan whose chunks are listed.
        indices: Its trained chunks.
        new: Another plan of the same steps.

    Returns:
        The new chunks at least half of whose steps were trained, or else the one with the largest
        share.
    """
    trained = torch.zeros(old.num_chunks, dtype=torch.float64)
    trained[list(indices)] = 1
    shares = new.reduce(old.expand(trained)).tolist()
    kept = tuple(chunk for chunk, share in enumerate(shares) if share >= 0.5)
    return kept or (max(range(new.num_chunks), key=shares.__getitem__),)


# --- one sampler, several samplers ---------------------------------------------------------------


@dataclass(frozen=True)
class SamplerProfile:
    """What was measured under one sampler.

    Attributes:
        name: The sampler, with its coefficient.
        speed: [P, S, N].
        mean, low, high: [N], mean speed and its 95 % interval over prompts and seeds.
        shares: Where its variance comes from.
        proposals: Where to cut it.
        inside: First step of a window to the mean speed inside it, [W], where proposals are for
            a window; else empty.
    """

    name: str
    speed: NDArray
    mean: NDArray
    low: NDArray
    high: NDArray
    shares: Shares
    proposals: tuple[Proposal, ...]
    inside: Mapping[int, NDArray] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Step at which the proposals begin; of a window that moves, its first place."""
        return min(self.inside, default=0)

    def proposal(self, rule: str) -> Proposal:
        """Return the proposal of a rule.

        Raises:
            ValueError: If there is none for this schedule.
        """
        found = {proposal.rule: proposal for proposal in self.proposals}
        if rule not in found:
            raise ValueError(f"no chunks by the rule {rule!r} here; there are: {', '.join(found)}")
        return found[rule]


def profile_policy(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    sigmas: Tensor,
    num_seeds: int,
    samplers: Mapping[str, Kernel],
    *,
    distance: str = "l1",
    min_size: int = 4,
    window: Window | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: ProgressHook | None = None,
) -> tuple[SamplerProfile, ...]:
    """Profile a policy under several samplers, with the same prompts and initial noise.

    Args:
        policy: Any policy.
        prompts: P >= 2.
        sigmas: [K+1], the schedule.
        num_seeds: S >= 2.
        samplers: Name of each sampler to its transition.
        distance: A key of :data:`~chunkgrpo.core.dynamics.DISTANCES`.
        min_size: See :func:`propose`.
        window: What chunks are proposed for; all steps where None. The first sampler is then
            measured once more, at each place, with noise in the window alone: long noisy steps do
            not quite keep the flow's marginals, so a window moves faster where the ODE led to it.
            Of the others, the window's part of the whole curve is cut.
        seed: Seed of everything.
        batch_size: Most samples in one forward.
        progress: Called with (done, total) prompts over all samplers.

    Returns:
        A profile per sampler, in order.

    Raises:
        ValueError: If there are fewer than two prompts or seeds, or a speed is 0.
    """
    if len(prompts) < 2 or num_seeds < 2:
        raise ValueError(
            f"{len(prompts)} prompts and {num_seeds} seeds; telling the prompt from the noise "
            "needs at least 2 of each"
        )
    passes = len(samplers) + (len(window.places) if window else 0)
    finished = 0

    def hook(done: int, of: int) -> None:
        nonlocal finished
        finished += 1
        if progress:
            progress(finished, len(prompts) * passes)

    profiles = []
    for index, (name, transition) in enumerate(samplers.items()):
        measure = partial(
            measure_speed, policy, prompts, transition, sigmas, num_seeds,
            distance=distance, seed=seed, batch_size=batch_size, progress=hook,
        )  # fmt: skip
        speed = measure()
        mean, low, high = crossed_interval(speed)
        inside: dict[int, NDArray] = {}
        for start in sorted(window.places) if window else ():
            assert window is not None
            steps = range(start, start + window.size)
            found = measure(window=steps, prefix=window.prefix).mean((0, 1)) if not index else None
            inside[start] = mean[start : steps.stop] if found is None else found
        if window:
            shares = [window.places[start] for start in inside]
            proposals = propose(np.stack(list(inside.values())), min_size, shares)
        else:
            proposals = propose(mean, min_size)
        profiles.append(
            SamplerProfile(name, speed, mean, low, high, variance_shares(speed), proposals, inside)
        )
    return tuple(profiles)


# --- files ---------------------------------------------------------------------------------------


def save_profile(
    folder: Path,
    profiles: Sequence[SamplerProfile],
    sigmas: Sequence[float],
    rule: str = "optimal",
    selection: Mapping[str, Any] | None = None,
    title: str = "",
    distance: str = "l1",
) -> Path:
    """Write ``chunks.yaml``, ``dynamics.png`` and ``dynamics.json``.

    The first profile is the sampler to train with; its chunks go into ``chunks.yaml``.

    Args:
        folder: Made where missing.
        profiles: At least one.
        sigmas: Noise level at the start of each step, at least N.
        rule: The proposal to write, one of ``RULES``.
        selection: Further keys of the chunks section.
        title: What was measured, for the file's head.
        distance: The measure of speed, for labels.

    Returns:
        The path of ``chunks.yaml``.

    Raises:
        ValueError: If the rule has no proposal here.
    """
    import yaml

    chosen = profiles[0].proposal(rule)
    head = [title, f"{profiles[0].name}: {profiles[0].shares.sentence}."]
    head += [f"{p.rule} {p.plan}: {p.reason}" for p in profiles[0].proposals]
    section = {"plan": "explicit", "sizes": list(chosen.plan.sizes), **(selection or {})}
    text = "".join(f"# {line}\n" for line in head if line)
    text += f"# Chosen: {rule}.\n"
    text += yaml.safe_dump({"chunks": section}, sort_keys=False, default_flow_style=None)
    save_profile_curves(
        folder / "dynamics.png",
        [
            CurvePanel(
                profile.name,
                profile.mean.tolist(),
                profile.low.tolist(),
                profile.high.tolist(),
                # The chosen rule first: its borders cross the curve.
                {
                    proposal.rule: proposal.plan.sizes
                    for proposal in sorted(profile.proposals, key=lambda p: p.rule != rule)
                },
                profile.offset,
            )
            for profile in profiles
        ],
        sigmas,
        ylabel=LABELS[distance],
    )
    record = [
        {
            "sampler": profile.name,
            "mean": profile.mean.tolist(),
            "low": profile.low.tolist(),
            "high": profile.high.tolist(),
            "shares": asdict(profile.shares),
            "inside": {start: curve.tolist() for start, curve in profile.inside.items()},
            "plans": {p.rule: list(p.plan.sizes) for p in profile.proposals},
        }
        for profile in profiles
    ]
    atomic_write(folder / "dynamics.json", json.dumps(record, indent=1) + "\n")
    return atomic_write(folder / "chunks.yaml", text)


# --- terminal ------------------------------------------------------------------------------------


def print_profile(
    console: Console, profiles: Sequence[SamplerProfile], sigmas: Sequence[float], rule: str
) -> None:
    """Print the curves as a table and a plot, the shares of variance and the proposals."""
    from rich.table import Table

    table = Table("step", "sigma", title="Speed at each step, with its 95 % interval")
    for profile in profiles:
        table.add_column(profile.name, justify="right")
    for i in range(len(profiles[0].mean)):
        cells = [f"{p.mean[i]:.3f} ± {p.high[i] - p.mean[i]:.3f}" for p in profiles]
        table.add_row(str(i), f"{sigmas[i]:.3f}", *cells)
    console.print(table)
    plan, offset = profiles[0].proposal(rule).plan, profiles[0].offset
    for line in plot_lines([p.mean.tolist() for p in profiles], plan, offset=offset):
        console.print(line, markup=False, highlight=False, no_wrap=True)
    legend = ", ".join(f"{MARKS[k % len(MARKS)]} {p.name}" for k, p in enumerate(profiles))
    console.print(f"{legend}; │ borders of {rule}", markup=False, highlight=False)
    table = Table(
        "sampler", "step", "prompt", "seed", "residual", title="Shares of the variance of log speed"
    )
    for profile in profiles:
        s = profile.shares
        cells = [f"{100 * share:.2f} %" for share in (s.step, s.prompt, s.seed, s.residual)]
        table.add_row(profile.name, *cells)
    console.print(table)
    table = Table("rule", "chunks", "why", title=f"Where to cut, {profiles[0].name}")
    for proposal in profiles[0].proposals:
        name = f"{proposal.rule} *" if proposal.rule == rule else proposal.rule
        table.add_row(name, ",".join(map(str, proposal.plan.sizes)), proposal.reason)
    console.print(table)


MARKS = "●▲■◆"


def plot_lines(
    curves: Sequence[Sequence[float]], plan: ChunkPlan, height: int = 10, offset: int = 0
) -> list[str]:
    """Draw curves in characters, a column of four a step, from 0 to the largest value.

    Args:
        curves: [N] >= 0 each; where two meet, the earlier one is seen.
        plan: A plan of at most N steps; its borders are drawn as lines.
        height: Rows, at least 2.
        offset: Step at which the plan begins.

    Returns:
        The lines, top first, with an axis below.
    """
    num_steps = len(curves[0])
    top = max(max(curve) for curve in curves) or 1.0
    width = 4 * num_steps
    grid = [[" "] * width for _ in range(height)]
    edges = {offset + border for border in (*plan.starts, plan.num_steps)}
    for edge in edges - {0, num_steps}:
        for row in grid:
            row[4 * edge] = "│"
    for index, curve in reversed(list(enumerate(curves))):
        for step, value in enumerate(curve):
            row = height - 1 - round(value / top * (height - 1))
            grid[row][4 * step + 2] = MARKS[index % len(MARKS)]
    lines = [
        f"{top * (height - 1 - number) / (height - 1):6.3f} ┤" + "".join(row).rstrip()
        for number, row in enumerate(grid)
    ]
    axis = "".join(f"{step:^4}" for step in range(num_steps))
    return [*lines, " " * 7 + "└" + "─" * width, " " * 8 + axis.rstrip()]
