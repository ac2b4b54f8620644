# SPDX-License-Identifier: Apache-2.0
"""Measures of image health as scores."""

import pytest
import torch

from chunkgrpo.report.health import brightness, diversity, edge_sharpness, saturation, texture
from chunkgrpo.rewards import make_reward
from chunkgrpo.rewards.image_health import MEASURES
from chunkgrpo.rewards.scoring import is_groupwise, scores_of

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", [texture, edge_sharpness, saturation, brightness])
def test_a_score_is_the_measure_of_the_image(function):
    reward = make_reward("image_health", {"measure": function.__name__})
    assert reward.name == function.__name__ and not is_groupwise(reward)
    scores = scores_of(reward, IMAGES, ["a"] * 6)
    torch.testing.assert_close(scores, function(IMAGES).float())


def test_diversity_is_shared_out_to_the_images():
    reward = make_reward("image_health", {"measure": "diversity", "name": "spread"})
    assert reward.name == "spread" and is_groupwise(reward)
    scores = scores_of(reward, IMAGES, ["a"] * 3 + ["b"] * 3, group_size=3)
    torch.testing.assert_close(scores.reshape(2, 3).mean(1), diversity(IMAGES, 2).float())
    # Three plain images: the odd one out is twice as far from the others as they on average.
    gray = torch.tensor([0.2, 0.2, 0.5])[:, None, None, None].expand(3, 3, 16, 16)
    odd = scores_of(reward, gray, ["a"] * 3, group_size=3)
    torch.testing.assert_close(odd, torch.tensor([0.15, 0.15, 0.3]))


def test_unknown_measures_are_refused():
    with pytest.raises(ValueError, match="unknown measure of image health 'sharpness'"):
        make_reward("image_health", {"measure": "sharpness"})
    assert len(MEASURES) == 5
