# SPDX-License-Identifier: Apache-2.0
"""The OCR reward reads real images; what it makes of the text is known exactly."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkgrpo.rewards import make_reward
from chunkgrpo.rewards.ocr import edit_distance, quoted_text, text_score
from chunkgrpo.rewards.protocol import Reward


def rendered(text: str, size: int = 256, height: int = 40, ink: int = 0) -> torch.Tensor:
    """A picture of a text: [3, size, size]."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (size, size), (235, 240, 245))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(height)
    draw.text((size // 2, size // 2), text, fill=(ink, ink, ink), font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reward() -> Reward:
    return make_reward("ocr", {"threads": 1})


def test_right_wrong_and_absent_text(reward: Reward) -> None:
    images = torch.stack(
        [rendered("HELLO"), rendered("WORLD"), torch.full((3, 256, 256), 0.9), rendered("HELO")]
    )
    scores = reward(images, ['a sign that says "Hello"'] * 4)
    assert scores.dtype == torch.float32
    assert scores[0] == 1
    # HELLO and WORLD share no letter in the same place but one: 4 replacements of 5.
    assert scores[1] == pytest.approx(1 - 4 / 5)
    assert scores[2] == 0
    assert scores[3] == pytest.approx(1 - 1 / 5)


@pytest.mark.parametrize("size, height", [(64, 22), (128, 30), (512, 60)])
def test_reads_at_other_sizes(size: int, height: int, reward: Reward) -> None:
    image = rendered("OPEN", size, height)[None]
    assert reward(image, ['a door with "Open" on it']) == 1
    assert reward(image, ['a door with "Kitchen" on it']) < 0.5


def test_unsure_lines_are_left_out(reward: Reward) -> None:
    """By default below 0.5, as PaddleOCR, with which Flow-GRPO reads, does by itself."""
    image = rendered("HELLO")
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    output = reward.engine(array[..., ::-1].copy())  # type: ignore[attr-defined]
    (sure,) = output.scores
    assert 0.5 < sure < 1 and reward.engine.text_score == 0.5  # type: ignore[attr-defined]
    for least, score in ((0.0, 1), (sure - 1e-4, 1), (1.0, 0)):
        picky = make_reward("ocr", {"threads": 1, "min_confidence": least})
        assert picky(image[None], ['a sign that says "Hello"']) == score


def test_two_lines_and_extra_text_are_read(reward: Reward) -> None:
    image = rendered("Step Goal\nAchieved", 256, 36)[None]
    assert reward(image, ['a watch displaying "Step Goal Achieved"']) == 1
    assert reward(image, ['a watch displaying "goal achieved"']) == 1


def test_score_follows_the_formula() -> None:
    assert text_score("Hello  World", "hello world") == 1
    assert text_score("xx HELLO xx", "Hello") == 1
    assert text_score("", "Hello") == 0
    assert text_score("something else altogether", "Hello") == 0  # never below 0
    assert text_score("Helo", "Hello") == pytest.approx(0.8)
    assert text_score("ﬁsh", "fish") == 1  # one form for a ligature and its letters


def test_edit_distance() -> None:
    for a, b, distance in [
        ("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3),
        ("flaw", "lawn", 2), ("abcd", "abcd", 0), ("intention", "execution", 5),
    ]:  # fmt: skip
        assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_quoted_text() -> None:
    assert quoted_text('a sign "Open" and "Closed"') == "Open"
    assert quoted_text("ein Schild „Offen“ dort") == "Offen"
    assert quoted_text("a sign “Open”") == "Open"
    for prompt in ("a sign", 'a sign ""', 'a sign " "', "it's a 'sign'"):
        with pytest.raises(ValueError, match="quotes no text"):
            quoted_text(prompt)


def test_mistakes_are_named(reward: Reward) -> None:
    with pytest.raises(ValueError, match="'a red circle' quotes no text"):
        reward(torch.zeros(1, 3, 64, 64), ["a red circle"])
    with pytest.raises(ValueError, match="limit_side_len is 8"):
        make_reward("ocr", {"limit_side_len": 8})
    with pytest.raises(ValueError, match="min_confidence is 2"):
        make_reward("ocr", {"min_confidence": 2})


@pytest.mark.needs_data
def test_every_prompt_of_the_published_set_has_a_target() -> None:
    folder = os.environ.get("CHUNKGRPO_DATA")
    if not folder or not (Path(folder) / "ocr.txt").is_file():
        pytest.skip("set CHUNKGRPO_DATA to a folder with Flow-GRPO's ocr.txt")
    lines = (Path(folder) / "ocr.txt").read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    assert len(prompts) > 1000
    for prompt in prompts:
        assert quoted_text(prompt) == prompt.split('"')[1]
