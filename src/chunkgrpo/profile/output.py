# SPDX-License-Identifier: Apache-2.0
"""Profiles as files and in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.profile.measuring import SamplerProfile
from chunkgrpo.report.curves import CurvePanel, save_profile_curves
from chunkgrpo.runtime.files import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

MARKS = "●▲■◆"


def speed_label(distance: str) -> str:
    """Return the axis label of speeds measured by a distance."""
    if distance == "cosine":
        return "cosine distance of a step"
    return f"relative {distance.upper()} change in a step"


def save_profile(
    folder: Path,
    profiles: Sequence[SamplerProfile],
    sigmas: Sequence[float],
    rule: str = "optimal",
    selection: Mapping[str, Any] | None = None,
    title: str = "",
    distance: str = "l1",
) -> Path:
    """Write ``chunks.yaml``, ``dynamics.png`` and ``dynamics.json``.

    The first profile is the sampler to train with; its chunks go into ``chunks.yaml``.

    Args:
        folder: Made where missing.
        profiles: At least one.
        sigmas: Noise level at the start of each step, at least N.
        rule: The proposal to write, one of ``RULES``.
        selection: The selection, as settings.
        title: What was measured, for the head of the file.
        distance: The measure of speed, for labels.

    Returns:
        The path of ``chunks.yaml``.

    Raises:
        ValueError: If the rule has no proposal here.
    """
    import yaml

    chosen = profiles[0].proposal(rule)
    head = [title, f"{profiles[0].name}: {profiles[0].shares.sentence}."]
    head += [f"{p.rule} {p.plan}: {p.reason}" for p in profiles[0].proposals]
    plan = {"kind": "explicit", "sizes": list(chosen.plan.sizes)}
    section = {"plan": plan} | ({"selection": dict(selection)} if selection else {})
    text = "".join(f"# {line}\n" for line in head if line)
    text += f"# Chosen: {rule}.\n"
    text += yaml.safe_dump({"objective": section}, sort_keys=False, default_flow_style=None)
    save_profile_curves(
        folder / "dynamics.png",
        [
            CurvePanel(
                profile.name,
                profile.mean.tolist(),
                profile.low.tolist(),
                profile.high.tolist(),
                # The chosen rule first: its borders cross the curve.
                {
                    proposal.rule: proposal.plan.sizes
                    for proposal in sorted(profile.proposals, key=lambda p: p.rule != rule)
                },
                profile.offset,
            )
            for profile in profiles
        ],
        sigmas,
        ylabel=speed_label(distance),
    )
    record = [
        {
            "sampler": profile.name,
            "mean": profile.mean.tolist(),
            "low": profile.low.tolist(),
            "high": profile.high.tolist(),
            "shares": asdict(profile.shares),
            "inside": {start: curve.tolist() for start, curve in profile.inside.items()},
            "plans": {p.rule: list(p.plan.sizes) for p in profile.proposals},
        }
        for profile in profiles
    ]
    atomic_write(folder / "dynamics.json", json.dumps(record, indent=1) + "\n")
    return atomic_write(folder / "chunks.yaml", text)


def print_profile(
    console: Console, profiles: Sequence[SamplerProfile], sigmas: Sequence[float], rule: str
) -> None:
    """Print the curves as a table and a plot, the shares of variance and the proposals."""
    from rich.table import Table

    table = Table("step", "sigma", title="Speed at each step, with its 95 % interval")
    for profile in profiles:
        table.add_column(profile.name, justify="right")
    for i in range(len(profiles[0].mean)):
        cells = [f"{p.mean[i]:.3f} ± {p.high[i] - p.mean[i]:.3f}" for p in profiles]
        table.add_row(str(i), f"{sigmas[i]:.3f}", *cells)
    console.print(table)
    plan, offset = profiles[0].proposal(rule).plan, profiles[0].offset
    for line in plot_lines([p.mean.tolist() for p in profiles], plan, offset=offset):
        console.print(line, markup=False, highlight=False, no_wrap=True)
    legend = ", ".join(f"{MARKS[k % len(MARKS)]} {p.name}" for k, p in enumerate(profiles))
    console.print(f"{legend}; │ borders of {rule}", markup=False, highlight=False)
    table = Table(
        "sampler", "step", "prompt", "seed", "residual", title="Shares of the variance of log speed"
    )
    for profile in profiles:
        s = profile.shares
        cells = [f"{100 * share:.2f} %" for share in (s.step, s.prompt, s.seed, s.residual)]
        table.add_row(profile.name, *cells)
    console.print(table)
    table = Table("rule", "chunks", "why", title=f"Where to cut, {profiles[0].name}")
    for proposal in profiles[0].proposals:
        name = f"{proposal.rule} *" if proposal.rule == rule else proposal.rule
        table.add_row(name, ",".join(map(str, proposal.plan.sizes)), proposal.reason)
    console.print(table)


def plot_lines(
    curves: Sequence[Sequence[float]], plan: ChunkPlan, height: int = 10, offset: int = 0
) -> list[str]:
    """Draw curves in characters, four columns per step, from 0 to the largest value.

    Args:
        curves: [N] >= 0 each; where two meet, the earlier one is seen.
        plan: A plan of at most N steps; its borders are drawn as lines.
        height: Rows, at least 2.
        offset: Step at which the plan begins.

    Returns:
        The lines, top first, with an axis below.
    """
    num_steps = len(curves[0])
    top = max(max(curve) for curve in curves) or 1.0
    width = 4 * num_steps
    grid = [[" "] * width for _ in range(height)]
    edges = {offset + border for border in (*plan.starts, plan.num_steps)}
    for edge in edges - {0, num_steps}:
        for row in grid:
            row[4 * edge] = "│"
    for index, curve in reversed(list(enumerate(curves))):
        for step, value in enumerate(curve):
            row = height - 1 - round(value / top * (height - 1))
            grid[row][4 * step + 2] = MARKS[index % len(MARKS)]
    lines = [
        f"{top * (height - 1 - number) / (height - 1):6.3f} ┤" + "".join(row).rstrip()
        for number, row in enumerate(grid)
    ]
    axis = "".join(f"{step:^4}" for step in range(num_steps))
    return [*lines, " " * 7 + "└" + "─" * width, " " * 8 + axis.rstrip()]
