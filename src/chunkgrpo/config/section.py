# SPDX-License-Identifier: Apache-2.0
"""What the sections of the settings share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from chunkgrpo.plain_text import one_line


class ConfigError(ValueError):
    """A configuration that cannot be run; the message, one line, says what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Section(BaseModel):
    """Base of the sections: unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True
    )
