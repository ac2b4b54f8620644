# SPDX-License-Identifier: Apache-2.0
"""Which settings may change when a run goes on, and what differs between two sets of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chunkgrpo.config.keys import is_options

CHANGEABLE: Mapping[str, str] = {
    "name": "a label",
    "iterations": "the run gets longer or shorter; optimizer.fall counts with the new number",
    "threads": "speed alone, and rounding",
    "async_rewards": "speed alone, the same scores",
    "checkpoints": "what is kept",
    "evaluation.every": "what is measured on the way",
    "scoring.on_error": "what happens to a score that is missing",
    "on_nonfinite": "what happens to an update that is not finite",
    "doctor": "what is examined beforehand",
    "optimizer.learning_rate": "holds from the next optimizer step on",
    "optimizer.warmup": "holds from the next optimizer step on",
    "optimizer.fall": "holds from the next optimizer step on",
    "optimizer.weight_decay": "holds from the next optimizer step on",
    "optimizer.max_grad_norm": "holds from the next optimizer step on",
    "sampling.batch_size": "memory alone, and rounding",
    "sampling.store.place": "memory alone",
    "objective.micro_batch": "memory alone, and rounding",
    "model.device": "where it runs, and rounding",
    "model.offload": "memory alone",
    "model.attention_backend": "speed and memory, and rounding",
    "model.compile": "speed alone, and rounding",
    "model.vae_slicing": "memory alone, and rounding",
    "model.gradient_checkpointing": "memory alone, and rounding",
    "model.embedding_cache": "where encoded prompts are kept",
}
"""Settings that a run may go on with changed, those below each included -> what that means."""

FIXED: Mapping[str, str] = {
    "seed": "everything random follows from it",
    "model": "other weights would be trained, or other images sampled",
    "prompts": "it trains and is measured on them",
    "rewards": "they are what it learns",
    "watched_rewards": "credit may use them, and their curves would break",
    "scoring": "it is part of what is learned",
    "sampling": "it decides what is sampled",
    "credit": "it is the method",
    "objective": "it is the method",
    "optimizer": "the moments in the checkpoint are those of this optimizer",
    "ema": "the average in the checkpoint is of this kind",
    "evaluation": "before and after would not be comparable",
}
"""Sections whose other settings stay as they are -> why."""


@dataclass(frozen=True)
class Change:
    """One setting that differs.

    Attributes:
        key: Its dotted name.
        old, new: Its values; ABSENT where a set of settings does not have it.
    """

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.old)} -> {_shown(self.new)}"


ABSENT = "(none)"
"""In place of the value of a setting that another kind of its section has."""


def why_fixed(key: str) -> str | None:
    """Return why a setting may not change while a run goes on; None where it may.

    Raises:
        KeyError: If neither list has the setting or a section around it.
    """
    parts = re.sub(r"\.\d+(?=\.|$)", ".0", key).split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in CHANGEABLE:
            return None
        if name in FIXED:
            return FIXED[name]
    raise KeyError(key)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value; free options and lists of plain values are one value each."""
    return dict(_flat(values, prefix))


def _flat(values: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and not (key and is_options(key)):
        for name, value in values.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple) and any(isinstance(each, Mapping) for each in values):
        for number, value in enumerate(values):
            yield from _flat(value, f"{key}.{number}")
    else:
        yield key, list(values) if isinstance(values, tuple) else values


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two sets of settings, as ``model_dump(mode="json")`` has them."""
    before, after = flat(old), flat(new)
    found = []
    for key in dict.fromkeys([*before, *after]):
        pair = before.get(key, ABSENT), after.get(key, ABSENT)
        # 1 and True, and 1 and 1.0, are equal in Python; the first pair differs, the second not.
        if pair[0] != pair[1] or isinstance(pair[0], bool) != isinstance(pair[1], bool):
            found.append(Change(key, *pair))
    return found


def refusal(found: Sequence[Change]) -> str | None:
    """Return what forbids going on with these changes, with the differences; None if nothing."""
    fixed = [(each, reason) for each in found if (reason := why_fixed(each.key)) is not None]
    if not fixed:
        return None
    listed = "; ".join(f"{change} ({reason})" for change, reason in fixed[:4])
    more = f"; and {len(fixed) - 4} more" if len(fixed) > 4 else ""
    return f"a run cannot go on with other settings than these: {listed}{more}"


def fixed_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that cannot change in a run, by dotted key."""
    return {key: value for key, value in flat(values).items() if why_fixed(key) is not None}


def _shown(value: Any) -> str:
    text = value if value is ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
