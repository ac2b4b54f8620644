# SPDX-License-Identifier: Apache-2.0
"""Examining a run before it starts: whether it is the run that was asked for."""

from chunkgrpo.doctor.findings import Check, Finding
from chunkgrpo.doctor.runner import (
    DoctorError,
    examine,
    examine_as_set,
    in_words,
    lines_of,
    refuse,
)

__all__ = [
    "Check",
    "DoctorError",
    "Finding",
    "examine",
    "examine_as_set",
    "in_words",
    "lines_of",
    "refuse",
]
