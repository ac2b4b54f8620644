# SPDX-License-Identifier: Apache-2.0
"""What the training loop does around an algorithm, read off a policy of two weights.

Each mechanism is seen by a value worked out here, so that a run without it fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import compose
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import FlowDiffusion, Transition
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards import FunctionReward, RewardError
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.types import LossPart, SamplingRequest, as_prompts

FLOW = Transition(FlowDiffusion(0.7))
PROMPTS = PromptSet(as_prompts(tuple(f"prompt {n}" for n in range(12))))
HELD_OUT = PromptSet(as_prompts(("a", "b", "c")))
BRIGHT = FunctionReward("bright", lambda images, prompts: images.mean((1, 2, 3)))


class Linear:
    """An algorithm whose loss is linear in the weights: its gradient is ``slope``, whatever."""

    def __init__(self, slope: float, updates: int = 1) -> None:
        self.slope, self.updates = slope, updates
        self.seeds: list[int] = []
        self.finished: list[int] = []

    def begin(self, iteration: int, generator: torch.Generator) -> SamplingRequest:
        self.seeds.append(generator.initial_seed())
        return SamplingRequest()

    def sampling(self, policy: Any) -> Any:
        return nullcontext()

    def losses(self, policy: Any, experience: Any, generator: Any) -> Iterator[LossPart]:
        for _ in range(self.updates):
            yield LossPart(self.slope * policy.parameters()[0].sum(), True, {})

    def finish(self, policy: Any, num_updates: int) -> Mapping[str, Any]:
        self.finished.append(num_updates)
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {}

    def load(self, tensors: Any, info: Any) -> None:
        pass


def made(folder, algorithm, policy=None, **options):
    settings = {
        "iterations": 3, "num_prompts": 2, "group_size": 3, "learning_rate": 0.25,
        "evaluate_every": 0, "checkpoint_every": 10, "weight_decay": 0.0,
    } | options  # fmt: skip
    policy = policy or GaussianPolicy(torch.zeros(2))
    sampler = Sampler(FLOW, make_sigmas(4), same_noise=True, batch_size=96)
    return compose.trainer(
        policy, algorithm, sampler, PROMPTS, [(BRIGHT, 1.0)], HELD_OUT, BRIGHT, folder, **settings
    )


def with_sgd(trainer):
    """Let steps be the gradient times the rate, so that they can be worked out."""
    trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=trainer.optimization.learning_rate)
    return trainer


def test_gradients_are_clipped(tmp_path) -> None:
    """A gradient (30, 30) of norm 42 moves as far as one of norm 0.5 in its direction."""
    trainer = with_sgd(made(tmp_path, Linear(30.0), max_grad_norm=0.5))
    record = trainer.train_once()
    assert float(record["grad_norm"]) == pytest.approx(30 * 2**0.5)  # before clipping
    step = 0.25 * 0.5 / 2**0.5
    torch.testing.assert_close(trainer.policy.mean.detach(), torch.full((2,), -step).double())


def test_small_gradients_are_not_clipped(tmp_path) -> None:
    trainer = with_sgd(made(tmp_path, Linear(0.125), max_grad_norm=0.5))
    trainer.train_once()
    torch.testing.assert_close(
        trainer.policy.mean.detach(), torch.full((2,), -0.125 * 0.25).double()
    )


def test_gradients_of_an_update_do_not_reach_the_next(tmp_path) -> None:
    """Two updates of gradient 0.125 each: 0.25, not 0.125 + 0.25."""
    trainer = with_sgd(made(tmp_path, Linear(0.125, updates=2), max_grad_norm=10.0))
    trainer.train_once()
    torch.testing.assert_close(
        trainer.policy.mean.detach(), torch.full((2,), -0.25 * 0.25).double()
    )


def test_the_rate_rises_and_falls_as_it_says(tmp_path) -> None:
    """A warm-up of 4 steps: a quarter, a half and three quarters of the rate."""
    trainer = with_sgd(made(tmp_path, Linear(0.125), max_grad_norm=10.0, warmup=4))
    rates = [trainer.optimization.rate(step, 1.0) for step in range(3)]
    assert rates == sorted(rates)
    assert rates[0] < 0.25
    assert trainer.run()
    torch.testing.assert_close(
        trainer.policy.mean.detach(), torch.full((2,), -0.125 * sum(rates)).double()
    )


def test_the_loss_is_summed_over_updates(tmp_path) -> None:
    policy = GaussianPolicy(torch.tensor([1.0, 3.0]))
    trainer = made(tmp_path, Linear(0.5, updates=2), policy, learning_rate=1e-12)
    assert float(trainer.train_once()["loss"]) == pytest.approx(2 * 0.5 * 4.0)


def test_methods_are_told_the_number_of_updates(tmp_path) -> None:
    algorithm = Linear(0.1, updates=2)
    assert made(tmp_path, algorithm).run()
    assert algorithm.finished == [2, 4, 6]


def test_each_iteration_has_random_numbers_and_prompts_of_its_own(tmp_path) -> None:
    algorithm = Linear(0.1)
    trainer = made(tmp_path, algorithm, seed=7)
    assert trainer.run()
    assert algorithm.seeds == [derive_seed(7, iteration, 0) for iteration in range(3)]
    drawn = [prompt.text for i in range(6) for prompt in trainer.prompts_of(i)]
    assert sorted(drawn) == sorted(PROMPTS.texts)  # each once before any comes again


def test_small_evaluations_are_of_the_averaged_weights(tmp_path, monkeypatch) -> None:
    """The policy moves far in one step; its average has hardly left the base."""
    options = {"evaluate_every": 1, "iterations": 1, "ema_decay": 0.99, "ema_warmup": 1e-9}
    trainer = made(tmp_path, Linear(-1.0), max_grad_norm=10.0, learning_rate=2.0, **options)
    monkeypatch.setattr("chunkgrpo.evaluate.image_health", lambda images, prompts: {})
    seen: list[torch.Tensor] = []
    velocity = trainer.policy.velocity

    def watched(x, sigma, conditioning):
        seen.append(trainer.parameters[0].detach().clone())
        return velocity(x, sigma, conditioning)

    trainer.policy.velocity = watched
    trainer.train_once()
    trainer.iteration, moved = 1, trainer.parameters[0].detach().clone()
    seen.clear()
    trainer.evaluate_if_due()
    assert seen
    for weights in seen:
        torch.testing.assert_close(weights, trainer.ema.values[0])
        assert (weights - moved).abs().min() > 1
    assert torch.equal(trainer.parameters[0].detach(), moved)


def test_the_average_follows_each_update(tmp_path) -> None:
    """Decay 0.5 without warm-up: after steps to -1 and -2 it is 0.5 (0.5 x 0 - 1) - 1."""
    options = {"ema_decay": 0.5, "ema_warmup": 1e-9, "iterations": 2}
    trainer = with_sgd(
        made(tmp_path, Linear(1.0), max_grad_norm=10.0, learning_rate=1.0, **options)
    )
    assert trainer.run()
    torch.testing.assert_close(trainer.parameters[0].detach(), torch.full((2,), -2.0).double())
    first = trainer.ema.values[0]
    expected = 0.5 * (0.5 * 0 + 0.5 * -1) + 0.5 * -2
    torch.testing.assert_close(first, torch.full_like(first, expected))


def test_an_old_policy_comes_back_with_its_own_weights(tmp_path) -> None:
    """Not with those of the policy that follows: they differ after the first updates."""

    def begun():
        policy = GaussianPolicy(torch.zeros(2))
        old = OldPolicy(policy.named_parameters(), "nft1")
        return made(tmp_path, compose.diffusion_nft(old), policy, learning_rate=0.1), old

    trainer, old = begun()
    assert trainer.run()
    assert (old.values[0] - trainer.parameters[0]).abs().max() > 1e-5
    again, other = begun()
    again.resume()
    assert torch.equal(other.values[0], old.values[0])


def test_the_judge_is_never_lenient(tmp_path) -> None:
    """``on_error: drop`` is for rewards that are trained on, not for the judge."""
    broken = FunctionReward("broken", lambda images, prompts: images.mean((1, 2, 3)) / 0 * 0)
    trainer = made(tmp_path, Linear(0.1), on_error="drop")
    evaluator = replace(trainer.evaluator, judge=broken)
    with pytest.raises(RewardError, match="broken"):
        evaluator.summary(trainer.policy, 0, "evaluation-")


def test_usefulness_of_chunks_is_measured_in_the_right_update() -> None:
    """By reward in the later updates, by gradient in the first."""
    from chunkgrpo.algorithms.observing import ChunkObserver
    from chunkgrpo.core.learned import Learned

    plan = ChunkPlan((1, 1))

    def parts(gains: list[list[float]]) -> list[LossPart]:
        return [
            LossPart(
                torch.zeros(()), True,
                {"chunk_log_ratio": torch.tensor(gain), "chunk": torch.tensor([0, 1]),
                 "chunk_advantage": torch.ones(2), "step": torch.tensor([0])},
            )
            for gain in gains
        ]  # fmt: skip

    observer = ChunkObserver(plan, Learned(usefulness="reward").make())
    for part in parts([[9.0, -9.0], [0.5, 0.25]]):
        observer.observed(part, [])
    alone = ChunkObserver(plan, Learned(usefulness="reward").make())
    for part in parts([[0.0, 0.0], [0.5, 0.25]]):
        alone.observed(part, [])
    torch.testing.assert_close(observer.usefulness(), alone.usefulness())
    assert observer.usefulness()[0] > observer.usefulness()[1] > 0

    weight = torch.zeros(1, requires_grad=True)
    observer = ChunkObserver(plan, Learned(usefulness="gradient").make())
    for slope in (1.0, 5.0):
        for chunk in (0, 1):
            part = LossPart(
                (slope * (chunk + 1) * weight).sum(), chunk == 1, {"step": torch.tensor([chunk])}
            )
            observer.observed(part, [weight]).backward()
    first = ChunkObserver(plan, Learned(usefulness="gradient").make())
    weight.grad = None
    for chunk in (0, 1):
        part = LossPart(((chunk + 1) * weight).sum(), chunk == 1, {"step": torch.tensor([chunk])})
        first.observed(part, [weight]).backward()
    torch.testing.assert_close(observer.usefulness(), first.usefulness())


def test_kept_samples_are_dealt_at_random() -> None:
    """Where a part is kept, updates get a random part of it, not the first prompts."""
    from types import SimpleNamespace

    from chunkgrpo.algorithms.pairs import deal

    chosen = torch.arange(0, 200, 2)
    experience: Any = SimpleNamespace(trajectory=SimpleNamespace(num_samples=200), chosen=chosen)
    first, second = deal(experience, 2, torch.Generator().manual_seed(0))
    assert sorted([*first.tolist(), *second.tolist()]) == chosen.tolist()
    # Of the lower half each update gets about half; in their order the first would get all 50.
    assert 15 < int((first < 100).sum()) < 35
    assert first.tolist() != sorted(first.tolist())
