# SPDX-License-Identifier: Apache-2.0
"""Other weights for a while."""

import pytest
import torch

from chunkgrpo.core import FlowDiffusion, Transition, TransitionKl, make_sigmas, whole_plan
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.runtime.weights import swapped
from chunkgrpo.types import Experience
from compose import chunk_grpo, rollout

BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def test_values_are_swapped_without_a_copy_and_restored_even_after_an_error():
    parameters = [torch.ones(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    places = [p.data_ptr() for p in parameters]
    values = [torch.full((2,), 3.0), torch.full((1,), 4.0)]
    with swapped(parameters, values):
        assert [p.data_ptr() for p in parameters] == [v.data_ptr() for v in values]
        assert [p.tolist() for p in parameters] == [[3, 3], [4]]
        with swapped(parameters[:1], [torch.full((2,), 7.0)]):
            assert [p.tolist() for p in parameters] == [[7, 7], [4]]
        assert [p.tolist() for p in parameters] == [[3, 3], [4]]
    assert [p.data_ptr() for p in parameters] == places
    with pytest.raises(RuntimeError, match="stop"), swapped(parameters, values):
        raise RuntimeError("stop")
    assert [p.data_ptr() for p in parameters] == places
    assert [p.tolist() for p in parameters] == [[1, 1], [0]]


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, dtype=torch.float64)])
def test_values_that_do_not_fit_are_refused(value):
    parameter = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="value 0 is"), swapped([parameter], [value]):
        pass
    with pytest.raises(ValueError, match="0 values for 1 parameters"), swapped([parameter], []):
        pass
    assert parameter.tolist() == [0, 0]


def test_graphs_built_before_survive():
    parameter = torch.tensor([5.0], requires_grad=True)
    square = parameter**2
    with swapped([parameter], [torch.tensor([3.0])]):
        assert (parameter**2).item() == 9
    square.backward()
    assert parameter.grad.item() == 10


def test_an_open_autocast_does_not_keep_the_former_weights():
    """Its cache of low-precision casts knows parameters, not what they hold."""
    layer, x = torch.nn.Linear(4, 4, bias=False), torch.eye(4)
    values = [torch.full((4, 4), 2.0)]
    with torch.autocast(**BFLOAT16):
        before = layer(x)
        with swapped(list(layer.parameters()), values):
            assert (layer(x) == 2).all()
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("outer", [False, True])
def test_the_kl_to_the_reference_sees_what_training_changed(tiny_policy, outer):
    """In mixed precision, whose casts of the weights must not outlive a swap."""
    policy = tiny_policy(Adaptation("full"), precision="bf16")
    flow = Transition(FlowDiffusion(0.7))
    trajectory = rollout(
        policy, ["a star"], flow, make_sigmas(3), 4, torch.Generator().manual_seed(0)
    )
    experience = Experience(trajectory, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    algorithm = chunk_grpo(whole_plan(2), flow, updates=1, kl=TransitionKl(0.1))

    def divergence():
        parts = algorithm.losses(policy, experience, torch.Generator().manual_seed(0))
        return torch.cat([part.diagnostics["reference_kl"] for part in parts])

    with torch.autocast(**BFLOAT16, enabled=outer):
        assert (divergence() == 0).all()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    with torch.autocast(**BFLOAT16, enabled=outer):
        assert (divergence() > 0).all()
