# SPDX-License-Identifier: Apache-2.0
"""Calling rewards, and what an unusable score does.

Whatever a reward returns is checked here, once, before anything is computed from it: a score that
is missing, not finite or of the wrong shape either stops the run or drops its sample, which is
counted. It is never replaced by zero.

Axis names: B samples, prompt-major.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from chunkgrpo.core.combination import COMBINATIONS, combined_rewards
from chunkgrpo.core.finite import NonFiniteError, finite_rows
from chunkgrpo.rewards.answers import as_scores, described
from chunkgrpo.rewards.images import quantised, refuse_nonfinite, saved_image
from chunkgrpo.rewards.protocol import Reward, RewardBroken, RewardError
from chunkgrpo.types import Prompt, RewardBatch, as_prompts

ON_ERROR = ("stop", "drop")
IMAGES = ""  # in the place of a reward's name, where images were told of

log = logging.getLogger("chunkgrpo")


def is_share(reward: Reward) -> bool:
    """Whether a reward's scores are shares in [0, 1], to be shown in per cent."""
    return bool(getattr(reward, "share", False))


def is_groupwise(reward: Reward) -> bool:
    """Whether a reward compares whole groups (see :class:`~.protocol.GroupwiseReward`)."""
    return bool(getattr(reward, "groupwise", False))


def scores_of(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[Prompt | str],
    group_size: int | None = None,
) -> Tensor:
    """Call a reward, without gradient, and check the form of what it returns.

    The reward gets copies, so that one that works in place does not affect the next one.

    Args:
        reward: Called with the images and the prompts' texts, with the group size if it is
            groupwise, and last with the prompts' metadata if its ``needs_metadata`` is true.
        images: [B, 3, H, W] in [0, 1].
        prompts: B, the prompt of each image; a text has empty metadata.
        group_size: G, a divisor of B; needed by groupwise rewards only.

    Returns:
        float32 [B] on the CPU, possibly with numbers that are not finite (None becomes NaN).

    Raises:
        RewardError: If it does not return B numbers, or raises this error itself;
            :class:`RewardBroken` if it raises anything else.
        NonFiniteError: If a pixel is not finite; the reward is not called then.
        ValueError: If the images of a groupwise reward do not form groups.
    """
    refuse_nonfinite(images, prompts)
    records, more = as_prompts(prompts), []
    if is_groupwise(reward):
        if group_size is None or len(prompts) % group_size:
            raise ValueError(
                f"reward {reward.name!r} compares the images of a group, but {len(prompts)} "
                f"images do not form groups of {group_size}; pass group_size and whole groups"
            )
        more.append(group_size)
    if getattr(reward, "needs_metadata", False):
        more.append([dict(record.metadata) for record in records])
    try:
        with torch.no_grad():
            answer = reward(images.clone(), [record.text for record in records], *more)
    except RewardError:
        raise
    except Exception as error:
        raise RewardBroken(reward.name, f"failed: {described(error)}") from error
    scores = as_scores(answer, reward.name)
    if scores.shape != (len(prompts),):
        raise RewardError(
            reward.name,
            f"returned shape {tuple(scores.shape)} for {len(prompts)} images; it must return one "
            "score per image",
        )
    return scores


def check_prompts(reward: Reward, prompts: Sequence[Prompt | str]) -> None:
    """Call a reward's ``check_prompts``, if it has one.

    Args:
        reward: The reward. It gets the texts, and their metadata too if it ``needs_metadata``.
        prompts: Prompts that it will be called with.

    Raises:
        ValueError: The reward's, naming a prompt.
    """
    check = getattr(reward, "check_prompts", None)
    if check is None:
        return
    records = as_prompts(prompts)
    texts = [record.text for record in records]
    if getattr(reward, "needs_metadata", False):
        check(texts, [record.metadata for record in records])
    else:
        check(texts)


@dataclass(frozen=True)
class Problem:
    """A sample to which a reward gave no usable score, and why."""

    index: int
    reason: str


def usable_scores(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[Prompt | str],
    group_size: int | None = None,
) -> tuple[Tensor, list[Problem]]:
    """Call a reward and separate usable scores from others.

    Returns:
        float32 [B], NaN where there is no usable score, and a problem for each of these. If the
        reward fails as a whole, or returns the wrong number of scores, no score is usable.

    Raises:
        RewardBroken: See :func:`scores_of`.
    """
    try:
        scores = scores_of(reward, images, prompts, group_size)
    except RewardBroken:
        raise
    except RewardError as error:
        reasons = [Problem(i, error.reason) for i in range(len(prompts))]
        return torch.full((len(prompts),), float("nan")), reasons
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    problems = [Problem(i, f"returned {scores[i].item()}; scores must be finite") for i in bad]
    return scores.masked_fill(~scores.isfinite(), float("nan")), problems


@dataclass
class Scorer:
    """Scores images with several rewards, and checks the scores.

    Args:
        rewards: (reward, weight) pairs that are trained on.
        watched: Rewards that are only logged.
        combine: How rewards become one (``core.combination.COMBINATIONS``).
        on_error: ``"stop"`` raises :class:`RewardError` at the first score that is not usable;
            ``"drop"`` drops the sample from its group and counts it. A sample that a watched reward
            cannot score is only left out of its mean. In a product, a negative score of a reward
            that is trained on is not usable. An image with a pixel that is not finite is shown to
            no reward: it stops the run, or is dropped.
        folder: Where the image concerned is saved; None: nowhere.
        quantise: Round images to 8 bits first, as a PNG does, so that rewards here and rewards
            behind a server see the same pixels.

    Raises:
        ValueError: If ``combine`` or ``on_error`` is unknown, two rewards have one name, or a
            weight is not finite, or not positive where the combination needs that.
    """

    rewards: Sequence[tuple[Reward, float]]
    watched: Sequence[Reward] = ()
    combine: str = "sum"
    on_error: str = "stop"
    folder: Path | None = None
    quantise: bool = False
    _told: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"unknown on_error {self.on_error!r}; known: {', '.join(ON_ERROR)}")
        names = [reward.name for reward in self.everything]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two rewards are named {name!r}, and metrics are filed by name; give one "
                    "another name, e.g. options: {name: ...}"
                )
        if self.combine not in COMBINATIONS:
            raise ValueError(
                f"the combination of rewards is {self.combine!r}; it must be one of "
                f"{', '.join(COMBINATIONS)}"
            )
        for reward, weight in self.rewards:
            if not math.isfinite(weight):
                raise ValueError(
                    f"the weight of reward {reward.name!r} is {weight}; it must be finite"
                )
            if COMBINATIONS[self.combine].positive and weight <= 0:
                raise ValueError(
                    f"the weight of reward {reward.name!r} is {weight:g}; combination "
                    f"{self.combine!r} needs weights above 0; leave the reward out, or subtract it "
                    "by combination 'sum' or 'advantage'"
                )

    @property
    def everything(self) -> list[Reward]:
        """All rewards, those that are trained on first."""
        return [*(reward for reward, _ in self.rewards), *self.watched]

    @property
    def drops(self) -> bool:
        """Whether samples without a usable score are dropped."""
        return self.on_error == "drop"

    @property
    def weights(self) -> Tensor:
        """The weights of the rewards that are trained on, [R]."""
        return torch.tensor([weight for _, weight in self.rewards])

    def prepare(
        self, images: Tensor, prompts: Sequence[Prompt | str], label: str = ""
    ) -> tuple[Tensor, Tensor | None]:
        """Return the images that rewards get, and which of them they must not see.

        Args:
            images: [B, 3, H, W].
            prompts: B.
            label: Prefix of the name of a saved image.

        Returns:
            The images, and True where one is not finite, [B]; None where all are.

        Raises:
            NonFiniteError: If a pixel is not finite and images are not dropped.
        """
        bad, told = None, IMAGES in self._told
        try:
            refuse_nonfinite(images, prompts, None if told else self.folder, label)
        except NonFiniteError as error:
            if not self.drops:
                raise
            bad, images = ~finite_rows(images).cpu(), images.nan_to_num(0.0, 0.0, 0.0)
            self._told.add(IMAGES)
            if not told:
                log.warning(
                    "%s is not finite; %d of %d images are dropped (shown once; see 'dropped' in "
                    "the metrics)", error.what.rstrip(","), int(bad.sum()), len(bad),
                )  # fmt: skip
        return (quantised(images) if self.quantise else images), bad

    def checked(
        self,
        reward: Reward,
        images: Tensor,
        prompts: Sequence[Prompt | str],
        group_size: int | None = None,
        label: str = "",
        bad: Tensor | None = None,
    ) -> Tensor:
        """Return one reward's scores [B], NaN where an image is dropped.

        Args:
            reward: One of :attr:`everything`.
            images, prompts, group_size: See :func:`scores_of`.
            label: Prefix of the name of a saved image, e.g. the iteration's number.
            bad: True for images that the reward must not see, [B] (:meth:`prepare`); with them the
                whole group for a groupwise reward, which cannot compare what is left of it.

        Raises:
            RewardError: With ``"stop"``, naming the reward, the prompt and the saved image; with
                either if the reward raised an exception.
        """
        if bad is not None:
            return self.checked_among(reward, images, prompts, group_size, label, bad)
        scores, problems = usable_scores(reward, images, prompts, group_size)
        if self.combine == "product" and any(reward is trained for trained, _ in self.rewards):
            # Its power may not exist, and the product of two negative scores would be positive.
            for i in (scores < 0).nonzero().flatten().tolist():
                reason = f"returned {scores[i].item():g}; in a product scores may not be negative: "
                reason += "shift the reward, or combine by 'advantage'"
                problems.append(Problem(i, reason))
            scores = scores.masked_fill(scores < 0, float("nan"))
        if not problems:
            return scores
        first = problems[0]
        if self.on_error == "drop" and reward.name in self._told:
            return scores
        name = f"{label}{reward.name}-{first.index}.png"
        reason = described_problem(first, images, prompts, self.folder, name)
        if self.on_error == "stop":
            raise RewardError(reward.name, reason)
        self._told.add(reward.name)
        log.warning(
            "reward %r %s; %d of %d images are dropped (shown once; see 'dropped' in the metrics)",
            reward.name, reason, len(problems), len(prompts),
        )  # fmt: skip
        return scores

    def checked_among(
        self,
        reward: Reward,
        images: Tensor,
        prompts: Sequence[Prompt | str],
        group_size: int | None,
        label: str,
        bad: Tensor,
    ) -> Tensor:
        """Return one reward's scores [B], which sees the good images alone; NaN elsewhere."""
        if is_groupwise(reward) and group_size:
            bad = bad.reshape(-1, group_size).any(dim=1).repeat_interleave(group_size)
        scores, good = torch.full((len(images),), float("nan")), (~bad).nonzero().flatten()
        if len(good):
            some = [prompts[i] for i in good.tolist()]
            seen = images[good.to(images.device)]
            scores[good] = self.checked(reward, seen, some, group_size, label)
        return scores

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[Prompt | str],
        group_size: int | None = None,
        label: str = "",
    ) -> RewardBatch:
        """Score images with every reward.

        Raises:
            RewardError: Where a score is not usable and ``on_error`` is ``"stop"``, or where every
                image had to be dropped.
            NonFiniteError: Where a pixel is not finite and ``on_error`` is ``"stop"``.
        """
        images, bad = self.prepare(images, prompts, label)
        columns = {
            reward.name: self.checked(reward, images, prompts, group_size, label, bad)
            for reward in self.everything
        }
        return self.combined(columns)

    def combined(self, columns: Mapping[str, Tensor]) -> RewardBatch:
        """Combine what :meth:`checked` returned for each reward, by name."""
        raw = {reward.name: columns[reward.name] for reward, _ in self.rewards}
        watched = {r.name: columns[r.name] for r in self.watched if r.name in columns}
        rewards_RB = torch.stack(list(raw.values()))
        kept = rewards_RB.isfinite().all(dim=0)
        if not kept.any():
            worst = min(raw, key=lambda name: int(raw[name].isfinite().sum()))
            raise RewardError(
                worst, "and the others left no image with a usable score; there is nothing to learn"
            )
        total = combined_rewards(rewards_RB, self.weights, self.combine, kept)
        lost = None if kept.all() else kept
        return RewardBatch(raw, total, self.weights, self.combine, lost, watched)


def described_problem(
    problem: Problem,
    images: Tensor,
    prompts: Sequence[Prompt | str],
    folder: Path | None,
    name: str,
) -> str:
    """Save the image that a problem is about; return the problem with its prompt and the path."""
    path = saved_image(images[problem.index], folder, name)
    saved = f" (image saved as {path})" if path else ""
    [prompt] = as_prompts([prompts[problem.index]])
    return f"{problem.reason}; prompt {prompt.text!r}{saved}"


def jointly_kept(batches: Sequence[RewardBatch]) -> Tensor | None:
    """Return which samples are dropped in none of several scorings of the same samples.

    Args:
        batches: E.g. of the images predicted at each chunk boundary, B samples each.

    Returns:
        [B], False where dropped; None where no sample is.

    Raises:
        RewardError: If no sample is left.
    """
    masks = [batch.kept for batch in batches if batch.kept is not None]
    if not masks:
        return None
    kept = torch.stack(masks).all(dim=0)
    if not kept.any():
        lost = {name: num_unscored(batch.raw[name] for batch in batches) for name in batches[0].raw}
        worst = max(lost, key=lambda name: lost[name])
        raise RewardError(
            worst,
            "and the others left no image with a usable score at every chunk boundary; there is "
            "nothing to learn",
        )
    return kept


def num_unscored(columns: Iterable[Tensor]) -> int:
    """Return the number of samples without a usable score in any of several columns [B]."""
    return int(torch.stack([~column.isfinite() for column in columns]).any(dim=0).sum())


def score(
    rewards: Sequence[tuple[Reward, float]],
    images: Tensor,
    prompts: Sequence[Prompt | str],
    group_size: int | None = None,
    combine: str = "sum",
) -> RewardBatch:
    """Score images with every reward and add them by weight.

    Args:
        rewards: (reward, weight) pairs.
        images: [B, 3, H, W] in [0, 1].
        prompts: B, the prompt of each image.
        group_size: G, needed by groupwise rewards.
        combine: How rewards become one (``core.combination.COMBINATIONS``).

    Raises:
        RewardError: If a reward returns a wrong shape or a number that is not finite; the message
            names the reward and the first prompt concerned. It is a ValueError.
    """
    return Scorer(rewards, combine=combine)(images, prompts, group_size)
