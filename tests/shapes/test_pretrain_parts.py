# SPDX-License-Identifier: Apache-2.0
"""The parts of pretraining: rounds of the schedule, and what the autoencoder's errors weigh."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.shapes.pretrain.common import OptimizerPair, Round, round_of
from chunkgrpo.shapes.pretrain.transformer import transformer_rounds
from chunkgrpo.shapes.pretrain.vae import contrast_weight, edge_l1, to_signed, vae_rounds


def test_a_step_belongs_to_one_round() -> None:
    rounds = (Round(3), Round(2, peak=0.5, batch_size=8))
    assert [round_of(rounds, step) for step in range(5)] == [
        (rounds[0], 0),
        (rounds[0], 1),
        (rounds[0], 2),
        (rounds[1], 0),
        (rounds[1], 1),
    ]
    with pytest.raises(ValueError, match="step 5 is past the last of 5 steps"):
        round_of(rounds, 5)


def test_the_rate_rises_stays_and_falls_in_each_round() -> None:
    rounds = (Round(8, fall=0.5), Round(4, peak=0.5, fall=1.0))
    optimizers = OptimizerPair(
        [("w", torch.zeros(2, 2)), ("b", torch.zeros(2))], 1.0, 1.0, rounds, 2, ()
    )
    factors = [optimizers.factor(step) for step in range(13)]
    first = [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    second = [0.25, 0.375, 0.25, 0.125]  # half of min(rise 1/2 and 1, fall 1, 3/4, 1/2, 1/4)
    assert factors == [*first, *second, 0.0]


@given(st.integers(2, 50_000))
def test_rounds_use_every_step(steps: int) -> None:
    for rounds in (transformer_rounds(steps), vae_rounds(steps)):
        assert sum(part.steps for part in rounds) == steps


def test_the_shipped_rounds() -> None:
    assert [(r.steps, r.batch_size) for r in transformer_rounds(13_000)] == [
        (7_000, 64),
        (6_000, 128),
    ]


def test_what_stands_out_little_weighs_more() -> None:
    gray, purple, white = (120, 122, 126), (142, 52, 176), (246, 246, 246)
    pictures = torch.empty(3, 40, 40, 3, dtype=torch.uint8)
    pictures[:] = torch.tensor(gray, dtype=torch.uint8)
    pictures[0, 15:25, 15:25] = torch.tensor(purple, dtype=torch.uint8)
    pictures[1, 15:25, 15:25] = torch.tensor(white, dtype=torch.uint8)
    weight = contrast_weight(to_signed(pictures), reach=4)
    assert weight.shape == (3, 1, 40, 40)
    # 22, 70 and 50 of 255 apart: (200 / 88.8)^2; white is 213 away, beyond 200.
    expected = 200**2 / (22**2 + 70**2 + 50**2)
    assert weight[0, 0, 15, 15] == pytest.approx(expected, rel=1e-4)
    assert weight[0, 0, 11, 20] == pytest.approx(expected, rel=1e-4)  # within reach of it
    assert weight[0, 0, 10, 20] == 1  # and one pixel further
    assert weight[0, 0, 19, 19] == 1  # the middle does not see its edge
    assert (weight[1:] == 1).all()


def test_edges_count_by_weight() -> None:
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    a[:, :, 1, 1] = 1.0
    # Each direction has one edge of height 1 in two differences.
    assert edge_l1(a, b, torch.ones(1, 1, 2, 2)) == pytest.approx(1.0)
    weight = torch.tensor([[[[1.0, 1.0], [1.0, 4.0]]]])
    assert edge_l1(a, b, weight) == pytest.approx(4.0)
