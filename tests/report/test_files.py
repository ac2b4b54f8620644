# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from chunkgrpo.runtime.files import atomic_write


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    assert atomic_write(tmp_path / "deep" / "a.txt", "σ\n").read_bytes() == "σ\n".encode()
    assert atomic_write(str(tmp_path / "b"), b"\r\n\x00").read_bytes() == b"\r\n\x00"


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "one")
    atomic_write(tmp_path / "a", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"


def test_a_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = atomic_write(tmp_path / "a", "old")

    def broken(source: object, destination: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert target.read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="permission bits are a POSIX matter")
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    written = atomic_write(tmp_path / "atomic", "")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode
