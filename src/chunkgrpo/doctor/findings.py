# SPDX-License-Identifier: Apache-2.0
"""What a check reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chunkgrpo.doctor.patient import Patient

OK, WARNING, FAILURE, SKIPPED = "ok", "warning", "failure", "skipped"


@dataclass(frozen=True)
class Finding:
    """One thing that was measured.

    Attributes:
        name: The check's name.
        status: ``ok``, ``warning``, ``failure`` or ``skipped``.
        measured: What was measured, in words and numbers.
        bound: What it must be; empty where nothing is demanded.
        advice: What to do where it is not.
    """

    name: str
    status: str
    measured: str
    bound: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """Say all of it in one line."""
        parts = [f"{self.name}: {self.measured}"]
        parts += [f"expected: {self.bound}"] if self.bound and self.status != OK else []
        parts += [self.advice] if self.advice and self.status != OK else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Measured:
    """A finding of a check that has not been given its name yet.

    Attributes:
        status, measured, bound, advice: As in :class:`Finding`.
    """

    status: str
    measured: str
    bound: str = ""
    advice: str = ""


def ok(measured: str, bound: str = "") -> Measured:
    """A measurement within its bound."""
    return Measured(OK, measured, bound)


def warning(measured: str, bound: str = "", advice: str = "") -> Measured:
    """Something to know, with which the run can go on."""
    return Measured(WARNING, measured, bound, advice)


def failure(measured: str, bound: str = "", advice: str = "") -> Measured:
    """Something that makes the run another one than was asked for."""
    return Measured(FAILURE, measured, bound, advice)


def skipped(reason: str, advice: str = "") -> Measured:
    """Nothing was measured."""
    return Measured(SKIPPED, reason, "", advice)


def judged(fine: bool, measured: str, bound: str, advice: str) -> Measured:
    """A measurement that is a failure unless it is fine."""
    return ok(measured, bound) if fine else failure(measured, bound, advice)


def printable(text: str) -> str:
    """Return a text in one line without control characters, whoever wrote its parts."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        examine: Yields findings; its name is the check's.
        after: Checks whose failures explain one of this check, which is then not made.
        quick: Whether no network is called.
        thorough: Whether it is made only on demand.
    """

    examine: Callable[[Patient], Iterable[Measured]]
    after: tuple[Callable[[Patient], Iterable[Measured]], ...] = ()
    quick: bool = False
    thorough: bool = False

    @property
    def name(self) -> str:
        """The name by which a run leaves it out."""
        return self.examine.__name__
