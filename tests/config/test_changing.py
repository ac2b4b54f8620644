# SPDX-License-Identifier: Apache-2.0
"""Which settings a run may go on with changed: every one is told, and the differences are."""

import re
from pathlib import Path

import pytest

from chunkgrpo.config import Config, parse_config
from chunkgrpo.config.changing import (
    ABSENT,
    CHANGEABLE,
    FIXED,
    Change,
    changes,
    fixed_settings,
    flat,
    refusal,
    why_fixed,
)
from chunkgrpo.config.keys import every_key

NAMES = {key.name for key in every_key()}
# Written out, so that a new setting is judged by a person and not by the section it is in.
ALLOWED = {
    "name", "iterations", "threads", "async_rewards", "scoring.on_error",
    "on_nonfinite", "on_nonfinite.kind", "on_nonfinite.max_skipped", "doctor", "doctor.skip",
    "doctor.thorough", "checkpoints", "checkpoints.every", "checkpoints.keep_last",
    "checkpoints.keep_every",
    "checkpoints.keep_best", "evaluation.every", "optimizer.learning_rate", "optimizer.warmup",
    "optimizer.fall", "optimizer.weight_decay", "optimizer.max_grad_norm", "sampling.batch_size",
    "sampling.store.place", "objective.micro_batch", "model.device", "model.offload",
    "model.attention_backend", "model.compile", "model.compile.kind", "model.compile.backend",
    "model.vae_slicing", "model.gradient_checkpointing", "model.embedding_cache",
}  # fmt: skip


def values(**changed):
    return parse_config(changed).model_dump(mode="json")


def test_every_setting_is_classified() -> None:
    assert {name for name in NAMES if why_fixed(name) is None} == ALLOWED
    with pytest.raises(KeyError):
        why_fixed("a_setting_that_nobody_classified")


def test_the_lists_name_nothing_that_does_not_exist() -> None:
    assert (set(CHANGEABLE) | set(FIXED)) <= NAMES
    assert not set(CHANGEABLE) & set(FIXED)


def test_the_documentation_lists_what_may_change() -> None:
    page = Path(__file__).parents[2] / "docs" / "resuming.md"
    table = page.read_text(encoding="utf-8").split("## What may change", 1)[1].split("##", 1)[0]
    assert set(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)) == set(CHANGEABLE)


def test_flat_settings_cover_a_whole_configuration() -> None:
    found = flat(Config().model_dump(mode="json"))
    assert set(found) <= NAMES
    assert found["rewards.0.name"] == "shapes" and found["evaluation.reward.options"] == {
        "mode": "strict", "name": "strict",
    }  # fmt: skip
    assert found["model.adaptation.rank"] == 32 and found["model.offload"] == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({}, {}, []),
        ({"seed": 1}, {"seed": 2}, [Change("seed", 1, 2)]),
        ({"threads": 0}, {"threads": 1}, [Change("threads", 0, 1)]),
        (
            {"model": {"adaptation": {"kind": "lora", "rank": 8}}},
            {"model": {"adaptation": {"kind": "lora", "rank": 16}}},
            [Change("model.adaptation.rank", 8, 16)],
        ),
        (
            {"rewards": [{"name": "clip"}]},
            {"rewards": [{"name": "clip"}, {"name": "brightness", "weight": 2.0}]},
            [
                Change("rewards.1.name", ABSENT, "brightness"),
                Change("rewards.1.weight", ABSENT, 2.0),
                Change("rewards.1.options", ABSENT, {}),
            ],
        ),
        (
            {"model": {"compile": {"kind": "none"}}},
            {"model": {"compile": {"kind": "blocks"}}},
            [
                Change("model.compile.kind", "none", "blocks"),
                Change("model.compile.backend", ABSENT, "inductor"),
            ],
        ),
    ],
)
def test_differences_are_named(old, new, found) -> None:
    listed = changes(values(**old), values(**new))
    assert sorted(listed, key=lambda c: c.key) == sorted(found, key=lambda c: c.key)


def test_true_is_not_one() -> None:
    assert changes({"seed": 1}, {"seed": True}) == [Change("seed", 1, True)]
    assert changes({"seed": 1}, {"seed": 1.0}) == []


def test_what_is_fixed_is_refused_with_the_difference_and_the_reason() -> None:
    assert refusal([]) is None
    assert refusal([Change("iterations", 50, 200), Change("checkpoints.every", 1, 2)]) is None
    text = refusal([Change("iterations", 5, 6), Change("model.adaptation.rank", 32, 64)])
    assert text is not None
    assert "model.adaptation.rank 32 -> 64 (other weights would be trained" in text
    assert "iterations" not in text
    many = refusal([Change(f"rewards.{n}.weight", 1.0, 2.0) for n in range(9)])
    assert many is not None and "and 5 more" in many
    long = refusal([Change("rewards.0.options", {}, {"text": "x" * 500})])
    assert long is not None and len(long) < 300


def test_fixed_settings_are_all_but_those_that_may_change() -> None:
    one, other = (values(iterations=n, optimizer={"learning_rate": r}) for n, r in ((1, 1), (2, 2)))
    assert fixed_settings(one) == fixed_settings(other)
    assert fixed_settings(one) != fixed_settings(values(seed=3))
