# SPDX-License-Identifier: Apache-2.0
"""``history.jsonl`` of a run: how it began, every time it went on, and what changed.

One JSON object per line, each with its own SHA-256, so that a damaged line is noticed:

``start``
    The settings that the run began with, complete, digests of its prompts, and the directory from
    which it was started.
``resume``
    When it went on, and with which settings, complete.
``stop``, ``finish``
    When it was told to stop, and when its model was written.
``change``
    One setting: ``key``, ``old``, ``new`` and ``given``, where the new value stood. It holds for
    the iterations after ``iteration``.
``note``
    Anything else that a reader of the results should know, such as lost lines of metrics.

Every line has the time (UTC), the version of this package, and ``iteration``, the last finished
one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chunkgrpo import __version__
from chunkgrpo.config import ConfigError
from chunkgrpo.runtime.files import atomic_write

HISTORY = "history.jsonl"


class HistoryError(ConfigError):
    """A history that cannot be read; the message names the line."""


@dataclass(frozen=True)
class History:
    """What a history says.

    Attributes:
        path: The file.
        records: Its lines.
        torn: Whether the last line was incomplete, after a crash, and is left out.
    """

    path: Path
    records: Sequence[Mapping[str, Any]] = ()
    torn: bool = False

    def settings(self) -> dict[str, Any] | None:
        """Return the settings in force, as they were last written; None where no line has any."""
        held = [record["settings"] for record in self.records if "settings" in record]
        return held[-1] if held else None

    def prompts(self) -> dict[str, Any]:
        """Return the digests of the prompts that the run began with."""
        return dict(next((r["prompts"] for r in self.records if r["event"] == "start"), {}))

    @property
    def iteration(self) -> int:
        """The highest number of finished iterations that a line mentions."""
        return max((r["iteration"] for r in self.records), default=0)

    @property
    def finished(self) -> int:
        """Iterations of the model in ``model/``; 0 where it was never written."""
        ends = [r["iteration"] for r in self.records if r["event"] == "finish"]
        return ends[-1] if ends else 0


def read_history(folder: Path) -> History:
    """Read the history of a run; one that is missing has no records.

    Raises:
        HistoryError: If a whole line is damaged or not of the form that is written.
        OSError: If it cannot be read.
    """
    path = folder / HISTORY
    if not path.exists():
        return History(path)
    *lines, torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            sound = record["sha256"] == _digest(record) and _whole(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise HistoryError(
                f"{path}, line {number} is damaged: its content is not that of its own SHA-256"
            )
        records.append(record)
    return History(path, records, bool(torn))


def line_of(event: str, iteration: int, **more: Any) -> dict[str, Any]:
    """Return a line for :func:`append_history`; see the top of this module for the events."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    first = {"time": now, "event": event, "version": __version__, "iteration": iteration}
    return {**first, **more}


def append_history(folder: Path, *records: Mapping[str, Any]) -> None:
    """Append lines, all or none; they are on the disk when this returns.

    An incomplete last line, of a crash, is cut off first.
    """
    path = folder / HISTORY
    before = path.read_bytes() if path.exists() else b""
    lines = [
        json.dumps({**record, "sha256": _digest(record)}, ensure_ascii=False) + "\n"
        for record in records
    ]
    atomic_write(path, before[: before.rfind(b"\n") + 1] + "".join(lines).encode())


def set_aside(path: Path) -> Path:
    """Give a damaged file another name, so that nothing is lost; return it."""
    number, target = 1, path.with_name(f"{path.stem}.damaged{path.suffix}")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")
    os.replace(path, target)
    return target


def _digest(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _whole(record: Mapping[str, Any]) -> bool:
    """Whether a line has what its event has; with a sound digest only other versions lack it."""
    wanted = {"start": {"settings", "prompts"}, "change": {"key", "old", "new"}}
    return {"time", "version", "iteration", *wanted.get(record["event"], set())} <= set(record)
