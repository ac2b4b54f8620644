# SPDX-License-Identifier: Apache-2.0
"""The values that are passed between the parts of the library; read this file first.

Axes: P prompts x G images per prompt = B samples, prompt-major; K sampler steps; N = K - 1
stochastic, trainable transitions; C chunks; D latent elements.
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
"""Called with (done, total) while a long operation runs."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and everything its source says about it.

    Two prompts with the same text are two prompts: each has its own metadata and negative prompt.

    Attributes:
        text: The prompt itself.
        metadata: Other fields of the source, for rewards whose ``needs_metadata`` is true:
            GenEval's ``include`` and ``exclude``, a text to be rendered.
        negative_prompt: Text of the unconditional half of classifier-free guidance; the policy's
            own setting where None. An empty text overrides that setting too.
        images: Source images, for policies with ``reads_images``; the others raise an error.
        group: Label in reports, such as a task.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    negative_prompt: str | None = None
    images: tuple[Any, ...] = ()
    group: str = "all"


def as_prompts(prompts: Iterable[Prompt | str]) -> tuple[Prompt, ...]:
    """Return prompts as records: texts become records, records are returned unchanged."""
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
    """The states and log-probabilities of a rollout's samples.

    Attributes:
        states: [B, N+1, *latent]; ``states[:, i]`` is the latent at ``sigmas[offset + i]``. Stored
            as ``rollout.Store`` says: read it with :meth:`state`.
        sigmas: [K+1], from 1 (noise) to 0.
        old_log_prob: [B, N], log-density per dimension of each transition under the old policy.
        final: [B, *latent], the clean latent after the deterministic last step.
        conditioning: One row per prompt, P rows; :meth:`conditioning_of` returns those of samples.
        num_prompts: P.
        num_evaluations: Network rows evaluated in the rollout.
        offset: Sampler step of ``states[:, 0]``: 0 unless only a window of steps is stochastic.
        shared_start: Whether all samples of a prompt have the same ``states[:, 0]``.
        velocities: [B, N, *latent] float32, the old policy's predictions at ``states[:, :-1]``;
            stored only where an algorithm compares means or clean predictions with them, and in
            the same place as the states: read them with :meth:`velocity`.
        lost: True for samples of which a number was not finite, [B]: their rows hold another
            sample's numbers, and they must not be trained on. None where there are none.
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
    lost: Tensor | None = None

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
        """Where training happens, wherever states are stored."""
        return self.final.device

    def state(self, sample: Tensor | slice, step: Tensor | int) -> Tensor:
        """Return latents on the device, in float32, bit for bit as the rollout had them.

        Args:
            sample: Which samples, [Q], or a slice.
            step: Position in ``trained_sigmas`` of each, [Q], or one.

        Returns:
            [Q, *latent].
        """
        return at_least_float32(self.states[sample, step].to(self.device))

    def velocity(self, sample: Tensor | slice, step: Tensor | int) -> Tensor:
        """Return the old policy's velocities on the device, as :meth:`state`.

        Raises:
            ValueError: If the rollout stored none.
        """
        if self.velocities is None:
            raise ValueError("the rollout stored no velocities; sample with keep_velocities=True")
        return self.velocities[sample, step].to(self.device)

    def conditioning_of(self, sample: Tensor | slice) -> Conditioning:
        """Return the encoded prompt of each sample, without synchronising with the device.

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
        raw: Scores of each reward, [B]; NaN where there is no usable score.
        total: The combined score, [B]; NaN where a sample is dropped.
        weights: Of the rewards, [R].
        combine: How they were combined, a name in ``core.combination.COMBINATIONS``.
        kept: False for dropped samples, [B]; None where none is dropped.
        watched: Rewards that are logged but not trained on, as ``raw``.
    """

    raw: Mapping[str, Tensor]
    total: Tensor
    weights: Tensor
    combine: str = "sum"
    kept: Tensor | None = None
    watched: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def stacked(self) -> Tensor:
        """Scores of each reward, [R, B]."""
        return torch.stack(list(self.raw.values()))


@dataclass(frozen=True)
class SamplingRequest:
    """What an algorithm needs sampled.

    Attributes:
        window: Sampler steps that are stochastic, stored and trained on; all of them where None.
        keep_velocities: Whether the old policy's velocities are stored.
        chunk_starts: First steps of the chunks within the window; empty for a method without
            chunks.
    """

    window: range | None = None
    keep_velocities: bool = False
    chunk_starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Experience:
    """A trajectory and the credit of its samples.

    Attributes:
        trajectory: B samples.
        advantages: [B], or [B, C] where credit differs by chunk.
        chosen: Indices of the samples that are trained on, ascending; all where None.
    """

    trajectory: Trajectory
    advantages: Tensor
    chosen: Tensor | None = None


@dataclass(frozen=True)
class LossPart:
    """One pre-scaled piece of the loss.

    The values and the gradients of the pieces up to and including one with ``ends_update`` sum to
    those of one optimizer step's loss.

    Attributes:
        loss: Scalar to back-propagate at once, by :meth:`backward`.
        ends_update: True on the last piece before an optimizer step.
        diagnostics: Detached tensors that describe this piece.
        hook: Back-propagates in place of ``loss.backward()``, for an algorithm that observes the
            gradient; None otherwise.
    """

    loss: Tensor
    ends_update: bool
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    hook: Callable[[Tensor], None] | None = None

    def backward(self) -> None:
        """Accumulate this piece's gradient in the parameters."""
        if self.hook is None:
            self.loss.backward()
        else:
            self.hook(self.loss)
