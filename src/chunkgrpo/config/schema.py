# SPDX-License-Identifier: Apache-2.0
"""The tree of settings.

Where a setting chooses between parts of the method (``kind: ...``), the choices are the classes of
``core`` and ``algorithms`` themselves: their fields are the settings, their ``__post_init__`` holds
the bounds. This module holds the sections around them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chunkgrpo.algorithms.awm import AWMLoss
from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.algorithms.nft import NFTLoss
from chunkgrpo.core.combination import COMBINATIONS
from chunkgrpo.core.learned import Learned
from chunkgrpo.core.names import ByKind, OneOf, check_name
from chunkgrpo.core.plan_rules import AnyPlanRule, PaperPlan
from chunkgrpo.core.schedules import TIMESTEP_ROUNDINGS, AnyMerge, AnySchedule, NoMerge, Shifted
from chunkgrpo.core.sde import CpsTransition, DanceDiffusion, FlowDiffusion, OdeDiffusion
from chunkgrpo.core.selection import ListedSelection, UniformSelection, WeightedSelection
from chunkgrpo.core.windows import AllSteps, AnyWindow
from chunkgrpo.credit import Credit
from chunkgrpo.policies.execution import OFFLOADABLE, PRECISIONS
from chunkgrpo.rewards.scoring import ON_ERROR
from chunkgrpo.rollout import PREFIXES, Store
from chunkgrpo.runtime.ema import Averaging
from chunkgrpo.runtime.old_policy import DECAY_SCHEDULES
from chunkgrpo.runtime.optimizers import Optimization
from chunkgrpo.runtime.solvers import EulerTail, MultistepTail


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what to change."""


class Section(BaseModel):
    """Base of the sections: unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True
    )


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraAdaptation:
    """Train low-rank updates of some modules (LoRA).

    Attributes:
        rank: Rank of the updates, at least 1.
        alpha: An update is scaled by alpha / rank; null: alpha = rank.
        targets: Endings of the names of the modules that get one; null: the family's default,
            its attention layers.
    """

    rank: int = 32
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    kind: Literal["lora"] = field(default="lora", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a rank or a scale that trains nothing."""
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0; null takes the rank")


@dataclass(frozen=True)
class FullAdaptation:
    """Train the weights themselves.

    Attributes:
        targets: Names of the modules whose weights are trained; null: the whole transformer.
    """

    targets: tuple[str, ...] | None = None
    kind: Literal["full"] = field(default="full", kw_only=True, repr=False)


@dataclass(frozen=True)
class NoCompile:
    """Do not compile the network."""

    kind: Literal["none"] = field(default="none", kw_only=True, repr=False)


@dataclass(frozen=True)
class CompileBlocks:
    """``torch.compile`` for each block of the transformer.

    Attributes:
        backend: Backend of ``torch.compile``.
    """

    backend: str = "inductor"
    kind: Literal["blocks"] = field(default="blocks", kw_only=True, repr=False)


class ModelConfig(Section):
    """The model, and which of its weights are trained."""

    path: str = Field(default="shapes", description="'shapes', a pipeline folder, or a hub id.")
    adaptation: Annotated[LoraAdaptation | FullAdaptation, ByKind()] = Field(
        default=LoraAdaptation(), description="Which weights are trained."
    )
    device: str = Field(default="auto", description="'auto', 'cpu' or 'cuda'.")
    precision: Annotated[str, OneOf(PRECISIONS)] = Field(
        default="bf16",
        description="Precision of the network's arithmetic. Trained weights, transitions and "
        "densities are float32 in every case; 'fp16' is for sampling alone.",
    )
    lower_frozen: bool = Field(
        default=True,
        description="Keep frozen weights of the transformer's matrix products in model.precision: "
        "the same results in half the memory.",
    )
    text_encoder_precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="'auto' is bf16 on CUDA and fp32 on CPUs. bf16 changes the embeddings.",
    )
    offload: tuple[Annotated[str, OneOf(OFFLOADABLE)], ...] = Field(
        default=(),
        description="Parts that stay in host memory while not in use; 'reference' is for "
        "model.adaptation 'full'.",
    )
    attention_backend: str | None = Field(
        default=None,
        description="Attention kernel by diffusers' name, e.g. native, flash, _native_cudnn.",
    )
    compile: Annotated[NoCompile | CompileBlocks, ByKind()] = Field(
        default=NoCompile(), description="Whether blocks of the transformer are compiled."
    )
    vae_slicing: bool = Field(default=False, description="Decode one image at a time.")
    vae_tiling: bool = Field(
        default=False, description="Decode large images in tiles, which changes them slightly."
    )
    guidance: float = Field(
        default=1.0,
        ge=0,
        description="Guidance scale as the pipeline defines it; 1 is off for most families.",
    )
    height: int | None = Field(
        default=None, gt=0, description="Image height in pixels; null: the pipeline's default."
    )
    width: int | None = Field(
        default=None, gt=0, description="Image width in pixels; null: the pipeline's default."
    )
    negative_prompt: str = Field(
        default="",
        description="Negative prompt of guidance, for prompts without one of their own.",
    )
    max_sequence_length: int | None = Field(
        default=None,
        ge=1,
        description="Length in tokens of the longest text encoder; null: the pipeline's default.",
    )
    timestep: Annotated[str, OneOf(TIMESTEP_ROUNDINGS)] | None = Field(
        default=None,
        description="Rounding of the timestep that the network gets; null: as the scheduler does.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute blocks in the backward pass to save memory."
    )
    options: dict[str, Any] = Field(
        default={},
        description="Options of the family's policy (docs/models.md), e.g. {true_cfg: 4.0}.",
    )
    embedding_cache: str | None = Field(
        default="auto",
        description="Folder of encoded prompts. 'auto' is the user's cache, and none for the "
        "embedded model; null keeps the text encoders loaded.",
    )


class PromptConfig(Section):
    """Prompts to train on and to evaluate with."""

    train: str = Field(
        default="shapes",
        description="'shapes', a .txt, .jsonl, .json or .csv file, or a dataset's folder or name.",
    )
    held_out: str = Field(default="shapes", description="As prompts.train, for evaluation.")
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
        description="A built-in name, package.module:function, or a server's http://host:port.",
    )
    weight: float = Field(default=1.0, description="Weight in the combination of rewards.")
    options: dict[str, Any] = Field(
        default={}, description="Arguments of the reward's constructor."
    )


class WatchedRewardConfig(Section):
    """One reward that is logged and not trained on."""

    name: str = Field(description="As in rewards.")
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


# --- objectives ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkGRPOObjective(ChunkLoss):
    """Chunk-GRPO: one clipped importance ratio per chunk of steps.

    Attributes:
        plan: Where time is cut into chunks.
        selection: Which chunks of each sample are trained on.
        window: Which steps are stochastic and trained on; the others follow the ODE.
    """

    plan: Annotated[AnyPlanRule, ByKind()] = PaperPlan()
    selection: Annotated[
        UniformSelection | WeightedSelection | ListedSelection | Learned, ByKind()
    ] = UniformSelection()
    window: Annotated[AnyWindow, ByKind()] = AllSteps()
    kind: Literal["chunk_grpo"] = field(default="chunk_grpo", kw_only=True, repr=False)


@dataclass(frozen=True)
class NFTObjective(NFTLoss):
    """DiffusionNFT: contrasts velocities on noised clean latents, without densities.

    Attributes:
        old: How the old policy, which samples, follows the trained policy.
    """

    old: Annotated[str, OneOf(DECAY_SCHEDULES)] = "none"
    kind: Literal["diffusion_nft"] = field(default="diffusion_nft", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse an unknown decay."""
        super().__post_init__()
        check_name("decay of the old policy", self.old, DECAY_SCHEDULES)


@dataclass(frozen=True)
class AWMObjective(AWMLoss):
    """AWM: policy gradient with the pretraining loss as log-probability.

    Attributes:
        average: How the averaged policy, towards which ``ema_weight`` pulls, follows the trained
            policy; null: no averaged policy.
    """

    average: Annotated[str, OneOf(DECAY_SCHEDULES)] | None = None
    kind: Literal["awm"] = field(default="awm", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse an averaged policy without its weight, and the reverse."""
        super().__post_init__()
        if self.average is not None:
            check_name("decay of the averaged policy", self.average, DECAY_SCHEDULES)
        if (self.average is None) != (self.ema_weight == 0):
            raise ValueError(
                f"average is {self.average!r} and ema_weight {self.ema_weight}; the weight pulls "
                "towards the averaged policy, so give both (awm and 1 are the published ones), or "
                "null and 0"
            )


AnyObjective = Annotated[ChunkGRPOObjective | NFTObjective | AWMObjective, ByKind()]


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
    checkpoint_every: int = Field(default=10, ge=1, description="Iterations between checkpoints.")
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
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Evaluations before, during and after training."
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
