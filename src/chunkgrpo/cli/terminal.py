# SPDX-License-Identifier: Apache-2.0
"""The console that every command prints to: texts of others are shown, never interpreted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from chunkgrpo.plain_text import CONTROLS, printable


class PlainConsole(Console):
    """A console without markup, whose texts cannot move the cursor or change the terminal.

    ``[red]`` in a name is printed as it stands. Control characters are spelled out (``\\x1b``)
    wherever they come from: a plain text, a cell of a table, or a progress bar.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as usual, with control characters in texts spelled out."""
        for segment in super().render(renderable, options):
            if segment.control is None and CONTROLS.search(segment.text):
                yield Segment(printable(segment.text), segment.style)
            else:
                yield segment
