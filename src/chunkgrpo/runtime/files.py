# SPDX-License-Identifier: Apache-2.0
"""Writing files atomically."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["atomic_write"]


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
        temporary.unlink(missing_ok=True)
        raise
    return target
