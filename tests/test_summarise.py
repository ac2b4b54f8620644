# SPDX-License-Identifier: Apache-2.0
"""From the diagnostics of all pieces to the metrics of an iteration."""

import math

import pytest
import torch

from chunkgrpo.train.metrics import summarise

RATIO_KEYS = {"ratio_mean", "ratio_std", "kl", "step_ratio_mean", "step_ratio_std"}


def piece(samples, steps, **values):
    columns = {name: torch.tensor(value) for name, value in values.items()}
    return {"sample": torch.tensor(samples), "step": torch.tensor(steps), **columns}


def test_pieces_without_ratios_have_no_metrics_about_them():
    parts = [
        piece([0, 1], [2, 0], old_gap=[0.5, 1.5], reference_gap=[1.0, 2.0]),
        piece([1], [1], old_gap=[4.0], reference_gap=[6.0]),
    ]
    record = summarise(parts, 3)
    assert record.keys() == {"old_gap", "reference_gap"}
    assert record["old_gap"].item() == pytest.approx(2.0)
    assert record["reference_gap"].item() == pytest.approx(3.0)
    assert summarise([piece([0], [0])], 3) == {}


def test_ratios_of_pairs_without_chunks():
    parts = [
        piece([0, 1], [1, 3], log_ratio=[0.1, 0.0], cut=[True, False]),
        piece([0, 1], [3, 1], log_ratio=[-0.2, 0.1], cut=[False, False]),
    ]
    record = summarise(parts, 3)
    assert record.keys() == RATIO_KEYS | {"clip_fraction"}
    ratios = [math.exp(0.1), 1, math.exp(-0.2), math.exp(0.1)]
    assert record["ratio_mean"].item() == pytest.approx(sum(ratios) / 4)
    assert record["clip_fraction"].item() == 0.25
    # Four steps here, the last of which no transition trains.
    low = (1 + math.exp(-0.2)) / 2
    assert record["step_ratio_mean"] == [
        None, pytest.approx(math.exp(0.1)), None, pytest.approx(low)
    ]  # fmt: skip


def test_ratios_of_chunks():
    parts = [
        piece([0], [0], log_ratio=[0.1]),
        piece([0], [1], log_ratio=[0.2], chunk_log_ratio=[0.1, 0.2], cut=[True, False],
              chunk=[0, 1], reference_kl=[0.25]),
    ]  # fmt: skip
    record = summarise(parts, 3)
    assert record["step_ratio_mean"] == [
        pytest.approx(math.exp(0.1)), pytest.approx(math.exp(0.2)), None
    ]  # fmt: skip
    assert record["chunk_ratio_mean"] == pytest.approx([math.exp(0.1), math.exp(0.2)])
    assert record["chunk_clip_fraction"] == [1, 0]
    assert record["clip_fraction"] == 0.5 and record["reference_kl"] == 0.25


def test_the_divergence_is_k3_of_the_new_policy_over_the_old():
    """E over samples of the old policy of r - 1 - log r, r = new / old; not of its inverse."""
    record = summarise([piece([0, 1], [0, 0], log_ratio=[1.0, -2.0])], 1)
    expected = ((math.e - 1 - 1) + (math.exp(-2) - 1 + 2)) / 2
    assert record["kl"].item() == pytest.approx(expected)
