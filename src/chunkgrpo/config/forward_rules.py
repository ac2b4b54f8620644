# SPDX-License-Identifier: Apache-2.0
"""Rules between settings of objectives on the forward process."""

from __future__ import annotations

from torch import Generator

from chunkgrpo.config.derived import num_trained
from chunkgrpo.config.schema import AWMObjective, Config, ConfigError, NFTObjective
from chunkgrpo.config.section import at
from chunkgrpo.core.sde import OdeDiffusion
from chunkgrpo.core.times import ChunkTimes
from chunkgrpo.runtime.solvers import EulerTail


def check_forward(config: Config, objective: NFTObjective | AWMObjective) -> None:
    """Refuse settings of trajectories where the objective reads none."""
    s, kind = config.sampling, objective.kind
    wrong = []
    if s.prefix != "ode":
        wrong.append(f"sampling.prefix {s.prefix!r}")
    if not isinstance(s.tail, EulerTail) and not isinstance(s.transition, OdeDiffusion):
        raise ConfigError(
            f"sampling.tail {s.tail.kind!r} takes the steps of rollouts by the ODE, and "
            f"sampling.transition {s.transition.kind!r} draws noise in each; set it to ode, or "
            "sampling.tail to euler"
        )
    if wrong:
        raise ConfigError(
            f"objective.kind {kind!r} trains on noised clean latents, not on a trajectory with a "
            f"window, and has no use for {', '.join(wrong)}; remove it, or use 'chunk_grpo'"
        )
    check_times(config, objective)


def check_times(config: Config, objective: NFTObjective | AWMObjective) -> None:
    """Refuse times that the schedule lacks, and credit by chunk for times without chunks."""
    times, num_steps = objective.times, num_trained(config) + 1
    with at("objective.times"):
        times.draw(num_steps, 1, Generator())
    if not config.credit.by_chunk:
        return
    if not isinstance(times, ChunkTimes) or (
        isinstance(objective, AWMObjective) and (objective.mode == "sum_first")
    ):
        raise ConfigError(
            "credit.assign 'gain' credits each chunk of times, and needs objective.times of kind "
            "'chunks', and of awm mode 'exp_first'; use these, or credit.assign 'trajectory'"
        )
    if times.window.stop >= num_steps:
        raise ConfigError(
            f"credit.assign 'gain' compares predictions where chunks begin and end, and "
            f"objective.times reach the last of the {num_steps} times, whose end is the image "
            "itself; end the last chunk earlier"
        )
