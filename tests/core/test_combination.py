# SPDX-License-Identifier: Apache-2.0
"""Several rewards: combinations by hand, and what each of them brings."""

import statistics

import pytest
import torch

from chunkgrpo.core.advantages import CONVENTIONS, group_advantages
from chunkgrpo.core.combination import (
    COMBINATIONS,
    combined_advantages,
    combined_chunk_advantages,
    combined_rewards,
    reward_shares,
)
from closed_forms import by_definition, seeded

NAN = float("nan")
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
    assert int(found.num_zero_spread) == 0 and found.values.tolist() == [0.0, 0.0]


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


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("dropped", [[], [2], [0, 4]])
def test_totals_that_are_known_need_not_be_computed_again(combination, dropped):
    """Also where those of dropped samples are garbage."""
    rewards = torch.rand(2, 6, 3, generator=seeded(1), dtype=torch.float64)
    kept = torch.ones(6, dtype=torch.bool)
    kept[dropped] = False
    totals = torch.stack([combined_rewards(r, WEIGHTS, combination) for r in rewards.unbind(2)], 1)
    totals[dropped] = 1e9
    options = {"kept_B": kept if dropped else None}
    expected = combined_advantages(rewards[:, :, 2], WEIGHTS, 2, combination, **options)
    found = combined_advantages(
        rewards[:, :, 2], WEIGHTS, 2, combination, total_B=totals[:, 2], **options
    )
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.spread, expected.spread)
    by_chunk = combined_chunk_advantages(rewards, WEIGHTS, 2, combination, **options)
    again = combined_chunk_advantages(rewards, WEIGHTS, 2, combination, totals_BE=totals, **options)
    assert torch.equal(again, by_chunk)


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


# --- rounding is not signal ---------------------------------------------------------------------

LAST_BIT = 1 - 2**-24  # the largest float32 below 1


def test_what_is_left_of_large_terms_that_cancel_is_rounding():
    """0.1 r - 0.1 r, summed in float32 with rewards of size 1000, is not zero; it is no signal."""
    generator = torch.Generator().manual_seed(0)
    first = 1000 + 100 * torch.rand(8, generator=generator)
    rewards, weights = torch.stack([first, 3 * first]), torch.tensor([0.3, -0.1])
    total = combined_rewards(rewards, weights)
    assert 0 < total.abs().max() < 1e-4
    for combination in ("sum", "advantage", "gdpo"):
        found = combined_advantages(rewards, weights, 2, combination)
        if combination == "sum":
            assert found.values.tolist() == [0.0] * 8 and int(found.num_zero_spread) == 2
    opposed = torch.tensor([1.0, -1.0])
    for combination in ("advantage", "gdpo"):
        found = combined_advantages(rewards, opposed, 2, combination)
        assert found.values.tolist() == [0.0] * 8


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_takes_the_last_bit_for_nothing(combination):
    first = torch.tensor([1.0, 1.0, 1.0, LAST_BIT, 0.5, 0.7, 0.1, 0.2])
    second = torch.tensor([LAST_BIT, 1.0, 1.0, 1.0, 0.5, 0.9, 0.1, 0.3])
    rewards = torch.stack([first, second])
    found = combined_advantages(rewards, torch.ones(2), 2, combination)
    assert found.values[:4].tolist() == [0.0] * 4
    assert int(found.num_zero_spread) == 1
    assert (found.values[4:] != 0).any()
    shares = reward_shares(rewards, torch.ones(2), 2, combination)
    assert shares.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("combination", ["sum", "advantage", "gdpo", "product"])
def test_a_gain_has_the_rounding_of_the_rewards_at_its_ends(combination):
    """A prediction that does not change scores 1 and 1 - 6e-8: a gain of 6e-8 is no gain."""
    one = [1.0, LAST_BIT, 1.0, 1.0]
    boundaries = torch.tensor([[1.0, 1.0, 1.0, 1.0], one, [1.5, 1.2, 1.4, 1.0]]).T
    rewards = torch.stack([boundaries, boundaries])
    found = combined_chunk_advantages(rewards, torch.ones(2), 1, combination)
    assert found[:, 0].tolist() == [0.0] * 4
    assert found[:, 1].abs().max() > 0.5
    # The unit of the rewards does not matter.
    small = combined_chunk_advantages(1e-2 * rewards, torch.ones(2), 1, combination)
    torch.testing.assert_close(small, found, rtol=1e-3, atol=1e-3)


def test_the_sum_is_clipped_not_its_parts():
    """Two rewards that disagree by more than the clip: 3 - 2.5 is 0.5, while clipped parts of 1
    would cancel."""
    first = torch.tensor([[0.0] * 15 + [1.0]]).expand(2, -1)
    rewards = torch.stack([first[0], torch.tensor([0.0] * 14 + [0.5, 1.0])])
    weights = torch.tensor([1.0, -0.5])
    alone = [group_advantages(each, 1, "group_std", clip=None).values for each in rewards]
    expected = (alone[0] - 0.5 * alone[1]).clamp(-1, 1)
    found = combined_advantages(rewards, weights, 1, "advantage", "group_std", clip=1.0).values
    torch.testing.assert_close(found, expected)
    clipped = alone[0].clamp(-1, 1) - 0.5 * alone[1].clamp(-1, 1)
    assert (clipped - expected).abs().max() > 0.1
