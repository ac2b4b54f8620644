# SPDX-License-Identifier: Apache-2.0
"""The published methods in this library: what each needs and what an iteration costs."""

from __future__ import annotations

from dataclasses import dataclass

from chunkgrpo.config import Config, load_config
from chunkgrpo.cost import Cost, iteration_cost
from chunkgrpo.recipes import method_names, recipe_notes


@dataclass(frozen=True)
class Method:
    """A published method as a recipe on the embedded model.

    Attributes:
        name: Of its recipe.
        summary, paper, needs, published: From the recipe's leading comment.
        config: The recipe, resolved.
        cost: Of one iteration.
    """

    name: str
    summary: str
    paper: str
    needs: str
    published: str
    config: Config
    cost: Cost


def read_method(name: str) -> Method:
    """Read a method's recipe."""
    notes, config = recipe_notes(name), load_config(name)
    return Method(
        name,
        notes["summary"],
        notes["paper"],
        notes["needs"],
        notes["published"],
        config,
        iteration_cost(config),
    )


def read_methods() -> list[Method]:
    """Read every method."""
    return [read_method(name) for name in method_names()]
