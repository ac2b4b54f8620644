# SPDX-License-Identifier: Apache-2.0
"""The tree of settings.

Where a setting chooses between parts of the method (``kind: ...``), the choices are the classes of
``core`` and ``algorithms`` themselves: their fields are the settings, their ``__post_init__`` holds
the bounds. This module holds the sections around them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from chunkgrpo.config.doctor import DoctorConfig
from chunkgrpo.config.model import (
    CompileBlocks,
    FullAdaptation,
    LoraAdaptation,
    ModelConfig,
    NoCompile,
)
from chunkgrpo.config.objectives import (
    AnyObjective,
    AWMObjective,
    ChunkGRPOObjective,
    NFTObjective,
)
from chunkgrpo.config.section import ConfigError, Section
from chunkgrpo.core.combination import COMBINATIONS
from chunkgrpo.core.names import ByKind, OneOf
from chunkgrpo.core.schedules import AnyMerge, AnySchedule, NoMerge, Shifted
from chunkgrpo.core.sde import CpsTransition, DanceDiffusion, FlowDiffusion, OdeDiffusion
from chunkgrpo.credit import Credit
from chunkgrpo.rewards.scoring import ON_ERROR
from chunkgrpo.rollout import PREFIXES, Store
from chunkgrpo.runtime.checkpoints import Checkpointing
from chunkgrpo.runtime.ema import Averaging
from chunkgrpo.runtime.finite import AnyNonFiniteRule, StopNonFinite
from chunkgrpo.runtime.optimizers import Optimization
from chunkgrpo.runtime.solvers import EulerTail, MultistepTail

__all__ = [
    "AWMObjective",
    "AnyObjective",
    "ChunkGRPOObjective",
    "CompileBlocks",
    "Config",
    "ConfigError",
    "EvaluationConfig",
    "FullAdaptation",
    "JudgeConfig",
    "LoraAdaptation",
    "ModelConfig",
    "NFTObjective",
    "NoCompile",
    "PromptConfig",
    "RewardConfig",
    "SamplingConfig",
    "ScoringConfig",
    "Section",
    "WatchedRewardConfig",
    "chunk_objective",
]


class PromptConfig(Section):
    """Prompts to train on and to evaluate with."""

    train: str = Field(
        default="shapes",
        min_length=1,
        description="'shapes', a .txt, .jsonl, .json or .csv file, or a dataset's folder or name.",
    )
    held_out: str = Field(
        default="shapes", min_length=1, description="As prompts.train, for evaluation."
    )
    column: str | None = Field(
        default=None,
        description="Field of records that holds the prompt; null looks for common names.",
    )
    tasks: tuple[str, ...] | None = Field(
        default=None, description="Tasks of the embedded world to train on; null: all."
    )


# --- rewards ------------------------------------------------------------------------------------


class RewardConfig(Section):
    """One reward."""

    name: str = Field(
        default="shapes",
        min_length=1,
        description="A built-in name, package.module:function, or a server's http://host:port.",
    )
    weight: float = Field(default=1.0, description="Weight in the combination of rewards.")
    options: dict[str, Any] = Field(
        default={}, description="Arguments of the reward's constructor."
    )


class WatchedRewardConfig(Section):
    """One reward that is logged and not trained on."""

    name: str = Field(min_length=1, description="As in rewards.")
    options: dict[str, Any] = Field(
        default={}, description="Arguments of the reward's constructor."
    )


class JudgeConfig(WatchedRewardConfig):
    """The reward of the evaluations."""


class ScoringConfig(Section):
    """How rewards are combined, and what an unusable score does."""

    combine: Annotated[str, OneOf(COMBINATIONS)] = Field(
        default="sum",
        description="How several rewards become one signal: 'advantage' normalises each within its "
        "groups before they are added, 'gdpo' then normalises the sum over the batch.",
    )
    on_error: Annotated[str, OneOf(ON_ERROR)] = Field(
        default="stop",
        description="What a missing, not finite or misshapen score does: 'stop' ends the run with "
        "everything saved, 'drop' removes the sample from its group.",
    )
    quantise: bool = Field(
        default=False,
        description="Round images to 8 bits first, so that local and remote rewards get the same "
        "pixels.",
    )


# --- sampling -----------------------------------------------------------------------------------


class SamplingConfig(Section):
    """How images are sampled."""

    steps: int = Field(
        default=17, ge=2, description="Sampler steps; all but the last can be trained on."
    )
    schedule: AnySchedule = Field(default=Shifted(), description="Noise levels of the steps.")
    merge: AnyMerge = Field(
        default=NoMerge(), description="Which steps of the schedule are merged into one."
    )
    transition: Annotated[
        FlowDiffusion | DanceDiffusion | CpsTransition | OdeDiffusion, ByKind()
    ] = Field(
        default=FlowDiffusion(),
        description="The stochastic step; 'ode' is for objectives of the forward process only.",
    )
    prefix: Annotated[str, OneOf(PREFIXES)] = Field(
        default="ode", description="How the steps before the window are taken."
    )
    tail: Annotated[EulerTail | MultistepTail, ByKind()] = Field(
        default=EulerTail(), description="Solver of the steps after the window."
    )
    prompts: int = Field(default=16, ge=1, description="Number of prompts per rollout, P.")
    group_size: int = Field(default=12, ge=2, description="Samples per prompt, G.")
    same_noise: bool = Field(
        default=True, description="Start all samples of a group from the same noise."
    )
    batch_size: int = Field(
        default=96,
        ge=1,
        description="Largest number of samples in one forward, in evaluations too.",
    )
    store: Store = Field(
        default=Store(), description="How trajectories are stored until they are trained on."
    )

    @property
    def images(self) -> int:
        """Images per rollout."""
        return self.prompts * self.group_size


class EvaluationConfig(Section):
    """Evaluations before, during and after training."""

    reward: JudgeConfig = Field(
        default=JudgeConfig(name="shapes", options={"mode": "strict", "name": "strict"}),
        description="The judge: the reward of the evaluations.",
    )
    every: int = Field(
        default=10,
        ge=0,
        description="Iterations between small evaluations while training; 0 turns them off.",
    )
    prompts: int = Field(
        default=96, ge=1, description="Prompts of the small evaluations while training."
    )
    final_prompts: int = Field(
        default=504,
        ge=1,
        description="Held-out prompts of the evaluations before and after training.",
    )
    final_seeds: int = Field(
        default=2, ge=1, description="Images per prompt before and after training."
    )
    seed: int = Field(default=1234, description="Seed of the evaluations' noise and prompts.")
    tasks: tuple[str, ...] | None = Field(
        default=None, description="Tasks of the embedded world to evaluate on; null: all."
    )


class Config(Section):
    """A whole run."""

    name: str = Field(
        default="run", min_length=1, description="Name of the run, and of its folder."
    )
    iterations: int = Field(
        default=50, ge=1, description="Iterations of the run: one rollout and its updates each."
    )
    seed: int = Field(default=0, description="Seed of everything random.")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 keeps torch's default.")
    checkpoints: Checkpointing = Field(
        default=Checkpointing(), description="When checkpoints are written, and which are kept."
    )
    model: ModelConfig = Field(
        default=ModelConfig(), description="The model, and which of its weights are trained."
    )
    prompts: PromptConfig = Field(
        default=PromptConfig(), description="Prompts to train on and to evaluate with."
    )
    rewards: tuple[RewardConfig, ...] = Field(
        default=(RewardConfig(),), min_length=1, description="The rewards that are trained on."
    )
    watched_rewards: tuple[WatchedRewardConfig, ...] = Field(
        default=(), description="Rewards that are computed and logged, not trained on."
    )
    scoring: ScoringConfig = Field(
        default=ScoringConfig(), description="How rewards are combined and checked."
    )
    async_rewards: bool = Field(
        default=False, description="Score images while later ones are sampled; same results."
    )
    sampling: SamplingConfig = Field(
        default=SamplingConfig(), description="How images are sampled."
    )
    credit: Credit = Field(
        default=Credit(),
        description="From scores to advantages, and to the samples that are trained on.",
    )
    objective: AnyObjective = Field(default=ChunkGRPOObjective(), description="The loss.")
    optimizer: Optimization = Field(
        default=Optimization(), description="AdamW and its learning rate."
    )
    ema: Averaging = Field(
        default=Averaging(), description="The average of the weights that is evaluated and saved."
    )
    on_nonfinite: AnyNonFiniteRule = Field(
        default=StopNonFinite(),
        description="What an update does of which a number is NaN or infinite: 'stop' ends the run "
        "before the step, 'skip' leaves the update out.",
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Evaluations before, during and after training."
    )
    doctor: DoctorConfig = Field(
        default=DoctorConfig(), description="The examination before training."
    )


def chunk_objective(config: Config) -> ChunkGRPOObjective:
    """Return the objective of a run that trains chunks.

    Raises:
        ConfigError: If it trains none.
    """
    o = config.objective
    if not isinstance(o, ChunkGRPOObjective):
        raise ConfigError(
            f"objective.kind {o.kind!r} trains on noised clean latents and has no chunks; use "
            "'chunk_grpo'"
        )
    return o
