# SPDX-License-Identifier: Apache-2.0
"""Whole runs: interrupted and resumed, killed, refused, and learning something."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import compose
from chunkgrpo.core import ChunkPlan, FlowDiffusion, StratifiedTimes, Transition, make_sigmas
from chunkgrpo.core.trust import Clip
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import list_checkpoints, load_checkpoint, optimizer_tensors
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.types import as_prompts

FLOW = Transition(FlowDiffusion(0.7))
TRAIN = PromptSet(as_prompts(("a star", "two circles", "a red cross")))
HELD_OUT = PromptSet(as_prompts(("a blue square", "a star")))
BRIGHTNESS = FunctionReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
SETTINGS = {
    "iterations": 6,
    "num_prompts": 2,
    "group_size": 3,
    "learning_rate": 1e-3,
    "warmup": 5,
    "evaluate_every": 3,
    "checkpoint_every": 2,
}
KEYS = (
    "iteration", "seconds", "phase_seconds", "images_per_second", "reward_mean", "reward_std",
    "rewards", "advantage_spread", "zero_spread_groups", "loss", "grad_norm", "l1_rel",
    "rollout_evaluations", "trained_pairs", "idle_pairs", "skipped_updates", "ratio_mean",
    "ratio_std", "kl", "step_ratio_mean",
    "step_ratio_std", "clip_fraction", "chunk_ratio_mean", "chunk_clip_fraction",
    "window", "chunks",
)  # fmt: skip
TIMES = ("seconds", "phase_seconds", "images_per_second")


METHODS = {
    "ChunkGRPO": lambda policy, old: compose.chunk_grpo(ChunkPlan((1, 2)), FLOW),
    "DiffusionNFT": lambda policy, old: compose.diffusion_nft(
        OldPolicy(policy.named_parameters(), "nft1") if old else None
    ),
    "AWM": lambda policy, old: compose.awm(
        OldPolicy(policy.named_parameters(), "awm") if old else None,
        times=StratifiedTimes(2), ema_weight=1.0 if old else 0.0,
    ),
}  # fmt: skip
"""Algorithms by the name of their class, each with an old policy of its own, or without."""


def make_trainer(
    policy, folder, settings=SETTINGS, rewards=BRIGHTNESS, algorithm=None, rollout_batch=96
):
    if algorithm is None:
        algorithm = compose.chunk_grpo(ChunkPlan((1, 2)), FLOW, updates=2, micro_batch=4)
    sampler = Sampler(FLOW, make_sigmas(4), same_noise=True, batch_size=rollout_batch)
    rewards = rewards if isinstance(rewards, list) else [(rewards, 1.0)]
    return compose.trainer(
        policy, algorithm, sampler, TRAIN, rewards, HELD_OUT, BRIGHTNESS, folder, **settings
    )


def state_of(trainer):
    named = zip(trainer.names, trainer.parameters, trainer.ema.values, strict=True)
    tensors = {}
    for name, parameter, average in named:
        tensors |= {f"parameter {name}": parameter.detach(), f"average {name}": average}
    return tensors | optimizer_tensors(trainer.optimizer, trainer.names)


def assert_identical(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def without_times(records):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


# --- resuming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    """Six iterations without interruption: the trainer's state and its records."""
    from chunkgrpo.policies.pipeline import Adaptation
    from chunkgrpo.policies.sd3 import StableDiffusion3Policy
    from chunkgrpo.shapes.build import TEST_SIZE, build_pipeline

    policy = StableDiffusion3Policy.from_options(
        build_pipeline(TEST_SIZE), Adaptation(rank=4), precision="fp32", max_sequence_length=4
    )
    before = [p.detach().clone() for p in policy.parameters()]
    folder = tmp_path_factory.mktemp("reference")
    trainer = make_trainer(policy, folder)
    assert trainer.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    return state_of(trainer), read_metrics(folder / "metrics.jsonl"), trainer


@pytest.mark.parametrize("draw", range(2))
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tiny_policy, tmp_path, reference_run, draw
):
    from chunkgrpo.policies.pipeline import Adaptation

    stop_after = random.Random(f"draw {draw}").randint(1, 5)

    def build():
        return tiny_policy(Adaptation(rank=4))

    first = make_trainer(build(), tmp_path)

    def stop(record):
        first.stopped = record["iteration"] == stop_after

    first.on_iteration = stop
    assert not first.run()
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == f"{stop_after:06d}"
    second = make_trainer(build(), tmp_path)
    assert second.run()
    expected, records, _ = reference_run
    assert_identical(state_of(second), expected)
    assert second.num_updates == 12 and second.ema.num_updates == 12
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["iteration"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert without_times(found) == without_times(records)
    seconds = [record["seconds"] for record in found]
    assert seconds == sorted(seconds)


def test_a_finished_run_does_nothing_more(reference_run):
    _, records, trainer = reference_run
    before = (trainer.folder / "metrics.jsonl").read_bytes()
    again = make_trainer(trainer.policy, trainer.folder)
    assert again.run()
    assert (trainer.folder / "metrics.jsonl").read_bytes() == before
    assert again.iteration == 6 and again.seconds == records[-1]["seconds"]


def test_the_newest_two_checkpoints_are_kept_and_the_best(reference_run):
    _, records, trainer = reference_run
    scores = {r["iteration"]: r["accuracy"] for r in records if "accuracy" in r}
    assert set(scores) == {3, 6}
    best = max(scores, key=lambda number: scores[number])
    folder = trainer.folder / "checkpoints"
    names = {"000004", "000006", f"{best:06d}", "best.json"}
    assert {p.name for p in folder.iterdir()} == names
    note = json.loads((folder / "best.json").read_text())
    assert note == {"iteration": best, "score": scores[best]}


def test_a_checkpoint_is_by_name(reference_run):
    """Its tensors are called as the model's parameters are, and hold them."""
    state, _, trainer = reference_run
    tensors, info = load_checkpoint(trainer.folder / "checkpoints" / "000006")
    network = dict(trainer.policy.pipe.transformer.named_parameters())
    trained = {name for name, p in network.items() if p.requires_grad}
    assert trained and trained == set(trainer.policy.named_parameters())
    moments = ("exp_avg", "exp_avg_sq", "step")
    expected = {f"{kind}.{name}" for kind in ("parameter", "ema") for name in trained}
    expected |= {f"optimizer.{name}:{moment}" for name in trained for moment in moments}
    assert set(tensors) == expected
    for name in trained:
        assert torch.equal(tensors[f"parameter.{name}"], network[name])
        assert torch.equal(tensors[f"ema.{name}"], state[f"average {name}"])
    assert info["iteration"] == 6 and info["algorithm"] == {"chunks": [1, 2]}


def refused(trainer, message):
    """Assert that a run does not begin, says why in one line, and has changed nothing."""
    before = [p.detach().clone() for p in trainer.parameters]
    averages = [value.clone() for value in trainer.ema.values]
    with pytest.raises(ValueError, match=message) as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, trainer.parameters))
    assert all(map(torch.equal, averages, trainer.ema.values))
    assert trainer.iteration == 0 and not trainer.optimizer.state


def test_a_checkpoint_of_other_weights_is_refused(tiny_policy, reference_run):
    from chunkgrpo.policies.adaptation import Adaptation

    folder = reference_run[2].folder
    name = next(iter(reference_run[2].policy.named_parameters()))
    wider = make_trainer(tiny_policy(Adaptation(rank=8)), folder)
    refused(wider, rf"of other weights .* its {name} has shape \(4, \d+\), not \(8, \d+\)")
    fewer = make_trainer(tiny_policy(Adaptation(rank=4, targets=("to_q",))), folder)
    refused(fewer, "of other weights .* it holds .*add_k_proj.*, which is not trained")
    whole = make_trainer(tiny_policy(Adaptation("full")), folder)
    refused(whole, "of other weights than those trained now: it lacks .*model.adaptation")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("first", METHODS)
def test_a_checkpoint_of_another_method_is_refused(tmp_path, first, old):
    def start(name):
        policy = GaussianPolicy(torch.zeros(4))
        return make_trainer(
            policy, tmp_path, quiet(iterations=1), algorithm=METHODS[name](policy, old)
        )

    begun = start(first)
    assert begun.run()
    assert start(first).run()  # of the same method: taken, and finished already
    for name in METHODS:
        if name != first:
            refused(start(name), "the checkpoint .*written by another method.*; start a new run")


def test_records_hold_what_is_promised(reference_run):
    _, records, _ = reference_run
    for record in records:
        keys = {*KEYS}
        if record["iteration"] % 3 == 0:
            keys |= {"accuracy", "accuracy_low", "accuracy_high"}
        assert set(record) == keys
        assert record["rewards"] == {"brightness": record["reward_mean"]}
        assert set(record["phase_seconds"]) == {"rollout", "decode", "reward", "train"}
        assert record["rollout_evaluations"] == 2 + 3 * 6  # one noise per group
        assert (
            6 <= record["trained_pairs"] + record["idle_pairs"] <= 12
        )  # one chunk of 1 or 2 steps a sample
        assert len(record["l1_rel"]) == len(record["step_ratio_mean"]) == 3
        assert record["grad_norm"] > 0 and record["reward_std"] > 0
        assert record["ratio_mean"] == pytest.approx(1, abs=0.1)
        assert record["zero_spread_groups"] == 0
    assert 0 <= records[2]["accuracy_low"] <= records[2]["accuracy_high"] <= 1


# --- signals ------------------------------------------------------------------------------------

CHILD = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.core import ChunkPlan, FlowDiffusion, Transition, make_sigmas
from chunkgrpo.credit import Credit
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards import FunctionReward, Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import Checkpointing
from chunkgrpo.train.evaluating import Evaluator
from chunkgrpo.train.loop import Budget, Trainer
from chunkgrpo.types import as_prompts
flow, prompts = Transition(FlowDiffusion(0.7)), PromptSet(as_prompts(("a star", "two circles")))
reward = FunctionReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
def pace(record):
    print(record["iteration"], flush=True)
    time.sleep(float(sys.argv[3]))
sampler = Sampler(flow, make_sigmas(4), same_noise=True, batch_size=96)
trainer = Trainer(
    GaussianPolicy(torch.zeros(4)), sampler, ChunkGRPO(ChunkPlan((1, 2)), flow), Credit(),
    Scorer([(reward, 1.0)]), prompts, Evaluator(prompts, reward, sampler.sigmas),
    Path(sys.argv[1]),
    Budget(int(sys.argv[2]), 2, 4, evaluate_every=0), checkpoints=Checkpointing(3),
    on_iteration=pace,
)
print("finished" if trainer.run() else "interrupted", flush=True)
"""


def start_child(folder, iterations, pause):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(iterations), str(pause)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(child, line):
    for text in child.stdout:
        if text.strip() == line:
            return
    raise AssertionError(f"the run ended without {line!r}")


def finish_here(folder, iterations):
    """Resume a child's run in this process, and run the same without interruption."""
    runs = []
    for place in (folder, folder.parent / "uninterrupted"):
        prompts = PromptSet(as_prompts(("a star", "two circles")))
        sampler = Sampler(FLOW, make_sigmas(4), same_noise=True, batch_size=96)
        trainer = compose.trainer(
            GaussianPolicy(torch.zeros(4)), compose.chunk_grpo(ChunkPlan((1, 2)), FLOW), sampler,
            prompts, [(BRIGHTNESS, 1.0)], prompts, BRIGHTNESS, place, iterations=iterations,
            num_prompts=2, group_size=4, evaluate_every=0, checkpoint_every=3,
        )  # fmt: skip
        assert trainer.run()
        runs.append((state_of(trainer), read_metrics(place / "metrics.jsonl")))
    (state, records), (expected, expected_records) = runs
    assert_identical(state, expected)
    assert [r["iteration"] for r in records] == list(range(1, iterations + 1))
    assert without_times(records) == without_times(expected_records)


def test_ctrl_c_ends_the_run_after_the_iteration_with_all_saved(tmp_path):
    folder = tmp_path / "run"
    child = start_child(folder, 1000, 0.2)
    wait_for(child, "2")
    child.send_signal(signal.SIGINT)
    rest = child.communicate(timeout=300)[0].split()
    assert child.returncode == 0 and rest[-1] == "interrupted"
    last = read_metrics(folder / "metrics.jsonl")[-1]["iteration"]
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"{last:06d}"
    finish_here(folder, last + 2)


def test_a_killed_run_resumes_from_its_newest_checkpoint(tmp_path):
    folder = tmp_path / "run"
    child = start_child(folder, 1000, 0.05)
    wait_for(child, "7")
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=300)
    newest = list_checkpoints(folder / "checkpoints")[-1]
    assert newest.name in ("000006", "000009")
    # What a kill in the middle of a write leaves behind.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 10, "loss": 0.')
    torn = folder / "checkpoints" / ".000012.partial"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half a file")
    finish_here(folder, 13)


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    trainer = make_trainer(GaussianPolicy(torch.zeros(4)), tmp_path, quiet())
    presses = []

    def press(record):
        presses.append(record["iteration"])
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.on_iteration = press
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert presses == [1]
    assert signal.getsignal(signal.SIGINT) is before


# --- rewards that misbehave ---------------------------------------------------------------------


def quiet(**changes):
    """Settings for the toy, which has no images to look at."""
    return SETTINGS | {"evaluate_every": 0} | changes


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path):
    calls = []

    def broken(images, prompts):
        calls.append(list(prompts))
        scores = images.mean((1, 2, 3))
        if len(calls) == 4:
            scores[4] = float("nan")
        return scores

    reward = FunctionReward("broken", broken)
    trainer = make_trainer(GaussianPolicy(torch.zeros(4)), tmp_path, quiet(), reward)
    with pytest.raises(ValueError) as caught:
        trainer.run()
    message = str(caught.value)
    assert "'broken'" in message and "nan" in message and repr(calls[3][4]) in message
    # All finished iterations are saved, though a checkpoint was due only at every second.
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "000003"
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    # With the reward mended, the run goes on.
    resumed = make_trainer(GaussianPolicy(torch.zeros(4)), tmp_path, quiet())
    assert resumed.run() and resumed.num_updates == 12


def test_rewards_without_spread_teach_nothing_and_are_counted(tmp_path):
    flat = FunctionReward("flat", lambda images, prompts: torch.full((len(images),), 0.7))
    policy = GaussianPolicy(torch.zeros(4))
    settings = quiet(iterations=2, weight_decay=0.0)
    assert make_trainer(policy, tmp_path, settings, flat).run()
    assert (policy.mean == 0).all()
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert record["zero_spread_groups"] == 2
        assert record["grad_norm"] == 0 and record["loss"] == 0
        assert record["advantage_spread"] == 0


def test_weights_of_rewards_add_up(tmp_path):
    dark = FunctionReward("dark", lambda images, prompts: 1 - images.mean((1, 2, 3)))
    rewards = [(BRIGHTNESS, 2.0), (dark, 0.5)]
    trainer = make_trainer(GaussianPolicy(torch.zeros(4)), tmp_path, quiet(iterations=1), rewards)
    trainer.run()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    rewards = record["rewards"]
    assert rewards["brightness"] + rewards["dark"] == pytest.approx(1)
    expected = 2 * rewards["brightness"] + 0.5 * rewards["dark"]
    assert record["reward_mean"] == pytest.approx(expected)


# --- settings that must have an effect ------------------------------------------------------------


def test_warm_up_scales_the_first_updates(tmp_path):
    trainer = make_trainer(GaussianPolicy(torch.zeros(4)), tmp_path, quiet(iterations=1, warmup=8))
    trainer.run()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 8)


def test_the_rate_falls_over_the_end_of_a_run(tmp_path):
    settings = quiet(iterations=4, warmup=0, fall=0.5)
    trainer = make_trainer(GaussianPolicy(torch.zeros(4)), tmp_path, settings)
    rates = []
    trainer.on_iteration = lambda _: rates.append(trainer.optimizer.param_groups[0]["lr"])
    trainer.run()
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])


def test_the_average_is_used_only_where_asked(tmp_path):
    policy = GaussianPolicy(torch.zeros(4))
    trainer = make_trainer(policy, tmp_path, quiet(iterations=3, ema_decay=0.99))
    trainer.run()
    trained = policy.mean.detach().clone()
    with trainer.averaged():
        assert torch.equal(policy.mean.detach(), trainer.ema.values[0])
        assert not torch.equal(policy.mean.detach(), trained)
    assert torch.equal(policy.mean.detach(), trained)
    off = make_trainer(policy, tmp_path / "off", quiet(iterations=1, ema_decay=0.0))
    off.run()
    trained = policy.mean.detach().clone()
    with off.averaged():
        assert torch.equal(policy.mean.detach(), trained)


def test_an_evaluation_takes_no_more_at_once_than_a_rollout(tiny_policy, tmp_path):
    """Its first forward is a run's first act, and must fit where the rollout fits."""
    policy, rows, scores = tiny_policy(), [], []
    velocity = policy.velocity

    def counted(x, sigma, conditioning):
        rows.append(len(x))
        return velocity(x, sigma, conditioning)

    policy.velocity = counted
    for size, expected in ((3, [3] * 8 + [2] * 4), (96, [8] * 4)):
        rows.clear()
        trainer = make_trainer(policy, tmp_path, quiet(), rollout_batch=size)
        scores.append(trainer.evaluate(HELD_OUT, 4, seed=1).scores["brightness"])
        assert rows == expected  # 8 images, 4 steps
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)  # up to one grey level of some pixels


def test_the_seed_decides_the_run(tmp_path):
    means = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        policy = GaussianPolicy(torch.zeros(4))
        make_trainer(policy, tmp_path / name, quiet(iterations=2, seed=seed)).run()
        means.append(policy.mean.detach())
    assert torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_brightness_rises_where_brightness_is_rewarded(tiny_policy, tmp_path):
    started = time.perf_counter()
    settings = quiet(iterations=25, group_size=8, learning_rate=1e-2, warmup=0)
    policy = tiny_policy()
    trust = Clip(1e-2, 1e-2)
    algorithm = compose.chunk_grpo(ChunkPlan((1, 2)), FLOW, trust=trust, micro_batch=64, updates=2)
    trainer = make_trainer(policy, tmp_path, settings, algorithm=algorithm)
    before = trainer.evaluate(HELD_OUT, 8, seed=1)
    assert trainer.run()
    with trainer.averaged():
        after = trainer.evaluate(HELD_OUT, 8, seed=1)
    rise = after.mean("brightness") - before.mean("brightness")
    spread = before.scores["brightness"].std()
    print(f"\nbrightness rose by {rise:.4f}, {rise / spread:.1f} spreads", end=" ")
    print(f"in {time.perf_counter() - started:.0f} s")
    assert rise > spread
    rewards = [record["reward_mean"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-5:]) > sum(rewards[:5])
