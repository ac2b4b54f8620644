# SPDX-License-Identifier: Apache-2.0
"""A configuration as YAML with comments, and the JSON Schema for editors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from chunkgrpo.config.files import DEFAULT, Leaf, Tree
from chunkgrpo.config.keys import (
    documented,
    every_key,
    is_section,
    keys_named,
    kind_of,
    members,
)
from chunkgrpo.config.limits import LIMITS
from chunkgrpo.config.schema import Config
from chunkgrpo.config.yaml_files import yaml_text


def described_yaml(config: Config, tree: Tree) -> str:
    """Return a configuration as YAML, with each key's description and where its value comes from.

    Args:
        config: The run.
        tree: The values it was made from, with their sources (:func:`~.files.load_tree`).

    Returns:
        Valid YAML; a comment above each key says what it means, its default and its source.
    """
    return "\n".join(_lines(config.model_dump(mode="json"), tree, "", 0)) + "\n"


def _lines(
    values: Mapping[str, Any], tree: Leaf | Tree | None, prefix: str, depth: int
) -> Iterator[str]:
    indent = "  " * depth
    names = sorted(values, key=lambda name: name != "kind")
    for name in names:
        value, key = values[name], prefix + name
        below = tree.get(name) if isinstance(tree, dict) else None
        kind = values.get("kind")
        said = _description(key, kind)
        if isinstance(value, Mapping) and value and keys_named(f"{key}.{next(iter(value))}"):
            yield f"{indent}# {said}" if said else f"{indent}#"
            yield f"{indent}{name}:"
            yield from _lines(value, below, f"{key}.", depth + 1)
            continue
        source = below.source if isinstance(below, Leaf) else DEFAULT
        note = _note(key, kind, source)
        yield f"{indent}# {said} {note}".rstrip()
        text = _inline(value)
        yield f"{indent}{name}: {text}"


def _inline(value: Any) -> str:
    text = yaml_text(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _description(key: str, kind: str | None) -> str:
    found = keys_named(key)
    fitting = [each for each in found if each.kind == kind] or found
    return fitting[0].description if fitting else ""


def _note(key: str, kind: str | None, source: str) -> str:
    """Return the default and the source, in brackets."""
    if source == DEFAULT:
        return "[default]"
    default = default_of(key, kind)
    known = "" if default is dataclasses.MISSING else f"default: {_inline(default)}; "
    return f"[{known}set by: {source}]"


def default_of(key: str, kind: str | None) -> Any:
    """Return the default of a key in a section of some kind; ``MISSING`` where it has none."""
    *parents, last = key.split(".")
    section: Any = Config()
    for part in parents:
        section = getattr(section, part, None)
    if section is None:
        return dataclasses.MISSING
    default_kind = kind_of(type(section))
    if last == "kind":
        return default_kind or dataclasses.MISSING
    if kind is None or kind == default_kind:
        return _plain(getattr(section, last, dataclasses.MISSING))
    # Another kind than the default one: its own class tells.
    return next(
        (
            _plain(each.default)
            for found in keys_named(".".join(parents))
            for member in members(found.annotation)
            if is_section(member) and kind_of(member) == kind
            for each in dataclasses.fields(member)
            if each.name == last
        ),
        dataclasses.MISSING,
    )


def _plain(value: Any) -> Any:
    """Return a default as YAML shows it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for completion in editors."""
    schema = Config.model_json_schema()
    schema["title"] = "A chunkgrpo recipe"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A recipe whose settings lie underneath these.",
    }
    _say_limits(schema)
    for name, section in _classes().items():
        part = schema["$defs"].get(name)
        if part is None:
            continue
        for field, said in documented(section).items():
            if field in part.get("properties", {}):
                part["properties"][field].setdefault("description", said)
        part["description"] = (section.__doc__ or "").strip().split("\n")[0]
    _partial(schema)
    return schema


def _say_limits(schema: dict[str, Any]) -> None:
    """Add the bounds of every number, so that an editor marks what would be refused."""
    for key, low, high in ((key, *LIMITS[key.name]) for key in every_key() if key.name in LIMITS):
        parents, _, field = key.name.rpartition(".")
        owners = [Config] if not parents else _owners(parents)
        for owner in owners:
            part = schema if owner is Config else schema["$defs"].get(owner.__name__, {})
            _bound(part.get("properties", {}).get(field, {}), low, high)


def _owners(name: str) -> list[type]:
    """Return the classes of the sections that a key names, an entry of a list by ``0``."""
    found = [m for key in keys_named(name.removesuffix(".0")) for m in members(key.annotation)]
    entries = [inner for each in found for inner in get_args(each)] if name.endswith(".0") else []
    return [each for each in (*found, *entries) if is_section(each)]


def _bound(node: dict[str, Any], low: float, high: float) -> None:
    """Add bounds to the numbers of a schema: itself, its alternatives, and entries of its lists."""
    if node.get("type") in ("integer", "number"):
        for name in ("exclusiveMinimum", "exclusiveMaximum"):
            node.pop(name, None)
        node.update(minimum=low, maximum=high)
    inner = [*node.get("anyOf", []), *node.get("prefixItems", [])]
    for each in (*inner, *([node["items"]] if isinstance(node.get("items"), dict) else [])):
        _bound(each, low, high)


def _partial(node: Any) -> None:
    """A recipe may leave everything out: nothing is required."""
    if isinstance(node, dict):
        node.pop("required", None)
        # A section may leave its kind to what it extends, and then fits several.
        node.pop("discriminator", None)
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
        for value in node.values():
            _partial(value)
    elif isinstance(node, list):
        for value in node:
            _partial(value)


def _classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for key in every_key():
        for member in members(key.annotation):
            if is_section(member):
                found[member.__name__] = member
    return found


def undescribed() -> Sequence[str]:
    """Return the keys that have no description."""
    return [key.name for key in every_key() if not key.description]
