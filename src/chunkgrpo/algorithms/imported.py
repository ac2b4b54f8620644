# SPDX-License-Identifier: Apache-2.0
"""A trust region of the user's own, named by its import path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from chunkgrpo.core.trust import TrustRegion
from chunkgrpo.imported_code import import_named

TRUST_REGION = ("needs_divergence", "value", "slope", "is_cut")
"""What a trust region must have, see :class:`~chunkgrpo.core.trust.TrustRegion`."""


@dataclass(frozen=True)
class ImportedTrust:
    """A trust region that ``package.module:factory`` returns.

    Attributes:
        path: Import path of a function or class that returns a
            :class:`~chunkgrpo.core.trust.TrustRegion`.
        options: Its arguments.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kind: Literal["imported"] = field(default="imported", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Import it, so that a wrong path is reported before a model is loaded."""
        try:
            made = import_named(self.path)(**self.options)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"trust region {self.path!r} cannot be built: {error}") from error
        missing = [each for each in TRUST_REGION if not hasattr(made, each)]
        if missing:
            raise ValueError(
                f"trust region {self.path!r} is a {type(made).__name__} without "
                f"{', '.join(missing)}; it must have {', '.join(TRUST_REGION)}"
            )
        object.__setattr__(self, "_region", made)

    @property
    def region(self) -> TrustRegion:
        """The trust region itself."""
        return self._region  # type: ignore[attr-defined] # set in __post_init__

    @property
    def needs_divergence(self) -> bool:
        """Whether the KL of a chunk to the old policy is read."""
        return self.region.needs_divergence

    def value(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """Loss of each ratio."""
        return self.region.value(log_ratio, advantages, divergence)

    def slope(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """Derivative of the loss with respect to the log-ratio."""
        return self.region.slope(log_ratio, advantages, divergence)

    def is_cut(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """Where the trust region cuts the gradient."""
        return self.region.is_cut(log_ratio, advantages, divergence)
