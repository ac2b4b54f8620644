# SPDX-License-Identifier: Apache-2.0
"""What the trainer feeds back to its chunks: windows, gains, learned weights, new boundaries."""

import pytest
import torch

import compose
from chunkgrpo.algorithms.observing import ChunkObserver
from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.core import (
    ChunkPlan,
    ChunkWindow,
    FixedWindow,
    FlowDiffusion,
    LearnedSelection,
    Transition,
    group_advantages,
    make_sigmas,
    step_plan,
)
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import optimizer_tensors
from chunkgrpo.train.collecting import Collector
from chunkgrpo.types import Experience, as_prompts
from oracles import seeded, toy

FLOW = Transition(FlowDiffusion(0.7))
PLAN = ChunkPlan((1, 2, 3))
SIGMAS = make_sigmas(7)
PROMPTS = PromptSet(as_prompts(("a star", "two circles", "a red cross")))
BRIGHTNESS = FunctionReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
SETTINGS = {
    "iterations": 5, "num_prompts": 3, "group_size": 6, "learning_rate": 1e-2, "evaluate_every": 0,
    "checkpoint_every": 1,
}  # fmt: skip
TIMES = ("seconds", "phase_seconds", "images_per_second")
SAMPLER = Sampler(FLOW, SIGMAS, same_noise=True, batch_size=96)


def make_trainer(folder, settings=SETTINGS, plan=PLAN, **options):
    algorithm = compose.chunk_grpo(plan, FLOW, updates=2, micro_batch=5, **options)
    return compose.trainer(
        toy(), algorithm, SAMPLER, PROMPTS, [(BRIGHTNESS, 1.0)], PROMPTS, BRIGHTNESS,
        folder, **settings,
    )  # fmt: skip


def learned(usefulness):
    """A selection that has learned nothing yet."""
    return LearnedSelection(0.67, correction=True, usefulness=usefulness)


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
    whole = make_trainer(tmp_path / "whole", selection=learned(usefulness))
    assert whole.run()
    half = make_trainer(
        tmp_path / "half", SETTINGS | {"iterations": 2}, selection=learned(usefulness)
    )
    assert half.run()
    rest = make_trainer(tmp_path / "half", selection=learned(usefulness))
    assert rest.run()
    assert torch.equal(rest.parameters[0], whole.parameters[0])
    assert rest.algorithm.learned is not None and whole.algorithm.learned is not None
    assert rest.algorithm.learned.state() == whole.algorithm.learned.state() != {}
    probabilities = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["chunk_probability"]
    assert sum(probabilities) == pytest.approx(1)
    assert min(probabilities) >= 0.2 / 3
    assert max(probabilities) > 0.34


def test_new_boundaries_survive_an_interruption(tmp_path):
    whole = make_trainer(tmp_path / "whole", recut=Cycle(), refresh=2)
    assert whole.run()
    chunks = [record["chunks"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert chunks == [[1, 2, 3]] * 2 + [[1, 1, 4]] * 2 + [[2, 4]]
    cycle = Cycle()
    half = make_trainer(tmp_path / "half", SETTINGS | {"iterations": 3}, recut=cycle, refresh=2)
    assert half.run()
    rest = make_trainer(tmp_path / "half", recut=cycle, refresh=2)
    assert rest.run()
    assert torch.equal(rest.parameters[0], whole.parameters[0])


def build(recipe, folder, pipeline, **settings):
    """A recipe's own run, small, with a policy that moves fast enough for its dynamics to."""
    small = {
        "iterations": 6, "checkpoints.every": 6, "model.path": pipeline, "model.precision": "fp32",
        "model.adaptation.kind": "lora", "model.max_sequence_length": 4, "sampling.prompts": 2,
        "sampling.group_size": 4, "optimizer.learning_rate": 0.03, "evaluation.every": 0,
        "objective.trust.low": 0.1, "objective.trust.high": 0.1,
        "rewards": "[{name: brightness}]", "evaluation.reward": "{name: brightness}",
    }  # fmt: skip
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return build_trainer(
        load_config(recipe, [f"{key}={value}" for key, value in (small | given).items()]), folder
    )


MOVES = {
    "objective__plan__refresh": 2, "objective__plan__min_size": 2, "iterations": 5,
    "model__adaptation__kind": "full", "optimizer__learning_rate": 0.1,
}  # fmt: skip
"""A plan that is measured anew every second iteration, of a policy whose dynamics move."""


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("chunk-grpo-adaptive", MOVES),
        ("chunk-grpo-learned", {}),
        ("chunk-grpo-learned", {"objective__selection__usefulness": "reward"}),
    ],
)
def test_a_recipe_that_adapts_goes_on_bit_for_bit(tmp_path, tiny_pipeline_path, recipe, settings):
    """Interrupted after an odd iteration, between two cuts, and taken up by new parts."""

    def start(folder):
        return build(recipe, tmp_path / folder, tiny_pipeline_path, **settings)

    whole = start("whole")
    assert whole.run()
    first = start("parts")

    def stop(record):
        first.stopped = record["iteration"] == 3

    first.on_iteration = stop
    assert not first.run()
    rest = start("parts")
    assert rest.run()
    assert all(map(torch.equal, rest.parameters, whole.parameters))
    assert all(map(torch.equal, rest.ema.values, whole.ema.values))
    states = [optimizer_tensors(each.optimizer, each.names) for each in (rest, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert rest.algorithm.state() == whole.algorithm.state()
    records, again = (
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(f)]
        for f in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    )
    assert records == again
    # It did adapt, and that before the interruption and after it.
    what = "chunk_probability" if "learned" in recipe else "chunks"
    found = [tuple(record[what]) for record in records]
    assert len(set(found[:3])) > 1 and found[-1] not in found[:3]


# --- usefulness ---------------------------------------------------------------------------------


def experience(policy):
    trajectory = compose.rollout(policy, PROMPTS.texts, FLOW, SIGMAS, 6, seeded(1), same_noise=True)
    rewards = torch.randn(18, generator=seeded(2))
    return Experience(trajectory, group_advantages(rewards, 3).values)


class Weighted(LearnedSelection):
    """All chunks, with weights that usefulness must not depend on."""

    def loss_weights(self, plan, curve_BN, chosen_BM):
        return torch.tensor([0.5, 1.0, 2.0]).expand(len(curve_BN), -1)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_usefulness_is_each_chunks_own_gradient(weighted):
    policy = toy()
    given = experience(policy)
    selection = Weighted(1.0) if weighted else LearnedSelection(1.0)
    algorithm = compose.chunk_grpo(PLAN, FLOW, selection, updates=1, micro_batch=4)
    weights = selection.loss_weights(PLAN, torch.ones(1, 6), torch.zeros(1, 3))[0]
    algorithm.begin(0, seeded())
    for part in algorithm.losses(policy, given, seeded(3)):
        part.backward()
    found = algorithm.observer.usefulness()
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
    selection = LearnedSelection(1.0, usefulness="reward")
    algorithm = compose.chunk_grpo(PLAN, FLOW, selection, updates=2, micro_batch=4)
    algorithm.begin(0, seeded())
    observer, later = algorithm.observer, []
    for part in algorithm.losses(policy, given, seeded(3)):
        part.backward()
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
    for usefulness in ("reward", "gradient"):
        selection = LearnedSelection(usefulness=usefulness)
        assert ChunkObserver(PLAN, selection).usefulness().isnan().all()


# --- credit and windows -------------------------------------------------------------------------


def test_gains_sum_to_the_reward_above_the_first_prediction(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, SETTINGS | {"iterations": 1, "assign": "gain"})
    seen = {}
    original = Collector.boundaries

    def boundaries(self, queue, trajectory, *rest):
        seen["pending"], seen["trajectory"] = original(self, queue, trajectory, *rest), trajectory
        return seen["pending"]

    monkeypatch.setattr(Collector, "boundaries", boundaries)
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
    trainer = make_trainer(tmp_path, SETTINGS | {"iterations": 8}, window=ChunkWindow())
    assert trainer.run()
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        start, stop = record["window"]
        assert (start, stop - start) in {(0, 1), (1, 2), (3, 3)}
        assert record["chunks"] == [stop - start]
        assert record["rollout_evaluations"] == 3 * (start + 1) + 18 * (7 - start - 1)


def test_branches_follow_new_boundaries_and_survive_an_interruption(tmp_path):
    """The window is cut as the algorithm is, also where a checkpoint says how that was."""
    settings = SETTINGS | {"iterations": 9}

    def make(folder, settings, cycle):
        window = ChunkWindow()
        return make_trainer(tmp_path / folder, settings, window=window, recut=cycle, refresh=2)

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
    assert make("half", settings | {"iterations": 5}, cycle).run()
    rest = make("half", settings, cycle)
    assert rest.run()
    assert rest.algorithm.plan == ChunkPlan((1, 1, 4))
    assert torch.equal(rest.parameters[0], whole.parameters[0])
    again = read_metrics(tmp_path / "half" / "metrics.jsonl")
    assert [r["window"] for r in again] == [r["window"] for r in records]


def test_a_fixed_window_is_what_is_trained(tmp_path):
    window = FixedWindow(size=2, start=1)
    trainer = make_trainer(tmp_path, plan=step_plan(2), window=window, num_trained=6)
    assert trainer.run()
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["window"] == [1, 3]
    assert len(record["step_ratio_mean"]) == 2
