# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkgrpo.report.metrics import (
    MetricsWriter,
    irregular_iterations,
    lost_metrics,
    read_metrics,
    torn_line,
    truncate_metrics,
)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    records = [{"iteration": i, "loss": i / 3, "name": "σ", "on": True, "x": None} for i in (1, 2)]
    with MetricsWriter(path) as writer:
        for record in records:
            writer.write(record)
            assert read_metrics(path)[-1] == record  # flushed before write returns
    assert read_metrics(path) == records


def test_a_second_writer_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in (1, 2):
        with MetricsWriter(path) as writer:
            writer.write({"iteration": iteration})
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2]


def test_numbers_of_other_libraries_become_plain(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m") as writer:
        written = writer.write(
            {
                "tensor": torch.tensor(0.5),
                "one": torch.tensor([3]),
                "numpy": np.float32(0.25),
                "int": np.int64(7),
                "bool": np.bool_(True),
                "list": (1, torch.tensor(2)),
            }
        )
    expected = {"tensor": 0.5, "one": 3, "numpy": 0.25, "int": 7, "bool": True, "list": [1, 2]}
    assert written == expected
    assert read_metrics(tmp_path / "m") == [expected]


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m") as writer:
        writer.write(
            {
                "loss": float("nan"),
                "good": 1.0,
                "norm": torch.tensor(float("inf")),
                "by": {"task": [0.0, float("-inf")]},
            }
        )
    (record,) = read_metrics(tmp_path / "m")
    assert record["loss"] is None and record["norm"] is None and record["good"] == 1.0
    assert record["by"] == {"task": [0.0, None]}
    assert record["nonfinite"] == ["loss", "norm", "by.task.1"]
    json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("value", "message"), [(torch.zeros(2), "several numbers"), (object(), "no JSON form")]
)
def test_what_has_no_json_form_is_refused_by_name(
    tmp_path: Path, value: object, message: str
) -> None:
    with MetricsWriter(tmp_path / "m") as writer:
        with pytest.raises(TypeError, match=f"'bad' .*{message}"):
            writer.write({"good": 1, "bad": value})
        with pytest.raises(ValueError, match="nonfinite"):
            writer.write({"nonfinite": []})
    assert read_metrics(tmp_path / "m") == []


def test_a_torn_last_line_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes('{"iteration": 1}\n{"iteration": 2, "name": "σ'.encode()[:-1])
    assert read_metrics(path) == [{"iteration": 1}]
    with MetricsWriter(path) as writer:
        writer.write({"iteration": 2})
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2}]


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"iterat')
    with MetricsWriter(tmp_path / "m") as writer:
        writer.write({"iteration": 1})
    assert read_metrics(tmp_path / "m") == [{"iteration": 1}]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_damage_before_the_last_line_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "m").write_text('{"a": 1}\n' + line + '\n{"a": 2}\n')
    with pytest.raises(ValueError, match="m:2: "):
        read_metrics(tmp_path / "m")


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
    assert truncate_metrics(tmp_path / "none", 3) == 0
    assert not (tmp_path / "none").exists()


def test_truncation_drops_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricsWriter(path) as writer:
        writer.write({"event": "start"})
        for iteration in range(1, 6):
            writer.write({"iteration": iteration})
    before = path.read_bytes()
    assert truncate_metrics(path, 5) == 0
    assert path.read_bytes() == before
    assert truncate_metrics(path, 3) == 2
    assert read_metrics(path) == [{"event": "start"}, *({"iteration": i} for i in (1, 2, 3))]
    assert lost_metrics(path) == tmp_path / "m.lost.jsonl"
    assert read_metrics(lost_metrics(path)) == [{"iteration": 4}, {"iteration": 5}]
    with MetricsWriter(path) as writer:
        writer.write({"iteration": 4, "again": True})
    assert truncate_metrics(path, 3) == 1
    assert read_metrics(lost_metrics(path))[2:] == [{"iteration": 4, "again": True}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"iteration": 0}', "iteration is 0, no whole number from 1 on"),
        ('{"iteration": "2"}', "iteration is '2'"),
        ('{"iteration": true}', "iteration is True"),
        ('{"iteration": 2.0}', "iteration is 2.0"),
        ('{"iteration": null}', "iteration is None"),
        ('{"iteration": 2, "reward_mean": "x"}', "reward_mean is 'x', and a number in line 1"),
        ('{"iteration": 2, "reward_mean": [1]}', "a number in line 1"),
        ('{"iteration": 2, "reward_mean": NaN}', "NaN is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\x00", "not JSON"),
    ],
)
def test_an_edited_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "m"
    path.write_text('{"iteration": 1, "reward_mean": 0.5}\n' + line + "\n")
    with pytest.raises(ValueError, match="m:2: ") as error:
        read_metrics(path)
    assert says in str(error.value)


def test_a_torn_line_is_told_from_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "m"
    assert not torn_line(path)
    for content, torn in (("", False), ("{}\n", False), ("{}", True), ("{}\n{", True)):
        path.write_text(content)
        assert torn_line(path) is torn


@pytest.mark.parametrize(
    ("numbers", "last", "found"),
    [
        ([1, 2, 3], 3, []),
        ([], 0, []),
        ([1, 3, 6], 7, ["iterations 2, 4 to 5, 7 are missing"]),
        ([1, 2, 2, 3], 3, ["iterations 2 stand there more than once"]),
        ([2, 1], 2, ["iterations are not in order"]),
    ],
)
def test_lost_and_repeated_iterations_are_found(numbers, last, found) -> None:
    records = [{"event": "start"}, *({"iteration": i} for i in numbers)]
    assert irregular_iterations(records, last) == found
