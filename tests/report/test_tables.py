# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

import pytest
from rich.console import Console

from chunkgrpo.report.statistics import Estimate, paired_difference
from chunkgrpo.report.tables import (
    AccuracyRow,
    accuracy_cells,
    accuracy_markdown,
    accuracy_rows,
    accuracy_table,
)

BASE = {"count": [0, 1, 0, 1, 0, 0], "colour": [True, True, False, False]}
TUNED = {"count": [1, 1, 1, 1, 0, 0], "colour": [True, True, True, False]}
PROMPTS = {"count": [1, 1, 2, 2, 3, 3], "colour": ["a", "a", "b", "b"]}


def test_rows_hold_shares_and_paired_differences() -> None:
    count, colour, everything = accuracy_rows(BASE, TUNED, PROMPTS)
    assert (count.base, count.tuned) == (2 / 6, 4 / 6)
    assert count.difference == paired_difference(
        BASE["count"], TUNED["count"], clusters=PROMPTS["count"]
    )
    assert colour.difference.estimate == 0.25
    assert (everything.task, everything.difference.n) == ("all", 10)
    assert everything.base == pytest.approx(4 / 10)


def test_equal_labels_of_two_tasks_are_two_prompts() -> None:
    """The prompts "1" of two tasks differ, so two tasks of two prompts make four clusters."""
    base, tuned = {"a": [0, 0], "b": [0, 1]}, {"a": [1, 0], "b": [1, 1]}
    shared = accuracy_rows(base, tuned, {"a": [1, 2], "b": [1, 2]})[-1]
    apart = accuracy_rows(base, tuned)[-1]
    assert shared.difference == apart.difference


def test_one_prompt_says_nothing_of_others() -> None:
    """A run with as many prompts as tasks still ends with its report."""
    base, tuned = {"a": [0, 1, 0], "b": [0]}, {"a": [1, 1, 0], "b": [1]}
    a, b, everything = accuracy_rows(base, tuned, {"a": ["x"] * 3, "b": ["y"]})
    assert a.difference == Estimate(pytest.approx(1 / 3), -1.0, 1.0, 3)
    assert b.difference == Estimate(1.0, -1.0, 1.0, 1)
    clusters = ["x", "x", "x", "y"]
    assert everything.difference == paired_difference([0, 1, 0, 0], [1, 1, 0, 1], clusters=clusters)


def test_one_task_needs_no_row_over_all() -> None:
    assert len(accuracy_rows({"a": [0, 1]}, {"a": [1, 1]})) == 1


def test_the_terminal_table_prints_everything() -> None:
    stream = io.StringIO()
    rows = accuracy_rows(BASE, TUNED, PROMPTS)
    Console(file=stream, width=100).print(accuracy_table(rows, "Held-out [accuracy]"))
    text = stream.getvalue()
    assert "Held-out" in text and "count" in text and "95 % interval" in text
    for row in rows:
        for cell in accuracy_cells(row):
            assert cell in text


def test_brackets_in_names_are_text() -> None:
    stream = io.StringIO()
    rows = [AccuracyRow("[red]task[/red]", 0.5, 0.75, Estimate(0.25, 0.1, 0.4, 30))]
    Console(file=stream, width=100).print(accuracy_table(rows))
    assert "[red]task[/red]" in stream.getvalue()
    assert "+25.0 [+10.0, +40.0]" in stream.getvalue()


def test_markdown_has_a_line_a_row() -> None:
    lines = accuracy_markdown(accuracy_rows(BASE, TUNED)).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| count | 33.3 % | 66.7 % | +33.3 [")


def test_scores_that_are_no_shares_are_no_percentages() -> None:
    (row,) = accuracy_rows({"all": [-3.0, -5.0]}, {"all": [-2.0, -4.0]})
    assert accuracy_cells(row, share=False) == ("all", "-4", "-3", "+1 [+1, +1]", "2")


@pytest.mark.parametrize(
    ("base", "tuned", "clusters", "message"),
    [
        ({"a": [0, 1]}, {"b": [0, 1]}, None, "tasks differ"),
        ({"a": [0, 1]}, {"a": [0, 1]}, {"b": [0, 1]}, "tasks differ"),
        ({"a": [0, 1]}, {"a": [0]}, None, "task 'a': .*equally long"),
        ({"a": []}, {"a": []}, None, "task 'a': .*at least 2"),
    ],
)
def test_tasks_that_do_not_match_are_refused(
    base: dict, tuned: dict, clusters: dict | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy_rows(base, tuned, clusters)
