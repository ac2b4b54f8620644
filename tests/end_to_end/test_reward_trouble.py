# SPDX-License-Identifier: Apache-2.0
"""Rewards in a run: that misbehave, that are several, that are watched, that take their time."""

import json
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import compose
from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.core import ChunkPlan, FlowDiffusion, Transition, make_sigmas
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.report.statistics import wilson_interval
from chunkgrpo.rewards import FunctionReward, RewardError
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import list_checkpoints, optimizer_tensors
from chunkgrpo.train.evaluating import Evaluator
from chunkgrpo.types import as_prompts

FLOW = Transition(FlowDiffusion(0.7))
PROMPTS = PromptSet(as_prompts(("a star", "two circles", "a red cross")))
SETTINGS = {
    "iterations": 4, "num_prompts": 2, "group_size": 3, "learning_rate": 1e-2, "evaluate_every": 0,
    "checkpoint_every": 2,
}  # fmt: skip
TINY_RUN = [
    "iterations=2", "sampling.prompts=2", "sampling.group_size=4", "sampling.steps=5",
    "sampling.tail.kind=euler", "objective.window.kind=all", "objective.plan.sizes=[1,3]",
    "objective.selection.indices=[0]", "evaluation.every=0",
    "model.precision=fp32", "model.max_sequence_length=4",
]  # fmt: skip
TIMES = ("seconds", "phase_seconds", "images_per_second")


def brightness(images, prompts):
    return images.mean((1, 2, 3))


BRIGHTNESS = FunctionReward("brightness", brightness)


def make_trainer(
    folder,
    rewards: Any = BRIGHTNESS,
    judge=BRIGHTNESS,
    rollout_batch=96,
    same_noise=True,
    **options,
):
    rewards = rewards if isinstance(rewards, list) else [(rewards, 1.0)]
    algorithm = compose.chunk_grpo(ChunkPlan((1, 2)), FLOW, updates=2, micro_batch=4)
    sampler = Sampler(FLOW, make_sigmas(4), same_noise=same_noise, batch_size=rollout_batch)
    return compose.trainer(
        GaussianPolicy(torch.zeros(4)), algorithm, sampler, PROMPTS, rewards, PROMPTS, judge,
        folder, **SETTINGS | options,
    )  # fmt: skip


def finish(trainer):
    """Run to the end; return the state and the records without times."""
    assert trainer.run()
    named = zip(trainer.names, trainer.parameters, strict=True)
    state = {f"parameter {name}": p.detach().clone() for name, p in named}
    records = read_metrics(trainer.folder / "metrics.jsonl")
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    return state | optimizer_tensors(trainer.optimizer, trainer.names), records


def assert_same(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    assert [key for key in a[0] if not torch.equal(a[0][key], b[0][key])] == []


def spoilt(answer, call=3):
    """Brightness, but the given call (from 0) returns ``answer(scores)``."""
    calls = []

    def reward(images, prompts):
        calls.append((images.clone(), list(prompts)))
        scores = brightness(images, prompts)
        return answer(scores.clone()) if len(calls) == call + 1 else scores

    return FunctionReward("spoilt", reward), calls


def with_nan(scores):
    scores[4] = float("nan")
    return scores


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "index", "says"),
    [
        (with_nan, 4, "returned nan; scores must be finite"),
        (lambda scores: [*scores[:5].tolist(), None], 5, "returned nan"),
        (lambda scores: scores[:5], 0, r"returned shape \(5,\) for 6 images"),
        (lambda scores: scores[:, None], 0, r"returned shape \(6, 1\)"),
        (lambda scores: ["good"] * 6, 0, "no list of numbers"),
        (lambda scores: None, 0, "returned None"),
    ],
)
def test_a_useless_score_stops_the_run_and_loses_nothing(tmp_path, answer, index, says):
    reward, calls = spoilt(answer)
    trainer = make_trainer(tmp_path / "run", reward)
    with pytest.raises(RewardError, match=says) as caught:
        trainer.run()
    images, prompts = calls[3]
    picture = tmp_path / "run" / "unscored" / f"000004-spoilt-{index}.png"
    for part in ("'spoilt'", repr(prompts[index]), str(picture)):
        assert part in str(caught.value)
    with Image.open(picture) as saved:
        expected = (images[index] * 255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(saved), expected)
    # A checkpoint was due after the second iteration; the third is saved all the same.
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "000003"
    mended = FunctionReward("spoilt", brightness)
    resumed = finish(make_trainer(tmp_path / "run", mended))
    assert_same(resumed, finish(make_trainer(tmp_path / "whole", mended)))


@pytest.mark.parametrize("on_error", ["stop", "drop"])
def test_a_reward_that_breaks_is_named_and_loses_nothing(tmp_path, on_error):
    def broken(scores):
        return scores / {}["missing"]

    trainer = make_trainer(tmp_path / "run", spoilt(broken)[0], on_error=on_error)
    with pytest.raises(RewardError) as caught:
        trainer.run()
    said = str(caught.value)
    assert said.startswith("reward 'spoilt' failed: KeyError in test_reward_trouble.py, line ")
    assert f"'missing'; all 3 finished iterations are saved, go on with --resume {tmp_path}" in said
    mended = FunctionReward("spoilt", brightness)
    resumed = finish(make_trainer(tmp_path / "run", mended, on_error=on_error))
    assert_same(resumed, finish(make_trainer(tmp_path / "whole", mended, on_error=on_error)))


@pytest.mark.parametrize("share", [False, True])
def test_a_judge_may_have_any_unit(tmp_path, share, monkeypatch):
    values = np.array([1.0, 0.0, 1.0]) if share else np.array([-30.0, -20.0, -10.0])
    judge = FunctionReward("judge", brightness)
    judge.share = share
    trainer = make_trainer(tmp_path / "run", judge=judge, evaluate_every=1)
    trainer.iteration = 1
    found = SimpleNamespace(scores={"judge": values})
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_, **__: found)
    seen = [trainer.evaluate_if_due()[f"accuracy{end}"] for end in ("", "_low", "_high")]
    if share:
        low, high = wilson_interval(2, 3)  # shorter than one that knows how few prompts there are
        assert seen[0] == pytest.approx(2 / 3)
        assert 0 < seen[1] < low < high < seen[2] < 1
    else:
        half = 4.302653 * 10 / 3**0.5  # Student's quantile with two degrees of freedom
        assert seen == pytest.approx([-20, -20 - half, -20 + half])


def test_a_failed_evaluation_loses_nothing(tmp_path):
    trainer = make_trainer(tmp_path / "run")

    def look():
        if trainer.iteration == 3:
            raise RewardError("judge", "is on holiday")
        return {}

    trainer.evaluate_if_due = look
    with pytest.raises(RewardError, match="reward 'judge' is on holiday"):
        trainer.run()
    resumed = finish(make_trainer(tmp_path / "run"))
    assert_same(resumed, finish(make_trainer(tmp_path / "whole")))


@pytest.mark.parametrize("on_error", ["stop", "drop"])
def test_an_evaluation_without_a_score_shows_the_image(tmp_path, on_error):
    def judging(images, prompts):
        judged.append(images.clone())
        scores = brightness(images, prompts)
        images.zero_()  # what is saved is the image, not what the judge made of it
        scores[1] = float("nan")
        return scores

    judged = []
    judge = FunctionReward("judge", judging)
    trainer = make_trainer(tmp_path / "run", judge=judge, evaluate_every=2, on_error=on_error)
    with pytest.raises(RewardError) as caught:
        trainer.run()
    picture = tmp_path / "run" / "unscored" / "000002-evaluation-judge-1.png"
    assert (
        "reward 'judge' returned nan; scores must be finite; prompt 'two circles' (image "
        in str(caught.value)
    )
    assert f"(image saved as {picture}); all 2 finished" in str(caught.value)
    with Image.open(picture) as saved:
        expected = (judged[0][1] * 255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(saved), expected) and expected.std() > 0
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "000002"


def signed(images, prompts):
    """Below zero for the third image of its third call."""
    signed.calls += 1
    scores = brightness(images, prompts)
    if signed.calls == 3:
        scores[2] = -0.25
    return scores


def test_a_negative_score_in_a_product_stops_the_run_and_loses_nothing(tmp_path):
    signed.calls = 0
    rewards = [(BRIGHTNESS, 1.0), (FunctionReward("signed", signed), 0.5)]
    with pytest.raises(RewardError) as caught:
        make_trainer(tmp_path, rewards, combine="product").run()
    said = str(caught.value)
    assert said.startswith(
        "reward 'signed' returned -0.25; in a product scores may not be negative"
    )
    assert f"(image saved as {tmp_path}/unscored/000003-signed-2.png); all 2 finished" in said
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "000002"
    resumed = finish(make_trainer(tmp_path, rewards, combine="product"))
    signed.calls = 10
    whole = finish(make_trainer(tmp_path / "whole", rewards, combine="product"))
    assert_same(resumed, whole)


def test_a_negative_score_in_a_product_is_dropped_and_counted(tmp_path):
    signed.calls = 0
    rewards = [(BRIGHTNESS, 1.0), (FunctionReward("signed", signed), 0.5)]
    _, records = finish(make_trainer(tmp_path, rewards, combine="product", on_error="drop"))
    assert [r["dropped"]["signed"] for r in records] == [0, 0, 1, 0]
    assert [r["dropped_samples"] for r in records] == [0, 0, 1, 0]


@pytest.mark.parametrize("combine", ["product", "minimum"])
def test_weights_that_a_combination_can_not_take_are_refused_before_loading(combine):
    settings = [f"scoring.combine={combine}", "model.path=/nowhere"]
    settings += ["rewards=[{name: brightness}, {name: jpeg_compressibility, weight: -1}]"]
    with pytest.raises(
        ValueError,
        match=rf"combine '{combine}' needs positive weights of rewards, and they are \[1.0, -1.0\]",
    ):
        build_trainer(load_config("demo", settings), Path("nowhere"))


# --- dropping -----------------------------------------------------------------------------------


def test_dropped_samples_are_counted_and_told_once(tmp_path, caplog):
    def picky(images, prompts):
        scores = brightness(images, prompts)
        return with_nan(scores) if picky.broken else scores

    picky.broken = True
    reward = FunctionReward("picky", picky)
    with caplog.at_level(logging.WARNING, "chunkgrpo"):
        dropping = finish(make_trainer(tmp_path / "drop", reward, on_error="drop"))
    assert [r["dropped"] for r in dropping[1]] == [{"picky": 1}] * 4
    assert [r["dropped_samples"] for r in dropping[1]] == [1] * 4
    assert caplog.text.count("'picky' returned nan") == 1
    assert len(list((tmp_path / "drop" / "unscored").iterdir())) == 1
    # A dropped sample is not one with the score 0.
    zero = FunctionReward("picky", lambda i, p: picky(i, p).nan_to_num(0.0))
    zeroed = finish(make_trainer(tmp_path / "zero", zero))
    assert zeroed[1][0]["reward_mean"] < dropping[1][0]["reward_mean"]
    assert not torch.equal(zeroed[0]["parameter mean"], dropping[0]["parameter mean"])
    # With nothing to drop, dropping changes nothing.
    picky.broken = False
    plain = finish(make_trainer(tmp_path / "plain", reward))
    calm = finish(make_trainer(tmp_path / "calm", reward, on_error="drop"))
    assert all(torch.equal(plain[0][key], calm[0][key]) for key in plain[0])
    assert calm[1][0]["dropped"] == {"picky": 0} and calm[1][0]["dropped_samples"] == 0


def test_an_iteration_without_any_score_stops_even_so(tmp_path):
    reward, _ = spoilt(lambda scores: scores[:1])
    with pytest.raises(RewardError, match="there is nothing to learn"):
        make_trainer(tmp_path, reward, on_error="drop").run()
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "000003"


def by_boundary(*lost):
    """Brightness without a score for the images ``lost[i]`` at the i-th boundary of an iteration.

    The first call of an iteration is for the finished images, which are the last boundary.
    """
    calls = []

    def reward(images, prompts):
        scores = brightness(images, prompts)
        boundary = (len(calls) - 1) % len(lost)
        calls.append(boundary)
        scores[list(lost[boundary])] = float("nan")
        return scores

    return FunctionReward("patchy", reward)


def test_what_is_dropped_at_any_chunk_boundary_is_counted(tmp_path):
    # Two chunks: image 1 has no score where the first begins, images 1 and 4 where the second does.
    reward = by_boundary([1], [1, 4], [])
    trainer = make_trainer(tmp_path, reward, assign="gain", on_error="drop", iterations=2)
    seen = []
    losses = trainer.algorithm.losses

    def spied(policy, experience, generator):
        seen.append(experience.advantages)
        return losses(policy, experience, generator)

    object.__setattr__(trainer.algorithm, "losses", spied)
    _, records = finish(trainer)
    for record, advantages in zip(records, seen, strict=True):
        assert record["dropped"] == {"patchy": 2} and record["dropped_samples"] == 2
        assert (advantages == 0).all(dim=1).tolist() == [False, True, False, False, True, False]


def test_boundaries_that_together_drop_everything_stop_the_run(tmp_path):
    reward = by_boundary([0, 1, 2], [3, 4], [5])
    trainer = make_trainer(tmp_path, reward, assign="gain", on_error="drop")
    with pytest.raises(RewardError, match="'patchy' and the others left no image with a usable sc"):
        trainer.run()
    # One image less is lost, and there is something to learn from.
    reward = by_boundary([0, 1, 2], [3], [5])
    _, records = finish(make_trainer(tmp_path, reward, assign="gain", on_error="drop"))
    assert [record["dropped_samples"] for record in records] == [5] * 4


def test_what_a_watched_reward_can_not_score_is_trained_on(tmp_path):
    watched = FunctionReward("watched", lambda i, p: with_nan(brightness(i, p)))
    found = finish(make_trainer(tmp_path / "a", watched=[watched], on_error="drop"))
    plain = finish(make_trainer(tmp_path / "b"))
    assert all(torch.equal(plain[0][key], found[0][key]) for key in plain[0])
    assert found[1][0]["dropped"] == {"brightness": 0, "watched": 1}
    assert found[1][0]["dropped_samples"] == 0
    with pytest.raises(RewardError, match="'watched' returned nan"):
        make_trainer(tmp_path / "c", watched=[watched]).run()


# --- several rewards ----------------------------------------------------------------------------


def test_watched_rewards_are_logged_and_change_nothing(tmp_path):
    dark = FunctionReward("dark", lambda i, p: 2 - brightness(i, p))
    flat = FunctionReward("flat", lambda i, p: torch.full((len(i),), 0.3))
    state, records = finish(make_trainer(tmp_path / "a", watched=[dark, flat]))
    plain = finish(make_trainer(tmp_path / "b"))
    assert all(torch.equal(plain[0][key], state[key]) for key in state)
    for record in records:
        mean = record["rewards"]["brightness"]
        assert record["watched"] == pytest.approx({"dark": 2 - mean, "flat": 0.3})
        correlation = record["watched_correlation"]
        assert correlation["dark"]["brightness"] == pytest.approx(-1, abs=1e-4)
        assert correlation["flat"] == {"brightness": None}
        assert record["reward_mean"] == mean


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_held_reward_does_not_move(tmp_path, keep):
    """Trained on brightness with brightness held, nothing is left to learn but rounding."""
    dark = FunctionReward("dark", lambda i, p: 2 - brightness(i, p))

    def start(held):
        # An eps far above rounding, or Adam would make a step of it.
        options = {"convention": "mean_only", "weight_decay": 0.0, "eps": 1e-3, "keep": keep}
        options["project_out"] = tuple(held)
        return finish(make_trainer(tmp_path / f"{held}", watched=[dark], **options))[0]

    free, still = start([]), start(["dark"])
    moved = free["parameter mean"].abs().min()
    assert moved > 1e-3
    assert still["parameter mean"].abs().max() < 1e-4 * moved


def test_drowned_and_flat_rewards_are_reported_once(tmp_path, caplog):
    left = FunctionReward("left", lambda i, p: i[:, 0, 0, 0])
    small = FunctionReward("small", lambda i, p: 0.01 * i[:, 0, 0, 3])
    flat = FunctionReward("flat", lambda i, p: torch.full((len(i),), 0.3))
    rewards = [(left, 1.0), (small, 1.0), (flat, 1.0)]
    with caplog.at_level(logging.WARNING, "chunkgrpo"):
        _, records = finish(make_trainer(tmp_path / "sum", rewards))
    assert caplog.text.count("'small' brings") == 1 and caplog.text.count("'flat' gives all") == 1
    assert "drowned by 'left'" in caplog.text and "scoring.combine=advantage" in caplog.text
    for record in records:
        assert record["reward_share"]["left"] > 0.99
        assert record["reward_share"]["flat"] == 0
        assert record["reward_zero_spread"] == {"left": 0, "small": 0, "flat": 2}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "chunkgrpo"):
        _, records = finish(make_trainer(tmp_path / "advantage", rewards, combine="advantage"))
    assert "drowned" not in caplog.text
    for record in records:
        shares = record["reward_share"]
        assert shares["left"] == pytest.approx(shares["small"], rel=1e-3)


def test_a_reward_that_works_in_place_spoils_nothing(tmp_path):
    def vandal(images, prompts):
        scores = images[:, 0].mean((1, 2))
        images.fill_(7)
        return scores

    def polite(images, prompts):
        return images[:, 0].mean((1, 2))

    first, second = (
        finish(
            make_trainer(tmp_path / str(i), [(FunctionReward("red", f), 1.0), (BRIGHTNESS, 1.0)])
        )
        for i, f in enumerate((vandal, polite))
    )
    assert_same(first, second)


def test_two_rewards_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two rewards are named 'brightness'"):
        make_trainer(tmp_path, watched=[BRIGHTNESS]).run()


def test_groupwise_rewards_see_whole_groups_whatever_the_batch(tmp_path):
    seen = []

    def wins(images, prompts, group_size):
        seen.append((len(images), list(prompts), group_size))
        light = brightness(images, prompts).view(-1, group_size)
        return (light[:, :, None] > light[:, None, :]).float().mean(2).flatten()

    wins.groupwise = True
    reward = FunctionReward("wins", wins)
    together = finish(make_trainer(tmp_path / "a", reward))
    assert [(n, g) for n, _, g in seen] == [(6, 3)] * 4
    seen.clear()
    apart = finish(make_trainer(tmp_path / "b", reward, rollout_batch=4))
    assert [(n, g) for n, _, g in seen] == [(3, 3), (3, 3)] * 4
    assert all(len(set(prompts)) == 1 for _, prompts, _ in seen)
    assert together[1][0]["reward_mean"] == pytest.approx(1 / 3)
    assert apart[1][0]["reward_mean"] == pytest.approx(1 / 3)


# --- rewards that need to know more than the prompt ---------------------------------------------


GENEVAL_LINES = [
    {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a star"},
    {"tag": "counting", "include": [{"class": "circle", "count": 2}],
     "exclude": [{"class": "circle", "count": 3}], "prompt": "two circles"},
    {"tag": "colors", "include": [{"class": "cross", "count": 1, "color": "red"}],
     "prompt": "a red cross"},
]  # fmt: skip


def test_geneval_takes_its_demands_from_the_prompt_file(tmp_path, tiny_pipeline_path, monkeypatch):
    """As ``chunkgrpo train --prompts FILE --reward geneval``, with stand-ins for the models."""
    from chunkgrpo.cli.training import Overrides
    from chunkgrpo.rewards.geneval import Detection, reward

    class Finder:
        classes = frozenset({"star", "circle", "cross"})

        def __init__(self, model, floor, precision, device):
            assert model == "PekingU/rtdetr_r101vd_coco_o365" and floor == 0.3

        def __call__(self, images, labels):
            """Find as many of what is asked for as the image is bright, at most three."""
            asked.extend(labels)
            numbers = (images.mean((1, 2, 3)) * 6 - 2).round().clamp(0, 3).int().tolist()
            box = (2.0, 2.0, 30.0, 30.0)
            return [
                [Detection(label, 0.95, box) for label in each for _ in range(number)]
                for each, number in zip(labels, numbers, strict=True)
            ]

    class Namer:
        def __init__(self, model, precision, device):
            pass

        def __call__(self, image, detections):
            return ["red"] * len(detections)

    asked = []
    monkeypatch.setattr(reward, "TransformersDetector", Finder)
    monkeypatch.setattr(reward, "ClipColorNamer", Namer)
    path = tmp_path / "geneval.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in GENEVAL_LINES))
    given = Overrides(str(tiny_pipeline_path), str(path), ["geneval"], False, TINY_RUN)
    settings = given.assignments()
    trainer = build_trainer(load_config("demo", settings), tmp_path / "run")
    trainer.policy.decode = spread_out(trainer.policy.decode)
    judge = trainer.evaluator.judge
    assert judge is trainer.scorer.rewards[0][0] and judge.name == "geneval"
    _, records = finish(trainer)
    scores = [record["rewards"]["geneval"] for record in records]
    assert len(scores) == 2 and all(0 < score < 1 for score in scores)
    assert {tuple(each) for each in asked} == {("star",), ("circle",), ("cross",)}

    for line, says in [
        ({"prompt": "a star"}, "'a star' demands: its record has no tag and no include"),
        (
            {**GENEVAL_LINES[0], "include": [{"class": "pear", "count": 1}]},
            "ask for 'pear', which the detector cannot find: it knows 3 classes, such as circle",
        ),
    ]:
        path.write_text("\n".join(json.dumps(each) for each in [*GENEVAL_LINES[1:], line]))
        with pytest.raises(ValueError, match=f"reward 'geneval': .*{says}"):
            build_trainer(load_config("demo", settings), tmp_path / "refused")


def spread_out(decode):
    """Add to each image's brightness, by its place in the batch: random weights draw all alike."""

    def decoded(latents):
        images = decode(latents)
        return images * 0.2 + torch.linspace(0.2, 0.8, len(images))[:, None, None, None]

    return decoded


# --- scoring while sampling ---------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["trajectory", "gain"])
@pytest.mark.parametrize("same_noise", [True, False])
def test_overlapped_scoring_changes_no_bit(tmp_path, credit, same_noise):
    names = []

    def slow(images, prompts):
        names.append(threading.current_thread().name)
        time.sleep(0.002)
        return brightness(images, prompts)

    rewards = [(FunctionReward("slow", slow), 1.0), (BRIGHTNESS, 0.5)]
    options = {
        "assign": credit, "same_noise": same_noise, "group_size": 4, "rollout_batch": 3,
        "combine": "advantage", "iterations": 2,
    }  # fmt: skip
    plain = finish(make_trainer(tmp_path / "plain", rewards, **options))
    assert set(names) == {"MainThread"}
    number = len(names)
    names.clear()
    overlapped = finish(make_trainer(tmp_path / "overlap", rewards, overlap=True, **options))
    assert len(names) == number and all(name.startswith("reward slow") for name in names)
    assert_same(overlapped, plain)


def test_an_error_in_a_thread_stops_the_run_like_any_other(tmp_path):
    reward, _ = spoilt(with_nan)
    with pytest.raises(RewardError, match="'spoilt' returned nan"):
        make_trainer(tmp_path / "run", reward, overlap=True).run()
    mended = FunctionReward("spoilt", brightness)
    resumed = finish(make_trainer(tmp_path / "run", mended, overlap=True))
    assert_same(resumed, finish(make_trainer(tmp_path / "whole", mended)))
