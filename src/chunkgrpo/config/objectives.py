# SPDX-License-Identifier: Apache-2.0
"""Settings of the objectives: each is the loss of an algorithm with what surrounds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from chunkgrpo.algorithms.awm import AWMLoss
from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.algorithms.nft import NFTLoss
from chunkgrpo.core.learned import Learned
from chunkgrpo.core.names import ByKind, OneOf, check_name
from chunkgrpo.core.plan_rules import AnyPlanRule, PaperPlan
from chunkgrpo.core.selection import ListedSelection, UniformSelection, WeightedSelection
from chunkgrpo.core.windows import AllSteps, AnyWindow
from chunkgrpo.runtime.old_policy import DECAY_SCHEDULES


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
