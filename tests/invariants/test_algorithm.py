# SPDX-License-Identifier: Apache-2.0
"""Chunk-GRPO against a route that needs no cleverness: one graph, one loss, autograd.

Axes: B samples, N trained steps, C chunks.
"""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.core import (
    ChunkPlan,
    ChunkSizeWeights,
    Clip,
    DanceDiffusion,
    FlowDiffusion,
    ImplicitWeights,
    ListedSelection,
    OdeDiffusion,
    Transition,
    TransitionKl,
    UniformSelection,
    group_advantages,
    largest_advantages,
    make_sigmas,
    num_chosen,
    policy_gradient_scale,
    step_plan,
    whole_plan,
)
from chunkgrpo.credit import Credit
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.types import Experience
from compose import chunk_grpo, rollout
from oracles import (
    FLOW,
    PLAN,
    SIGMAS,
    chosen_of,
    close,
    collect,
    direct,
    log_probs,
    make_experience,
    samples_of,
    seeded,
    shift,
    toy,
)

# --- the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    ("plan", "clip"), [(PLAN, 1e-3), (step_plan(7), 1e-3), (whole_plan(7), 3e-4)], ids=str
)
def test_pieces_sum_to_the_direct_loss_and_gradient(plan, clip, fraction):
    policy = toy()
    experience = make_experience(policy, group_size=32)
    algorithm = chunk_grpo(
        plan, FLOW, UniformSelection(fraction), trust=Clip(clip, clip), updates=2, micro_batch=5
    )
    _, (value, grad, parts) = collect_until(algorithm, policy, experience, shift(0.02))
    samples = samples_of(parts)
    mask = chosen_of(parts, plan, experience.trajectory.num_samples)
    expected, expected_grad, log_ratio = direct(policy, experience, plan, samples, mask, clip)
    # All kinds of clipping occur, or the comparison would show little.
    ratio, positive = log_ratio.exp(), experience.advantages[samples, None] > 0
    for sign in (positive, ~positive):
        assert (sign & (ratio > 1 + clip)).any()
        assert (sign & (ratio < 1 - clip)).any()
        assert (sign & ((ratio - 1).abs() < clip)).any()
    assert abs(value - expected) <= 1e-6 * abs(expected) + 1e-7
    close(grad, expected_grad, 1e-6)


def collect_until(algorithm, policy, experience, move, seed=3):
    """As ``collect``, but the policy stays where it is after the second update."""
    moves = iter([move])
    return collect(
        algorithm, policy, experience, lambda p: next(moves, lambda policy: None)(p), seed
    )


def test_pieces_sum_to_the_direct_gradient_on_a_network(tiny_policy):
    policy, clip = tiny_policy(Adaptation("full")), 1e-4
    experience = make_experience(policy, ["a star", "two circles"], 4, sigmas=make_sigmas(5))
    plan = ChunkPlan((1, 3))
    algorithm = chunk_grpo(
        plan, FLOW, UniformSelection(1.0), trust=Clip(clip, clip), updates=2, micro_batch=3
    )
    _, (value, grad, parts) = collect_until(algorithm, policy, experience, shift(1e-3))
    samples = samples_of(parts)
    mask = chosen_of(parts, plan, 8)
    expected, expected_grad, log_ratio = direct(policy, experience, plan, samples, mask, clip)
    assert log_ratio.abs().max() > clip
    assert abs(value - expected) <= 1e-6
    close(grad, expected_grad, 1e-4)


def test_any_micro_batch_gives_the_same_gradient():
    found, first_values = [], None
    for micro_batch in (1, 3, 7, 1000):
        policy = toy()
        algorithm = chunk_grpo(PLAN, FLOW, trust=Clip(2e-3, 2e-3), micro_batch=micro_batch)
        updates = collect(algorithm, policy, make_experience(policy), shift(0.02))
        found.append(torch.stack([grad for _, grad, _ in updates]))
        values = torch.stack([value for value, _, _ in updates])
        first_values = values if first_values is None else first_values
        close(found[-1], found[0], 1e-6)
        assert torch.allclose(values, first_values, rtol=1e-6, atol=1e-7)
        computed = [
            len(part.diagnostics["step"])
            for _, _, parts in updates
            for part in parts
            if "skipped" not in part.diagnostics
        ]
        assert max(computed) <= micro_batch


def test_what_pulls_nowhere_is_not_computed():
    policy = toy()
    experience = make_experience(policy)
    # One group of equal rewards: its advantages are 0.
    group = experience.trajectory.group_size
    advantages = experience.advantages.clone()
    advantages[:group] = 0
    algorithm = chunk_grpo(PLAN, FLOW, UniformSelection(1.0), updates=1, micro_batch=5)
    policy.calls.clear()
    idle = replace(experience, advantages=advantages)
    parts = list(algorithm.losses(policy, idle, torch.Generator().manual_seed(0)))
    num_samples, num_trained = experience.trajectory.old_log_prob.shape
    assert sum(policy.calls) == (num_samples - group) * num_trained
    last = parts[-1]
    assert last.ends_update and len(last.diagnostics["skipped"]) == group * num_trained
    assert last.loss == 0
    last.backward()
    assert all((p.grad == 0).all() for p in policy.parameters())


def test_any_micro_batch_gives_the_same_gradient_on_a_network(tiny_policy):
    found = []
    for micro_batch in (3, 1000):
        policy = tiny_policy()
        experience = make_experience(policy, ["a star"], 4, sigmas=make_sigmas(5))
        algorithm = chunk_grpo(
            ChunkPlan((1, 3)), FLOW, micro_batch=micro_batch, updates=1, anchor="replay"
        )
        # A fresh LoRA answers with 0, and so half of its gradient is 0: move it first.
        shift(0.05)(policy)
        found.append(collect(algorithm, policy, experience)[0][1])
    close(found[1], found[0], 1e-4)


# --- the two ends of the scale ------------------------------------------------------------------


def moved(plan, clip=2e-3):
    policy = toy()
    experience = make_experience(policy)
    algorithm = chunk_grpo(plan, FLOW, UniformSelection(1.0), trust=Clip(clip, clip))
    _, (value, grad, parts) = collect_until(algorithm, policy, experience, shift(0.02))
    samples = samples_of(parts)
    new = log_probs(policy, experience.trajectory, samples)
    old = experience.trajectory.old_log_prob[samples]
    return policy, value, grad, new, old, experience.advantages[samples]


def test_chunks_of_one_are_step_level_grpo():
    policy, value, grad, new, old, advantages = moved(step_plan(7))
    loss = 0
    for i in range(7):
        ratio = (new[:, i] - old[:, i]).exp()
        unclipped = ratio * advantages
        clipped = ratio.clip(1 - 2e-3, 1 + 2e-3) * advantages
        loss = loss - torch.min(unclipped, clipped).mean() / 7
    loss.backward()
    assert abs(value - loss.detach()) < 1e-7
    close(grad, policy.mean.grad, 1e-6)


@pytest.mark.parametrize("network", [False, True], ids=["toy", "network"])
def test_chunks_of_one_are_step_level_grpo_to_the_last_bit(tiny_policy, network):
    """A loop over steps as published code has it: log-probability, ratio, clip, mean, backward.

    It goes through the rows in the same order and batches, as sums of floating-point numbers depend
    on both; on the network, where a row's bits depend on its batch, one by one. It trains 2^n pairs
    an update, so that dividing by their number rounds nothing.
    """
    prompts = ["a star", "two circles"]
    if network:
        policy, group, steps, clip, far, micro_batch = tiny_policy(), 8, 4, 1e-4, 0.03, 1
        shift(0.05)(policy)
    else:
        policy, group, steps, clip, far, micro_batch = toy(), 16, 8, 2e-3, 0.02, 7
    experience = make_experience(policy, prompts, group, sigmas=make_sigmas(steps + 1))
    t, advantages = experience.trajectory, experience.advantages
    plan = step_plan(steps)
    algorithm = chunk_grpo(
        plan, FLOW, UniformSelection(1.0), trust=Clip(clip, clip), micro_batch=micro_batch
    )
    parameters, number, update, signs = (
        policy.parameters(),
        len(prompts) * group * steps // 2,
        0,
        [],
    )
    found = [torch.zeros_like(p) for p in parameters]
    expected = [torch.zeros_like(p) for p in parameters]

    def add(sums, loss):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += 0 if gradient is None else gradient

    for part in algorithm.losses(policy, experience, seeded(3)):
        b, i = part.diagnostics["sample"], part.diagnostics["step"]
        v = policy.velocity(t.states[b, i], t.sigmas[i], t.conditioning_of(b))
        step = FLOW(t.states[b, i], v, t.sigmas[i], t.sigmas[i + 1])
        new = step.log_prob_per_dim(t.states[b, i + 1]).float()
        old = new.detach() if update == 0 else t.old_log_prob[b, i]
        ratio, A = (new - old).exp(), advantages[b]
        loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip)).sum() / number
        add(expected, loss)
        add(found, part.loss)
        outside = (ratio - 1).abs() > clip
        signs += [(s > 0, r > 1) for s, r in zip(A[outside], ratio[outside], strict=True)]
        if part.ends_update:
            for a, e in zip(found, expected, strict=True):
                assert torch.equal(a, e)
            assert any(bool((a != 0).any()) for a in found)
            for sums in (found, expected):
                for total in sums:
                    total.zero_()
            update += 1
            shift(far)(policy)
    # Both signs leave the range on both sides: cut, and kept on the wrong side.
    assert update == 2 and {(bool(s), bool(r)) for s, r in signs} == {
        (s, r) for s in (False, True) for r in (False, True)
    }


def test_one_chunk_of_all_steps_has_the_sequence_level_ratio():
    policy, value, grad, new, old, advantages = moved(whole_plan(7))
    dim = 12
    # The whole sequence's densities, to the power 1 / (steps * elements).
    ratio = ((new * dim).sum(1) - (old.double() * dim).sum(1)).div(7 * dim).exp()
    loss = -torch.min(ratio * advantages, ratio.clip(1 - 2e-3, 1 + 2e-3) * advantages).mean()
    loss.backward()
    assert abs(value - loss.detach()) < 1e-7
    close(grad, policy.mean.grad, 1e-6)


# --- before any update --------------------------------------------------------------------------


def first_log_ratios(policy, anchor, micro_batch, updates=1):
    experience = make_experience(policy, ["a star", "two circles"], 3, sigmas=make_sigmas(5))
    algorithm = chunk_grpo(
        ChunkPlan((1, 3)), FLOW, UniformSelection(1.0), anchor=anchor, micro_batch=micro_batch,
        updates=updates,
    )  # fmt: skip
    parts = list(algorithm.losses(policy, experience, seeded(4)))
    return torch.cat([part.diagnostics["log_ratio"] for part in parts])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch", [5, 64])
def test_a_replayed_anchor_starts_at_exactly_one(tiny_policy, precision, micro_batch):
    log_ratio = first_log_ratios(tiny_policy(precision=precision), "replay", micro_batch)
    assert len(log_ratio) == 6 * 4
    assert (log_ratio == 0).all()


def test_later_updates_replay_in_the_batches_they_train(tiny_policy):
    log_ratio = first_log_ratios(tiny_policy(precision="bf16"), "replay", 5, updates=2)
    assert (log_ratio == 0).all()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-3)])
def test_the_rollouts_anchor_starts_near_one(tiny_policy, precision, tolerance):
    """Only batch shapes differ, and with them the order of sums inside the network."""
    worst = first_log_ratios(tiny_policy(precision=precision), "rollout", 5).abs().max().item()
    print(f"\n{precision}: largest |log ratio| before any update {worst:.2e}")
    assert worst <= tolerance


def test_the_toys_anchors_agree_to_rounding():
    policy = toy()
    experience = make_experience(policy)
    for anchor in ("rollout", "replay"):
        parts = chunk_grpo(PLAN, FLOW, anchor=anchor).losses(policy, experience, seeded())
        for part in parts:
            assert part.diagnostics["log_ratio"].abs().max() < 1e-6


def test_at_ratio_one_steps_weigh_as_the_inverse_of_their_chunk():
    policy = toy()
    experience = make_experience(policy)
    algorithm = chunk_grpo(PLAN, FLOW, UniformSelection(1.0), updates=1)
    ((value, grad, _),) = collect(algorithm, policy, experience)
    weights = torch.tensor([7 / (3 * 1)] + [7 / (3 * 2)] * 2 + [7 / (3 * 4)] * 4)
    new = log_probs(policy, experience.trajectory, torch.arange(24))
    step_level = -(experience.advantages[:, None] * weights * new).mean()
    step_level.backward()
    close(grad, policy.mean.grad, 1e-6)
    assert value.item() == pytest.approx(-experience.advantages.mean().item(), abs=1e-6)


@pytest.mark.parametrize("anchor", ["rollout", "replay"])
def test_implicit_weights_make_step_level_the_chunks_at_ratio_one(anchor):
    """What the sizes of chunks do, without chunks: the two gradients are one."""
    policy = toy()
    experience = make_experience(policy)

    def gradient(plan, **options):
        algorithm = chunk_grpo(
            plan, FLOW, UniformSelection(1.0), updates=1, anchor=anchor, **options
        )
        return collect(algorithm, policy, experience)[0]

    value, chunks, _ = gradient(PLAN)
    same_value, steps, _ = gradient(step_plan(7), outer_weights=ImplicitWeights(PLAN.sizes))
    close(steps, chunks, 1e-6)
    assert same_value.item() == pytest.approx(value.item(), abs=1e-6)
    _, even, _ = gradient(step_plan(7))
    assert (even - chunks).norm() > 0.1 * chunks.norm()
    # And chunks that count by their size are the plain steps.
    close(gradient(PLAN, outer_weights=ChunkSizeWeights())[1], even, 1e-6)


def test_equal_kappa_and_chunk_sizes_give_every_step_the_same_gradient():
    """Before the policy moves, chunks of 1, 2 and 4: |dL/dv| = C / (S M N D mean(1/kappa)) |A e|.

    e is the noise that was drawn in the step. The derivative with respect to the velocity is
    -A lambda a kappa e / (S M cs D), and lambda a kappa / cs is one number for all steps.
    """
    policy = Asked(toy().mean.detach(), 0.5)
    experience = make_experience(policy)
    t = experience.trajectory
    options = {"updates": 1, "micro_batch": 10**6, "inner_weights": "equal_kappa"}
    plain = chunk_grpo(PLAN, FLOW, UniformSelection(1.0), **options)
    algorithm = chunk_grpo(
        PLAN, FLOW, UniformSelection(1.0), outer_weights=ChunkSizeWeights(), **options
    )

    def sizes(algorithm):
        """[B, N]: derivatives with respect to the velocity, without A and the step's noise."""
        policy.answers.clear()
        (part,) = algorithm.losses(policy, experience, seeded(3))
        part.backward()
        (v,), b, i = policy.answers, part.diagnostics["sample"], part.diagnostics["step"]
        step = FLOW(t.states[b, i], v.detach(), t.sigmas[i], t.sigmas[i + 1])
        noise = (t.states[b, i + 1] - step.mean) / step.std
        found = torch.zeros(24, 7, dtype=torch.float64)
        found[b, i] = v.grad.norm(dim=1) / (experience.advantages[b].abs() * noise.norm(dim=1))
        return found

    kappa = policy_gradient_scale(SIGMAS[:-1].double(), FLOW.diffusion)
    expected = 1 / (24 * 7 * 12) / (1 / kappa).mean()
    torch.testing.assert_close(
        sizes(algorithm), expected.expand(24, 7), rtol=1e-4, atol=0, check_dtype=False
    )
    # Equal kappa alone leaves 1 / cs: the steps of each chunk are alike, and 1 : 1/2 : 1/4.
    plain = sizes(plain).mean(0)
    ratios = [7 / 3] + [7 / 6] * 2 + [7 / 12] * 4
    assert (plain / expected).tolist() == pytest.approx(ratios, rel=1e-4)


class Asked(GaussianPolicy):
    """The toy, which keeps its answers and their gradients."""

    def __init__(self, mean, std):
        super().__init__(mean, std)
        self.answers = []

    def velocity(self, x, sigma, conditioning):
        v = super().velocity(x, sigma, conditioning)
        if v.requires_grad:
            v.retain_grad()
            self.answers.append(v)
        return v


def test_drawing_chunks_keeps_these_weights_in_expectation():
    policy = toy()
    experience = make_experience(policy)

    def gradient(selection):
        algorithm = chunk_grpo(PLAN, FLOW, selection, updates=1)
        return collect(algorithm, policy, experience)[0][1]

    every = gradient(UniformSelection(1.0))
    drawn = [gradient(ListedSelection(pair)) for pair in combinations(range(3), 2)]
    close(torch.stack(drawn).mean(0), every, 1e-6)


# --- several updates ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 24])
def test_updates_deal_every_sample_once(number):
    policy = toy()
    experience = make_experience(policy)
    algorithm = chunk_grpo(PLAN, FLOW, updates=number, micro_batch=4)
    updates = collect(algorithm, policy, experience)
    dealt = [samples_of(parts) for _, _, parts in updates]
    assert len(updates) == number
    assert torch.cat(dealt).sort().values.tolist() == list(range(24))
    assert {len(share) for share in dealt} == {24 // number}
    for _, _, parts in updates:
        assert [part.ends_update for part in parts] == [False] * (len(parts) - 1) + [True]
        pairs = {
            (int(b), int(i))
            for part in parts
            for b, i in zip(part.diagnostics["sample"], part.diagnostics["step"], strict=True)
        }
        assert len(pairs) == sum(len(part.diagnostics["step"]) for part in parts)


def strongest(experience, keep, updates=2):
    """The same experience, of which a share is trained on."""
    number = num_chosen(len(experience.advantages), keep, updates)
    chosen = largest_advantages(experience.advantages, number)
    return replace(experience, chosen=chosen)


@pytest.mark.parametrize(("keep", "number"), [(1.0, 24), (0.5, 12), (0.3, 8), (0.01, 2)])
def test_updates_deal_the_strongest_samples(keep, number):
    policy = toy()
    experience = strongest(make_experience(policy), keep)
    algorithm = chunk_grpo(PLAN, FLOW, micro_batch=4)
    updates = collect(algorithm, policy, experience)
    dealt = [samples_of(parts) for _, _, parts in updates]
    assert [len(share) for share in dealt] == [number // 2] * 2
    trained = torch.cat(dealt)
    size = experience.advantages.abs()
    assert set(trained.tolist()) == set(size.topk(number).indices.tolist())


def test_pieces_of_the_strongest_sum_to_their_direct_loss():
    policy, clip = toy(), 1e-3
    experience = strongest(make_experience(policy, group_size=32), 0.4)
    algorithm = chunk_grpo(PLAN, FLOW, UniformSelection(1.0), trust=Clip(clip, clip), micro_batch=5)
    _, (value, grad, parts) = collect_until(algorithm, policy, experience, shift(0.02))
    samples = samples_of(parts)
    assert len(samples) == 39 // 2  # of 96, 0.4 are 38.4; the second update has the odd one less
    mask = chosen_of(parts, PLAN, experience.trajectory.num_samples)
    expected, expected_grad, log_ratio = direct(policy, experience, PLAN, samples, mask, clip)
    assert log_ratio.abs().max() > clip
    assert abs(value - expected) <= 1e-6 * abs(expected) + 1e-7
    close(grad, expected_grad, 1e-6)


def test_later_updates_use_the_moved_policy():
    policy = toy()
    updates = collect(chunk_grpo(PLAN, FLOW), policy, make_experience(policy), shift(0.02))
    first, second = (parts[-1].diagnostics["chunk_log_ratio"] for _, _, parts in updates)
    assert (first == 0).all()
    assert (second != 0).all() and second.abs().max() > 1e-3
    # The second pass sees exactly what the first one measured.
    parts = updates[1][2]
    measured = torch.zeros(24, 7)
    for part in parts:
        d = part.diagnostics
        measured[d["sample"], d["step"]] = d["log_ratio"].float()
    mask = chosen_of(parts, PLAN, 24)
    again = PLAN.reduce(measured)[mask]
    assert torch.allclose(again.sort().values, second.sort().values, atol=1e-6)


def test_the_generator_decides_everything():
    first, again, other = (
        collect(chunk_grpo(PLAN, FLOW), policy, make_experience(policy), shift(0.02), seed)[1]
        for policy, seed in ((toy(), 3), (toy(), 3), (toy(), 4))
    )
    assert torch.equal(first[1], again[1])
    assert not torch.allclose(first[1], other[1])


def test_advantages_may_differ_by_chunk():
    policy = toy()
    experience = make_experience(policy)
    per_chunk = replace(experience, advantages=experience.advantages[:, None].repeat(1, 3))
    algorithm = chunk_grpo(PLAN, FLOW, UniformSelection(1.0), updates=1)
    same = collect(algorithm, policy, per_chunk)[0]
    plain = collect(algorithm, policy, experience)[0]
    assert torch.equal(same[1], plain[1])
    per_chunk.advantages[:, 1:] = 0
    alone = collect(algorithm, policy, per_chunk)[0]
    listed = replace(algorithm, selection=ListedSelection((0,)))
    close(3 * alone[1], collect(listed, policy, experience)[0][1], 1e-6)


# --- staying near a reference -------------------------------------------------------------------


def torch_kl(policy, trajectory):
    """Mean over samples, steps and elements of torch's own divergence, with gradient."""
    total = 0
    for i in range(trajectory.num_trained):
        x, (sigma, sigma_next) = trajectory.states[:, i], trajectory.sigmas[i : i + 2]
        rows = sigma.expand(len(x))
        new = FLOW(
            x, policy.velocity(x, rows, trajectory.conditioning_of(slice(None))), sigma, sigma_next
        )
        with policy.reference(), torch.no_grad():
            ref = FLOW(
                x,
                policy.velocity(x, rows, trajectory.conditioning_of(slice(None))),
                sigma,
                sigma_next,
            )
        new, ref = (torch.distributions.Normal(g.mean, g.std) for g in (new, ref))
        total = total + torch.distributions.kl_divergence(new, ref).mean() / trajectory.num_trained
    return total


def test_the_kl_term_is_the_divergence_per_element():
    policy = toy()
    shift(0.1)(policy)
    experience = make_experience(policy)
    silent = replace(experience, advantages=torch.zeros(24))
    algorithm = chunk_grpo(
        PLAN, FLOW, UniformSelection(1.0), updates=1, kl=TransitionKl(0.5), micro_batch=13
    )
    ((value, grad, parts),) = collect(algorithm, policy, silent)
    expected = 0.5 * torch_kl(policy, experience.trajectory)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    close(grad, policy.mean.grad, 1e-6)
    reported = torch.cat([part.diagnostics["reference_kl"] for part in parts]).mean()
    assert reported.item() == pytest.approx(2 * expected.item(), rel=1e-6)


def test_the_kl_term_is_zero_at_the_reference():
    policy = toy()
    experience = make_experience(policy)
    silent = replace(experience, advantages=torch.zeros(24))
    algorithm = chunk_grpo(PLAN, FLOW, updates=1, kl=TransitionKl(0.5))
    ((value, grad, _),) = collect(algorithm, policy, silent)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_kl_term_reaches_a_network(tiny_policy, method):
    policy = tiny_policy(Adaptation(method, rank=4))
    shift(0.05)(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    experience = make_experience(policy, ["a star"], 3, sigmas=make_sigmas(4))
    silent = replace(experience, advantages=torch.zeros(3))
    algorithm = chunk_grpo(
        step_plan(3), FLOW, UniformSelection(1.0), updates=1, kl=TransitionKl(0.5), micro_batch=4
    )
    ((value, grad, _),) = collect(algorithm, policy, silent)
    expected = 0.5 * torch_kl(policy, experience.trajectory)
    grads = torch.autograd.grad(expected, policy.parameters(), allow_unused=True)
    flat = torch.cat([g.double().flatten() for g in grads])
    assert value.item() == pytest.approx(expected.item(), rel=1e-4) and value > 0
    close(grad, flat, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


# --- refusals -----------------------------------------------------------------------------------


def test_what_can_not_work_is_refused():
    policy = toy()
    experience = make_experience(policy)

    def start(algorithm):
        next(iter(algorithm.losses(policy, experience, seeded())))

    with pytest.raises(ValueError, match=r"sum to 8, but this schedule has 7 trained steps"):
        start(chunk_grpo(ChunkPlan((4, 4)), FLOW))
    with pytest.raises(ValueError, match="25 updates need as many samples, and 24 samples are tr"):
        start(chunk_grpo(PLAN, FLOW, updates=25))
    with pytest.raises(ValueError, match="needs a density"):
        chunk_grpo(PLAN, Transition(OdeDiffusion()))
    with pytest.raises(ValueError, match="needs a density"):
        chunk_grpo(PLAN, Transition(DanceDiffusion(0.0)))
    with pytest.raises(ValueError, match="unknown anchor 'memory'; known: rollout, replay"):
        ChunkLoss(anchor="memory")
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 64"):
        ChunkLoss(updates=0)
    with pytest.raises(ValueError, match="must be at least 1, got 2 and 0"):
        ChunkLoss(micro_batch=0)
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"samples that is kept is {keep}; it must be in"):
            Credit(keep=keep)
    with pytest.raises(ValueError, match=r"unknown inner weighting 'size'.*none, equal_kappa"):
        ChunkLoss(inner_weights="size")
    with pytest.raises(ValueError, match=r"the plan is \[1, 2, 4\]; use chunks of one"):
        chunk_grpo(PLAN, FLOW, outer_weights=ImplicitWeights(PLAN.sizes))
    with pytest.raises(ValueError, match="sum to 7, but this schedule has 6 trained steps"):
        chunk_grpo(step_plan(6), FLOW, outer_weights=ImplicitWeights(PLAN.sizes))


# --- does it learn? -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [step_plan(7), PLAN, whole_plan(7)], ids=str)
@pytest.mark.parametrize("diffusion", [FlowDiffusion(0.7), DanceDiffusion(0.3)])
def test_the_mean_moves_towards_what_is_rewarded(plan, diffusion):
    transition, target = Transition(diffusion), torch.tensor([1.0, -1.0])
    policy = GaussianPolicy(torch.zeros(2), 0.5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    algorithm = chunk_grpo(plan, transition, trust=Clip(0.2, 0.2), micro_batch=1000)
    distances = []
    for iteration in range(15):
        generator = seeded(100 + iteration)
        trajectory = rollout(policy, ["p"] * 2, transition, SIGMAS, 16, generator, same_noise=False)
        rewards = -(trajectory.final - target).square().sum(1)
        experience = Experience(trajectory, group_advantages(rewards, 2).values)
        for part in algorithm.losses(policy, experience, generator):
            part.backward()
            if part.ends_update:
                optimizer.step()
                optimizer.zero_grad()
        distances.append((policy.mean.detach() - target).norm().item())
    assert distances[4] < 1.41
    assert distances[9] < distances[4]
    assert distances[-1] < 0.7
