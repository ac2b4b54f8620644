# SPDX-License-Identifier: Apache-2.0
"""Plans in detail, their adjoint operations, and the refusals that guard them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core.plans import (
    ChunkPlan,
    equal_plan,
    explicit_plan,
    paper_plan,
    restrict_plan,
    step_plan,
    whole_plan,
)
from closed_forms import seeded

sizes_lists = st.lists(st.integers(1, 6), min_size=1, max_size=8)


# --- the plan ----------------------------------------------------------------------------------


def test_the_published_plan_in_detail():
    plan = paper_plan(16)
    assert plan == ChunkPlan((2, 3, 4, 7)) and str(plan) == "[2, 3, 4, 7]"
    assert (plan.num_steps, plan.num_chunks, plan.starts) == (16, 4, (0, 2, 5, 9))
    assert plan.chunk_of_step.tolist() == [0] * 2 + [1] * 3 + [2] * 4 + [3] * 7
    assert plan.chunk_of_step.dtype == torch.long
    assert [list(plan.steps_of(j)) for j in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
    values = torch.arange(32, dtype=torch.float64).reshape(2, 16)
    assert plan.reduce(values).tolist() == [[0.5, 3.0, 6.5, 12.0], [16.5, 19.0, 22.5, 28.0]]
    expanded = plan.expand(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert expanded.tolist() == [[1.0] * 2 + [2.0] * 3 + [3.0] * 4 + [4.0] * 7]


@given(sizes=sizes_lists)
def test_steps_tile_the_plan(sizes):
    plan = ChunkPlan(tuple(sizes))
    tiled = [step for chunk in range(plan.num_chunks) for step in plan.steps_of(chunk)]
    assert tiled == list(range(plan.num_steps))
    owners = [c for c in range(plan.num_chunks) for _ in plan.steps_of(c)]
    assert plan.chunk_of_step.tolist() == owners


@given(sizes=sizes_lists, seed=st.integers(0, 99))
def test_reduce_is_a_mean_and_a_left_inverse_of_expand(sizes, seed):
    plan = ChunkPlan(tuple(sizes))
    values_BN = torch.randn(3, plan.num_steps, generator=seeded(seed), dtype=torch.float64)
    values_BC = torch.randn(3, plan.num_chunks, generator=seeded(seed), dtype=torch.float64)
    by_hand = torch.stack(
        [values_BN[:, list(plan.steps_of(c))].mean(1) for c in range(plan.num_chunks)], 1
    )
    assert torch.allclose(plan.reduce(values_BN), by_hand, rtol=1e-12)
    assert torch.allclose(plan.reduce(plan.expand(values_BC)), values_BC, rtol=1e-12)
    assert torch.equal(plan.expand(values_BC), values_BC[:, plan.chunk_of_step])


@given(num_steps=st.integers(1, 20), seed=st.integers(0, 99))
def test_chunks_of_one_reduce_to_the_last_bit(num_steps, seed):
    values = torch.randn(4, num_steps, generator=seeded(seed)) * 1e-5
    assert torch.equal(step_plan(num_steps).reduce(values), values)


def test_gradients_flow_through_reduce_and_expand():
    plan = ChunkPlan((1, 2))
    x = torch.ones(1, 3, requires_grad=True)
    plan.expand(plan.reduce(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 3))


def test_wrong_lengths_are_refused_with_the_fix():
    with pytest.raises(ValueError) as too_long:
        explicit_plan((2, 3, 4, 8), 16)
    assert str(too_long.value) == (
        "chunk sizes (2, 3, 4, 8) sum to 17, but this schedule has 16 trained steps; "
        "shrink a chunk or raise num_steps"
    )
    with pytest.raises(ValueError, match=r"sum to 3.*4 trained steps; grow a chunk or lower"):
        explicit_plan([1, 2], 4)
    with pytest.raises(ValueError, match=r"sum to 3.*2 trained steps"):
        ChunkPlan((1, 2)).reduce(torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"shape \(5, 3\).*its 2 chunks"):
        ChunkPlan((1, 2)).expand(torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"chunk 2 was asked.*chunks 0 to 1"):
        ChunkPlan((1, 2)).steps_of(2)
    assert ChunkPlan((1, 2)).validate_for(3) == ChunkPlan((1, 2))


@pytest.mark.parametrize("sizes", [(), (0,), (2, -1), (1.0, 2), (True, 2)])
def test_malformed_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="integer >= 1"):
        ChunkPlan(sizes)


# --- plans without measurement -----------------------------------------------------------------


def test_equal_plans_leave_the_rest_at_the_end():
    assert equal_plan(4, 16).sizes == (4, 4, 4, 4)
    assert equal_plan(5, 16).sizes == (5, 5, 5, 1)
    assert equal_plan(16, 16) == whole_plan(16) == ChunkPlan((16,))
    assert equal_plan(1, 16) == step_plan(16) == ChunkPlan((1,) * 16)
    for size in (0, 17):
        with pytest.raises(ValueError, match=f"chunk size is {size}.*1 to 16"):
            equal_plan(size, 16)


@given(size=st.integers(1, 30), num_trained=st.integers(1, 30))
def test_equal_plans_match_torch_split(size, num_trained):
    if size <= num_trained:
        parts = torch.arange(num_trained).split(size)
        assert equal_plan(size, num_trained).sizes == tuple(len(part) for part in parts)


def test_the_published_plan_needs_its_schedule():
    with pytest.raises(ValueError, match=r"16 trained steps.*has 9; set num_steps to 17"):
        paper_plan(9)


# --- plans inside a window ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "sizes"),
    [
        (range(16), (2, 3, 4, 7)),
        (range(0, 2), (2,)),
        (range(2, 9), (3, 4)),
        (range(5, 16), (4, 7)),
        (range(9, 16), (7,)),
    ],
)
def test_a_window_keeps_its_whole_chunks(window, sizes):
    assert restrict_plan(paper_plan(16), window).sizes == sizes


@pytest.mark.parametrize(
    ("window", "edge"), [(range(1, 5), 1), (range(0, 3), 3), (range(2, 17), 17), (range(4, 8), 4)]
)
def test_a_chunk_across_an_edge_is_refused(window, edge):
    message = (
        rf"chunk of \[2, 3, 4, 7\] lies across the edge of the window of steps {window.start} to "
        rf"{window.stop - 1};.*end a chunk at step {edge}$"
    )
    with pytest.raises(ValueError, match=message):
        restrict_plan(paper_plan(16), window)
