# SPDX-License-Identifier: Apache-2.0
"""What the sections of the settings share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what to change."""


class Section(BaseModel):
    """Base of the sections: unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True
    )
