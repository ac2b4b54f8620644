# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run: one JSON object per line, appended during the run."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from chunkgrpo.runtime.files import atomic_write

__all__ = [
    "MetricsWriter",
    "irregular_iterations",
    "lost_metrics",
    "read_metrics",
    "spans",
    "torn_line",
    "truncate_metrics",
]


SEAL = "crc32"
_SEALED = re.compile(rb'(?:, )?"crc32": (\d{10})\}\Z')


# With the name damaged, the number is still there.
_LIKE_SEALED = re.compile(rb'": \d{10}\}\Z')


class MetricsWriter:
    """Append records to a JSON-lines file, each on disk before ``write`` returns.

    Values may be numbers, strings, booleans, None, lists and mappings of these, and anything with
    an ``item()`` that gives a number (a tensor or array of one element). JSON has no NaN and no
    infinity: such a value is written as null, and the record gets a list ``nonfinite`` of the keys
    concerned (dotted where nested), so that a diverging run stays readable and stays visible.

    A line ends with ``crc32``, the checksum of what stands before it: a line that was edited or
    damaged is named when the file is read.

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
            record: Name to value; ``nonfinite`` and ``crc32`` are reserved.

        Returns:
            The record as written, with null for what was not finite.

        Raises:
            TypeError: A value, named in the message, has no JSON form.
            ValueError: The record uses the reserved key.
        """
        for key in ("nonfinite", SEAL):
            if key in record:
                raise ValueError(f"the key {key!r} is written by MetricsWriter; rename yours")
        nonfinite: list[str] = []
        clean = {str(key): _clean(value, str(key), nonfinite) for key, value in record.items()}
        if nonfinite:
            clean["nonfinite"] = nonfinite
        self._file.write(_sealed(clean))
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
        ValueError: A whole line is not what a writer writes: no JSON object, ``iteration`` no whole
            number from 1 on, text where another line has a number, or a checksum that is not that
            of the line, or none where earlier ones have one; the message gives file and line.
    """
    source = Path(path)
    if not source.exists():
        return []
    lines = source.read_bytes().split(b"\n")
    lines.pop()  # empty after a whole last line; a torn line otherwise
    records: list[dict[str, Any]] = []
    numeric: dict[str, int] = {}
    sealed = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sealed = sealed or bool(_LIKE_SEALED.search(line))
            records.append(_record(line, number, numeric, sealed))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{source}:{number}: {error}; put the line back as it was, or delete it: its "
                "iteration is reported as lost then"
            ) from None
    return records


def _record(line: bytes, number: int, numeric: dict[str, int], sealed: bool) -> dict[str, Any]:
    """Read one line; ``numeric`` collects in which line a key first was a number.

    A ``sealed`` line must have a checksum, which is left out. Those before the first one with a
    checksum may be of version 0.1, which wrote none.
    """
    try:
        record = json.loads(line, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {record!r:.60}")
    iteration = record.get("iteration")
    if "iteration" in record and (type(iteration) is not int or iteration < 1):
        raise ValueError(f"iteration is {iteration!r:.60}, no whole number from 1 on")
    for key, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            numeric.setdefault(key, number)
        elif isinstance(value, str | list | dict) and key in numeric:
            raise ValueError(f"{key} is {value!r:.60}, and a number in line {numeric[key]}")
    found = _SEALED.search(line)
    if sealed and (found is None or _checksum(line[: found.start()]) != int(found[1])):
        raise ValueError(f"the line is not as it was written: its {SEAL} is of another")
    record.pop(SEAL, None)
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def torn_line(path: str | os.PathLike[str]) -> bool:
    """Return whether the last line of a metrics file is incomplete, as a crash leaves it."""
    source = Path(path)
    content = source.read_bytes() if source.exists() else b""
    return bool(content) and not content.endswith(b"\n")


def irregular_iterations(records: Sequence[Mapping[str, Any]], last: int) -> list[str]:
    """Return what is wrong with the iterations of a metrics file, in half sentences.

    Args:
        records: As :func:`read_metrics` gives them.
        last: Number of iterations that were recorded once; each should stand there once, in order.
    """
    numbers = [r["iteration"] for r in records if r.get("iteration") is not None]
    counts = Counter(numbers)
    found = []
    missing = [i for i in range(1, last + 1) if i not in counts]
    if missing:
        found.append(f"iterations {spans(missing)} are missing")
    repeated = sorted(i for i, count in counts.items() if count > 1)
    if repeated:
        found.append(f"iterations {spans(repeated)} stand there more than once")
    if numbers != sorted(numbers):
        found.append("iterations are not in order")
    return found


def spans(numbers: Sequence[int]) -> str:
    """Return increasing numbers as text, ``1 to 3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in runs)


def truncate_metrics(path: str | os.PathLike[str], iteration: int) -> int:
    """Move what a run wrote after the checkpoint from which it resumes to ``NAME.lost.jsonl``.

    Records whose ``iteration`` is greater than the given one are moved; records without that
    key are kept. The file is replaced in one step, or left alone if nothing is to be moved.

    Args:
        path: A file written by :class:`MetricsWriter`, at present open in no writer.
        iteration: The last iteration to keep.

    Returns:
        How many records were moved.
    """
    records = read_metrics(path)
    kept = [r for r in records if r.get("iteration") is None or r["iteration"] <= iteration]
    lost = [r for r in records if r.get("iteration") is not None and r["iteration"] > iteration]
    if lost:
        with lost_metrics(path).open(
            "a", encoding="utf-8"
        ) as file:  # first: better twice than never
            file.write(_lines(lost))
            file.flush()
            os.fsync(file.fileno())
        atomic_write(path, _lines(kept))
    return len(lost)


def lost_metrics(path: str | os.PathLike[str]) -> Path:
    """Return the file for what :func:`truncate_metrics` moves: ``metrics.lost.jsonl``."""
    return Path(path).with_suffix(".lost.jsonl")


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(_sealed(record) for record in records)


def _checksum(text: bytes) -> int:
    """Return a number of ten digits, whatever the text."""
    return zlib.crc32(text) + 10**9


def _sealed(record: Mapping[str, Any]) -> str:
    """Return a record as a line with its checksum."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False).removesuffix("}")
    comma = ", " if record else ""
    return f'{text}{comma}"{SEAL}": {_checksum(text.encode())}}}\n'


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
