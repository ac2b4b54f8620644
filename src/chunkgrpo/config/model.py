# SPDX-License-Identifier: Apache-2.0
"""Settings of the model, and of which of its weights are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from chunkgrpo.config.section import Section
from chunkgrpo.core.names import ByKind, OneOf
from chunkgrpo.core.schedules import TIMESTEP_ROUNDINGS
from chunkgrpo.policies.execution import OFFLOADABLE, PRECISIONS


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

    path: str = Field(
        default="shapes", min_length=1, description="'shapes', a pipeline folder, or a hub id."
    )
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
