# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from chunkgrpo.report.curves import (
    CurvePanel,
    Panel,
    Series,
    save_curves,
    save_dynamics,
    save_profile_curves,
)
from chunkgrpo.report.metrics import MetricsWriter, read_metrics

NUM_STEPS = 16
SIGMAS = [3 * u / (1 + 2 * u) for u in (1 - i / 17 for i in range(18))]
MEAN = [0.02 + 0.01 * i for i in range(NUM_STEPS)]


def records(num_iterations: int = 30) -> list[dict]:
    rows = []
    for i in range(1, num_iterations + 1):
        row = {
            "iteration": i,
            "reward_mean": 1 - math.exp(-i / 9),
            "clip_fraction": 0.1,
            "kl": 1e-6,
        }
        if i % 10 == 0:
            row |= {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
        rows.append(row)
    return rows


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    four = size(save_curves(tmp_path / "four.png", records()))
    only = [{"iteration": 1, "reward_mean": 0.5}]
    one = size(save_curves(tmp_path / "one.png", only))
    assert four[0] == pytest.approx(3 * one[0], abs=3)  # three columns, two rows
    assert four[1] == pytest.approx(2 * one[1], abs=3)


def test_nulls_and_missing_values_are_skipped(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"event": "start"})
        writer.write({"iteration": 1, "reward_mean": float("nan")})
        for record in records(12):
            writer.write(record)
        writer.write({"iteration": 13, "accuracy": 0.5, "accuracy_low": None})
    path = save_curves(tmp_path / "c.png", read_metrics(tmp_path / "m.jsonl"), smoothing=5)
    assert size(path)[0] > 1000


def test_panels_can_be_chosen(tmp_path: Path) -> None:
    panel = Panel("Both", "a unit", (Series("reward_mean", "reward"), Series("kl", "KL")))
    path = save_curves(tmp_path / "c.png", records(), [panel], xlabel="update", columns=1)
    assert size(path)[0] < 600


@pytest.mark.parametrize(
    ("rows", "columns", "smoothing", "message"),
    [
        ([], 3, 1, "none of the metrics"),
        ([{"iteration": 1, "other": 1.0}], 3, 1, "none of the metrics"),
        ([{"reward_mean": 1.0}], 3, 1, "none of the metrics"),
        ([{"iteration": 1, "reward_mean": 1.0}], 0, 1, "columns is 0"),
        ([{"iteration": 1, "reward_mean": 1.0}], 3, 4, "smoothing 4"),
    ],
)
def test_curves_without_sense_are_refused(
    tmp_path: Path, rows: list[dict], columns: int, smoothing: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_curves(tmp_path / "c.png", rows, columns=columns, smoothing=smoothing)
    assert not list(tmp_path.iterdir())


def test_dynamics_with_and_without_plans(tmp_path: Path) -> None:
    plans = {"paper": (2, 3, 4, 7), "step": (1,) * 16, "window": (4, 4)}
    bare = size(save_dynamics(tmp_path / "bare.png", MEAN, SIGMAS, {}))
    path = save_dynamics(
        tmp_path / "d.png", MEAN, SIGMAS, plans, [m * 0.9 for m in MEAN], [m * 1.1 for m in MEAN]
    )
    assert size(path)[0] == bare[0]
    assert size(path)[1] > bare[1]


@pytest.mark.parametrize(
    ("mean", "sigmas", "plans", "low", "high", "message"),
    [
        ([], SIGMAS, {}, None, None, "0 steps"),
        (MEAN, SIGMAS[:5], {}, None, None, "found 5"),
        (MEAN, SIGMAS, {}, MEAN, None, "belong together"),
        (MEAN, SIGMAS, {}, MEAN, MEAN[:3], "16 values"),
        (MEAN, SIGMAS, {"long": (9, 8)}, None, None, "'long' \\(9, 8\\) does not fit 16 steps"),
        (MEAN, SIGMAS, {"hole": (9, 0)}, None, None, "'hole'"),
        (MEAN, SIGMAS, {"none": ()}, None, None, "'none'"),
    ],
)
def test_dynamics_that_do_not_fit_are_refused(
    tmp_path: Path,
    mean: list[float],
    sigmas: list[float],
    plans: dict,
    low: list[float] | None,
    high: list[float] | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        save_dynamics(tmp_path / "d.png", mean, sigmas, plans, low, high)


def test_a_plan_of_a_window_begins_where_the_window_does(tmp_path: Path) -> None:
    def drawn(offset: int) -> bytes:
        panel = CurvePanel("", MEAN, None, None, {"window": (2, 3)}, offset)
        return save_profile_curves(tmp_path / f"{offset}.png", [panel], SIGMAS).read_bytes()

    assert len({drawn(0), drawn(4), drawn(11)}) == 3
    for offset in (-1, 12):
        with pytest.raises(ValueError, match=rf"\(2, 3\) from step {offset} does not fit 16 steps"):
            drawn(offset)


def test_plotting_leaves_no_global_state(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    save_curves(tmp_path / "c.png", records(3))
    assert dict(matplotlib.rcParams) == before
