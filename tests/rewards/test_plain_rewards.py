# SPDX-License-Identifier: Apache-2.0
"""Brightness and JPEG size: known images have known scores."""

from __future__ import annotations

import io

import pytest
import torch

from chunkgrpo.rewards import make_reward
from tiny_rewards import pil_images, random_images


def test_brightness_is_mean_luma() -> None:
    images = torch.zeros(6, 3, 4, 6)
    images[1] = 1
    images[2, 0] = images[3, 1] = images[4, 2] = 1
    images[5, :, :2] = 1  # the upper half
    scores = make_reward("brightness")(images, [""] * 6)
    expected = torch.tensor([0, 1, 0.2126, 0.7152, 0.0722, 0.5])
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg_size_is_that_of_the_file(quality: int) -> None:
    images = random_images(3, 33, 47)
    images[2] = 0.5
    sizes = []
    for image in pil_images(images):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        sizes.append(len(file.getvalue()) / 1000)
    more = make_reward("jpeg_incompressibility", {"quality": quality})(images, [""] * 3)
    less = make_reward("jpeg_compressibility", {"quality": quality})(images, [""] * 3)
    torch.testing.assert_close(more, torch.tensor(sizes))
    torch.testing.assert_close(less, -more)
    assert more[2] < more[:2].min()


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="quality is 100"):
        make_reward("jpeg_compressibility", {"quality": 100})
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        make_reward("brightness")(torch.zeros(2, 3, 4, 4), ["x"])
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        make_reward("brightness")(torch.zeros(3, 4, 4), ["x"])
