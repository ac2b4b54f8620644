# SPDX-License-Identifier: Apache-2.0
"""Scenes of plain coloured shapes and the renderer that draws them, 64 x 64, antialiased."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 64
SUPERSAMPLE = 4

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "star")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),
    "orange": (248, 132, 24),
    "yellow": (242, 208, 36),
    "green": (38, 156, 64),
    "blue": (40, 84, 214),
    "purple": (142, 52, 176),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "silver": (196, 198, 202),
    "gray": (120, 122, 126),
    "black": (22, 22, 26),
}

# Half-extents in pixels by number of objects: few objects are drawn larger, as in photographs.
RADIUS_RANGE: dict[int, tuple[float, float]] = {
    1: (9.0, 15.0),
    2: (7.5, 11.5),
    3: (7.0, 9.5),
    4: (6.5, 8.5),
    5: (6.0, 7.5),
}

MIN_GAP = 3.0  # pixels of background between two objects
BORDER = 2.0  # pixels of background between an object and the image edge
RELATION_OFFSET = 12.0  # least distance of two centres along the axis of a rendered relation

RELATIONS: tuple[str, ...] = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        shape: One of ``SHAPES``.
        color: One of ``COLORS``.
        x, y: Centre in pixels; x grows to the right, y downwards.
        radius: Half the side of the square box the shape is inscribed in, pixels.
        rgb: The drawn colour, 0 to 255; the named colour with a little jitter.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, none overlapping."""

    things: tuple[Thing, ...]
    background: str
    background_rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Ask:
    """What a scene must hold: objects as (colour or None, shape), and how they lie.

    ``None`` leaves the colour free. With ``relation`` set there are exactly two objects and the
    first lies on that side of the second.
    """

    things: tuple[tuple[str | None, str], ...]
    relation: str | None = None


def outline(shape: str) -> NDArray[np.float64]:
    """Return a shape's polygon [M, 2] inside the box [-1, 1]^2 (a circle as 48 points)."""
    if shape == "circle":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], 1)
    if shape == "square":
        return 0.88 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    if shape == "triangle":
        return np.array([[0, -0.95], [1, 0.85], [-1, 0.85]], float)
    if shape == "cross":
        a = 0.33
        corners = [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a]]
        return np.array(corners + [[-x, -y] for x, y in corners], float)
    if shape == "star":
        angles = -math.pi / 2 + np.arange(10) * math.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.46)
        points = np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1)
        points[:, 1] += 0.1  # a five-pointed star reaches further up than down
        return points
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


_OUTLINES = {shape: outline(shape) for shape in SHAPES}


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene as an RGB image [64, 64, 3], antialiased by 4 x 4 supersampling."""
    from PIL import Image, ImageDraw

    side = IMAGE_SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side), scene.background_rgb)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        points = _OUTLINES[thing.shape] * thing.radius + (thing.x, thing.y)
        draw.polygon((points * SUPERSAMPLE).ravel().tolist(), fill=thing.rgb)
    return np.asarray(image.reduce(SUPERSAMPLE))


def _jitter(
    rgb: tuple[int, int, int], rng: np.random.Generator, amount: int
) -> tuple[int, int, int]:
    noisy = np.clip(np.array(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(noisy[0]), int(noisy[1]), int(noisy[2])


def related(a: Thing, b: Thing, relation: str, offset: float, dominance: float) -> bool:
    """Return whether ``a`` lies on the named side of ``b``.

    True when the centres differ by at least ``offset`` pixels along the relation's axis and that
    distance is at least ``dominance`` times the distance across it.
    """
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    if relation in ("left", "above"):
        along = -along
    return along >= offset and along >= dominance * abs(across)


def sample_scene(
    ask: Ask,
    rng: np.random.Generator,
    forbidden: frozenset[tuple[str, str]] = frozenset(),
    grid: float = 0.0,
) -> Scene:
    """Draw a random scene that holds exactly what is asked.

    Args:
        ask: The objects and their relation.
        rng: Source of every random choice.
        forbidden: (colour, shape) pairs never chosen where the colour is free.
        grid: Centres lie on multiples of this many pixels and radii are the smallest, the middle
            or the largest of their range; 0 leaves both free.

    Returns:
        A scene whose objects lie apart by ``MIN_GAP`` and inside the image by ``BORDER``.
    """
    count = len(ask.things)
    low, high = RADIUS_RANGE[count]
    background = str(rng.choice(list(BACKGROUNDS)))
    # Pictures of several things of one kind mostly show them alike.
    shared = str(rng.choice(list(COLORS))) if count > 2 or rng.random() < 0.2 else None
    while True:
        things: list[Thing] = []
        for color, shape in ask.things:
            name = color
            if name is None:
                allowed = [c for c in COLORS if (c, shape) not in forbidden]
                name = shared if shared in allowed else str(rng.choice(allowed))
            share = rng.integers(3) / 2 if grid else rng.uniform()
            radius = float(low + share * (high - low))
            edge = radius * 1.1 + BORDER
            for _ in range(40):
                if grid:
                    first, last = math.ceil(edge / grid), math.floor((IMAGE_SIZE - edge) / grid)
                    x, y = grid * rng.integers(first, last + 1, 2)
                else:
                    x, y = rng.uniform(edge, IMAGE_SIZE - edge, 2)
                if all(
                    max(abs(x - t.x), abs(y - t.y)) >= (radius + t.radius) * 1.05 + MIN_GAP
                    for t in things
                ):
                    break
            else:
                break
            things.append(
                Thing(shape, name, float(x), float(y), radius, _jitter(COLORS[name], rng, 10))
            )
        if len(things) < count:
            continue
        if ask.relation is None or related(
            things[0], things[1], ask.relation, RELATION_OFFSET, 1.0
        ):
            return Scene(tuple(things), background, _jitter(BACKGROUNDS[background], rng, 6))
