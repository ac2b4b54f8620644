# SPDX-License-Identifier: Apache-2.0
"""What the sections of the settings share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict

from chunkgrpo.plain_text import one_line

MOST_LETTERS = 990
"""Of a message, which repeats what a user has written; its middle is left out then."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message, one line, says what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, MOST_LETTERS))


class Section(BaseModel):
    """Base of the sections: unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True
    )


@contextmanager
def at(key: str) -> Iterator[None]:
    """Turn an error of a part into one of the configuration, at its key."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
