# SPDX-License-Identifier: Apache-2.0
"""Advantages against statistics.stdev and their invariants."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from chunkgrpo.core.advantages import (
    CONVENTIONS,
    Advantages,
    chunk_advantages,
    chunk_gains,
    group_advantages,
    group_correlation,
)
from chunkgrpo.core.combination import (
    COMBINATIONS,
    combined_advantages,
    combined_chunk_advantages,
    combined_rewards,
    reward_shares,
)
from chunkgrpo.core.subset import largest_advantages, num_chosen, project_out

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


def by_definition(groups, convention):
    """Each convention spelled out with the standard library."""
    batch = [reward for group in groups for reward in group]
    rows = []
    for group in groups:
        mean = statistics.fmean(group)
        centred = [reward - mean for reward in group]
        if convention == "ungrouped":
            mean, scale = statistics.fmean(batch), statistics.stdev(batch) + 1e-8
            rows += [(reward - mean) / scale for reward in group]
            continue
        scale = {
            "group_std": statistics.stdev(group) + 1e-8,
            "group_std_median": statistics.stdev(group) + 1e-8,
            "group_population_std": statistics.pstdev(group) + 1e-4,
            "global_std": statistics.stdev(batch) + 1e-8,
            "flow_grpo": statistics.pstdev(batch) + 1e-4,
            "mean_only": 1.0,
        }[convention]
        row = [value / scale for value in centred]
        if convention == "group_std_median":
            row = [value - statistics.median(row) for value in row]
        rows += row
    return rows


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


# --- credit by chunk --------------------------------------------------------------------------


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


# --- dropped samples --------------------------------------------------------------------------

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


# --- several rewards --------------------------------------------------------------------------

TWO = torch.tensor([[1.0, 2.0, 6.0, 0.5, 0.5, 2.0], [0.3, 0.1, 0.2, 0.9, 0.4, 0.2]]).double()
WEIGHTS = torch.tensor([2.0, 0.5], dtype=torch.float64)


def test_combined_rewards_by_hand():
    a, b = TWO.tolist()
    by_hand = {
        "sum": [2 * x + 0.5 * y for x, y in zip(a, b, strict=True)],
        "product": [x**2 * y**0.5 for x, y in zip(a, b, strict=True)],
        "minimum": [min(2 * x, 0.5 * y) for x, y in zip(a, b, strict=True)],
    }
    by_hand |= {"advantage": by_hand["sum"], "gdpo": by_hand["sum"]}
    for name in COMBINATIONS:
        assert combined_rewards(TWO, WEIGHTS, name).tolist() == pytest.approx(by_hand[name])
        alone = combined_rewards(TWO[:1], torch.ones(1), name)
        assert torch.equal(alone, TWO[0])


@pytest.mark.parametrize("combination", ["sum", "product", "minimum"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_combined_reward_is_credited_like_any_other(combination, convention):
    total = combined_rewards(TWO, WEIGHTS, combination)
    expected = group_advantages(total, 2, convention)
    found = combined_advantages(TWO, WEIGHTS, 2, combination, convention)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.spread, expected.spread)


@pytest.mark.parametrize("convention", ["group_std", "group_population_std", "mean_only"])
def test_advantages_of_each_reward_are_added_by_weight(convention):
    parts = [by_definition([row[:3], row[3:]], convention) for row in TWO.tolist()]
    expected = [2 * x + 0.5 * y for x, y in zip(*parts, strict=True)]
    found = combined_advantages(TWO, WEIGHTS, 2, "advantage", convention, None)
    assert found.values.tolist() == pytest.approx(expected, rel=1e-7)
    rescaled = combined_advantages(TWO, WEIGHTS, 2, "gdpo", convention, None).values
    mean, deviation = statistics.fmean(expected), statistics.stdev(expected) + 1e-4
    assert rescaled.tolist() == pytest.approx([(x - mean) / deviation for x in expected], rel=1e-7)
    assert combined_advantages(TWO, WEIGHTS, 2, "advantage", convention, 0.5).values.max() == 0.5


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_groups_without_spread_stay_at_zero_when_the_batch_is_rescaled(convention):
    # The first group is skewed, so that its median convention has a mean; the second is flat.
    rewards = torch.tensor([[0.0, 0.0, 9.0, 4.0, 4.0, 4.0], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]])
    parts = [group_advantages(row, 2, convention, None).values for row in rewards]
    expected = (2 * parts[0] + 0.5 * parts[1]).tolist()
    mean, deviation = statistics.fmean(expected), statistics.stdev(expected) + 1e-4
    expected = [(x - mean) / deviation for x in expected]
    if CONVENTIONS[convention].centres_groups:
        expected[3:] = [0.0] * 3
    found = combined_advantages(rewards, WEIGHTS, 2, "gdpo", convention, None)
    assert found.values.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert int(found.num_zero_spread) == 1
    if CONVENTIONS[convention].centres_groups:
        assert found.values[3:].tolist() == [0.0] * 3
    if convention == "group_std_median":  # else the flat group would be pushed down
        assert mean > 0.1


def test_by_reward_units_do_not_matter_and_in_a_sum_they_do():
    other = TWO * torch.tensor([[1000.0], [1.0]]) + 7
    for combination, same in (("advantage", True), ("gdpo", True), ("sum", False)):
        before, after = (
            combined_advantages(r, WEIGHTS, 2, combination).values for r in (TWO, other)
        )
        assert torch.allclose(before, after, atol=1e-5) is same


def test_with_one_reward_by_reward_is_the_plain_convention():
    plain = group_advantages(TWO[0], 2)
    found = combined_advantages(TWO[:1], torch.ones(1), 2, "advantage")
    assert torch.equal(found.values, plain.values)
    assert torch.equal(found.num_zero_spread, plain.num_zero_spread)


def test_by_reward_a_group_teaches_while_one_reward_differs():
    rewards = torch.tensor([[1.0, 1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 3.0]])
    found = combined_advantages(rewards, torch.ones(2), 2, "advantage", clip=None)
    assert int(found.num_zero_spread) == 1
    assert found.values[2:].tolist() == [0.0, 0.0] and found.values[0] < 0 < found.values[1]
    # Two rewards that disagree cancel in the sum, and have spread nonetheless.
    opposed = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    found = combined_advantages(opposed, torch.ones(2), 1, "gdpo")
    assert int(found.num_zero_spread) == 0 and found.values.abs().max() < 1e-3


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_dropped_samples_of_several_rewards(combination):
    kept = torch.tensor([True, True, False, True, True, True])
    rewards = TWO.clone()
    rewards[1, 2] = NAN
    found = combined_advantages(rewards, WEIGHTS, 2, combination, clip=None, kept_B=kept)
    assert found.values[2] == 0 and found.values.isfinite().all()
    first = combined_advantages(TWO[:, :2], WEIGHTS, 1, combination, clip=None).values
    if combination != "gdpo":  # whose last step compares all groups
        assert torch.allclose(found.values[:2], first)
    else:
        assert found.values[kept].std().item() == pytest.approx(1, abs=1e-3)
    assert (
        combined_rewards(rewards, WEIGHTS, combination, kept).isnan().tolist() == (~kept).tolist()
    )
    shares = reward_shares(rewards, WEIGHTS, 2, combination, kept_B=kept)
    assert shares.sum().item() == pytest.approx(1)
    one = torch.tensor([True] + [False] * 5)
    alone = combined_advantages(rewards, WEIGHTS, 2, combination, kept_B=one)
    assert alone.values.tolist() == [0.0] * 6 and int(alone.num_zero_spread) == 2


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_shares_of_a_sum_are_those_of_the_variances(convention):
    rewards = torch.tensor([[0.0, 1.0, 5.0, 6.0], [0.0, 3.0, 0.0, 3.0]])
    found = reward_shares(rewards, torch.ones(2), 2, "sum", convention)
    assert found.tolist() == pytest.approx([0.1, 0.9], rel=1e-4)
    found = reward_shares(rewards, torch.tensor([3.0, -1.0]), 2, "sum", "mean_only")
    assert found.isnan().all()  # 3 a - b has no spread in any group
    found = reward_shares(rewards, torch.tensor([6.0, 1.0]), 2, "sum", convention)
    assert found.tolist() == pytest.approx([0.8, 0.2], rel=1e-4)


def test_shares_of_the_other_combinations():
    rewards = torch.tensor([[0.0, 1.0, 5.0, 6.0], [0.0, 300.0, 0.0, 300.0]])
    weights = torch.tensor([1.0, 2.0])
    for combination in ("advantage", "gdpo"):
        found = reward_shares(rewards, weights, 2, combination)
        assert found.tolist() == pytest.approx([0.2, 0.8], rel=1e-4)
    # Deviations relative to the mean: 0.1 of the one, 0.2 of the other.
    product = torch.tensor([[0.9, 1.1], [8.0, 12.0]])
    found = reward_shares(product, torch.ones(2), 1, "product")
    assert found.tolist() == pytest.approx([0.2, 0.8], rel=1e-4)
    found = reward_shares(product, torch.tensor([4.0, 1.0]), 1, "product")
    assert found.tolist() == pytest.approx([0.8, 0.2], rel=1e-4)
    # The first is smallest twice, the second once, and once they tie.
    lowest = torch.tensor([[1.0, 5.0, 2.0, 1.0], [2.0, 4.0, 2.0, 3.0]])
    found = reward_shares(lowest, torch.ones(2), 2, "minimum")
    assert found.tolist() == pytest.approx([0.625, 0.375])


@pytest.mark.parametrize(
    ("combination", "weights", "advantages", "share"),
    [
        ("sum", [1.0, 1.0], [-0.899, 0.831, -0.831, 0.899], 0.002),
        ("advantage", [1.0, 1.0], [-2.028, 0.479, -0.479, 2.028], 0.5),
        ("gdpo", [1.0, 1.0], [-1.192, 0.281, -0.281, 1.192], 0.5),
        ("product", [1.0, 1.0], [-0.860, 0.717, -0.860, 1.003], 0.009),
        ("minimum", [4.0, 1.0], [-0.863, 0.752, -0.863, 0.973], 0.25),
    ],
)
def test_the_worked_example_of_the_documentation(combination, weights, advantages, share):
    rewards = torch.tensor([[0.20, 0.22, 0.24, 0.26], [0.0, 1.0, 0.0, 1.0]])
    found = combined_advantages(rewards, torch.tensor(weights), 1, combination)
    assert found.values.tolist() == pytest.approx(advantages, abs=6e-4)
    shares = reward_shares(rewards, torch.tensor(weights), 1, combination)
    assert shares[0].item() == pytest.approx(share, abs=6e-4)


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


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_chunks_are_credited_with_what_they_add_to_several_rewards(combination):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(2, 6, 3, generator=generator, dtype=torch.float64)
    found = combined_chunk_advantages(rewards, WEIGHTS, 2, combination)
    assert found.shape == (6, 2)
    for chunk in range(2):
        before, after = rewards[:, :, chunk], rewards[:, :, chunk + 1]
        if combination in ("advantage", "gdpo"):
            expected = combined_advantages(after - before, WEIGHTS, 2, combination).values
        else:
            gain = combined_rewards(after, WEIGHTS, combination)
            gain = gain - combined_rewards(before, WEIGHTS, combination)
            expected = group_advantages(gain, 2).values
        assert torch.allclose(found[:, chunk], expected)


@pytest.mark.parametrize(
    ("rewards", "weights", "combination", "message"),
    [
        (TWO, WEIGHTS, "best", "'best'; it must be one of.*'minimum'"),
        (TWO, WEIGHTS[:1], "sum", r"shape \(2, 6\) and weights of shape \(1,\)"),
        (TWO[0], WEIGHTS, "sum", r"shape \(6,\)"),
        (TWO[:0], WEIGHTS[:0], "sum", "at least one reward"),
        (TWO, -WEIGHTS, "minimum", "needs positive ones"),
        (TWO, 0 * WEIGHTS, "product", "needs positive ones"),
        (TWO - 0.15, WEIGHTS, "product", "reward 1 scored -0.05 for sample 1"),
    ],
)
def test_combinations_refuse_what_makes_no_sense(rewards, weights, combination, message):
    with pytest.raises(ValueError, match=message):
        combined_rewards(rewards, weights, combination)


# --- the largest advantages ----------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20), st.data())
def test_none_left_out_is_stronger_than_one_chosen(advantages, data):
    number = data.draw(st.integers(1, len(advantages)))
    chosen = largest_advantages(torch.tensor(advantages), number).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == number
    left = [abs(a) for i, a in enumerate(advantages) if i not in chosen]
    assert not left or max(left) <= min(abs(advantages[i]) for i in chosen) + 1e-4


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


# --- holding other scores still -------------------------------------------------------------------


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
