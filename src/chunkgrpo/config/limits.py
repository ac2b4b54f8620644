# SPDX-License-Identifier: Apache-2.0
"""Bounds of every number and text of the settings, beyond which no run makes sense.

The parts of the method refuse what their formulas do not allow. These bounds are wider: they catch
slips (``1e30`` for ``1e-30``), values that overflow, and counts that would fill the memory. They
are checked on what the user wrote, before any conversion: ``true`` is no number here, nor is a text
such as ``"17"``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_origin

from chunkgrpo.config.keys import every_key, is_options, is_section, keys_named, members
from chunkgrpo.config.section import ConfigError
from chunkgrpo.plain_text import CONTROLS, printable

COUNT = (0, 10**6)
LARGE_COUNT = (0, 10**9)
SEED = (0, 2**63 - 1)
SHARE = (0.0, 1.0)
WEIGHT = (-1e6, 1e6)
FACTOR = (0.0, 1e6)
DIVISOR = (1e-3, 1e6)

LIMITS: dict[str, tuple[float, float]] = {
    "iterations": LARGE_COUNT,
    "seed": SEED,
    "threads": (0, 4096),
    "checkpoints.every": LARGE_COUNT,
    "checkpoints.keep_last": COUNT,
    "checkpoints.keep_every": LARGE_COUNT,
    "on_nonfinite.max_skipped": (1, 10**6),
    "model.adaptation.rank": (1, 65536),
    "model.adaptation.alpha": DIVISOR,
    "model.guidance": (0.0, 1000.0),
    "model.height": (1, 65536),
    "model.width": (1, 65536),
    "model.max_sequence_length": (1, 10**6),
    "rewards.0.weight": WEIGHT,
    "sampling.steps": (2, 10000),
    "sampling.schedule.shift": (1e-3, 1000.0),
    "sampling.merge.least": WEIGHT,
    "sampling.merge.sizes": (1, 10000),
    "sampling.transition.eta": (0.0, 1000.0),
    "sampling.tail.fraction": SHARE,
    "sampling.tail.order": (1, 10),
    "sampling.prompts": (1, 10**6),
    "sampling.group_size": (2, 10**5),
    "sampling.batch_size": (1, 10**6),
    "credit.clip": DIVISOR,
    "credit.keep": (1e-6, 1.0),
    "objective.trust.low": (1e-8, 1.0),
    "objective.trust.high": (1e-8, 1e6),
    "objective.trust.threshold": (1e-12, 1e6),
    "objective.kl.weight": (1e-9, 1e6),
    "objective.old_kl": FACTOR,
    "objective.consistency": FACTOR,
    "objective.updates": (1, 10**5),
    "objective.micro_batch": COUNT,
    "objective.outer_weights.sizes": (1, 10000),
    "objective.plan.sizes": (1, 10000),
    "objective.plan.size": (1, 10000),
    "objective.plan.min_size": (1, 10000),
    "objective.plan.num_chunks": (1, 10000),
    "objective.plan.explained": SHARE,
    "objective.plan.refresh": LARGE_COUNT,
    "objective.selection.indices": (0, 10000),
    "objective.selection.fraction": SHARE,
    "objective.selection.floor": SHARE,
    "objective.selection.decay": SHARE,
    "objective.window.size": (1, 10000),
    "objective.window.start": (0, 10000),
    "objective.window.low": (0, 10000),
    "objective.window.high": (0, 10000),
    "objective.window.every": LARGE_COUNT,
    "objective.window.stride": (1, 10000),
    "objective.window.rate": (0.0, 1000.0),
    "objective.window.after": LARGE_COUNT,
    "objective.window.indices": (0, 10000),
    "objective.beta": DIVISOR,
    "objective.advantage_clip": DIVISOR,
    "objective.advantage_max": DIVISOR,
    "objective.kl": FACTOR,
    "objective.log_prob.power": (1e-3, 10.0),
    "objective.times.fraction": SHARE,
    "objective.times.number": (1, 10000),
    "objective.times.sizes": (1, 10000),
    "objective.times.numbers": (0, 10000),
    "objective.times.start": (0, 10000),
    "objective.clip_low": FACTOR,
    "objective.clip_high": FACTOR,
    "objective.ema_weight": FACTOR,
    "optimizer.learning_rate": (1e-30, 100.0),
    "optimizer.betas": (0.0, 0.99999999),
    "optimizer.eps": (1e-30, 1.0),
    "optimizer.weight_decay": (0.0, 100.0),
    "optimizer.warmup": LARGE_COUNT,
    "optimizer.fall": SHARE,
    "optimizer.max_grad_norm": (1e-12, 1e12),
    "ema.decay": (0.0, 0.99999999),
    "ema.warmup": (1e-3, 1e9),
    "evaluation.every": LARGE_COUNT,
    "evaluation.prompts": (1, 10**7),
    "evaluation.final_prompts": (1, 10**7),
    "evaluation.final_seeds": (1, 10**5),
    "evaluation.seed": SEED,
}
"""Key -> smallest and largest number, both allowed; of a list, of each entry."""

MAX_TEXT = 10_000
"""Characters of a text."""
MAX_NAME = 100
"""Characters of the name of a run."""
MAX_LIST = 10_000
"""Entries of a list."""

_NAME = re.compile(r"[^\s/\\](?:[^/\\\n\t]*[^\s/\\])?\Z")


def check_limits(values: Mapping[str, Any]) -> None:
    """Refuse numbers, texts and lists beyond their bounds.

    Args:
        values: Complete settings, as YAML holds them; unknown keys are left to the schema.

    Raises:
        ConfigError: With the key, the value and the rule.
    """
    for key, value in _walk(values, ""):
        _check_value(key, value)
    if isinstance(name := values.get("name"), str):
        check_run_name(name)


def check_run_name(name: str) -> None:
    """Refuse the name of a run that is no name of one folder.

    Raises:
        ConfigError: With the name and the rule.
    """
    if CONTROLS.search(name) or not _NAME.match(name) or set(name) <= {"."} or len(name) > MAX_NAME:
        raise ConfigError(
            f"name = {shown(name)}: it is the name of the run's folder: 1 to {MAX_NAME} "
            "characters, without / and \\, and neither '.' nor '..'; use --out for another place"
        )


def shown(value: Any, length: int = 60) -> str:
    """Return a value for a message: on one line, without control characters, not too long."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= length else f"{text[:length]}..."
    return repr(printable(cut)) if isinstance(value, str) else printable(cut)


def _walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not is_options(key):
            yield from _walk(value, f"{key}.")
        elif isinstance(value, list | tuple) and _has_sections(key):
            yield key, len(value)
            for index, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    yield from _walk(entry, f"{key}.{index}.")
        else:
            yield key, value


@cache
def _has_sections(key: str) -> bool:
    """Whether a setting is a list of sections."""
    return any(each.name.startswith(f"{key}.0.") for each in every_key())


def _check_value(key: str, value: Any) -> None:
    kinds = _number_kinds(key)
    if _has_sections(key):
        if isinstance(value, int) and value > 100:
            raise ConfigError(f"{key} has {value} entries; at most 100 are possible")
        return
    if is_options(key):
        _check_options(key, value)
        return
    for entry in _entries(key, value):
        if isinstance(entry, str):
            _check_text(key, entry)
            if kinds and not _takes_text(key):
                raise ConfigError(f"{key} = {shown(entry)}: must be a number, written plainly")
            if _is_switch(key):
                raise ConfigError(f"{key} = {shown(entry)}: must be true or false")
        elif isinstance(entry, bool):
            if kinds and not _takes(key, bool):
                raise ConfigError(f"{key} = {str(entry).lower()}: must be a number, not true/false")
        elif isinstance(entry, int | float):
            if _is_switch(key):
                raise ConfigError(f"{key} = {shown(entry)}: must be true or false")
            if kinds:
                _check_number(key, entry)
            else:
                _check_finite(key, entry)


def _entries(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value]
    if len(value) > MAX_LIST:
        raise ConfigError(f"{key} has {len(value)} entries; at most {MAX_LIST} are possible")
    return list(value)


def _check_number(key: str, value: int | float) -> None:
    low, high = limits_of(key)
    if not low <= value <= high:  # false for nan, too
        raise ConfigError(f"{key} = {shown(value)}: must be from {low:,} to {high:,}")


def _check_finite(key: str, value: int | float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value}: must be finite")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{key} = {shown(value)}: must fit into 64 bits")


def _check_text(key: str, value: str) -> None:
    if len(value) > MAX_TEXT:
        raise ConfigError(f"{key} has {len(value)} characters; at most {MAX_TEXT} are possible")
    if CONTROLS.search(value):
        raise ConfigError(
            f"{key} = {shown(value)}: control characters and marks of direction are not allowed"
        )


def _check_options(key: str, value: Any) -> None:
    """Refuse free options that hold what no option can be."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{key} has the key {shown(name)}: a key must be a text")
            _check_text(f"{key}'s key", name)
            _check_options(f"{key}.{shown(name)[1:-1]}", inner)
    elif isinstance(value, list | tuple):
        for entry in _entries(key, value):
            _check_options(key, entry)
    elif isinstance(value, str):
        _check_text(key, value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_finite(key, value)


def _general(key: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".0", key)


def limits_of(key: str) -> tuple[float, float]:
    """Return the bounds of a numeric setting.

    Raises:
        KeyError: If it has none.
    """
    return LIMITS[_general(key)]


def is_number(key: str) -> bool:
    """Whether a setting is a number, or a list of numbers, in some kind of its section."""
    return bool(_number_kinds(key))


@cache
def _alternatives(key: str) -> tuple[Any, ...]:
    """The plain types a setting may have, those of a list's entries among them."""
    found: list[Any] = []
    for each in keys_named(key):
        for member in members(each.annotation):
            inner = get_args(member) if get_origin(member) is tuple else (member,)
            for one in inner:
                found += [m for m in members(one) if m is not Ellipsis]
    return tuple(found)


@cache
def _number_kinds(key: str) -> frozenset[type]:
    return frozenset(m for m in _alternatives(key) if m in (int, float))


def _is_switch(key: str) -> bool:
    """Whether a setting is on or off, and nothing else."""
    return set(_alternatives(key)) == {bool}


def _takes(key: str, kind: type) -> bool:
    return kind in _alternatives(key)


def _takes_text(key: str) -> bool:
    """Whether a setting that may be a number may be a text, too, or a section by its kind."""
    return any(m is str or get_origin(m) is not None or is_section(m) for m in _alternatives(key))
