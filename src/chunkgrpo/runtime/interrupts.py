# SPDX-License-Identifier: Apache-2.0
"""Ending work on Ctrl-C without losing results."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def finish_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Inside this context an interrupt calls ``stop`` instead of raising KeyboardInterrupt.

    Only the main thread can set handlers; in other threads this context has no effect.
    """

    def handle(signum: int, frame: Any) -> None:
        stop()

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
