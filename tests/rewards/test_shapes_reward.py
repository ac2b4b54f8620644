# SPDX-License-Identifier: Apache-2.0
"""The shapes reward weighs the verifier's answers as documented."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.rewards.shapes import ShapesReward
from chunkgrpo.shapes.grammar import parse, sample_prompts
from chunkgrpo.shapes.scenes import COLORS, Scene, Thing, render, sample_scene
from chunkgrpo.shapes.verifier import verify_batch

WHITE = (246, 246, 246)


def _tensor(*scenes: Scene) -> torch.Tensor:
    images = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def _circles(*colors: str) -> Scene:
    places = [(14, 14), (46, 14), (14, 46), (46, 46), (30, 30)]
    things = (Thing("circle", c, *place, 6.5, COLORS[c]) for c, place in zip(colors, places))
    return Scene(tuple(things), "white", WHITE)


def test_right_images_score_full_in_every_mode() -> None:
    drawn = sample_prompts(36, "train", 0)
    rng = np.random.default_rng(0)
    images = _tensor(*(sample_scene(prompt.ask, rng) for prompt in drawn))
    texts = [prompt.text for prompt in drawn]
    for reward, full in (
        (ShapesReward(), 1.0),
        (ShapesReward("strict"), 1.0),
        (ShapesReward(strict_bonus=0.5, extra_penalty=0.1), 1.5),
        (ShapesReward("strict", strict_bonus=0.5, extra_penalty=0.1), 1.0),
    ):
        assert isinstance(reward, Reward) and reward.name == "shapes"
        scores = reward(images, texts)
        assert scores.shape == (36,) and scores.dtype == torch.float32
        assert scores.device.type == "cpu" and not scores.requires_grad
        torch.testing.assert_close(scores, torch.full((36,), full))


def test_the_score_follows_the_formula() -> None:
    scenes = [_circles(*["red"] * number) for number in (1, 2, 3, 4, 5)]
    images, texts = _tensor(*scenes), ["a red circle"] * 5
    soft = ShapesReward()(images, texts)
    assert soft[0] == 1 and (soft.diff() < 0).all()
    verdicts = ShapesReward().verdicts(images, texts)
    assert [v.extra for v in verdicts] == [0, 1, 2, 3, 4]
    charged = ShapesReward(extra_penalty=0.2, strict_bonus=0.3)(images, texts)
    surplus = torch.tensor([0, 1, 2, 3, 3.0])  # at most three are charged
    exact = torch.tensor([1, 0, 0, 0, 0.0])
    torch.testing.assert_close(charged, soft + 0.3 * exact - 0.2 * surplus)
    strict = ShapesReward("strict", extra_penalty=0.2)(images, texts)
    torch.testing.assert_close(strict, exact - 0.2 * surplus)


def test_each_image_is_scored_alone_and_left_as_it_is() -> None:
    drawn = sample_prompts(12, "train", 1)
    rng = np.random.default_rng(1)
    images = _tensor(*(sample_scene(prompt.ask, rng) for prompt in drawn)).flip(0)
    before = images.clone()
    texts = [prompt.text for prompt in drawn]
    together = ShapesReward()(images, texts)
    alone = torch.cat([ShapesReward()(images[i : i + 1], [texts[i]]) for i in range(12)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(images, before)


def test_half_precision_with_gradients_is_taken() -> None:
    images = _tensor(_circles("red"))
    reward = ShapesReward()
    assert reward(images.to(torch.bfloat16), ["a red circle"]) == 1
    assert not reward(images.clone().requires_grad_(), ["a red circle"]).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_gets_no_score(value: float) -> None:
    """Not 0: a diverged model would look like a bad one, and one white pixel like a good one."""
    images = _tensor(_circles("red"))
    images[0, 1, 3, 5] = value
    with pytest.raises(ValueError, match=r"reward: image 0, of prompt 'a red circle', is not"):
        ShapesReward()(images, ["a red circle"])
    with pytest.raises(ValueError, match="image 0 has a pixel that is not finite"):
        verify_batch(images.permute(0, 2, 3, 1).numpy(), [parse("a red circle").ask])


def test_mistakes_are_named() -> None:
    images = _tensor(_circles("red"))
    with pytest.raises(ValueError, match="not one of the embedded world's"):
        ShapesReward()(images, ["a red dog"])
    with pytest.raises(ValueError, match="one ask per image"):
        ShapesReward()(images, ["a red circle"] * 2)
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        ShapesReward()(images[0], ["a red circle"])
    with pytest.raises(ValueError, match="unknown mode 'hard'"):
        ShapesReward("hard")
    with pytest.raises(ValueError, match="extra_penalty"):
        ShapesReward(extra_penalty=-1)


def test_settings_can_be_replaced() -> None:
    assert dataclasses.replace(ShapesReward(), mode="strict") == ShapesReward("strict")
    assert parse("a red circle").ask.things == (("red", "circle"),)
