# SPDX-License-Identifier: Apache-2.0
"""Faults that are planted in a healthy run, each named by its own check, and by no other.

What another check could only repeat is not judged: it is skipped, and says which check failed.
"""

from __future__ import annotations

import pytest

import examined
from planted_faults import FAULTS, FULL, GUIDED


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_by_its_check(name, tiny_pipeline_path, tmp_path, monkeypatch):
    examined.assert_named(FAULTS[name], tiny_pipeline_path, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [{}, GUIDED, {**FULL, "model__precision": "bf16-pure"}, {"model__precision": "bf16"}],
    ids=["plain", "guided", "pure", "bf16"],
)
def test_the_run_without_a_fault_is_healthy(settings, tiny_pipeline_path, tmp_path):
    run = examined.built(tiny_pipeline_path, tmp_path, **settings)
    found = examined.assert_healthy(*run)
    assert {name for name, each in found.items() if each.status == "skipped"} == set()


def test_there_are_enough_faults():
    assert len(FAULTS) >= 20
