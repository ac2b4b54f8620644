# SPDX-License-Identifier: Apache-2.0
"""Sigma grids against closed forms, and the errors that guard them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from chunkgrpo.core.schedules import (
    TIMESTEP_ROUNDINGS,
    MergeEntropy,
    MergeSizes,
    Native,
    NoMerge,
    Shifted,
    entropy_merges,
    exact_timestep,
    floor1000_timestep,
    make_sigmas,
    merge_sigmas,
    shift_sigmas,
    validate_sigmas,
)
from chunkgrpo.core.sde import DanceDiffusion, FlowDiffusion, OdeDiffusion, Transition

PRINTED_SIGMAS = [
    1.0000, 0.9796, 0.9574, 0.9333, 0.9070, 0.8780, 0.8462, 0.8108, 0.7714,
    0.7273, 0.6774, 0.6207, 0.5556, 0.4800, 0.3913, 0.2857, 0.1579, 0.0000,
]  # fmt: skip


def test_seventeen_steps_with_shift_three():
    sigmas = make_sigmas(17)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu"
    assert torch.allclose(sigmas, torch.tensor(PRINTED_SIGMAS), rtol=0, atol=5.1e-5)
    # In fractions: u = k/17, sigma = 3k / (17 + 2k).
    expected = [3 * k / (17 + 2 * k) for k in range(17, -1, -1)]
    assert torch.allclose(sigmas.double(), torch.tensor(expected).double(), atol=2e-7)


@given(num_steps=st.integers(2, 300), shift=st.floats(0.2, 12.0))
def test_grid_ends_are_exact_and_order_is_strict(num_steps, shift):
    sigmas = make_sigmas(num_steps, shift)
    assert len(sigmas) == num_steps + 1
    assert sigmas[0].item() == 1.0 and sigmas[-1].item() == 0.0
    assert (sigmas.diff() < 0).all()


def test_shift_one_is_the_linear_grid():
    assert torch.equal(make_sigmas(8, 1.0), torch.arange(8, -1, -1) / 8)


@given(first=st.floats(0.2, 5.0), second=st.floats(0.2, 5.0), u=st.floats(0.0, 1.0))
def test_shifts_compose_by_multiplication(first, second, u):
    u = torch.tensor([u], dtype=torch.float64)
    twice = shift_sigmas(shift_sigmas(u, first), second)
    assert torch.allclose(twice, shift_sigmas(u, first * second), rtol=1e-12, atol=1e-14)


def test_shift_upcasts_half_precision():
    assert shift_sigmas(torch.tensor([0.5], dtype=torch.bfloat16), 3.0).dtype == torch.float32


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shift_is_refused(shift):
    with pytest.raises(ValueError, match="positive and finite"):
        make_sigmas(17, shift)


@pytest.mark.parametrize("num_steps", [1, 0, -3])
def test_too_few_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}.*raise num_steps"):
        make_sigmas(num_steps)


def test_validation_returns_the_same_object():
    sigmas = torch.tensor([0.9, 0.4, 0.0], dtype=torch.float64)
    assert validate_sigmas(sigmas) is sigmas


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (torch.ones(2, 3), r"shape \(2, 3\).*one grid"),
        (torch.tensor([1000, 500, 0]), "int64.*divide integer timesteps by 1000"),
        (torch.tensor([1.0, 0.0]), "make 1 steps.*add sigmas"),
        (torch.tensor([]), "make 0 steps"),
        (torch.tensor([1.0, math.nan, 0.0]), r"sigmas\[1\] is nan"),
        (torch.tensor([math.inf, 0.5, 0.0]), r"sigmas\[0\] is inf"),
        (torch.tensor([1.5, 0.5, 0.0]), r"start at 1.5.*\(0, 1\]"),
        (torch.tensor([0.0, -0.5, 0.0]), "start at 0.0"),
        (torch.tensor([1.0, 0.5, 0.25]), "end at 0.25.*append 0.0"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), r"sigmas\[1\] = 0.5 is followed by 0.5"),
        (torch.tensor([0.5, 0.75, 0.0]), "must decrease strictly"),
    ],
)
def test_invalid_grids_name_value_rule_and_fix(sigmas, message):
    with pytest.raises(ValueError, match=message):
        validate_sigmas(sigmas)


def test_floor1000_gives_the_published_integer_timesteps():
    timesteps = (1000 * floor1000_timestep(make_sigmas(17)[:-1])).round().int().tolist()
    expected = [
        1000,
        979,
        957,
        933,
        906,
        878,
        846,
        810,
        771,
        727,
        677,
        620,
        555,
        480,
        391,
        285,
        157,
    ]
    # 0.48 sits on a thousandth, where rounding may fall on either side.
    assert timesteps[13] in (479, 480)
    assert timesteps[:13] + timesteps[14:] == expected[:13] + expected[14:]


@given(st.floats(0.0, 1.0))
def test_floor1000_loses_less_than_a_thousandth(value):
    sigma = torch.tensor(value, dtype=torch.float64)
    lost = sigma - floor1000_timestep(sigma)
    assert -1e-12 <= lost.item() < 1e-3


def test_roundings_are_found_by_name():
    sigma = torch.tensor([0.12345, 0.9999])
    assert torch.equal(exact_timestep(sigma), sigma)
    rounded = TIMESTEP_ROUNDINGS["floor1000"](sigma)
    assert torch.allclose(rounded, torch.tensor([0.123, 0.999]))
    assert exact_timestep(sigma.bfloat16()).dtype == torch.float32
    assert TIMESTEP_ROUNDINGS["exact"] is exact_timestep


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ((1, 1, 1, 1, 1), [0, 1, 2, 3, 4, 5]),
        ((5,), [0, 5]),
        ((2, 1, 2), [0, 2, 3, 5]),
        ([1, 3, 1], [0, 1, 4, 5]),
    ],
)
def test_merged_steps_begin_where_the_first_of_them_began(sizes, kept):
    sigmas = make_sigmas(5)
    merged = merge_sigmas(sigmas, sizes)
    assert torch.equal(merged, sigmas[kept])
    # A merged step is as long as its parts together.
    lengths = -sigmas.diff()
    assert torch.allclose(
        -merged.diff(), torch.stack([part.sum() for part in lengths.split(list(sizes))])
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2), r"merged steps \(2, 2\) sum to 4, but the schedule has 5 steps; .* at least 1"),
        ((5, 1), r"\(5, 1\) sum to 6, but"),
        ((6, -1), r"\(6, -1\) sum to 5, but the schedule has 5 steps; every size must be"),
        ((5, 0), r"\(5, 0\) sum to 5"),
        ((), r"merged steps \(\) sum to 0"),
    ],
)
def test_merges_that_do_not_cover_the_schedule_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        merge_sigmas(make_sigmas(5), sizes)


def test_steps_are_merged_until_their_normal_has_the_entropy():
    sigmas = make_sigmas(16)
    kernel = Transition(FlowDiffusion(0.7))
    sizes = entropy_merges(sigmas, kernel.std, 0.8)
    assert sizes == (1, 1, 2, 2, 3, 4, 1, 1, 1)
    edges = [0, *itertools.accumulate(sizes)]
    entropies = [
        Normal(0.0, kernel.std(sigmas[a], sigmas[b])).entropy().item()
        for a, b in itertools.pairwise(edges)
        if b < 16
    ]
    assert min(entropies[:6]) >= 0.8 > max(entropies[6:])
    # No merged step would have been enough with one grid step less.
    for a, b in itertools.pairwise(edges[:7]):
        if b - a > 1:
            assert Normal(0.0, kernel.std(sigmas[a], sigmas[b - 1])).entropy() < 0.8


@given(steps=st.integers(2, 30), least=st.floats(-3, 3), eta=st.floats(0.05, 1.5))
def test_merges_by_entropy_cover_the_schedule(steps, least, eta):
    sigmas = make_sigmas(steps)
    sizes = entropy_merges(sigmas, Transition(DanceDiffusion(eta)).std, least)
    assert torch.equal(merge_sigmas(sigmas, sizes)[[0, -2, -1]], sigmas[[0, -2, -1]])
    assert sizes[-1] == 1


def test_steps_without_noise_are_not_merged():
    assert entropy_merges(make_sigmas(4), Transition(OdeDiffusion()).std, -9.0) == (1, 1, 1, 1)


# --- the choices of a run -----------------------------------------------------------------------

STD = Transition(FlowDiffusion(0.7)).std


def test_choices_of_a_schedule_by_kind():
    assert torch.equal(Shifted().sigmas(17), make_sigmas(17))
    assert torch.equal(Shifted(1.0).sigmas(8), torch.arange(8, -1, -1) / 8)
    assert (Shifted().kind, Native().kind) == ("shifted", "native")
    for shift in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"shift is {shift}; it must be positive and finite"):
            Shifted(shift)
    with pytest.raises(ValueError, match="num_steps is 1"):
        Shifted().sigmas(1)


def test_nothing_is_merged_unless_asked():
    assert NoMerge().sizes_of(5, None, STD) is None
    assert (NoMerge().kind, MergeSizes((1,)).kind, MergeEntropy(0).kind) == (
        "none", "sizes", "entropy"
    )  # fmt: skip


def test_listed_merges_need_no_schedule_and_must_cover_the_steps():
    assert MergeSizes([1, 3, 1]).sizes_of(5, None, STD) == (1, 3, 1)
    for sizes, message in (((2, 2), "sum to 4, but the schedule has 5 steps"), ((), "sum to 0")):
        with pytest.raises(ValueError, match=message):
            MergeSizes(sizes).sizes_of(5, None, STD)


def test_merges_by_entropy_follow_the_schedule():
    sigmas = make_sigmas(16)
    found = MergeEntropy(0.8).sizes_of(16, sigmas, STD)
    assert found == entropy_merges(sigmas, STD, 0.8) == (1, 1, 2, 2, 3, 4, 1, 1, 1)
    with pytest.raises(ValueError, match="known before the model is loaded; use schedule 'shift"):
        MergeEntropy(0.8).sizes_of(16, None, STD)
