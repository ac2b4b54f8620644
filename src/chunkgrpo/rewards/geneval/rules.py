# SPDX-License-Identifier: Apache-2.0
"""GenEval's rules on detections: objects, their number, colours and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One object found in an image.

    Attributes:
        label: GenEval's name of its class.
        score: Confidence in [0, 1].
        box: (left, top, right, bottom) in pixels.
        mask: Which pixels are the object's, bool [H, W]; None where unknown.
    """

    label: str
    score: float
    box: Box
    mask: Tensor | None = None


class ColorNamer(Protocol):
    """Names the colours of objects."""

    def __call__(self, image: Tensor, detections: Sequence[Detection]) -> Sequence[str]:
        """Return one of :data:`COLORS` for each detection in an image [3, H, W] in [0, 1]."""
        ...


@dataclass(frozen=True)
class Rules:
    """Thresholds of GenEval. The defaults are the benchmark's, for its Mask2Former.

    Attributes:
        confidence: Objects must be found with more confidence than this.
        counting_confidence: The same for prompts of the task ``counting``.
        max_objects: Objects of a class that count, those of highest confidence first.
        max_overlap: Of two objects of a class whose boxes overlap by this or more (intersection
            over union), the one of lower confidence is removed; with 1 none is.
        position_margin: Objects must be apart by this share of their summed sizes to be beside
            one another.
    """

    confidence: float = 0.3
    counting_confidence: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1

    def __post_init__(self) -> None:
        for field in ("confidence", "counting_confidence", "max_overlap", "position_margin"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number in [0, 1]")
        if self.max_objects < 1:
            raise ValueError(f"max_objects is {self.max_objects}; expected 1 or more")


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, whose last row and column count as inside."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return shared / (area(*a) + area(*b) - shared)


def relations(a: Box, b: Box, margin: float) -> set[str]:
    """Where box ``a`` is, seen from box ``b``: some of :data:`RELATIONS`, or none.

    The offset of the centres is shortened, in each direction, by ``margin`` times the boxes'
    summed extents; what remains must exceed half the offset's full length.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    extent = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    left = [max(abs(o) - margin * e, 0.0) for o, e in zip(offset, extent)]
    if max(left) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    found = set()
    for axis, (before, after) in enumerate((("left of", "right of"), ("above", "below"))):
        if left[axis] / length > 0.5:
            found.add(before if offset[axis] < 0 else after)
    return found


def kept(detections: Sequence[Detection], tag: str, rules: Rules) -> dict[str, list[Detection]]:
    """Group detections by class, the surest first, without unsure, surplus and double ones."""
    least = rules.counting_confidence if tag == "counting" else rules.confidence
    groups: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least:
            groups.setdefault(detection.label, []).append(detection)
    for label, group in groups.items():
        chosen: list[Detection] = []
        for detection in group[: rules.max_objects]:
            if rules.max_overlap >= 1 or all(
                overlap(detection.box, other.box) < rules.max_overlap for other in chosen
            ):
                chosen.append(detection)
        groups[label] = chosen
    return groups


@dataclass(frozen=True)
class Judgement:
    """Whether an image is right, and if not, why.

    Attributes:
        correct: Whether every demand is met.
        reasons: One sentence per unmet demand.
    """

    correct: bool
    reasons: tuple[str, ...]


def judge(
    image: Tensor,
    detections: Sequence[Detection],
    metadata: Mapping[str, Any],
    colors: ColorNamer | None,
    rules: Rules | None = None,
) -> Judgement:
    """Judge an image by GenEval's rules.

    Every entry of ``include`` must be met: at least ``count`` objects of the class; where a
    ``color`` is named, all of the ``count`` surest ones have it; where a ``position`` is named,
    each of them is there seen from each object of the entry it refers to. No entry of ``exclude``
    may be met: ``count`` or more objects of the class.

    Args:
        image: [3, H, W] in [0, 1], for the colours.
        detections: What was found in it.
        metadata: A line of GenEval's ``evaluation_metadata.jsonl``.
        colors: Names colours; may be None where no entry has one.
        rules: Thresholds; None for GenEval's.

    Raises:
        ValueError: If a colour is demanded and ``colors`` is None.

    Reference: GenEval, arXiv:2310.11513, section 3 and its implementation.
    """
    rules = rules or Rules()
    found = kept(detections, metadata["tag"], rules)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for entry in metadata.get("include", ()):
        label, count = entry["class"], entry["count"]
        objects = found.get(label, [])[:count]
        before = len(reasons)
        if len(objects) < count:
            reasons.append(f"expected {count} {label}, found {len(objects)}")
        else:
            if "color" in entry:
                reasons += _wrong_colors(image, objects, entry["color"], colors)
            if "position" in entry and len(reasons) == before:
                relation, target = entry["position"]
                reasons += _wrong_places(objects, label, relation, matched[target], rules)
        matched.append(objects if len(reasons) == before else None)
    for entry in metadata.get("exclude", ()):
        number = len(found.get(entry["class"], ()))
        if number >= entry["count"]:
            reasons.append(f"expected fewer than {entry['count']} {entry['class']}, found {number}")
    return Judgement(not reasons, tuple(reasons))


def _wrong_colors(
    image: Tensor, objects: Sequence[Detection], wanted: str, colors: ColorNamer | None
) -> list[str]:
    if colors is None:
        raise ValueError(
            f"the colour {wanted!r} is asked for, but there is nothing to name colours"
        )
    named = list(colors(image, objects))
    if all(color == wanted for color in named):
        return []
    return [f"expected {wanted} {objects[0].label}, found {' and '.join(named)}"]


def _wrong_places(
    objects: Sequence[Detection],
    label: str,
    relation: str,
    targets: Sequence[Detection] | None,
    rules: Rules,
) -> list[str]:
    if targets is None:
        return [f"nothing for {label} to be {relation}"]
    for thing in objects:
        for target in targets:
            seen = relations(thing.box, target.box, rules.position_margin)
            if relation not in seen:
                where = " and ".join(sorted(seen)) or "at the same place as"
                return [f"expected {label} {relation} {target.label}, found {where}"]
    return []
