# SPDX-License-Identifier: Apache-2.0
r"""Sampling, credit and policy gradients against closed forms on Gaussian data.

The velocity of Gaussian data is affine in the state, every kernel is affine in state and
velocity, and noise is additive: means, covariances and the expected value of a quadratic reward
follow from a recursion of a few lines, which knows nothing of log-probabilities, ratios or
chunks. Its derivatives, by autograd in float64, are what the algorithms must estimate.

What is compared, and what is held fixed. A score-function estimator sees a step's parameters only
through that step's *density*. The last sampler step is deterministic, x0 = x - sigma v, and so are
ODE steps around a window: their parameters move the image too, but along a path on which there
is no density, and no estimator here accounts for it. Here each sampler step therefore has
parameters of its own (:class:`StepwiseGaussian`), so that "the gradient with the deterministic
steps held fixed" is the set of rows that belong to stochastic steps; for a policy that shares its
parameters among steps it is the sum of these rows.

Scales. Log-probabilities are means over the D elements (factor 1/D), the baseline is the mean of
the group including the sample itself (factor (G-1)/G), and the loss is minimised (factor -1). With
all ratios at 1 the gradient of a loss is therefore

.. math:: -\frac{G-1}{G D} \sum_i w_i \nabla_i E[r], \qquad
          w_i = \frac{a_i \lambda_j}{C\,cs_j} \quad (i \in ch_j)

with :math:`\nabla_i` the part through step i, a the factor inside the ratio and lambda that of the
chunk's loss.

Axes: B samples, K sampler steps, N stochastic steps, D elements, M portions of a rollout.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from chunkgrpo.core import (
    ChunkPlan,
    CpsTransition,
    DanceDiffusion,
    FlowDiffusion,
    InverseDtWeights,
    KlMask,
    LinearLogProb,
    ListedSelection,
    NoiseLevelWeights,
    OdeDiffusion,
    QuadraticLogProb,
    ShuffledTimes,
    StratifiedTimes,
    Transition,
    UniformLogProb,
    UniformSelection,
    WeightedSelection,
    chunk_advantages,
    chunk_gains,
    equal_kappa_weights,
    group_advantages,
    make_sigmas,
    predict_clean,
    step_plan,
    transition_scale,
    whole_plan,
)
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.types import Experience, Trajectory
from compose import awm, chunk_grpo, diffusion_nft, rollout
from oracles import collect, seeded

STD = 0.5
MEAN = 0.8
FLOW = Transition(FlowDiffusion(0.7))
DANCE = Transition(DanceDiffusion(0.5))
CPS = CpsTransition(0.9)
ODE = Transition(OdeDiffusion())


def variance_of(sigma):
    """Of the marginal at a noise level."""
    return (1 - sigma) ** 2 * STD**2 + sigma**2


def uniform_grid(num_steps, top=1.0):
    return top * torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


# --- marginals ---------------------------------------------------------------------------------


def affine_steps(kernel_at, sigmas, policy):
    """Slope, offset and std of each step but the last to 0, read off kernel and velocity.

    ``kernel_at(sigma, sigma_next)`` is the kernel of one step.
    """
    found = []
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    rows = policy.encode("ab")
    for sigma, after in pairwise(sigmas):
        velocity = policy.velocity(probes, sigma.expand(2), rows).detach()
        step = kernel_at(sigma, after)(probes, velocity, sigma, after)
        offset, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
        found.append((slope, offset, step.std.item()))
    return found


def scalar_policy(std=STD):
    return GaussianPolicy(torch.tensor([MEAN], dtype=torch.float64), std)


def moments(kernel_at, sigmas, std=STD):
    """Mean and variance at every level, starting from the exact marginal."""
    first = sigmas[0].item()
    mean, variance = (1 - first) * MEAN, (1 - first) ** 2 * std**2 + first**2
    found = [(mean, variance)]
    for slope, offset, noise in affine_steps(kernel_at, sigmas, scalar_policy(std)):
        mean, variance = slope * mean + offset, slope**2 * variance + noise**2
        found.append((mean, variance))
    return found


def final_error(kernel, num_steps, top):
    """Relative error of the image's variance; the mean's must vanish at any step size."""
    mean, variance = moments(lambda *_: kernel, uniform_grid(num_steps, top))[-1]
    assert mean == pytest.approx(MEAN, abs=1e-12)
    return variance / STD**2 - 1


@pytest.mark.parametrize(
    ("kernel", "top", "order"),
    [
        (ODE, 1.0, 1.0),
        (Transition(DanceDiffusion(0.3)), 1.0, 1.0),
        (Transition(DanceDiffusion(1.0)), 1.0, 1.0),
        (Transition(FlowDiffusion(0.3)), 0.9, 1.0),
        (Transition(FlowDiffusion(0.7)), 0.9, 1.0),
        (Transition(FlowDiffusion(1.2)), 0.9, 1.0),
        (Transition(FlowDiffusion(math.sqrt(2))), 1.0, 2.0),
    ],
    ids=str,
)
def test_kernels_keep_the_marginals_as_steps_shrink(kernel, top, order):
    """Variance error of order 1 in the step for every g, with no error of the mean at all.

    At noise level 1 the flow coefficient is singular, and the order falls to min(1, eta^2): the
    grid starts at 0.9. One noise level stands out, eta = sqrt(2): the time reversal of noising
    converges at order 2 from pure noise.
    """
    errors = [abs(final_error(kernel, n, top)) for n in (100, 200, 400)]
    assert errors[-1] < 0.03
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_cps_is_exact_where_its_premise_holds():
    """Predicted noise that is standard normal: variance sigma_next^2 for steps of any length.

    Data of a single image make the prediction exact: x1_hat is the noise itself.
    """
    for eta in (0.2, 0.9, 1.0):
        for sigmas in (uniform_grid(3), make_sigmas(9).double()):
            found = moments(lambda *_, eta=eta: CpsTransition(eta), sigmas, std=0.0)
            for sigma, (mean, variance) in zip(sigmas.tolist(), found, strict=True):
                assert mean == pytest.approx((1 - sigma) * MEAN, abs=1e-12)
                assert variance == pytest.approx(sigma**2, abs=1e-12)


def test_a_fixed_cps_angle_settles_below_the_marginal():
    r"""On data with spread, more steps do not help CPS: each draws the same share of noise anew.

    With c = cos(eta pi/2) one short step maps a variance W to rho^2 W + sigma^2 (1 - c^2), where
    rho = 1 - (1 - c) sigma^2 / V, and infinitely many at one level lead to the fixed point

    .. math:: W / V = \frac{1 + c}{2 - (1 - c)\,\sigma^2 / V} \le 1 .

    It tends to (1 + c) / 2 at the image: 0.58 for eta 0.9, or 0.42 at eight steps, approached from
    below.
    """
    kept = math.cos(0.9 * math.pi / 2)
    errors = []
    for count in (128, 256, 512):
        _, found = moments(lambda *_: CPS, uniform_grid(count))[count // 2]
        share = 0.25 / variance_of(0.5)
        limit = (1 + kept) / (2 - (1 - kept) * share)
        errors.append(abs(found / variance_of(0.5) - limit))
    assert errors[-1] < 1e-3
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.05)
    ends = [moments(lambda *_: CPS, uniform_grid(n))[-1][1] / STD**2 for n in (8, 64, 512)]
    assert ends == sorted(ends)
    assert ends[0] == pytest.approx(0.416, abs=1e-3)
    assert 0.56 < ends[-1] < (1 + kept) / 2 == pytest.approx(0.578, abs=1e-3)


def test_cps_whose_angle_shrinks_with_the_step_keeps_the_marginals():
    """tan(angle) = 0.7 sqrt(dt): noise of a bounded rate, and the error is of order 1."""

    def kernel_at(sigma, after):
        return CpsTransition(2 / math.pi * math.atan(0.7 * math.sqrt(sigma - after)))

    errors = [abs(moments(kernel_at, uniform_grid(n))[-1][1] / STD**2 - 1) for n in (50, 100, 200)]
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("kernel", [FLOW, DANCE, CPS], ids=str)
def test_sampled_moments_are_the_propagated_ones(kernel):
    """z-tests of 40,000 independent elements at every level, at few steps."""
    sigmas = make_sigmas(7)
    policy = GaussianPolicy(torch.full((5000,), MEAN, dtype=torch.float64), STD)
    trajectory = rollout(policy, ["a"], kernel, sigmas, 8, seeded(4))
    levels = [*trajectory.states.double().unbind(1), trajectory.final.double()]
    expected = moments(lambda *_: kernel, sigmas.double()[:-1])
    slope, offset, _ = affine_steps(lambda *_: ODE, sigmas.double()[-2:], scalar_policy())[0]
    mean, variance = expected[-1]
    expected.append((slope * mean + offset, slope**2 * variance))
    for values, (mean, variance) in zip(levels, expected, strict=True):
        count = values.numel()
        assert abs(values.mean() - mean) < 4.5 * math.sqrt(variance / count)
        # The variance of a normal sample's variance is 2 variance^2 / n.
        assert abs(values.var() / variance - 1) < 4.5 * math.sqrt(2 / count)


# --- credit ------------------------------------------------------------------------------------


def displacements(kernel, sigmas):
    """[S, N+1]: how far each source's unit of noise has moved x at each level, S = N + 1.

    The sources are the first noise and that of every stochastic step.
    """
    steps = affine_steps(lambda *_: kernel, sigmas[:-1], scalar_policy())
    rows = []
    for source in range(-1, len(steps)):
        moved, row = (1.0 if source < 0 else 0.0), []
        for index, (slope, _, noise) in enumerate(steps):
            row.append(moved)
            moved = noise if index == source else slope * moved
        rows.append([*row, moved])
    return torch.tensor(rows, dtype=torch.float64)


def prediction_slopes(sigmas):
    """[N+1]: derivative of the predicted image with respect to x."""
    steps = [affine_steps(lambda *_: ODE, torch.stack([s, 0 * s]), scalar_policy()) for s in sigmas]
    return torch.tensor([step[0][0] for step in steps], dtype=torch.float64)


def credit_by_chunk(kernel, sigmas, sizes):
    """Coefficients [S, C] of every source in a chunk's gain, and in the chunk's contribution.

    With a linear reward both are linear in the sources. The contribution of a chunk is what the
    noise drawn in it does to the final image.
    """
    moved_SN = displacements(kernel, sigmas)
    clean_SN = moved_SN * prediction_slopes(sigmas[:-1])
    edges = [0, *accumulate(sizes)]
    gains = clean_SN[:, edges].diff(dim=1)
    truth = torch.zeros_like(gains)
    for chunk, (start, stop) in enumerate(pairwise(edges)):
        truth[1 + start : 1 + stop, chunk] = clean_SN[1 + start : 1 + stop, -1]
    return gains, truth


def quarters(multiple):
    """A grid of 8 k steps whose trained steps are cut at the levels 3/4, 1/2 and 1/4."""
    return uniform_grid(8 * multiple), (2 * multiple,) * 3 + (2 * multiple - 1,)


def credit_errors(eta, multiple):
    """Root mean square of gain minus contribution, relative to the contribution's, [C]."""
    gains, truth = credit_by_chunk(Transition(FlowDiffusion(eta)), *quarters(multiple))
    return ((gains - truth).square().sum(0) / truth.square().sum(0)).sqrt()


def test_gains_converge_to_the_contribution_under_the_time_reversed_sde():
    r"""Flow coefficient with eta = sqrt(2): g^2 = 2 sigma / (1 - sigma), the forward process's own.

    Only then is sampling the time reversal of noising and the predicted image a martingale, so
    that a chunk's noise changes the prediction at once by all that it will do to the image. The
    error of a linear reward's gains falls at first order.
    """
    errors = [credit_errors(math.sqrt(2), multiple) for multiple in (4, 8, 16)]
    print(f"\nrelative error of gains, eta sqrt(2), 32/64/128 steps: {errors}")
    assert errors[-1].max() < 0.08
    for coarse, fine in pairwise(errors):
        rates = (coarse / fine).log2()
        assert ((rates - 1).abs() < 0.2).all(), rates


@pytest.mark.parametrize(("eta", "least"), [(0.7, 0.37), (1.0, 0.15), (1.8, 0.14)])
def test_gains_are_biased_at_any_other_noise_level_even_for_a_linear_reward(eta, least):
    r"""With less noise the ODE's part goes on moving the prediction after the noise was drawn.

    In the limit of short steps, noise drawn at sigma moves the image by
    :math:`G(\sigma) = \frac{s}{\sqrt V} k^{\eta^2 / 2}` and a prediction at e by
    :math:`\frac{G(\sigma)}{G(e)} \frac{s k_e}{\sqrt{V_e}}`, where
    :math:`k = (1 - \sigma) s / \sqrt V` is the correlation of state and image. A chunk that ends at
    e is therefore credited with the share :math:`k_e^{1 - \eta^2/2}` of its own noise's effect;
    the rest goes to later chunks.
    """
    coarse, fine = (credit_errors(eta, multiple) for multiple in (16, 32))
    print(f"\nrelative error of gains, eta {eta}, 128/256 steps: {coarse}, {fine}")
    assert (fine > least).all()
    gains, truth = credit_by_chunk(Transition(FlowDiffusion(eta)), *quarters(64))
    own = (gains * truth).sum(0) / truth.square().sum(0)
    ends = [0.75, 0.5, 0.25]
    k = [(1 - e) * STD / math.sqrt(variance_of(e)) for e in ends]
    expected = [each ** (1 - eta**2 / 2) for each in k] + [1.0]
    assert own.tolist() == pytest.approx(expected, rel=0.05)


def injected_noise(trajectory, policy, kernel):
    """[B, N, D]: what was drawn at each step, found from the states."""
    found = []
    for i, (sigma, after) in enumerate(pairwise(trajectory.trained_sigmas)):
        x = trajectory.states[:, i].double()
        velocity = policy.velocity(
            x, sigma.expand(len(x)), trajectory.conditioning_of(slice(None))
        ).detach()
        step = kernel(x, velocity, sigma.double(), after.double())
        found.append((trajectory.states[:, i + 1] - step.mean) / step.std)
    return torch.stack(found, 1)


@pytest.mark.parametrize("eta", [0.7, math.sqrt(2)])
def test_the_gains_of_a_rollout_are_these(eta):
    """The coefficients above, and ``chunk_gains`` of predictions on a trajectory, agree."""
    sigmas, sizes = quarters(2)
    kernel, weights = Transition(FlowDiffusion(eta)), torch.tensor([1.0, -0.5]).double()
    policy = GaussianPolicy(torch.full((2,), MEAN, dtype=torch.float64), STD)
    trajectory = rollout(policy, ["a"], kernel, sigmas, 16, seeded(3), keep_velocities=True)
    gains, _ = credit_by_chunk(kernel, sigmas, sizes)
    sources = torch.cat(
        [trajectory.states[:, :1].double(), injected_noise(trajectory, policy, kernel)], 1
    )
    expected = torch.einsum("bsd,sc,d->bc", sources, gains, weights)
    found = chunk_gains(boundary_rewards(trajectory, ChunkPlan(sizes), lambda x: x @ weights))
    # The mean of the data adds a constant to all boundaries alike, which differences lose.
    assert torch.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("prefix", ["ode", "sde"])
@pytest.mark.parametrize("kernel", [FLOW, DANCE, CPS], ids=str)
def test_branching_at_a_chunk_credits_exactly_its_contribution(kernel, prefix):
    """One state, one chunk of noise, the ODE after it: what differs is the chunk's doing."""
    sigmas, window, group = make_sigmas(8), range(2, 5), 6
    policy = GaussianPolicy(torch.full((3,), MEAN, dtype=torch.float64), STD)
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    trajectory = rollout(
        policy, "ab", kernel, sigmas, group, seeded(1), same_noise=True, window=window,
        prefix=prefix,
    )  # fmt: skip
    found = group_advantages(trajectory.final.double() @ weights, 2, "mean_only", None).values
    grid = sigmas.double()
    slopes = [affine_steps(lambda *_: kernel, grid[i : i + 2], scalar_policy())[0] for i in window]
    after = [affine_steps(lambda *_: ODE, grid[i : i + 2], scalar_policy())[0] for i in range(5, 8)]
    later = math.prod(slope for slope, _, _ in after)
    noise = injected_noise(trajectory, policy, kernel)
    contribution = torch.zeros(12, dtype=torch.float64)
    for index, (_, _, std) in enumerate(slopes):
        reach = std * later * math.prod(slope for slope, _, _ in slopes[index + 1 :])
        contribution += reach * noise[:, index] @ weights
    centred = contribution.reshape(2, group)
    centred = (centred - centred.mean(1, keepdim=True)).reshape(-1)
    assert torch.allclose(found, centred, atol=2e-5)
    assert centred.abs().max() > 0.1


# --- policy gradients --------------------------------------------------------------------------

SIGMAS = make_sigmas(7)
NUM_STEPS, NUM_TRAINED, DIM, GROUP = 7, 6, 2, 8
NUM_PORTIONS, PORTION = 40, 60 * GROUP
TARGET = torch.tensor([3.0, -1.0], dtype=torch.float64)
CURVATURE = torch.tensor([[1.0, 0.3], [0.3, 0.6]], dtype=torch.float64)


def reward(x):
    """-(x - t)' Q (x - t) / 2."""
    away = x.double() - TARGET
    return -0.5 * (away @ CURVATURE * away).sum(-1)


def expected_reward(mean, covariance):
    away = mean - TARGET
    return -0.5 * (away @ CURVATURE @ away + (CURVATURE * covariance).sum())


class StepwiseGaussian(GaussianPolicy):
    r"""The exact velocity of Gaussian data, with parameters of its own for each sampler step.

    .. math:: v_i(x) = a_i (x - (1-\sigma_i) m_i) - m_i + H_i (x - (1-\sigma_i) m_i)

    m is the mean and H, zero at the start, turns and stretches: unlike m it moves covariances.
    """

    def __init__(self):
        start = torch.tensor([0.8, -0.4], dtype=torch.float64)
        super().__init__(start, STD)
        self.mean = start.repeat(NUM_STEPS, 1).requires_grad_()
        self.turn = torch.zeros(NUM_STEPS, DIM, DIM, dtype=torch.float64, requires_grad=True)

    def velocity(self, x, sigma, conditioning):
        self.calls.append(len(x))
        x, sigma = x.double(), sigma.double()
        step = (SIGMAS[:-1, None].double() - sigma).abs().argmin(0)
        away = x - (1 - sigma[:, None]) * self.mean[step]
        slope = (sigma - (1 - sigma) * STD**2) / variance_of(sigma)
        return (
            slope[:, None] * away - self.mean[step] + (self.turn[step] @ away[:, :, None])[:, :, 0]
        )

    def parameters(self):
        return [self.mean, self.turn]


def step_formula(kernel, sigma, after):
    """(p, q, std): the kernel's mean is p x + q v. From the publications, for scalars."""
    dt = sigma - after
    if isinstance(kernel, CpsTransition):
        kept = after * math.cos(kernel.eta * math.pi / 2)
        std = after * math.sin(kernel.eta * math.pi / 2)
        return 1 - after + kept, -(1 - after) * sigma + kept * (1 - sigma), std
    if isinstance(kernel.diffusion, FlowDiffusion):
        g = kernel.diffusion.eta * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
    else:
        g = getattr(kernel.diffusion, "eta", 0.0)
    # -dt (v + g^2 / (2 sigma) (x + (1 - sigma) v))
    pull = g**2 / (2 * sigma)
    return 1 - dt * pull, -dt * (1 + pull * (1 - sigma)), g * math.sqrt(dt)


@dataclass(frozen=True)
class Setting:
    """One way of sampling."""

    kernel: object
    window: range = range(NUM_TRAINED)
    same_noise: bool = False
    prefix: str = "ode"


def propagate(setting, policy, stop=NUM_STEPS):
    """Mean and covariance at level ``stop``, with gradient; the image where it is K."""
    grid = SIGMAS.double().tolist()
    mean, covariance = torch.zeros(DIM).double(), torch.eye(DIM).double()
    for i in range(stop):
        noisy = i in setting.window or (i < setting.window.start and setting.prefix == "sde")
        kernel = setting.kernel if noisy else ODE
        p, q, std = step_formula(kernel, grid[i], grid[i + 1])
        linear, offset = velocity_map(policy, i)
        forward = p * torch.eye(DIM).double() + q * linear
        mean = forward @ mean + q * offset
        covariance = forward @ covariance @ forward.T + std**2 * torch.eye(DIM).double()
    return mean, covariance


def velocity_map(policy, i):
    """v_i(x) = linear @ x + offset."""
    sigma = SIGMAS.double()[i].item()
    slope = (sigma - (1 - sigma) * STD**2) / variance_of(sigma)
    linear = slope * torch.eye(DIM).double() + policy.turn[i]
    return linear, -(1 - sigma) * linear @ policy.mean[i] - policy.mean[i]


def flat(gradients):
    """Gradients of (mean, turn) as one row of 6 numbers per sampler step, [K, 6]."""
    mean, turn = gradients
    return torch.cat([mean, turn.flatten(1)], 1)


def gradient_of(value, policy):
    gradients = torch.autograd.grad(value, policy.parameters(), materialize_grads=True)
    return flat(gradients)


@cache
def true_gradient(setting):
    """d E[reward] by the parameters of each step, [K, 6]."""
    policy = StepwiseGaussian()
    return gradient_of(expected_reward(*propagate(setting, policy)), policy)


@cache
def rolled_out(setting):
    policy = StepwiseGaussian()
    trajectory = rollout(
        policy, ["a"] * (NUM_PORTIONS * PORTION // GROUP), setting.kernel, SIGMAS, GROUP,
        seeded(11), batch_size=10**6, same_noise=setting.same_noise, window=setting.window,
        prefix=setting.prefix, keep_velocities=True,
    )  # fmt: skip
    return trajectory


def portions(trajectory):
    """Rollouts of 60 groups each, as if made one by one."""
    for index in range(NUM_PORTIONS):
        rows = slice(index * PORTION, (index + 1) * PORTION)
        groups = slice(rows.start // GROUP, rows.stop // GROUP)
        yield Trajectory(
            states=trajectory.states[rows],
            sigmas=trajectory.sigmas,
            old_log_prob=trajectory.old_log_prob[rows],
            final=trajectory.final[rows],
            conditioning=trajectory.conditioning[groups],
            num_prompts=PORTION // GROUP,
            num_evaluations=0,
            offset=trajectory.offset,
            velocities=trajectory.velocities[rows],
        )


def boundary_rewards(trajectory, plan, reward):
    """[B, C+1]: rewards of the predictions where chunks begin, and of the image."""
    columns = []
    for start in plan.starts:
        sigma = trajectory.trained_sigmas[start]
        clean = predict_clean(trajectory.states[:, start], trajectory.velocities[:, start], sigma)
        columns.append(reward(clean.double()))
    return torch.stack([*columns, reward(trajectory.final.double())], 1)


def image_credit(trajectory, plan):
    rewards = reward(trajectory.final)
    return group_advantages(rewards, trajectory.num_prompts, "mean_only", None).values


def gain_credit(trajectory, plan):
    gains = chunk_gains(boundary_rewards(trajectory, plan, reward))
    return chunk_advantages(gains, trajectory.num_prompts, "mean_only", None)


def estimates(setting, plan, credit=image_credit, **options):
    """The algorithm's gradients in the unit of d E[reward], one per portion: [M, K, 6]."""
    options = {"selection": UniformSelection(1.0)} | options
    algorithm = chunk_grpo(plan, setting.kernel, updates=1, micro_batch=10**6, **options)
    policy, found = StepwiseGaussian(), []
    for index, trajectory in enumerate(portions(rolled_out(setting))):
        experience = Experience(trajectory, credit(trajectory, plan).float())
        ((_, gradient, _),) = collect(algorithm, policy, experience, seed=index)
        mean, turn = gradient.split([NUM_STEPS * DIM, NUM_STEPS * DIM**2])
        found.append(flat((mean.view(NUM_STEPS, DIM), turn.view(NUM_STEPS, DIM, DIM))))
    return -DIM * GROUP / (GROUP - 1) * torch.stack(found)


def deviations(found_M, expected):
    """How many standard errors each mean lies from what is expected; 0 where nothing varies."""
    error = found_M.std(0) / math.sqrt(len(found_M))
    still = error == 0
    assert (found_M.mean(0)[still] == 0).all() and (expected[still] == 0).all()
    return ((found_M.mean(0) - expected) / error).masked_fill(still, 0.0)


def along(found_M, expected):
    """Size of the estimates along the expected gradient (1 if equal), and its standard error."""
    precision = 1 / found_M.var(0)
    weight = (expected * precision).masked_fill(expected == 0, 0.0)
    sizes_M = (found_M * weight).flatten(1).sum(1) / (expected * weight).sum()
    return sizes_M.mean().item(), sizes_M.std().item() / math.sqrt(len(sizes_M))


def assert_unbiased(found_M, expected, resolution=0.04):
    """Every component within 4.5 standard errors, and the whole known to ``resolution``."""
    assert deviations(found_M, expected).abs().max() < 4.5
    size, error = along(found_M, expected)
    print(f"\nestimate / closed form: {size:.4f} +- {error:.4f}")
    assert error < resolution
    assert abs(size - 1) < 4 * error


def weights_of(plan, window=range(NUM_TRAINED), inner=1.0, outer=1.0, chunks=None):
    """[K]: w of every sampler step, 0 outside the window and in chunks that are not trained.

    ``inner`` by step, ``outer`` by chunk; ``chunks`` are the trained ones.
    """
    weights = torch.zeros(NUM_STEPS, dtype=torch.float64)
    chunks = range(plan.num_chunks) if chunks is None else chunks
    inner = torch.as_tensor(inner, dtype=torch.float64).expand(plan.num_steps)
    outer = torch.as_tensor(outer, dtype=torch.float64).expand(plan.num_chunks)
    for chunk in chunks:
        for step in plan.steps_of(chunk):
            share = inner[step] * outer[chunk] / (len(chunks) * plan.sizes[chunk])
            weights[window.start + step] = share
    return weights


@dataclass(frozen=True)
class BySize(UniformSelection):
    """Chunks weigh as many as their steps: this undoes the 1/cs of unequal chunks."""

    def loss_weights(self, plan, curve_BN, chosen_BM):
        sizes = torch.tensor(plan.sizes) * plan.num_chunks / plan.num_steps
        return sizes.expand(len(curve_BN), -1)


ALL = Setting(FLOW)
SHARED = Setting(FLOW, same_noise=True)
WINDOWED = Setting(FLOW, range(2, 5), same_noise=True)
AFTER_NOISE = Setting(FLOW, range(2, 5), same_noise=True, prefix="sde")
PAIRS, HALVES, RISING = ChunkPlan((2, 2, 2)), ChunkPlan((3, 3)), ChunkPlan((1, 2, 3))
STEPS, WHOLE = step_plan(NUM_TRAINED), whole_plan(NUM_TRAINED)
EVEN = torch.full((NUM_STEPS,), 1 / NUM_TRAINED).double() * (torch.arange(NUM_STEPS) < NUM_TRAINED)

UNBIASED = {
    # name: (setting, plan, options of the algorithm, weights)
    "step level": (ALL, STEPS, {}, EVEN),
    "equal chunks": (ALL, HALVES, {}, EVEN),
    "equal chunks, one of three drawn": (ALL, PAIRS, {"selection": UniformSelection(0.34)}, EVEN),
    "one chunk of all": (ALL, WHOLE, {}, EVEN),
    "unequal chunks, weighed by size": (ALL, RISING, {"selection": BySize(1.0)}, EVEN),
    "unequal chunks": (ALL, RISING, {}, weights_of(RISING)),
    "one listed chunk": (
        ALL, RISING, {"selection": ListedSelection((1,))}, weights_of(RISING, chunks=[1]),
    ),
    "true density ratio": (ALL, HALVES, {"ratio": "full"}, DIM * EVEN),
    "KL mask before the policy moves": (ALL, HALVES, {"trust": KlMask(1e-5)}, EVEN),
    "drawn by speed, corrected": (
        ALL, PAIRS, {"selection": WeightedSelection(0.34, correction=True)}, EVEN,
    ),
    "steps drawn by speed, corrected": (
        ALL, STEPS, {"selection": WeightedSelection(0.5, correction=True)}, EVEN,
    ),
    "one first noise": (SHARED, HALVES, {}, EVEN),
    "DanceGRPO's kernel": (Setting(DANCE), PAIRS, {}, EVEN),
    "Flow-CPS's kernel": (Setting(CPS), PAIRS, {}, EVEN),
    "window": (WINDOWED, step_plan(3), {}, weights_of(step_plan(3), WINDOWED.window)),
    "window, one chunk": (WINDOWED, whole_plan(3), {}, weights_of(whole_plan(3), WINDOWED.window)),
    "window after a noisy prefix": (
        AFTER_NOISE, whole_plan(3), {}, weights_of(whole_plan(3), AFTER_NOISE.window),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNBIASED)
def test_estimates_are_the_policy_gradient_up_to_known_weights(name):
    """E[estimate of step i] = w_i times the closed form, component by component.

    A window's steps are those whose noise tells images apart; the steps around it are held fixed
    like the last one, and rows of theirs are exactly 0.
    """
    setting, plan, options, weights = UNBIASED[name]
    expected = weights[:, None] * true_gradient(setting)
    assert_unbiased(estimates(setting, plan, **options), expected)


def test_the_closed_form_is_that_of_the_samples():
    """The recursion's moments are those of the rollouts, or the gradients would mean little."""
    for setting in (ALL, Setting(CPS), WINDOWED):
        mean, covariance = (x.detach() for x in propagate(setting, StepwiseGaussian()))
        final = rolled_out(setting).final.double()
        # Groups share their prefix: compare the means of groups, which are independent.
        groups = final.unflatten(0, (-1, GROUP)).mean(1)
        error = groups.std(0) / math.sqrt(len(groups))
        assert ((groups.mean(0) - mean) / error).abs().max() < 4.5
        assert torch.allclose(final.T.cov(), covariance, rtol=0.06, atol=0.01)
        rewards = reward(final).unflatten(0, (-1, GROUP)).mean(1)
        error = rewards.std() / math.sqrt(len(rewards))
        assert abs(rewards.mean() - expected_reward(mean, covariance)) < 4.5 * error


def test_a_shared_parameter_gets_the_sum_over_stochastic_steps():
    """GaussianPolicy, one mean for all steps: what it learns omits the last step's own part."""
    policy = GaussianPolicy(StepwiseGaussian().mean[0].detach(), STD)
    algorithm = chunk_grpo(HALVES, FLOW, UniformSelection(1.0), updates=1, micro_batch=10**6)
    found = []
    for trajectory in portions(rolled_out(ALL)):
        experience = Experience(trajectory, image_credit(trajectory, HALVES).float())
        found.append(collect(algorithm, policy, experience)[0][1])
    by_step = true_gradient(ALL)[:, :DIM]
    scale = -DIM * GROUP / (GROUP - 1) * NUM_TRAINED
    assert_unbiased(scale * torch.stack(found), by_step[:NUM_TRAINED].sum(0))
    # The whole derivative of the expected reward, by a route of its own: the image's mean is m
    # up to the first noise's share, so that it moves with m one to one.
    whole = CURVATURE @ (TARGET - policy.mean.detach())
    assert torch.allclose(by_step.sum(0), whole, rtol=1e-9)
    omitted = by_step[-1].norm() / by_step.sum(0).norm()
    print(f"\nshare of the gradient that goes through the last, deterministic step: {omitted:.3f}")


# --- policy gradients that are biased, and by how much -----------------------------------------


def step_stds():
    grid = SIGMAS.double().tolist()
    return torch.tensor([step_formula(FLOW, *grid[i : i + 2])[2] for i in range(NUM_TRAINED)])


def direction(weights):
    """Cosine between the reweighted gradient and the true one, over all steps' parameters."""
    true = true_gradient(ALL)
    pair = ((weights[:, None] * true).flatten(), (EVEN[:, None] * true).flatten())
    return torch.nn.functional.cosine_similarity(*pair, dim=0).item()


STD_N = step_stds().double()
DT_N = -SIGMAS.double().diff()[:NUM_TRAINED]
KAPPA_N = transition_scale(FLOW, SIGMAS[:-1].double())

# Factors per step, inside the ratio and of the loss (a chunk takes their mean); then, for chunks of
# one step, the weights in units of their mean and the cosine of the gradient with the true one.
REWEIGHTED = {
    "guard": ({"ratio": "guard"}, STD_N, None, [1.30, 1.41, 1.02, 0.86, 0.75, 0.66], 0.997),
    "squared error": (
        {"ratio": "squared_error"}, 2 * STD_N**2, None, [1.58, 1.85, 0.97, 0.68, 0.52, 0.40], 0.981,
    ),
    "equal kappa": (
        {"inner_weights": "equal_kappa"}, equal_kappa_weights(KAPPA_N), None,
        [2.28, 1.60, 0.92, 0.59, 0.38, 0.23], 0.935,
    ),
    "noise level": (
        {"outer_weights": NoiseLevelWeights()}, 1.0, STD_N / STD_N.mean(),
        [1.30, 1.41, 1.02, 0.86, 0.75, 0.66], 0.997,
    ),
    "inverse dt": (
        {"outer_weights": InverseDtWeights()}, 1.0, 1 / DT_N,
        [1.69, 1.37, 1.08, 0.83, 0.61, 0.42], 0.978,
    ),
    "guard over dt": (
        {"ratio": "guard", "outer_weights": InverseDtWeights()}, STD_N, 1 / DT_N,
        [1.98, 1.73, 0.99, 0.64, 0.41, 0.25], 0.937,
    ),
}  # fmt: skip


@pytest.mark.parametrize("plan", [STEPS, HALVES], ids=str)
@pytest.mark.parametrize("name", REWEIGHTED)
def test_scales_and_weights_reweight_the_steps_of_the_gradient(name, plan):
    """Not the policy gradient, but one with other weights for the steps; exactly these.

    All lean towards high noise: at these seven steps the first counts 1.3 (guard) to 2.3 times
    (equal kappa) the mean and the last trained one 0.66 to 0.23 times. Guard and the noise-level
    weights are the same reweighting while ratios are 1, up to one constant. The gradient turns
    little, with a cosine of 0.93 to 0.997, since the last steps' share of it is the largest.
    """
    options, inner, outer, printed, cosine = REWEIGHTED[name]
    outer = 1.0 if outer is None else plan.reduce(outer)
    weights = weights_of(plan, inner=inner, outer=outer)
    assert_unbiased(estimates(ALL, plan, **options), weights[:, None] * true_gradient(ALL))
    if plan == STEPS:
        share = weights[:NUM_TRAINED] / weights.sum() * NUM_TRAINED
        assert share.tolist() == pytest.approx(printed, abs=6e-3)
        assert direction(weights) == pytest.approx(cosine, abs=6e-4)


def test_drawing_by_speed_without_correction_is_biased():
    """A chunk's weight is 3 E[pi r score] / E[r score], not 1, and not even 3 E[pi].

    The speed of a step grows with the very noise whose credit is estimated. With the two elements
    of this toy the first chunk is drawn 1.17 times as often as at random and weighs 1.57; with
    many elements speeds hardly differ between samples, and the mean inclusion is what is left.
    """
    selection = WeightedSelection(0.34)
    found = estimates(ALL, PAIRS, selection=selection)
    expected = EVEN[:, None] * true_gradient(ALL)
    assert deviations(found, expected).abs().max() > 8
    inclusion = selection.inclusion(PAIRS, rolled_out(ALL).dynamics).mean(0)
    sizes = []
    for chunk in range(3):
        rows = list(PAIRS.steps_of(chunk))
        sizes.append(along(found[:, rows], expected[rows]))
    print(f"\n3 x mean inclusion: {(3 * inclusion).tolist()}; weights found: {sizes}")
    (size, error), share = sizes[0], 3 * inclusion[0].item()
    assert size - 4 * error > share > 1.1


def gain_gradient(setting, plan):
    """What gain credit converges to: d E[reward of the prediction where the chunk ends].

    The prediction itself, like the last step, is held fixed.
    """
    policy, rows = StepwiseGaussian(), torch.zeros(NUM_STEPS, 6, dtype=torch.float64)
    fixed = StepwiseGaussian()
    for chunk in range(plan.num_chunks):
        steps = plan.steps_of(chunk)
        mean, covariance = propagate(setting, policy, steps.stop)
        linear, offset = velocity_map(fixed, steps.stop)
        sigma = SIGMAS.double()[steps.stop].item()
        forward = (torch.eye(DIM).double() - sigma * linear).detach()
        mean = forward @ mean - sigma * offset.detach()
        value = expected_reward(mean, forward @ covariance @ forward.T)
        rows[list(steps)] = gradient_of(value, policy)[list(steps)]
    return rows


@pytest.mark.parametrize("plan", [HALVES, RISING], ids=str)
def test_gain_credit_is_biased_by_what_a_prediction_does_not_show_yet(plan):
    """The estimate is the gradient of the prediction's reward at the chunk's end, not the image's.

    The last chunk's credit is right. Before it, the gradient through means is the share that a
    linear reward has (0.39 where the chunk ends at 0.80, 0.17 at 0.95), and that through
    covariances its square: a blurred prediction hides the curvature of the reward.
    """
    weights = weights_of(plan)[:, None]
    expected, true = weights * gain_gradient(ALL, plan), weights * true_gradient(ALL)
    found = estimates(ALL, plan, credit=gain_credit)
    assert_unbiased(found, expected)
    assert deviations(found, true).abs().max() > 8
    grid = SIGMAS.double()
    slopes = [affine_steps(lambda *_: FLOW, grid[i : i + 2], scalar_policy())[0] for i in range(6)]
    clean = prediction_slopes(grid[:-1])
    for chunk in range(plan.num_chunks):
        steps = list(plan.steps_of(chunk))
        end = steps[-1] + 1
        still = math.prod(slope for slope, _, _ in slopes[end:]) * clean[-1].item()
        share = clean[end].item() / still
        means = expected[steps][:, :DIM].norm() / true[steps][:, :DIM].norm()
        turns = expected[steps][:, DIM:].norm() / true[steps][:, DIM:].norm()
        print(f"chunk {chunk} ends at {grid[end]:.3f}: credited share {share:.3f}")
        assert means.item() == pytest.approx(share, rel=1e-9)
        assert turns.item() == pytest.approx(share**2, rel=1e-9)
    assert torch.allclose(expected[steps], true[steps])


# --- objectives of the forward process ----------------------------------------------------------


def image_moments(setting=ALL):
    """Of the images rolled out: mean less the policy's m, covariance C, C g, and C Q C.

    g = Q (t - mean) is the mean slope of the reward. By Stein's identity Cov(r, x0) = C g, and by
    Isserlis' theorem Cov(r, z z') = -C Q C for the images' z about their mean.
    """
    policy = StepwiseGaussian()
    mean, covariance = (each.detach() for each in propagate(setting, policy))
    slope = covariance @ CURVATURE @ (TARGET - mean)
    return mean - policy.mean[0].detach(), covariance, slope, covariance @ CURVATURE @ covariance


def forward_estimates(algorithm):
    """Gradients of one update on images credited with their reward, one a portion: [M, K, 6]."""
    policy, found = StepwiseGaussian(), []
    for index, trajectory in enumerate(portions(rolled_out(ALL))):
        experience = Experience(trajectory, image_credit(trajectory, None).float())
        ((_, gradient, _),) = collect(algorithm, policy, experience, seed=index)
        mean, turn = gradient.split([NUM_STEPS * DIM, NUM_STEPS * DIM**2])
        found.append(flat((mean.view(NUM_STEPS, DIM), turn.view(NUM_STEPS, DIM, DIM))))
    return -GROUP / (GROUP - 1) * torch.stack(found)


def reach(sigma):
    """k and q of the error v - (e - x0) = k (x0 - m) + q e of the policy's velocity."""
    slope = (sigma - (1 - sigma) * STD**2) / variance_of(sigma)
    return slope * (1 - sigma) + 1, slope * sigma - 1


@pytest.mark.parametrize(
    ("log_prob", "power"),
    [(UniformLogProb(), 0), (LinearLogProb(), 1), (QuadraticLogProb(), 2)],
    ids=["uniform", "t", "t2"],
)
def test_awm_estimates_the_policy_gradient_times_the_images_covariance(log_prob, power):
    r"""Not the gradient of the expected reward in m, Q (t - mean), but C times that.

    On-policy the loss is A w(sigma) times the matching error, whose derivatives with respect to m
    and H are :math:`-\tfrac{2k}{D}(k y + q e)` and
    :math:`\tfrac{2}{D}(k y + q e)((1-\sigma) y + \sigma e)'` with y = x0 - m. What is left of them
    in the mean is what goes with the reward: :math:`E[A y] = C g` and
    :math:`E[A y y'] = -C Q C + d (C g)' + (C g) d'`, d the distance of the images' mean from m. The
    direction is the same at every noise level.
    """
    algorithm = awm(
        log_prob=log_prob,
        times=StratifiedTimes(6),
        advantage_clip=1e3,
        advantage_max=1e3,
        micro_batch=10**6,
    )
    away, _, slope, turned = image_moments()
    outer = away[:, None] * slope
    second = -turned + outer + outer.T
    expected = torch.zeros(NUM_STEPS, 6, dtype=torch.float64)
    # Six strata of the six times below pure noise: each is drawn once a sample.
    for i in range(1, NUM_STEPS):
        sigma = SIGMAS.double()[i].item()
        k, _ = reach(sigma)
        scale = 2 / DIM * k * sigma**power / 6
        expected[i] = scale * torch.cat([k * slope, -(1 - sigma) * second.flatten()])
    assert_unbiased(forward_estimates(algorithm), expected)


def nft_mean(sigma, away, covariance, slope, turned):
    r"""[D]: E[A e / w] of two elements by quadrature, w = (|e_1| + |e_2|) / 2, e = k y + q noise.

    Given e the reward's mean is quadratic, as image and e are jointly normal:
    :math:`E[A | e] = k h'(C g) - \tfrac{k^2}{2}(h' C Q C h - tr(S^{-1} C Q C))` with
    :math:`h = S^{-1}(e - k d)` and :math:`S = k^2 C + q^2 I`. Polar coordinates, one quadrant after
    another: e / w has kinks on the axes.
    """
    k, q = reach(sigma)
    spread = k**2 * covariance + q**2 * torch.eye(DIM).double()
    inverse = torch.linalg.inv(spread)
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(60))
    far = 10 * spread.diagonal().max().sqrt() + k * away.norm()
    radius, dr = (nodes + 1) / 2 * far, weights / 2 * far
    total = torch.zeros(DIM, dtype=torch.float64)
    for quadrant in range(4):
        angle, da = (nodes + 1 + 2 * quadrant) * math.pi / 4, weights * math.pi / 4
        unit = torch.stack([angle.cos(), angle.sin()], 1)
        e = radius[:, None, None] * unit
        h = (e - k * away) @ inverse
        density = (-((e - k * away) * h).sum(-1) / 2).exp() / (2 * math.pi * spread.det().sqrt())
        curved = (h @ turned * h).sum(-1) - (inverse * turned).sum()
        credit = k * h @ slope - k**2 / 2 * curved
        share = credit * density * (dr * radius)[:, None] * da
        total += (share.sum(0)[:, None] * unit / unit.abs().mean(1, keepdim=True)).sum(0)
    return total


def test_nft_estimates_a_bounded_form_of_the_same():
    """On-policy, b = 1: the mean of A times the error over the error's own absolute mean.

    The error of the predicted image is sigma e, of which the norm leaves no more than sigma; each
    of the K times has the share 1 / K of the pairs.
    """
    algorithm = diffusion_nft(
        advantage_clip=100.0, times=ShuffledTimes(1.0), micro_batch=10**6, kl=0.0
    )
    expected = torch.zeros(NUM_STEPS, DIM, dtype=torch.float64)
    for i, sigma in enumerate(SIGMAS.double()[:-1].tolist()):
        pull = nft_mean(sigma, *image_moments())
        expected[i] = 2 / DIM * reach(sigma)[0] * sigma / NUM_STEPS * pull
    assert_unbiased(forward_estimates(algorithm)[..., :DIM], expected)
