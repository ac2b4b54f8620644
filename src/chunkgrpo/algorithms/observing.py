# SPDX-License-Identifier: Apache-2.0
"""Measuring how useful each chunk was, during the updates of one iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from chunkgrpo.core.learned import LearnedSelection, gradient_usefulness, reward_usefulness
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.types import LossPart


class ChunkObserver:
    """Observes the pieces of one iteration's loss.

    The selection says what usefulness is. ``"gradient"``: squared gradient norm of the first
    update per network row, for which every piece of the loss must hold steps of one chunk.
    ``"reward"``: the first-order reward gain of the samples of later updates, which the updates
    before were not trained on.

    Args:
        plan: The iteration's chunks.
        selection: The learned selection. Usefulness is corrected for its loss weights.
    """

    def __init__(self, plan: ChunkPlan, selection: LearnedSelection) -> None:
        self.plan, self.kind = plan, selection.usefulness
        row = torch.ones(1, plan.num_steps)
        drawn = selection(plan, row, Generator().manual_seed(0))
        self.weights_C = selection.loss_weights(plan, row, drawn)[0]
        self.update = 0
        self.sums: list[list[Tensor] | None] = [None] * plan.num_chunks
        self.rows = torch.zeros(plan.num_chunks)
        self.gains: list[Mapping[str, Tensor]] = []

    def observed(self, part: LossPart, parameters: Sequence[Tensor]) -> LossPart:
        """Return the piece with a hook that records its gradient where that is needed."""
        diagnostics, first = part.diagnostics, self.update == 0
        self.update += part.ends_update
        if self.kind == "reward":
            if not first and "chunk_log_ratio" in diagnostics:
                self.gains.append(diagnostics)
            return part
        if not first or "step" not in diagnostics or "skipped" in diagnostics:
            return part

        def backward(loss: Tensor) -> None:
            before = [None if p.grad is None else p.grad.clone() for p in parameters]
            loss.backward()
            self.note(diagnostics["step"], before, parameters)

        return replace(part, hook=backward)

    def note(
        self, step_Q: Tensor, before: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> None:
        """Add a piece's gradient to that of its chunk."""
        chunk = int(self.plan.chunk_of_step[step_Q[0]])
        added = [
            p.grad if b is None else p.grad - b
            for p, b in zip(parameters, before, strict=True)
            if p.grad is not None
        ]
        held = self.sums[chunk]
        if held is None:
            self.sums[chunk] = [a.clone() for a in added]
        else:
            torch._foreach_add_(held, added)
        self.rows[chunk] += len(step_Q)

    def usefulness(self) -> Tensor:
        """Return one value per chunk, NaN where it was not measured."""
        number = self.plan.num_chunks
        if self.kind == "gradient":
            nothing = torch.zeros((), dtype=torch.float64)
            norms = [
                sum((g.double().square().sum() for g in held or ()), nothing).cpu()
                for held in self.sums
            ]
            squared_C = torch.stack(norms) / self.weights_C.double().cpu() ** 2
            return known(gradient_usefulness(squared_C, self.rows))
        if not self.gains:
            return torch.full((number,), float("nan"))
        chunk = torch.cat([d["chunk"] for d in self.gains]).cpu()
        gain, credit = (
            torch.cat([d[name] for d in self.gains]).cpu()
            for name in ("chunk_log_ratio", "chunk_advantage")
        )
        mask = torch.nn.functional.one_hot(chunk, number).bool()
        return known(reward_usefulness(gain[:, None].expand(-1, number), credit, mask))


def known(usefulness_C: Tensor) -> Tensor:
    """Return NaN, "not measured", where an update that was left out made a value infinite."""
    return usefulness_C.masked_fill(usefulness_C.isinf(), float("nan"))
