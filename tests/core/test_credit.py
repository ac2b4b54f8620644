# SPDX-License-Identifier: Apache-2.0
"""Advantages against statistics.stdev and their invariants."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core.credit import (
    CONVENTIONS,
    Advantages,
    chunk_advantages,
    chunk_gains,
    group_advantages,
)

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
