# SPDX-License-Identifier: Apache-2.0
"""The methods this library knows: what each needs and what an iteration costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chunkgrpo.config import (
    MEASURED_PLANS,
    Config,
    branches,
    given_sizes,
    load_config,
    num_chunks,
    num_kept,
    num_planned,
    num_trained,
    window_places,
)
from chunkgrpo.core.chunks import COUNT_TOLERANCE, num_selected
from chunkgrpo.recipes import method_names, recipe_notes


@dataclass(frozen=True)
class Cost:
    """Network rows of one iteration: one row is one latent at one noise level.

    Attributes:
        rollout: Forward, without gradient.
        measured: Forward, without gradient, while training: ratios of the moved policy, replay,
            reference.
        trained: Forward and backward.
        rewards: Images scored.
        pairs: (Image, step) pairs that are trained; more than ``trained`` where images of a prompt
            share a row.
    """

    rollout: int
    measured: int
    trained: int
    rewards: int
    pairs: int

    @property
    def forwards(self) -> int:
        """All network rows that are evaluated; a backward costs about two more each."""
        return self.rollout + self.measured + self.trained


@dataclass(frozen=True)
class Method:
    """A published method as a recipe on the embedded model.

    Attributes:
        name: Of its recipe.
        summary, paper, needs, published: From the recipe's leading comment.
        config: The recipe, resolved.
        cost: Of one iteration.
    """

    name: str
    summary: str
    paper: str
    needs: str
    published: str
    config: Config
    cost: Cost


def read_method(name: str) -> Method:
    """Read a method's recipe."""
    notes, config = recipe_notes(name), load_config(name)
    return Method(
        name,
        notes["summary"],
        notes["paper"],
        notes["needs"],
        notes["published"],
        config,
        iteration_cost(config),
    )


def read_methods() -> list[Method]:
    """Read every method."""
    return [read_method(name) for name in method_names()]


def iteration_cost(config: Config) -> Cost:
    """Count the network rows of one iteration, in the mean over what is drawn at random.

    Weighted choices are counted as uniform ones; chunks that are clipped away and groups without
    spread make an iteration cheaper than this.
    """
    s, c, o, window = config.sampling, config.chunks, config.objective, config.sampling.window
    samples, trained = s.prompts * s.group_size, num_trained(config)
    if o.algorithm != "chunk_grpo":
        return _forward_cost(config, samples, trained + 1)
    sizes = chunk_sizes(config)
    # Where an iteration's stochastic steps begin, how many they are, and how often that is so.
    places = [(start, num_planned(config), p) for start, p in window_places(config).items()]
    if window.kind == "chunk":
        chosen = branches(config) or tuple(range(len(sizes)))
        places = [(sum(sizes[:j]), sizes[j], 1 / len(chosen)) for j in chosen]
    size = sum(length * p for _, length, p in places)
    rollout = 0.0
    for start, length, p in places:
        after = trained + 1 - start - length
        if window.tail == "dpm":
            after = max(1, math.ceil(window.tail_fraction * after - COUNT_TOLERANCE))
        shared = start + 1 if s.same_noise else 0
        rollout += p * (s.prompts * shared + samples * (start + length + after - shared))
    share = 1.0
    if c.selection == "listed" and c.indices:
        share = sum(sizes[j] for j in c.indices) / sum(sizes)
    elif window.kind != "chunk":
        share = num_selected(len(sizes), c.fraction) / len(sizes)
    pairs = num_kept(config) * size * share
    rows = pairs - shared_first_rows(config, pairs)
    measured = rows * (o.updates - 1) / o.updates
    measured += rows * ((o.anchor == "replay") + (o.kl > 0))
    number = 1 if window.kind == "chunk" else len(sizes)
    if o.consistency > 0:  # both chunks of each neighbouring pair, in the later updates
        rows += 2 * (number - 1) * num_kept(config) * (o.updates - 1) / o.updates
    scored = samples * (1 + (number if o.credit == "gain" else 0))
    return Cost(round(rollout), round(measured), round(rows), scored, round(pairs))


def shared_first_rows(config: Config, pairs: float) -> float:
    """Return how many of the trained rows an iteration saves where groups start from one noise.

    The first stochastic step of all images of a prompt is then one row in each update, whatever
    the number k of images in it that train this step. Of P prompts with G images each,
    P (1 - C(PG - G, k) / C(PG, k)) are among k images, in the mean. ``pairs`` bounds the result.
    """
    s, c, o = config.sampling, config.chunks, config.objective
    grouped = c.selection == "learned" and c.usefulness == "gradient"
    if o.algorithm != "chunk_grpo" or not s.same_noise or grouped:
        return 0.0
    images = s.prompts * s.group_size
    sizes = chunk_sizes(config)
    if s.window.kind == "chunk":
        share = 1.0
    elif c.selection == "listed":
        share = float(0 in (c.indices or ()))
    else:
        share = num_selected(len(sizes), c.fraction) / len(sizes)
    k = round(num_kept(config) * share / o.updates)
    absent = math.comb(images - s.group_size, k) / math.comb(images, k)
    return min(o.updates * (k - s.prompts * (1 - absent)), pairs)


def _forward_cost(config: Config, samples: int, steps: int) -> Cost:
    """Count an iteration of an objective of the forward process."""
    s, o = config.sampling, config.objective
    shared = samples - s.prompts if s.same_noise else 0
    nft = o.algorithm == "diffusion_nft"
    times = num_selected(steps, o.forward.fraction) if nft else o.forward.times
    pairs = samples * times
    measured = pairs if nft else pairs * (o.updates - 1) // o.updates
    measured += pairs * ((o.kl > 0) + (not nft and o.forward.ema_weight > 0))
    return Cost(samples * steps - shared, measured, pairs, samples, pairs)


def chunk_sizes(config: Config) -> tuple[int, ...]:
    """Chunk sizes; where they are found only from the model, nearly equal ones in their stead."""
    if config.chunks.plan not in MEASURED_PLANS:
        return given_sizes(config)
    steps = num_planned(config)
    number = num_chunks(config) or max(1, min(4, steps // config.chunks.min_size))
    size, longer = divmod(steps, number)
    return (size,) * (number - longer) + (size + 1,) * longer
