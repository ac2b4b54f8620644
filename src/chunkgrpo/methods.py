# SPDX-License-Identifier: Apache-2.0
"""The methods this library knows: what each needs and what an iteration costs."""

from __future__ import annotations

from dataclasses import dataclass

from chunkgrpo.config import (
    MEASURED_PLANS,
    Config,
    given_sizes,
    load_config,
    num_chunks,
    num_planned,
    num_trained,
    window_places,
)
from chunkgrpo.core.chunks import num_selected
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
    """

    rollout: int
    measured: int
    trained: int
    rewards: int

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
    size = float(num_planned(config))
    start = sum(place * share for place, share in window_places(config).items())
    if window.kind == "chunk":
        starts = [sum(sizes[:j]) for j in range(len(sizes))]
        chosen = window.indices or tuple(range(len(sizes)))
        size = sum(sizes[j] for j in chosen) / len(chosen)
        start = sum(starts[j] for j in chosen) / len(chosen)
    after = trained + 1 - start - size
    if window.tail == "dpm":
        after = max(1.0, window.tail_fraction * after)
    shared = start + 1 if s.same_noise else 0.0
    rollout = s.prompts * shared + samples * (start + size + after - shared)
    share = 1.0
    if c.selection == "listed" and c.indices:
        share = sum(sizes[j] for j in c.indices) / sum(sizes)
    elif window.kind != "chunk":
        share = num_selected(len(sizes), c.fraction) / len(sizes)
    pairs = samples * size * share
    measured = pairs * (o.updates - 1) / o.updates
    measured += pairs * ((o.anchor == "replay") + (o.kl > 0))
    number = 1 if window.kind == "chunk" else len(sizes)
    scored = samples * (1 + (number if o.credit == "gain" else 0))
    return Cost(round(rollout), round(measured), round(pairs), scored)


def _forward_cost(config: Config, samples: int, steps: int) -> Cost:
    """Count an iteration of an objective of the forward process."""
    s, o = config.sampling, config.objective
    shared = samples - s.prompts if s.same_noise else 0
    nft = o.algorithm == "diffusion_nft"
    times = num_selected(steps, o.forward.fraction) if nft else o.forward.times
    pairs = samples * times
    measured = pairs if nft else pairs * (o.updates - 1) // o.updates
    measured += pairs * ((o.kl > 0) + (not nft and o.forward.ema_weight > 0))
    return Cost(samples * steps - shared, measured, pairs, samples)


def chunk_sizes(config: Config) -> tuple[int, ...]:
    """Chunk sizes; where they are found only from the model, nearly equal ones in their stead."""
    if config.chunks.plan not in MEASURED_PLANS:
        return given_sizes(config)
    steps = num_planned(config)
    number = num_chunks(config) or max(1, min(4, steps // config.chunks.min_size))
    size, longer = divmod(steps, number)
    return (size,) * (number - longer) + (size + 1,) * longer
