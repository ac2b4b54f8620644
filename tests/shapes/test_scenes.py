# SPDX-License-Identifier: Apache-2.0
"""The renderer keeps objects inside and apart; the grammar's prompts and splits are sound."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from chunkgrpo.shapes.grammar import (
    HELD_OUT_PAIRS,
    TASKS,
    binds_held_out_pair,
    parse,
    prompts,
    sample_prompts,
    words,
)
from chunkgrpo.shapes.scenes import (
    BACKGROUNDS,
    BORDER,
    COLORS,
    IMAGE_SIZE,
    MIN_GAP,
    RADIUS_RANGE,
    RELATION_OFFSET,
    RELATIONS,
    SHAPES,
    Ask,
    outline,
    related,
    render,
    sample_scene,
)

SPLITS = ("train", "held_out", "held_out_pairs")


def _asks(number: int, seed: int) -> list[Ask]:
    return [prompt.ask for prompt in sample_prompts(number, "train", seed)]


@pytest.mark.parametrize("grid", [0, 8])
def test_objects_lie_inside_the_image_and_apart(grid: int) -> None:
    rng = np.random.default_rng(0)
    for ask in _asks(240, 0):
        scene = sample_scene(ask, rng, grid=grid)
        boxes = []
        for thing in scene.things:
            points = outline(thing.shape) * thing.radius + (thing.x, thing.y)
            boxes.append((points.min(0), points.max(0)))
            assert points.min() >= BORDER - 1e-6
            assert points.max() <= IMAGE_SIZE - BORDER + 1e-6
        for (low, high), (other_low, other_high) in itertools.combinations(boxes, 2):
            gap = np.maximum(other_low - high, low - other_high).max()
            assert gap >= MIN_GAP - 1e-6


def test_a_grid_leaves_few_places_and_sizes() -> None:
    rng = np.random.default_rng(3)
    for ask in _asks(240, 1):
        low, high = RADIUS_RANGE[len(ask.things)]
        for thing in sample_scene(ask, rng, grid=8).things:
            assert (thing.x % 8, thing.y % 8) == (0, 0)
            assert thing.radius in (low, (low + high) / 2, high)
    free = [sample_scene(Ask(((None, "star"),)), rng).things[0] for _ in range(20)]
    assert any(thing.x % 8 for thing in free)


def test_scenes_hold_what_is_asked() -> None:
    rng = np.random.default_rng(1)
    for ask in _asks(240, 1):
        scene = sample_scene(ask, rng)
        assert [thing.shape for thing in scene.things] == [shape for _, shape in ask.things]
        for thing, (color, _) in zip(scene.things, ask.things):
            assert color in (None, thing.color)
            assert np.abs(np.subtract(thing.rgb, COLORS[thing.color])).max() <= 10
        assert np.abs(np.subtract(scene.background_rgb, BACKGROUNDS[scene.background])).max() <= 6


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_is_rendered_true(relation: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        a, b = sample_scene(Ask(((None, "star"), (None, "square")), relation), rng).things
        assert related(a, b, relation, RELATION_OFFSET, 1.0)
        assert [r for r in RELATIONS if related(a, b, r, RELATION_OFFSET, 1.01)] in (
            [relation],
            [],  # on the diagonal, where the two axes tie
        )
        assert related(a, b, "left", 0, 0) == (a.x <= b.x)
        assert related(a, b, "above", 0, 0) == (a.y <= b.y)


def test_the_image_shows_the_scene() -> None:
    scene = sample_scene(Ask((("red", "circle"), ("blue", "square"))), np.random.default_rng(3))
    image = render(scene)
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
    for thing in scene.things:
        assert tuple(image[int(thing.y), int(thing.x)]) == thing.rgb
    assert tuple(image[0, 0]) == scene.background_rgb


def test_the_same_seed_gives_the_same_scene_and_image() -> None:
    for ask in _asks(12, 4):
        first, second, other = (sample_scene(ask, np.random.default_rng(s)) for s in (7, 7, 8))
        assert first == second != other
        assert np.array_equal(render(first), render(second))


def test_forbidden_pairs_are_never_rendered() -> None:
    rng = np.random.default_rng(5)
    seen = set()
    for ask in _asks(400, 5):
        scene = sample_scene(ask, rng, HELD_OUT_PAIRS)
        seen |= {(thing.color, thing.shape) for thing in scene.things}
    assert not seen & HELD_OUT_PAIRS
    assert len(seen) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        outline("blob")


def test_texts_are_unique_across_tasks_and_splits() -> None:
    texts = [p.text for task in TASKS for split in SPLITS for p in prompts(task, split)]
    assert len(texts) == len(set(texts)) > 10_000


def test_splits_are_sound() -> None:
    for task in TASKS:
        train, held_out = prompts(task, "train"), prompts(task, "held_out")
        assert train and held_out
        assert 0.15 < len(held_out) / (len(train) + len(held_out)) < 0.35
        assert not any(binds_held_out_pair(p.ask) for p in train + held_out)
        pairs = prompts(task, "held_out_pairs")
        assert all(binds_held_out_pair(p.ask) for p in pairs)
        assert bool(pairs) == (task in ("colors", "color_attribution"))
    with pytest.raises(ValueError, match="unknown split"):
        prompts("colors", "test")
    with pytest.raises(ValueError, match="unknown task"):
        prompts("colours", "train")


def test_every_text_parses_to_its_prompt() -> None:
    for task in TASKS:
        for split in SPLITS:
            for prompt in prompts(task, split)[::17]:
                assert parse(prompt.text) is not None
                assert parse(prompt.text) == prompt
                assert parse(f"  {prompt.text.capitalize()}. ") == prompt


def test_parse_says_what_is_wrong() -> None:
    with pytest.raises(ValueError) as error:
        parse("a photo of a red circel")
    message = str(error.value)
    assert "'a photo of a red circel'" in message
    assert all(name in message for name in (*SHAPES, *COLORS))
    assert "near ones" in message and "a red circle" in message
    with pytest.raises(ValueError, match="not one of the embedded world's"):
        parse("")


def test_articles_and_plurals_are_right() -> None:
    texts = [p.text for task in TASKS for split in SPLITS for p in prompts(task, split)]
    assert any("an orange circle" in text for text in texts)
    assert any("crosses" in text for text in texts)
    for text in texts:
        assert not re.search(r"\ba [aeiou]", text), text
        assert not re.search(r"\ban [^aeiou]", text), text
        assert not re.search(r"crosss|stares|starss", text), text


def test_words_are_those_of_the_prompts() -> None:
    known = words()
    assert list(known) == sorted(set(known))
    assert {*SHAPES, *COLORS, "crosses", "an", "left", "plain"} <= set(known)
    for task in TASKS:
        for prompt in prompts(task, "train")[::29]:
            assert set(prompt.text.split()) <= set(known)


def test_sampled_prompts_are_distinct_even_and_repeatable() -> None:
    drawn = sample_prompts(60, "train", 3)
    assert drawn == sample_prompts(60, "train", 3) != sample_prompts(60, "train", 4)
    assert len({p.text for p in drawn}) == 60
    assert {task: sum(p.task == task for p in drawn) for task in TASKS} == dict.fromkeys(TASKS, 10)
    with pytest.raises(ValueError, match="ask for fewer"):
        sample_prompts(10**7, "train", 0)
