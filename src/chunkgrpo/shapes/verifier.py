# SPDX-License-Identifier: Apache-2.0
"""Check a 64 x 64 image against an ``Ask``, from the image alone, by classical computer vision.

:mod:`.segmentation` finds blobs and a background and :mod:`.blobs` measures
each blob; here the blobs are assigned to the objects that were asked for, and what does not fit
becomes the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from chunkgrpo.shapes.blobs import MIN_IOU, NAMES, NO_CLEAR_SHAPE, Blob, Detection, squared_gaps
from chunkgrpo.shapes.scenes import SHAPES, Ask, Thing, related
from chunkgrpo.shapes.segmentation import Parts, as_float, segment

RELATION_OFFSET = 6.0  # as ``related``'s ``offset``; laxer than what the renderer draws
RELATION_DOMINANCE = 0.8

# Weights of the soft score, see ``verify``.
EXTRA_FACTOR = 0.75
SOFT_CAP = 0.95

_CHUNK = 32  # images segmented at once: enough to amortise calls, small enough for the cache


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


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _credits(blobs: list[Blob], ask: Ask) -> NDArray[np.float64]:
    """Return the credit [asked, found] in [0, 1] of every blob as every asked object."""
    credits = np.zeros((len(ask.things), len(blobs)))
    if not blobs:
        return credits
    distances = np.sqrt(np.maximum(squared_gaps(np.stack([blob.rgb for blob in blobs])), 0))
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
            gap = float(gaps.min() if color is None else gaps[NAMES.index(color)])
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


Fault = tuple[int, str]  # (how telling, sentence); the most telling one becomes the reason


def _object_faults(
    blobs: list[Blob], asked: Sequence[tuple[str | None, str]], partner: dict[int, int]
) -> tuple[list[Fault], int]:
    """Compare each asked object with the blob assigned to it.

    Returns:
        What is wrong, and the number of asked objects whose blob has their shape.
    """
    faults: list[Fault] = []
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
            elif blob.fault == NO_CLEAR_SHAPE:
                faults.append((4, f"an object that should be a {shape} {NO_CLEAR_SHAPE}"))
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
    return faults, explained


def _number_faults(
    asked: Sequence[tuple[str | None, str]], partner: dict[int, int], unassigned: int
) -> list[Fault]:
    """Return what is wrong with the number of objects: the first missing one, or a surplus."""
    if len(partner) < len(asked):
        lost = next(i for i in range(len(asked)) if i not in partner)
        color, shape = asked[lost]
        if sum(thing == asked[lost] for thing in asked) > 1:
            return [(7, f"only {len(partner)} of {len(asked)} objects are there")]
        return [(7, f"{_article(f'{color} {shape}' if color else shape)} is missing")]
    if unassigned:
        return [(7, "an extra object" if unassigned == 1 else f"{unassigned} extra objects")]
    return []


def _relation_faults(
    blobs: list[Blob], ask: Ask, partner: dict[int, int]
) -> tuple[list[Fault], float]:
    """Return what is wrong with the objects' relation, and the credit in [0, 1] for it."""
    if ask.relation is None:
        return [], 1.0
    if len(partner) != 2:
        return [], 0.0
    a, b = (blobs[partner[i]].detection for i in (0, 1))
    holds, place = _place(a, b, ask.relation)
    if holds:
        return [], place
    opposite = _OPPOSITE[ask.relation]
    said = f"the {ask.things[0][1]} is not {_SIDES[ask.relation]} the {ask.things[1][1]}"
    if _place(a, b, opposite)[0]:
        said = f"{' and '.join(sorted((ask.relation, opposite)))} are exchanged"
    return [(6, said)], place


def _judge(parts: Parts, ask: Ask) -> Verdict:
    """Compare what an image consists of with what was asked."""
    blobs, left_out, surface = parts
    asked = ask.things
    credits = _credits(blobs, ask)
    rows, columns = linear_sum_assignment(-credits)
    partner = dict(zip(rows.tolist(), columns.tolist()))
    base = float(credits[rows, columns].sum()) / len(asked)
    unassigned = len(blobs) - len(partner) + left_out

    faults, explained = _object_faults(blobs, asked, partner)
    faults += _number_faults(asked, partner, unassigned)
    misplaced, place = _relation_faults(blobs, ask, partner)
    faults += misplaced
    if surface.fault:
        # A bad background breaks a picture up; then the pieces are not worth naming.
        faults.append((8 if surface.dirt > 0.5 else 2, surface.fault))

    strict = not faults
    soft = 1.0
    if not strict:
        soft = base * (0.6 + 0.4 * place) * EXTRA_FACTOR**unassigned * (1 - 0.6 * surface.dirt)
        soft = min(soft, SOFT_CAP)
    return Verdict(
        strict=strict,
        soft=soft,
        extra=len(blobs) + left_out - explained,
        missing=len(asked) - explained,
        detections=tuple(blob.detection for blob in blobs),
        reason=max(faults, key=lambda fault: fault[0])[1] if faults else "as asked",
    )


def detect(image: NDArray) -> list[Detection]:
    """Find the objects of an image [64, 64, 3], uint8 or float in [0, 1], largest first.

    At most ``segmentation.MAX_BLOBS`` are returned; components of fewer than
    ``segmentation.MIN_BLOB_AREA`` pixels are left out.
    """
    parts = segment(as_float(np.asarray(image)[None]))[0]
    return [blob.detection for blob in parts.blobs]


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

    ``form`` is (IoU with the asked shape's template - 0.4) / (``blobs.MIN_IOU`` - 0.4) in [0, 1],
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

    Faster per image than ``verify``, with the same results.

    Raises:
        ValueError: If the numbers of images and asks differ, or the images' shape or type is not
            as above.
    """
    images = np.asarray(images)
    if len(images) != len(asks):
        raise ValueError(f"{len(images)} images but {len(asks)} asks; give one ask per image")
    verdicts: list[Verdict] = []
    for start in range(0, len(images), _CHUNK):
        chunk = as_float(images[start : start + _CHUNK])
        for parts, ask in zip(segment(chunk), asks[start : start + _CHUNK]):
            verdicts.append(_judge(parts, ask))
    return verdicts
