# SPDX-License-Identifier: Apache-2.0
"""What a prompt demands, in the form of GenEval's ``evaluation_metadata.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chunkgrpo.rewards.geneval.rules import COLORS, RELATIONS

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def read_metadata(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a file of GenEval's metadata; return its lines by prompt.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not JSON, lacks something, names something unknown, or
            contradicts an earlier line of the same prompt; the message holds its number.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"reward 'geneval': there is no file at {file}; give GenEval's "
            "evaluation_metadata.jsonl, or lines like it for your own prompts"
        )
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = without_empty(json.loads(text))
            _check_line(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: {error!r}") from error
        if lines.setdefault(line["prompt"], line) != line:
            raise ValueError(
                f"{file}, line {number}: the prompt {line['prompt']!r} appears before with other "
                "demands; one prompt can have one meaning only"
            )
    if not lines:
        raise ValueError(f"{file} holds no lines")
    return lines


def without_empty(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line without fields that are None, as tables store what a record does not have."""
    cleaned = {name: value for name, value in line.items() if value is not None}
    for name in ("include", "exclude"):
        if isinstance(cleaned.get(name), list):
            cleaned[name] = [
                {k: v for k, v in entry.items() if v is not None} for entry in cleaned[name]
            ]
    return cleaned


def demands(prompt: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the demands of a prompt, in the form of a line, from its metadata.

    Args:
        prompt: The text.
        known: With ``tag``, ``include`` and perhaps ``exclude``, as in a line of GenEval's
            ``evaluation_metadata.jsonl``.

    Raises:
        ValueError: If something is missing or unknown, naming the prompt.
    """
    fields = {name: known.get(name) for name in ("tag", "include", "exclude")}
    missing = [name for name in ("tag", "include") if fields[name] is None]
    if missing:
        raise ValueError(
            f"nothing says what the prompt {prompt!r} demands: its record has no "
            f"{' and no '.join(missing)}; train on a .jsonl file with lines as in GenEval's "
            "evaluation_metadata.jsonl (--prompts FILE), or name one with demands for your prompts "
            "as option metadata"
        )
    try:
        line = without_empty({**fields, "prompt": prompt})
        _check_line(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the demands of the prompt {prompt!r} are wrong: {error!r}") from error
    return line


def entries(line: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of a line, of ``include`` and of ``exclude``."""
    yield from line["include"]
    yield from line.get("exclude", ())


def _check_line(line: Mapping[str, Any]) -> None:
    if line["tag"] not in TAGS:
        raise ValueError(f"unknown tag {line['tag']!r}; known: {', '.join(TAGS)}")
    if not isinstance(line["prompt"], str):
        raise ValueError("prompt is not text")
    for i, entry in enumerate(line["include"]):
        if not isinstance(entry["class"], str) or int(entry["count"]) < 1:
            raise ValueError(f"{entry} needs a class and a count of 1 or more")
        if entry.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"unknown color {entry['color']!r}; known: {', '.join(COLORS)}")
        if "position" in entry:
            relation, target = entry["position"]
            if relation not in RELATIONS or not 0 <= target < i:
                raise ValueError(
                    f"position {entry['position']} is not one of {RELATIONS} and an earlier entry"
                )
    for entry in line.get("exclude", ()):
        if not isinstance(entry["class"], str) or int(entry["count"]) < 1:
            raise ValueError(f"{entry} needs a class and a count of 1 or more")
