# SPDX-License-Identifier: Apache-2.0
"""Base against tuned, task by task, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkgrpo.report.statistics import Estimate, paired_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

__all__ = ["AccuracyRow", "accuracy_rows", "accuracy_cells", "accuracy_table", "accuracy_markdown"]

HEADINGS = ("task", "base", "tuned", "difference [95 % interval]", "images")
ALL_TASKS = "all"


@dataclass(frozen=True)
class AccuracyRow:
    """One task before and after training.

    Attributes:
        task: Its name; ``all`` for the row over all tasks.
        base: Share of images correct before, in [0, 1].
        tuned: Share correct after, same prompts and seeds.
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
    says nothing of others, is the whole range from -1 to 1.

    Args:
        base: Task to [n] verdicts in [0, 1] (booleans will do) before training.
        tuned: The same tasks, prompts and seeds in the same order, after training.
        clusters: Task to [n] labels, equal for images of one prompt; None if each image has a
            prompt of its own.

    Returns:
        A row a task in the order of ``base``, and, if there are several, the row ``all``.

    Raises:
        ValueError: The tasks or their counts differ, or a task has no image.
    """
    if list(base) != list(tuned) or (clusters is not None and list(clusters) != list(base)):
        raise ValueError(f"tasks differ: base has {list(base)}, tuned {list(tuned)}")
    labels = {
        task: [(task, c) for c in (clusters[task] if clusters else range(len(base[task])))]
        for task in base
    }
    rows = [_row(task, base[task], tuned[task], labels[task]) for task in base]
    if len(rows) > 1:
        pooled_base = [value for task in base for value in base[task]]
        pooled_tuned = [value for task in base for value in tuned[task]]
        pooled_labels = [label for task in base for label in labels[task]]
        rows.append(_row(ALL_TASKS, pooled_base, pooled_tuned, pooled_labels))
    return rows


def accuracy_cells(row: AccuracyRow) -> tuple[str, str, str, str, str]:
    """A row as text, in the order of ``HEADINGS``: accuracies in %, differences in points."""
    difference = row.difference
    interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return (
        row.task,
        f"{100 * row.base:.1f} %",
        f"{100 * row.tuned:.1f} %",
        f"{100 * difference.estimate:+.1f} {interval}",
        str(difference.n),
    )


def accuracy_table(rows: Sequence[AccuracyRow], title: str | None = None) -> Table:
    """A table for the terminal; differences whose interval excludes zero are bold.

    Args:
        rows: From :func:`accuracy_rows`.
        title: Heading of the table.

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
        cells = [Text(cell) for cell in accuracy_cells(row)]
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
        difference = Estimate(tuned_mean - base_mean, -1.0, 1.0, len(labels))
        return AccuracyRow(task, base_mean, tuned_mean, difference)
    try:
        difference = paired_difference(base, tuned, clusters=labels)
    except ValueError as error:
        raise ValueError(f"task {task!r}: {error}") from error
    return AccuracyRow(task, base_mean, tuned_mean, difference)
