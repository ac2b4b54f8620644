# SPDX-License-Identifier: Apache-2.0
"""Folders that are written whole or not at all."""

import errno
import os

import pytest
import torch

from chunkgrpo.runtime import files
from chunkgrpo.runtime.files import (
    atomic_folder,
    atomic_write,
    disk_problem,
    remove_folder,
    settle_folders,
)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(target, text, fail=None):
    with atomic_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text(text)
        if fail is not None:
            raise fail


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("one", "two"):
        write(tmp_path / "model", text)
        assert tree(tmp_path) == {"model/inner/file": text}


@pytest.mark.parametrize("fail", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_where_it_fails_the_old_one_stays(tmp_path, fail):
    for text in ("", "old"):
        with pytest.raises(type(fail)):
            write(tmp_path / "model", "new", fail)
        assert tree(tmp_path) == ({"model/inner/file": "old"} if text == "old" else {})
        write(tmp_path / "model", "old")


@pytest.mark.parametrize("number", range(2))
def test_each_rename_may_fail(tmp_path, monkeypatch, number):
    write(tmp_path / "model", "old")
    rename, calls = os.rename, []

    def failing(*names):
        calls.append(names)
        if len(calls) == number + 1:
            raise OSError(errno.EIO, "no")
        rename(*names)

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "model", "new")
    assert tree(tmp_path) == {"model/inner/file": "old"}


def test_a_crash_between_two_renames_is_mended(tmp_path):
    write(tmp_path / "model", "old")
    os.rename(tmp_path / "model", tmp_path / ".model.old")
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".x.removed").mkdir()
    (tmp_path / ".best.json.4711.0a1b2c3d.tmp").write_text("{")
    settle_folders(tmp_path)
    assert tree(tmp_path) == {"model/inner/file": "old"} and len(list(tmp_path.iterdir())) == 1


def test_a_crash_after_both_renames_leaves_the_new_one(tmp_path):
    write(tmp_path / ".model.old", "old")
    write(tmp_path / "model", "new")
    settle_folders(tmp_path)
    (tmp_path / ".notes.tmp").touch()  # not of ours
    settle_folders(tmp_path)
    assert tree(tmp_path) == {"model/inner/file": "new", ".notes.tmp": ""}
    settle_folders(tmp_path / "nowhere")


def test_what_is_removed_never_comes_back_in_part(tmp_path, monkeypatch):
    write(tmp_path / "model", "old")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # a kill in the middle
        remove_folder(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    settle_folders(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_a_run_that_is_gone_is_not_made_anew(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone" / "model", "new")
    assert not (tmp_path / "gone").exists()


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    place = "/proc/self/fd/{}"

    def noted(handle):
        events.append(os.readlink(place.format(handle)))
        fsync(handle)

    def named(source, target):
        events.append(f"rename {os.path.basename(source)} {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(files.os, "fsync", noted)
    monkeypatch.setattr(files.os, "rename", named)
    write(tmp_path / "model", "new")
    partial = f"{tmp_path}/.model.partial"
    assert events == [
        f"{partial}/inner/file", f"{partial}/inner", partial, "rename .model.partial model",
        str(tmp_path),
    ]  # fmt: skip
    events.clear()
    atomic_write(tmp_path / "file", "text")
    assert len(events) == 2 and events[1] == str(tmp_path)


def test_what_safetensors_says_of_a_disk_is_an_error_of_the_system(tmp_path):
    from safetensors.torch import save_file

    with (
        pytest.raises(FileNotFoundError, match="No such file") as caught,
        atomic_folder(tmp_path / "m") as partial,
    ):
        save_file({"a": torch.zeros(1)}, partial / "nowhere" / "a.safetensors")
    assert caught.value.errno == errno.ENOENT and not list(tmp_path.iterdir())


def test_a_problem_names_the_place_and_the_fix(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    expected = f"{tmp_path} cannot be written: No space left on device; make space there"
    assert disk_problem(full, tmp_path) == expected
    inner = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "x"))
    assert disk_problem(inner, tmp_path).startswith(f"{tmp_path} cannot be written: Read-only")
    other = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/cache")
    assert disk_problem(other, tmp_path).startswith("/elsewhere/cache cannot be written")
    assert disk_problem(OSError("odd"), tmp_path) == f"{tmp_path} cannot be written: odd"
