# SPDX-License-Identifier: Apache-2.0
"""Attacks on a run, counted: each attempt is survived where the test's assertions hold.

``make attack`` runs these tests with ``CHUNKGRPO_ATTACK=full`` and prints one table from the
attempts, which the fixture ``attempt`` writes into the file that ``CHUNKGRPO_ATTACK_LOG`` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

Attempt = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether to try as much as ``make attack`` does, instead of a sample in seconds."""
    return os.environ.get("CHUNKGRPO_ATTACK") == "full"


@pytest.fixture(scope="session")
def attempt() -> Attempt:
    """``with attempt("state on disk", "flipped bit in a checkpoint"): ...`` counts one attempt.

    The body attacks and asserts the right outcome; an exception means "not survived", and the
    test fails with it. ``times`` counts a body that tries several at once.
    """

    @contextmanager
    def counted(part: str, attack: str, times: int = 1) -> Iterator[None]:
        survived = False
        try:
            yield
            survived = True
        finally:
            log = os.environ.get("CHUNKGRPO_ATTACK_LOG")
            if log:
                line = {
                    "part": part,
                    "attack": attack,
                    "tried": times,
                    "survived": times if survived else 0,
                }
                # One short write to a file opened for appending: workers do not mix their lines.
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    return counted
