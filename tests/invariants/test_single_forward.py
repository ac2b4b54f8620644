# SPDX-License-Identifier: Apache-2.0
"""No forward twice: the ratio of a single step is that of the forward which is back-propagated.

A chunk of several steps has one ratio, which must be known before its first step is
back-propagated: a pass without gradient measures it once the policy has moved.

Axes: B samples, N trained steps, C chunks.
"""

from collections import Counter

import pytest
import torch

from chunkgrpo.algorithms.chunk_update import Scales, Update
from chunkgrpo.core import (
    ChunkPlan,
    Clip,
    KlMask,
    LearnedSelection,
    NoTrustRegion,
    RateKl,
    TransitionKl,
    UniformSelection,
    make_sigmas,
    step_plan,
)
from chunkgrpo.policies.toy import CountingPolicy, GaussianPolicy
from chunkgrpo.types import Experience
from compose import chunk_grpo, rollout
from oracles import (
    FLOW,
    PROMPTS,
    chosen_of,
    close,
    collect,
    experience_with_velocities,
    objective,
    seeded,
    shift,
    toy,
)

OPTIONS = {
    "clip": {"trust": Clip(1e-3, 1e-3)},
    "clip of full ratios": {"ratio": "full", "trust": Clip(0.05, 0.1)},
    "KL mask": {"trust": KlMask(1e-4)},
    "guard": {"ratio": "guard", "trust": Clip(1e-3, 1e-3)},
    "k3 to the sampling policy": {"old_kl": 3.0, "trust": Clip(1e-3, 1e-3)},
    "reference KL": {"kl": TransitionKl(0.5), "trust": Clip(1e-3, 1e-3)},
    "all at once": {
        "ratio": "guard",
        "trust": KlMask(1e-4),
        "old_kl": 2.0,
        "kl": RateKl(0.3),
        "consistency": 0.4,
    },
    "no trust region": {"trust": NoTrustRegion()},
    "replayed": {"anchor": "replay", "trust": Clip(1e-3, 1e-3)},
}


class Counting(GaussianPolicy):
    """The toy, which notes each row it is asked for: state and level, with gradient or without."""

    def __init__(self):
        super().__init__(toy().mean.detach(), 0.5)
        self.asked = {"trained": Counter(), "quiet": Counter(), "reference": Counter()}
        self.largest = 0

    def velocity(self, x, sigma, conditioning):
        kind = "trained" if torch.is_grad_enabled() else "quiet"
        kind = "reference" if self.mean is self._base else kind
        rows = zip(x.detach().double(), sigma.double().expand(len(x)), strict=True)
        self.asked[kind].update((*state.tolist(), level.item()) for state, level in rows)
        self.largest = max(self.largest, len(x))
        return super().velocity(x, sigma, conditioning)

    def taken(self):
        """Return the counts, and begin anew."""
        found = {kind: Counter(counter) for kind, counter in self.asked.items()}
        for counter in self.asked.values():
            counter.clear()
        self.largest = 0
        return found


def counted(algorithm, experience=None, seed=3):
    """What each update asked for, by kind, and its pieces; the policy moves after each."""
    policy = Counting()
    shift(0.02)(policy)
    experience = experience or experience_with_velocities(policy)
    policy.taken()
    found, parts = [], []
    for part in algorithm.losses(policy, experience, seeded(seed)):
        part.backward()
        parts.append(part)
        if part.ends_update:
            found.append((policy.taken(), parts))
            parts = []
            shift(0.05)(policy)
    return found


def pairs_of(parts, skipped=False):
    """The (sample, step) pairs that an update trained, in all pieces or in the skipped ones."""
    return [
        pair
        for part in parts
        if "step" in part.diagnostics and (not skipped or "skipped" in part.diagnostics)
        for pair in zip(
            part.diagnostics["sample"].tolist(), part.diagnostics["step"].tolist(), strict=True
        )
    ]


def rows_of(experience, pairs):
    """What the network is asked for where each pair is evaluated once."""
    t = experience.trajectory
    return Counter((*t.states[b, i].double().tolist(), t.sigmas[i].double().item())
                   for b, i in pairs)  # fmt: skip


# --- how often the network is asked ------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_single_steps_are_evaluated_once_in_every_update(name):
    algorithm = chunk_grpo(
        step_plan(7), FLOW, UniformSelection(0.6), updates=3, micro_batch=5, **OPTIONS[name]
    )
    policy = Counting()
    shift(0.02)(policy)
    experience = experience_with_velocities(policy)
    updates = counted(algorithm, experience)
    assert len(updates) == 3
    cut = []
    for index, (asked, parts) in enumerate(updates):
        pairs = pairs_of(parts)
        expected = rows_of(experience, pairs)
        assert len(set(pairs)) == len(pairs) == 8 * 4 and max(expected.values()) == 1
        if "consistency" in OPTIONS[name]:
            # Neighbours are pairs of their own.
            assert all(asked["trained"][row] >= 1 for row in expected)
        else:
            assert asked["trained"] == expected
        # Only a replayed anchor is measured before, once a rollout and before the policy moves.
        measured = index == 0 and OPTIONS[name].get("anchor") == "replay"
        assert asked["quiet"].total() == (24 * 4 if measured else 0)
        assert asked["reference"] == (expected if "kl" in OPTIONS[name] else Counter())
        cut.append(parts[-1].diagnostics["cut"].float().mean().item())
    assert cut[0] == 0
    if name != "no trust region":
        assert 0 < cut[1] < 1


def test_counts_of_the_policy_that_only_counts():
    """[1, 1, 1], [1, 2] and [3]: a pass before the second update for the steps in long chunks."""
    for sizes, quiet in (((1, 1, 1), 0), ((1, 2), 2), ((2, 1), 2), ((3,), 3)):
        policy = CountingPolicy()
        trajectory = rollout(policy, PROMPTS, FLOW, make_sigmas(4), 4, seeded(1))
        advantages = torch.linspace(-1, 1, 12)
        algorithm = chunk_grpo(
            ChunkPlan(sizes), FLOW, UniformSelection(1.0), trust=NoTrustRegion(), micro_batch=5
        )
        policy.reset()
        for part in algorithm.losses(policy, Experience(trajectory, advantages), seeded(3)):
            part.backward()
            if part.ends_update:
                with torch.no_grad():
                    policy.weight += 0.01
        assert (policy.trained_rows, policy.quiet_rows) == (12 * 3, 6 * quiet), sizes


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 1, 4), (3, 4), (1, 1, 5)])
@pytest.mark.parametrize("name", ["clip", "KL mask", "guard", "k3 to the sampling policy"])
def test_only_pairs_of_longer_chunks_are_measured(sizes, name):
    plan = ChunkPlan(sizes)
    algorithm = chunk_grpo(plan, FLOW, UniformSelection(0.67), micro_batch=5, **OPTIONS[name])
    policy = Counting()
    shift(0.02)(policy)
    experience = experience_with_velocities(policy)
    (first, _), (second, parts) = counted(algorithm, experience)
    assert first["quiet"].total() == 0
    pairs, idle = pairs_of(parts), pairs_of(parts, skipped=True)
    single = [plan.sizes[plan.chunk_of_step[i]] == 1 for _, i in pairs]
    longer = [pair for pair, alone in zip(pairs, single, strict=True) if not alone]
    assert second["quiet"] == rows_of(experience, longer)
    # What was measured and found cut costs no second forward; a single step is never skipped.
    assert set(idle) <= set(longer)
    if name != "k3 to the sampling policy":
        assert idle
    assert second["trained"] == rows_of(experience, set(pairs) - set(idle))


@pytest.mark.parametrize("sizes", [(1,) * 7, (1, 2, 4), (3, 4)])
def test_samples_that_pull_nowhere_are_measured_in_micro_batches(sizes):
    """Their ratios are reported; memory is bounded by the micro-batch there too."""
    policy = Counting()
    experience = experience_with_velocities(policy)
    advantages = experience.advantages.clone()
    advantages[4:] = 0
    experience = Experience(experience.trajectory, advantages)
    algorithm = chunk_grpo(
        ChunkPlan(sizes), FLOW, UniformSelection(1.0), trust=NoTrustRegion(), micro_batch=5
    )
    policy.taken()
    ratios, shares = [], []
    for part in algorithm.losses(policy, experience, seeded(3)):
        part.backward()
        assert policy.largest <= 5
        ratios.append(part.diagnostics["log_ratio"])
        if part.ends_update:
            shares.append(policy.taken())
            shift(0.05)(policy)
            log_ratio, ratios = torch.cat(ratios), []
            assert len(log_ratio) == 12 * 7
    assert (log_ratio != 0).all()
    first, second = shares
    assert first["quiet"].total() == 0
    assert max((second["quiet"] | second["trained"]).values()) == 1
    once = second["quiet"].total() + second["trained"].total()
    # Steps of long chunks that pull are measured, then trained.
    again = (second["quiet"] & second["trained"]).total()
    assert once - again == 12 * 7
    assert (again > 0) == (max(sizes) > 1)


# --- and it is the same loss -------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [5, 1000])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_pass_is_the_objectives_value_and_gradient(name, micro_batch):
    """By autograd of the formula; advantages of both signs are cut and are not."""
    policy, fresh = toy(), toy()
    for each in (policy, fresh):
        shift(0.02)(each)
    experience = experience_with_velocities(policy)
    algorithm = chunk_grpo(
        step_plan(7), FLOW, UniformSelection(0.6), updates=2, micro_batch=micro_batch,
        **OPTIONS[name],
    )  # fmt: skip
    updates = collect(algorithm, policy, experience, move=shift(0.05))
    for value, gradient, parts in updates:
        pieces = [part for part in parts if "sample" in part.diagnostics]
        mask = chosen_of(pieces, algorithm.plan, 24)
        samples = mask.any(1).nonzero()[:, 0]
        expected, expected_gradient = objective(fresh, experience, algorithm, samples, mask)
        close(value, expected, 1e-5)
        close(gradient, expected_gradient, 1e-4)
        shift(0.05)(fresh)
    last = updates[-1][2][-1].diagnostics
    seen = set(zip((last["chunk_advantage"] > 0).tolist(), last["cut"].tolist(), strict=True))
    kinds = (False,) if name == "no trust region" else (False, True)
    assert seen == {(sign, cut) for sign in (False, True) for cut in kinds}


@pytest.mark.parametrize("sizes", [(1,) * 7, (1, 2, 4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_pass_is_two_passes(name, sizes, monkeypatch):
    """The same update with the ratios of all pairs measured before any is back-propagated."""

    def run():
        policy = Counting()
        shift(0.02)(policy)
        algorithm = chunk_grpo(
            ChunkPlan(sizes), FLOW, UniformSelection(0.6), updates=2, micro_batch=5,
            **OPTIONS[name],
        )  # fmt: skip
        experience = experience_with_velocities(policy)
        policy.taken()
        updates = collect(algorithm, policy, experience, move=shift(0.05))
        return updates, policy.taken()["quiet"].total()

    once, rows = run()
    of = Scales.of

    def all_longer(*arguments):
        scales = of(*arguments)
        scales.single_N.zero_()
        return scales

    monkeypatch.setattr(Scales, "of", staticmethod(all_longer))
    monkeypatch.setattr(Update, "by_size", lambda self, batch, single: [] if single else batch)
    twice, more_rows = run()
    assert more_rows > rows
    for (value, gradient, parts), (expected, expected_gradient, other) in zip(
        once, twice, strict=True
    ):
        close(value, expected, 1e-6)
        close(gradient, expected_gradient, 1e-6)
        found, wanted = parts[-1].diagnostics, other[-1].diagnostics
        assert torch.equal(found["cut"], wanted["cut"])
        torch.testing.assert_close(
            found["chunk_log_ratio"], wanted["chunk_log_ratio"], rtol=1e-5, atol=1e-9
        )


def test_idle_pairs_are_flagged_where_they_are_evaluated():
    """A single step that turns out to be cut has coefficient 0; "skipped" ones had no forward."""
    algorithm = chunk_grpo(
        step_plan(7), FLOW, UniformSelection(1.0), trust=Clip(1e-3, 1e-3), micro_batch=5
    )
    _, (_, parts) = counted(algorithm)
    idle = torch.cat([part.diagnostics["idle"] for part in parts])
    assert idle.dtype == torch.bool and idle.sum() == parts[-1].diagnostics["cut"].sum()
    assert 0 < idle.float().mean() < 1
    assert not any("skipped" in part.diagnostics for part in parts)


def test_a_selection_that_learns_from_rewards_sees_the_ratios_of_one_pass():
    policy = Counting()
    selection = LearnedSelection(1.0, usefulness="reward", power=1.0)
    algorithm = chunk_grpo(step_plan(7), FLOW, selection, trust=NoTrustRegion(), micro_batch=5)
    algorithm.begin(0, seeded())
    experience = experience_with_velocities(policy)
    gains = []
    for part in algorithm.losses(policy, experience, seeded(3)):
        part.backward()
        if part.ends_update:
            last = part.diagnostics
            gains.append(last["chunk_log_ratio"] * last["chunk_advantage"])
            shift(0.05)(policy)
    assert len(gains) == 2 and (gains[0] == 0).all()
    expected = [gains[1][last["chunk"] == c].double().mean().item() for c in range(7)]
    assert algorithm.observer.usefulness().tolist() == pytest.approx(expected, rel=1e-6)
