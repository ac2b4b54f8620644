# SPDX-License-Identifier: Apache-2.0
"""What algorithms keep between iterations comes back from a checkpoint, and from no other's."""

import json
from itertools import permutations

import pytest
import torch

from chunkgrpo.core import (
    AllSteps,
    ChunkPlan,
    ChunkWindow,
    LearnedSelection,
    ListedSelection,
    StratifiedTimes,
    UniformSelection,
)
from chunkgrpo.runtime.old_policy import OldPolicy
from compose import awm, chunk_grpo, diffusion_nft
from oracles import FLOW, PLAN, make_experience, seeded, shift, toy

PLANS = [ChunkPlan((2, 2, 3)), ChunkPlan((3, 3, 1)), ChunkPlan((1, 1, 5))]


def learned_with_refresh():
    """A plan that is cut anew every 2 iterations, and a selection that learns."""
    cuts = iter(PLANS)
    return chunk_grpo(
        PLAN, FLOW, LearnedSelection(0.67), micro_batch=50, recut=lambda: next(cuts), refresh=2
    )


def nft(policy):
    return diffusion_nft(OldPolicy(policy.named_parameters(), "nft1"), updates=2)


def averaged(policy):
    average = OldPolicy(policy.named_parameters(), "awm")
    return awm(average, times=StratifiedTimes(3), updates=2, ema_weight=0.5, kl=0.1)


METHODS = {
    "chunks": lambda policy: chunk_grpo(PLAN, FLOW, UniformSelection(0.67)),
    "learned chunks": lambda policy: learned_with_refresh(),
    "nft": nft,
    "nft, on-policy": lambda policy: diffusion_nft(updates=2),
    "awm": averaged,
    "awm, no average": lambda policy: awm(times=StratifiedTimes(3), updates=2),
}


def iterate(algorithm, policy, iteration, num_updates):
    """One iteration as the trainer drives it; returns gradients and the algorithm's metrics."""
    generator = seeded(100 + iteration)
    request = algorithm.begin(iteration, generator)
    with algorithm.sampling(policy):
        experience = make_experience(policy)
    gradients = []
    for part in algorithm.losses(policy, experience, generator):
        part.backward()
        if part.ends_update:
            gradients.append(policy.mean.grad.clone())
            policy.mean.grad = None
            num_updates += 1
            shift(0.02, seed=num_updates)(policy)
    return gradients, dict(algorithm.finish(policy, num_updates)), request, num_updates


def saved(algorithm):
    """Tensors and JSON as they come back from a file."""
    tensors, info = algorithm.state()
    return {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(info))


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_algorithm_goes_on_bit_for_bit(name):
    policy = toy()
    algorithm = METHODS[name](policy)
    updates = 0
    for iteration in range(3):
        *_, updates = iterate(algorithm, policy, iteration, updates)
    tensors, info = saved(algorithm)
    other = toy()
    again = METHODS[name](other)
    with torch.no_grad():
        other.mean.copy_(policy.mean)
    again.load(tensors, info)
    same_tensors, same_info = saved(again)
    assert same_info == info and same_tensors.keys() == tensors.keys()
    assert all(torch.equal(value, same_tensors[key]) for key, value in tensors.items())
    # Iteration 3 is before the next cut of the plan.
    found = iterate(algorithm, policy, 3, updates)
    expected = iterate(again, other, 3, updates)
    for gradient, wanted in zip(found[0], expected[0], strict=True):
        assert torch.equal(gradient, wanted) and gradient.norm() > 0
    assert found[1:] == expected[1:]
    if name == "learned chunks":
        assert found[1]["chunks"] == [2, 2, 3] and len(set(found[1]["chunk_probability"])) == 3
    # A new algorithm is another one, where there is something to keep.
    if tensors or "learned" in info:
        fresh_tensors, fresh_info = saved(METHODS[name](toy()))
        changed = [not torch.equal(value, fresh_tensors[key]) for key, value in tensors.items()]
        assert fresh_info != info or any(changed)


def test_the_plan_that_was_cut_last_is_the_one_that_comes_back():
    algorithm, policy, updates = learned_with_refresh(), toy(), 0
    for iteration, sizes in enumerate([PLAN.sizes, PLAN.sizes, (2, 2, 3), (2, 2, 3), (3, 3, 1)]):
        _, metrics, request, updates = iterate(algorithm, policy, iteration, updates)
        assert metrics["chunks"] == list(sizes)
        assert request.chunk_starts == ChunkPlan(sizes).starts
    again = learned_with_refresh()
    again.load(*saved(algorithm))
    assert again.plan == again.present == ChunkPlan((3, 3, 1))
    assert again.learned.probabilities(3).tolist() == algorithm.learned.probabilities(3).tolist()
    assert again.begin(5, seeded()).chunk_starts == (0, 3, 6)


def test_a_window_does_not_become_the_plan():
    """What is saved are the chunks of all steps, also where an iteration trains one of them."""
    algorithm = chunk_grpo(PLAN, FLOW, ListedSelection((0,)), window=ChunkWindow())
    for iteration in range(4):
        algorithm.begin(iteration, seeded(iteration))
    assert algorithm.present.num_chunks == 1
    assert algorithm.state() == ({}, {"chunks": [1, 2, 4]})
    assert algorithm.window != AllSteps()


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pair
        for pair in permutations(METHODS, 2)
        # "chunks" and "learned chunks" are one method, and so on.
        if pair[0].split(",")[0].split()[-1] != pair[1].split(",")[0].split()[-1]
    ],
)
def test_a_checkpoint_of_another_method_is_refused(writer, reader):
    policy = toy()
    algorithm = METHODS[reader](policy)
    before = saved(algorithm)
    with pytest.raises(ValueError, match=r"written by another method.*start a new run"):
        algorithm.load(*saved(METHODS[writer](policy)))
    after = saved(algorithm)
    assert after[1] == before[1]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize(
    ("writer", "reader"), [("nft, on-policy", "nft"), ("awm, no average", "awm")]
)
def test_a_checkpoint_without_the_second_policy_is_refused(writer, reader):
    policy = toy()
    with pytest.raises(ValueError, match=r"holds no old\.mean; it was written without an old pol"):
        METHODS[reader](policy).load(*saved(METHODS[writer](policy)))


def test_weights_of_another_shape_or_name_are_refused():
    small, large = toy(12), toy(13)
    with pytest.raises((ValueError, RuntimeError), match=r"size|shape"):
        nft(large).load(*saved(nft(small)))
    tensors, info = saved(nft(small))
    with pytest.raises(ValueError, match=r"holds no old\.mean"):
        nft(small).load({"old.other": tensors["old.mean"]}, info)
