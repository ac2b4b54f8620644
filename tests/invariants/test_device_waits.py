# SPDX-License-Identifier: Apache-2.0
"""Training waits for the device once an update at most, however many micro-batches there are.

Tensors of torch's "meta" device have no values: whoever reads one on the host gets an error, and an
operation that mixes it with a tensor of the host is seen here. On a GPU both would wait.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chunkgrpo.core import KlMask, LearnedSelection, TransitionKl
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.types import Conditioning, Experience
from compose import awm, chunk_grpo, diffusion_nft, rollout
from oracles import FLOW, PLAN, PROMPTS, SIGMAS, seeded, toy

COPIES = ("aten::_to_copy", "aten::copy_")


class Watch(TorchDispatchMode):
    """Counts copies from the host, and what takes tensors of both at once."""

    def __init__(self):
        super().__init__()
        self.copies, self.waiting, self.mixed = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        places = {
            each.device.type
            for each in torch.utils._pytree.tree_leaves((args, kwargs))
            # Numbers are passed along with the operation and waited for by no one.
            if isinstance(each, torch.Tensor) and each.ndim > 0
        }
        name = func._schema.name
        if name in COPIES:
            target = torch.device(kwargs.get("device") or "cpu")
            if places == {"cpu"} and target.type == "meta":
                self.copies += 1
                self.waiting += not kwargs.get("non_blocking")
        elif len(places) > 1:
            self.mixed[name] += 1
        return func(*args, **kwargs)


class AwayPolicy(GaussianPolicy):
    """The toy whose prompts are encoded on its device."""

    def encode(self, prompts):
        return Conditioning({"rows": torch.zeros(len(prompts), 1, device="meta")})


def away(tensor):
    return None if tensor is None else tensor.to("meta")


def experience_away(shared=True):
    """A rollout as it would lie on a device."""
    policy = toy()
    trajectory = rollout(
        policy, PROMPTS, FLOW, SIGMAS, 8, seeded(1), keep_velocities=True, same_noise=shared
    )
    moved = replace(
        trajectory,
        states=away(trajectory.states),
        sigmas=away(trajectory.sigmas),
        old_log_prob=away(trajectory.old_log_prob),
        final=away(trajectory.final),
        velocities=away(trajectory.velocities),
        conditioning=Conditioning({k: away(v) for k, v in trajectory.conditioning.tensors.items()}),
    )
    # Chunks are chosen on the host, from a curve that is read once a rollout.
    moved.__dict__["dynamics"] = trajectory.dynamics
    return Experience(moved, torch.ones(trajectory.num_samples, device="meta"))


def counts(algorithm, shared=True):
    """Train on a device without values; return what was waited for."""
    policy = GaussianPolicy(torch.zeros(12, device="meta"), 0.5)
    experience = experience_away(shared)
    algorithm.begin(0, seeded(2))
    with Watch() as watch:
        parts = 0
        for part in algorithm.losses(policy, experience, seeded(3)):
            part.backward()
            parts += 1
    assert policy.parameters()[0].grad.device.type == "meta"
    return parts, watch


GRPO = {
    "kl": {},
    "replay": {"anchor": "replay"},
    "guard": {"ratio": "guard"},
    "mask": {"trust": KlMask(1e-5)},
    "consistency": {"consistency": 1.0},
    "by chunk": {"selection": LearnedSelection()},
}


@pytest.mark.parametrize("options", GRPO.values(), ids=GRPO)
@pytest.mark.parametrize("shared", [True, False], ids=["one start", "own starts"])
def test_chunk_grpo_waits_for_no_micro_batch(options, shared):
    found = {}
    for size in (24, 6):
        algorithm = chunk_grpo(PLAN, FLOW, kl=TransitionKl(0.1), micro_batch=size, **options)
        parts, watch = counts(algorithm, shared)
        assert not watch.mixed
        found[size] = parts, watch.copies, watch.waiting
    assert found[6][0] > 1.5 * found[24][0]
    assert found[6][1:] == found[24][1:]


@pytest.mark.parametrize("name", ["nft", "awm", "awm sum first"])
def test_forward_methods_send_all_they_draw_without_waiting(name):
    algorithm = {
        "nft": diffusion_nft(updates=2, micro_batch=6),
        "awm": awm(updates=2, micro_batch=6, kl=0.1),
        "awm sum first": awm(updates=2, micro_batch=6, mode="sum_first"),
    }[name]
    parts, watch = counts(algorithm, shared=False)
    assert parts > 8
    assert not watch.mixed
    assert watch.waiting == 0


def test_the_conditioning_of_samples_is_found_on_the_device():
    trajectory = experience_away().trajectory
    sample = torch.zeros(5, dtype=torch.long, device="meta")
    with Watch() as watch:
        assert len(trajectory.conditioning_of(sample)) == 5
        assert len(trajectory.conditioning_of(slice(2, 9))) == 7
    assert not watch.mixed and not watch.copies


@pytest.mark.parametrize("shared", [True, False], ids=["one start", "own starts"])
def test_a_rollout_sends_its_noise_without_waiting(shared):
    policy = AwayPolicy(torch.zeros(12, device="meta"), 0.5)
    with Watch() as watch:
        trajectory = rollout(
            policy, PROMPTS, FLOW, SIGMAS, 8, seeded(1), same_noise=shared, batch_size=6
        )
    assert trajectory.final.device.type == "meta"
    # The schedule is sent once; then the first noise of 3 groups or 4 batches, and that of 4
    # batches in each of 7 steps.
    assert watch.copies == (1 + 1 + 28 if shared else 1 + 4 + 28)
    assert watch.waiting == 1
    assert not watch.mixed


def test_the_watch_sees_an_index_that_lies_on_the_host():
    values, index = torch.zeros(4, device="meta"), torch.tensor([1, 2])
    with Watch() as watch:
        index.to("meta")
        index.to("meta", non_blocking=True)
    assert (watch.copies, watch.waiting) == (2, 1)
    with Watch() as watch:
        values[index]
    assert watch.mixed
    with pytest.raises(RuntimeError, match="meta"):
        bool(values[0] > 0)
