# SPDX-License-Identifier: Apache-2.0
"""Segment 64 x 64 images into blobs and a background.

The background colour is estimated and subtracted; what stands out by at least a good third of the
local contrast forms components, each of which :mod:`.blobs` measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from chunkgrpo.shapes.blobs import NAMES, Blob, FloatArray, examine, squared_gaps
from chunkgrpo.shapes.scenes import IMAGE_SIZE

# Distances between colours are on the 0 to 255 scale.
FOREGROUND_DISTANCE = 30.0  # least Euclidean distance from the background colour
FOREGROUND_SHARE = 0.42  # and least share of the largest distance within 2 pixels
FULL_SHARE = 0.85  # pixels of at least this share show the colour undiluted
BACKGROUND_REACH = 28.0  # a pixel this near the background in every channel belongs to it
MIN_BLOB_AREA = 12  # pixels; smaller components are specks, not objects
MAX_BLOBS = 8  # further components are counted, not measured

# What the background must be.
MAX_TINT = 46.0  # largest channel minus smallest
MIN_PLAIN_SHARE = 0.5  # of all pixels
MAX_NOISE_RMS = 8.0  # per channel
MAX_BLOCK_RESIDUAL = 9.0  # of the mean of a 4 x 4 block, in any channel
MAX_DIRTY_BLOCKS = 1
MAX_SPECK_AREA = 6  # pixels, all specks together

_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = True  # neighbours within an image, diagonal ones too, never across images

_RING = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
_RING[2:-2, 2:-2] = False

# Sums rows, or columns, in fours: a matrix product is much faster than a reduction of short axes.
_FOURS = np.kron(np.eye(IMAGE_SIZE // 4), np.ones((1, 4))).astype(np.float32)


@dataclass(frozen=True)
class Surface:
    """The background of one image.

    Attributes:
        dirt: How far from plain in [0, 1]; below what a strict pass tolerates it is 0.
        fault: Why it is not plain, or "".
    """

    dirt: float
    fault: str


def as_float(images: NDArray) -> FloatArray:
    """Return images [B, 64, 64, 3] as float32 on the 0 to 255 scale.

    Raises:
        ValueError: If the shape or the type is another, or a pixel is not finite: it would pass as
            a black or a white one.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images have shape {images.shape}; expected [B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    if images.dtype == np.uint8:
        return images.astype(np.float32)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    if not np.isfinite(images).all():
        index = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
        raise ValueError(f"image {index} has a pixel that is not finite; find out where it begins")
    return np.clip(images.astype(np.float32), 0, 1) * np.float32(255)


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
) -> Surface:
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
        return Surface(0.0, "")
    total = sum(min(max(amount, 0.0), 1.0) for amount, _ in faults)
    return Surface(min(1.0, 0.1 + total), fault)


def _split(
    kept: NDArray[np.int32],
    box: tuple[slice, ...],
    label: int,
    image: FloatArray,
    classes: NDArray[np.intp],
    next_label: int,
) -> int:
    """Relabel the pieces of a component of several colours in place; return the next free label."""
    view = kept[box][0]
    rows, columns = np.nonzero(view == label)
    pixels = image[box[1], box[2]][rows, columns]
    nearest = classes[squared_gaps(pixels)[:, classes].argmin(1)]
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


class _Components(NamedTuple):
    """Connected components of a batch of B images, of at least ``MIN_BLOB_AREA`` pixels each."""

    labels: NDArray[np.int32]  # [B, 64, 64]; 0 where there is none
    boxes: list[Any]  # by label - 1: the slices that hold it; None where no pixel has the label
    sizes: NDArray[np.intp]  # [labels + 1], pixels
    mask: NDArray[np.bool_]  # [B, 64, 64], all foreground, specks included
    specks: NDArray[np.intp]  # [B], foreground pixels without a label


def _components(images: FloatArray, distance: FloatArray) -> _Components:
    """Find what stands out of the background, by each pixel's distance [B, 64, 64] from it."""
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
    held = _held_colors(images, kept, distance > FULL_SHARE * peak, sizes)
    next_label = number + 1
    for label in np.flatnonzero(held.sum(1) > 1):
        box = boxes[label - 1]
        if box is not None:
            classes = np.flatnonzero(held[label])
            next_label = _split(kept, box, int(label), images[box[0].start], classes, next_label)
    if next_label > number + 1:
        boxes = ndimage.find_objects(kept, max_label=next_label - 1)
        sizes = np.bincount(kept.ravel(), minlength=next_label)
    return _Components(kept, boxes, sizes, mask, specks)


def _held_colors(
    images: FloatArray,
    kept: NDArray[np.int32],
    full: NDArray[np.bool_],
    sizes: NDArray[np.intp],
) -> NDArray[np.bool_]:
    """Return which named colours each component holds a good part of: [labels, colours].

    Edge pixels mix colours; only those of full contrast tell a component's.
    """
    where = np.nonzero((kept > 0) & full)
    apart = squared_gaps(images[where])
    nearest = apart.argmin(1)
    nearest[apart[np.arange(len(nearest)), nearest] > 60**2] = len(NAMES)
    width = len(NAMES) + 1
    counts = np.bincount(kept[where] * width + nearest, minlength=len(sizes) * width)
    counts = counts.reshape(len(sizes), width)[:, :-1]
    return counts >= np.maximum(MIN_BLOB_AREA, 0.1 * sizes)[:, None]


def _texture(
    deviation: FloatArray, square: FloatArray, free: FloatArray
) -> tuple[FloatArray, NDArray[np.intp], NDArray[np.intp]]:
    """Measure the background where it is ``free`` of objects, [B, 64, 64] of 0 and 1.

    Returns:
        Per image, [B] each: the RMS noise of a channel, the blocks of 4 x 4 pixels whose mean
        deviates, and the blocks that were measured.
    """
    weights = _block_sums(free)
    counted = np.maximum(weights.sum((1, 2)), 1)
    noise = np.sqrt(np.einsum("bhw,bhw->b", square, free) / (3 * counted))
    means = np.stack([_block_sums(deviation[..., c] * free) for c in range(3)], axis=-1)
    valid = weights >= 6
    dirty = (_largest(means) > MAX_BLOCK_RESIDUAL * weights) & valid
    return noise, dirty.sum((1, 2)), valid.sum((1, 2))


class Parts(NamedTuple):
    """What one image consists of."""

    blobs: list[Blob]  # largest first
    left_out: int  # blobs beyond ``MAX_BLOBS``
    surface: Surface


def segment(images: FloatArray) -> list[Parts]:
    """Segment images [B, 64, 64, 3] on the 0 to 255 scale."""
    deviation, share = _background(images)
    background = images[:, 0, 0] - deviation[:, 0, 0]
    square = deviation[..., 0] ** 2 + deviation[..., 1] ** 2 + deviation[..., 2] ** 2
    kept, boxes, sizes, mask, specks = _components(images, np.sqrt(square))

    halo = ndimage.maximum_filter(kept, size=(1, 7, 7))
    free = ((halo == 0) & ~mask).astype(np.float32)
    noise, dirty, cells = _texture(deviation, square, free)

    members: list[list[int]] = [[] for _ in images]
    for index, box in enumerate(boxes):
        if box is not None:
            members[box[0].start].append(index + 1)
    results: list[Parts] = []
    for i, own_labels in enumerate(members):
        own_labels.sort(key=lambda k: -sizes[k])
        blobs: list[Blob] = []
        for label in own_labels[:MAX_BLOBS]:
            _, vertical, horizontal = boxes[label - 1]
            top, left = max(vertical.start - 3, 0), max(horizontal.start - 3, 0)
            crop = (i, slice(top, vertical.stop + 3), slice(left, horizontal.stop + 3))
            own = kept[crop] == label
            around = own | ((halo[crop] == label) & (kept[crop] == 0))
            blobs.append(examine(deviation[crop], background[i], own, around, top, left))
        surface = _surface(
            background[i],
            float(share[i]),
            float(noise[i]),
            int(dirty[i]),
            int(cells[i]),
            int(specks[i]),
        )
        results.append(Parts(blobs, max(len(own_labels) - MAX_BLOBS, 0), surface))
    return results
