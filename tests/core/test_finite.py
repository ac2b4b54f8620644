# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite are found wherever they are, and finite ones never mistaken."""

import pytest
import torch

from chunkgrpo.core.finite import NonFiniteError, all_finite, finite_rows, first_nonfinite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 1, 11])
def test_one_number_among_many_is_found(value, dtype, place):
    wrong = torch.ones(3, 4, dtype=dtype)
    wrong.view(-1)[place] = value
    good = torch.ones(5)
    assert not all_finite([good, wrong])
    assert not all_finite([wrong, good])
    assert first_nonfinite({"a": good, "b": wrong, "c": wrong}) == "b"


def test_the_largest_finite_numbers_are_finite():
    """The norm of these overflows; its largest element does not."""
    large = torch.full((1000,), 3e38)
    assert large.norm().isinf()
    assert all_finite([large, -large])
    assert first_nonfinite({"large": large}) is None


def test_whole_numbers_and_empty_tensors_are_passed_over():
    assert all_finite([])
    assert all_finite([torch.tensor([2**62]), torch.zeros(0), torch.tensor([True])])
    assert not all_finite([torch.tensor([1]), torch.tensor(NAN)])


def test_rows_are_told_apart():
    first, second = torch.zeros(4, 2, 3), torch.zeros(4)
    first[1, 1, 2], second[3] = NAN, INF
    assert finite_rows(first).tolist() == [True, False, True, True]
    assert finite_rows(first, second).tolist() == [True, False, True, False]


def test_the_error_says_where_what_and_what_to_do():
    error = NonFiniteError("gradient", "the gradient of w", "lower the rate")
    assert str(error) == "gradient: the gradient of w is not finite; lower the rate"
    found = error.at("iteration 7", "the last checkpoint is of iteration 5")
    assert str(found) == (
        "iteration 7, gradient: the gradient of w is not finite; lower the rate; "
        "the last checkpoint is of iteration 5"
    )
    assert (found.phase, found.what) == ("gradient", "the gradient of w")
    assert isinstance(found, ValueError)  # so the command line prints one line and exits with 2
