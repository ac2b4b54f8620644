# SPDX-License-Identifier: Apache-2.0
"""The keys of the settings: which exist, what they mean, and where former ones moved."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from chunkgrpo.config.migration import MOVED
from chunkgrpo.config.schema import Config
from chunkgrpo.core.names import OneOf


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: Dotted; ``0`` stands for the entries of a list.
        annotation: Its type.
        description: One line or more.
        kind: The kind of the section that has it, None where sections have no kinds.
    """

    name: str
    annotation: Any
    description: str
    kind: str | None = None


def _stripped(annotation: Any) -> tuple[Any, list[Any]]:
    """Return a type without its annotations, and these."""
    marks: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        marks += more
    return annotation, marks


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of a type; a type that is no union is its own."""
    bare, _ = _stripped(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        return [inner for each in get_args(bare) for inner in members(each)]
    return [bare]


def vocabulary(annotation: Any) -> tuple[str, ...]:
    """Return the names that a text may take; none where it is free or no text."""
    bare, marks = _stripped(annotation)
    found = next((mark.names for mark in marks if isinstance(mark, OneOf)), ())
    if found or get_origin(bare) not in (Union, types.UnionType):
        return found
    return next((names for each in get_args(bare) if (names := vocabulary(each))), ())


def is_section(kind: Any) -> bool:
    """Whether a type has settings of its own."""
    return isinstance(kind, type) and (
        issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)
    )


def kind_of(section: type) -> str | None:
    """Return the kind of a section's class; None where it has none."""
    if dataclasses.is_dataclass(section):
        for each in dataclasses.fields(section):
            if each.name == "kind":
                return str(each.default)
    return None


@cache
def documented(section: type) -> dict[str, str]:
    """Return the descriptions of a dataclass's fields, from its docstring's ``Attributes``."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, attributes = text.partition("Attributes:\n")
        last = ""
        for line in attributes.splitlines():
            if line and not line.startswith(" "):
                break
            match = re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)
            if match:
                for last in match[1].split(", "):
                    found[last] = match[2]
            elif last and line.startswith("        "):
                found[last] += " " + line.strip()
            elif not line:
                last = ""
    return {name: _readable(text) for name, text in found.items()}


def _readable(text: str) -> str:
    """Turn the marks of docstrings into plain text."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda m: m[1].lstrip("~.").rsplit(".", 1)[-1], text)
    return re.sub(r"``([^`]+)``", r"\1", text)


def fields_of(section: type) -> dict[str, tuple[Any, str]]:
    """Return the settings of a section: name to type and description; without ``kind``."""
    if issubclass(section, BaseModel):
        found = {}
        for name, info in section.model_fields.items():
            marked = Annotated[(info.annotation, *info.metadata)] if info.metadata else None
            found[name] = (marked or info.annotation, info.description or "")
        return found
    hints, said = get_type_hints(section, include_extras=True), documented(section)
    names = [each.name for each in dataclasses.fields(section) if each.init]
    return {name: (hints[name], said.get(name, "")) for name in names if name != "kind"}


@cache
def every_key() -> tuple[Key, ...]:
    """Return every setting that exists, those of each kind of a section among them."""
    return tuple(_walk(Config, ""))


def _walk(section: type, prefix: str) -> Iterator[Key]:
    kind = kind_of(section)
    for name, (annotation, description) in fields_of(section).items():
        names = vocabulary(annotation)
        listed = f" One of: {', '.join(names)}." if names else ""
        yield Key(prefix + name, annotation, description + listed, kind)
        inner = [each for each in members(annotation) if is_section(each)]
        if any(kind_of(each) for each in inner):
            kinds = ", ".join(kind_of(each) or "" for each in inner)
            said = f"One of: {kinds}."
            yield Key(f"{prefix}{name}.kind", str, said, None)
        for each in inner:
            yield from _walk(each, f"{prefix}{name}.")
        for each in members(annotation):
            entries = [e for e in get_args(each) if is_section(e)]
            if get_origin(each) is tuple and entries:
                yield from _walk(entries[0], f"{prefix}{name}.0.")


def keys_named(name: str) -> list[Key]:
    """Return the settings of a dotted name; several where kinds of a section share it."""
    general = re.sub(r"\.\d+(?=\.|$)", ".0", name)
    return [key for key in every_key() if key.name == general]


def is_known(name: str) -> bool:
    """Whether a dotted key exists, or lies within free options."""
    return bool(keys_named(name)) or _within_options(name)


def is_options(name: str) -> bool:
    """Whether a setting is a mapping of any names to any values."""
    return any(
        get_origin(member) in (dict, types.MappingProxyType)
        or getattr(get_origin(member), "__name__", "") == "Mapping"
        for key in keys_named(name)
        for member in members(key.annotation)
    )


def _within_options(name: str) -> bool:
    parts = name.split(".")
    return any(is_options(".".join(parts[:end])) for end in range(1, len(parts)))


def is_text(name: str) -> Literal["", "always", "optional"]:
    """Whether a setting is a text in every kind that has it, and whether it may be absent."""
    found = keys_named(name)
    if not found:
        return ""
    optional = False
    for key in found:
        for member in members(key.annotation):
            if member is type(None):
                optional = True
            elif member is not str and not _names(member):
                return ""
    return "optional" if optional else "always"


def _names(annotation: Any) -> bool:
    """Whether a type is a choice of texts."""
    return get_origin(annotation) is Literal and all(
        isinstance(each, str) for each in get_args(annotation)
    )


def without_kinds(parts: Sequence[str]) -> list[str]:
    """Return a place in the schema as the user writes it: pydantic names the kind on the way."""
    found: list[str] = []
    for index, part in enumerate(parts):
        kinds = {
            kind_of(member)
            for key in keys_named(".".join(found))
            for member in members(key.annotation)
            if is_section(member)
        }
        skip = found and part in kinds and not keys_named(".".join([*found, part]))
        if not skip or index == 0:
            found.append(part)
    return found


def unknown_key(name: str) -> str:
    """Return the message for a key that does not exist: its new spelling, or the nearest key."""
    if name in MOVED:
        return f"unknown configuration key {name!r}: {MOVED[name]}"
    section, _, last = name.rpartition(".")
    known = list(dict.fromkeys(key.name for key in every_key()))
    siblings = [k for k in keys_named(name)]
    if siblings:
        kinds = ", ".join(sorted({str(k.kind) for k in siblings}))
        return (
            f"{name} belongs to {section}.kind {kinds}, and {section} is of another kind; nothing "
            "would read it: remove it, or change the kind"
        )
    near = difflib.get_close_matches(name, known, 1, 0.5)
    ends = {key.rsplit(".", 1)[-1]: key for key in known}
    if not near:
        near = [ends[f] for f in difflib.get_close_matches(last, list(ends), 1, 0.6)]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown configuration key {name!r}{hint}"
