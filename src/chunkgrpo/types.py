# SPDX-License-Identifier: Apache-2.0
"""The values that flow through the library; read this file first.

Axes: P prompts x G images per prompt = B samples, prompt-major; K sampler steps; N = K - 1
stochastic, trained transitions; C chunks; D latent elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.core.dynamics import relative_l1
from chunkgrpo.core.precision import at_least_float32

ProgressHook = Callable[[int, int], None]
"""Called with (done, total) while something long runs."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and all that its source says about it.

    Two prompts with one text are two prompts: each keeps its own metadata and negative prompt.

    Attributes:
        text: What to draw.
        metadata: Other fields of the source, for rewards whose ``needs_metadata`` is true:
            GenEval's ``include`` and ``exclude``, a text to be rendered.
        negative_prompt: Text of the unconditional half of classifier-free guidance; the policy's
            own setting where None. An empty text overrides that setting too.
        images: Source images, for policies with ``reads_images``; others refuse them.
        group: Label in reports, such as a task.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    negative_prompt: str | None = None
    images: tuple[Any, ...] = ()
    group: str = "all"


def as_prompts(prompts: Iterable[Prompt | str]) -> tuple[Prompt, ...]:
    """Return prompts as records: texts become records, records pass unchanged."""
    return tuple(Prompt(each) if isinstance(each, str) else each for each in prompts)


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: named tensors that share their first axis, one row per prompt.

    Attributes:
        tensors: E.g. ``{"prompt_embeds": [P, L, E], "pooled": [P, E]}``.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        rows = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"conditioning tensors must share their first axis, got rows {rows}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def repeat_interleave(self, times: int) -> Conditioning:
        """Repeat every row ``times`` times in place (prompt-major groups)."""
        return Conditioning(
            {name: tensor.repeat_interleave(times, 0) for name, tensor in self.tensors.items()}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join rows."""
        names = parts[0].tensors
        return Conditioning({n: torch.cat([part.tensors[n] for part in parts]) for n in names})


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind.

    Attributes:
        states: [B, N+1, *latent]; ``states[:, i]`` is the latent at ``sigmas[offset + i]``. Stored
            as the rollout was told (``rollout.Store``): read it with :meth:`state`.
        sigmas: [K+1], from 1 (noise) to 0.
        old_log_prob: [B, N], per-dimension log-density of each transition under the sampling
            policy.
        final: [B, *latent], the clean latent after the deterministic last step.
        conditioning: One row per prompt, P rows; read those of samples with
            :meth:`conditioning_of`.
        num_prompts: P.
        num_evaluations: Network rows evaluated to make it.
        offset: Sampler step of ``states[:, 0]``: 0 unless only a window of steps is stochastic.
        shared_start: Whether the samples of a prompt all have the same ``states[:, 0]``.
        velocities: [B, N, *latent] float32, what the sampling policy predicted at
            ``states[:, :-1]``; kept only where an algorithm compares means or clean predictions
            with it. It lies where the states lie: read it with :meth:`velocity`.
    """

    states: Tensor
    sigmas: Tensor
    old_log_prob: Tensor
    final: Tensor
    conditioning: Conditioning
    num_prompts: int
    num_evaluations: int
    offset: int = 0
    shared_start: bool = False
    velocities: Tensor | None = None

    @property
    def trained_sigmas(self) -> Tensor:
        """Noise levels of ``states``, [N+1]."""
        return self.sigmas[self.offset : self.offset + self.num_trained + 1]

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.states)

    @property
    def num_trained(self) -> int:
        """N, the number of stochastic transitions."""
        return self.states.shape[1] - 1

    @property
    def device(self) -> torch.device:
        """Where training happens, wherever states are kept."""
        return self.final.device

    def state(self, sample: Tensor | slice, step: Tensor | int) -> Tensor:
        """Return latents on the device, in float32, bit for bit as the rollout met them.

        Args:
            sample: Which samples, [Q], or a slice.
            step: Position in ``trained_sigmas`` of each, [Q], or one.

        Returns:
            [Q, *latent].
        """
        return at_least_float32(self.states[sample, step].to(self.device))

    def velocity(self, sample: Tensor | slice, step: Tensor | int) -> Tensor:
        """Return the sampling policy's velocities on the device, as :meth:`state`.

        Raises:
            ValueError: If the rollout kept none.
        """
        if self.velocities is None:
            raise ValueError("the rollout kept no velocities; roll out with keep_velocities=True")
        return self.velocities[sample, step].to(self.device)

    def conditioning_of(self, sample: Tensor | slice) -> Conditioning:
        """Return the encoded prompt of each sample, without waiting for the device.

        Args:
            sample: Which samples, [Q] on the conditioning's device, or a slice.

        Returns:
            Q rows.
        """
        if isinstance(sample, slice):
            return self.conditioning[self._prompt_of_sample[sample]]
        return self.conditioning[sample // self.group_size]

    @cached_property
    def _prompt_of_sample(self) -> Tensor:
        """Row of ``conditioning`` of each sample, [B], on the device."""
        return torch.arange(self.num_samples, device=self.device) // self.group_size

    @cached_property
    def dynamics(self) -> Tensor:
        """Relative L1 change of each trained step, [B, N] (``core.dynamics.relative_l1``)."""
        return relative_l1(self.states)

    @property
    def group_size(self) -> int:
        """G."""
        return self.num_samples // self.num_prompts


@dataclass(frozen=True)
class RewardBatch:
    """Scores of a batch.

    Attributes:
        raw: Each reward as it scored, [B]; NaN where it gave no usable score.
        total: What they combine to, [B]; NaN where a sample is dropped.
        kept: False for dropped samples, [B]; None where all are kept.
        watched: Rewards that are logged but not trained on, as ``raw``.
    """

    raw: Mapping[str, Tensor]
    total: Tensor
    kept: Tensor | None = None
    watched: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Experience:
    """A trajectory and the credit of its samples: [B], or [B, C] where it differs by chunk."""

    trajectory: Trajectory
    advantages: Tensor


@dataclass(frozen=True)
class LossPart:
    """One pre-scaled piece of the loss.

    The values and the gradients of the pieces up to and including one with ``ends_update`` sum to
    those of one optimizer step's loss.

    Attributes:
        loss: Scalar to back-propagate at once.
        ends_update: True on the last piece before an optimizer step.
        diagnostics: Detached tensors about this piece.
    """

    loss: Tensor
    ends_update: bool
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
