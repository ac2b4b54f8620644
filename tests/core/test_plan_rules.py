# SPDX-License-Identifier: Apache-2.0
"""Every rule against the plan it names, what measured rules ask for, and what is refused."""

import math
from typing import get_args

import pytest
import torch

from chunkgrpo.core.measured_plans import adaptive_plan, optimal_plan
from chunkgrpo.core.names import ByKind
from chunkgrpo.core.plan_rules import (
    DEFAULT_EXPLAINED,
    AdaptivePlan,
    AnyPlanRule,
    EqualPlan,
    ExplicitPlan,
    OptimalPlan,
    PaperPlan,
    StepPlan,
    WholePlan,
)
from chunkgrpo.core.plans import (
    ChunkPlan,
    equal_plan,
    explicit_plan,
    paper_plan,
    step_plan,
    whole_plan,
)
from closed_forms import SPEED


class Measured:
    """A curve that notes what was asked of it."""

    def __init__(self, curve=SPEED):
        self.curve, self.asked = curve, []

    def __call__(self, distance):
        self.asked.append(distance)
        return self.curve


GIVEN = [
    (ExplicitPlan((1, 15)), explicit_plan((1, 15), 16)),
    (EqualPlan(), equal_plan(4, 16)),
    (EqualPlan(5), equal_plan(5, 16)),
    (StepPlan(), step_plan(16)),
    (WholePlan(), whole_plan(16)),
    (PaperPlan(), paper_plan(16)),
]


@pytest.mark.parametrize(("rule", "plan"), GIVEN, ids=str)
def test_rules_without_a_measurement_are_their_plans(rule, plan):
    curve = Measured()
    assert rule.cut(16, curve) == rule.plan(16) == plan
    assert rule.num_chunks_of(16) == plan.num_chunks
    assert not rule.measured and rule.refresh == 0 and curve.asked == []


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
@pytest.mark.parametrize(
    ("rule", "plan"),
    [
        (AdaptivePlan(), adaptive_plan(SPEED, 4, "forward")),
        (AdaptivePlan(2, "central"), adaptive_plan(SPEED, 2, "central")),
        (OptimalPlan(), optimal_plan(SPEED, None, 4, DEFAULT_EXPLAINED)),
        (OptimalPlan(3, 2), optimal_plan(SPEED, 3, 2)),
        (OptimalPlan(None, 1, 0.5), optimal_plan(SPEED, None, 1, 0.5)),
        (OptimalPlan(None, 1, 0.0), whole_plan(16)),
    ],
    ids=str,
)
def test_measured_rules_ask_once_for_the_curve_of_their_distance(rule, plan, distance):
    curve = Measured()
    rule = type(rule)(**{**vars(rule), "distance": distance, "refresh": 7})
    assert rule.cut(16, curve) == plan
    assert curve.asked == [distance] and rule.measured and rule.refresh == 7


def test_only_a_number_of_chunks_that_is_given_is_known_before():
    assert OptimalPlan(3).num_chunks_of(16) == 3
    assert OptimalPlan().num_chunks_of(16) is None and AdaptivePlan().num_chunks_of(16) is None
    assert PaperPlan().num_chunks_of(5) == 4  # of any schedule, although it fits one alone


def test_kinds_are_those_of_recipes():
    assert ByKind.kinds(AnyPlanRule) == {
        "explicit": ExplicitPlan, "equal": EqualPlan, "steps": StepPlan, "whole": WholePlan,
        "paper": PaperPlan, "adaptive": AdaptivePlan, "optimal": OptimalPlan,
    }  # fmt: skip
    assert len(get_args(AnyPlanRule)) == 7


def test_sizes_become_a_tuple():
    assert ExplicitPlan([2, 3]).sizes == (2, 3) and hash(ExplicitPlan([2, 3]))
    assert ExplicitPlan([2, 3]).cut(5, Measured()) == ChunkPlan((2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExplicitPlan(()), "needs at least one chunk"),
        (lambda: ExplicitPlan((2, 0)), "integer >= 1"),
        (lambda: ExplicitPlan((2, 2)).cut(5, Measured()), "sum to 4.*5 trained steps; grow"),
        (lambda: ExplicitPlan((2, 2)).num_chunks_of(5), "sum to 4.*5 trained steps; grow"),
        (lambda: EqualPlan(0), "size is 0; a chunk has at least 1 step"),
        (lambda: EqualPlan(17).cut(16, Measured()), "chunk size is 17.*1 to 16"),
        (lambda: PaperPlan().cut(9, Measured()), "has 9; set num_steps to 17"),
        (lambda: AdaptivePlan(0), "min_size is 0; a chunk has at least 1 step"),
        (lambda: AdaptivePlan(refresh=-1), "refresh is -1; it counts iterations; 0 keeps"),
        (
            lambda: AdaptivePlan(difference="forwards"),
            "unknown difference 'forwards'; did you mean 'forward'",
        ),
        (lambda: AdaptivePlan(distance="l3"), "unknown distance 'l3'.*known: l1, l2, cosine"),
        (lambda: AdaptivePlan().cut(15, Measured()), "sum to 16.*15 trained steps"),
        (lambda: OptimalPlan(min_size=0), "min_size is 0; a chunk has at least 1 step"),
        (lambda: OptimalPlan(refresh=-2), "refresh is -2"),
        (lambda: OptimalPlan(distance=""), "unknown distance ''; known: l1, l2, cosine"),
        (lambda: OptimalPlan(0), "num_chunks is 0; a plan has at least 1 chunk"),
        (lambda: OptimalPlan(explained=1.5), r"explained is 1.5; it is a share, in \[0, 1\]"),
        (lambda: OptimalPlan(explained=-0.1), "explained is -0.1"),
        (lambda: OptimalPlan(explained=math.nan), "explained is nan"),
        (
            lambda: OptimalPlan(3, explained=0.9),
            "num_chunks is 3 and explained 0.9; each decides the number of chunks; set one of",
        ),
        (
            lambda: OptimalPlan(3, 6).cut(16, Measured()),
            "num_chunks is 3 and min_size 6: 16 trained steps can be cut into at most 2 chunks",
        ),
        (
            lambda: OptimalPlan(None, 6).cut(5, Measured()),
            "5 trained steps can be cut into at most 0 chunks of that size; lower one",
        ),
        (lambda: OptimalPlan(2).cut(15, Measured()), "sum to 16.*15 trained steps"),
    ],
)
def test_errors_name_value_rule_and_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_cut_is_refused_before_anything_is_measured():
    curve = Measured(torch.ones(5))
    with pytest.raises(ValueError, match="at most 1 chunks"):
        OptimalPlan(2, 4).cut(5, curve)
    assert curve.asked == []
