# SPDX-License-Identifier: Apache-2.0
"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

from chunkgrpo.config.limits import check_run_name


def new_folder(root: Path, name: str) -> Path:
    """Make a folder that did not exist: ``root/name``, or with a number behind.

    Two processes that ask at once get two folders.

    Raises:
        ConfigError: If the name would lead out of the root.
    """
    check_run_name(name)
    root.mkdir(parents=True, exist_ok=True)
    number, folder = 1, root / name
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = root / f"{name}-{number}"
