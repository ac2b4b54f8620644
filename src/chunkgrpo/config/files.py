# SPDX-License-Identifier: Apache-2.0
"""From recipes, YAML files and ``--set`` to a configuration, with the source of every setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chunkgrpo.config.keys import is_known, is_options, is_text, unknown_key
from chunkgrpo.config.limits import check_limits, shown
from chunkgrpo.config.schema import Config, ConfigError
from chunkgrpo.config.yaml_files import MAX_BYTES, YamlError, read_yaml_text, yaml_text
from chunkgrpo.core.names import unknown_name

MAX_KEY = 300
"""Characters of a dotted key."""
MAX_EXTENDS = 20
"""Recipes that may extend one another."""
DEFAULT = "default"
"""Source of what no recipe, file or option says."""


@dataclass(frozen=True)
class Leaf:
    """One setting and where its value comes from."""

    value: Any
    source: str


Tree = dict[str, "Leaf | Tree"]


@dataclass(frozen=True)
class Assignment:
    """One ``--set key=value``, or what an option of the command line stands for.

    Attributes:
        key: Dotted name of the setting.
        value: The value, before validation.
        source: Where it was given.
    """

    key: str
    value: Any
    source: str

    @staticmethod
    def parse(text: str) -> Assignment:
        """Read ``key=value``. The type of the setting decides how the value is read.

        A setting that is a text takes what follows the equals sign exactly as it stands (and
        ``null`` where it may be absent); everything else is read as YAML.

        Raises:
            ConfigError: If there is no equals sign, no such setting, or the value is no YAML.
        """
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {shown(text)} must look like key=value")
        if len(key) > MAX_KEY:
            raise ConfigError(f"--set {shown(key)}: a key has at most {MAX_KEY} characters")
        if not is_known(key):
            raise ConfigError(unknown_key(key))
        source = f"--set {key}"
        text_setting = is_text(key)
        if text_setting and not (value == "null" and text_setting == "optional"):
            return Assignment(key, value, source)
        try:
            read = read_yaml_text(value)
        except YamlError as error:
            raise ConfigError(f"--set {shown(text)}: the value is no YAML: {error}") from None
        return Assignment(key, read, source)


# --- merging ------------------------------------------------------------------------------------


def as_tree(values: Mapping[str, Any], source: str) -> Tree:
    """Attach a source to every value."""
    return {
        str(key): as_tree(value, source) if isinstance(value, Mapping) else Leaf(value, source)
        for key, value in values.items()
    }


def plain(tree: Tree) -> dict[str, Any]:
    """Return the values without their sources."""
    return {k: plain(v) if isinstance(v, dict) else v.value for k, v in tree.items()}


def over(below: Tree, above: Tree) -> Tree:
    """Put settings over others, section by section; lists are replaced whole.

    A section whose ``kind`` changes is replaced, not merged: what belonged to the former kind is
    gone. So is a reward whose name changes, with its options. A text in place of a section with a
    kind is the kind.
    """
    merged = dict(below)
    for key, value in above.items():
        former = merged.get(key)
        if not isinstance(former, dict):
            merged[key] = value
            continue
        section = value
        if isinstance(value, Leaf) and isinstance(value.value, str) and "kind" in former:
            alone: Tree = {"kind": value}
            section = alone
        if isinstance(section, dict) and not _kind_changes(former, section):
            section = over(former, section)
        merged[key] = section
    return merged


def _kind_changes(below: Tree, above: Tree) -> bool:
    decisive = "name" if "options" in below and "kind" not in below else "kind"
    old, new = below.get(decisive), above.get(decisive)
    return isinstance(new, Leaf) and isinstance(old, Leaf) and new.value != old.value


def assigned(tree: Tree, assignment: Assignment) -> Tree:
    """Return a tree with one setting changed; of a list, an entry is named by its number.

    A section is merged into what is there; free options are replaced whole.
    """
    parts = assignment.key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        if isinstance(node, Leaf):
            changed = _in_list(node.value, parts[depth:], assignment)
            above: Any = Leaf(changed, assignment.source)
            parts = parts[:depth]
            break
        node = node.get(part, {})
    else:
        value = assignment.value
        merges = isinstance(value, Mapping) and not is_options(assignment.key)
        above = as_tree(value, assignment.source) if merges else Leaf(value, assignment.source)
    for part in reversed(parts):
        above = {part: above}
    return over(tree, above)


def _in_list(value: Any, parts: Sequence[str], assignment: Assignment) -> Any:
    """Return a list or mapping with one entry changed."""
    if not parts:
        return assignment.value
    part, *rest = parts
    if isinstance(value, list | tuple):
        if not part.isdigit() or int(part) >= len(value):
            raise ConfigError(
                f"{assignment.source}: {part!r} is no entry of a list of {len(value)}; entries are "
                "counted from 0"
            )
        entries = list(value)
        entries[int(part)] = _in_list(entries[int(part)], rest, assignment)
        return entries
    if isinstance(value, Mapping):
        return {**value, part: _in_list(value.get(part, {}), rest, assignment)}
    return _in_list({}, parts, assignment)


# --- reading ------------------------------------------------------------------------------------


def load_tree(source: str | Path, assignments: Sequence[Assignment | str] = ()) -> Tree:
    """Load a recipe or a YAML file over the defaults, and apply changes.

    Args:
        source: Recipe name or path of a ``.yaml`` file.
        assignments: Changes, the last one having the last word; texts are ``key=value``.

    Raises:
        ConfigError: If something cannot be read.
    """
    tree = over(as_tree(Config().model_dump(mode="json"), DEFAULT), _read(source))
    for each in assignments:
        tree = assigned(tree, Assignment.parse(each) if isinstance(each, str) else each)
    return tree


def load_config(
    source: str | Path,
    assignments: Sequence[Assignment | str] = (),
    chunks: Path | None = None,
    check_chunks: bool = True,
) -> Config:
    """Load a recipe or a YAML file, apply changes, and check all of it.

    Args:
        source: Recipe name or path of a ``.yaml`` file.
        assignments: Changes; they have the last word.
        chunks: File with a plan and a selection, as ``chunkgrpo chunks`` writes it; it changes
            those of the source.
        check_chunks: Whether the chunks must fit the schedule; False where they are to be found.

    Raises:
        ConfigError: One line that names the key, the value, the rule and the fix.
    """
    from chunkgrpo.config.rules import check

    between = [] if chunks is None else read_chunks(chunks)
    config = validated(plain(load_tree(source, [*between, *assignments])))
    check(config, check_chunks)
    return config


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate a configuration; what it does not say has its default.

    Raises:
        ConfigError: One line that names the key, the value, the rule, and the nearest key.
    """
    defaults = as_tree(Config().model_dump(mode="json"), DEFAULT)
    return validated(plain(over(defaults, as_tree(values, "values"))))


def read_chunks(path: Path) -> list[Assignment]:
    """Read the plan and the selection that ``chunkgrpo chunks`` wrote.

    Raises:
        ConfigError: If the file is missing or holds anything else.
    """
    if not path.is_file():
        raise ConfigError(f"chunks file {path} does not exist; make one with: chunkgrpo chunks")
    values = read_yaml(path)
    section = values.get("objective")
    allowed = {"kind", "plan", "selection"}
    if len(values) != 1 or not isinstance(section, dict) or not set(section) <= allowed:
        raise ConfigError(
            f"{path} must hold one section, objective, with a plan and a selection and nothing "
            "else; make one with: chunkgrpo chunks"
        )
    return [Assignment(f"objective.{key}", value, str(path)) for key, value in section.items()]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        ConfigError: If it is not valid YAML, or does not hold keys and values.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{path} is {size} bytes long; settings have at most {MAX_BYTES}")
    try:
        values = read_yaml_text(path.read_text(encoding="utf-8"))
    except (YamlError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path} has the key {shown(key)}; a key is a text")
    return values


def _read(source: str | Path, seen: tuple[str, ...] = ()) -> Tree:
    """Read a recipe or a file, with what it extends underneath."""
    from chunkgrpo.recipes import base_names, method_names, recipe_names, recipe_path

    path = Path(source)
    label = str(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"configuration file {source} does not exist")
    else:
        names = base_names() if seen else sorted([*recipe_names(), *method_names()])
        if str(source) not in names:
            raise ConfigError(unknown_name("recipe", str(source), names))
        path, label = recipe_path(str(source)), f"recipe {source}"
    if str(path) in seen:
        raise ConfigError(f"{' extends '.join([*seen, str(path)])}: a recipe cannot extend itself")
    if len(seen) > MAX_EXTENDS:
        raise ConfigError(f"{seen[0]} extends a chain of more than {MAX_EXTENDS} recipes")
    values = read_yaml(path)
    below = values.pop("extends", None)
    tree = as_tree(values, label)
    return over(_read(str(below), (*seen, str(path))), tree) if below else tree


def validated(values: Mapping[str, Any]) -> Config:
    """Validate complete values.

    Raises:
        ConfigError: One line about the first mistake.
    """
    check_limits(values)
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = dotted(first["loc"])
    if first["type"] in UNKNOWN_KEY:
        return unknown_key(where)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "union_tag_invalid":
        context = first.get("ctx", {})
        kinds = [kind.strip("' ") for kind in context.get("expected_tags", "").split(",")]
        return unknown_name(f"{where}.kind", str(context.get("tag")), kinds) + more
    if first["type"] == "value_error":
        # A part's own rule, which names the field and its value.
        return f"{where}: {first.get('ctx', {}).get('error', first['msg'])}{more}"
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "string_type":
        message += "; in a YAML file, put texts in quotes"
    return f"{where} = {shown(first['input'])}: {message}{more}"


def dotted(location: Sequence[int | str]) -> str:
    """Return the dotted key of a place in the schema, without the kinds that pydantic adds."""
    from chunkgrpo.config.keys import without_kinds

    return ".".join(without_kinds([str(part) for part in location]))


def dump_config(config: Config) -> str:
    """Return a configuration as YAML, every key resolved."""
    return yaml_text(config.model_dump(mode="json"))
