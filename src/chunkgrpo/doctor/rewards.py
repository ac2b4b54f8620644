# SPDX-License-Identifier: Apache-2.0
"""Whether rewards answer with something to learn from.

Axis names: P prompts, G images of a prompt, R rewards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from chunkgrpo.core.combination import reward_shares
from chunkgrpo.doctor.findings import Measured, failure, ok, warning
from chunkgrpo.doctor.patient import Patient
from chunkgrpo.rewards.images import quantised
from chunkgrpo.rewards.monitor import DROWNED
from chunkgrpo.rewards.protocol import Reward, RewardError
from chunkgrpo.rewards.scoring import is_groupwise, usable_scores

FLAT = 1e-6
"""Spread of scores, in units of their size, that rounding explains."""


def rewards(patient: Patient) -> Iterator[Measured]:
    """Score the images of the trial with every reward, and look at the scores."""
    scorer = patient.trainer.scorer
    images = quantised(patient.images) if scorer.quantise else patient.images
    if not images.isfinite().all():
        wrong = int((~images.flatten(1).isfinite().all(1)).sum())
        yield failure(
            f"{wrong} of {len(images)} images have pixels that are not finite",
            "finite pixels, the only ones that are scored",
            "set model.precision to fp32, or see what the model's decoder does",
        )
        return
    texts = [prompt for prompt in patient.prompts for _ in range(patient.group_size)]
    trained = {id(reward) for reward, _ in scorer.rewards}
    columns: list[Tensor] = []
    judge = patient.trainer.evaluator.judge
    others = [] if any(each is judge for each in scorer.everything) else [judge]
    for reward in [*scorer.everything, *others]:
        started = time.perf_counter()
        try:
            scores, problems = usable_scores(reward, images, texts, patient.group_size)
        except (RewardError, ValueError) as error:
            yield failure(f"reward {reward.name!r} gave no scores: {error}", "", mend(reward))
            continue
        each = (time.perf_counter() - started) / len(images)
        if problems:
            said = (
                f"reward {reward.name!r} {problems[0].reason} ({len(problems)} of {len(images)} "
                "images)"
            )
            lenient = scorer.on_error == "drop" and reward is not judge
            found = warning if lenient and len(problems) < len(images) else failure
            yield found(said, "a finite score for every image", mend(reward))
            continue
        columns += [scores] if id(reward) in trained else []
        yield spread(reward, scores, patient, id(reward) in trained, each)
    if len(columns) > 1 and len(columns) == len(scorer.rewards):
        yield from mixture(patient, torch.stack(columns))


def mend(reward: Reward) -> str:
    """Say what to do about a reward that does not answer."""
    if hasattr(reward, "url"):
        return f"see that its server answers: {getattr(reward, 'url')}"  # noqa: B009
    return "mend the reward: it must return a finite number for any image"


def spread(
    reward: Reward, scores: Tensor, patient: Patient, trained: bool, seconds: float
) -> Measured:
    """Say how a reward's scores differ within groups and between them."""
    scores_PG = scores.double().view(-1, patient.group_size)
    size = float(scores.abs().max())
    within_P = scores_PG.amax(1) - scores_PG.amin(1)
    flat = int((within_P <= FLAT * max(size, 1e-30)).sum())
    overall = float(scores.max() - scores.min())
    said = (
        f"reward {reward.name!r}: {scores.min():.4g} to {scores.max():.4g}, "
        f"{scores_PG.std(1).mean():.3g} within a group; {flat} of {len(scores_PG)} groups without "
        f"spread; {1e3 * seconds:.3g} ms an image"
    )
    if not trained or flat < len(scores_PG):
        return ok(said, "different scores within groups")
    if overall <= FLAT * max(size, 1e-30) and size not in (0.0, 1.0):
        return failure(
            f"{said}: one score for {len(scores)} different images",
            "different scores within groups",
            "a constant reward teaches nothing: see what it reads of the images",
        )
    number = len(scores)
    return warning(
        said,
        "different scores within groups",
        f"nothing could be learned from these {number} images; if success is rare, take easier "
        "prompts, larger groups or a softer reward"
        + ("" if is_groupwise(reward) else ", and see that the reward reads the images"),
    )


def mixture(patient: Patient, rewards_RB: Tensor) -> Iterator[Measured]:
    """Say how much of the advantages' variance each reward brings."""
    trainer = patient.trainer
    scorer = trainer.scorer
    shares_R = reward_shares(
        rewards_RB,
        scorer.weights,
        len(patient.prompts),
        scorer.combine,
        trainer.credit.convention,
    )
    names = [reward.name for reward, _ in scorer.rewards]
    said = ", ".join(f"{n} {100 * s:.2g} %" for n, s in zip(names, shares_R.tolist(), strict=True))
    drowned = [n for n, s in zip(names, shares_R.tolist(), strict=True) if s < DROWNED]
    if not drowned:
        yield ok(f"shares of the advantages' variance: {said}", f"at least {100 * DROWNED:g} %")
        return
    fix = "raise their weights"
    if scorer.combine == "sum":
        fix += ", or normalise each reward by itself: scoring.combine=advantage"
    yield warning(
        f"shares of the advantages' variance: {said}; drowned: {', '.join(drowned)}",
        f"at least {100 * DROWNED:g} % each",
        fix,
    )
