# SPDX-License-Identifier: Apache-2.0
"""Weights of steps by hand, what they equalise, and the choices of a run."""

import pytest
import torch

from chunkgrpo.core.names import ByKind
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.core.ratios import step_coefficients, transition_scale
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import FlowDiffusion, Transition
from chunkgrpo.core.step_weights import (
    INNER_WEIGHTS,
    AnyOuterWeights,
    ChunkSizeWeights,
    ImplicitWeights,
    InverseDtWeights,
    NoiseLevelWeights,
    NoOuterWeights,
    chunk_size_weights,
    equal_kappa_weights,
    implicit_weights,
    inverse_dt_weights,
    noise_level_weights,
)
from closed_forms import tensor


def test_weights_of_steps_by_hand():
    # 1/kappa = 4, 2, 1; their mean 7/3.
    assert equal_kappa_weights(tensor(0.25, 0.5, 1.0)).tolist() == pytest.approx(
        [12 / 7, 6 / 7, 3 / 7], rel=1e-12
    )
    assert noise_level_weights(tensor(0.1, 0.2, 0.6)).tolist() == pytest.approx([1 / 3, 2 / 3, 2.0])
    assert inverse_dt_weights(tensor(0.5, 0.1)).tolist() == pytest.approx([2.0, 10.0])
    for weigh in (equal_kappa_weights, noise_level_weights, inverse_dt_weights):
        assert weigh(torch.tensor([0.5, 0.25]).bfloat16()).dtype == torch.float32


def test_inner_weights_by_the_name_a_configuration_uses():
    kappa = tensor(0.5, 1.0)
    assert torch.equal(INNER_WEIGHTS["none"](kappa), torch.ones(2).double())
    assert torch.equal(INNER_WEIGHTS["equal_kappa"](kappa), equal_kappa_weights(kappa))


def test_outer_weights_are_their_functions_of_the_window():
    """Noise levels are normalised over all trainable steps, whatever the window."""
    std, dt = tensor(0.1, 0.3, 0.2, 0.5), tensor(0.2, 0.4, 0.3, 0.1)
    plan, window = ChunkPlan((1, 2)), slice(1, 4)
    assert list(ByKind.kinds(AnyOuterWeights.__origin__)) == [
        "none", "noise_level", "inverse_dt", "chunk_size", "implicit"
    ]  # fmt: skip
    for choice, expected in (
        (NoOuterWeights(), torch.ones(3).double()),
        (NoiseLevelWeights(), noise_level_weights(std)[1:]),
        (InverseDtWeights(), inverse_dt_weights(dt)[1:]),
        (ChunkSizeWeights(), chunk_size_weights(plan).double()),
        (ImplicitWeights((1, 2)), implicit_weights(plan).double()),
    ):
        found = choice(std, dt, window, plan)
        assert torch.equal(found, expected) and found.dtype == torch.float64
        assert choice == type(choice)(*([(1, 2)] if choice.kind == "implicit" else []))


def test_implicit_weights_imitate_chunks_with_single_steps_only():
    imitated = ImplicitWeights([2, 3])
    assert imitated.sizes == (2, 3)
    imitated.check(ChunkPlan((1,) * 5))
    with pytest.raises(ValueError, match=r"the plan is \[1, 4\]; use chunks of one, or no weights"):
        imitated.check(ChunkPlan((1, 4)))
    with pytest.raises(ValueError, match=r"sum to 5, but this schedule has 4 trained steps"):
        imitated.check(ChunkPlan((1,) * 4))
    for sizes in ((), (2, 0), (2.0,)):
        with pytest.raises(ValueError, match="integer >= 1"):
            ImplicitWeights(sizes)
    for choice in (NoOuterWeights(), NoiseLevelWeights(), InverseDtWeights(), ChunkSizeWeights()):
        choice.check(ChunkPlan((1, 4)))


def test_weights_of_a_cut_by_hand():
    """Seven steps in chunks of 1, 2 and 4: C cs / N, and its inverse."""
    plan = ChunkPlan((1, 2, 4))
    sizes, implicit = chunk_size_weights(plan), implicit_weights(plan)
    assert sizes.tolist() == pytest.approx([3 / 7] + [6 / 7] * 2 + [12 / 7] * 4)
    assert implicit.tolist() == pytest.approx([7 / 3] + [7 / 6] * 2 + [7 / 12] * 4)
    # Mean 1: the first over chunks, the second over steps.
    assert plan.reduce(sizes).mean().item() == pytest.approx(1)
    assert implicit.mean().item() == pytest.approx(1)
    for equal in (ChunkPlan((1,) * 6), ChunkPlan((3, 3)), ChunkPlan((6,))):
        assert torch.equal(chunk_size_weights(equal), torch.ones(6))
        assert torch.equal(implicit_weights(equal), torch.ones(6))


def test_chunk_size_weights_give_every_step_the_coefficient_1_over_n():
    plan = ChunkPlan((1, 2, 4))
    slope_BC = plan.reduce(chunk_size_weights(plan)[None])
    mask_BC = torch.ones(1, 3, dtype=torch.bool)
    coefficients = step_coefficients(mask_BC, slope_BC, plan, 3)
    torch.testing.assert_close(coefficients, torch.full((1, 7), 1 / 7))
    # Without them a step of the chunk of four counts a quarter of the first step.
    plain = step_coefficients(mask_BC, torch.ones(1, 3), plan, 3)[0]
    assert (plain[0] / plain[3:]).tolist() == pytest.approx([4.0] * 4)


def test_equal_kappa_weights_do_equalise():
    """Weighted, the gradient of every step's log-density w.r.t. the velocity has one spread."""
    sigmas = make_sigmas(9).double()[:-1]
    kernel = Transition(FlowDiffusion(0.7))
    weights = equal_kappa_weights(transition_scale(kernel, sigmas))
    eps = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spreads = []
    for weight, sigma, after in zip(weights, sigmas, sigmas[1:], strict=False):
        v = torch.zeros(1, 4000, dtype=torch.float64, requires_grad=True)
        step = kernel(torch.ones_like(v), v, sigma, after)
        value = step.sample(noise=eps).detach()
        (grad,) = torch.autograd.grad(step.log_prob(value).sum(), v)
        spreads.append((weight * grad.std()).item())
    assert spreads == pytest.approx([spreads[0]] * 8, rel=1e-9)
