# SPDX-License-Identifier: Apache-2.0
"""Recipes: a YAML file each, whose leading comment line says what it is."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """List the recipes' names."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return a recipe's file."""
    return FOLDER / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """Return the first comment line of a recipe."""
    first = recipe_path(name).read_text().splitlines()[0]
    return first.removeprefix("#").strip()
