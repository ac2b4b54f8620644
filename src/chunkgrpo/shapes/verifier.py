# SPDX-License-Identifier: Apache-2.0
"""Check a 64 x 64 image against an ``Ask``, from the image alone, by classical computer vision.

The background colour is estimated and subtracted; what stands out by at least a good third of the
local contrast forms components; each component gets a colour (its interior's median), a coverage
map (how far each pixel lies on the way from the background to that colour) and, for each shape,
the IoU of that coverage with the shape's blurred template at the same area and centre of mass.
Area and centre of mass do not change under blur, so a soft image is fitted as well as a sharp one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from chunkgrpo.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES, Ask, Thing, outline, related

# Segmentation. Distances between colours are on the 0 to 255 scale.
FOREGROUND_DISTANCE = 30.0  # least Euclidean distance from the background colour
FOREGROUND_SHARE = 0.42  # and least share of the largest distance within 2 pixels
FULL_SHARE = 0.85  # pixels of at least this share show the colour undiluted
BACKGROUND_REACH = 28.0  # a pixel this near the background in every channel belongs to it
MIN_BLOB_AREA = 12  # pixels; smaller components are specks, not objects
MAX_BLOBS = 8  # further components are counted, not looked at

# What an object must be to count.
MIN_IOU = 0.86
MIN_MARGIN = 0.025  # lead of the best shape's IoU over the second best
RADIUS_LIMITS = (4.5, 21.0)  # pixels
COLOR_LIMIT = 36.0  # largest difference to a named colour in any channel
MIN_OPACITY = 0.72  # of the way from the background to the named colour
MAX_INTERIOR_RMS = 16.0  # an object is of one colour
MAX_BLUR = 1.25  # pixels, standard deviation of the edge's Gaussian, pixel box included

# What the background must be.
MAX_TINT = 46.0  # largest channel minus smallest
MIN_PLAIN_SHARE = 0.5  # of all pixels
MAX_NOISE_RMS = 8.0  # per channel
MAX_BLOCK_RESIDUAL = 9.0  # of the mean of a 4 x 4 block, in any channel
MAX_DIRTY_BLOCKS = 1
MAX_SPECK_AREA = 6  # pixels, all specks together

RELATION_OFFSET = 6.0  # as ``related``'s ``offset``; laxer than what the renderer draws
RELATION_DOMINANCE = 0.8

# Weights of the soft score, see ``verify``.
EXTRA_FACTOR = 0.75
SOFT_CAP = 0.95

_NAMES = tuple(COLORS)
_PALETTE = np.array(list(COLORS.values()), np.float32)
_CHUNK = 32  # images segmented at once: enough to amortise calls, small enough for the cache
_TABLE_REACH = 1.7  # the templates' tables cover [-1.7, 1.7]^2 in units of the radius
_TABLE_CELLS = 44  # cells per unit
_LEVELS = np.geomspace(0.016, 0.32, 14)  # blur of the templates, in units of the radius
_DEAD = 0.08  # coverage this near 0 or 1 is noise

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
class Verdict:
    """What ``verify`` found.

    Attributes:
        strict: Whether the image holds exactly what was asked, and nothing else.
        soft: Partial credit in [0, 1]; 1 exactly where ``strict``.
        extra: Objects that no asked one explains, unclassifiable blobs included.
        missing: Asked objects of which none with that shape was found.
        detections: Everything found, largest first.
        reason: One short sentence.
    """

    strict: bool
    soft: float
    extra: int
    missing: int
    detections: tuple[Detection, ...]
    reason: str


@dataclass(frozen=True)
class _Blob:
    """A detection with what the scores need besides."""

    detection: Detection
    ious: NDArray[np.float64]  # [5], by SHAPES
    rgb: FloatArray  # [3]
    fault: str  # why it is no proper object ("is cut off by the edge"), or ""


@dataclass(frozen=True)
class _Surface:
    """The background of one image.

    Attributes:
        dirt: How far from plain in [0, 1]; below what a strict pass tolerates it is 0.
        fault: Why it is not plain, or "".
    """

    dirt: float
    fault: str


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


def _as_float(images: NDArray) -> FloatArray:
    """Return images [B, 64, 64, 3] as float32 on the 0 to 255 scale."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images have shape {images.shape}; expected [B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    if images.dtype == np.uint8:
        return images.astype(np.float32)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    finite = np.nan_to_num(images.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    return np.clip(finite, 0, 1) * np.float32(255)


_STEPS = np.arange(IMAGE_SIZE) + 0.5  # centres of pixels
_ONES = np.ones(IMAGE_SIZE**2, np.float32)
_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = True  # neighbours within an image, diagonal ones too, never across images

_RING = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
_RING[2:-2, 2:-2] = False


# Sums rows, or columns, in fours: a matrix product is much faster than a reduction of short axes.
_FOURS = np.kron(np.eye(IMAGE_SIZE // 4), np.ones((1, 4))).astype(np.float32)


def _largest(colors: FloatArray) -> FloatArray:
    """Return the largest absolute channel of colours [..., 3]."""
    red, green, blue = (np.abs(colors[..., channel]) for channel in range(3))
    return np.maximum(np.maximum(red, green), blue)


def _block_sums(values: FloatArray) -> FloatArray:
    """Sum images [B, 64, 64] over blocks of 4 x 4, to [B, 16, 16]."""
    return (_FOURS @ values @ _FOURS.T).astype(np.float32, copy=False)


def _background(images: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Estimate each image's background colour.

    The border's median gives a first guess (objects keep off the border), the mean of all pixels
    near it the colour.

    Returns:
        The deviation from it [B, 64, 64, 3], and the share of pixels near it [B].
    """
    ring = images[:, _RING]
    color = np.partition(ring, ring.shape[1] // 2, axis=1)[:, ring.shape[1] // 2]
    # Every other row and column: the mean of a thousand pixels is as good as that of four thousand.
    sparse = images[:, ::2, 1::2].reshape(len(images), -1, 3)
    share = np.zeros(len(images), np.float32)
    for _ in range(2):
        deviation = sparse - color[:, None]
        near = (_largest(deviation) < BACKGROUND_REACH).astype(np.float32)
        count = near.sum(1)
        total = (near[:, None] @ deviation)[:, 0]
        color = color + total / np.maximum(count, 1)[:, None]
        share = count / sparse.shape[1]
    return images - color[:, None, None], share


def _surface(
    color: FloatArray, share: float, noise: float, blocks: int, cells: int, specks: int
) -> _Surface:
    tint = float(color.max() - color.min())
    faults: list[tuple[float, str]] = [
        ((tint - MAX_TINT) / 60, "the background is coloured"),
        ((MIN_PLAIN_SHARE - share) / 0.3, "there is hardly any plain background"),
        ((noise - MAX_NOISE_RMS) / 16, "the background is noisy"),
        (
            (blocks - MAX_DIRTY_BLOCKS) / (0.3 * max(cells, 1)),
            "the background is not plain",
        ),
        ((specks - MAX_SPECK_AREA) / 60, "there are specks beside the objects"),
    ]
    worst, fault = max(faults)
    if worst <= 0:
        return _Surface(0.0, "")
    total = sum(min(max(amount, 0.0), 1.0) for amount, _ in faults)
    return _Surface(min(1.0, 0.1 + total), fault)


def _squared_gaps(colors: FloatArray) -> FloatArray:
    """Return the squared distances [N, 6] of colours [N, 3] to the named ones."""
    own = np.einsum("nc,nc->n", colors, colors)
    return own[:, None] - 2 * colors @ _PALETTE.T + (_PALETTE**2).sum(1)


def _split(
    kept: NDArray[np.int32],
    box: tuple[slice, ...],
    label: int,
    image: FloatArray,
    classes: NDArray[np.intp],
    next_label: int,
) -> int:
    """Relabel a component of several colours in place, one label a piece; return the next free."""
    view = kept[box][0]
    rows, columns = np.nonzero(view == label)
    pixels = image[box[1], box[2]][rows, columns]
    nearest = classes[_squared_gaps(pixels)[:, classes].argmin(1)]
    view[rows, columns] = 0
    for chosen in classes:
        piece = np.zeros(view.shape, bool)
        piece[rows[nearest == chosen], columns[nearest == chosen]] = True
        pieces: NDArray[np.int32]
        number: int
        pieces, number = ndimage.label(piece)  # type: ignore
        for index in range(1, number + 1):
            own = pieces == index
            if own.sum() >= MIN_BLOB_AREA:
                view[own] = next_label
                next_label += 1
    return next_label


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


def _examine(
    deviation: FloatArray,
    background: FloatArray,
    own: NDArray[np.bool_],
    halo: NDArray[np.bool_],
    top: int,
    left: int,
) -> _Blob:
    """Measure one component.

    Args:
        deviation: Crop of the image minus the background colour [h, w, 3].
        background: The background colour [3].
        own: The component's pixels in the crop.
        halo: Those and the unclaimed pixels around them.
        top, left: Where the crop lies in the image.
    """
    tables = _templates()
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
    cover = _settle(share * halo)

    height, width = cover.shape
    columns, rows = _ONES[:height] @ cover, cover @ _ONES[:width]
    area = max(float(rows.sum()), 1.0)
    mean_x = float(columns @ _STEPS[:width]) / area
    mean_y = float(rows @ _STEPS[:height]) / area
    edge = 4 * (area - float(np.vdot(cover, cover)))

    # Every shape at the component's own area, centre of mass and blur.
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
    ious = common / (2 * area - common)

    best = int(ious.argmax())
    second = sorted(ious.tolist())[-2]
    size = float(radius[best])
    blur = float(np.interp(edge / size**2, tables.edge[best], _LEVELS)) * size
    rgb = background + middle
    named = int(_squared_gaps(rgb[None]).argmin())
    off = float(np.abs(_PALETTE[named] - rgb).max())
    toward = _PALETTE[named] - background
    opacity = float(middle @ toward) / max(float(toward @ toward), 1.0)
    color = _NAMES[named] if off <= COLOR_LIMIT and opacity >= MIN_OPACITY else None
    shape = SHAPES[best]
    fault = ""
    if ious[best] < MIN_IOU or ious[best] - second < MIN_MARGIN:
        shape, fault = None, "has no clear shape"
    elif not RADIUS_LIMITS[0] <= size <= RADIUS_LIMITS[1]:
        fault = "is too small" if size < RADIUS_LIMITS[0] else "is too large"
    elif blur > MAX_BLUR:
        fault = "is blurred"
    elif scatter > MAX_INTERIOR_RMS:
        fault = "is not of one colour"
    rows_of = np.flatnonzero(own.any(1)) + top
    columns_of = np.flatnonzero(own.any(0)) + left
    if min(rows_of[0], columns_of[0]) == 0 or max(rows_of[-1], columns_of[-1]) == IMAGE_SIZE - 1:
        fault = "is cut off by the edge"
    x, y = (at_x[best], at_y[best]) if shape else (mean_x, mean_y)
    found = Detection(
        shape, color, float(x) + left, float(y) + top, area, float(min(ious[best], 1.0))
    )
    return _Blob(found, ious, rgb, fault)


def _segment(images: FloatArray) -> list[tuple[list[_Blob], int, _Surface]]:
    """Take images apart: for each, its blobs (largest first), blobs left out, its background."""
    deviation, share = _background(images)
    background = images[:, 0, 0] - deviation[:, 0, 0]
    square = deviation[..., 0] ** 2 + deviation[..., 1] ** 2 + deviation[..., 2] ** 2
    distance = np.sqrt(square)
    # Half the local contrast is where an edge lies, however soft or strong it is.
    peak = ndimage.maximum_filter(distance, size=(1, 5, 5))
    mask = distance > np.maximum(FOREGROUND_DISTANCE, FOREGROUND_SHARE * peak)
    labels: NDArray[np.int32]
    number: int
    labels, number = ndimage.label(mask, structure=_IN_PLANE)  # type: ignore
    sizes = np.bincount(labels.ravel(), minlength=number + 1)
    keep = sizes >= MIN_BLOB_AREA
    keep[0] = False
    kept = np.where(keep[labels], labels, 0).astype(np.int32)
    specks = (mask & (kept == 0)).sum((1, 2))

    boxes: list[Any] = ndimage.find_objects(kept, max_label=number)
    # Edge pixels mix colours; only those of full contrast tell a component's.
    where = np.nonzero((kept > 0) & (distance > FULL_SHARE * peak))
    of_label = kept[where]
    apart = _squared_gaps(images[where])
    nearest = apart.argmin(1)
    nearest[apart[np.arange(len(nearest)), nearest] > 60**2] = len(_PALETTE)
    width = len(_PALETTE) + 1
    counts = np.bincount(of_label * width + nearest, minlength=(number + 1) * width)
    counts = counts.reshape(number + 1, width)[:, :-1]
    held = counts >= np.maximum(MIN_BLOB_AREA, 0.1 * sizes)[:, None]
    next_label = number + 1
    for label in np.flatnonzero(held.sum(1) > 1):
        box = boxes[label - 1]
        if box is not None:
            classes = np.flatnonzero(held[label])
            next_label = _split(kept, box, int(label), images[box[0].start], classes, next_label)
    if next_label > number + 1:
        boxes = ndimage.find_objects(kept, max_label=next_label - 1)
        sizes = np.bincount(kept.ravel(), minlength=next_label)

    halo = ndimage.maximum_filter(kept, size=(1, 7, 7))
    free = ((halo == 0) & ~mask).astype(np.float32)
    weights = _block_sums(free)
    counted = np.maximum(weights.sum((1, 2)), 1)
    noise = np.sqrt(np.einsum("bhw,bhw->b", square, free) / (3 * counted))
    means = np.stack([_block_sums(deviation[..., c] * free) for c in range(3)], axis=-1)
    valid = weights >= 6
    dirty = (_largest(means) > MAX_BLOCK_RESIDUAL * weights) & valid
    dirty = dirty.sum((1, 2))
    cells = valid.sum((1, 2))

    members: list[list[int]] = [[] for _ in images]
    for index, box in enumerate(boxes):
        if box is not None:
            members[box[0].start].append(index + 1)
    results: list[tuple[list[_Blob], int, _Surface]] = []
    for i, own_labels in enumerate(members):
        own_labels.sort(key=lambda k: -sizes[k])
        blobs: list[_Blob] = []
        for label in own_labels[:MAX_BLOBS]:
            _, vertical, horizontal = boxes[label - 1]
            top, left = max(vertical.start - 3, 0), max(horizontal.start - 3, 0)
            crop = (i, slice(top, vertical.stop + 3), slice(left, horizontal.stop + 3))
            own = kept[crop] == label
            around = own | ((halo[crop] == label) & (kept[crop] == 0))
            blobs.append(_examine(deviation[crop], background[i], own, around, top, left))
        surface = _surface(
            background[i],
            float(share[i]),
            float(noise[i]),
            int(dirty[i]),
            int(cells[i]),
            int(specks[i]),
        )
        results.append((blobs, max(len(own_labels) - MAX_BLOBS, 0), surface))
    return results


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _credits(blobs: list[_Blob], ask: Ask) -> NDArray[np.float64]:
    """Return the credit [asked, found] in [0, 1] of every blob as every asked object."""
    credits = np.zeros((len(ask.things), len(blobs)))
    if not blobs:
        return credits
    distances = np.sqrt(np.maximum(_squared_gaps(np.stack([blob.rgb for blob in blobs])), 0))
    for j, blob in enumerate(blobs):
        found = blob.detection
        gaps = distances[j]
        for i, (color, shape) in enumerate(ask.things):
            k = SHAPES.index(shape)
            form = min(max((float(blob.ious[k]) - 0.4) / (MIN_IOU - 0.4), 0.0), 1.0)
            if found.shape is None:
                # Nearly good: the more so the less another shape fits better.
                lag = float(blob.ious.max() - blob.ious[k])
                form *= 0.8 * max(0.3, 1 - lag / 0.1)
            elif found.shape != shape:
                form *= 0.3
            gap = float(gaps.min() if color is None else gaps[_NAMES.index(color)])
            right = found.color is not None and color in (None, found.color)
            hue = 1.0 if right else 0.5 * max(0.0, 1 - gap / 200)
            credits[i, j] = form * (0.5 + 0.5 * hue) * (0.6 if blob.fault and found.shape else 1.0)
    return credits


def _place(a: Detection, b: Detection, relation: str) -> tuple[bool, float]:
    """Return whether a lies on the named side of b, and a graded credit in [0, 1]."""
    first, second = (Thing("", "", d.x, d.y, 0.0, (0, 0, 0)) for d in (a, b))
    if related(first, second, relation, RELATION_OFFSET, RELATION_DOMINANCE):
        return True, 1.0
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    along = -along if relation in ("left", "above") else along
    lack = max(RELATION_OFFSET, RELATION_DOMINANCE * abs(across)) - along
    return False, 0.6 * float(np.exp(-max(lack, 0.0) / 16))


_SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def _judge(blobs: list[_Blob], left_out: int, surface: _Surface, ask: Ask) -> Verdict:
    asked = ask.things
    credits = _credits(blobs, ask)
    rows, columns = linear_sum_assignment(-credits)
    partner = dict(zip(rows.tolist(), columns.tolist()))
    base = float(credits[rows, columns].sum()) / len(asked)
    unassigned = len(blobs) - len(partner) + left_out

    # (how telling, sentence); the most telling one becomes the reason.
    faults: list[tuple[int, str]] = []
    explained = 0
    wrong_colors: list[tuple[str | None, str | None, str]] = []
    for i, (color, shape) in enumerate(asked):
        if i not in partner:
            continue
        blob = blobs[partner[i]]
        found = blob.detection
        if found.shape != shape:
            if found.shape is not None:
                faults.append((5, f"there is {_article(found.shape)} instead of a {shape}"))
            elif blob.fault == "has no clear shape":
                faults.append((4, f"an object that should be a {shape} has no clear shape"))
            else:
                faults.append((4, f"an object {blob.fault}"))
            continue
        explained += 1
        if blob.fault:
            faults.append((3, f"the {shape} {blob.fault}"))
        if found.color is None:
            faults.append((4, f"the {shape} has none of the known colours"))
        elif color not in (None, found.color):
            wrong_colors.append((color, found.color, shape))
    if len(wrong_colors) == 2 and wrong_colors[0][:2] == wrong_colors[1][1::-1]:
        faults.append((6, "the colours are exchanged"))
    elif wrong_colors:
        color, other, shape = wrong_colors[0]
        faults.append((6, f"the {shape} is {other}, not {color}"))
    missing = len(asked) - explained
    extra = len(blobs) + left_out - explained
    if len(partner) < len(asked):
        lost = next(i for i in range(len(asked)) if i not in partner)
        color, shape = asked[lost]
        name = f"{color} {shape}" if color else shape
        same = sum(thing == asked[lost] for thing in asked)
        if same > 1:
            faults.append((7, f"only {len(partner)} of {len(asked)} objects are there"))
        else:
            faults.append((7, f"{_article(name)} is missing"))
    elif unassigned:
        faults.append((7, "an extra object" if unassigned == 1 else f"{unassigned} extra objects"))

    place = 1.0
    if ask.relation is not None:
        place = 0.0
        if len(partner) == 2:
            a, b = (blobs[partner[i]].detection for i in (0, 1))
            holds, place = _place(a, b, ask.relation)
            if not holds:
                opposite = _OPPOSITE[ask.relation]
                said = f"the {asked[0][1]} is not {_SIDES[ask.relation]} the {asked[1][1]}"
                if _place(a, b, opposite)[0]:
                    said = f"{' and '.join(sorted((ask.relation, opposite)))} are exchanged"
                faults.append((6, said))
    if surface.fault:
        # A bad background breaks a picture up; then the pieces are not worth naming.
        faults.append((8 if surface.dirt > 0.5 else 2, surface.fault))

    strict = not faults
    soft = 1.0
    if not strict:
        soft = base * (0.6 + 0.4 * place) * EXTRA_FACTOR**unassigned * (1 - 0.6 * surface.dirt)
        soft = min(soft, SOFT_CAP)
    return Verdict(
        strict,
        soft,
        extra,
        missing,
        tuple(blob.detection for blob in blobs),
        max(faults, key=lambda fault: fault[0])[1] if faults else "as asked",
    )


def detect(image: NDArray) -> list[Detection]:
    """Find the objects of an image [64, 64, 3], uint8 or float in [0, 1], largest first.

    At most ``MAX_BLOBS`` are returned; specks below ``MIN_BLOB_AREA`` pixels are left out.
    """
    blobs, _, _ = _segment(_as_float(np.asarray(image)[None]))[0]
    return [blob.detection for blob in blobs]


def verify(image: NDArray, ask: Ask) -> Verdict:
    """Check one image [64, 64, 3], uint8 or float in [0, 1], against what was asked.

    Strict: every found object is whole, clear in shape, of one named colour and assigned to one
    asked object of its shape and colour (any named colour where none was asked), no asked object
    is left, the relation holds, and the background is plain and neutral.

    Soft, where not strict, is

        min(0.95, base * (0.6 + 0.4 place) * 0.75^surplus * (1 - 0.6 dirt))

    with ``base`` the mean over the asked objects of the credit of the object assigned to it (0
    where there is none), under the assignment with the largest sum. One object's credit is

        form * (0.5 + 0.5 hue) * (0.6 where blurred, cut, too large or not of one colour)

    ``form`` is (IoU with the asked shape's template - 0.4) / (``MIN_IOU`` - 0.4) within [0, 1],
    times 0.3 where the object is clearly another shape, and times 0.8 or less where it is clearly
    none. ``hue`` is 1 for the right colour, else 0.5 (1 - distance / 200), at least 0. ``place`` is
    1 where the relation holds (or none was asked), 0 where an object lacks, else
    0.6 exp(-lack / 16) with ``lack`` the pixels that lack along the relation's axis. ``surplus``
    counts objects left over, ``dirt`` in [0, 1] grows with tint, noise, texture, specks and lack of
    the background.
    """
    return verify_batch(np.asarray(image)[None], [ask])[0]


def verify_batch(images: NDArray, asks: Sequence[Ask]) -> list[Verdict]:
    """Check images [B, 64, 64, 3], uint8 or float in [0, 1], each against its own ask.

    Faster per image than ``verify``, and with the same results.

    Raises:
        ValueError: If the numbers of images and asks differ, or the images' shape or type is not
            as above.
    """
    images = np.asarray(images)
    if len(images) != len(asks):
        raise ValueError(f"{len(images)} images but {len(asks)} asks; give one ask per image")
    verdicts: list[Verdict] = []
    for start in range(0, len(images), _CHUNK):
        chunk = _as_float(images[start : start + _CHUNK])
        for (blobs, left_out, surface), ask in zip(_segment(chunk), asks[start : start + _CHUNK]):
            verdicts.append(_judge(blobs, left_out, surface, ask))
    return verdicts
