# SPDX-License-Identifier: Apache-2.0
"""Colours that people with any kind of colour vision can tell apart.

Reference: Okabe and Ito, Color Universal Design (2008).
"""

from __future__ import annotations

__all__ = ["SERIES", "CORRECT", "WRONG", "INK", "FAINT", "EDGE"]

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)

SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""Line colours, in the order of use."""

CORRECT, WRONG = BLUE, VERMILLION
"""Frames of images that pass and fail; a tick or a cross always says the same again."""

INK, FAINT, EDGE = "#1A1A1A", "#8A8A8A", "#DCDCDC"
"""Text; lines that stay in the background; the hairline around a picture on white."""
