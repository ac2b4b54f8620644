# SPDX-License-Identifier: Apache-2.0
"""The average of the weights."""

import pytest
import torch

from chunkgrpo.runtime.ema import Ema


def test_updates_follow_the_formula_with_its_warm_up():
    parameter = torch.tensor([0.0], requires_grad=True)
    ema, expected = Ema([parameter], 0.5), 0.0
    for n in range(12):
        with torch.no_grad():
            parameter.fill_(n + 1.0)
        ema.update([parameter])
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        assert ema.values[0].item() == pytest.approx(expected, rel=1e-6)
    assert ema.num_updates == 12
    assert min(0.5, 9 / 18) == 0.5  # the warm-up was over at update 8


@pytest.mark.parametrize(("warmup", "age"), [(1.0, 1 / 2), (3.0, 1 / 4), (9.0, 1 / 10)])
def test_a_long_average_is_limited_by_its_warm_up(warmup, age):
    """The average of 1, 2, ..., n is n less the mean age, which is n / (warmup + 1)."""
    number = 1000
    parameter = torch.zeros(1, dtype=torch.float64)
    ema = Ema([parameter], 0.9999, warmup)
    for n in range(number):
        ema.update([parameter.fill_(n + 1)])
    assert ema.values[0].item() == pytest.approx(number * (1 - age), rel=2e-3)


def test_a_warm_up_of_one_is_the_plain_mean_of_all():
    weights = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ema = Ema([weights[0]], 0.999, warmup=1.0)
    for weight in weights[1:]:
        ema.update([weight])
    assert ema.values[0].item() == pytest.approx(weights.mean().item(), rel=1e-12)


def test_no_decay_follows_exactly():
    parameter = torch.randn(3)
    ema = Ema([parameter], 0.0)
    ema.update([parameter.add_(1)])
    assert torch.equal(ema.values[0], parameter)


def test_it_begins_with_a_copy():
    parameter = torch.zeros(2)
    ema = Ema([parameter], 0.9)
    parameter.add_(1)
    assert (ema.values[0] == 0).all() and not ema.values[0].requires_grad


def test_applying_is_undone_even_after_an_error():
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    ema = Ema([parameter], 0.9)
    with torch.no_grad():
        parameter.add_(5)
    with ema.applied([parameter]):
        assert parameter.tolist() == [1, 2]
    assert parameter.tolist() == [6, 7]
    with pytest.raises(RuntimeError, match="stop"), ema.applied([parameter]):
        raise RuntimeError("stop")
    assert parameter.tolist() == [6, 7]
    assert ema.values[0].tolist() == [1, 2] and parameter.requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        Ema([torch.zeros(1)], decay)


@pytest.mark.parametrize("warmup", [0.0, -1.0, float("nan")])
def test_a_warm_up_is_above_zero(warmup):
    with pytest.raises(ValueError, match=f"is {warmup}; it must be above 0"):
        Ema([torch.zeros(1)], 0.9, warmup)
