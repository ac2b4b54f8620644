# SPDX-License-Identifier: Apache-2.0
"""The metrics of an iteration: seconds by phase, and figures of its rollout and loss."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.core.advantages import Advantages
from chunkgrpo.core.dynamics import mean_curve
from chunkgrpo.types import LossPart, RewardBatch, SamplingRequest, Trajectory

Diagnostics = Mapping[str, Tensor]


class PhaseClock:
    """Seconds by phase; synchronises with the device at the end of a phase only."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [("", time.perf_counter())]

    def lap(self, name: str) -> None:
        """End a phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, all its laps together."""
        sums: dict[str, float] = defaultdict(float)
        for (_, start), (name, end) in zip(self.times, self.times[1:], strict=False):
            sums[name] += end - start
        return dict(sums)


class UpdateLog:
    """Collects the diagnostics of an iteration's pieces, without synchronising.

    Attributes:
        diagnostics, losses: Of the pieces, in order.
        norms: Of the gradient, one per update.
        skipped: Updates that were left out; nothing of them is kept.
    """

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostics] = []
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.skipped = 0
        self.begun = 0

    def add(self, part: LossPart) -> None:
        """Add a piece that was back-propagated."""
        self.losses.append(part.loss.detach())
        self.diagnostics.append(part.diagnostics)

    @property
    def present(self) -> tuple[list[Tensor], list[Diagnostics]]:
        """Losses and diagnostics of the update that has begun."""
        return self.losses[self.begun :], self.diagnostics[self.begun :]

    def ended(self, norm: Tensor) -> None:
        """Note that the update was taken, with the norm of its gradient."""
        self.norms.append(norm)
        self.begun = len(self.losses)

    def left_out(self) -> None:
        """Forget the update that has begun, and count it."""
        del self.losses[self.begun :], self.diagnostics[self.begun :]
        self.skipped += 1

    def record(self, num_trained: int) -> dict[str, Any]:
        """Return the metrics; see :func:`summarise` for those of the pieces.

        Returns:
            ``loss``, the sum over the updates; ``grad_norm``, the mean over them, before clipping;
            ``trained_pairs``, the (sample, step) pairs that had a gradient, and ``idle_pairs``,
            those whose coefficient was 0; ``skipped_updates``, which were not finite. These count
            in no other figure, and the first two are None where no update was taken.
        """
        parts = self.diagnostics
        pairs = sum(len(d["sample"]) for d in parts if "sample" in d)
        idle = sum(len(d["skipped"]) for d in parts if "skipped" in d)
        zero = [d["idle"].sum() for d in parts if "idle" in d]
        idle += int(torch.stack(zero).sum()) if zero else 0
        return {
            "loss": torch.stack(self.losses).sum() if self.losses else None,
            "grad_norm": torch.stack(self.norms).mean() if self.norms else None,
            "trained_pairs": pairs - idle,
            "idle_pairs": idle,
            "skipped_updates": self.skipped,
            **summarise(parts, num_trained),
        }


def rollout_record(
    trajectory: Trajectory,
    request: SamplingRequest,
    scores: Sequence[RewardBatch],
    advantages: Advantages,
) -> dict[str, Any]:
    """Return the metrics of a rollout.

    Returns:
        ``advantage_spread``, the mean in-group standard deviation of the rewards;
        ``zero_spread_groups``; ``l1_rel``, the mean relative L1 change of each
        step, empty where none is stored;
        ``rollout_evaluations``, network rows; ``window``, [first, stop) of the stochastic steps
        where these are not all; ``chunk_gain``, the mean gain of each chunk where the predictions
        at the chunks' boundaries were scored.
    """
    window = request.window
    record: dict[str, Any] = {
        "advantage_spread": advantages.spread.mean(),
        "zero_spread_groups": advantages.num_zero_spread,
        "l1_rel": mean_curve(trajectory.dynamics).tolist() if trajectory.num_trained else [],
        "rollout_evaluations": trajectory.num_evaluations,
        "window": [window.start, window.stop] if window else None,
    }
    if len(scores) > 1:
        totals_BE = torch.stack([each.total for each in scores], dim=1)
        record["chunk_gain"] = totals_BE.diff(dim=1).nanmean(0).tolist()
    return record


def summarise(parts: Sequence[Mapping[str, Tensor]], num_trained: int) -> dict[str, Any]:
    """Turn the diagnostics of all pieces into numbers, with one synchronisation for all.

    A key is present only where the algorithm's pieces provide it.

    Returns:
        ``ratio_mean``, ``ratio_std``, ``kl`` (k3 to the old policy, per dimension),
        ``clip_fraction``; ``step_ratio_mean``, ``step_ratio_std`` per step;
        ``chunk_ratio_mean`` and ``chunk_clip_fraction`` per chunk, at the start of each update (so
        the first update adds ratios of 1, none of them clipped);
        ``reference_kl`` where that is on, and the mean squared distance from the velocity of the
        reference, the old and the averaged policy as ``reference_gap``, ``old_gap`` and
        ``ema_gap``. Steps that were not trained on are None.
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for part in parts:
        for name, values in part.items():
            columns[name].append(values)
    joined = {name: torch.cat(values).cpu() for name, values in columns.items()}
    record: dict[str, Any] = {}
    if "log_ratio" in joined:
        ratio, step = joined["log_ratio"].double().exp(), joined["step"]
        record |= {
            "ratio_mean": ratio.mean(),
            "ratio_std": ratio.std(correction=0),
            "kl": (ratio - 1 - joined["log_ratio"].double()).mean(),
        }
        # Times may go one past the trainable steps: the last step has no density, but a time.
        num_steps = max(num_trained, int(step.max()) + 1)
        steps = [ratio[step == i] for i in range(num_steps)]
        record["step_ratio_mean"] = [r.mean().item() if len(r) else None for r in steps]
        record["step_ratio_std"] = [r.std(correction=0).item() if len(r) else None for r in steps]
    if "cut" in joined:
        record["clip_fraction"] = joined["cut"].float().mean()
    if "chunk_log_ratio" in joined:
        chunk_ratio = joined["chunk_log_ratio"].double().exp()
        ids = joined["chunk"]
        chunks = [ids == c for c in range(int(ids.max()) + 1)]
        record["chunk_ratio_mean"] = [
            chunk_ratio[m].mean().item() if m.any() else None for m in chunks
        ]
        record["chunk_clip_fraction"] = [
            joined["cut"][m].float().mean().item() if m.any() else None for m in chunks
        ]
    for name in ("reference_kl", "consistency", "reference_gap", "old_gap", "ema_gap"):
        if name in joined:
            record[name] = joined[name].mean()
    return record
