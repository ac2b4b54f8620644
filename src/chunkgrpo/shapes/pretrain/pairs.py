# SPDX-License-Identifier: Apache-2.0
"""Images with captions that fit them and captions that nearly do, for training and judging CLIP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from chunkgrpo.shapes import grammar
from chunkgrpo.shapes.pretrain.data import OPPOSITE, TASK_SHARES, true_asks
from chunkgrpo.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES, Ask, Scene, render, sample_scene

MISSES = ("color", "colors_exchanged", "count", "shape", "sides")
"""Ways in which a caption is nearly right; see :func:`near_misses`."""

NEGATIVES = 3
"""Captions beside each image that are wrong in one respect."""


@cache
def near_misses(ask: Ask) -> dict[str, tuple[Ask, ...]]:
    """List the asks that differ from one in a single respect, by that respect.

    ``color``: one object has another colour. ``colors_exchanged``: two objects have one another's.
    ``count``: one object more or less. ``shape``: one object, or all of several equal ones, has
    another shape. ``sides``: the relation is reversed. Only asks that the grammar can say, and only
    respects that apply.
    """
    things, found = ask.things, {kind: [] for kind in MISSES}
    alike = len(set(things)) == 1
    for index, (color, shape) in enumerate(things):
        where = range(len(things)) if alike else (index,)
        for kind, others in (
            ("color", [(other, shape) for other in COLORS] if color else []),
            ("shape", [(color, other) for other in SHAPES]),
        ):
            for other in others:
                changed = tuple(other if i in where else t for i, t in enumerate(things))
                found[kind].append(Ask(changed, ask.relation))
    if alike:
        found["count"] = [Ask(things[:1] * n) for n in (len(things) - 1, len(things) + 1) if n]
    if len(things) == 2 and not alike:
        (c, s), (d, t) = things
        found["colors_exchanged"] = [Ask(((d, s), (c, t)), ask.relation)]
    if ask.relation is not None:
        found["sides"] = [Ask(things, OPPOSITE[ask.relation])]
    return {
        kind: unique
        for kind, asks in found.items()
        if (unique := tuple(a for a in dict.fromkeys(asks) if a != ask and a in sayable()))
    }


@cache
def sayable() -> frozenset[Ask]:
    """Return everything the grammar can ask for."""
    splits = ("train", "held_out", "held_out_pairs")
    tasks = grammar.TASKS + grammar.EXTRA_TASKS
    return frozenset(
        prompt.ask for task in tasks for split in splits for prompt in grammar.prompts(task, split)
    )


def unclear_asks(scene: Scene) -> list[Ask]:
    """List the relations that a scene shows a little, too little to be called right or wrong."""
    found: list[Ask] = []
    for a, b in itertools.permutations(scene.things, 2):
        leaning = {
            "left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y
        }  # fmt: skip
        for relation in (name for name, holds in leaning.items() if holds):
            found.append(Ask(((None, a.shape), (None, b.shape)), relation))
            found.append(Ask(((a.color, a.shape), (b.color, b.shape)), relation))
    return found


class Captions:
    """The training captions, by what they ask for.

    Attributes:
        texts: Every caption of the training split.
        number_of: Number of each ask that some of them make.
        phrasings: Indices into ``texts``, by the ask's number.
        pools: Asks of each task.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.number_of: dict[Ask, int] = {}
        self.phrasings: list[list[int]] = []
        self.pools: dict[str, list[Ask]] = {}
        for task in grammar.TASKS + grammar.EXTRA_TASKS:
            for prompt in grammar.prompts(task, "train"):
                number = self.number_of.setdefault(prompt.ask, len(self.number_of))
                if number == len(self.phrasings):
                    self.phrasings.append([])
                self.phrasings[number].append(len(self.texts))
                self.texts.append(prompt.text)
            asks = (prompt.ask for prompt in grammar.prompts(task, "train"))
            self.pools[task] = list(dict.fromkeys(asks))

    def numbers(self, asks: Sequence[Ask]) -> list[int]:
        """Return the numbers of those asks that have a caption."""
        return [self.number_of[ask] for ask in asks if ask in self.number_of]


@dataclass(frozen=True)
class PairBatch:
    """Images and captions; the first caption of each image is its own.

    Attributes:
        images: uint8 [B, 64, 64, 3].
        captions: Indices into the texts, [M] with M >= B; caption i < B is image i's own.
        fits: Whether image i may be called what caption j says, [B, M].
        unclear: Where neither is certain, [B, M].
    """

    images: NDArray[np.uint8]
    captions: NDArray[np.int64]
    fits: NDArray[np.bool_]
    unclear: NDArray[np.bool_]


def draw_pairs(captions: Captions, twins: int, rng: np.random.Generator) -> PairBatch:
    """Draw scenes in twins that differ in one respect, with captions right and nearly right.

    Each scene gets a caption that is true of it and ``NEGATIVES`` more that differ from that in
    one respect. Its twin is drawn for such a near miss, so that a caption meets images that are
    nearly right, as an image meets such captions. No scene shows a held-out pair.

    Args:
        captions: What may be said.
        twins: Pairs of scenes; B is twice that.
        rng: Source of every random choice.
    """
    scenes: list[Scene] = []
    own: list[int] = []
    wrong: list[int] = []
    true: list[set[int]] = []
    maybe: list[set[int]] = []
    tasks, shares = list(TASK_SHARES), list(TASK_SHARES.values())
    for _ in range(twins):
        pool = captions.pools[tasks[rng.choice(len(tasks), p=shares)]]
        ask = pool[rng.integers(len(pool))]
        for asked in (ask, _near_miss(ask, captions, rng)):
            scene = sample_scene(asked, rng, grammar.HELD_OUT_PAIRS)
            fitting = captions.numbers([a for _, a in true_asks(scene)])
            unclear = set(captions.numbers(unclear_asks(scene))) - set(fitting)
            # Half of the captions say what the scene was drawn for, half anything true of it.
            said = captions.number_of[asked]
            if rng.random() < 0.5:
                said = fitting[rng.integers(len(fitting))]
            scenes.append(scene)
            own.append(said)
            true.append({said, *fitting})
            maybe.append(unclear - {said})
    asks = list(captions.number_of)
    for said in own:
        wrong += [
            captions.number_of[_near_miss(asks[said], captions, rng)] for _ in range(NEGATIVES)
        ]
    numbers = own + wrong
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i, scene in enumerate(scenes):
        images[i] = render(scene)
    picked = [captions.phrasings[n][rng.integers(len(captions.phrasings[n]))] for n in numbers]
    return PairBatch(
        images,
        np.array(picked, np.int64),
        np.array([[n in fitting for n in numbers] for fitting in true]),
        np.array([[n in unclear for n in numbers] for unclear in maybe]),
    )


def _near_miss(ask: Ask, captions: Captions, rng: np.random.Generator) -> Ask:
    """Draw a near miss that has a training caption, each kind as likely as the others."""
    kinds = [
        usable
        for asks in near_misses(ask).values()
        if (usable := [a for a in asks if a in captions.number_of])
    ]
    kind = kinds[rng.integers(len(kinds))]
    return kind[rng.integers(len(kind))]


@dataclass(frozen=True)
class Trial:
    """An image, a caption that fits it and one that does not.

    Attributes:
        image: uint8 [64, 64, 3].
        task: Of the fitting caption.
        kind: What is wrong with the other one: ``"other"``, any prompt of the task that is not
            true of the image, or one of ``MISSES``.
        right, wrong: The captions.
    """

    image: NDArray[np.uint8]
    task: str
    kind: str
    right: str
    wrong: str


def trials(number: int, split: str, seed: int) -> list[Trial]:
    """Draw images for held-out prompts, and for each a wrong caption of every kind that applies.

    Args:
        number: How many images.
        split: As of ``grammar.sample_prompts``.
        seed: The same seed gives the same trials.

    Returns:
        ``number`` trials of kind ``"other"``, and the near misses. Wrong captions are of the same
        split where it says such a thing, and of any other one where it does not.
    """
    rng = np.random.default_rng([seed, 1])
    splits = [split, *(s for s in ("held_out", "train", "held_out_pairs") if s != split)]
    found: list[Trial] = []
    for prompt in grammar.sample_prompts(number, split, seed):
        # Colours that are free stay clear of the held-out pairs; those asked for do not.
        scene = sample_scene(prompt.ask, rng, grammar.HELD_OUT_PAIRS)
        image = render(scene)
        not_wrong = {prompt.ask, *(a for _, a in true_asks(scene)), *unclear_asks(scene)}
        pool = grammar.prompts(prompt.task, split)
        other = pool[rng.integers(len(pool))]
        while other.ask in not_wrong:
            other = pool[rng.integers(len(pool))]
        found.append(Trial(image, prompt.task, "other", prompt.text, other.text))
        for kind, asks in near_misses(prompt.ask).items():
            options = [ask for ask in asks if ask not in not_wrong]
            if options:
                ask = options[rng.integers(len(options))]
                texts = next(t for s in splits if (t := _texts(s).get(ask)))
                text = texts[rng.integers(len(texts))]
                found.append(Trial(image, prompt.task, kind, prompt.text, text))
    return found


@cache
def _texts(split: str) -> dict[Ask, list[str]]:
    """Group a split's prompts by what they ask for."""
    found: dict[Ask, list[str]] = {}
    for task in grammar.TASKS + grammar.EXTRA_TASKS:
        for prompt in grammar.prompts(task, split):
            found.setdefault(prompt.ask, []).append(prompt.text)
    return found
