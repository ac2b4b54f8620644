# SPDX-License-Identifier: Apache-2.0
"""What the theory promises, measured: marginals, convergence orders, published tables, gradients.

Axes: B samples, N trained steps, C chunks.
"""

import math
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

from chunkgrpo.core import (
    ChunkPlan,
    DanceDiffusion,
    FlowDiffusion,
    Gaussian,
    OdeDiffusion,
    Transition,
    adaptive_plan,
    chosen_mask,
    chunk_log_ratio,
    chunk_weights,
    clipped_surrogate,
    gradient_is_cut,
    make_sigmas,
    paper_plan,
    plackett_luce_inclusion,
    shift_sigmas,
    step_coefficients,
    step_plan,
    surrogate_slope,
    whole_plan,
)
from closed_forms import policy_gradient_scale

# --- the published schedule, number by number -------------------------------------------------

# T = 17, shift 3, eta 0.7:
# sigma, dt, std flow, scale flow, std dance, scale dance, chunk of [2,3,4,7], implicit weight
TABLE = """
1.0000 .0204 .700 .029  .100 .204  0 2.0
0.9796 .0221 .722 .038  .104 .214  0 2.0
0.9574 .0241 .516 .058  .109 .224  1 1.333
0.9333 .0264 .425 .077  .114 .236  1 1.333
0.9070 .0289 .372 .097  .119 .249  1 1.333
0.8780 .0319 .335 .118  .125 .264  2 1.0
0.8462 .0353 .309 .143  .132 .281  2 1.0
0.8108 .0394 .288 .170  .139 .300  2 1.0
0.7714 .0442 .270 .203  .147 .322  2 1.0
0.7273 .0499 .255 .243  .156 .348  3 .571
0.6774 .0567 .242 .292  .167 .380  3 .571
0.6207 .0651 .229 .355  .179 .419  3 .571
0.5556 .0756 .215 .437  .192 .470  3 .571
0.4800 .0887 .200 .551  .208 .538  3 .571
0.3913 .1056 .182 .721  .227 .641  3 .571
0.2857 .1278 .158 1.005 .250 .824  3 .571
0.1579 .1579 .120 1.632 .278 1.309 - -
"""
ROWS = [line.split() for line in TABLE.split("\n") if line]


def assert_printed(value, printed):
    """Equal to the printed number to its last digit."""
    half_unit = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    assert abs(value - float(printed)) <= half_unit * 1.001, (value, printed)


@pytest.mark.parametrize("i", range(17))
def test_standard_deviations_and_gradient_scales_of_the_published_schedule(i):
    sigmas = make_sigmas(17).double()
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    assert_printed(sigma.item(), ROWS[i][0])
    assert_printed((sigma - sigma_next).item(), ROWS[i][1])
    x = torch.zeros(1, 1, dtype=torch.float64)
    for diffusion, std, scale in (
        (FlowDiffusion(0.7), ROWS[i][2], ROWS[i][3]),
        (DanceDiffusion(0.7), ROWS[i][4], ROWS[i][5]),
    ):
        assert_printed(Transition(diffusion)(x, x, sigma, sigma_next).std.item(), std)
        assert_printed(policy_gradient_scale(sigmas, diffusion)[i].item(), scale)


def test_implicit_weights_of_the_published_chunks():
    """Averaged over uniform choices, unequal chunks reweight step-level GRPO by N / (C cs)."""
    plan = paper_plan(16)
    assert [str(chunk) for chunk in plan.chunk_of_step.tolist()] == [row[6] for row in ROWS[:16]]
    on_policy_slope = torch.ones(1, 4, dtype=torch.float64)
    choices = list(combinations(range(4), 2))
    total = torch.zeros(1, 16, dtype=torch.float64)
    for choice in choices:
        mask = chosen_mask(torch.tensor([choice]), 4)
        total += step_coefficients(mask, on_policy_slope, plan, 2.0) / len(choices)
    for weight, row in zip((16 * total[0]).tolist(), ROWS, strict=False):
        assert_printed(weight, row[7])


def test_equal_chunks_reweight_nothing():
    mask = torch.ones(1, 4, dtype=torch.bool)
    slope = torch.ones(1, 4, dtype=torch.float64)
    coefficients = step_coefficients(mask, slope, ChunkPlan((4, 4, 4, 4)), 4.0)
    assert torch.allclose(coefficients, torch.full((1, 16), 1 / 16, dtype=torch.float64))


# --- a flow whose velocity is known -----------------------------------------------------------


def gaussian_velocity(x, sigma, mean, std):
    """Optimal velocity when images are N(mean, std^2): E[noise - image | x], in closed form."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / variance
    return slope * (x - (1 - sigma) * mean) - mean


def propagated_moments(diffusion, sigmas, mean=0.8, std=0.5):
    """Exact mean and variance after every step; the transition is affine in x.

    Yields (mean before, variance before, slope, injected std, mean after, variance after).
    """
    first = sigmas[0].item()
    m, v = (1 - first) * mean, (1 - first) ** 2 * std**2 + first**2
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, sigma_next in pairwise(sigmas):
        velocity = gaussian_velocity(x, sigma, mean, std)
        step = Transition(diffusion)(x, velocity, sigma, sigma_next)
        offset, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
        before = (m, v)
        m, v = slope * m + offset, slope**2 * v + step.std.item() ** 2
        yield *before, slope, step.std.item(), m, v


def variance_error(diffusion, num_steps, top=1.0, shift=1.0):
    grid = shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)
    *_, (*_, mean, variance) = propagated_moments(diffusion, top * grid)
    assert mean == pytest.approx(0.8, abs=1e-12)  # the mean moves on a straight line: no error
    return variance - 0.5**2


@pytest.mark.parametrize(
    ("diffusion", "top"),
    [
        (OdeDiffusion(), 1.0),
        (DanceDiffusion(0.3), 1.0),
        (DanceDiffusion(0.7), 1.0),
        (FlowDiffusion(0.7), 0.9),
        (FlowDiffusion(1.2), 0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_marginals_survive_any_diffusion_at_first_order(diffusion, top, shift):
    coarse, fine, finer = (variance_error(diffusion, n, top, shift) for n in (200, 400, 800))
    assert abs(finer) < 4e-3
    assert math.log2(abs(coarse / fine)) == pytest.approx(1.0, abs=0.04)
    assert math.log2(abs(fine / finer)) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("eta", [0.4, 0.6, 0.7])
def test_starting_flow_noise_at_pure_noise_lowers_the_order_to_eta_squared(eta):
    """The first step injects std eta however short it is; what it adds decays only as h^(eta^2)."""
    errors = [variance_error(FlowDiffusion(eta), n) for n in (800, 1600, 3200)]
    # 2 e(h/2) - e(h) removes the ordinary first-order part.
    left = [2 * fine - coarse for coarse, fine in pairwise(errors)]
    assert math.log2(left[0] / left[1]) == pytest.approx(eta**2, abs=0.03)


@pytest.mark.parametrize("diffusion", [FlowDiffusion(0.7), DanceDiffusion(0.7)], ids=str)
def test_sampled_trajectories_have_the_propagated_moments(diffusion):
    sigmas, num_samples = make_sigmas(17).double(), 40_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 1, generator=generator, dtype=torch.float64)
    for (sigma, sigma_next), (*_, mean, variance) in zip(
        pairwise(sigmas), propagated_moments(diffusion, sigmas), strict=True
    ):
        velocity = gaussian_velocity(x, sigma, 0.8, 0.5)
        x = Transition(diffusion)(x, velocity, sigma, sigma_next).sample(generator)
        assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / num_samples)
        assert abs(x.var().item() / variance - 1) < 5 * math.sqrt(2 / num_samples)


# --- the dynamics of that flow ----------------------------------------------------------------


def toy_curve(diffusion):
    """Relative L1 per trained step for images N(0, 1) at 17 steps; Gaussian, so std over std."""
    moments = list(propagated_moments(diffusion, make_sigmas(17).double(), 0.0, 1.0))[:-1]
    return torch.tensor(
        [math.sqrt(((a - 1) ** 2 * v + s**2) / v) for _, v, a, s, _, _ in moments],
        dtype=torch.float64,
    )


def test_dynamics_of_the_flow_sampler():
    printed = """
        .75 .77 .53 .45 .40 .37 .36 .34 .34 .33 .32 .32 .30 .28 .25 .22
    """
    for value, text in zip(toy_curve(FlowDiffusion(0.7)).tolist(), printed.split(), strict=True):
        assert_printed(value, text)
    dance = toy_curve(DanceDiffusion(0.7))
    assert (dance.diff() > 0).all()
    ode = toy_curve(OdeDiffusion()).diff().sign().tolist()
    assert [a for a, b in pairwise([*ode, 0.0]) if a != b] == [1.0, -1.0, 1.0]


def test_adaptive_chunks_of_the_flow_sampler():
    curve = toy_curve(FlowDiffusion(0.7))
    assert adaptive_plan(curve, 7, "forward").sizes == (1, 4, 4, 7)
    # Looking backward, the rise belongs to step 1, and the first chunk is the published one.
    for min_size in range(2, 9):
        assert adaptive_plan(curve, min_size, "backward").sizes[0] == 2
    assert adaptive_plan(curve, 8, "forward").sizes == (1, 8, 7)


@pytest.mark.parametrize(
    ("diffusion", "weights", "inclusion", "expected_steps"),
    [
        (FlowDiffusion(0.7), [0.41, 0.25, 0.19, 0.16], [0.71, 0.52, 0.42, 0.35], 7.1),
        (DanceDiffusion(0.7), [0.16, 0.19, 0.25, 0.41], [0.35, 0.41, 0.52, 0.71], 9.0),
        (OdeDiffusion(), [0.18, 0.22, 0.29, 0.32], [0.38, 0.46, 0.56, 0.60], None),
    ],
    ids=str,
)
def test_weighted_choice_on_each_sampler(diffusion, weights, inclusion, expected_steps):
    """High noise is favoured by the flow sampler only."""
    plan = paper_plan(16)
    found = chunk_weights(plan, toy_curve(diffusion)[None])[0]
    assert found.tolist() == pytest.approx(weights, abs=0.0051)
    drawn = plackett_luce_inclusion(found, 2)
    assert drawn.tolist() == pytest.approx(inclusion, abs=0.0051)
    steps = (drawn * torch.tensor(plan.sizes)).sum().item()
    assert expected_steps is None or steps == pytest.approx(expected_steps, abs=0.051)


# --- a policy with parameters -----------------------------------------------------------------

NUM_SAMPLES, LATENT, TRAINED = 6, (3, 2), 16
SIGMAS = make_sigmas(17).double()
TRANSITION = Transition(FlowDiffusion(0.7))
ADVANTAGES = torch.tensor([1.3, -0.8, 0.4, -1.7, 2.0, -0.2], dtype=torch.float64)
PLANS = [paper_plan(16), ChunkPlan((5, 5, 5, 1)), step_plan(16), whole_plan(16)]


class TinyVelocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)

    def forward(self, x, sigma):
        time = sigma.expand(x.shape[0], 1)
        return self.net(torch.cat([x.flatten(1), time], 1)).reshape(x.shape)


def moved_policy(amount, seed=1):
    policy = TinyVelocity()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += amount * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return policy


def rolled_out_states():
    policy, generator = TinyVelocity(), torch.Generator().manual_seed(2)
    states = [torch.randn(NUM_SAMPLES, *LATENT, generator=generator, dtype=torch.float64)]
    with torch.no_grad():
        for i in range(TRAINED):
            velocity = policy(states[-1], SIGMAS[i])
            step = TRANSITION(states[-1], velocity, SIGMAS[i], SIGMAS[i + 1])
            states.append(step.sample(generator))
    return torch.stack(states, 1)


STATES = rolled_out_states()


def step_log_prob(policy, i):
    velocity = policy(STATES[:, i], SIGMAS[i])
    step = TRANSITION(STATES[:, i], velocity, SIGMAS[i], SIGMAS[i + 1])
    return step.log_prob_per_dim(STATES[:, i + 1])


def all_log_probs(policy):
    return torch.stack([step_log_prob(policy, i) for i in range(TRAINED)], 1)


with torch.no_grad():
    OLD = all_log_probs(TinyVelocity())


def gradient_of(policy):
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def some_chunks(plan, seed=3):
    keys = torch.rand(NUM_SAMPLES, plan.num_chunks, generator=torch.Generator().manual_seed(seed))
    num_chosen = max(1, plan.num_chunks // 2)
    return chosen_mask(keys.argsort(1)[:, :num_chosen], plan.num_chunks), num_chosen * NUM_SAMPLES


def direct_loss(policy, plan, mask, denominator, clip):
    log_ratio = chunk_log_ratio(all_log_probs(policy), OLD, plan)
    loss = clipped_surrogate(log_ratio, ADVANTAGES, clip, clip)
    return torch.where(mask, loss, 0.0).sum() / denominator


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("clip", [1e-4, 1e-3, 1e6])
def test_two_pass_gradient_equals_autograd_of_the_direct_loss(plan, clip):
    low = min(clip, 1.0)
    mask, denominator = some_chunks(plan)
    direct = moved_policy(0.03)
    log_ratio = chunk_log_ratio(all_log_probs(direct), OLD, plan)
    loss = clipped_surrogate(log_ratio, ADVANTAGES, low, clip)
    (torch.where(mask, loss, 0.0).sum() / denominator).backward()

    cut = gradient_is_cut(log_ratio, ADVANTAGES, low, clip)
    if clip == 1e-4:  # clipped and unclipped, for advantages of both signs
        for sign in (1, -1):
            of_sign = (ADVANTAGES.sign() == sign)[:, None].expand_as(cut)
            assert (mask & of_sign & cut).any() and (mask & of_sign & ~cut).any()
    assert clip < 1 or not cut.any()

    pieces = moved_policy(0.03)
    with torch.no_grad():
        log_ratio = chunk_log_ratio(all_log_probs(pieces), OLD, plan)
    slope = surrogate_slope(log_ratio, ADVANTAGES, low, clip)
    coefficients = step_coefficients(mask, slope, plan, denominator)
    for i in reversed(range(TRAINED)):  # one step at a time, in an order of its own
        (coefficients[:, i] * step_log_prob(pieces, i)).sum().backward()
    assert gradient_of(direct).abs().max() > 1e-6
    assert torch.allclose(gradient_of(pieces), gradient_of(direct), rtol=1e-9, atol=1e-13)


def test_chunks_of_one_are_step_level_grpo_to_the_last_bit():
    clip, plan = 1e-4, step_plan(TRAINED)
    mask = torch.ones(NUM_SAMPLES, TRAINED, dtype=torch.bool)
    ours = moved_policy(0.03)
    our_loss = direct_loss(ours, plan, mask, NUM_SAMPLES * TRAINED, clip)
    our_loss.backward()

    theirs = moved_policy(0.03)
    ratio = torch.exp(all_log_probs(theirs) - OLD)
    advantage = ADVANTAGES[:, None]
    unclipped = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1 - clip, 1 + clip)
    their_loss = torch.maximum(unclipped, clipped).sum() / (NUM_SAMPLES * TRAINED)
    their_loss.backward()
    assert torch.equal(our_loss, their_loss)
    assert torch.equal(gradient_of(ours), gradient_of(theirs))


def test_one_chunk_is_the_sequence_level_geometric_mean():
    policy = moved_policy(0.03)
    with torch.no_grad():
        new = all_log_probs(policy)
        whole = chunk_log_ratio(new, OLD, whole_plan(TRAINED)).exp()[:, 0]
        # Densities of whole trajectories, to the power 1 / (steps x latent elements).
        num_elements = math.prod(LATENT)
        log_density = (new * num_elements).sum(1) - (OLD * num_elements).sum(1)
    assert torch.allclose(whole, (log_density / (TRAINED * num_elements)).exp(), rtol=1e-12)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_before_any_update_ratios_are_one_and_the_gradient_is_the_reweighted_step_gradient(plan):
    mask = torch.ones(NUM_SAMPLES, plan.num_chunks, dtype=torch.bool)
    denominator = plan.num_chunks * NUM_SAMPLES
    ours = TinyVelocity()
    assert torch.equal(
        chunk_log_ratio(all_log_probs(ours), OLD, plan).detach(),
        torch.zeros(NUM_SAMPLES, plan.num_chunks, dtype=torch.float64),
    )
    loss = direct_loss(ours, plan, mask, denominator, 5e-5)
    loss.backward()
    assert loss.item() == pytest.approx(-ADVANTAGES.mean().item(), rel=1e-12)

    reweighted = TinyVelocity()
    sizes = torch.tensor(plan.sizes, dtype=torch.float64)
    weights = TRAINED / (plan.num_chunks * sizes[plan.chunk_of_step])
    step_terms = -ADVANTAGES[:, None] * all_log_probs(reweighted) * weights
    (step_terms.sum() / (TRAINED * NUM_SAMPLES)).backward()
    assert torch.allclose(gradient_of(ours), gradient_of(reweighted), rtol=1e-10, atol=1e-14)


def test_log_ratio_identity():
    """log ratio = -(eps . delta + |delta|^2 / 2) / D: its bias is always negative."""
    generator = torch.Generator().manual_seed(0)
    num_samples, size, std = 200, 50, 0.3
    eps = torch.randn(num_samples, size, generator=generator, dtype=torch.float64)
    old_mean = torch.randn(num_samples, size, generator=generator, dtype=torch.float64)
    delta = 0.1 * torch.randn(num_samples, size, generator=generator, dtype=torch.float64)
    old = Gaussian(old_mean, torch.tensor(std, dtype=torch.float64))
    new = Gaussian(old_mean - std * delta, torch.tensor(std, dtype=torch.float64))
    value = old.sample(noise=eps)
    found = new.log_prob_per_dim(value) - old.log_prob_per_dim(value)
    expected = -((eps * delta).sum(1) + delta.square().sum(1) / 2) / size
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-13)
    # Mean -rms^2 / 2 and standard deviation rms / sqrt(D).
    spread = 0.1 / math.sqrt(size)
    assert abs(found.mean().item() + 0.1**2 / 2) < 4 * spread / math.sqrt(num_samples)
    assert found.std().item() == pytest.approx(spread, rel=0.2)
