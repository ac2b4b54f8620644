# SPDX-License-Identifier: Apache-2.0
"""Speed curves against hand-computed numbers and their symmetries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core.dynamics import DISTANCES, cosine_distance, mean_curve, relative_l1, relative_l2

MEASURES = [relative_l1, relative_l2, cosine_distance]


def trajectory(seed=0, shape=(2, 5, 3, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hand_computed_values():
    states = torch.tensor([[[3.0, 4.0], [4.0, -3.0], [8.0, -6.0]]], dtype=torch.float64)
    assert relative_l1(states).tolist() == [pytest.approx([8 / 7, 1.0], rel=1e-7)]
    assert relative_l2(states).tolist() == [pytest.approx([math.sqrt(2), 1.0], rel=1e-7)]
    assert cosine_distance(states).tolist() == [pytest.approx([1.0, 0.0], abs=1e-7)]


def test_against_torch_norms_and_cosine_similarity():
    states = trajectory()
    earlier, later = states[:, :-1].flatten(2), states[:, 1:].flatten(2)
    for order, measure in ((1, relative_l1), (2, relative_l2)):
        expected = torch.linalg.vector_norm(later - earlier, ord=order, dim=2)
        expected = expected / torch.linalg.vector_norm(earlier, ord=order, dim=2)
        assert torch.allclose(measure(states), expected, rtol=1e-6)
    expected = 1 - torch.nn.functional.cosine_similarity(earlier, later, dim=2)
    assert torch.allclose(cosine_distance(states), expected, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@given(scale=st.floats(0.01, 100.0), seed=st.integers(0, 1000))
def test_scale_does_not_matter(measure, scale, seed):
    states = trajectory(seed)
    assert torch.allclose(measure(scale * states), measure(states), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_standing_still_is_zero_and_half_precision_is_upcast(measure):
    still = trajectory()[:, :1].expand(2, 4, 3, 4)
    assert torch.allclose(measure(still), torch.zeros(2, 3, dtype=torch.float64), atol=1e-7)
    assert measure(trajectory().bfloat16()).dtype == torch.float32


def test_zero_states_stay_finite():
    for measure in MEASURES:
        assert measure(torch.zeros(1, 3, 4)).isfinite().all()


def test_the_denominator_is_the_earlier_state():
    states = torch.tensor([[[1.0], [3.0]]])
    assert relative_l1(states).item() == pytest.approx(2.0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4)])
def test_wrong_shapes_are_refused(measure, shape):
    with pytest.raises(ValueError, match=r"\[B, N\+1, \*latent\]"):
        measure(torch.ones(shape))


def test_mean_curve():
    curve = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.bfloat16)
    assert torch.equal(mean_curve(curve), torch.tensor([2.0, 4.0]))


def test_distances_by_name() -> None:
    assert list(DISTANCES) == ["l1", "l2", "cosine"]
    assert list(DISTANCES.values()) == [relative_l1, relative_l2, cosine_distance]
