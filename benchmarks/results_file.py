# SPDX-License-Identifier: Apache-2.0
"""Files of results that benchmarks add to, and pages that hold their tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkgrpo.config import Config
from chunkgrpo.config.build import resolve_model
from chunkgrpo.runtime.files import atomic_write


def weights_digest(config: Config) -> str:
    """Return what tells a model's weights from others."""
    digest = hashlib.sha256()
    for path in sorted(Path(resolve_model(config.model.path)).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_results(path: Path, setup: Mapping[str, Any]) -> dict[str, Any]:
    """Read the results so far.

    Raises:
        SystemExit: If they are of another setup.
    """
    if not path.exists():
        return {"setup": dict(setup), "runs": {}}
    results = json.loads(path.read_text())
    other = {k: (results["setup"].get(k), v) for k, v in setup.items()}
    other = {k: pair for k, pair in other.items() if pair[0] != pair[1]}
    if other:
        told = ", ".join(f"{k} {before!r} instead of {now!r}" for k, (before, now) in other.items())
        raise SystemExit(f"{path} holds results of another setup: {told}; choose another --out")
    return results


def put_between(page: Path, begin: str, end: str, content: str) -> None:
    """Put text between two marks of a page.

    Raises:
        SystemExit: If the page has no such marks.
    """
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page} needs one line {begin} and one {end}")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    atomic_write(page, f"{head}{begin}\n{content}\n{end}{tail}")
