# SPDX-License-Identifier: Apache-2.0
"""Rollouts with a window of stochastic steps, shared prefixes, and a multistep tail.

Everything is compared with loops written out here, or with the known solution of the ODE of
Gaussian data.

Axes: P prompts, G samples each, B = P G; N steps in the window.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from chunkgrpo.core import (
    CpsTransition,
    DanceDiffusion,
    FlowDiffusion,
    OdeDiffusion,
    Transition,
    make_sigmas,
)
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.runtime.seeds import NoiseSource, derive_seed
from chunkgrpo.runtime.solvers import MultistepTail
from compose import rollout

SIGMAS = make_sigmas(7)
FLOW = Transition(FlowDiffusion(0.7))
KERNELS = [FLOW, Transition(DanceDiffusion(0.3)), CpsTransition(0.9)]
SEEDS = list(range(100, 106))
WINDOW = range(2, 5)


def toy(dim=4):
    mean = torch.randn(dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return GaussianPolicy(mean, 0.5)


def run(policy=None, transition=FLOW, **options):
    """Two prompts, three samples each."""
    options = {"seeds": SEEDS, "window": WINDOW} | options
    return rollout(policy or toy(), "ab", transition, SIGMAS, 3, **options)


def by_hand(transition, same_noise, prefix):
    """States, log-probs, velocities at every sampler step, and the last image."""
    policy = toy()
    leaders = [SEEDS[b - b % 3] for b in range(6)]
    owners = leaders if same_noise else SEEDS
    first = leaders if same_noise else [derive_seed(seed, 1) for seed in SEEDS]
    inside = NoiseSource([derive_seed(seed, 2) for seed in SEEDS] if same_noise else SEEDS)
    before = NoiseSource([derive_seed(seed, 3) for seed in owners])
    x = NoiseSource(first).draw((4,))
    states, velocities, log_probs = [x], [], []
    for i, (sigma, after) in enumerate(pairwise(SIGMAS)):
        v = policy.velocity(x, sigma.expand(6), policy.encode("abcdef")).detach()
        step = transition(x, v, sigma, after)
        log_prob = torch.zeros(6)
        if i in WINDOW:
            x = (step.mean + step.std * inside.draw((4,))).float()
            normal = torch.distributions.Normal(step.mean, step.std)
            log_prob = normal.log_prob(x.double()).mean(1)
        elif i < WINDOW.start and prefix == "sde":
            x = (step.mean + step.std * before.draw((4,))).float()
        else:
            x = (x - (sigma - after) * v).float()
        states.append(x)
        velocities.append(v)
        log_probs.append(log_prob)
    return torch.stack(states, 1), torch.stack(log_probs, 1), torch.stack(velocities, 1)


# --- the window --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["ode", "sde"])
@pytest.mark.parametrize("same_noise", [False, True])
@pytest.mark.parametrize("transition", KERNELS, ids=str)
def test_a_window_keeps_exactly_its_steps(transition, same_noise, prefix):
    trajectory = run(
        transition=transition, same_noise=same_noise, prefix=prefix, keep_velocities=True
    )
    states, log_probs, velocities = by_hand(transition, same_noise, prefix)
    start, stop = WINDOW.start, WINDOW.stop
    assert trajectory.offset == start and trajectory.num_trained == len(WINDOW)
    assert torch.equal(trajectory.sigmas, SIGMAS)
    assert torch.equal(trajectory.trained_sigmas, SIGMAS[start : stop + 1])
    assert torch.allclose(trajectory.states, states[:, start : stop + 1], rtol=0, atol=1e-6)
    assert torch.allclose(trajectory.final, states[:, -1], rtol=0, atol=1e-6)
    expected = log_probs[:, start:stop].float()
    assert torch.allclose(trajectory.old_log_prob, expected, rtol=0, atol=1e-5)
    assert torch.allclose(
        trajectory.velocities.double(), velocities[:, start:stop], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("same_noise", [False, True])
def test_the_full_window_is_the_default_rollout(same_noise):
    default = run(window=None, same_noise=same_noise, keep_velocities=True)
    assert default.offset == 0 and default.num_trained == 6
    # There is no step before it, and so no prefix; nor is there one of a tail's after it.
    for prefix in ("ode", "sde"):
        full = run(window=range(6), same_noise=same_noise, prefix=prefix, keep_velocities=True)
        for name in ("states", "old_log_prob", "final", "velocities"):
            assert torch.equal(getattr(full, name), getattr(default, name)), name
        assert full.num_evaluations == default.num_evaluations and full.offset == 0


@pytest.mark.parametrize("prefix", ["ode", "sde"])
@pytest.mark.parametrize("same_noise", [False, True])
def test_the_batch_size_changes_nothing(same_noise, prefix):
    whole = run(same_noise=same_noise, prefix=prefix, keep_velocities=True)
    for batch_size in (1, 4):
        policy = toy()
        parts = run(
            policy, same_noise=same_noise, prefix=prefix, keep_velocities=True,
            batch_size=batch_size,
        )  # fmt: skip
        assert max(policy.calls) == min(batch_size, 6)
        for name in ("states", "old_log_prob", "final", "velocities"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), name
        assert parts.num_evaluations == whole.num_evaluations == sum(policy.calls)


def test_an_ode_window_has_no_densities():
    trajectory = run(transition=Transition(OdeDiffusion()))
    assert (trajectory.old_log_prob == 0).all()
    every = run(transition=Transition(OdeDiffusion()), window=None)
    assert torch.equal(trajectory.states, every.states[:, 2:6])
    assert torch.equal(trajectory.final, every.final)


@pytest.mark.parametrize(
    "window", [range(3, 3), range(0, 7), range(-1, 3), range(0, 6, 2), range(4, 2)]
)
def test_windows_outside_the_trained_steps_are_refused(window):
    message = r"a schedule of 7 steps has the trained steps 0 to 5; move or shorten it"
    with pytest.raises(ValueError, match=message):
        run(window=window)


@pytest.mark.parametrize("solver", [None, MultistepTail(1.0, order=1), MultistepTail(0.6)])
def test_without_a_window_only_the_end_is_kept(solver):
    """All steps by Euler as in an ODE window of them all, or by another solver from the start."""
    ode = Transition(OdeDiffusion())
    every = run(transition=ode, window=None)
    found = run(transition=ode, window=range(0), tail=solver)
    assert found.num_trained == 0 and found.old_log_prob.shape == (len(every.final), 0)
    assert torch.equal(found.states[:, 0], every.states[:, 0])
    rows = len(every.final)
    if solver is None:
        assert torch.equal(found.final, every.final)
        assert found.num_evaluations == every.num_evaluations == rows * 7
    elif solver.order == 1:  # the first order of the solver is Euler's step
        torch.testing.assert_close(found.final, every.final, rtol=1e-4, atol=1e-5)
        assert found.num_evaluations == rows * 7
    else:
        assert found.num_evaluations == rows * 5  # the velocity at the start is not asked twice
        assert not torch.equal(found.final, every.final)


def test_unknown_prefixes_are_refused():
    with pytest.raises(ValueError, match=r"unknown prefix 'heun'.*; known: ode, sde"):
        run(prefix="heun")


# --- what a group shares -----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["ode", "sde"])
def test_a_shared_prefix_costs_one_row_a_prompt(prefix):
    policy, told = toy(), []
    trajectory = run(
        policy, same_noise=True, prefix=prefix, progress=lambda *counts: told.append(counts)
    )
    # Steps 0 to 2 (the window's first state is shared as well) for two rows, 3 to 6 for six.
    assert policy.calls == [2, 2, 2, 6, 6, 6, 6]
    assert trajectory.num_evaluations == 2 * 3 + 6 * 4 == told[-1][0] == told[-1][1]
    grouped = trajectory.states.unflatten(0, (2, 3))
    assert (grouped[:, :, 0] == grouped[:, :1, 0]).all()
    assert (grouped[0, :, 0] != grouped[1, :, 0]).all()
    # From the window's first step on all differ.
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (grouped[:, a, 1:] != grouped[:, b, 1:]).all()


@pytest.mark.parametrize("prefix", ["ode", "sde"])
def test_without_one_noise_nothing_is_shared(prefix):
    policy = toy()
    trajectory = run(policy, prefix=prefix)
    assert policy.calls == [6] * 7 and trajectory.num_evaluations == 42
    first = trajectory.states[:, 0]
    assert len({tuple(row.tolist()) for row in first}) == 6


@pytest.mark.parametrize("window", [None, WINDOW], ids=["all", "window"])
@pytest.mark.parametrize("same_noise", [False, True])
def test_conditioning_has_a_row_a_prompt(same_noise, window):
    trajectory = run(same_noise=same_noise, window=window, batch_size=4)
    assert len(trajectory.conditioning) == trajectory.num_prompts == 2
    assert trajectory.num_samples == 6
    assert len(trajectory.conditioning_of(slice(None))) == 6
    assert len(trajectory.conditioning_of(torch.tensor([5, 0, 3]))) == 3


def test_a_stochastic_prefix_is_noise_the_ode_prefix_has_not():
    ode, sde = (run(same_noise=True, prefix=prefix) for prefix in ("ode", "sde"))
    assert (ode.states[:, 0] - sde.states[:, 0]).abs().min() > 1e-3
    starts = run(same_noise=True, prefix="sde", window=range(0, 2)).states[:, 0]
    assert torch.equal(starts, run(same_noise=True, window=range(0, 2)).states[:, 0])


# --- the tail ----------------------------------------------------------------------------------


def exact_image(policy, x, sigma):
    """The ODE of Gaussian data keeps (x - mean) / std of the marginal: x0 in closed form."""
    s, m = policy.std, policy.mean.detach()
    spread = math.sqrt((1 - sigma) ** 2 * s**2 + sigma**2)
    return m + s / spread * (x - (1 - sigma) * m)


def euler(velocity, x, sigmas):
    for sigma, after in pairwise(sigmas):
        x = x - (sigma - after) * velocity(x, sigma)
    return x


def velocity_of(policy):
    rows = policy.encode("abcd")
    return lambda x, sigma: policy.velocity(x, sigma.expand(len(x)), rows).detach()


def start(rows=4, dim=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64)


def test_first_order_is_ddim_which_is_euler_for_a_flow():
    r"""DPM-Solver++(1) = DDIM: x' = (s'/s) x + (1 - s' - (1 - s) s'/s) x0_hat.

    The second factor is 1 - s'/s, so that x' = x - (s - s') v: Euler's step.
    """
    velocity, sigmas = velocity_of(toy()), SIGMAS[2:]
    found = MultistepTail(1.0, order=1)(velocity, start(), sigmas)
    x = start()
    for sigma, after in pairwise(sigmas.double()):
        clean = x - sigma * velocity(x, sigma)
        x = after / sigma * x + (1 - after - (1 - sigma) * after / sigma) * clean
    assert torch.allclose(found, x, rtol=0, atol=1e-5)
    assert torch.allclose(found, euler(velocity, start(), sigmas), rtol=0, atol=1e-5)


def test_a_rollout_with_a_first_order_tail_is_the_rollout_without():
    plain, tailed = run(), run(tail=MultistepTail(1.0, order=1))
    assert torch.equal(tailed.states, plain.states)
    assert torch.allclose(tailed.final, plain.final, rtol=0, atol=1e-5)
    assert tailed.num_evaluations == plain.num_evaluations


def test_a_thinned_tail_saves_rows():
    policy = toy()
    trajectory = run(policy, window=range(0, 2), tail=MultistepTail(0.4))
    # Five steps are left, ceil(0.4 * 5) = 2 are taken.
    assert policy.calls == [6] * (2 + 2) and trajectory.num_evaluations == 24
    assert torch.equal(trajectory.states, run(window=range(0, 2)).states)


@pytest.mark.parametrize(
    ("fraction", "steps", "index"),
    [
        (1.0, 5, [0, 1, 2, 3, 4, 5]),
        (0.4, 5, [0, 2, 5]),  # 2.5 is rounded to the even neighbour
        (0.4, 10, [0, 2, 5, 8, 10]),
        (0.01, 5, [0, 5]),
        (0.5, 1, [0, 1]),
        (0.28, 25, [0, 4, 7, 11, 14, 18, 21, 25]),  # 7 steps, though 0.28 * 25 > 7 in floats
    ],
)
def test_levels_of_the_tail_by_hand(fraction, steps, index):
    left = make_sigmas(steps + 3)[3:]
    assert torch.equal(MultistepTail(fraction).sigmas(left), left[index])


def tail_errors(solve, counts):
    """Largest errors against the exact image from sigma 0.8 on uniform grids."""
    policy = toy()
    exact = exact_image(policy, start(), 0.8)
    found = []
    for count in counts:
        sigmas = torch.linspace(0.8, 0.0, count + 1, dtype=torch.float64)
        found.append((solve(velocity_of(policy), start(), sigmas) - exact).abs().max().item())
    return found


def test_many_euler_steps_reach_the_exact_image():
    (error,) = tail_errors(euler, [2000])
    assert error < 1e-3


def test_the_tail_converges_at_its_order_and_beats_euler():
    """Error of order h^2 log(1/h): steps near the image stay long in log-SNR, however many."""
    counts = [8, 64, 128, 256]
    first = tail_errors(euler, counts)
    second = tail_errors(MultistepTail(1.0, 2), counts)
    print(f"\nEuler {first}\nDPM-Solver++(2M) {second}")
    without_log = [error / math.log(count) for error, count in zip(second, counts, strict=True)]
    assert math.log2(first[-2] / first[-1]) == pytest.approx(1.0, abs=0.02)
    for coarse, fine in pairwise(without_log[1:]):
        assert math.log2(coarse / fine) == pytest.approx(2.0, abs=0.1)
    assert all(b < a / 8 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fraction", [0.4, 0.6, 1.0])
def test_what_thinning_costs_after_half_of_the_published_steps(fraction):
    """17 steps, shift 3, the ODE from step 8: largest errors, data of standard deviation 0.5.

    The published 0.4 of the steps (4 of 9) is better than Euler there (0.19 against 0.24) and worse
    than all of Euler's (0.12); 0.6 of them is better than these as well (0.06).
    """
    policy, sigmas = toy(), make_sigmas(17)[8:]
    exact = exact_image(policy, start(), sigmas[0].double())
    velocity, tail = velocity_of(policy), MultistepTail(fraction)

    def error(image):
        return (image - exact).abs().max().item()

    found = error(tail(velocity, start(), sigmas))
    same_levels = error(euler(velocity, start(), tail.sigmas(sigmas)))
    all_levels = error(euler(velocity, start(), sigmas))
    print(f"\n{fraction}: {found:.4f}, Euler {same_levels:.4f}, all 9 steps {all_levels:.4f}")
    assert found < same_levels
    assert (found < all_levels) == (fraction > 0.5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("count", [5, 18])
def test_the_tail_is_diffusers_scheduler_on_the_same_sigmas(count, order):
    """The documented route takes no sigmas but makes its own; handed to the tail, they agree."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order
    )
    scheduler.set_timesteps(count)
    velocity, x = velocity_of(toy()), start()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(velocity(x, sigma), timestep, x).prev_sample
    found = MultistepTail(1.0, order)(velocity, start(), scheduler.sigmas)
    assert torch.allclose(found, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction is 0.0; it must be in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction is 1.5; it must be in \(0, 1\]"),
        ({"fraction": math.nan}, "fraction is nan"),
        ({"order": 0}, "order is 0; it must be 1, 2 or 3"),
        ({"order": 4}, "order is 4"),
    ],
)
def test_tails_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultistepTail(**options)
