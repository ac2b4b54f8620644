# SPDX-License-Identifier: Apache-2.0
"""Telling a path from an id on a hub, so that a wrong path is never asked of a network."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILES = (
    ".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".safetensors", ".pt",
    ".pth", ".bin", ".ckpt", ".onnx", ".gguf", ".npz", ".npy", ".png", ".zip",
)  # fmt: skip


def why_local(text: str) -> str | None:
    """Return why a name can only be a path; None where it may be a hub id, ``owner/name``.

    A name that nothing exists at is a path where it begins with ``/``, ``.`` or ``~``, ends like a
    file, is not two words around one slash, or its first part is a folder here.
    """
    if text.startswith(("/", ".", "~")) or os.path.isabs(text):
        return "it begins like a path"
    if Path(text).suffix.lower() in _FILES:
        return f"it ends in {Path(text).suffix}, as files do"
    if not _HUB_ID.fullmatch(text):
        return "a hub id is owner/name"
    owner = text.partition("/")[0]
    if Path(owner).is_dir():
        return f"{owner} is a folder here, and holds no such thing"
    return None


def local_path(text: str | os.PathLike[str]) -> Path | None:
    """Return the path that a name means, with ``~`` expanded; None for an id on a hub.

    Args:
        text: What was given. A :class:`~pathlib.Path` is always a path.

    Raises:
        FileNotFoundError: If it can only be a path (:func:`why_local`), and nothing is there.
    """
    name = os.fspath(text)
    if not name or "\0" in name:
        raise FileNotFoundError(f"{name!r} is no path and no hub id")
    path = Path(name).expanduser()
    if path.exists():
        return path
    reason = "it is a path" if isinstance(text, os.PathLike) else why_local(name)
    if reason:
        raise FileNotFoundError(f"{name} does not exist ({reason})")
    return None
