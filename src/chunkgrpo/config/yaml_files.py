# SPDX-License-Identifier: Apache-2.0
"""YAML as settings use it: bounded in size, depth and aliases, numbers as people write them.

It differs from YAML 1.1 in three places, where that reads something other than what was meant:
``010`` and ``1:30`` are texts, not the numbers 8 and 90, a key may occur once, and ``yes`` or
``on`` are texts, not true. ``1e-4`` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any, ClassVar

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 20_000
"""Values and keys, those behind each use of an alias counted again."""

_NUMBERS = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)\Z"),
    "float": re.compile(
        r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\Z"
        r"|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
    ),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "null": re.compile(r"(~|null|Null|NULL|)\Z"),
}


class YamlError(ValueError):
    """A text that is not read as YAML; the message says where and why."""


def read_yaml_text(text: str) -> Any:
    """Read one value from YAML.

    Args:
        text: At most :data:`MAX_BYTES` long.

    Returns:
        What it holds: texts, numbers, truth values, None, lists, and dictionaries.

    Raises:
        YamlError: If it is no YAML, holds a key twice or a tag, or exceeds a limit. It ends at the
            first such place: nothing is built before.
    """
    import yaml

    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise YamlError("it holds a half of a surrogate pair, which is no character") from None
    if size > MAX_BYTES:
        raise YamlError(f"it is {size} bytes long; settings have at most {MAX_BYTES}")
    loader = _loader_class()
    try:
        _check_extent(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)  # a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise YamlError(f"{error.problem or error.context}{where}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise YamlError(" ".join(str(error).split())) from None


def yaml_text(value: Any, **options: Any) -> str:
    """Return values as YAML that :func:`read_yaml_text` reads as the same.

    A text that looks like a number to it, such as ``1e-4``, is quoted.

    Args:
        value: Texts, numbers, truth values, None, lists and dictionaries.
        options: Of ``yaml.dump``.
    """
    import yaml

    return yaml.dump(
        value, Dumper=_dumper_class(), **{"sort_keys": False, "allow_unicode": True, **options}
    )


@cache
def _dumper_class() -> Any:
    """Return the dumper that knows which plain texts the loader makes numbers of.

    Those of YAML 1.1 stay quoted, too, so that other programs read the same.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """The safe dumper with our rules for numbers."""

        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
            first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
        }

    Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", _NUMBERS["float"], list("-+.0123456789")
    )
    return Dumper


def _check_extent(events: Iterator[Any]) -> None:
    """Refuse what is too deep or too large, without building it."""
    import yaml

    open_counts: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    nodes = 0
    for event in events:
        tag = getattr(event, "tag", None)
        if tag:
            raise YamlError(f"tags such as {str(tag)[:40]} are not read{_line(event)}")
        if isinstance(event, yaml.CollectionStartEvent):
            nodes += 1
            open_counts.append((event.anchor, nodes))
            if len(open_counts) > MAX_DEPTH:
                raise YamlError(f"it is nested more than {MAX_DEPTH} deep{_line(event)}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_counts.pop()
            if anchor:
                sizes[anchor] = nodes - before + 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise YamlError(f"alias *{event.anchor} has no finished anchor{_line(event)}")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if nodes > MAX_NODES:
            raise YamlError(
                f"it holds more than {MAX_NODES} values, those behind aliases counted{_line(event)}"
            )


def _line(event: Any) -> str:
    return f" (line {event.start_mark.line + 1})"


@cache
def _loader_class() -> Any:
    """Return the loader, on top of the one in C where PyYAML was built with it."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        """The safe loader with our rules for numbers and keys."""

        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            """Read a mapping whose keys are distinct texts or numbers."""
            seen: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                if not isinstance(key_node, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, "a key must be a name", key_node.start_mark
                    )
                key = key_node.value
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key[:80]!r} occurs twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    def integer(loader: Any, node: Any) -> int:
        text = loader.construct_scalar(node)
        if len(text) > 40:  # far beyond every bound; int() of thousands of digits takes long
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(text)} digits", node.start_mark
            )
        return int(text)

    for name in ("int", "null", "bool", "float"):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", _NUMBERS[name], None)
    Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    return Loader
