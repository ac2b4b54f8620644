# SPDX-License-Identifier: Apache-2.0
"""One owner of a run's folder at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAME = ".lock"
HEARTBEAT = 15.0
"""Seconds between two signs of life of an owner."""
STALE = 300.0
"""An owner on another machine counts as dead after so many seconds without a sign of life."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockError(ValueError):
    """A folder that another process owns, or that is no longer there."""


class FolderLock:
    """Owns a folder, as a context manager; the folder is made where it is missing.

    The lock is a file ``.lock`` in the folder: it names its owner (host, process and its start),
    is locked for the system (``flock``) and touched every :data:`HEARTBEAT` seconds by a thread. A
    second owner is refused. A dead owner is not in the way (:func:`is_alive`).

    Leaving the context removes the file, and the folders that it made, and one that was empty
    before, if nothing else is in them: a run that is refused leaves nothing behind.

    Args:
        folder: The folder to own.

    Raises:
        LockError: On entry, if another process owns it, in one line with host, process and age.
        OSError: On entry, if it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._handle = -1
        self._made: list[Path] = []
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._made = _make(self.folder)
        try:
            while not self._try():
                pass
        except BaseException:
            self._remove_made()
            raise
        threading.Thread(target=self._beat, name=f"lock of {self.folder}", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self.is_held():
            with suppress(OSError):
                self.path.unlink()  # before it is unlocked, so that nobody locks a file in vain
        os.close(self._handle)
        self._handle = -1
        self._remove_made()

    def is_held(self) -> bool:
        """Return whether the folder is there, and still this owner's."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def check(self) -> None:
        """Refuse to write into a folder that was deleted, moved or taken over.

        Raises:
            LockError: In one line.
        """
        if not self.is_held():
            what = "has lost its .lock" if self.folder.is_dir() else "was deleted or moved"
            raise LockError(
                f"{self.folder} {what} while its run was going on; nothing more is written there; "
                "what was saved before can be continued wherever it is now, with --resume"
            )

    def _try(self) -> bool:
        """Take the lock; return False where its file was removed meanwhile."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            locked = _flock(handle)
            if not os.path.samestat(os.fstat(handle), os.stat(self.path)):
                os.close(handle)
                return False
            self._refuse_living(handle, locked)
            self._sign(handle)
        except FileNotFoundError:
            os.close(handle)
            return False
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def _refuse_living(self, handle: int, locked: bool | None) -> None:
        owner = _owner(handle)
        age = max(0.0, time.time() - os.fstat(handle).st_mtime)
        if locked is False or is_alive(owner, age, certain=locked is True):
            since = time.time() - float(owner.get("since") or time.time())
            raise LockError(
                f"{self.folder} is in use by process {owner.get('pid', 'unknown')} on "
                f"{owner.get('host', 'a host unknown')}, for {_span(since)}, last sign of life "
                f"{_span(age)} ago; wait for it or stop it, or name another folder"
            )

    def _sign(self, handle: int) -> None:
        owner = json.dumps(this_process() | {"since": time.time()}) + "\n"
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, owner.encode(), 0)
        except OSError:
            with suppress(OSError):
                self.path.unlink()
            raise

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self._handle)

    def _remove_made(self) -> None:
        with suppress(OSError):  # not empty: it has become a run
            for folder in reversed(self._made):
                folder.rmdir()


def this_process() -> dict[str, Any]:
    """Describe this process: host (and its start, as names repeat), number, and when it started."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def is_alive(owner: Mapping[str, Any], age: float, certain: bool = False) -> bool:
    """Return whether an owner must be taken for alive.

    One on another machine is, until :data:`STALE` seconds without a sign of life: not every file
    system carries the system's locks across machines. One on this machine is dead where the
    system's lock was free; where there are none, when its process is gone, or is another one of the
    same number.

    Args:
        owner: As :func:`this_process` describes it; an empty one is of a file cut short.
        age: Seconds since its last sign of life.
        certain: Whether the system's lock was free, and so no process of this machine has it.
    """
    here = this_process()
    same = [owner.get(key) == here[key] for key in ("host", "boot")]
    if certain and any(same):  # a container that began anew, or a machine
        return False
    if not all(same):
        return bool(owner) and age < STALE
    started = _started(int(owner["pid"]))
    return started is not None and started == owner.get("started")


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; return what was not there, outermost first.

    An empty folder counts as not there.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1] if any(folder.iterdir()) or missing else [folder]


def _flock(handle: int) -> bool | None:
    """Lock for the system: True if done, False if another has it, None if there are no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _owner(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, as text to compare; None where it does not run."""
    try:
        # The name, in brackets, may hold anything; field 22, the start in ticks, is 20th after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _span(seconds: float) -> str:
    seconds = max(0, round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{seconds} s"
