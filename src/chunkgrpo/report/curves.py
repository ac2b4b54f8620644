# SPDX-License-Identifier: Apache-2.0
"""Learning curves, and the curve of how fast a trajectory moves."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkgrpo.report.palette import FAINT, INK, SERIES
from chunkgrpo.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Series",
    "Panel",
    "CurvePanel",
    "DEFAULT_PANELS",
    "save_curves",
    "save_dynamics",
    "save_profile_curves",
]


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Attributes:
        key: The metric's name in the records.
        label: What the legend calls it; empty in a panel of one line.
        low: Metric with the lower end of its interval, drawn as a band with ``high``.
        high: Metric with the upper end.
        scale: Factor from the recorded unit to the unit shown, for example 100 for per cent.
        markers: Whether each point is marked, for metrics measured now and then.
    """

    key: str
    label: str = ""
    low: str | None = None
    high: str | None = None
    scale: float = 1.0
    markers: bool = False


@dataclass(frozen=True)
class Panel:
    """One small plot: a title, the y axis with its unit, and lines that share it."""

    title: str
    ylabel: str
    series: tuple[Series, ...]


DEFAULT_PANELS = (
    Panel("Training reward", "mean reward", (Series("reward_mean"),)),
    Panel(
        "Held-out strict accuracy",
        "images correct [%]",
        (Series("accuracy", low="accuracy_low", high="accuracy_high", scale=100, markers=True),),
    ),
    Panel("Clipped ratios", "share of ratios [%]", (Series("clip_fraction", scale=100),)),
    Panel("Spread of ratios", "standard deviation", (Series("ratio_std"),)),
    Panel("Distance from the old policy", "KL [nats per dimension]", (Series("kl"),)),
)
"""The default panels of a run; one without any recorded metric is left out."""


def panels_of_score(name: str) -> tuple[Panel, ...]:
    """Return the panels of a run whose judge gives scores that are no shares of correct images.

    Args:
        name: The judge's.
    """
    held_out = Series("accuracy", low="accuracy_low", high="accuracy_high", markers=True)
    judged = Panel(f"Held-out {name}", "mean score", (held_out,))
    return (DEFAULT_PANELS[0], judged, *DEFAULT_PANELS[2:])


def save_curves(
    path: str | os.PathLike[str],
    records: Sequence[Mapping[str, Any]],
    panels: Sequence[Panel] = DEFAULT_PANELS,
    x: str = "iteration",
    xlabel: str = "iteration",
    columns: int = 3,
    smoothing: int = 1,
) -> Path:
    """Write a PNG of small plots over the iterations of a run.

    Records may hold different metrics (an evaluation now and then, a training record each
    iteration); missing and null values are skipped.

    Args:
        path: The PNG to write.
        records: As :func:`chunkgrpo.report.metrics.read_metrics` gives them.
        panels: What to draw, in reading order.
        x: The metric of the x axis; records without it are skipped.
        xlabel: Its name and unit on the axis.
        columns: Plots per row, at least 1.
        smoothing: Width of a centred moving average over each unmarked line, in points, odd; the
            values themselves stay visible behind it. 1 draws the values alone.

    Returns:
        The path written.

    Raises:
        ValueError: An argument is out of range, or no panel has anything to show.
    """
    if columns < 1 or smoothing < 1 or smoothing % 2 == 0:
        raise ValueError(
            f"columns is {columns} and smoothing {smoothing}; both must be at least 1, and "
            "smoothing odd"
        )
    shown = [p for p in panels if any(_points(records, x, s.key)[0] for s in p.series)]
    if not shown:
        keys = [s.key for p in panels for s in p.series]
        raise ValueError(f"none of the metrics {keys} is in the {len(records)} records")
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(3.9 * columns, 2.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for index, axis in enumerate(axes):
        if index >= len(shown):
            axis.set_visible(False)
            continue
        _draw_panel(axis, shown[index], records, x, smoothing)
        if index + columns >= len(shown):
            axis.set_xlabel(xlabel)
            axis.tick_params(labelbottom=True)
    return _save(figure, path)


def save_dynamics(
    path: str | os.PathLike[str],
    mean: Sequence[float],
    sigmas: Sequence[float],
    plans: Mapping[str, Sequence[int]],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    ylabel: str = "relative L1 change in a step",
) -> Path:
    """Write a PNG of the dynamics of sampling, with chunk plans as bars below the curve.

    Args:
        path: The PNG to write.
        mean: [N], how much step i changes the latents; step 0 is the noisiest.
        sigmas: At least N noise levels, that at the start of each step first, in [0, 1].
        plans: Name to chunk sizes, from step 0 on, at most N in sum. The borders of the first
            plan also cross the curve.
        low: [N], lower end of the interval of each mean, drawn as a band with ``high``.
        high: [N], upper end.
        ylabel: Name and unit of the curve.

    Returns:
        The path written.

    Raises:
        ValueError: Lengths differ, or a plan does not fit the steps.
    """
    panel = CurvePanel("", mean, low, high, plans)
    bars = len(plans)
    figure = _figure(8.0, 3.4 + 0.36 * bars)
    _draw_dynamics(figure, [panel], sigmas, ylabel)
    return _save(figure, path)


@dataclass(frozen=True)
class CurvePanel:
    """The dynamics of one sampler.

    Attributes:
        title: Its name; empty for none.
        mean: [N], how much step i changes the latents; step 0 is the noisiest.
        low: [N], lower end of the interval of each mean; None with ``high`` for no band.
        high: [N], upper end.
        plans: Name to chunk sizes, drawn as bars below the curve; the borders of the first plan
            also cross the curve.
        offset: Step at which the plans begin.
    """

    title: str
    mean: Sequence[float]
    low: Sequence[float] | None
    high: Sequence[float] | None
    plans: Mapping[str, Sequence[int]]
    offset: int = 0


def save_profile_curves(
    path: str | os.PathLike[str],
    panels: Sequence[CurvePanel],
    sigmas: Sequence[float],
    ylabel: str = "relative L1 change in a step",
) -> Path:
    """Write a PNG of the dynamics under several samplers side by side, each with its plans.

    Args:
        path: The PNG to write.
        panels: At least one, of the same steps and with the same names of plans.
        sigmas: At least N noise levels, that at the start of each step first, in [0, 1].
        ylabel: Name and unit of the curves.

    Returns:
        The path written.

    Raises:
        ValueError: There is no panel, their lengths or names differ, or a plan does not fit.
    """
    if not panels or any(
        len(p.mean) != len(panels[0].mean) or list(p.plans) != list(panels[0].plans) for p in panels
    ):
        raise ValueError("panels must be at least one, of equally many steps and the same plans")
    figure = _figure(5.2 * len(panels) + 1.6, 3.8 + 0.36 * len(panels[0].plans))
    _draw_dynamics(figure, panels, sigmas, ylabel)
    return _save(figure, path)


def _check_panel(panel: CurvePanel, sigmas: Sequence[float]) -> None:
    num_steps = len(panel.mean)
    if num_steps == 0 or len(sigmas) < num_steps:
        raise ValueError(f"{num_steps} steps need as many sigmas; found {len(sigmas)}")
    low, high = panel.low, panel.high
    if (low is None) != (high is None):
        raise ValueError("low and high belong together; give both or neither")
    if low is not None and high is not None and not len(low) == len(high) == num_steps:
        raise ValueError(f"low and high must have {num_steps} values, as mean has")
    for name, sizes in panel.plans.items():
        if not sizes or min(sizes) < 1 or not 0 <= panel.offset <= num_steps - sum(sizes):
            where = f" from step {panel.offset}" if panel.offset else ""
            raise ValueError(f"plan {name!r} {tuple(sizes)}{where} does not fit {num_steps} steps")


def _draw_dynamics(
    figure: Figure, panels: Sequence[CurvePanel], sigmas: Sequence[float], ylabel: str
) -> None:
    """One column per panel: the curve, and below it a strip of its plans, if there are any."""
    from matplotlib.ticker import MaxNLocator

    for panel in panels:
        _check_panel(panel, sigmas)
    bars = len(panels[0].plans)
    if bars:
        ratios = [3.0, 0.36 * bars]
        rows = figure.subplots(2, len(panels), sharex=True, squeeze=False, height_ratios=ratios)
    else:
        rows = figure.subplots(1, len(panels), squeeze=False)
    for column, panel in enumerate(panels):
        curve = rows[0][column]
        _draw_curve(curve, panel, sigmas)
        if column == 0:
            curve.set_ylabel(ylabel)
        if bars:
            _draw_plans(rows[1][column], panel, named=column == 0)
        lowest = rows[-1][column]
        lowest.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=17))
        lowest.set_xlabel("sampler step (0 is the noisiest)")


def _draw_curve(axis: Axes, panel: CurvePanel, sigmas: Sequence[float]) -> None:
    num_steps = len(panel.mean)
    steps = list(range(num_steps))
    if panel.low is not None and panel.high is not None:
        axis.fill_between(steps, panel.low, panel.high, color=SERIES[0], alpha=0.2, linewidth=0)
    axis.plot(steps, panel.mean, color=SERIES[0], marker="o", markersize=4, linewidth=1.8)
    axis.set_xlim(-0.6, num_steps - 0.4)
    axis.set_ylim(bottom=0)
    if panel.title:
        axis.set_title(panel.title, loc="left", fontsize=10)
    top = axis.secondary_xaxis("top")
    every = -(-num_steps // 17)
    top.set_xticks(steps[::every], [f"{sigmas[i]:.2f}" for i in steps[::every]])
    top.set_xlabel("noise level σ at the start of the step", fontsize=9)
    top.tick_params(labelsize=8, colors=INK)
    for sizes in list(panel.plans.values())[:1]:
        edges = {panel.offset + border for border in (*_borders(sizes), sum(sizes))}
        for edge in edges - {0, num_steps}:
            axis.axvline(edge - 0.5, color=FAINT, linestyle="--", linewidth=1)


def _draw_plans(axis: Axes, panel: CurvePanel, named: bool) -> None:
    plans = panel.plans
    for row, sizes in enumerate(plans.values()):
        for index, (start, size) in enumerate(zip(_borders(sizes), sizes)):
            start += panel.offset
            colour = SERIES[index % 2]
            axis.broken_barh(
                [(start - 0.5 + 0.04, size - 0.08)], (row - 0.36, 0.72), color=colour, alpha=0.3
            )
            axis.text(start + size / 2 - 0.5, row, str(size), ha="center", va="center", fontsize=8)
    axis.set_yticks(range(len(plans)), list(plans) if named else [""] * len(plans))
    axis.set_ylim(len(plans) - 0.5, -0.5)
    axis.tick_params(length=0)
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)


def _borders(sizes: Sequence[int]) -> list[int]:
    """First step of each chunk."""
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _points(
    records: Sequence[Mapping[str, Any]], x: str, key: str
) -> tuple[list[float], list[float]]:
    pairs = [(r[x], r[key]) for r in records if _is_number(r.get(x)) and _is_number(r.get(key))]
    return [float(a) for a, _ in pairs], [float(b) for _, b in pairs]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw_panel(
    axis: Axes, panel: Panel, records: Sequence[Mapping[str, Any]], x: str, smoothing: int
) -> None:
    from matplotlib.ticker import MaxNLocator

    for colour, series in zip(SERIES * len(panel.series), panel.series):
        where, values = _points(records, x, series.key)
        values = [value * series.scale for value in values]
        if series.low is not None and series.high is not None:
            ends = series.low, series.high
            complete = [r for r in records if all(_is_number(r.get(key)) for key in ends)]
            place, lows = _points(complete, x, series.low)
            _, highs = _points(complete, x, series.high)
            axis.fill_between(
                place,
                [v * series.scale for v in lows],
                [v * series.scale for v in highs],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        if series.markers or smoothing == 1:
            marker = "o" if series.markers or len(where) == 1 else None
            axis.plot(where, values, color=colour, label=series.label, marker=marker, markersize=4)
        else:
            axis.plot(where, values, color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(where, _moving_average(values, smoothing), color=colour, label=series.label)
    axis.set_title(panel.title, loc="left", fontsize=10, y=1.02)
    axis.yaxis.set_offset_position("right")  # a factor such as 1e-5 stands clear of the title
    axis.yaxis.offsetText.set_fontsize(8)
    axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    axis.set_ylabel(panel.ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if any(series.label for series in panel.series):
        axis.legend(frameon=False, fontsize=8)


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Centred mean of up to ``width`` values; at the ends, of those there are."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, so that no state is shared with the caller's plots."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    from matplotlib.text import Text

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
        if axis.get_visible() and axis.spines["left"].get_visible():
            axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
            axis.set_axisbelow(True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a name is a $, not the beginning of a formula
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return atomic_write(path, buffer.getvalue())
