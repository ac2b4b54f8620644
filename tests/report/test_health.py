# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chunkgrpo.report.health import (
    brightness,
    diversity,
    edge_sharpness,
    image_health,
    saturation,
    texture,
)

SIDE = 64
ROWS, COLUMNS = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")


def grey(values: Tensor) -> Tensor:
    return values.float().expand(1, 3, *values.shape[-2:])


FLAT = grey(torch.full((SIDE, SIDE), 0.3))
BOARD = grey((ROWS + COLUMNS) % 2)
EDGE = grey(COLUMNS >= SIDE // 2)


def test_a_flat_image_has_no_texture_edges_or_colour() -> None:
    health = image_health(FLAT)
    assert health["brightness"] == pytest.approx(0.3)
    for name in ("texture", "edge_sharpness", "saturation"):
        assert health[name] == pytest.approx(0, abs=1e-7)
    assert "diversity" not in health


def test_checkerboard_is_the_strongest_texture() -> None:
    # A 5 x 5 window holds 13 pixels of one kind and 12 of the other.
    assert texture(BOARD).item() == pytest.approx(math.sqrt(13 * 12) / 25)
    assert texture(BOARD, window=2).item() == pytest.approx(0.5)


def test_texture_looks_past_an_edge_and_sees_a_grid() -> None:
    assert texture(EDGE).item() == pytest.approx(0, abs=1e-7)
    lines = grey(0.5 + 0.1 * (COLUMNS % 8 == 0))
    assert texture(lines).item() == pytest.approx(0.1 * 2 / 5, abs=1e-6)  # one column of five


def test_texture_grows_with_the_strength_of_noise() -> None:
    noise = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).expand(
        1, 3, SIDE, SIDE
    )
    weak, strong = texture(0.5 + 0.02 * noise).item(), texture(0.5 + 0.2 * noise).item()
    assert strong == pytest.approx(10 * weak, rel=1e-3)
    assert weak == pytest.approx(0.02 / math.sqrt(12), rel=0.1)


def test_sharpness_of_one_edge() -> None:
    # 63 x 63 gradients, one column of them 1; the top 5 % are round(198.45) = 198 values.
    assert edge_sharpness(EDGE).item() == pytest.approx(63 / 198)
    assert edge_sharpness(EDGE, share=1 / 63).item() == pytest.approx(1)
    ramp = grey(COLUMNS / (SIDE - 1))
    assert edge_sharpness(ramp).item() == pytest.approx(1 / (SIDE - 1))
    assert edge_sharpness(BOARD).item() == pytest.approx(math.sqrt(2))


def test_blur_lowers_sharpness() -> None:
    image = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)
    assert (edge_sharpness(blurred) < 0.5 * edge_sharpness(image)).all()


@pytest.mark.parametrize(
    ("colour", "chroma", "luma"),
    [((1, 0, 0), 1, 0.2126), ((0, 1, 0), 1, 0.7152), ((0.2, 0.5, 0.4), 0.3, 0.42900)],
)
def test_saturation_and_brightness_of_plain_colours(
    colour: tuple[float, ...], chroma: float, luma: float
) -> None:
    image = torch.tensor(colour, dtype=torch.float64).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert saturation(image).item() == pytest.approx(chroma)
    assert brightness(image).item() == pytest.approx(luma)


def test_diversity_of_black_and_white() -> None:
    black, white = torch.zeros(3, SIDE, SIDE), torch.ones(3, SIDE, SIDE)
    images = torch.stack([black, white, white, white, white, white])
    # First prompt: pairs (b,w) (b,w) (w,w); second prompt: three equal images.
    assert diversity(images, 2).tolist() == pytest.approx([2 / 3, 0])
    assert image_health(images, num_prompts=2)["diversity"] == pytest.approx(1 / 3)


def test_diversity_does_not_depend_on_order_or_fine_grain() -> None:
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    assert diversity(images[order], 2).tolist() == pytest.approx(diversity(images, 2).tolist())
    assert diversity(torch.cat([BOARD, 1 - BOARD]), 1).item() == pytest.approx(0, abs=1e-7)


def test_one_image_a_prompt_has_no_diversity() -> None:
    assert "diversity" not in image_health(torch.cat([FLAT, BOARD]), num_prompts=2)


def test_half_precision_with_gradient_is_fine() -> None:
    image = BOARD.to(torch.bfloat16).clone().requires_grad_()
    assert image_health(image)["texture"] == pytest.approx(math.sqrt(156) / 25)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(0, 3, 8, 8)],
    ids=["no batch axis", "one channel", "empty"],
)
def test_other_shapes_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="shape"):
        image_health(images)


@pytest.mark.parametrize("value", [-1.0, 1.5, math.nan])
def test_other_ranges_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="expected \\[0, 1\\]"):
        brightness(torch.full((1, 3, 8, 8), value))


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        texture(FLAT, window=1)
    with pytest.raises(ValueError, match="window"):
        texture(FLAT, window=65)
    with pytest.raises(ValueError, match="share"):
        edge_sharpness(FLAT, share=0)
    with pytest.raises(ValueError, match="gradient"):
        edge_sharpness(FLAT[..., :1])
    for num_prompts in (0, 1, 3):
        with pytest.raises(ValueError, match="groups"):
            diversity(torch.cat([FLAT] * (1 if num_prompts == 1 else 4)), num_prompts)
