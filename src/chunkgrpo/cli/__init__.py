# SPDX-License-Identifier: Apache-2.0
"""The command line. Everything heavy is imported inside the commands."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

# Importing a module registers its commands, in this order.
from chunkgrpo.cli import training  # noqa: F401  # isort: skip
from chunkgrpo.cli import examining  # noqa: F401  # isort: skip
from chunkgrpo.cli import results  # noqa: F401  # isort: skip
from chunkgrpo.cli import telling  # noqa: F401  # isort: skip
from chunkgrpo.cli import cutting  # noqa: F401  # isort: skip
from chunkgrpo.cli import serving  # noqa: F401  # isort: skip
from chunkgrpo.cli import embedded  # noqa: F401  # isort: skip
from chunkgrpo.cli.common import app, echo
from chunkgrpo.runtime.interrupts import EXIT_CODE

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    # An installed command does not import from the current folder; a user's rewards may be there.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        app()
    except SystemExit as ending:
        if ending.code == EXIT_CODE:
            leave_at_once()
        raise
    except KeyboardInterrupt:
        echo("chunkgrpo: interrupted", err=True)
        sys.exit(130)


def leave_at_once() -> None:
    """End the program where a thread is still at work: Python would wait for it.

    A reward that hangs in a thread of its own must not keep a run that was told to stop.
    """
    others = [each for each in threading.enumerate() if each is not threading.main_thread()]
    if any(not each.daemon for each in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)
