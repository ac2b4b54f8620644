# SPDX-License-Identifier: Apache-2.0
"""The OCR reward reads real images; what it makes of the text is known exactly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkgrpo.rewards import make_reward
from chunkgrpo.rewards.ocr import edit_distance, quoted_text, quoted_texts, text_score
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


QUOTATIONS = [
    ('a 5" phone that says "Hi"', ["Hi"]),
    ('a sign "Open"', ["Open"]),
    ("a “Hello” sign", ["Hello"]),
    ("„Hallo“ steht da", ["Hallo"]),
    ("„Hej” x", ["Hej"]),
    ("«Bonjour» a", ["Bonjour"]),
    ("»Hallo« a", ["Hallo"]),
    ("don't stop", []),
    ("it’s a ‘Test’ board", ["Test"]),
    ("a board with ‘don’t’ on it", ["don’t"]),
    ('""', []),
    ('"" and "A"', ["A"]),
    ('"A" and "B"', ["A", "B"]),
    ("看板「営業中」です", ["営業中"]),
    ("写着『你好』", ["你好"]),
    ('写着"你好"的牌子', ["你好"]),
    ("写着“你好”的牌子", ["你好"]),
    ("《红楼梦》", ["红楼梦"]),
    ('a 12" ruler', []),
    ('a 5" x 7" photo', []),
    ('a 5" x 7" photo saying "Hi"', ["Hi"]),
    ('label "15" on it', ["15"]),
    ('"Room 5" sign', ["Room 5"]),
    ('a 10" screen that reads "3 for 2"', ["3 for 2"]),
    ('says "He said “no” twice"', ["He said “no” twice"]),
    ("”Hej” på", ["Hej"]),
    ('unclosed "text', []),
    ("the 'single' quotes", []),
    ('"!"', ["!"]),
    ("“   ”", []),
    ('"A"."B"', ["A", "B"]),
    ("‹Ja›", ["Ja"]),
    ('a 6\' 2" man with "Bob"', ["Bob"]),
    ('sign reading "Sale 50% off" and a 27" monitor', ["Sale 50% off"]),
    ('sign reading "Route 66" and a 27" monitor', ["Route 66"]),
    ('a "24/7" shop and "Open 24" sign', ["24/7", "Open 24"]),
    ("rock ’n’ roll", []),
    ("the ’90s poster says “Grunge”", ["Grunge"]),
    ('"a" "b" "c"', ["a", "b", "c"]),
    ("(“Hi”)", ["Hi"]),
]


@pytest.mark.parametrize(("prompt", "texts"), QUOTATIONS)
def test_every_quoted_text_is_found_and_no_inch_or_apostrophe(
    prompt: str, texts: list[str]
) -> None:
    assert quoted_texts(prompt) == texts


@pytest.mark.parametrize("marks", ["«", "„", "‘", "“", '"', "‘a’b", "「『"])
def test_a_prompt_of_quotation_marks_takes_no_time(marks: str) -> None:
    """Served to strangers: looked for anew behind each mark, the ends would take minutes."""
    begun = time.perf_counter()
    quoted_texts(marks * 20_000)
    quoted_texts(marks * 20_000 + "»”’")
    assert time.perf_counter() - begun < 5


def test_nested_quotations_belong_to_the_outer_one() -> None:
    assert quoted_texts("“a “b” c” “d”") == ["a “b” c", "d"]
    assert quoted_texts("„a „b“ c") == ["b"]  # the first one does not end
    assert quoted_texts("”a” „b”") == ["a", "b"]


def test_quoted_text() -> None:
    assert quoted_text('a sign "Open" and "Closed"') == "Open Closed"
    assert quoted_text('a 5" phone that says "Hi"') == "Hi"
    for prompt in ("a sign", 'a sign ""', 'a sign " "', "it's a 'sign'", "a sign “”"):
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
        assert quoted_text(prompt) == " ".join(prompt.split('"')[1::2])
