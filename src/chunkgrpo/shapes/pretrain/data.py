# SPDX-License-Identifier: Apache-2.0
"""Rendered scenes and their captions, true and (some) wrong, for pretraining."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkgrpo.shapes import grammar
from chunkgrpo.shapes.scenes import (
    COLORS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    Ask,
    Scene,
    related,
    render,
    sample_scene,
)

CAPTIONS_PER_SCENE = 3
GRID = 8  # pixels; the VAE's stride, so that a shape has the same code wherever it lies
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# Harder tasks get more scenes: what a model never saw enough of, no reward can bring out.
TASK_SHARES = {
    "single_object": 0.13,
    "two_objects": 0.16,
    "counting": 0.20,
    "colors": 0.13,
    "position": 0.20,
    "color_attribution": 0.18,
}


@dataclass(frozen=True)
class World:
    """Scenes as images and captions.

    Attributes:
        images: uint8 [S, 64, 64, 3].
        captions: Indices into ``texts``, int32 [S, CAPTIONS_PER_SCENE].
        texts: Every distinct caption.
    """

    images: NDArray[np.uint8]
    captions: NDArray[np.int32]
    texts: list[str]


def true_asks(scene: Scene) -> list[tuple[str, Ask]]:
    """List what may truly be said of a scene, as (task, ask)."""
    things = scene.things
    shapes = {t.shape for t in things}
    asks: list[tuple[str, Ask]] = []
    if len(things) == 1:
        (thing,) = things
        asks.append(("single_object", Ask(((None, thing.shape),))))
        asks.append(("colors", Ask(((thing.color, thing.shape),))))
    if len(shapes) == 1:
        asks.append(("counting", Ask(((None, things[0].shape),) * len(things))))
    if len(things) == 2 and len(shapes) == 2:
        for a, b in (things, things[::-1]):
            asks.append(("two_objects", Ask(((None, a.shape), (None, b.shape)))))
            if a.color != b.color:
                named = Ask(((a.color, a.shape), (b.color, b.shape)))
                asks.append(("color_attribution", named))
            for relation in RELATIONS:
                if related(a, b, relation, 10.0, 1.0):
                    asks.append(("position", Ask(((None, a.shape), (None, b.shape)), relation)))
                    if a.color != b.color:
                        both = Ask(((a.color, a.shape), (b.color, b.shape)), relation)
                        asks.append(("color_position", both))
    return asks


def corrupt(task: str, ask: Ask, rng: np.random.Generator) -> Ask:
    """Return an ask of the same task that is wrong in one respect.

    Captions collected from the web are often wrong in such ways; a base model trained on some of
    them can draw what it is asked, but not reliably.
    """
    things = list(ask.things)
    if task == "counting":
        count = len(things) + (1 if rng.random() < 0.5 else -1)
        count = 2 if count < 1 else 3 if count > 4 else count
        return Ask((things[0],) * count)
    if ask.relation is not None and rng.random() < 0.5:
        return Ask(ask.things, OPPOSITE[ask.relation])
    which = int(rng.integers(len(things)))
    color, shape = things[which]
    used_shapes, used_colors = {s for _, s in things}, {c for c, _ in things}
    if color is not None and rng.random() < 0.6:
        color = str(rng.choice([c for c in COLORS if c not in used_colors]))
    else:
        shape = str(rng.choice([s for s in SHAPES if s not in used_shapes]))
    things[which] = (color, shape)
    return Ask(tuple(things), ask.relation)


def make_world(num_scenes: int, seed: int, wrong_captions: float) -> World:
    """Render scenes and caption them.

    Args:
        num_scenes: How many scenes.
        seed: Seed of every choice.
        wrong_captions: Share of captions that are wrong in one respect, 0 to 1.

    Returns:
        The world; no scene shows a held-out pair and no caption is a held-out prompt.
    """
    scene_rng, rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    phrasings: dict[Ask, dict[str, list[str]]] = {}
    pools: dict[str, list[Ask]] = {}
    for task in grammar.TASKS + grammar.EXTRA_TASKS:
        for prompt in grammar.prompts(task, "train"):
            phrasings.setdefault(prompt.ask, {}).setdefault(task, []).append(prompt.text)
        pools[task] = list(dict.fromkeys(p.ask for p in grammar.prompts(task, "train")))
    index: dict[str, int] = {}
    images = np.empty((num_scenes, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    captions = np.empty((num_scenes, CAPTIONS_PER_SCENE), np.int32)
    tasks = scene_rng.choice(
        len(grammar.TASKS), num_scenes, p=[TASK_SHARES[t] for t in grammar.TASKS]
    )
    for i, t in enumerate(tasks):
        task = grammar.TASKS[t]
        ask = pools[task][scene_rng.integers(len(pools[task]))]
        scene = sample_scene(ask, scene_rng, grammar.HELD_OUT_PAIRS, GRID)
        images[i] = render(scene)
        sayable = [(kind, a) for kind, a in true_asks(scene) if kind in phrasings.get(a, {})]
        for c in range(CAPTIONS_PER_SCENE):
            # The first caption belongs to the task the scene was drawn for.
            said = (task, ask) if c == 0 else sayable[rng.integers(len(sayable))]
            if rng.random() < wrong_captions:
                wrong = corrupt(*said, rng)
                if said[0] in phrasings.get(wrong, {}):
                    said = (said[0], wrong)
            options = phrasings[said[1]][said[0]]
            text = options[rng.integers(len(options))]
            captions[i, c] = index.setdefault(text, len(index))
    return World(images, captions, list(index))
