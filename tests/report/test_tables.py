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


def test_identical_prompts_are_one_cluster_in_whichever_tasks() -> None:
    """Two tasks with the same two prompts rest on two prompts, not on four."""
    base, tuned = {"a": [0, 0], "b": [0, 1]}, {"a": [1, 0], "b": [1, 1]}
    shared = accuracy_rows(base, tuned, {"a": ["x", "y"], "b": ["x", "y"]})[-1]
    assert shared.difference == paired_difference(
        [0, 0, 0, 1], [1, 0, 1, 1], clusters=["x", "y", "x", "y"]
    )
    apart = accuracy_rows(base, tuned, {"a": ["x", "y"], "b": ["z", "w"]})[-1]
    assert apart.difference == accuracy_rows(base, tuned)[-1].difference
    assert apart.difference.high - apart.difference.low < (
        shared.difference.high - shared.difference.low
    )


def test_one_prompt_says_nothing_of_others() -> None:
    """A run with as many prompts as tasks still ends with its report."""
    base, tuned = {"a": [0, 1, 0], "b": [0]}, {"a": [1, 1, 0], "b": [1]}
    a, b, everything = accuracy_rows(base, tuned, {"a": ["x"] * 3, "b": ["y"]})
    assert a.difference == Estimate(pytest.approx(1 / 3), -1.0, 1.0, 3, True)
    assert b.difference == Estimate(1.0, -1.0, 1.0, 1, True)
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
            assert all(part in text for part in cell.split(", too few prompts to tell"))
    assert text.count("too few prompts to tell") == 3


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
    base = [-3.0 - i for i in range(30)]
    tuned = [-2.0 - i + 0.01 * (-1) ** i for i in range(30)]
    (row,) = accuracy_rows({"all": base}, {"all": tuned})
    # 15 pairs differ by 1.01, 15 by 0.99: the mean and 2.045 standard errors of 0.01017 / 30^0.5
    # for Student's interval; the score interval of so few different values is wider.
    cells = accuracy_cells(row, share=False)
    assert (
        cells[:3] == ("all", "-17.5", "-16.5") and cells[3].startswith("+1 [") and cells[4] == "30"
    )
    assert "%" not in "".join(cells)


def test_too_few_prompts_are_said_to_be_too_few_and_are_never_bold() -> None:
    """Nineteen prompts that all became right; the same of thirty is a difference."""
    for number, few in ((19, True), (30, False)):
        (row,) = accuracy_rows({"a": [0] * number}, {"a": [1] * number})
        assert row.difference.low > 0
        assert row.difference.excludes_zero is not few
        assert accuracy_cells(row)[3].endswith("too few prompts to tell") is few
        table = accuracy_table([row])
        styled = next(iter(table.columns[3].cells)).spans
        assert bool(styled) is not few
        assert ("too few prompts to tell" in accuracy_markdown([row])) is few


def test_an_interval_that_nothing_bounds_is_not_printed() -> None:
    """All scores, of any unit, are the same: no number says how far another could lie."""
    (row,) = accuracy_rows({"a": [7.0] * 40}, {"a": [7.0] * 40})
    assert row.difference.ends == (None, None)
    assert accuracy_cells(row, share=False)[3] == "+0 too few prompts to tell"
    (alone,) = accuracy_rows({"a": [7.0, 8.0]}, {"a": [7.0, 9.0]}, {"a": ["x", "x"]})
    assert accuracy_cells(alone, share=False)[3] == "+0.5 too few prompts to tell"


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
