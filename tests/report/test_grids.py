# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from chunkgrpo.report.grids import save_comparison, save_image_grid
from chunkgrpo.report.palette import CORRECT, WRONG

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(*colours: tuple[int, int, int], side: int = 16) -> Tensor:
    values = torch.tensor(colours).float() / 255
    return values[:, :, None, None].expand(-1, -1, side, side)


def count(path: Path, colour: tuple[int, ...]) -> int:
    """Pixels of exactly this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return int((pixels == np.array(colour)).all(axis=-1).sum())


def boxes(path: Path, colour: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels of this colour."""
    rows, columns = np.nonzero((np.asarray(Image.open(path)) == np.array(colour)).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_grid_shows_every_pixel_once_enlarged(tmp_path: Path) -> None:
    path = save_image_grid(tmp_path / "g.png", plain(RED, GREEN, BLUE), columns=2, scale=3)
    for colour in (RED, GREEN, BLUE):
        assert count(path, colour) == (16 * 3) ** 2
    red, green, blue = (boxes(path, c) for c in (RED, GREEN, BLUE))
    assert red[1] == green[1] and red[2] < green[0]  # side by side
    assert red[0] == blue[0] and red[3] < blue[1]  # the third begins a row
    assert Image.open(path).getpixel((0, 0)) == (255, 255, 255)


def test_captions_never_cover_images(tmp_path: Path) -> None:
    captions = ["a short one", "a caption that has to be broken into several lines", "x" * 60]
    images = plain(RED, GREEN, BLUE)
    bare = save_image_grid(tmp_path / "bare.png", images, columns=2)
    path = save_image_grid(tmp_path / "g.png", images, columns=2, captions=captions)
    for colour in (RED, GREEN, BLUE):
        assert count(path, colour) == count(bare, colour) == 32**2
    assert Image.open(path).height > Image.open(bare).height
    pixels = np.asarray(Image.open(path).convert("L"))
    assert (pixels[:4] == 255).all() and (pixels[:, -4:] == 255).all()  # the margin stays empty


def test_values_out_of_range_are_clamped(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 8, 8), 2.0), torch.full((3, 8, 8), float("nan"))])
    path = save_image_grid(tmp_path / "g.png", images.to(torch.bfloat16), columns=2, scale=1)
    assert count(path, (0, 0, 0)) == 64


def test_the_same_images_give_the_same_file(tmp_path: Path) -> None:
    first = save_image_grid(tmp_path / "a.png", plain(RED, BLUE), 2, ["one", "two"])
    second = save_image_grid(tmp_path / "b.png", plain(RED, BLUE), 2, ["one", "two"])
    assert first.read_bytes() == second.read_bytes()


def test_a_comparison_has_a_column_a_model_and_a_row_a_prompt(tmp_path: Path) -> None:
    yellow = (255, 255, 0)
    columns = {"base": plain(RED, GREEN), "tuned": plain(BLUE, yellow)}
    path = save_comparison(tmp_path / "c.png", columns, ["one", "a longer prompt " * 12])
    red, green, blue = (boxes(path, c) for c in (RED, GREEN, BLUE))
    assert red[0] == green[0] and red[3] < green[1]
    assert red[1] == blue[1] and red[2] < blue[0]
    for colour in (RED, GREEN, BLUE, yellow):
        assert count(path, colour) == 32**2


def test_marks_frame_images_without_covering_them(tmp_path: Path) -> None:
    columns = {"base": plain(RED, GREEN, BLUE), "tuned": plain(RED, GREEN, BLUE)}
    path = save_comparison(
        tmp_path / "c.png", columns, ["a", "b", "c"], marks={"base": [True, False, None]}
    )
    frame = 38**2 - 32**2
    for colour in (CORRECT, WRONG):
        pixels = count(path, ImageColor.getrgb(colour))
        assert frame < pixels < frame + 200  # the frame and its glyph, once each
    for colour in (RED, GREEN, BLUE):
        assert count(path, colour) == 2 * 32**2


@pytest.mark.parametrize(
    ("images", "columns", "captions", "scale", "message"),
    [
        (torch.zeros(3, 8, 8), 1, None, 1, "shape"),
        (torch.zeros(2, 1, 8, 8), 1, None, 1, "shape"),
        (torch.zeros(0, 3, 8, 8), 1, None, 1, "shape"),
        (torch.zeros(2, 3, 8, 8), 0, None, 1, "columns"),
        (torch.zeros(2, 3, 8, 8), 1, ["one"], 1, "1 captions for 2 images"),
        (torch.zeros(2, 3, 8, 8), 1, None, 0, "scale"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(
    tmp_path: Path,
    images: Tensor,
    columns: int,
    captions: list[str] | None,
    scale: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        save_image_grid(tmp_path / "g.png", images, columns, captions, scale)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("columns", "captions", "marks", "message"),
    [
        ({}, [], None, "empty"),
        ({"a": plain(RED), "b": plain(RED, BLUE)}, ["x"], None, "one shape"),
        ({"a": plain(RED)}, ["x", "y"], None, "2 captions for 1 rows"),
        ({"a": plain(RED)}, ["x"], {"a": [True, True]}, "2 verdicts; expected 1"),
        ({"a": plain(RED)}, ["x"], {"b": [True]}, "columns \\['a'\\]"),
    ],
)
def test_a_comparison_that_does_not_fit_is_refused(
    tmp_path: Path, columns: dict, captions: list[str], marks: dict | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_comparison(tmp_path / "c.png", columns, captions, marks=marks)
