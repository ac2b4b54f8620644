# SPDX-License-Identifier: Apache-2.0
"""Runs whose numbers go wrong: they stop before the step, or leave it out, and save nothing bad."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import compose
from chunkgrpo.core import ChunkPlan, FlowDiffusion, Transition, make_sigmas
from chunkgrpo.core.finite import NonFiniteError
from chunkgrpo.core.kl import TransitionKl
from chunkgrpo.core.learned import LearnedSelection
from chunkgrpo.core.selection import UniformSelection
from chunkgrpo.core.trust import NoTrustRegion
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import list_checkpoints, load_checkpoint
from chunkgrpo.runtime.finite import SkipNonFinite
from chunkgrpo.types import as_prompts

NAN, INF = float("nan"), float("inf")
FLOW = Transition(FlowDiffusion(0.7))
PROMPTS = PromptSet(as_prompts(("a star", "two circles", "a red cross")))
BRIGHTNESS = FunctionReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
SETTINGS = {
    "iterations": 6, "num_prompts": 2, "group_size": 3, "learning_rate": 1e-2, "evaluate_every": 0,
    "checkpoint_every": 2,
}  # fmt: skip
GOOD = range(3)  # iterations, from 0, before anything goes wrong


class Trouble(GaussianPolicy):
    """A policy that goes wrong in one way while ``trouble`` is set."""

    trouble, factor, sampling = "", NAN, False

    def velocity(self, x, sigma, conditioning):
        v = super().velocity(x, sigma, conditioning)
        if self.trouble == "rollout" and self.sampling:
            wrong = v.clone()
            wrong[2:3] = NAN
            return torch.where((sigma < 0.95).view(-1, 1), wrong, v)
        if self.trouble == "loss" and torch.is_grad_enabled():
            return v * INF
        if self.trouble == "gradient" and torch.is_grad_enabled():
            return Broken.apply(v, self.factor)
        return v

    def decode(self, x):
        images = super().decode(x)
        if self.trouble == "reward":
            images[4, 1, 0, 2] = self.factor
        return images


class Broken(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx, v, factor):
        ctx.factor = factor
        return v.clone()

    @staticmethod
    def backward(ctx, *grad):
        return grad[0] * ctx.factor, None


def make_trainer(folder, trouble="", on_nonfinite=None, at=(3,), factor=NAN, **options):
    policy = Trouble(torch.zeros(4), dtype=torch.float32)
    policy.factor = factor
    names = ("selection", "kl", "ratio", "trust")
    loss = {name: options.pop(name) for name in names if name in options}
    algorithm = compose.chunk_grpo(ChunkPlan((1, 2)), FLOW, updates=2, micro_batch=4, **loss)
    sampler = Sampler(FLOW, make_sigmas(4), same_noise=options.pop("same_noise", True))
    trainer = compose.trainer(
        policy, algorithm, sampler, PROMPTS, options.pop("rewards", [(BRIGHTNESS, 1.0)]), PROMPTS,
        BRIGHTNESS, folder, on_nonfinite=on_nonfinite, **SETTINGS | options,
    )  # fmt: skip
    begin = trainer.algorithm.begin

    def beginning(iteration, generator):
        policy.trouble = trouble if iteration in at else ""
        if trouble in ("weights", "average"):
            values = trainer.parameters if trouble == "weights" else trainer.ema.values
            step = trainer.optimizer.step if trouble == "weights" else trainer.ema.update
            owner = trainer.optimizer if trouble == "weights" else trainer.ema
            name = "step" if trouble == "weights" else "update"

            def broken(*arguments):
                step(*arguments)
                with torch.no_grad():
                    values[0][1] = INF

            if iteration in at:
                setattr(owner, name, broken)
        return begin(iteration, generator)

    @contextmanager
    def sampling(sampled):
        policy.sampling = True
        yield
        policy.sampling = False

    trainer.algorithm.begin, trainer.algorithm.sampling = beginning, sampling
    return trainer


def finite_on_disk(folder):
    """Assert that every number of every checkpoint is finite; return the checkpoints' names."""
    found = list_checkpoints(folder / "checkpoints")
    for path in found:
        tensors, _ = load_checkpoint(path)
        assert all(value.isfinite().all() for value in tensors.values())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))
    return [path.name for path in found]


STOPS = {
    "rollout": "iteration 4, rollout: the latent of step 1, sample 2 is not finite",
    "reward": "iteration 4, reward: image 4, of prompt '",
    "loss": "iteration 4, loss: log_ratio of step ",
    "gradient": "iteration 4, gradient: the gradient of mean is not finite",
    "weights": "iteration 4, weights: mean is not finite; lower optimizer.learning_rate",
    "average": "iteration 4, average: mean is not finite; lower optimizer.learning_rate",
}


@pytest.mark.parametrize("trouble", STOPS)
def test_what_is_not_finite_stops_the_run_before_the_step(tmp_path, trouble):
    trainer = make_trainer(tmp_path, trouble, same_noise=trouble != "rollout")
    before = {}
    trainer.on_iteration = lambda record: before.update(
        weights=[p.detach().clone() for p in trainer.parameters]
    )
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    said = str(caught.value)
    assert said.startswith(STOPS[trouble]) and "\n" not in said
    assert "lower optimizer.learning_rate" in said
    assert f"the last checkpoint is {tmp_path / 'checkpoints' / '000002'}" in said
    assert finite_on_disk(tmp_path) == ["000002"]
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    if trouble not in ("weights", "average"):
        assert all(map(torch.equal, before["weights"], trainer.parameters))
    # Without the trouble the run goes on from there, and ends like one that never had it.
    resumed, whole = (
        make_trainer(folder, same_noise=trouble != "rollout")
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert resumed.run() and whole.run()
    assert all(map(torch.equal, resumed.parameters, whole.parameters))


@pytest.mark.parametrize("factor", [1e30, -1e30])
def test_a_gradient_whose_norm_overflows_is_not_finite(tmp_path, factor):
    """Each number is finite; scaled down by an infinite norm, all of them would be 0 in silence."""
    trainer = make_trainer(tmp_path, "gradient", factor=factor)
    with pytest.raises(NonFiniteError, match="the norm of the gradient, largest in mean, is not"):
        trainer.run()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_image_is_saved_and_no_reward_sees_it(tmp_path, value):
    seen = []

    def brightness(images, prompts):
        seen.append(images.clone())
        return images.mean((1, 2, 3))

    rewards = [(FunctionReward("brightness", brightness), 1.0)]
    trainer = make_trainer(tmp_path, "reward", factor=value, rewards=rewards)
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    picture = tmp_path / "unscored" / "000004-image-4.png"
    assert f"(saved as {picture}, such pixels in magenta)" in str(caught.value)
    pixels = Image.open(picture)
    assert pixels.getpixel((2, 0)) == (255, 0, 255)
    assert pixels.getpixel((1, 0)) != (255, 0, 255)
    assert len(seen) == 3 and all(images.isfinite().all() for images in seen)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("trouble", ["rollout", "reward"])
def test_samples_that_are_not_finite_are_dropped_where_that_is_asked_for(
    tmp_path, trouble, overlap
):
    """The others are trained on, with a KL too, which has a gradient whatever the advantage."""
    trainer = make_trainer(
        tmp_path, trouble, on_error="drop", kl=TransitionKl(0.1), same_noise=False, overlap=overlap,
        selection=UniformSelection(1.0),
    )  # fmt: skip
    assert trainer.run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["dropped_samples"] for r in records] == [0, 0, 0, 1, 0, 0]
    assert all(r["skipped_updates"] == 0 and "nonfinite" not in r for r in records)
    # Each of six samples has three steps; one without a finite latent is not trained on at all.
    pairs = [r["trained_pairs"] + r["idle_pairs"] for r in records]
    assert pairs == [18, 18, 18, 15 if trouble == "rollout" else 18, 18, 18]
    assert finite_on_disk(tmp_path) == ["000004", "000006"]


@pytest.mark.parametrize("trouble", ["rollout", "reward", "loss", "gradient"])
def test_an_update_can_be_left_out(tmp_path, trouble):
    rule = SkipNonFinite(max_skipped=2)
    trainer = make_trainer(tmp_path, trouble, rule, same_noise=trouble != "rollout")
    assert trainer.run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["skipped_updates"] for r in records] == [0, 0, 0, 2, 0, 0]
    assert all("nonfinite" not in r for r in records)
    assert trainer.num_updates == 10
    # What was left out has changed nothing: the run is that of the other iterations.
    other = make_trainer(tmp_path / "other", same_noise=trouble != "rollout")
    other.iteration = 0
    once = other.train_once

    def all_but_one():
        if other.iteration == 3:
            return {}
        return once()

    other.train_once = all_but_one
    assert other.run()
    assert all(map(torch.equal, trainer.parameters, other.parameters))
    assert all(map(torch.equal, trainer.ema.values, other.ema.values))
    assert finite_on_disk(tmp_path) == ["000004", "000006"]


def test_too_many_in_a_row_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, "loss", SkipNonFinite(max_skipped=3), at=(1, 2))
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    said = str(caught.value)
    # Two updates of iteration 2, one of iteration 3; the fourth is one too many.
    assert said.startswith("iteration 3, loss: ")
    assert "3 updates in a row were left out before" in said
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["skipped_updates"] == 2


def test_the_count_survives_an_interruption(tmp_path):
    trainer = make_trainer(tmp_path, "loss", SkipNonFinite(max_skipped=3), at=(1, 2))
    trainer.on_iteration = lambda record: setattr(trainer, "stopped", record["iteration"] == 2)
    assert not trainer.run()
    again = make_trainer(tmp_path, "loss", SkipNonFinite(max_skipped=3), at=(1, 2))
    with pytest.raises(NonFiniteError, match="3 updates in a row were left out before"):
        again.run()


def test_a_good_update_ends_the_row(tmp_path):
    trainer = make_trainer(tmp_path, "loss", SkipNonFinite(max_skipped=2), at=(1, 3, 5))
    assert trainer.run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["skipped_updates"] for r in records] == [0, 2, 0, 2, 0, 2]
    left_out, taken = records[1], records[2]
    assert left_out["loss"] is None and left_out["grad_norm"] is None
    assert math.isfinite(taken["loss"]) and math.isfinite(taken["grad_norm"])


@pytest.mark.parametrize("trouble", ["weights", "average"])
def test_weights_cannot_be_left_out(tmp_path, trouble):
    trainer = make_trainer(tmp_path, trouble, SkipNonFinite(max_skipped=5))
    with pytest.raises(NonFiniteError, match=STOPS[trouble]):
        trainer.run()
    assert finite_on_disk(tmp_path) == ["000002"]


def test_a_learned_selection_learns_nothing_from_what_was_left_out(tmp_path):
    for kind in ("gradient", "reward"):
        selection = LearnedSelection(usefulness=kind)
        trainer = make_trainer(
            tmp_path / kind, "loss", SkipNonFinite(max_skipped=2), selection=selection
        )
        assert trainer.run()
        for numbers in selection.state().values():
            assert all(math.isfinite(number) for number in numbers)


@pytest.mark.parametrize("log_ratio", [30.0, 129.0])
def test_a_ratio_that_overflows_is_named(tmp_path, log_ratio):
    """exp(88.8) is no float32: 'full' ratios reach that by themselves in large latents."""
    trainer = make_trainer(tmp_path, ratio="full", trust=NoTrustRegion(), learning_rate=1e-6)
    collect = trainer.collector.collect

    def less_likely(*arguments):
        trajectory, scores = collect(*arguments)
        # Per dimension, of which there are 4; the first update takes the old density as the new.
        return replace(trajectory, old_log_prob=trajectory.old_log_prob - log_ratio / 4), scores

    trainer.__dict__["collector"] = SimpleNamespace(collect=less_likely)
    if log_ratio < 88:  # and small enough for the norm of the gradient
        trainer.train_once()
        assert trainer.num_updates == 2
        return
    with pytest.raises(NonFiniteError, match=r"loss: chunk_ratio of chunk \d is not finite"):
        trainer.train_once()
    assert trainer.num_updates == 1


def test_an_evaluation_refuses_images_that_are_not_finite(tmp_path):
    trainer = make_trainer(tmp_path, "", evaluate_every=2, checkpoint_every=1)
    decode = trainer.policy.decode

    def broken(x):
        images = decode(x)
        if trainer.iteration == 2 and len(x) == len(PROMPTS):
            images[1, 0] = NAN
        return images

    trainer.policy.decode = broken
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    said = str(caught.value)
    assert said.startswith("iteration 2, evaluation: image 1, of prompt 'two circles' (saved as ")
    assert (tmp_path / "unscored" / "000002-evaluation-0-image-1.png").is_file()
    assert finite_on_disk(tmp_path) == ["000001"]


def test_a_checkpoint_with_the_weights_that_failed_is_no_advice(tmp_path):
    """Resuming from it would end in the same way."""
    trainer = make_trainer(tmp_path, "reward", checkpoint_every=1)
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    folder = tmp_path / "checkpoints"
    assert f"{folder / '000003'}, has the weights that gave this" in str(caught.value)
    assert f"the one before is {folder / '000002'}" in str(caught.value)


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.iteration = 1
    with torch.no_grad():
        trainer.parameters[0][0] = NAN
    with pytest.raises(NonFiniteError, match=r"checkpoint: parameter\.mean is not finite"):
        trainer.save()
    with pytest.raises(NonFiniteError, match="weights: mean is not finite"):
        trainer.policy.save(tmp_path / "model")
    assert not (tmp_path / "model").exists() or not any((tmp_path / "model").iterdir())
    assert not (tmp_path / "run" / "checkpoints").exists()
