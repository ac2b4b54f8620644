# SPDX-License-Identifier: Apache-2.0
"""What a scorer refuses, and what it shows to rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chunkgrpo.rewards import FunctionReward, RewardError, Scorer, make_reward
from chunkgrpo.rewards.overlap import ScoringQueue
from chunkgrpo.rewards.scoring import check_prompts, jointly_kept
from chunkgrpo.types import Prompt, RewardBatch

IMAGES = torch.tensor([0.2, 0.4, 0.6, 0.8]).view(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous()
PROMPTS = ["a", "a", "b", "b"]
NAN = float("nan")


def brightness(images, prompts):
    return images.mean((1, 2, 3))


LIGHT = FunctionReward("light", brightness)


def below_half(name: str = "signed") -> FunctionReward:
    """-0.3, -0.1, 0.1, 0.3."""
    return FunctionReward(name, lambda images, prompts: brightness(images, prompts) - 0.5)


# --- products and minima ------------------------------------------------------------------------


def test_a_negative_score_stops_a_product_by_name(tmp_path: Path) -> None:
    rewards = [(LIGHT, 1.0), (below_half(), 2.0)]
    scorer = Scorer(rewards, combine="product", folder=tmp_path)
    with pytest.raises(RewardError) as caught:
        scorer(IMAGES, PROMPTS, 2, "000001-")
    picture = tmp_path / "000001-signed-0.png"
    assert str(caught.value) == (
        "reward 'signed' returned -0.3; in a product scores may not be negative: shift the reward, "
        f"or combine by 'advantage'; prompt 'a' (image saved as {picture})"
    )
    assert (np.asarray(Image.open(picture)) == 51).all()
    # In a sum, or only watched, it may be negative.
    assert Scorer(rewards)(IMAGES, PROMPTS).kept is None
    watched = Scorer([(LIGHT, 1.0)], [below_half()], combine="product")(IMAGES, PROMPTS)
    assert watched.watched["signed"].tolist() == pytest.approx([-0.3, -0.1, 0.1, 0.3])


def test_a_negative_score_is_dropped_from_a_product() -> None:
    rewards = [(LIGHT, 1.0), (below_half(), 2.0)]
    batch = Scorer(rewards, combine="product", on_error="drop")(IMAGES, PROMPTS)
    assert batch.kept is not None and batch.kept.tolist() == [False, False, True, True]
    assert batch.total[2:].tolist() == pytest.approx([0.6 * 0.1**2, 0.8 * 0.3**2])
    assert batch.total[:2].isnan().all() and batch.raw["signed"][:2].isnan().all()


@pytest.mark.parametrize("combine", ["product", "minimum"])
@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_weights_are_checked_before_anything_is_scored(combine: str, weight: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"weight of reward 'signed' is {weight:g}; combination '{combine}' needs weights "
        "above 0",
    ):
        Scorer([(LIGHT, 1.0), (below_half(), weight)], combine=combine)
    Scorer([(LIGHT, 1.0), (below_half(), weight)])  # a sum may subtract


def test_what_is_no_weight_or_no_combination_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of reward 'light' is nan; it must be finite"):
        Scorer([(LIGHT, NAN)])
    with pytest.raises(ValueError, match="is 'multiply'; it must be one of sum, advantage"):
        Scorer([(LIGHT, 1.0)], combine="multiply")


# --- what rewards see ---------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_reward_that_works_in_place_changes_nothing_for_the_next(overlap: bool) -> None:
    def vandal(images, prompts, metadata):
        scores = brightness(images, prompts)
        images.zero_()
        prompts[:] = ["x"] * len(prompts)
        metadata[0]["word"] = "x"
        return scores

    def counted(images, prompts, metadata):
        seen.append((prompts, [each["word"] for each in metadata]))
        return brightness(images, prompts)

    vandal.needs_metadata = counted.needs_metadata = True  # type: ignore[attr-defined]
    seen: list[tuple[list[str], list[str]]] = []
    known = [{"word": "one"}, {"word": "one"}, {"word": "two"}, {"word": "three"}]
    records = [Prompt(text, dict(each)) for text, each in zip(PROMPTS, known, strict=True)]
    images, prompts = IMAGES.clone(), list(records)
    scorer = Scorer(
        [(FunctionReward("vandal", vandal), 1.0), (FunctionReward("counted", counted), 1.0)],
        [LIGHT],
    )
    with ScoringQueue(scorer, overlap) as queue:
        pending = queue.batch(prompts, 2)
        pending.add(images)
        batch = pending.result()
    expected = [0.2, 0.4, 0.6, 0.8]
    for scores in (*batch.raw.values(), *batch.watched.values()):
        assert scores.tolist() == pytest.approx(expected)
    # Two records of one text keep their own metadata.
    assert seen == [(PROMPTS, ["one", "one", "two", "three"])]
    assert torch.equal(images, IMAGES) and prompts == records
    assert [record.metadata for record in records] == known


def test_prompts_are_checked_with_what_is_known_of_them() -> None:
    class Plain:
        name = "plain"

        def __init__(self):
            self.asked = []

        def check_prompts(self, *given):
            self.asked.append(given)

        def __call__(self, images, prompts):
            return [0.0] * len(prompts)

    class Informed(Plain):
        needs_metadata = True

    for reward, expected in ((Plain(), (["a"],)), (Informed(), (["a"], [{"count": 2}]))):
        check_prompts(reward, [Prompt("a", {"count": 2})])  # type: ignore[arg-type]
        assert reward.asked == [expected]
    check_prompts(LIGHT, ["a"])  # has no opinion


# --- several scorings of the same samples -------------------------------------------------------


def batch_of(**raw: list[float]) -> RewardBatch:
    columns = {name: torch.tensor(values) for name, values in raw.items()}
    kept = torch.stack(list(columns.values())).isfinite().all(0)
    total: torch.Tensor = sum(columns.values())  # type: ignore[assignment]
    lost = None if kept.all() else kept
    return RewardBatch(columns, total, torch.ones(len(columns)), kept=lost)


def test_a_sample_is_kept_where_every_scoring_keeps_it() -> None:
    whole = batch_of(light=[1.0, 2.0, 3.0])
    first, second = batch_of(light=[NAN, 2.0, 3.0]), batch_of(light=[1.0, NAN, 3.0])
    assert jointly_kept([whole, whole]) is None
    kept = jointly_kept([first, whole, second])
    assert kept is not None and kept.tolist() == [False, False, True]


def test_scorings_that_leave_no_sample_name_the_worst_reward() -> None:
    batches = [
        batch_of(light=[1.0, 2.0, NAN], dark=[NAN, 2.0, 3.0]),
        batch_of(light=[1.0, 2.0, 3.0], dark=[1.0, NAN, 3.0]),
    ]
    with pytest.raises(RewardError, match="reward 'dark' and the others left no image with a"):
        jointly_kept(batches)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vlm_judge", {}, "reward 'vlm_judge' needs the options base_url and model; give them"),
        ("vlm_judge", {"base_url": "http://x"}, "'vlm_judge' needs the option model; give it"),
        ("vlm_judge", {}, r"options: \{base_url: BASE_URL, model: MODEL\}"),
        ("clip", {"modle": "x"}, "does not take these options: modle; it takes model, processor"),
        ("brightness", {"level": 1}, "does not take these options: level; it takes name"),
    ],
)
def test_options_that_are_missing_or_unknown_are_named(
    name: str, options: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make_reward(name, options)


def test_rewards_are_called_without_gradients():
    """A reward's own weights, and the images, would otherwise keep whole graphs in memory."""
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def weighted(images, prompts):
        scores = weight * images.mean((1, 2, 3))
        seen.append((torch.is_grad_enabled(), scores.requires_grad))
        return scores

    with torch.enable_grad():
        Scorer([(FunctionReward("weighted", weighted), 1.0)])(IMAGES, PROMPTS)
    assert seen == [(False, False)]
