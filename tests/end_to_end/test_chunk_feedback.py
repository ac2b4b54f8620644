# SPDX-License-Identifier: Apache-2.0
"""What the trainer feeds back to its chunks: windows, gains, learned weights, new boundaries."""

from dataclasses import replace

import pytest
import torch

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.core import (
    ChunkPlan,
    ChunkWindow,
    FixedWindow,
    FlowDiffusion,
    LearnedSelection,
    Transition,
    UniformSelection,
    group_advantages,
    make_sigmas,
    step_plan,
)
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rollout import rollout
from chunkgrpo.train import ChunkObserver, Trainer, TrainSettings
from chunkgrpo.types import Experience, as_prompts
from oracles import seeded, toy

FLOW = Transition(FlowDiffusion(0.7))
PLAN = ChunkPlan((1, 2, 3))
SIGMAS = make_sigmas(7)
PROMPTS = PromptSet(as_prompts(("a star", "two circles", "a red cross")))
BRIGHTNESS = FunctionReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
SETTINGS = TrainSettings(
    iterations=5, num_prompts=3, group_size=6, learning_rate=1e-2, evaluate_every=0,
    checkpoint_every=1,
)  # fmt: skip


def make_trainer(folder, settings=SETTINGS, plan=PLAN, options=None, **fields):
    algorithm = ChunkGRPO(plan, FLOW, num_updates=2, micro_batch=5, **options or {})
    return Trainer(
        toy(), FLOW, algorithm, SIGMAS, PROMPTS, [(BRIGHTNESS, 1.0)], PROMPTS, BRIGHTNESS, folder,
        settings, **fields,
    )  # fmt: skip


def learned(usefulness):
    return {
        "options": {
            "selection": LearnedSelection(0.67, correction=True),
            "group_by_chunk": usefulness == "gradient",
        },
        "usefulness": usefulness,
    }


class Cycle:
    """Boundaries that change at every call, as if the policy's dynamics did."""

    def __init__(self):
        self.plans = [ChunkPlan((3, 3)), ChunkPlan((1, 1, 4)), ChunkPlan((2, 4))]

    def __call__(self):
        self.plans = [*self.plans[1:], self.plans[0]]
        return self.plans[0]


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("usefulness", ["gradient", "reward"])
def test_learned_weights_survive_an_interruption(tmp_path, usefulness):
    whole = make_trainer(tmp_path / "whole", **learned(usefulness))
    assert whole.run()
    half = make_trainer(tmp_path / "half", replace(SETTINGS, iterations=2), **learned(usefulness))
    assert half.run()
    rest = make_trainer(tmp_path / "half", **learned(usefulness))
    assert rest.run()
    assert torch.equal(rest.parameters[0], whole.parameters[0])
    assert rest.learned is not None and whole.learned is not None
    assert rest.learned.state() == whole.learned.state() != {}
    probabilities = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["chunk_probability"]
    assert sum(probabilities) == pytest.approx(1)
    assert min(probabilities) >= 0.2 / 3
    assert max(probabilities) > 0.34


def test_new_boundaries_survive_an_interruption(tmp_path):
    whole = make_trainer(tmp_path / "whole", replan=Cycle(), refresh=2)
    assert whole.run()
    chunks = [record["chunks"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert chunks == [[1, 2, 3]] * 2 + [[1, 1, 4]] * 2 + [[2, 4]]
    cycle = Cycle()
    half = make_trainer(tmp_path / "half", replace(SETTINGS, iterations=3), replan=cycle, refresh=2)
    assert half.run()
    rest = make_trainer(tmp_path / "half", replan=cycle, refresh=2)
    assert rest.run()
    assert torch.equal(rest.parameters[0], whole.parameters[0])


# --- usefulness ---------------------------------------------------------------------------------


def experience(policy):
    trajectory = rollout(policy, PROMPTS.texts, FLOW, SIGMAS, 6, seeded(1), same_noise=True)
    rewards = torch.randn(18, generator=seeded(2))
    return Experience(trajectory, group_advantages(rewards, 3).values)


class Weighted(UniformSelection):
    """All chunks, with weights that usefulness must not depend on."""

    def loss_weights(self, plan, curve_BN, chosen_BM):
        return torch.tensor([0.5, 1.0, 2.0]).expand(len(curve_BN), -1)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_usefulness_is_each_chunks_own_gradient(weighted):
    policy = toy()
    given = experience(policy)
    selection = Weighted(1.0) if weighted else UniformSelection(1.0)
    algorithm = ChunkGRPO(PLAN, FLOW, selection, num_updates=1, micro_batch=4, group_by_chunk=True)
    weights = selection.loss_weights(PLAN, torch.ones(1, 6), torch.zeros(1, 3))[0]
    observer = ChunkObserver(PLAN, policy.parameters(), "gradient", weights)
    for part in algorithm.losses(policy, given, seeded(3)):
        observer.backward(part)
    found = observer.usefulness()
    total = policy.mean.grad.clone()
    norms, separate = [], torch.zeros_like(total)
    t = given.trajectory
    for chunk, size in enumerate(PLAN.sizes):
        loss = torch.zeros((), dtype=torch.float64)
        for i in PLAN.steps_of(chunk):
            v = policy.velocity(
                t.states[:, i], t.sigmas[i].expand(18), t.conditioning_of(slice(None))
            )
            step = FLOW(t.states[:, i], v, t.sigmas[i], t.sigmas[i + 1])
            density = step.log_prob_per_dim(t.states[:, i + 1])
            loss = loss - (given.advantages * density).sum() / size / (18 * 3)
        (gradient,) = torch.autograd.grad(loss, policy.parameters())
        separate += gradient * weights[chunk]
        norms.append(gradient.square().sum() / (18 * size))
    torch.testing.assert_close(found, torch.stack(norms).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(total, separate, rtol=1e-4, atol=1e-9)


def test_reward_usefulness_is_measured_after_the_move():
    policy = toy()
    given = experience(policy)
    algorithm = ChunkGRPO(PLAN, FLOW, UniformSelection(1.0), num_updates=2, micro_batch=4)
    observer = ChunkObserver(PLAN, policy.parameters(), "reward")
    later = []
    for part in algorithm.losses(policy, given, seeded(3)):
        observer.backward(part)
        if part.ends_update:
            if observer.update == 1:
                with torch.no_grad():
                    policy.mean.add_(0.05)
            else:
                later.append(part.diagnostics)
    (d,) = later
    for chunk in range(3):
        mine = d["chunk"] == chunk
        expected = (d["chunk_advantage"][mine].double() * d["chunk_log_ratio"][mine]).mean()
        torch.testing.assert_close(
            observer.usefulness()[chunk], expected.double(), rtol=1e-6, atol=0
        )
    assert (observer.usefulness() != 0).all()


def test_nothing_measured_is_no_observation():
    assert ChunkObserver(PLAN, [], "reward").usefulness().isnan().all()
    assert ChunkObserver(PLAN, [], "gradient").usefulness().isnan().all()


# --- credit and windows -------------------------------------------------------------------------


def test_gains_sum_to_the_reward_above_the_first_prediction(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, iterations=1, credit="gain"))
    seen = {}
    original = trainer.boundaries

    def boundaries(queue, trajectory, *rest):
        seen["pending"], seen["trajectory"] = original(queue, trajectory, *rest), trajectory
        return seen["pending"]

    trainer.boundaries = boundaries
    assert trainer.run()
    t = seen["trajectory"]
    final = BRIGHTNESS(trainer.policy.decode(t.final), [""] * 18)
    totals = [pending.result().total for pending in seen["pending"]]
    seen["gains"] = torch.stack([*totals, final], dim=1).diff(dim=1)
    first = trainer.policy.decode(t.states[:, 0] - t.sigmas[0] * t.velocities[:, 0])
    start = BRIGHTNESS(first, [""] * 18)
    torch.testing.assert_close(seen["gains"].sum(1), final - start)
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["chunk_gain"] == pytest.approx(seen["gains"].mean(0).tolist())


def test_branching_trains_whole_chunks(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, iterations=8), windows=ChunkWindow(PLAN))
    assert trainer.run()
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        start, stop = record["window"]
        assert (start, stop - start) in {(0, 1), (1, 2), (3, 3)}
        assert record["chunks"] == [stop - start]
        assert record["rollout_evaluations"] == 3 * (start + 1) + 18 * (7 - start - 1)


def test_branches_follow_new_boundaries_and_survive_an_interruption(tmp_path):
    """The window is cut as the algorithm is, also where a checkpoint says how that was."""
    settings = replace(SETTINGS, iterations=9)

    def make(folder, settings, cycle):
        windows = ChunkWindow(PLAN)
        return make_trainer(tmp_path / folder, settings, windows=windows, replan=cycle, refresh=2)

    whole = make("whole", settings, Cycle())
    assert whole.run()
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    plans = [(1, 2, 3)] * 2 + [(1, 1, 4)] * 2 + [(2, 4)] * 2 + [(3, 3)] * 2 + [(1, 1, 4)]
    for record, sizes in zip(records, plans, strict=True):
        start, stop = record["window"]
        assert (start, stop - start) in set(zip(ChunkPlan(sizes).starts, sizes, strict=True))
        assert record["chunks"] == [stop - start]
    # Some windows can only come from the new plans.
    old = {(0, 1), (1, 3), (3, 6)}
    assert any(tuple(record["window"]) not in old for record in records[2:])
    cycle = Cycle()
    assert make("half", replace(settings, iterations=5), cycle).run()
    rest = make("half", settings, cycle)
    assert rest.run()
    assert rest.windows.plan == rest.algorithm.plan == ChunkPlan((1, 1, 4))
    assert torch.equal(rest.parameters[0], whole.parameters[0])
    again = read_metrics(tmp_path / "half" / "metrics.jsonl")
    assert [r["window"] for r in again] == [r["window"] for r in records]


def test_a_fixed_window_is_what_is_trained(tmp_path):
    trainer = make_trainer(tmp_path, plan=step_plan(2), windows=FixedWindow(1, 2, 6))
    assert trainer.run()
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["window"] == [1, 3]
    assert len(record["step_ratio_mean"]) == 2
