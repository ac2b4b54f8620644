# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files whose leading comment describes them.

``schema.json`` is their JSON Schema, which the first line of each names for editors.
``*.yaml`` are runs to start from, ``methods/*.yaml`` published methods on the embedded model,
``base/*.yaml`` what others extend. ``extends: NAME`` puts a recipe's settings over another's.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
SCHEMA_LINE = "# yaml-language-server:"
"""Begins the line that names the schema to editors."""

FOLDERS = {"recipe": FOLDER, "method": FOLDER / "methods", "base": FOLDER / "base"}


def recipe_names() -> list[str]:
    """List the recipes' names, methods not included."""
    return _names("recipe")


def method_names() -> list[str]:
    """List the methods' names."""
    return _names("method")


def base_names() -> list[str]:
    """List what a recipe can extend."""
    return sorted(name for kind in FOLDERS for name in _names(kind))


def _names(kind: str) -> list[str]:
    return sorted(path.stem for path in FOLDERS[kind].glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe, a method or a base.

    Raises:
        KeyError: If there is none.
    """
    for folder in FOLDERS.values():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise KeyError(name)


def recipe_summary(name: str) -> str:
    """Return the first comment line of a recipe."""
    return recipe_notes(name)["summary"]


def recipe_notes(name: str) -> dict[str, str]:
    """Return the leading comment of a recipe: its first line as ``summary``, the rest by key."""
    notes: dict[str, str] = {}
    last = "summary"
    for line in recipe_path(name).read_text().splitlines():
        if not line.startswith("#"):
            break
        if line.startswith(SCHEMA_LINE):
            continue
        text = line[1:].strip()
        key, separator, rest = text.partition(":")
        if not notes:
            notes["summary"] = text
        elif separator and key in ("paper", "needs", "published"):
            last = key
            notes[key] = rest.strip()
        else:
            notes[last] += " " + text
    return notes
