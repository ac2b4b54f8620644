# SPDX-License-Identifier: Apache-2.0
"""One owner of a folder: the living are respected, the dead are not in the way."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from chunkgrpo.runtime import lock
from chunkgrpo.runtime.lock import NAME, STALE, FolderLock, LockError, is_alive, this_process

HOLD = """
import sys, time
from pathlib import Path
from chunkgrpo.runtime.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def held_by_another(folder):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    return child


def test_a_second_owner_is_refused_and_the_dead_is_not_in_the_way(tmp_path):
    folder = tmp_path / "run"
    child = held_by_another(folder)
    try:
        with pytest.raises(LockError) as caught, FolderLock(folder):
            pass
        message = str(caught.value)
        assert f"process {child.pid} on {socket.gethostname()}" in message and "\n" not in message
        assert "last sign of life" in message and "name another folder" in message
        (folder / "config.yaml").write_text("a run")
    finally:
        child.kill()
        child.wait()
    assert (folder / NAME).exists()  # as a killed owner leaves it
    with FolderLock(folder) as mine:
        assert mine.is_held()
        assert json.loads((folder / NAME).read_text())["pid"] == os.getpid()
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]


def test_one_process_cannot_own_a_folder_twice(tmp_path):
    with FolderLock(tmp_path / "run"):
        with (
            pytest.raises(LockError, match=f"process {os.getpid()} "),
            FolderLock(tmp_path / "run"),
        ):
            pass
        (tmp_path / "run" / "kept").touch()
    with FolderLock(tmp_path / "run"):
        pass


def test_what_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), FolderLock(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


HERE = this_process()
ELSEWHERE = HERE | {"host": "node-7", "boot": "another"}


@pytest.mark.parametrize(
    ("owner", "age", "free", "alive"),
    [
        (HERE, 0, False, True),
        (HERE, 10 * STALE, False, True),  # a process that hangs is one all the same
        (HERE, 0, True, False),  # the system's lock was free
        (HERE | {"pid": 2**22 + 1}, 0, False, False),
        (HERE | {"started": "1"}, 0, False, False),  # its number was given to another
        (ELSEWHERE, 0, False, True),
        (ELSEWHERE, 0, True, True),  # not every file system tells the other machines
        (ELSEWHERE, STALE + 1, False, False),
        (ELSEWHERE, STALE + 1, True, False),
        (HERE | {"boot": "before"}, 0, True, False),  # this machine, begun anew
        (HERE | {"host": "container-2"}, 0, True, False),  # a container, begun anew
        ({}, 0, False, False),  # cut short
    ],
)
def test_who_is_alive(owner, age, free, alive):
    assert is_alive(owner, age, free) is alive


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}', "\x00" * 50])
def test_a_lock_cut_short_is_of_a_dead_owner(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with FolderLock(tmp_path) as mine:
        assert mine.is_held()


@pytest.mark.parametrize(("age", "refused"), [(10, True), (STALE + 10, False)])
@pytest.mark.parametrize("locks", [True, False])
def test_an_owner_elsewhere_counts_by_its_last_sign_of_life(
    tmp_path, monkeypatch, age, refused, locks
):
    (tmp_path / NAME).write_text(json.dumps(ELSEWHERE | {"since": time.time() - 7500}))
    then = time.time() - age
    os.utime(tmp_path / NAME, (then, then))
    if not locks:
        monkeypatch.setattr(lock, "_flock", lambda handle: None)
    if refused:
        with pytest.raises(LockError, match="on node-7, for 2 h 5 min, last sign of life 10 s ago"):
            FolderLock(tmp_path).__enter__()
        assert json.loads((tmp_path / NAME).read_text())["host"] == "node-7"
        return
    with FolderLock(tmp_path) as mine:
        assert mine.is_held()


def test_without_locks_of_the_system_the_file_alone_protects(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda handle: None)
    with FolderLock(tmp_path), pytest.raises(LockError):
        FolderLock(tmp_path).__enter__()


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with FolderLock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.time() + 30
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.time() < deadline
            time.sleep(0.01)


def test_a_folder_that_is_gone_is_noticed(tmp_path):
    folder = tmp_path / "run"
    with FolderLock(folder) as mine:
        mine.check()
        (folder / NAME).unlink()
        with pytest.raises(LockError, match=r"has lost its \.lock"):
            mine.check()
        (folder / NAME).touch()  # another's
        with pytest.raises(LockError, match=r"has lost its \.lock"):
            mine.check()
        shutil.rmtree(folder)
        with pytest.raises(LockError, match="was deleted or moved"):
            mine.check()
    assert not folder.exists()


def test_another_owners_lock_is_not_removed_on_leaving(tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).write_text("another's")
    assert (tmp_path / NAME).read_text() == "another's"


def test_of_many_that_try_at_once_one_succeeds(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from chunkgrpo.runtime.lock import FolderLock, LockError\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try:\n    with FolderLock(Path(sys.argv[1])):\n"
        "        print('mine', flush=True); sys.stdin.readline()\n"
        "except LockError:\n    print('refused', flush=True)\n"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / NAME).write_text(json.dumps(HERE | {"pid": 2**22 + 1}))  # a dead owner
    (folder / "kept").touch()
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    answers = [child.stdout.readline() for child in children if child.stdout is not None]
    for child in children:
        child.communicate("\n")
    assert sorted(answers) == ["mine\n"] + ["refused\n"] * 5
    assert [p.name for p in folder.iterdir()] == ["kept"]
