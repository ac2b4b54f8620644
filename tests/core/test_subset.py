# SPDX-License-Identifier: Apache-2.0
"""Which samples are trained, and advantages that say nothing about other scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from chunkgrpo.core.subset import (
    expressive_groups,
    largest_advantages,
    num_chosen,
    project_out,
    scaled_within,
)
from closed_forms import drawn


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20), st.data())
def test_none_left_out_is_stronger_than_one_chosen(advantages, data):
    number = data.draw(st.integers(1, len(advantages)))
    chosen = largest_advantages(torch.tensor(advantages), number).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == number
    left = [abs(a) for i, a in enumerate(advantages) if i not in chosen]
    least = min(abs(advantages[i]) for i in chosen)
    # Neighbours in order count as equal up to one part in a million.
    assert not left or max(left) <= least * (1 + 1e-6) ** len(advantages)


@given(
    advantages=st.lists(st.integers(-40, 40), min_size=1, max_size=16),
    exponent=st.floats(-6, 6),
    data=st.data(),
)
def test_the_unit_of_advantages_does_not_matter(advantages, exponent, data):
    """Whole numbers differ by far more than rounding: their order is exact at any scale."""
    number = data.draw(st.integers(1, len(advantages)))
    by_size = sorted(range(len(advantages)), key=lambda i: (-abs(advantages[i]), i))
    scaled = torch.tensor(advantages, dtype=torch.float32) * 10**exponent
    assert largest_advantages(scaled, number).tolist() == sorted(by_size[:number])
    by_chunk = scaled[:, None] * torch.tensor([0.6, 0.0, -0.8])
    assert largest_advantages(by_chunk, number).tolist() == sorted(by_size[:number])


@given(
    advantages=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20),
    power=st.integers(-20, 20),
    data=st.data(),
)
def test_powers_of_two_change_no_choice(advantages, power, data):
    """2^20 is about 10^6. Scaling by them is exact, so even ties by rounding stay."""
    advantages = torch.tensor(advantages, dtype=torch.float64)
    number = data.draw(st.integers(1, len(advantages)))
    chosen = largest_advantages(advantages, number)
    assert torch.equal(largest_advantages(advantages * 2.0**power, number), chosen)


def test_small_advantages_are_told_apart():
    small = torch.tensor([1e-5, -3e-5, 2e-5, 0.0])
    assert largest_advantages(small, 1).tolist() == [1]
    assert largest_advantages(small, 2).tolist() == [1, 2]
    # Also beside large ones, and in any precision.
    assert largest_advantages(torch.tensor([1e-5, 4.0, 3e-5]), 2).tolist() == [1, 2]
    assert largest_advantages(torch.tensor([1e-30, 3e-30, 1e30]), 2).tolist() == [1, 2]
    assert largest_advantages(torch.tensor([1.0, 2.0, -3.0]).bfloat16(), 2).tolist() == [1, 2]


def test_of_equal_ones_the_first_are_chosen():
    assert largest_advantages(torch.tensor([0.5, -1.0, 0.5, 1.0, -0.5]), 3).tolist() == [0, 1, 3]
    assert largest_advantages(torch.zeros(4), 2).tolist() == [0, 1]
    # Two right and two wrong ones of a group differ by rounding alone.
    assert largest_advantages(
        torch.tensor([0.8660254, -0.8660253, 0.8660255, -0.8660256]), 2
    ).tolist() == [
        0,
        1,
    ]


def test_credit_by_chunk_counts_by_its_norm():
    by_chunk = torch.tensor([[1.0, 1.0, 1.0], [-2.0, 0.0, 0.0], [0.0, 1.8, 0.0], [0.0, 0.0, 1.7]])
    assert largest_advantages(by_chunk, 3).tolist() == [0, 1, 2]
    assert largest_advantages(by_chunk, 1).tolist() == [1]


def test_the_larger_half_of_normal_advantages_holds_93_percent_of_their_squares():
    middle = stats.norm.ppf(0.75)
    tail, _ = integrate.quad(lambda z: z * z * stats.norm.pdf(z), middle, math.inf)
    assert 2 * tail == pytest.approx(0.93, abs=0.002)
    advantages = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    kept = advantages[largest_advantages(advantages, num_chosen(20_000, 0.5))]
    assert kept.square().sum() / advantages.square().sum() == pytest.approx(2 * tail, abs=0.004)


@pytest.mark.parametrize(
    ("num_samples", "share", "num_updates", "number"),
    [(192, 0.5, 2, 96), (25, 0.28, 1, 7), (10, 0.01, 1, 1), (10, 0.01, 4, 4), (7, 1.0, 2, 7)],
)
def test_how_many_are_kept(num_samples, share, num_updates, number):
    assert num_chosen(num_samples, share, num_updates) == number


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan])
def test_a_share_is_above_zero_and_at_most_one(share):
    with pytest.raises(ValueError, match=rf"kept is {share}; it must be in \(0, 1\]"):
        num_chosen(10, share)


def centred(held, num_prompts):
    groups = held.reshape(len(held), num_prompts, -1)
    return (groups - groups.mean(-1, keepdim=True)).flatten(1)


@pytest.mark.parametrize("shape", [(24,), (24, 3)])
def test_what_is_left_is_the_residual_of_least_squares(shape):
    advantages, held = drawn(*shape), drawn(2, 24, seed=1)
    left = project_out(advantages, held, 4, torch.arange(24))
    x, a = centred(held, 4).T.numpy(), advantages.numpy()
    fitted = x @ np.linalg.lstsq(x, a, rcond=None)[0]
    assert left.shape == shape and left.dtype == torch.float32
    np.testing.assert_allclose(left.numpy(), a - fitted, atol=1e-6)
    assert np.abs(x.T @ left.double().numpy()).max() < 1e-5
    again = project_out(left, held, 4, torch.arange(24))
    assert torch.allclose(again, left, atol=1e-6)


def test_only_what_is_trained_counts():
    advantages, held, chosen = drawn(24), drawn(1, 24, seed=1), torch.tensor([0, 3, 4, 9, 17, 20])
    left = project_out(advantages, held, 4, chosen)
    rest = torch.ones(24, dtype=torch.bool)
    rest[chosen] = False
    assert (left[rest] == 0).all() and (left[chosen] != 0).all()
    assert abs(float(centred(held, 4)[0] @ left.double())) < 1e-6


def test_what_was_chosen_is_chosen_again():
    """The algorithm that gets the held advantages trains the samples they were held for."""
    advantages, held = drawn(24), drawn(2, 24, seed=1)
    chosen = largest_advantages(advantages, 12)
    assert torch.equal(largest_advantages(project_out(advantages, held, 4, chosen), 12), chosen)


def test_what_prompts_have_in_common_is_not_held():
    """A score that is the same within each group says nothing about which image is better."""
    advantages = drawn(12)
    by_prompt = torch.tensor([1.0, 5.0, -2.0]).repeat_interleave(4)[None]
    left = project_out(advantages, by_prompt, 3, torch.arange(12))
    assert torch.allclose(left.double(), advantages, atol=1e-6)


def test_a_score_that_is_missing_counts_as_its_groups_mean():
    advantages, held = drawn(8), drawn(1, 8, seed=1)
    held[0, 2] = float("nan")
    filled = held.clone()
    filled[0, 2] = held[0, [0, 1, 3]].mean()
    every = torch.arange(8)
    left = project_out(advantages, held, 2, every)
    assert torch.allclose(left, project_out(advantages, filled, 2, every), atol=1e-6)


def test_rounding_of_a_held_score_takes_nothing_out():
    """One direction in twelve would be lost, for the last bit of a constant score."""
    advantages, every = drawn(12), torch.arange(12)
    noisy = torch.ones(1, 12)
    noisy[0, [2, 5, 7]] = 1 - 2**-24
    assert torch.allclose(project_out(advantages, noisy, 3, every).double(), advantages, atol=1e-6)


@pytest.mark.parametrize("shape", [(24,), (24, 3)])
def test_within_a_clip_everything_is_smaller_alike(shape):
    """So that a sum that was 0 stays 0, which cutting the largest alone would not do."""
    advantages, held = 10 * drawn(*shape), drawn(2, 24, seed=1)
    left = project_out(advantages, held, 4, torch.arange(24))
    within = scaled_within(left, 5.0)
    largest = within.reshape(24, -1).abs().amax(0)
    torch.testing.assert_close(largest, torch.full_like(largest, 5.0))
    assert (within.abs() <= 5.0).all()
    x = centred(held, 4).numpy()
    assert np.abs(x @ within.double().numpy()).max() < 1e-4
    assert np.abs(x @ left.clamp(-5.0, 5.0).double().numpy()).max() > 1.0
    # Each chunk has a factor of its own, and what is within already keeps its size.
    ratio = (within / left).reshape(24, -1)
    assert ratio.std(0).max() < 1e-6
    assert torch.equal(scaled_within(left, 1e3), left)
    assert scaled_within(torch.zeros(4), 5.0).tolist() == [0.0] * 4


def test_groups_with_as_few_degrees_of_freedom_as_held_scores_express_nothing():
    kept = torch.tensor([True] * 4 + [True, True, True, False] + [True, True, False, False])
    assert expressive_groups(1, 3, kept).tolist() == [True, True, False]
    assert expressive_groups(2, 3, kept).tolist() == [True, False, False]
    assert expressive_groups(3, 3, kept).tolist() == [False, False, False]


def test_the_order_of_size_is_exact_at_any_scale():
    """Advantages of size 1e-5 that four decimals would make equal, or all zero."""
    sizes = torch.tensor([1.0, 1.2, 1.1, 1.4, 1.3, 0.9])
    for scale in (1e-30, 1e-5, 1.0, 1e30):
        signed = scale * sizes * torch.tensor([1, -1, 1, -1, 1, -1])
        assert largest_advantages(signed, 3).tolist() == [1, 3, 4]
        # Equal ones in the order in which they come, up to rounding.
        tied = scale * torch.tensor([1.0, 1 - 2**-24, -1.0, 1.0, 2.0])
        assert largest_advantages(tied, 3).tolist() == [0, 1, 4]


def test_a_score_twice_is_a_score_once():
    advantages, held, every = drawn(12), drawn(1, 12, seed=1), torch.arange(12)
    twice = project_out(advantages, held.repeat(2, 1), 3, every)
    assert torch.allclose(twice, project_out(advantages, held, 3, every), atol=1e-6)


def test_held_still_a_score_gets_no_gradient():
    """The mean of a Gaussian policy learns the reward and not the score that goes with it."""
    samples = drawn(20_000, 2)
    reward, held = samples[:, 0] + samples[:, 1], samples[:, 1]
    advantages = (reward - reward.mean()) / reward.std()
    left = project_out(advantages, held[None], 1, torch.arange(len(samples)))
    # The score function of the mean is the sample itself.
    gradient = (left.double()[:, None] * samples).mean(0)
    assert gradient[0].item() == pytest.approx(1 / math.sqrt(2), abs=0.03)
    assert abs(gradient[1].item()) < 1e-3
