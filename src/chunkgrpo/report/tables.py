# SPDX-License-Identifier: Apache-2.0
"""Base against tuned, task by task, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkgrpo.report.statistics import TOO_FEW, Estimate, paired_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

__all__ = [
    "AccuracyRow",
    "accuracy_rows",
    "accuracy_cells",
    "accuracy_table",
    "accuracy_markdown",
    "change_text",
    "interval_text",
    "score_text",
]

HEADINGS = ("task", "base", "tuned", "difference [95 % interval]", "images")
ALL_TASKS = "all"


@dataclass(frozen=True)
class AccuracyRow:
    """One task before and after training.

    Attributes:
        task: Its name; ``all`` for the row over all tasks.
        base: Mean score before; of yes or no verdicts, the share of images correct, in [0, 1].
        tuned: The same after, same prompts and seeds.
        difference: tuned - base with its 95 % interval; n counts pairs of images.
    """

    task: str
    base: float
    tuned: float
    difference: Estimate


def accuracy_rows(
    base: Mapping[str, Sequence[float] | NDArray],
    tuned: Mapping[str, Sequence[float] | NDArray],
    clusters: Mapping[str, Sequence[Hashable]] | None = None,
) -> list[AccuracyRow]:
    """Compare two models image by image, for each task and over all.

    The row over all tasks weighs every image the same. Intervals are those of
    :func:`chunkgrpo.report.statistics.paired_difference` at 95 %; that of a single prompt, which
    says nothing of others, is the whole range: from -1 to 1 for scores within [0, 1].

    Args:
        base: Task to [n] scores before training; verdicts may be booleans.
        tuned: The same tasks, prompts and seeds in the same order, after training.
        clusters: Task to [n] labels, equal for images of one prompt, in whichever tasks; None if
            each image has a prompt of its own.

    Returns:
        One row per task in the order of ``base``, and, if there are several, the row ``all``.

    Raises:
        ValueError: The tasks or their counts differ, or a task has no image.
    """
    if list(base) != list(tuned) or (clusters is not None and list(clusters) != list(base)):
        raise ValueError(f"tasks differ: base has {list(base)}, tuned {list(tuned)}")
    labels: dict[str, list[Hashable]] = {
        task: list(clusters[task]) if clusters else [(task, i) for i in range(len(base[task]))]
        for task in base
    }
    rows = [_row(task, base[task], tuned[task], labels[task]) for task in base]
    if len(rows) > 1:
        pooled_base = [value for task in base for value in base[task]]
        pooled_tuned = [value for task in base for value in tuned[task]]
        pooled_labels = [label for task in base for label in labels[task]]
        rows.append(_row(ALL_TASKS, pooled_base, pooled_tuned, pooled_labels))
    return rows


def score_text(value: float, share: bool = True) -> str:
    """A score: a share in per cent, another with four digits."""
    return f"{100 * value:.1f} %" if share else f"{value:.4g}"


def change_text(value: float, share: bool = True) -> str:
    """A difference of scores with its sign: of shares in points, of others with three digits."""
    return f"{100 * value:+.1f}" if share else f"{value:+.3g}"


def interval_text(difference: Estimate, share: bool = True) -> str:
    """The interval of a difference; where nothing bounds it, only that there is none."""
    low, high = difference.ends
    ends = (
        ""
        if low is None or high is None
        else (f"[{change_text(low, share)}, {change_text(high, share)}]")
    )
    return ", ".join(part for part in (ends, TOO_FEW if difference.too_few else "") if part)


def accuracy_cells(row: AccuracyRow, share: bool = True) -> tuple[str, str, str, str, str]:
    """A row as text, in the order of ``HEADINGS``.

    Args:
        row: What to write.
        share: Whether scores are shares, shown in %, and their differences in points.
    """
    estimate = change_text(row.difference.estimate, share)
    return (
        row.task,
        score_text(row.base, share),
        score_text(row.tuned, share),
        f"{estimate} {interval_text(row.difference, share)}",
        str(row.difference.n),
    )


def accuracy_table(
    rows: Sequence[AccuracyRow], title: str | None = None, share: bool = True
) -> Table:
    """A table for the terminal; differences whose interval excludes zero are bold.

    Never those of too few prompts, which say so in a line of their own.

    Args:
        rows: From :func:`accuracy_rows`.
        title: Heading of the table.
        share: As of :func:`accuracy_cells`.

    Returns:
        A table to print with a rich console.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        if row.task == ALL_TASKS:
            table.add_section()
        cells = [
            Text(cell.replace(f", {TOO_FEW}", f"\n{TOO_FEW}"))
            for cell in accuracy_cells(row, share)
        ]
        if row.difference.excludes_zero:
            cells[3].stylize("bold")
        table.add_row(*cells)
    return table


def accuracy_markdown(rows: Sequence[AccuracyRow]) -> str:
    """The same table in Markdown, ending with a line break."""
    lines = [
        "| " + " | ".join(HEADINGS) + " |",
        "|:---" + "|---:" * (len(HEADINGS) - 1) + "|",
        *("| " + " | ".join(accuracy_cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _row(
    task: str,
    base: Sequence[float] | NDArray,
    tuned: Sequence[float] | NDArray,
    labels: Sequence[Hashable],
) -> AccuracyRow:
    base_mean, tuned_mean = (float(sum(each)) / max(1, len(each)) for each in (base, tuned))
    if len(set(labels)) == 1 and len(base) == len(tuned):
        scores = [*map(float, base), *map(float, tuned)]
        end = 1.0 if all(0 <= score <= 1 for score in scores) else math.inf
        difference = Estimate(tuned_mean - base_mean, -end, end, len(labels), True)
        return AccuracyRow(task, base_mean, tuned_mean, difference)
    try:
        difference = paired_difference(base, tuned, clusters=labels)
    except ValueError as error:
        raise ValueError(f"task {task!r}: {error}") from error
    return AccuracyRow(task, base_mean, tuned_mean, difference)
