# SPDX-License-Identifier: Apache-2.0
"""Numbers derived from a configuration before anything is loaded."""

from __future__ import annotations

from functools import lru_cache

from chunkgrpo.config.schema import ChunkGRPOObjective, Config, ConfigError
from chunkgrpo.core.schedules import AnyMerge, AnySchedule, MergeEntropy, Native
from chunkgrpo.core.sde import Kernel, kernel_of


def merge_sizes(config: Config) -> tuple[int, ...] | None:
    """Return the number of schedule steps in each sampler step; None where no steps are merged.

    Raises:
        ValueError: If the merged steps do not cover the schedule.
    """
    s = config.sampling
    return _merge_sizes(s.merge, s.schedule, s.steps, kernel_of(s.transition))


@lru_cache(maxsize=64)
def _merge_sizes(
    merge: AnyMerge, schedule: AnySchedule, steps: int, kernel: Kernel
) -> tuple[int, ...] | None:
    """Compute merged steps once for all callers."""
    sigmas = None if isinstance(schedule, Native) else schedule.sigmas(steps)
    return merge.sizes_of(steps, sigmas, kernel.std)


def num_trained(config: Config) -> int:
    """Return N, the trainable steps: all sampler steps but the last."""
    sizes = merge_sizes(config)
    return (len(sizes) if sizes else config.sampling.steps) - 1


def num_planned(config: Config) -> int:
    """Return the steps that the chunk plan covers: those of the window."""
    trained = num_trained(config)
    o = config.objective
    return o.window.num_planned(trained) if isinstance(o, ChunkGRPOObjective) else trained


def merged_steps(config: Config) -> tuple[int, ...]:
    """Return the trainable steps that span several steps of the schedule.

    Raises:
        ConfigError: If there are none.
    """
    # The last sampler step, merged or not, is never trained.
    found = tuple(i for i, size in enumerate((merge_sizes(config) or ())[:-1]) if size > 1)
    if not found:
        merge = config.sampling.merge
        more = "choose kind 'entropy'"
        if isinstance(merge, MergeEntropy):
            more = f"raise its least, {merge.least}, which every single step explores already"
        raise ConfigError(
            f"objective.window.indices 'merged' trains merged steps, and sampling.merge of kind "
            f"{merge.kind!r} takes none of the trained steps together; {more}, or list chunks"
        )
    return found
