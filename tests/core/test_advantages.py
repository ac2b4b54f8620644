# SPDX-License-Identifier: Apache-2.0
"""Advantages against statistics.stdev and their invariants."""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from chunkgrpo.core.advantages import (
    CONVENTIONS,
    Advantages,
    chunk_advantages,
    chunk_gains,
    group_advantages,
    group_correlation,
)
from closed_forms import by_definition

CENTRED = sorted(set(CONVENTIONS) - {"ungrouped", "group_std_median"})

reward_groups = st.integers(1, 4).flatmap(
    lambda num_prompts: st.integers(2, 12).flatmap(
        lambda group_size: st.lists(
            st.lists(st.floats(-20, 20), min_size=group_size, max_size=group_size),
            min_size=num_prompts,
            max_size=num_prompts,
        )
    )
)


def advantages_of(groups, convention="group_std", clip=None):
    rewards = torch.tensor(groups, dtype=torch.float64)
    return group_advantages(rewards.reshape(-1), len(groups), convention, clip).values


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("group_size", [2, 5, 12])
def test_every_convention_by_its_definition(convention, group_size):
    generator = torch.Generator().manual_seed(group_size)
    groups = (5 * torch.randn(3, group_size, generator=generator, dtype=torch.float64)).tolist()
    expected = by_definition(groups, convention)
    assert advantages_of(groups, convention).tolist() == pytest.approx(expected, rel=1e-9)


def test_hand_computed_group():
    result = group_advantages(torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0, 7.0]), 2)
    assert isinstance(result, Advantages)
    assert result.values.tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    assert result.spread.tolist() == pytest.approx([1.0, 0.0])
    assert int(result.num_zero_spread) == 1


@pytest.mark.parametrize("convention", CENTRED)
@given(groups=reward_groups)
def test_centred_advantages_sum_to_zero_in_each_group(convention, groups):
    values = advantages_of(groups, convention).reshape(len(groups), -1)
    scale = 1 + values.abs().amax()
    assert (values.sum(1).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(groups=reward_groups, seed=st.integers(0, 99))
def test_sample_order_does_not_matter(convention, groups, seed):
    rewards = torch.tensor(groups, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randperm(rewards.shape[0], generator=generator)
    images = torch.randperm(rewards.shape[1], generator=generator)
    shuffled = advantages_of(rewards[prompts][:, images].tolist(), convention)
    straight = advantages_of(groups, convention).reshape(rewards.shape)[prompts][:, images]
    # Sums in another order differ in the last bits; a spread of 1e-9 magnifies them.
    assert torch.allclose(shuffled.reshape(rewards.shape), straight, rtol=1e-6, atol=1e-5)


@given(groups=reward_groups, shift=st.floats(-50, 50))
def test_shifting_a_prompt_changes_nothing_within_its_group(groups, shift):
    # A spread that rounding explains, 1e-6 of the scores' size, is none: so a shift decides there.
    spreads = [max(group) - min(group) for group in groups]
    assume(all(spread == 0 or spread > 1e-3 for spread in spreads))
    moved = [[reward + shift for reward in group] for group in groups]
    for convention in ("group_population_std", "mean_only"):
        assert torch.allclose(
            advantages_of(moved, convention), advantages_of(groups, convention), atol=1e-6
        )


@given(groups=reward_groups)
def test_bounds_of_normalised_advantages(groups):
    size = len(groups[0])
    slack = 1 + 1e-6
    assert advantages_of(groups, "group_std").abs().max() <= (size - 1) / math.sqrt(size) * slack
    assert advantages_of(groups, "group_population_std").abs().max() <= math.sqrt(size - 1) * slack


def test_the_bound_for_twelve_images_is_reached_and_never_clipped():
    rewards = torch.tensor([1.0] + [0.0] * 11, dtype=torch.float64)
    largest = group_advantages(rewards, 1).values.max().item()
    assert largest == pytest.approx(11 / math.sqrt(12), rel=1e-6)
    assert round(largest, 3) == 3.175
    unclipped = group_advantages(rewards, 1, clip=None).values.max().item()
    assert unclipped == largest


def test_clip_binds_with_a_global_std():
    rewards = torch.tensor([0.0] * 99 + [100.0] + [0.0] * 100)
    result = group_advantages(rewards, 2, "global_std", clip=5.0)
    assert result.values.max().item() == 5.0
    assert group_advantages(rewards, 2, "global_std", clip=None).values.max().item() > 10


@pytest.mark.parametrize("convention", [name for name in CONVENTIONS if name != "ungrouped"])
@given(level=st.floats(-1000, 1000, width=32), group_size=st.integers(2, 16))
def test_equal_rewards_teach_exactly_nothing(convention, level, group_size):
    rewards = torch.tensor([level] * group_size + [float(i) for i in range(group_size)])
    result = group_advantages(rewards, 2, convention)
    assert torch.equal(result.values[:group_size], torch.zeros(group_size))
    assert result.values[group_size:].abs().max() > 0
    assert int(result.num_zero_spread) == 1 and result.spread[0].item() == 0.0


def test_ungrouped_still_counts_groups_without_spread():
    result = group_advantages(torch.tensor([1.0, 1.0, 2.0, 2.0]), 2, "ungrouped")
    assert result.values.tolist() == pytest.approx([-0.8660254, -0.8660254, 0.8660254, 0.8660254])
    assert int(result.num_zero_spread) == 2


def test_median_convention_makes_half_of_a_group_positive():
    rewards = torch.tensor([0.0, 0.0, 1.0, 10.0, 30.0, 90.0])
    values = group_advantages(rewards, 1, "group_std_median").values
    assert int((values > 0).sum()) == int((values < 0).sum()) == 3


def test_half_precision_is_upcast():
    rewards = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert group_advantages(rewards, 1).values.dtype == torch.float32


@pytest.mark.parametrize(
    ("rewards", "num_prompts", "keywords", "message"),
    [
        (torch.ones(3), 3, {}, "group size is 1.*raise group_size"),
        (torch.ones(5), 2, {}, "5 rewards do not form 2 equal groups"),
        (torch.ones(4), 0, {}, "4 rewards do not form 0"),
        (torch.ones(0), 1, {}, "0 rewards"),
        (torch.ones(2, 2), 2, {}, r"shape \(2, 2\)"),
        (torch.tensor([1, 2, 3, math.nan]), 2, {}, r"rewards\[3\] is nan \(prompt 1, image 1\)"),
        (torch.tensor([1, -math.inf]), 1, {}, r"rewards\[1\] is -inf"),
        (torch.ones(4), 2, {"convention": "gdpo"}, "'gdpo'; it must be one of.*group_std"),
        (torch.ones(4), 2, {"clip": 0.0}, "clip is 0.0.*None turns it off"),
        (torch.ones(4), 2, {"clip": math.nan}, "clip is nan"),
    ],
)
def test_errors_name_value_rule_and_fix(rewards, num_prompts, keywords, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, num_prompts, **keywords)


# --- credit by chunk ---------------------------------------------------------------------------


def test_gains_are_differences_and_sum_to_the_whole_gain():
    rewards = torch.tensor([[0.0, 2.0, 1.5, 4.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    gains = chunk_gains(rewards)
    assert gains.tolist() == [[2.0, -0.5, 2.5], [0.0, 0.0, 0.0]]
    assert torch.equal(gains.sum(1), rewards[:, -1] - rewards[:, 0])
    assert chunk_gains(rewards[:, :2]).shape == (2, 1)
    assert chunk_gains(rewards.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(4, 1), (4, 0), (4,), (2, 2, 2)])
def test_gains_need_two_boundaries(shape):
    with pytest.raises(ValueError, match=r"shape \(.*\); one column per chunk .* at least one"):
        chunk_gains(torch.zeros(shape))


def test_each_chunk_is_compared_with_the_same_chunk_of_its_siblings():
    gains = torch.tensor([[1.0, 5.0], [2, 5], [3, 5], [0, 1], [0, 2], [3, 9]])
    found = chunk_advantages(gains, 2, "mean_only", None)
    expected = torch.tensor([[-1.0, 0], [0, 0], [1, 0], [-1, -3], [-1, -2], [2, 5]])
    assert torch.allclose(found, expected)
    normalised = chunk_advantages(gains, 2)
    for column in range(2):
        alone = group_advantages(gains[:, column], 2).values
        assert torch.equal(normalised[:, column], alone)
    assert chunk_advantages(gains, 2, "mean_only", 1.5).abs().max() == 1.5
    # A gain's unit or offset is its own chunk's affair.
    moved = chunk_advantages(gains * torch.tensor([7.0, 1.0]) + 3, 2)
    assert torch.allclose(moved, normalised, atol=1e-5)


# --- dropped samples ---------------------------------------------------------------------------

NAN = float("nan")


def drop(groups, gone):
    """Rewards [B] with garbage where (group, image) is gone, and what is kept."""
    rewards = torch.tensor(groups, dtype=torch.float64)
    kept = torch.ones_like(rewards, dtype=torch.bool)
    for number, where in enumerate(gone):
        kept[where] = False
        rewards[where] = (NAN, math.inf, 1e9)[number % 3]
    return rewards.flatten(), kept.flatten()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("gone", [[(0, 1), (1, 3)], [(0, 0), (0, 2)], [(1, 2)]])
def test_statistics_are_those_of_the_samples_left(convention, gone):
    generator = torch.Generator().manual_seed(len(gone))
    groups = (3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)).tolist()
    rewards, kept = drop(groups, gone)
    left = [[r for g, r in enumerate(row) if (p, g) not in gone] for p, row in enumerate(groups)]
    result = group_advantages(rewards, 2, convention, None, kept)
    assert result.values[kept].tolist() == pytest.approx(by_definition(left, convention), rel=1e-9)
    assert (result.values[~kept] == 0).all()
    assert result.spread.tolist() == pytest.approx([statistics.stdev(row) for row in left])
    assert int(result.num_zero_spread) == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_groups_of_which_one_is_left_teach_nothing(convention):
    rewards, kept = drop([[1.0, 5.0], [2.0, 3.0], [7.0, 7.5]], [(0, 1), (2, 0), (2, 1)])
    result = group_advantages(rewards, 3, convention, kept_B=kept)
    assert result.values.isfinite().all() and int(result.num_zero_spread) == 2
    assert result.spread[[0, 2]].tolist() == [0.0, 0.0]
    assert result.values[~kept].tolist() == [0.0] * 3
    assert result.values[2] < result.values[3]
    if CONVENTIONS[convention].centres_groups:
        assert result.values[0] == 0
    alone = group_advantages(rewards[:2], 1, convention, kept_B=kept[:2])
    assert alone.values.tolist() == [0.0, 0.0] and int(alone.num_zero_spread) == 1
    none = group_advantages(rewards, 3, convention, kept_B=torch.zeros(6, dtype=torch.bool))
    assert none.values.tolist() == [0.0] * 6 and int(none.num_zero_spread) == 3


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_keeping_all_changes_no_bit(convention):
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(24, dtype=torch.bool)
    assert torch.equal(
        group_advantages(rewards, 4, convention, kept_B=kept).values,
        group_advantages(rewards, 4, convention).values,
    )


def test_kept_samples_must_be_finite_and_fit():
    rewards = torch.tensor([1.0, NAN, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        group_advantages(rewards, 2, kept_B=torch.tensor([True, True, False, True]))
    for wrong in (torch.ones(3, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match=r"one boolean per sample is needed, \(4,\)"):
            group_advantages(rewards, 2, kept_B=wrong)


def test_chunks_of_dropped_samples_teach_nothing():
    gains = torch.tensor([[1.0, 5], [NAN, 1], [3, 7], [0, 1], [0, 2], [3, 9]])
    kept = torch.tensor([True, False, True, True, True, True])
    found = chunk_advantages(gains, 2, "mean_only", None, kept)
    expected = torch.tensor([[-1.0, -1], [0, 0], [1, 1], [-1, -3], [-1, -2], [2, 5]])
    assert torch.allclose(found, expected)


# --- several rewards ---------------------------------------------------------------------------


def test_correlation_is_within_groups():
    a = torch.tensor([1.0, 2.0, 4.0, 10.0, 11.0, 15.0])
    assert group_correlation(a, 3 * a + 1, 2).item() == pytest.approx(1)
    assert group_correlation(a, -a, 2).item() == pytest.approx(-1)
    moved = a + torch.tensor([100.0] * 3 + [0.0] * 3)  # prompts differ, images do not
    assert group_correlation(a, moved, 2).item() == pytest.approx(1)
    other = torch.tensor([0.0, 4.0, 5.0, 1.0])
    mine = torch.tensor([0.0, 3.0, 0.0, 3.0])
    expected = 0.0  # agreement in one group, disagreement as strong in the other
    assert group_correlation(mine, other, 2).item() == pytest.approx(expected)
    kept = torch.tensor([True, True, False, True, True, True])
    broken = a.clone()
    broken[2] = NAN
    assert group_correlation(broken, a, 2, kept).item() == pytest.approx(1)
    assert group_correlation(a, torch.full((6,), 0.1), 2).isnan()


# --- rounding is not signal ---------------------------------------------------------------------

LAST_BIT = 1 - 2**-24  # the largest float32 below 1


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-30, 1e30, 3.7])
def test_the_last_bit_of_a_reward_is_no_advantage(convention, scale):
    """1, 1, 1, 1 - 6e-8 had an advantage of -1.34, and 0 is right in any unit."""
    rewards = scale * torch.tensor([1.0, 1.0, 1.0, LAST_BIT])
    assert len(rewards.unique()) == 2
    found = group_advantages(rewards, 1, convention)
    assert found.values.tolist() == [0.0] * 4
    assert int(found.num_zero_spread) == 1 and found.spread.tolist() == [0.0]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_differences_above_rounding_count_in_full(convention):
    """A millionth of the size is the border, on whichever side of 0 the rewards lie."""
    for offset in (1.0, -1.0):
        above = offset + torch.tensor([0.0, 0.0, 0.0, 2.1e-6])
        assert int(group_advantages(above, 1, convention).num_zero_spread) == 0
        assert group_advantages(above, 1, convention).values.abs().max() > 0
        below = offset + torch.tensor([0.0, 0.0, 0.0, 0.9e-6])
        assert int(group_advantages(below, 1, convention).num_zero_spread) == 1
        assert group_advantages(below, 1, convention).values.tolist() == [0.0] * 4


def test_small_rewards_around_zero_are_no_rounding():
    """The rule is one of the reward's own size: it does not know what unit 1e-9 is of."""
    rewards = torch.tensor([0.0, 1e-9, -1e-9, 2e-9])
    found = group_advantages(rewards, 1, "mean_only", clip=None)
    torch.testing.assert_close(found.values, rewards - rewards.mean(), rtol=1e-5, atol=0)
    assert int(found.num_zero_spread) == 0


def test_each_group_has_its_own_size():
    """Rewards of size 1e-4 beside others of size 1000."""
    rewards = torch.tensor([1000.0, 1000.0001, 1e-4, 2e-4])
    found = group_advantages(rewards, 2)
    assert found.values[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found.values[2:].abs(), torch.full((2,), 0.7070), rtol=1e-3, atol=0)
    assert int(found.num_zero_spread) == 1


def test_without_groups_the_whole_batch_is_one():
    """Two prompts of which one scores 1 and the other 1 - 6e-8 do not differ; 1 and 0.5 do."""
    alike = torch.tensor([1.0, 1.0, LAST_BIT, LAST_BIT])
    assert group_advantages(alike, 2, "ungrouped").values.tolist() == [0.0] * 4
    different = torch.tensor([1.0, 1.0, 0.5, 0.5])
    assert group_advantages(different, 2, "ungrouped").values.abs().min() > 0.8


def test_a_dropped_sample_has_no_size():
    rewards = torch.tensor([1e-4, 2e-4, 1e9, 3e-4])
    kept = torch.tensor([True, True, False, True])
    found = group_advantages(rewards, 1, kept_B=kept)
    assert int(found.num_zero_spread) == 0 and found.values[2] == 0
    assert found.values[0] == -1.0 or abs(found.values[0] + 1) < 1e-3


def test_rewards_that_differ_by_rounding_have_no_correlation():
    """Their last bits would otherwise count like any difference."""
    noisy, plain = torch.tensor([1.0, LAST_BIT, 1.0, LAST_BIT]), torch.tensor([1.0, 2.0, 1.0, 2.0])
    assert group_correlation(noisy, plain, 1).isnan()
    both = torch.cat([noisy, plain]), torch.cat([plain, plain])
    assert group_correlation(*both, 2).item() == pytest.approx(1 / 2**0.5)
