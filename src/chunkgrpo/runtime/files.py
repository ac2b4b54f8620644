# SPDX-License-Identifier: Apache-2.0
"""Writing files and folders atomically."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "atomic_folder",
    "atomic_write",
    "disk_problem",
    "is_disk_problem",
    "remove_folder",
    "settle_folders",
]

_FIXES = {
    errno.ENOSPC: "make space there",
    errno.EDQUOT: "make space within the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "look after the disk",
}

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
"""Names of the hidden files of :func:`atomic_write`."""

_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""What file systems answer that cannot flush a folder."""


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file atomically: a reader, or a crash, never finds a part of it.

    The data go to a hidden file beside the target, are flushed to the disk, and then take the
    target's name in one step (``os.replace``). Missing parent folders are made. Where anything
    fails, the target keeps its old content and the hidden file is removed.

    Args:
        path: The file to write; replaced if it exists.
        data: Its whole content; text is encoded as UTF-8, line ends unchanged.

    Returns:
        The path written.

    Raises:
        OSError: The folder cannot be made or the file cannot be written.
    """
    target = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush(target.parent)
    return target


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder whole or not at all; an older one of that name stays until then.

    The context gets a new, hidden folder ``.NAME.partial`` beside the target. At its end every file
    and folder in it is flushed to the disk, and it takes the target's name. An older target is
    set aside as ``.NAME.old`` for the moment between two renames; where a crash falls into that
    moment, :func:`settle_folders` puts it back. Where anything fails the target is as it was, and
    the hidden folder is removed. Only one process may write a target at a time.

    Args:
        target: The folder to write; its parent must exist, so that a run whose folder was deleted
            does not come to life again as a part of one.

    Yields:
        The folder to write into.

    Raises:
        OSError: It cannot be written; also for what safetensors says of a disk.
    """
    target = Path(target)
    partial, old = _beside(target, "partial"), _beside(target, "old")
    _discard(partial)
    partial.mkdir()
    try:
        yield partial
        _flush_tree(partial)
        if target.exists():
            _discard(old)
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException as error:
        with suppress(OSError):
            if old.exists() and not target.exists():
                os.rename(old, target)
        shutil.rmtree(partial, ignore_errors=True)
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and not isinstance(error, OSError):  # safetensors has an error of its own
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def disk_problem(error: OSError, place: Path) -> str:
    """Return in half a sentence why a place cannot be written, and what to do, where that is known.

    Args:
        error: What the system said; its own file is named where that lies elsewhere.
        place: The folder that was written to.
    """
    where = Path(error.filename) if isinstance(error.filename, str) else place
    if where.is_relative_to(place) or where == place.parent:
        where = place
    fix = _FIXES.get(error.errno or 0)
    return f"{where} cannot be written: {error.strerror or error}" + (f"; {fix}" if fix else "")


def is_disk_problem(error: OSError) -> bool:
    """Return whether the disk, rather than what was asked for, is at fault."""
    return error.errno in _FIXES


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever met under its name."""
    removed = _beside(folder, "removed")
    _discard(removed)
    os.rename(folder, removed)
    # What cannot be removed now (a reader may have it open) is tried again by settle_folders.
    shutil.rmtree(removed, ignore_errors=True)


def settle_folders(parent: Path) -> None:
    """Tidy up after a crash within one of these functions, in one folder.

    Partial files and folders and removed folders are deleted; a folder that was set aside comes
    back, unless its successor had taken its place. Nobody may be writing there.
    """
    for hidden in parent.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(hidden.name):
            hidden.unlink()
    for kind in ("partial", "old", "removed"):
        for hidden in parent.glob(f".*.{kind}"):
            target = parent / hidden.name.removeprefix(".").removesuffix(f".{kind}")
            if kind == "old" and not target.exists():
                os.rename(hidden, target)
            else:
                shutil.rmtree(hidden, ignore_errors=True)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _discard(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(Path(place, name))
        _flush(Path(place))


def _flush(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _UNSYNCED:
            raise
    finally:
        os.close(handle)
