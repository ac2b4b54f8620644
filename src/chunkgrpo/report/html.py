# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page per run."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkgrpo.runtime.files import atomic_write

__all__ = ["write_html"]

_SUMMARY_KEYS = {"title", "subtitle", "headline", "tables", "command", "files", "notes"}
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def write_html(
    run_dir: str | os.PathLike[str],
    summary: Mapping[str, Any],
    config_yaml: str,
    images: Mapping[str, str | os.PathLike[str]],
) -> Path:
    """Write ``report.html`` into the folder of a run.

    Images are embedded, there is no script, and nothing is loaded from a network. All text is
    escaped, prompts included.

    Args:
        run_dir: The run's folder.
        summary: What the page says; every key may be missing:

            - ``title``, ``subtitle``: strings
            - ``headline``: list of {``label``, ``value``, ``note`` (may be missing)}, the few
              numbers to see first, as text with their units
            - ``tables``: list of {``title``, ``columns``: list, ``rows``: list of lists,
              ``note`` (may be missing)}
            - ``command``: the command line that reproduces the run
            - ``files``: list of {``path``, ``what``}
            - ``notes``: list of paragraphs, for example limits of the numbers shown
        config_yaml: The complete configuration of the run.
        images: Title to PNG or JPEG file, in the order shown.

    Returns:
        The path of the page.

    Raises:
        ValueError: The summary has an unknown key, or an image another format.
        OSError: An image cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    unknown = sorted(set(summary) - _SUMMARY_KEYS)
    if unknown:
        raise ValueError(f"unknown keys {unknown} in summary; known are {sorted(_SUMMARY_KEYS)}")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("run.html.j2").render(
        title=summary.get("title", f"Run {Path(run_dir).resolve().name}"),
        subtitle=summary.get("subtitle", ""),
        headline=summary.get("headline", []),
        tables=summary.get("tables", []),
        command=summary.get("command", ""),
        files=summary.get("files", []),
        notes=summary.get("notes", []),
        config_yaml=config_yaml,
        images=[(title, _data_url(Path(file))) for title, file in images.items()],
    )
    return atomic_write(Path(run_dir, "report.html"), page)


def _data_url(path: Path) -> str:
    kind = _IMAGE_TYPES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected an image in one of the formats {list(_IMAGE_TYPES)}")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
