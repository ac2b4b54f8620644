# SPDX-License-Identifier: Apache-2.0
"""The rule of precision, and values beside tensors."""

import pytest
import torch

from chunkgrpo.core.precision import at_least_float32, beside, host_values
from closed_forms import drawn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_low_precision_is_lifted(dtype):
    values = torch.tensor([0.0, 1.0, 3.0]).to(dtype)
    assert at_least_float32(values).dtype == torch.float32
    assert torch.equal(at_least_float32(values), values.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_better_is_untouched(dtype):
    values = torch.ones(2, dtype=dtype)
    assert at_least_float32(values) is values


@pytest.mark.parametrize(
    ("values", "x", "expected"),
    [
        ((), (3, 4, 5), ()),
        ((3,), (3,), (3,)),
        ((3,), (3, 4, 5), (3, 1, 1)),
        ((3, 4), (3, 4, 5, 6), (3, 4, 1, 1)),
        ((3, 1, 1), (3, 4, 5), (3, 1, 1)),
    ],
)
def test_values_lie_beside_the_first_axes(values, x, expected):
    values = drawn(*values)
    found = beside(values, torch.zeros(x))
    assert found.shape == expected and torch.equal(found.flatten(), values.flatten())


def test_a_square_tensor_is_where_plain_broadcasting_goes_wrong():
    x, values = drawn(3, 3), drawn(3, seed=1)
    found = beside(values, x) * x
    assert all(torch.equal(found[b], values[b] * x[b]) for b in range(3))
    assert not torch.equal(found, values * x)


def test_values_on_the_host_are_python_numbers():
    assert host_values(torch.tensor([0.5, -2.0])) == [0.5, -2.0]
    assert host_values(torch.tensor([])) == []
