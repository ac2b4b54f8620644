# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run: one JSON object per line, appended during the run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from chunkgrpo.runtime.files import atomic_write

__all__ = ["MetricsWriter", "read_metrics", "truncate_metrics"]


class MetricsWriter:
    """Append records to a JSON-lines file, each on disk before ``write`` returns.

    Values may be numbers, strings, booleans, None, lists and mappings of these, and anything with
    an ``item()`` that gives a number (a tensor or array of one element). JSON has no NaN and no
    infinity: such a value is written as null, and the record gets a list ``nonfinite`` of the keys
    concerned (dotted where nested), so that a diverging run stays readable and stays visible.

    An incomplete line after a crash is removed when the file is opened again.

    Args:
        path: The file; it and its folder are made if missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append one record and flush it.

        Args:
            record: Name to value; ``nonfinite`` is reserved.

        Returns:
            The record as written, with null for what was not finite.

        Raises:
            TypeError: A value, named in the message, has no JSON form.
            ValueError: The record uses the reserved key.
        """
        if "nonfinite" in record:
            raise ValueError("the key 'nonfinite' is written by MetricsWriter; rename yours")
        nonfinite: list[str] = []
        clean = {str(key): _clean(value, str(key), nonfinite) for key, value in record.items()}
        if nonfinite:
            clean["nonfinite"] = nonfinite
        self._file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint of this iteration must not survive it
        return clean

    def close(self) -> None:
        """Close the file; it may be closed twice."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a metrics file, without an incomplete last line after a crash.

    Args:
        path: A file written by :class:`MetricsWriter`; a missing one has no records.

    Returns:
        The records in the order written.

    Raises:
        ValueError: A line before the last is not a JSON object; the message gives its number.
    """
    source = Path(path)
    if not source.exists():
        return []
    lines = source.read_bytes().split(b"\n")
    lines.pop()  # empty after a whole last line; a torn line otherwise
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{source}, line {number}: expected an object, found {record!r:.60}")
        records.append(record)
    return records


def truncate_metrics(path: str | os.PathLike[str], iteration: int) -> int:
    """Remove what a run wrote after the checkpoint from which it resumes.

    Records whose ``iteration`` is greater than the given one are dropped; records without that
    key are kept. The file is replaced in one step, or left alone if nothing is to be dropped.

    Args:
        path: A file written by :class:`MetricsWriter`, at present open in no writer.
        iteration: The last iteration to keep.

    Returns:
        How many records were dropped.
    """
    records = read_metrics(path)
    kept = [r for r in records if r.get("iteration") is None or r["iteration"] <= iteration]
    if len(kept) < len(records):
        text = "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in kept)
        atomic_write(path, text)
    return len(records) - len(kept)


def _clean(value: Any, key: str, nonfinite: list[str]) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        nonfinite.append(key)
        return None
    if isinstance(value, Mapping):
        return {str(k): _clean(v, f"{key}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v, f"{key}.{i}", nonfinite) for i, v in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        try:
            return _clean(value.item(), key, nonfinite)
        except (RuntimeError, ValueError) as error:
            raise TypeError(f"metric {key!r} holds several numbers; write a list") from error
    raise TypeError(f"metric {key!r} has type {type(value).__name__}, which has no JSON form")


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
