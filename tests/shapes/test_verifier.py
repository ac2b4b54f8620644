# SPDX-License-Identifier: Apache-2.0
"""The verifier accepts right scenes, rejects wrong ones, and is not fooled by odd images."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from chunkgrpo.shapes.grammar import TASKS, prompts
from chunkgrpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    Ask,
    Scene,
    Thing,
    render,
    sample_scene,
)
from chunkgrpo.shapes.verifier import Verdict, detect, verify, verify_batch

RIGHT_PER_TASK = 334
WRONG_PER_KIND = 286
ODD_PER_KIND = 200
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

Images = NDArray[np.uint8]


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _asks(task: str, number: int, rng: np.random.Generator) -> list[Ask]:
    pool = prompts(task, "train")
    return [pool[i].ask for i in rng.integers(0, len(pool), number)]


@cache
def right(task: str) -> tuple[tuple[Ask, ...], tuple[Scene, ...], Images]:
    """Return asks of a task, scenes that satisfy them and their images."""
    rng = _rng(task)
    asks = _asks(task, RIGHT_PER_TASK, rng)
    scenes = [sample_scene(ask, rng) for ask in asks]
    return tuple(asks), tuple(scenes), np.stack([render(scene) for scene in scenes])


def _other(names: tuple[str, ...], name: str | None, rng: np.random.Generator) -> str:
    return str(rng.choice([n for n in names if n != name]))


def _mixed(number: int, rng: np.random.Generator, tasks: tuple[str, ...] = TASKS) -> list[Ask]:
    return [_asks(tasks[i % len(tasks)], 1, rng)[0] for i in range(number)]


# --- right scenes -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_right_scenes_are_accepted(task: str) -> None:
    asks, scenes, images = right(task)
    verdicts = verify_batch(images, asks)
    assert np.mean([v.strict for v in verdicts]) >= 0.99
    for verdict, scene in zip(verdicts, scenes):
        if verdict.strict:
            found = {(d.shape, d.color) for d in verdict.detections}
            assert found == {(t.shape, t.color) for t in scene.things}


@pytest.mark.parametrize("sigma", [0.5, 0.6])
@pytest.mark.parametrize("task", TASKS)
def test_soft_noisy_shifted_scenes_are_accepted(task: str, sigma: float) -> None:
    asks, _, images = right(task)
    rng = _rng(f"{task} {sigma}")
    chosen = images[:120].astype(float)
    soft = ndimage.gaussian_filter(chosen, (0, sigma, sigma, 0))
    soft += rng.uniform(-15, 15, (len(soft), 1, 1, 3)) + rng.normal(0, 3, soft.shape)
    verdicts = verify_batch(np.clip(soft, 0, 255).astype(np.uint8), asks[:120])
    assert np.mean([v.strict for v in verdicts]) >= 0.97


def test_detections_lie_where_the_things_are() -> None:
    _, scenes, images = right("two_objects")
    for scene, image in zip(scenes[:60], images):
        for thing in scene.things:
            near = min(detect(image), key=lambda d: np.hypot(d.x - thing.x, d.y - thing.y))
            assert (near.shape, near.color) == (thing.shape, thing.color)
            assert np.hypot(near.x - thing.x, near.y - thing.y) < 0.5


def test_bytes_floats_single_and_batch_agree() -> None:
    asks, _, images = right("position")
    batch = verify_batch(images[:40], asks[:40])
    assert batch == [verify(image, ask) for image, ask in zip(images[:40], asks)]
    floats = verify_batch(images[:40] / 255, asks[:40])
    for a, b in zip(batch, floats):
        assert a.strict == b.strict and a.soft == pytest.approx(b.soft, abs=1e-4)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="expected"):
        verify(np.zeros((32, 32, 3), np.uint8), Ask(((None, "circle"),)))
    with pytest.raises(ValueError, match="int64"):
        verify(np.zeros((64, 64, 3), np.int64), Ask(((None, "circle"),)))
    with pytest.raises(ValueError, match="one ask per image"):
        verify_batch(np.zeros((2, 64, 64, 3), np.uint8), [Ask(((None, "circle"),))])
    assert verify_batch(np.zeros((0, 64, 64, 3), np.uint8), []) == []


# --- scenes wrong in one respect ----------------------------------------------------------------


def _count_off(rng: np.random.Generator) -> tuple[Ask, Ask]:
    ask = _asks("counting", 1, rng)[0]
    number = len(ask.things) + (1 if len(ask.things) == 1 else int(rng.choice([-1, 1])))
    return ask, Ask(ask.things[:1] * number)


def _one_color(rng: np.random.Generator) -> tuple[Ask, Ask]:
    ask = _mixed(1, rng, (str(rng.choice(["colors", "color_attribution"])),))[0]
    things = list(ask.things)
    i = int(rng.integers(len(things)))
    things[i] = (_other(tuple(COLORS), things[i][0], rng), things[i][1])
    return ask, dataclasses.replace(ask, things=tuple(things))


def _one_shape(rng: np.random.Generator) -> tuple[Ask, Ask]:
    ask = _mixed(1, rng, (str(rng.choice(TASKS)),))[0]
    things = list(ask.things)
    i = int(rng.integers(len(things)))
    things[i] = (things[i][0], _other(SHAPES, things[i][1], rng))
    return ask, dataclasses.replace(ask, things=tuple(things))


def _sides(rng: np.random.Generator) -> tuple[Ask, Ask]:
    ask = _asks("position", 1, rng)[0]
    return ask, dataclasses.replace(ask, relation=OPPOSITE[str(ask.relation)])


def _attribution(rng: np.random.Generator) -> tuple[Ask, Ask]:
    ask = _asks("color_attribution", 1, rng)[0]
    (c, s), (d, t) = ask.things
    return ask, Ask(((d, s), (c, t)))


def _extra(rng: np.random.Generator) -> tuple[Ask, Ask]:
    # Four asked objects and one more are drawn too rarely apart; three will do.
    ask = _mixed(1, rng, (str(rng.choice(TASKS)),))[0]
    ask = dataclasses.replace(ask, things=ask.things[:3])
    return ask, Ask((*ask.things, (None, str(rng.choice(SHAPES)))))


def _missing(rng: np.random.Generator) -> tuple[Ask, Ask]:
    while True:
        ask = _mixed(1, rng, (str(rng.choice(TASKS)),))[0]
        if len(ask.things) > 1:
            gone = int(rng.integers(len(ask.things)))
            return ask, Ask(tuple(t for i, t in enumerate(ask.things) if i != gone))


WRONG: dict[str, Callable[[np.random.Generator], tuple[Ask, Ask]]] = {
    "count": _count_off,
    "color": _one_color,
    "shape": _one_shape,
    "sides": _sides,
    "attribution": _attribution,
    "extra": _extra,
    "missing": _missing,
}


@cache
def wrong(kind: str) -> tuple[list[Verdict], Images]:
    """Return verdicts on scenes that are wrong in one respect, and their images."""
    rng = _rng(f"wrong {kind}")
    pairs = [WRONG[kind](rng) for _ in range(WRONG_PER_KIND)]
    images = np.stack([render(sample_scene(drawn, rng)) for _, drawn in pairs])
    return verify_batch(images, [ask for ask, _ in pairs]), images


@pytest.mark.parametrize("kind", WRONG)
def test_scenes_wrong_in_one_respect_are_rejected(kind: str) -> None:
    verdicts, _ = wrong(kind)
    assert np.mean([not v.strict for v in verdicts]) >= 0.99
    # Partial credit: most of the scene is right, so it is worth something, but clearly less.
    assert max(v.soft for v in verdicts) <= 0.95
    assert 0.1 < np.mean([v.soft for v in verdicts]) < 0.85


def test_counts_of_extra_and_missing_objects() -> None:
    assert np.mean([(v.extra, v.missing) == (1, 0) for v in wrong("extra")[0]]) >= 0.99
    assert np.mean([(v.extra, v.missing) == (0, 1) for v in wrong("missing")[0]]) >= 0.99
    assert np.mean([(v.extra, v.missing) == (0, 0) for v in wrong("sides")[0]]) >= 0.99
    assert np.mean([(v.extra, v.missing) == (0, 0) for v in wrong("color")[0]]) >= 0.99


def test_reasons_are_sentences_a_person_understands() -> None:
    def reason(asked: Ask, *things: Thing) -> str:
        return verify(render(Scene(things, "white", (246, 246, 246))), asked).reason

    def thing(shape: str, color: str, x: float, y: float = 32) -> Thing:
        return Thing(shape, color, x, y, 9, COLORS[color])

    red = thing("circle", "red", 16)
    blue = thing("square", "blue", 46)
    assert reason(Ask(((None, "circle"),)), red) == "as asked"
    assert reason(Ask(((None, "circle"),)), red, blue) == "an extra object"
    assert reason(Ask((("green", "circle"),)), red) == "the circle is red, not green"
    assert reason(Ask(((None, "circle"), (None, "square"))), red) == "a square is missing"
    both = (("blue", "circle"), ("red", "square"))
    assert reason(Ask(both), red, blue) == "the colours are exchanged"
    sides = Ask(((None, "circle"), (None, "square")), "right")
    assert reason(sides, red, blue) == "left and right are exchanged"
    assert reason(Ask(((None, "star"),)), red) == "there is a circle instead of a star"
    assert reason(Ask(((None, "circle"),) * 3), red) == "only 1 of 3 objects are there"


# --- images that are no scenes ------------------------------------------------------------------


def _right(rng: np.random.Generator) -> tuple[Ask, Scene]:
    ask = _mixed(1, rng, (str(rng.choice(TASKS)),))[0]
    return ask, sample_scene(ask, rng)


def _matte(scene: Scene) -> NDArray[np.float64]:
    """Return how far each pixel is covered by an object, [64, 64, 1] in [0, 1]."""
    things = tuple(dataclasses.replace(t, rgb=(255, 255, 255)) for t in scene.things)
    return render(Scene(things, "black", (0, 0, 0)))[..., :1] / 255.0


def _widest_gap(scene: Scene) -> tuple[float, float, float]:
    """Return the point (x, y) farthest from objects and the edge, and how far, in pixels."""
    free = np.pad(_matte(scene)[1:-1, 1:-1, 0] == 0, 1)
    gaps = np.asarray(ndimage.distance_transform_cdt(free))
    y, x = np.unravel_index(np.argmax(gaps), gaps.shape)
    return float(x), float(y), float(gaps[y, x])


def _behind(scene: Scene, background: NDArray) -> NDArray:
    """Put another background behind a scene's objects."""
    matte = _matte(scene)
    plain = np.array(scene.background_rgb, float)
    return render(scene) + (1 - matte) * (background - plain)


def _noise(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    return rng.uniform(0, 255, (64, 64, 3))


def _gaussian(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    return rng.normal(rng.uniform(60, 200), rng.uniform(15, 80), (64, 64, 3))


def _flat_neutral(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    return np.full((64, 64, 3), rng.uniform(0, 255))


def _flat_saturated(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    return np.full((64, 64, 3), COLORS[str(rng.choice(list(COLORS)))], float)


def _fragments(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    tiles = render(scene).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)
    tiles = tiles[rng.permutation(64)].reshape(8, 8, 8, 8, 3)
    return tiles.swapaxes(1, 2).reshape(64, 64, 3).astype(float)


def _blurred(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    sigma = rng.uniform(2.5, 5)
    return ndimage.gaussian_filter(render(scene).astype(float), (sigma, sigma, 0))


def _dragged(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    length, axis = int(rng.integers(9, 16)), int(rng.integers(2))
    return ndimage.uniform_filter1d(render(scene).astype(float), length, axis, mode="nearest")


def _huge(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    x, y = rng.uniform(24, 40, 2)
    thing = dataclasses.replace(scene.things[0], x=x, y=y, radius=rng.uniform(25, 45))
    return render(dataclasses.replace(scene, things=(thing,))).astype(float)


def _is_light(scene: Scene) -> bool:
    return scene.background in ("white", "silver")


def _checkered(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    cell = int(rng.choice([1, 2, 3, 4, 6, 8]))
    board = (np.indices((64, 64)) // cell).sum(0) % 2
    strength = rng.uniform(24, 80) * (-1 if _is_light(scene) else 1)
    return _behind(scene, np.array(scene.background_rgb) + strength * board[..., None])


def _grid(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    step = int(rng.integers(4, 11))
    lines = ((np.indices((64, 64)) % step) == 0).any(0)
    strength = rng.uniform(35, 90) * (-1 if _is_light(scene) else 1)
    return _behind(scene, np.array(scene.background_rgb) + strength * lines[..., None])


def _gradient(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.indices((64, 64)) - 31.5) / 31.5
    ramp = (np.cos(angle) * x + np.sin(angle) * y) / (abs(np.cos(angle)) + abs(np.sin(angle)))
    center = rng.uniform(70, 185)
    return _behind(scene, (center + rng.uniform(25, 70) * ramp)[..., None] * np.ones(3))


def _ghosts(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    plain = np.array(scene.background_rgb, float)
    return plain + rng.uniform(0.25, 0.55) * (render(scene) - plain)


def _extra_ghost(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    x, y, room = _widest_gap(scene)
    name = str(rng.choice(list(COLORS)))
    radius = min(max(room - 2, 4.0), 9.0)
    ghost = Thing(str(rng.choice(SHAPES)), name, x, y, radius, COLORS[name])
    both = render(dataclasses.replace(scene, things=(*scene.things, ghost))).astype(float)
    alone = render(scene)
    return alone + rng.uniform(0.25, 0.6) * (both - alone)


def _merged(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    first = dataclasses.replace(scene.things[0], x=26.0, y=rng.uniform(28, 36), radius=10.0)
    reach = rng.uniform(10, 17)
    second = dataclasses.replace(first, x=first.x + reach, y=first.y + rng.uniform(-5, 5))
    if len(scene.things) > 1:
        second = dataclasses.replace(second, shape=scene.things[1].shape)
    return render(dataclasses.replace(scene, things=(first, second))).astype(float)


def _cut(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    # Moved over the left or the top edge, by 3 to 6 pixels of the outermost object.
    axis = str(rng.choice(["x", "y"]))
    shift = min(getattr(t, axis) - t.radius for t in scene.things) + rng.uniform(3, 6)
    things = [dataclasses.replace(t, **{axis: getattr(t, axis) - shift}) for t in scene.things]
    return render(dataclasses.replace(scene, things=tuple(things))).astype(float)


def _hollow(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    image = render(scene)
    thickness = int(rng.integers(1, 3))
    inside = ndimage.binary_erosion(_matte(scene)[..., 0] > 0.5, iterations=thickness)
    return np.where(inside[..., None], np.array(scene.background_rgb), image).astype(float)


def _noisy(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    plain = np.array(scene.background_rgb) * 0.7 + 38
    return _behind(scene, plain + rng.normal(0, rng.uniform(13, 40), (64, 64, 3)))


def _tinted(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    names = set(COLORS) - {t.color for t in scene.things}
    chosen = COLORS[str(rng.choice(sorted(names)))] if names else (120, 200, 200)
    return _behind(scene, np.array(chosen, float) * np.ones((64, 64, 1)))


def _specks(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    image = render(scene).astype(float)
    free = np.argwhere(ndimage.minimum_filter(_matte(scene)[..., 0] == 0, 5))
    for y, x in free[rng.choice(len(free), 14, replace=False)]:
        image[y, x] = COLORS[str(rng.choice(list(COLORS)))]
    return image


def _bitten(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    image = render(scene).astype(float)
    for thing in scene.things:
        top, left = round(thing.y - thing.radius), round(thing.x - thing.radius)
        side = round(thing.radius)  # a quarter of the box
        image[top : top + side, left : left + 2 * side] = scene.background_rgb
    return image


def _two_tone(ask: Ask, scene: Scene, rng: np.random.Generator) -> NDArray:
    image = render(scene).astype(float)
    other = tuple(
        dataclasses.replace(t, rgb=COLORS[_other(tuple(COLORS), t.color, rng)])
        for t in scene.things
    )
    second = render(dataclasses.replace(scene, things=other))
    for thing in scene.things:
        low, high = round(thing.y), round(thing.y + 1.2 * thing.radius)
        left, right = round(thing.x - 1.2 * thing.radius), round(thing.x + 1.2 * thing.radius)
        image[low:high, max(left, 0) : right] = second[low:high, max(left, 0) : right]
    return image


# Each kind with the bound on the 95th percentile of soft: images with nothing right in them are
# worth next to nothing, right objects on a bad background or beside a stain keep a part.
ODD: dict[str, tuple[Callable[[Ask, Scene, np.random.Generator], NDArray], float]] = {
    "uniform noise": (_noise, 0.05),
    "gaussian noise": (_gaussian, 0.05),
    "flat neutral": (_flat_neutral, 0.0),
    "flat saturated": (_flat_saturated, 0.0),
    "fragments": (_fragments, 0.25),
    "blurred": (_blurred, 0.7),
    "dragged": (_dragged, 0.8),
    "huge": (_huge, 0.6),
    "checkered": (_checkered, 0.75),
    "grid": (_grid, 0.8),
    "gradient": (_gradient, 0.4),
    "ghosts": (_ghosts, 0.7),
    "extra ghost": (_extra_ghost, 0.85),
    "merged": (_merged, 0.6),
    "cut": (_cut, 0.9),
    "hollow": (_hollow, 0.1),
    "noisy background": (_noisy, 0.5),
    "tinted background": (_tinted, 0.5),
    "specks": (_specks, 0.9),
    "bitten": (_bitten, 0.5),
    "two-tone": (_two_tone, 0.8),
}


@cache
def odd(kind: str) -> tuple[list[Verdict], Images]:
    """Return verdicts on odd images of a kind, and the images."""
    rng = _rng(f"odd {kind}")
    pairs = [_right(rng) for _ in range(ODD_PER_KIND)]
    images = [ODD[kind][0](ask, scene, rng) for ask, scene in pairs]
    stacked = np.clip(np.stack(images), 0, 255).astype(np.uint8)
    return verify_batch(stacked, [ask for ask, _ in pairs]), stacked


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_do_not_fool(kind: str) -> None:
    verdicts, _ = odd(kind)
    assert np.mean([not v.strict for v in verdicts]) >= 0.995
    assert np.quantile([v.soft for v in verdicts], 0.95) <= ODD[kind][1]


# --- the soft score -----------------------------------------------------------------------------


def test_soft_is_one_exactly_where_strict() -> None:
    verdicts = [v for kind in WRONG for v in wrong(kind)[0]]
    verdicts += [v for kind in ODD for v in odd(kind)[0]]
    for task in TASKS:
        asks, _, images = right(task)
        verdicts += verify_batch(images[:60], asks[:60])
    for verdict in verdicts:
        assert 0 <= verdict.soft <= 1
        assert (verdict.soft == 1) == verdict.strict
        assert verdict.strict or verdict.soft <= 0.95


def _worse(ask: Ask, scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """Return scenes that are each worse than a scene in one more respect."""
    things = list(scene.things)
    worse: dict[str, list[Thing]] = {}
    i = int(rng.integers(len(ask.things)))
    worse["removed"] = things[:i] + things[i + 1 :]
    color = ask.things[i][0]
    if color is not None:
        name = _other(tuple(COLORS), color, rng)
        swapped = dataclasses.replace(things[i], color=name, rgb=COLORS[name])
        worse["color"] = [*things[:i], swapped, *things[i + 1 :]]
    if ask.relation is not None:
        a, b = things[:2]
        worse["sides"] = [
            dataclasses.replace(a, x=b.x, y=b.y),
            dataclasses.replace(b, x=a.x, y=a.y),
            *things[2:],
        ]
    x, y, room = _widest_gap(scene)
    radius = min(room - 3, 9.0)
    if radius >= 5:
        name = str(rng.choice(list(COLORS)))
        added = Thing(str(rng.choice(SHAPES)), name, x, y, radius, COLORS[name])
        worse["added"] = [*things, added]
    return {kind: dataclasses.replace(scene, things=tuple(t)) for kind, t in worse.items()}


def test_each_further_mistake_costs() -> None:
    rng = _rng("monotone")
    seen: set[str] = set()
    for ask in _mixed(180, rng):
        scene = sample_scene(ask, rng)
        last, image = 1.0, render(scene)
        assert verify(image, ask).soft == last
        for kind, worse in _worse(ask, scene, rng).items():
            soft = verify(render(worse), ask).soft
            assert soft < last, kind
            seen.add(kind)
            # A second mistake on top of the first. A surplus object may stand in for a lost one
            # and the other way round, so those two are not combined.
            if kind == "added":
                for second, worst in _worse(ask, worse, rng).items():
                    if second in ("added", "color", "sides"):
                        # Where the surplus object stands in, there may be no loss, but no gain.
                        assert verify(render(worst), ask).soft <= soft + 0.01, second
                        seen.add(f"added, then {second}")
    assert {"removed", "color", "sides", "added", "added, then added"} <= seen


def test_nearly_good_shapes_earn_more_than_blobs() -> None:
    ask = Ask((("red", "star"),))
    scene = Scene((Thing("star", "red", 32, 32, 13, COLORS["red"]),), "white", (246, 246, 246))
    image = render(scene).astype(float)
    scores = []
    for sigma in (0.0, 3.0, 6.0, 14.0):
        soft = ndimage.gaussian_filter(image, (sigma, sigma, 0)) if sigma else image
        scores.append(verify(soft.astype(np.uint8), ask).soft)
    assert scores == sorted(scores, reverse=True) and scores[0] == 1
    circle = dataclasses.replace(scene.things[0], shape="circle")
    assert verify(render(dataclasses.replace(scene, things=(circle,))), ask).soft < 0.3


ANY_ASK = st.one_of(
    st.builds(
        lambda things: Ask(tuple(things)),
        st.lists(
            st.tuples(st.none() | st.sampled_from(list(COLORS)), st.sampled_from(SHAPES)),
            min_size=1,
            max_size=4,
        ),
    ),
    st.builds(
        lambda a, b, relation: Ask(((None, a), (None, b)), relation),
        st.sampled_from(SHAPES),
        st.sampled_from(SHAPES),
        st.sampled_from(RELATIONS),
    ),
)


@settings(max_examples=40, deadline=None)
@given(
    small=arrays(np.uint8, (8, 8, 3)),
    ask=ANY_ASK,
    background=st.sampled_from(list(BACKGROUNDS.values())),
    covered=st.booleans(),
)
def test_soft_is_a_share_on_arbitrary_bytes(
    small: Images, ask: Ask, background: tuple[int, int, int], covered: bool
) -> None:
    image = np.kron(small, np.ones((8, 8, 1), np.uint8))
    if covered:  # leaves plain ground, so that something is examined
        image[:16], image[-16:], image[:, :16], image[:, -16:] = (background,) * 4
    verdict = verify(image, ask)
    assert 0 <= verdict.soft <= 1 and (verdict.soft == 1) == verdict.strict
    assert 0 <= verdict.missing <= len(ask.things) and verdict.extra >= 0 and verdict.reason


@settings(max_examples=25, deadline=None)
@given(values=arrays(np.float32, (4, 4, 3), elements=st.floats(width=32)), ask=ANY_ASK)
def test_soft_is_a_share_on_arbitrary_floats(values: NDArray[np.float32], ask: Ask) -> None:
    image = np.kron(values, np.ones((16, 16, 1), np.float32))
    if not np.isfinite(image).all():
        with pytest.raises(ValueError, match="not finite"):
            verify(image, ask)
        return
    verdict = verify(image, ask)
    assert 0 <= verdict.soft <= 1 and (verdict.soft == 1) == verdict.strict
