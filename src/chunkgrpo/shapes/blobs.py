# SPDX-License-Identifier: Apache-2.0
"""Measure one component of an image: its colour, its coverage of pixels, and its shape.

A component gets a colour (its interior's median), a coverage map (how far each pixel lies on the
way from the background to that colour) and, for each shape, the IoU of that coverage with the
shape's blurred template at the same area and centre of mass. Area and centre of mass do not change
under blur, so a soft image is fitted as well as a sharp one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from chunkgrpo.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES, outline

# What an object must be to count.
MIN_IOU = 0.86
MIN_MARGIN = 0.025  # lead of the best shape's IoU over the second best
RADIUS_LIMITS = (4.5, 21.0)  # pixels
COLOR_LIMIT = 36.0  # largest difference to a named colour in any channel
MIN_OPACITY = 0.72  # of the way from the background to the named colour
MAX_INTERIOR_RMS = 16.0  # an object is of one colour
MAX_BLUR = 1.25  # pixels, standard deviation of the edge's Gaussian, pixel box included

NO_CLEAR_SHAPE = "has no clear shape"  # the fault of a blob that is none of ``SHAPES``
NAMES = tuple(COLORS)
_PALETTE = np.array(list(COLORS.values()), np.float32)
_TABLE_REACH = 1.7  # the templates' tables cover [-1.7, 1.7]^2 in units of the radius
_TABLE_CELLS = 44  # cells per unit
_LEVELS = np.geomspace(0.016, 0.32, 14)  # blur of the templates, in units of the radius
_DEAD = 0.08  # coverage this near 0 or 1 is noise
_STEPS = np.arange(IMAGE_SIZE) + 0.5  # centres of pixels
_ONES = np.ones(IMAGE_SIZE**2, np.float32)

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Detection:
    """One thing found in an image.

    Attributes:
        shape: One of ``SHAPES``, or None where none fits well and clearly best.
        color: One of ``COLORS``, or None where none is near.
        x, y: Centre in pixels, as a ``Thing``'s; the centre of mass where the shape is None.
        area: Covered area in square pixels, antialiased.
        confidence: IoU in [0, 1] with the best shape's template.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    area: float
    confidence: float


@dataclass(frozen=True)
class Blob:
    """A detection with what the scores need besides."""

    detection: Detection
    ious: NDArray[np.float64]  # [5], by SHAPES
    rgb: FloatArray  # [3]
    fault: str  # why it is not a proper object ("is cut off by the edge"), or ""


@dataclass(frozen=True)
class _Templates:
    """Coverage of every shape at every blur: cover [5, L, N, N] and what to fit it by."""

    cover: FloatArray
    area: NDArray[np.float64]  # [5, L], in squared radii
    edge: NDArray[np.float64]  # [5, L], integral of 4 c (1 - c), in squared radii
    center: NDArray[np.float64]  # [5, 2], centre of mass (x, y) in radii


def _settle(cover: NDArray) -> NDArray:
    """Stretch coverage so that values within ``_DEAD`` of 0 and 1 become 0 and 1."""
    settled = (cover - np.float32(_DEAD)) * np.float32(1 / (1 - 2 * _DEAD))
    return np.minimum(np.maximum(settled, 0, out=settled), 1, out=settled)  # cheaper than clip


@cache
def _templates() -> _Templates:
    from PIL import Image, ImageDraw

    side = round(2 * _TABLE_REACH * _TABLE_CELLS) + 1
    fine = 4
    cover = np.zeros((len(SHAPES), len(_LEVELS), side, side), np.float32)
    center = np.zeros((len(SHAPES), 2))
    ticks = (np.arange(side) - side // 2) / _TABLE_CELLS
    for k, shape in enumerate(SHAPES):
        image = Image.new("L", (side * fine, side * fine), 0)
        points = (outline(shape) * _TABLE_CELLS + side / 2) * fine - 0.5
        ImageDraw.Draw(image).polygon(points.ravel().tolist(), fill=255)
        sharp = np.asarray(image.reduce(fine), np.float32) / 255
        center[k] = (sharp.sum(0) @ ticks / sharp.sum(), sharp.sum(1) @ ticks / sharp.sum())
        for level, sigma in enumerate(_LEVELS):
            blurred = ndimage.gaussian_filter(sharp, sigma * _TABLE_CELLS, mode="constant")
            cover[k, level] = _settle(blurred)
    cell = 1 / _TABLE_CELLS**2
    edge = (4 * cover * (1 - cover)).sum((2, 3), dtype=np.float64) * cell
    return _Templates(
        cover,
        cover.sum((2, 3), dtype=np.float64) * cell,
        np.maximum.accumulate(edge, axis=1),  # searched by bisection
        center,
    )


def squared_gaps(colors: FloatArray) -> FloatArray:
    """Return the squared distances [N, 6] of colours [N, 3] to the named ones."""
    own = np.einsum("nc,nc->n", colors, colors)
    return own[:, None] - 2 * colors @ _PALETTE.T + (_PALETTE**2).sum(1)


def _core(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Erode a mask by one pixel; where too little remains, return it as it is."""
    core = np.zeros_like(mask)
    core[1:-1, 1:-1] = (
        mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    )
    return core if core.sum() >= 6 else mask


def _middle(pixels: FloatArray) -> FloatArray:
    """Return the channels' medians of pixels [N, 3] (the upper one of two; faster than NumPy's)."""
    return np.partition(pixels, len(pixels) // 2, axis=0)[len(pixels) // 2]


class _Fit(NamedTuple):
    """Every shape, fitted to one component."""

    area: float  # of the component, in square pixels
    mean: tuple[float, float]  # its centre of mass (x, y) in the crop
    edge: float  # integral of 4 c (1 - c) over its coverage c, grows with blur
    radius: NDArray[np.float64]  # [5]
    x: NDArray[np.float64]  # [5], centre of the shape in the crop
    y: NDArray[np.float64]
    ious: NDArray[np.float64]  # [5]


def _color_and_cover(
    deviation: FloatArray, own: NDArray[np.bool_], halo: NDArray[np.bool_]
) -> tuple[FloatArray, float, FloatArray]:
    """Return the colour's deviation [3], the interior's RMS off it, and the coverage [h, w]."""
    core = deviation[_core(own)]
    middle = _middle(core)
    share = core @ middle / max(float(middle @ middle), 1.0)
    full = core[share >= 0.95]  # blur dims what is narrow; the colour is the full pixels'
    middle = _middle(full) if len(full) else middle
    share = deviation @ (middle / np.float32(max(float(middle @ middle), 1.0)))
    # A pixel between the background and the colour is an edge; one off that line, another colour.
    inside = own & (share > 0.5)
    off_line = (deviation - np.minimum(share, 1)[..., None] * middle)[inside]
    scatter = float(np.sqrt(np.vdot(off_line, off_line) / max(off_line.size, 1)))
    return middle, scatter, _settle(share * halo)


def _fit(cover: FloatArray) -> _Fit:
    """Fit every shape to coverage [h, w], at its own area, centre of mass and blur."""
    tables = _templates()
    height, width = cover.shape
    columns, rows = _ONES[:height] @ cover, cover @ _ONES[:width]
    area = max(float(rows.sum()), 1.0)
    mean_x = float(columns @ _STEPS[:width]) / area
    mean_y = float(rows @ _STEPS[:height]) / area
    edge = 4 * (area - float(np.vdot(cover, cover)))

    each = np.arange(len(SHAPES))
    radius = np.sqrt(area / tables.area[:, 2])
    level = np.array(
        [
            min(int(t.searchsorted(edge / r**2)), len(_LEVELS) - 1)
            for t, r in zip(tables.edge, radius)
        ]
    )
    radius = np.sqrt(area / tables.area[each, level])
    at_x = mean_x - radius * tables.center[:, 0]
    at_y = mean_y - radius * tables.center[:, 1]
    side = tables.cover.shape[-1]
    scale = (_TABLE_CELLS / radius)[:, None]
    grid_x = (_STEPS[:width] - at_x[:, None]) * scale + side / 2
    grid_y = (_STEPS[:height] - at_y[:, None]) * scale + side / 2
    grid_x = np.minimum(np.maximum(grid_x, 0), side - 1).astype(np.int64)
    grid_y = np.minimum(np.maximum(grid_y, 0), side - 1).astype(np.int64)
    grid_y = (grid_y + (each * len(_LEVELS) + level)[:, None] * side) * side
    template = tables.cover.take(grid_y[:, :, None] + grid_x[:, None, :])
    common = np.minimum(template, cover, out=template).reshape(len(SHAPES), -1)
    common = (common @ _ONES[: cover.size]).astype(np.float64)
    # The template's area is the component's by construction, also where the crop cuts it.
    return _Fit(area, (mean_x, mean_y), edge, radius, at_x, at_y, common / (2 * area - common))


def _name_color(background: FloatArray, middle: FloatArray) -> str | None:
    """Name the colour that deviates from the background by ``middle`` [3]; None where none fits."""
    rgb = background + middle
    named = int(squared_gaps(rgb[None]).argmin())
    off = float(np.abs(_PALETTE[named] - rgb).max())
    toward = _PALETTE[named] - background
    opacity = float(middle @ toward) / max(float(toward @ toward), 1.0)
    return NAMES[named] if off <= COLOR_LIMIT and opacity >= MIN_OPACITY else None


def _touches_edge(own: NDArray[np.bool_], top: int, left: int) -> bool:
    """Return whether a crop's pixels reach the image's first or last row or column."""
    rows = np.flatnonzero(own.any(1)) + top
    columns = np.flatnonzero(own.any(0)) + left
    return min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == IMAGE_SIZE - 1


def examine(
    deviation: FloatArray,
    background: FloatArray,
    own: NDArray[np.bool_],
    halo: NDArray[np.bool_],
    top: int,
    left: int,
) -> Blob:
    """Measure one component.

    Args:
        deviation: Crop of the image minus the background colour [h, w, 3].
        background: The background colour [3].
        own: The component's pixels in the crop.
        halo: Those and the unclaimed pixels around them.
        top, left: Where the crop lies in the image.
    """
    middle, scatter, cover = _color_and_cover(deviation, own, halo)
    fit = _fit(cover)
    best = int(fit.ious.argmax())
    iou, second = fit.ious[best], sorted(fit.ious.tolist())[-2]
    size = float(fit.radius[best])
    blur = float(np.interp(fit.edge / size**2, _templates().edge[best], _LEVELS)) * size
    shape = SHAPES[best]
    fault = ""
    if iou < MIN_IOU or iou - second < MIN_MARGIN:
        shape, fault = None, NO_CLEAR_SHAPE
    elif not RADIUS_LIMITS[0] <= size <= RADIUS_LIMITS[1]:
        fault = "is too small" if size < RADIUS_LIMITS[0] else "is too large"
    elif blur > MAX_BLUR:
        fault = "is blurred"
    elif scatter > MAX_INTERIOR_RMS:
        fault = "is not of one colour"
    if _touches_edge(own, top, left):
        fault = "is cut off by the edge"
    x, y = (fit.x[best], fit.y[best]) if shape else fit.mean
    color = _name_color(background, middle)
    found = Detection(shape, color, float(x) + left, float(y) + top, fit.area, float(min(iou, 1.0)))
    return Blob(found, fit.ious, background + middle, fault)
