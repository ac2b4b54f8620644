# SPDX-License-Identifier: Apache-2.0
"""Ending work on a signal without losing results: on Ctrl-C, and on those that schedulers send."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

EXIT_CODE = 75
"""Of a run that was told to stop and can go on: ``EX_TEMPFAIL``, "try again later"."""

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
"""What ends a run: Ctrl-C, a scheduler's end of time, and its warning before."""


class Interrupted(KeyboardInterrupt):
    """A signal of :data:`SIGNALS` ended the work; its text is the signal's name."""


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Inside this context each of :data:`SIGNALS` raises :class:`Interrupted`.

    While one is on its way out, further ones do nothing, so that what cleans up is not cut short.
    Only the main thread can set handlers; in other threads this context has no effect.
    """

    def handle(signum: int, frame: Any) -> None:
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise Interrupted(signal.Signals(signum).name)

    with _handled_by(handle):
        yield


@contextmanager
def finish_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Inside this context each of :data:`SIGNALS` calls ``stop`` instead of ending the program.

    ``stop`` may raise KeyboardInterrupt to end it all the same. Only the main thread can set
    handlers; in other threads this context has no effect.
    """

    def handle(signum: int, frame: Any) -> None:
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            return
        stop()
        # print is not safe here: the signal may have come amidst another print.
        line = f"chunkgrpo: {signal.Signals(signum).name}: stopping after this iteration; once more"
        with suppress(OSError):
            os.write(2, f"{line} stops at once\n".encode())

    with _handled_by(handle):
        yield


@contextmanager
def _handled_by(handle: Callable[[int, Any], None]) -> Iterator[None]:
    before: dict[int, Any] = {}
    try:
        for each in SIGNALS:
            before[each] = signal.signal(each, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for each, former in before.items():
            # None: whatever is not Python's had it; the default is the nearest there is.
            signal.signal(each, signal.SIG_DFL if former is None else former)
