# SPDX-License-Identifier: Apache-2.0
"""The doctor names every planted fault, and is silent on healthy runs; its cost on the demo."""

from __future__ import annotations

import time

import pytest

import examined
from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.recipes import method_names, recipe_names
from planted_faults import FAULTS

PART = "doctor"
RECIPES = sorted([*recipe_names(), *method_names()])
FULL = {"model__adaptation": examined.FULL, "model__precision": "bf16-pure"}
KINDS = {"fp32": {}, "bf16": {"model__precision": "bf16"}, "full": FULL}


def chosen(every, full, number):
    """All of some names, or a few of them."""
    return list(every) if full else list(every)[:: max(1, len(every) // number)][:number]


def test_planted_faults_are_named(attempt, full, tiny_pipeline_path, tmp_path):
    for name in chosen(FAULTS, full, 3):
        with (
            attempt(PART, "planted fault, named by its check alone"),
            pytest.MonkeyPatch.context() as patch,
        ):
            folder = tmp_path / name.replace(" ", "-")
            examined.assert_named(FAULTS[name], tiny_pipeline_path, folder, patch)


@pytest.mark.parametrize("kind", KINDS)
def test_families_are_not_accused(kind, attempt, full, tmp_path):
    for name in chosen(examined.FAMILIES, full, 1):
        with attempt(PART, f"healthy family, {kind}: no alarm"):
            run = examined.family_run(name, tmp_path / name, **KINDS[kind])
            found = examined.assert_healthy(*run)
            assert found["stock"].status == "ok"


def test_recipes_are_not_accused(attempt, full, tmp_path):
    for name in chosen(RECIPES, full, 2):
        with attempt(PART, "healthy recipe: no alarm"):
            run = examined.recipe_run(name, tmp_path / name)
            examined.assert_healthy(*run, examined.RARE)


def test_the_demo_is_examined_in_seconds(attempt, full, tmp_path):
    if not full:
        pytest.skip("a time is measured by make attack alone")
    config = load_config("demo", ["threads=1"])
    trainer = build_trainer(config, tmp_path / "run")
    with attempt(PART, "demo examined in less than 10 seconds"):
        begun = time.perf_counter()
        named, findings = examined.examined(trainer, config)
        seconds = time.perf_counter() - begun
        print(f"the demo is examined in {seconds:.1f} s")
        assert named == set(), [str(f) for f in findings]
        assert seconds < 10
