# SPDX-License-Identifier: Apache-2.0
"""The list of mutations keeps up with the code: each can be made, and its tests exist."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations_run", HERE / "mutations" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_mutation_can_be_made() -> None:
    run = runner()
    listed = run.mutations()
    assert len(listed) >= 40
    assert len({each.name for each in listed}) == len(listed)
    wrong = [each.name for each in listed if run.occurrences(each) != 1 or each.old == each.new]
    assert not wrong, wrong


def test_the_tests_that_notice_exist_and_are_no_golden_figures() -> None:
    for each in runner().mutations():
        assert each.tests, each.name
        for test in each.tests:
            assert (HERE / test.partition("::")[0]).is_file(), (each.name, test)
            assert not test.startswith("golden"), each.name
