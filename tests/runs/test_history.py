# SPDX-License-Identifier: Apache-2.0
"""The history of a run: what it says, and that damage is noticed."""

import json
import random

import pytest

from chunkgrpo.runs.history import (
    HistoryError,
    append_history,
    line_of,
    read_history,
    set_aside,
)


@pytest.fixture
def folder(tmp_path):
    append_history(tmp_path, line_of("start", 0, settings={"seed": 1}, prompts={"train": "x"}))
    append_history(
        tmp_path,
        line_of("change", 4, key="iterations", old=5, new=9, given="--set"),
        line_of("resume", 4, settings={"seed": 1, "iterations": 9}),
    )
    append_history(tmp_path, line_of("stop", 6), line_of("finish", 9))
    return tmp_path


def test_a_history_says_what_was_written(folder) -> None:
    found = read_history(folder)
    events = [record["event"] for record in found.records]
    assert events == ["start", "change", "resume", "stop", "finish"]
    assert found.settings() == {"seed": 1, "iterations": 9}
    assert found.prompts() == {"train": "x"}
    assert (found.iteration, found.finished, found.torn) == (9, 9, False)
    times = [record["time"] for record in found.records]
    assert times == sorted(times) and times[0].endswith("+00:00")


def test_a_missing_history_says_nothing(tmp_path) -> None:
    found = read_history(tmp_path)
    assert (found.settings(), found.prompts(), found.iteration, found.finished) == (None, {}, 0, 0)


def test_a_torn_last_line_is_left_out_and_overwritten(folder) -> None:
    path = folder / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    found = read_history(folder)
    assert found.torn and [r["event"] for r in found.records][-1] == "stop"
    append_history(folder, line_of("finish", 9))
    assert not read_history(folder).torn and read_history(folder).finished == 9


def test_every_flipped_bit_is_noticed(folder) -> None:
    path = folder / "history.jsonl"
    whole, known = path.read_bytes(), read_history(folder).records
    draw = random.Random(0)
    for _ in range(300):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            found = read_history(folder)
        except HistoryError as error:
            assert "history.jsonl, line " in str(error)
        else:  # the line's end: what is left is true; or white space, a digit written otherwise
            assert list(found.records) == list(known)[: len(found.records)]


@pytest.mark.parametrize(
    "line", ["", "[]", "1", "{}", '{"event": "start"}', "[" * 99999, '{"sha256": "x"}', "\xff"]
)
def test_lines_of_another_form_are_named(folder, line) -> None:
    path = folder / "history.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(HistoryError, match=r"history\.jsonl, line 1 is damaged"):
        read_history(folder)


def test_what_is_set_aside_is_never_overwritten(folder) -> None:
    path = folder / "history.jsonl"
    first = path.read_bytes()
    assert set_aside(path).read_bytes() == first and not path.exists()
    path.write_text("another")
    assert set_aside(path).name == "history.damaged-2.jsonl"
    assert (folder / "history.damaged.jsonl").read_bytes() == first


def test_numbers_and_texts_come_back(folder) -> None:
    settings = {"rate": 1e-05, "text": "größe \u2028", "none": None, "big": 2**63}
    append_history(folder, line_of("resume", 9, settings=settings))
    assert read_history(folder).settings() == settings
    assert json.loads((folder / "history.jsonl").read_text("utf-8").split("\n")[-2])["settings"]
