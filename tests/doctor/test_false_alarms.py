# SPDX-License-Identifier: Apache-2.0
"""Healthy runs: every family's pipeline and every kind of method, without an alarm.

``tests/attack`` goes through all recipes, precisions and adaptations.
"""

from __future__ import annotations

import pytest

import examined


@pytest.mark.slow
@pytest.mark.parametrize("name", examined.FAMILIES)
def test_no_family_is_accused(name, tmp_path):
    found = examined.assert_healthy(*examined.family_run(name, tmp_path))
    assert found["stock"].status == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("name", examined.METHODS)
def test_no_method_is_accused(name, tmp_path):
    examined.assert_healthy(*examined.recipe_run(name, tmp_path), examined.RARE)
