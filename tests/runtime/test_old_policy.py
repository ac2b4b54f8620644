# SPDX-License-Identifier: Apache-2.0
"""The slower copy of the weights."""

import pytest
import torch

from chunkgrpo.runtime.old_policy import DECAY_SCHEDULES, OldPolicy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", {0: 0, 1: 0, 10_000: 0}),
        ("nft1", {0: 0, 1: 0.001, 100: 0.1, 500: 0.5, 501: 0.5, 9999: 0.5}),
        ("nft2", {0: 0, 74: 0, 75: 0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999, 999: 0.999}),
        ("awm", {0: 0, 1: 0.001, 299: 0.299, 300: 0.3, 301: 0.3}),
    ],
)
def test_schedules_at_their_marks(name, expected):
    for step, decay in expected.items():
        assert DECAY_SCHEDULES[name](step) == pytest.approx(decay, abs=1e-12)
    steps = [DECAY_SCHEDULES[name](step) for step in range(1200)]
    assert steps == sorted(steps) and steps[0] >= 0 and steps[-1] < 1


@pytest.mark.parametrize("schedule", list(DECAY_SCHEDULES))
def test_updates_follow_the_formula(schedule):
    parameter = torch.tensor([0.0, 1.0], requires_grad=True)
    old, expected = OldPolicy({"weight": parameter}, schedule), [0.0, 1.0]
    for step in (1, 60, 90, 100, 200, 400, 800):
        with torch.no_grad():
            parameter.copy_(torch.tensor([float(step), -2.0 * step]))
        old.update([parameter], step)
        decay = DECAY_SCHEDULES[schedule](step)
        target = parameter.tolist()
        expected = [decay * e + (1 - decay) * t for e, t in zip(expected, target, strict=True)]
        assert old.values[0].tolist() == pytest.approx(expected, rel=1e-5)
    if schedule == "none":
        assert torch.equal(old.values[0], parameter)
    else:
        assert not torch.allclose(old.values[0], parameter)


def test_it_begins_with_a_copy():
    parameter = torch.zeros(2, requires_grad=True)
    old = OldPolicy({"weight": parameter})
    with torch.no_grad():
        parameter.add_(1)
    assert (old.values[0] == 0).all() and not old.values[0].requires_grad


def test_applying_is_undone_even_after_an_error():
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    old = OldPolicy({"weight": parameter})
    with torch.no_grad():
        parameter.add_(5)
    with old.applied([parameter]):
        assert parameter.tolist() == [1, 2]
    assert parameter.tolist() == [6, 7]
    with pytest.raises(RuntimeError, match="stop"), old.applied([parameter]):
        raise RuntimeError("stop")
    assert parameter.tolist() == [6, 7]
    assert old.values[0].tolist() == [1, 2] and parameter.requires_grad
    # What is trained afterwards is the parameter, not the copy.
    with torch.no_grad():
        parameter.add_(1)
    assert old.values[0].tolist() == [1, 2]


def test_graphs_built_before_survive():
    parameter = torch.tensor([3.0], requires_grad=True)
    old = OldPolicy({"weight": parameter})
    with torch.no_grad():
        parameter.fill_(5.0)
    square = parameter**2
    with old.applied([parameter]):
        assert (parameter**2).item() == 9
    square.backward()
    assert parameter.grad.item() == 10


def test_a_checkpoint_brings_it_back():
    names = ["layer.bias", "layer.weight"]
    parameters = [torch.tensor([1.0], requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    old = OldPolicy(dict(zip(names, parameters, strict=True)), "awm")
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(3)
    old.update(parameters, 250)
    saved = {name: value.clone() for name, value in old.state().items()}
    assert list(saved) == ["old.layer.bias", "old.layer.weight"]
    others = torch.full((1,), 9.0), torch.full((2, 2), 9.0)
    again = OldPolicy(dict(zip(names, others, strict=True)), "awm")
    again.load(saved | {"parameter.layer.bias": torch.zeros(1)})
    for value, expected in zip(again.values, old.values, strict=True):
        assert torch.equal(value, expected)
    assert again.values[0].item() == pytest.approx(0.25 * 1 + 0.75 * 4)
    with pytest.raises(ValueError, match=r"the checkpoint holds no old\.layer\.weight"):
        again.load({"old.layer.bias": torch.zeros(1)})


def test_an_unknown_schedule_is_refused():
    message = r"unknown decay schedule 'fast'; .*known: none, nft1, nft2, awm$"
    with pytest.raises(ValueError, match=message):
        OldPolicy({"weight": torch.zeros(1)}, "fast")
