# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: the names that a setting may take, listed once, where each name has its meaning.

A field that takes one of several names is annotated ``Annotated[str, OneOf(TABLE)]``. Whoever reads
settings finds the names there, for messages, completion and documentation, and refuses others; so
does the class that has the field, in its ``__post_init__`` with :func:`check_name`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

MOST_SHOWN = 60
"""Letters of an unknown name that a message repeats."""


class OneOf:
    """Marks a text field whose values are the names of a table.

    Two of its methods are the protocol by which pydantic asks an annotation for its part of a
    JSON Schema. They import nothing.

    Args:
        names: The names, e.g. a dictionary from name to function.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Accept what the field's type accepts, if it is one of the names."""
        function = {"type": "no-info", "function": self.checked}
        return {"type": "function-after", "function": function, "schema": handler(source)}

    def checked(self, name: str) -> str:
        """Return a name.

        Raises:
            ValueError: If it is not one of the names.
        """
        check_name("name", name, self.names)
        return name

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        """Add the names as ``enum``."""
        described = handler(schema)
        described["enum"] = list(self.names)
        return described


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that does not exist: the nearest that does, and all of them.

    Args:
        what: What is named, e.g. ``"ratio form"``.
        name: The name that was given.
        known: The names that exist.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = name if len(name) <= MOST_SHOWN else f"{name[:MOST_SHOWN]}..."
    return f"unknown {what} {shown!r}{hint}; known: {', '.join(names)}"


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        ValueError: With the nearest known name, and all of them.
    """
    if name not in (names := tuple(known)):
        raise ValueError(unknown_name(what, name, names))


class ByKind:
    """Marks a union of dataclasses whose field ``kind`` says which of them is meant.

    ``Annotated[Clip | KlMask, ByKind()]`` is read from ``{kind: clip, low: 1e-3}``, and from the
    kind alone, ``clip``, where all other fields have defaults. As :class:`OneOf`, it serves
    pydantic without importing it.
    """

    @staticmethod
    def kinds(union: Any) -> dict[str, type]:
        """Return the classes of a union by their kind."""
        return {member.__dataclass_fields__["kind"].default: member for member in get_args(union)}

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Choose the class by the kind; no other class is tried."""
        choices = {k: handler.generate_schema(member) for k, member in self.kinds(source).items()}
        tagged = {"type": "tagged-union", "discriminator": "kind", "choices": choices}
        function = {"type": "no-info", "function": _kind_alone}
        return {"type": "function-before", "function": function, "schema": tagged}

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        """Allow the kind alone."""
        kinds = list(schema["schema"]["choices"])
        return {"anyOf": [handler(schema), {"enum": kinds, "type": "string"}]}


def _kind_alone(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value
