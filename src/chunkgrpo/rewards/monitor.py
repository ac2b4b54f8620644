# SPDX-License-Identifier: Apache-2.0
"""Metrics about the rewards of an iteration."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from chunkgrpo.core.advantages import group_advantages, group_correlation
from chunkgrpo.core.combination import reward_shares
from chunkgrpo.rewards.scoring import Scorer, jointly_kept, num_unscored
from chunkgrpo.types import RewardBatch

DROWNED = 0.05

log = logging.getLogger("chunkgrpo")


class RewardMonitor:
    """Turns scores into metrics, and warns once about each reward without effect on the advantages.

    Args:
        scorer: The rewards.
        convention: Convention of the advantages.
    """

    def __init__(self, scorer: Scorer, convention: str) -> None:
        self.scorer, self.convention = scorer, convention
        self._told: set[tuple[str, str]] = set()

    def record(
        self, scores: Sequence[RewardBatch], num_prompts: int, iteration: int
    ) -> dict[str, Any]:
        """Return the metrics of an iteration.

        Args:
            scores: Of the finished images, last; before them of the same samples where these were
                scored before they were finished: a sample dropped there is dropped altogether.
            num_prompts: P.
            iteration: For messages.

        Returns:
            ``reward_mean`` and ``reward_std`` of the combined score, without dropped samples;
            ``rewards``: the mean of each. With several: ``reward_share``, each one's share of the
            advantages' variance (``core.combination.reward_shares``), and ``reward_zero_spread``,
            the groups it gives one score. With watched ones: ``watched``, the mean of each, and
            ``watched_correlation``, with each trained reward within groups. Where images may be
            dropped: ``dropped``, by reward, and ``dropped_samples``.
        """
        batch = replace(scores[-1], kept=jointly_kept(scores))
        total = batch.total if batch.kept is None else batch.total[batch.kept]
        record: dict[str, Any] = {
            "reward_mean": total.mean(),
            "reward_std": total.std() if len(total) > 1 else 0.0,
            "rewards": {name: finite_mean(values) for name, values in batch.raw.items()},
        }
        record |= self.shares(batch, num_prompts, iteration)
        if batch.watched:
            record["watched"] = {name: finite_mean(v) for name, v in batch.watched.items()}
            record["watched_correlation"] = {
                watched: {
                    trained: correlation(values, raw, num_prompts)
                    for trained, raw in batch.raw.items()
                }
                for watched, values in batch.watched.items()
            }
        if self.scorer.on_error == "drop":
            record["dropped"] = {n: num_unscored(b.raw[n] for b in scores) for n in batch.raw}
            record["dropped"] |= {n: num_unscored([v]) for n, v in batch.watched.items()}
            record["dropped_samples"] = 0 if batch.kept is None else int((~batch.kept).sum())
        return record

    def shares(self, batch: RewardBatch, num_prompts: int, iteration: int) -> dict[str, Any]:
        """Return each reward's share of the advantages; warn about shares that are too small."""
        names, kept = list(batch.raw), batch.kept
        flat = {
            name: int(group_advantages(raw, num_prompts, kept_B=kept).num_zero_spread)
            for name, raw in batch.raw.items()
        }
        for name, groups in flat.items():
            if groups == num_prompts:
                self.warn(
                    name, "flat",
                    f"reward {name!r} gives all images of a prompt the same score, in each of "
                    f"{groups} groups of iteration {iteration}: it teaches nothing there",
                )  # fmt: skip
        if len(names) == 1:
            return {}
        combine = self.scorer.combine
        shares_R = reward_shares(
            batch.stacked,
            self.scorer.weights,
            num_prompts,
            combine,
            self.convention,
            kept,
        )
        shares = dict(zip(names, shares_R.tolist(), strict=True))
        for name, share in shares.items():
            if share < DROWNED and flat[name] < num_prompts:
                other = max(shares, key=lambda n: shares[n])
                fix = "raise its weight"
                if combine == "sum":
                    fix += ", or normalise each reward by itself: scoring.combine=advantage"
                self.warn(
                    name, "drowned",
                    f"reward {name!r} brings {100 * share:.1f} % of the advantages' variance in "
                    f"iteration {iteration} and is drowned by {other!r} "
                    f"({100 * shares[other]:.1f} %); {fix}",
                )  # fmt: skip
        known = {name: share if math.isfinite(share) else None for name, share in shares.items()}
        return {"reward_share": known, "reward_zero_spread": flat}

    def warn(self, name: str, what: str, text: str) -> None:
        """Warn about a reward, once."""
        if (name, what) not in self._told:
            self._told.add((name, what))
            log.warning("%s", text)


def finite_mean(values_B: Tensor) -> float | None:
    """Mean of the finite values; None where there are none."""
    finite = values_B[values_B.isfinite()]
    return finite.mean().item() if len(finite) else None


def correlation(first_B: Tensor, second_B: Tensor, num_prompts: int) -> float | None:
    """Correlation within groups over samples that both score; None where one has no spread."""
    both = first_B.isfinite() & second_B.isfinite()
    value = group_correlation(first_B, second_B, num_prompts, both).item()
    return value if math.isfinite(value) else None
