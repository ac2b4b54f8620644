# SPDX-License-Identifier: Apache-2.0
"""Prompts for GenEval's six tasks over the embedded world, split into training and held-out.

A prompt is a phrasing of an ``Ask``. Held out are (a) a quarter of all prompt strings, by a hash,
and (b) every prompt that binds one of ``HELD_OUT_PAIRS``: those colour-shape pairs are never
rendered for pretraining and never asked in reinforcement learning.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

from chunkgrpo.shapes.scenes import COLORS, RELATIONS, SHAPES, Ask

TASKS: tuple[str, ...] = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "color_attribution",
)

# Not part of the benchmark, but a thing people ask for: both colours and a relation.
EXTRA_TASKS: tuple[str, ...] = ("color_position",)

HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {("purple", "star"), ("green", "cross"), ("orange", "triangle"), ("blue", "circle")}
)

PREFIXES: tuple[str, ...] = (
    "",
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "a painting of ",
    "a sketch of ",
    "an icon of ",
    "an illustration of ",
    "a scene with ",
    "there is ",
    "we see ",
)
SUFFIXES: tuple[str, ...] = ("", " on a plain background")
ARTICLES: tuple[str, ...] = ("a", "one", "a single")
COUNT_WORDS: dict[int, tuple[str, ...]] = {
    1: ("exactly one", "only one", "just one"),
    2: ("two", "exactly two", "a pair of"),
    3: ("three", "exactly three", "a group of three"),
    4: ("four", "exactly four", "a group of four"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, its task and what a correct image holds."""

    text: str
    task: str
    ask: Ask


def plural(shape: str) -> str:
    """Return a shape's plural ("crosses", "stars")."""
    return shape + ("es" if shape.endswith("s") else "s")


def _noun(article: str, color: str | None, shape: str) -> str:
    words = f"{color} {shape}" if color else shape
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}"


def _bodies(task: str) -> list[tuple[str, Ask]]:
    """List every (text without prefix and suffix, ask) of a task."""
    bodies: list[tuple[str, Ask]] = []
    if task == "single_object":
        bodies = [(_noun(a, None, s), Ask(((None, s),))) for a in ARTICLES for s in SHAPES]
    elif task == "colors":
        bodies = [
            (_noun(a, c, s), Ask(((c, s),))) for a in ARTICLES for c in COLORS for s in SHAPES
        ]
    elif task == "counting":
        for number, words in COUNT_WORDS.items():
            for word, shape in itertools.product(words, SHAPES):
                noun = shape if number == 1 else plural(shape)
                bodies.append((f"{word} {noun}", Ask(((None, shape),) * number)))
    elif task == "two_objects":
        for a, (s, t) in itertools.product(ARTICLES, itertools.permutations(SHAPES, 2)):
            bodies.append(
                (f"{_noun(a, None, s)} and {_noun(a, None, t)}", Ask(((None, s), (None, t))))
            )
    elif task == "position":
        for a, relation, (s, t) in itertools.product(
            ARTICLES, RELATIONS, itertools.permutations(SHAPES, 2)
        ):
            for words in RELATION_WORDS[relation]:
                text = f"{_noun(a, None, s)} {words} {_noun(a, None, t)}"
                bodies.append((text, Ask(((None, s), (None, t)), relation)))
    elif task == "color_attribution":
        for a, (s, t), (c, d) in itertools.product(
            ARTICLES, itertools.permutations(SHAPES, 2), itertools.permutations(COLORS, 2)
        ):
            bodies.append((f"{_noun(a, c, s)} and {_noun(a, d, t)}", Ask(((c, s), (d, t)))))
    elif task == "color_position":
        for relation, (s, t), (c, d) in itertools.product(
            RELATIONS, itertools.permutations(SHAPES, 2), itertools.permutations(COLORS, 2)
        ):
            for words in RELATION_WORDS[relation]:
                text = f"{_noun('a', c, s)} {words} {_noun('a', d, t)}"
                bodies.append((text, Ask(((c, s), (d, t)), relation)))
    else:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS + EXTRA_TASKS)}")
    return bodies


def is_held_out_text(text: str) -> bool:
    """Return whether a prompt string is in the held-out quarter, decided by its SHA-256."""
    return hashlib.sha256(text.encode()).digest()[0] < 64


def binds_held_out_pair(ask: Ask) -> bool:
    """Return whether an ask names one of the held-out colour-shape pairs."""
    return any(thing in HELD_OUT_PAIRS for thing in ask.things)


@cache
def prompts(task: str, split: str) -> tuple[Prompt, ...]:
    """List every prompt of a task in a split, in a fixed order.

    Args:
        task: One of ``TASKS``.
        split: ``"train"``; ``"held_out"`` (unseen strings of seen combinations); or
            ``"held_out_pairs"`` (unseen colour-shape combinations; tasks that name colours only).
    """
    if split not in ("train", "held_out", "held_out_pairs"):
        raise ValueError(f"unknown split {split!r}; known: train, held_out, held_out_pairs")
    found: list[Prompt] = []
    # Only the short prompts carry a suffix, so that every prompt fits into 16 tokens.
    suffixes = SUFFIXES if task in ("single_object", "colors") else ("",)
    prefixes = PREFIXES[:2] if task in EXTRA_TASKS else PREFIXES
    for (body, ask), prefix, suffix in itertools.product(_bodies(task), prefixes, suffixes):
        text = prefix + body + suffix
        kind = "held_out" if is_held_out_text(text) else "train"
        if binds_held_out_pair(ask):
            kind = "held_out_pairs"
        if kind == split:
            found.append(Prompt(text, task, ask))
    unique = {prompt.text: prompt for prompt in found}
    return tuple(unique.values())


def sample_prompts(
    number: int, split: str, seed: int, tasks: tuple[str, ...] = TASKS
) -> list[Prompt]:
    """Draw distinct prompts, as evenly over the tasks as their numbers allow.

    Args:
        number: How many prompts.
        split: As in ``prompts``.
        seed: The same seed gives the same prompts in the same order.
        tasks: Tasks to draw from.

    Raises:
        ValueError: If the split holds fewer prompts than asked.
    """
    rng = np.random.default_rng(seed)
    pools = [list(prompts(task, split)) for task in tasks]
    pools = [[pool[i] for i in rng.permutation(len(pool))] for pool in pools if pool]
    available = sum(len(pool) for pool in pools)
    if number > available:
        raise ValueError(
            f"{number} prompts asked, but split {split!r} holds {available}; ask for fewer"
        )
    picked: list[Prompt] = []
    while len(picked) < number:
        for pool in pools:
            if pool and len(picked) < number:
                picked.append(pool.pop())
    return picked


@cache
def _by_text() -> dict[str, Prompt]:
    every = itertools.product(TASKS + EXTRA_TASKS, ("train", "held_out", "held_out_pairs"))
    table: dict[str, Prompt] = {}
    for task, split in every:
        for prompt in prompts(task, split):
            table[prompt.text] = prompt
    return table


def parse(text: str) -> Prompt:
    """Find the prompt of a text.

    Raises:
        ValueError: If the grammar cannot produce the text; the message shows near ones.
    """
    cleaned = " ".join(text.lower().strip().rstrip(".").split())
    table = _by_text()
    if cleaned in table:
        return table[cleaned]
    import difflib

    near = difflib.get_close_matches(cleaned, list(itertools.islice(table, 0, None, 7)), 3, 0.5)
    hint = "; near ones: " + "; ".join(repr(n) for n in near) if near else ""
    raise ValueError(
        f"the prompt {text!r} is not one of the embedded world's. It knows shapes "
        f"{', '.join(SHAPES)}; colours {', '.join(COLORS)}{hint}"
    )


def words() -> tuple[str, ...]:
    """Return every word the grammar can produce, sorted."""
    return tuple(sorted({word for text in _by_text() for word in text.split()}))
