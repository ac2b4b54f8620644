# SPDX-License-Identifier: Apache-2.0
"""Texts of others (names, prompts, answers of servers) made harmless for a terminal."""

from __future__ import annotations

import re

CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
"""Characters that move the cursor, change colours, hide or reverse text, or are none at all; tab
and newline are not among them."""


def printable(text: str) -> str:
    r"""Return a text with its control characters spelled out, e.g. ``\x1b`` for the escape."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str, length: int = 2000) -> str:
    """Return a text on one printable line, with runs of white space as single spaces.

    Args:
        text: Any text.
        length: Largest number of characters; of a longer text the middle is left out.
    """
    line = "".join(
        character if character.isprintable() else ascii(character)[1:-1]
        for character in printable(" ".join(text.split()))
    )
    if len(line) <= length:
        return line
    half = length // 2 - 3
    return f"{line[:half]} ... {line[-half:]}"
