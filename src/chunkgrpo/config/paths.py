# SPDX-License-Identifier: Apache-2.0
"""Paths in settings: absolute in a run's own file, and refused early where nothing is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkgrpo.config.files import validated
from chunkgrpo.config.schema import Config, ConfigError
from chunkgrpo.prompts import READERS, dataset_and_split
from chunkgrpo.runtime.sources import local_path

EMBEDDED = "shapes"
"""The embedded world, as a model and as prompts."""


def with_absolute_paths(config: Config) -> Config:
    """Return the same settings with every path of something that exists absolute.

    These are ``model.path``, ``model.embedding_cache``, ``prompts.train``, ``prompts.held_out``,
    and options of rewards that are paths (:func:`absolute_option`). So a run's ``config.yaml``
    means the same from any working directory. Names of code, ``package.module:function``, stay:
    they are looked up where Python looks.
    """
    values = config.model_dump(mode="json")
    model, prompts = values["model"], values["prompts"]
    if model["path"] != EMBEDDED:
        model["path"] = absolute(model["path"])
    if model["embedding_cache"] not in (None, "auto"):
        # Made where it is missing, so it need not exist.
        model["embedding_cache"] = os.path.abspath(Path(model["embedding_cache"]).expanduser())
    for key in ("train", "held_out"):
        if prompts[key] != EMBEDDED:
            name, split = dataset_and_split(prompts[key])
            prompts[key] = absolute(name) + (f":{split}" if split else "")
    for each in (*values["rewards"], *values["watched_rewards"], values["evaluation"]["reward"]):
        each["options"] = {key: absolute_option(v) for key, v in each["options"].items()}
    return validated(values)


def absolute(text: str) -> str:
    """Return the absolute path of what exists under a name; any other name as it is."""
    path = Path(text).expanduser()
    try:
        return os.path.abspath(path) if path.exists() else text
    except (OSError, ValueError):  # too long, or no name of a file at all
        return text


def absolute_option(value: Any) -> Any:
    """Return a reward's option with paths absolute, those in lists and mappings among them.

    A text is a path where something is there and it looks like one: it has a slash, is a file with
    a suffix, or is a folder with a model. A plain word, such as the name of a mode, is not changed
    by a file of that name.
    """
    if isinstance(value, Mapping):
        return {key: absolute_option(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [absolute_option(each) for each in value]
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    try:
        model = any((path / name).is_file() for name in ("config.json", "model_index.json"))
        meant = "/" in value or os.sep in value or model or (path.is_file() and bool(path.suffix))
    except (OSError, ValueError):
        return value
    return absolute(value) if meant else value


def check_paths(config: Config) -> None:
    """Refuse models and prompts that can only be paths and are not there, before anything loads.

    Raises:
        ConfigError: With the setting and why it is taken for a path.
    """
    p = config.prompts
    listed = (
        ("model.path", config.model.path, "model folder", "a folder or a hub id owner/name"),
        ("prompts.train", p.train, "prompt file", "a file or a dataset"),
        ("prompts.held_out", p.held_out, "prompt file", "a file or a dataset"),
    )
    for key, value, what, fix in listed:
        name = value if key == "model.path" else dataset_and_split(value)[0]
        if name == EMBEDDED or (key != "model.path" and Path(name).suffix in READERS):
            continue  # read_prompts says it of files
        try:
            local_path(name)
        except FileNotFoundError as error:
            raise ConfigError(f"{key}: {what} {error}; give {fix}") from None
