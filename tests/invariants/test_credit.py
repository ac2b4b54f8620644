# SPDX-License-Identifier: Apache-2.0
"""Credit: who is trained on is chosen once, and what is held stays held in the loss itself.

Axes: P prompts, B samples, N trained steps, C chunks.
"""

from dataclasses import replace

import pytest
import torch

import chunkgrpo.credit
from chunkgrpo.core import (
    Clip,
    StratifiedTimes,
    TransitionKl,
    UniformSelection,
    chunk_advantages,
    combined_advantages,
    largest_advantages,
    num_chosen,
    step_plan,
)
from chunkgrpo.core.advantages import CONVENTIONS
from chunkgrpo.core.finite import NonFiniteError
from chunkgrpo.credit import Credit
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.rewards import RewardError
from chunkgrpo.types import Experience, RewardBatch
from compose import awm, chunk_grpo, diffusion_nft, rollout
from oracles import FLOW, PLAN, PROMPTS, SIGMAS, close, collect, samples_of, seeded, shift, toy

P, B = 3, 24
SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)


def scores(seed=0, scale=1.0, held_scale=1.0, kept=None, names=("held",)):
    """Rewards of normal distribution; held scores go together with them, up to noise."""
    generator = seeded(seed)
    reward = torch.randn(B, generator=generator)
    watched = {
        name: held_scale * (0.6 * reward + 0.8 * torch.randn(B, generator=generator) + 3)
        for name in names
    }
    raw = scale * reward
    total = raw if kept is None else raw.masked_fill(~kept, float("nan"))
    return RewardBatch({"reward": raw}, total, torch.ones(1), kept=kept, watched=watched)


def centred(values_B):
    """Deviations from each group's mean, in float64."""
    groups = values_B.double().reshape(P, -1)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def drift(coefficients, score_B, rows):
    """|sum of A h| over some samples relative to the sum of sizes; [C] where A is by chunk."""
    product = coefficients.double()[rows].reshape(len(rows), -1) * centred(score_B)[rows, None]
    return product.sum(0).abs() / product.abs().sum(0)


class Asked(GaussianPolicy):
    """The toy, which keeps the answers that are back-propagated."""

    def __init__(self):
        super().__init__(toy().mean.detach(), 0.5)
        self.answers = []

    def velocity(self, x, sigma, conditioning):
        v = super().velocity(x, sigma, conditioning)
        if v.requires_grad:
            v.retain_grad()
            self.answers.append(v)
        return v


def trained_coefficients(experience, algorithm, policy):
    """[B, N]: what each log-probability is multiplied with, read off the gradients themselves.

    The derivative with respect to a velocity is the coefficient times that of the pair's
    log-probability, which is worked out here anew.
    """
    t = experience.trajectory
    found = torch.zeros(B, t.num_trained, dtype=torch.float64)
    policy.answers.clear()
    for part in algorithm.losses(policy, experience, seeded(3)):
        part.backward()
        if "skipped" in part.diagnostics:
            continue
        (v,), b, i = policy.answers, part.diagnostics["sample"], part.diagnostics["step"]
        policy.answers.clear()
        free = v.detach().requires_grad_()
        step = FLOW(t.states[b, i], free, t.sigmas[i], t.sigmas[i + 1])
        log_prob = step.log_prob_per_dim(t.states[b, i + 1])
        (each,) = torch.autograd.grad(log_prob.sum(), free)
        coefficient = (v.grad * each).sum(1) / each.square().sum(1)
        torch.testing.assert_close(coefficient[:, None] * each, v.grad, rtol=1e-4, atol=1e-12)
        found[b, i] = coefficient
    return found


def sampled(policy):
    return rollout(policy, PROMPTS, FLOW, SIGMAS, B // P, seeded(1), keep_velocities=True)


# --- a held score stays held -------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("held_scale", SCALES)
def test_a_projected_score_does_not_drift_over_the_chosen_samples(scale, held_scale, keep):
    batch = scores(scale=scale, held_scale=held_scale)
    plain = Credit(keep=keep)([batch], P)
    held = Credit(keep=keep, project_out=("held",))([batch], P)
    rows = torch.arange(B) if held.chosen is None else held.chosen
    assert len(rows) == keep * B
    assert drift(held.values, batch.watched["held"], rows).max() < 1e-5
    assert drift(plain.values, batch.watched["held"], rows).max() > 0.1
    others = torch.ones(B, dtype=torch.bool).index_fill(0, rows, False)
    assert (held.values[others] == 0).all()
    # What is left is no small part of the advantage.
    assert held.values[rows].norm() > 0.3 * plain.values[rows].norm()


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("plan", [step_plan(7), PLAN], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_the_coefficients_that_are_trained_do_not_drift(scale, plan, updates):
    policy = Asked()
    batch = scores(scale=scale, held_scale=1 / scale)
    found = {}
    for name, credit in {
        "plain": Credit(keep=0.5),
        "held": Credit(keep=0.5, project_out=("held",)),
    }.items():
        advantages = credit([batch], P, updates)
        experience = Experience(sampled(policy), advantages.values, advantages.chosen)
        # The policy stands still, so that all ratios are 1.
        algorithm = chunk_grpo(
            plan, FLOW, UniformSelection(1.0), trust=Clip(0.1, 0.1), updates=updates, micro_batch=5
        )
        coefficients = trained_coefficients(experience, algorithm, policy)
        found[name] = drift(coefficients, batch.watched["held"], torch.arange(B))
        trained = (coefficients != 0).any(1).nonzero()[:, 0]
        assert torch.equal(trained, advantages.chosen) and len(trained) == 12
        # By the published formula: -A / (S M cs).
        sizes = torch.tensor(plan.sizes)[plan.chunk_of_step]
        expected = -advantages.values[:, None] / (12 / updates * plan.num_chunks * sizes)
        expected = expected.where((coefficients != 0).any(1)[:, None], torch.zeros(()))
        torch.testing.assert_close(coefficients.float(), expected, rtol=1e-4, atol=1e-6)
    assert (found["held"] < 1e-5).all(), found["held"]
    assert (found["plain"] > 0.1).all()


def test_gains_by_chunk_are_projected_chunk_by_chunk_and_trained_so():
    policy = Asked()
    batches = [scores(seed, held_scale=1e3) for seed in range(PLAN.num_chunks + 1)]
    credit = Credit(assign="gain", keep=0.5, project_out=("held",))
    advantages = credit(batches, P)
    held = batches[-1].watched["held"]
    assert advantages.values.shape == (B, 3) and len(advantages.chosen) == 12
    assert (drift(advantages.values, held, advantages.chosen) < 1e-5).all()
    experience = Experience(sampled(policy), advantages.values, advantages.chosen)
    algorithm = chunk_grpo(PLAN, FLOW, UniformSelection(1.0), updates=1, micro_batch=5)
    coefficients = trained_coefficients(experience, algorithm, policy)
    assert (drift(coefficients, held, torch.arange(B)) < 1e-5).all()


def test_several_scores_of_any_units_are_held_at_once():
    names = ("a", "b", "c")
    batch = scores(names=names)
    units = dict(zip(names, (1e-6, 1.0, 1e6), strict=True))
    batch = replace(batch, watched={n: units[n] * s for n, s in batch.watched.items()})
    advantages = Credit(keep=0.5, project_out=names)([batch], P)
    for name in names:
        assert drift(advantages.values, batch.watched[name], advantages.chosen).max() < 1e-5
    # One that is not named is not held.
    one = Credit(keep=0.5, project_out=("a",))([batch], P)
    assert drift(one.values, batch.watched["b"], one.chosen).max() > 1e-3


@pytest.mark.parametrize("level", [0.0, 0.1, 0.7, 1e6])
def test_a_score_without_spread_takes_nothing_out(level):
    """The mean of equal numbers may miss them by a rounding, which is no direction."""
    batch = replace(scores(), watched={"held": torch.full((B,), level)})
    plain = Credit(keep=0.5)([batch], P)
    held = Credit(keep=0.5, project_out=("held",))([batch], P)
    expected = torch.zeros(B).index_copy(0, plain.chosen, plain.values[plain.chosen])
    assert torch.equal(held.values, expected)
    # Nor does it beside one that has some.
    both = replace(batch, watched=batch.watched | {"other": scores().watched["held"]})
    alone = Credit(keep=0.5, project_out=("other",))([both], P)
    together = Credit(keep=0.5, project_out=("held", "other"))([both], P)
    torch.testing.assert_close(together.values, alone.values)


# --- dropped samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("assign", ["trajectory", "gain"])
def test_dropped_samples_stay_at_zero_and_outside_the_projection(assign, keep):
    kept = torch.ones(B, dtype=torch.bool)
    kept[[1, 9, 10, 23]] = False
    number = 4 if assign == "gain" else 1
    batches = [scores(seed, kept=kept) for seed in range(number)]
    credit = Credit(assign=assign, keep=keep, project_out=("held",))
    advantages = credit(batches, P)
    assert (advantages.values[~kept] == 0).all()
    rows = torch.arange(B) if advantages.chosen is None else advantages.chosen
    rows = rows[kept[rows]]
    held = batches[-1].watched["held"]
    assert (drift(advantages.values, held, rows) < 1e-5).all()
    # What a dropped sample scored with the watched reward moves the group's mean, no more: it is
    # not one of the equations.
    by_hand = replace(credit, project_out=())(batches, P).values.double().reshape(B, -1)
    x = centred(held)[rows, None]
    left = by_hand[rows] - x @ (x.T @ by_hand[rows]) / x.square().sum()
    torch.testing.assert_close(advantages.values.reshape(B, -1)[rows].double(), left)


def test_samples_dropped_at_any_boundary_are_dropped():
    gone = torch.ones(B, dtype=torch.bool)
    gone[5] = False
    batches = [scores(0, kept=gone), scores(1), scores(2), scores(3)]
    values = Credit(assign="gain")(batches, P).values
    assert (values[5] == 0).all() and (values[6] != 0).all()


# --- one decision ------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", ["trajectory", "gain"])
@pytest.mark.parametrize(("keep", "updates"), [(0.5, 1), (0.3, 2), (0.01, 3)])
def test_samples_are_chosen_once_by_the_advantages_before_the_projection(
    keep, updates, assign, monkeypatch
):
    calls = []

    def noted(advantages, number):
        calls.append((advantages, number))
        return largest_advantages(advantages, number)

    monkeypatch.setattr(chunkgrpo.credit, "largest_advantages", noted)
    batches = [scores(seed) for seed in range(4 if assign == "gain" else 1)]
    plain = Credit(assign=assign, keep=keep)(batches, P, updates)
    held = Credit(assign=assign, keep=keep, project_out=("held",))(batches, P, updates)
    assert len(calls) == 2 and torch.equal(calls[0][0], calls[1][0])
    assert torch.equal(plain.chosen, held.chosen)
    assert calls[0][1] == len(held.chosen) == num_chosen(B, keep, updates) >= updates
    expected = largest_advantages(plain.values, len(plain.chosen))
    assert torch.equal(plain.chosen, expected)
    # The others keep their advantage; they are not trained on, because they are not chosen.
    assert (plain.values != 0).all()


def test_all_samples_are_trained_on_where_nothing_is_left_out():
    assert Credit()([scores()], P).chosen is None
    assert Credit(project_out=("held",))([scores()], P).chosen is None


def test_gains_are_credited_to_their_chunks():
    batches = [scores(seed) for seed in range(4)]
    totals = torch.stack([batch.total for batch in batches], 1)
    found = Credit(assign="gain", clip=2.0, convention="global_std")(batches, P)
    expected = chunk_advantages(totals.diff(dim=1), P, "global_std", 2.0)
    assert torch.equal(found.values, expected) and found.values.shape == (B, 3)
    # Groups are judged by the finished images.
    final = combined_advantages(
        batches[-1].stacked, torch.ones(1), P, "sum", "global_std", total_B=batches[-1].total
    )
    assert torch.equal(found.spread, final.spread)
    assert found.num_zero_spread == final.num_zero_spread


@pytest.mark.parametrize("assign", ["trajectory", "gain"])
def test_totals_are_those_of_the_scorer(assign):
    """Poisoned totals come through: nothing is combined a second time."""
    batches = [scores(seed) for seed in range(4 if assign == "gain" else 1)]
    poisoned = [replace(b, total=torch.randn(B, generator=seeded(90 + i)))
                for i, b in enumerate(batches)]  # fmt: skip
    plain, found = Credit(assign=assign)(batches, P), Credit(assign=assign)(poisoned, P)
    assert not torch.allclose(plain.values, found.values, atol=0.1)
    clean = [replace(b, raw={"reward": b.total}) for b in poisoned]
    assert torch.equal(found.values, Credit(assign=assign)(clean, P).values)
    assert torch.equal(found.spread, Credit(assign=assign)(clean, P).spread)


# --- chosen samples are what is trained --------------------------------------------------------

METHODS = {
    "chunks": chunk_grpo(PLAN, FLOW, UniformSelection(0.67), updates=1, micro_batch=5),
    "chunks near the reference": chunk_grpo(
        step_plan(7), FLOW, UniformSelection(0.5), updates=1, micro_batch=5, kl=TransitionKl(0.5)
    ),
    "nft": diffusion_nft(updates=1, micro_batch=5, advantage_clip=1.0, kl=0.2),
    "awm": awm(updates=1, micro_batch=5, times=StratifiedTimes(3), kl=0.2),
    "awm, a ratio a sample": awm(
        updates=1, micro_batch=5, times=StratifiedTimes(3), mode="sum_first"
    ),
}


def chosen_experience(policy, chosen=None):
    advantages = combined_advantages(scores().stacked, torch.ones(1), P).values
    return Experience(sampled(policy), advantages, chosen)


def trained(algorithm, chosen, poison=False, move=None):
    policy = toy()
    shift(0.1)(policy)
    experience = chosen_experience(policy, chosen)
    if poison:
        others = torch.ones(B, dtype=torch.bool).index_fill(0, chosen, False)
        experience = replace(
            experience, advantages=experience.advantages.masked_fill(others, float("nan"))
        )
    return collect(algorithm, policy, experience, move)


methods = pytest.mark.parametrize("algorithm", METHODS.values(), ids=METHODS.keys())
CHOSEN = torch.tensor([0, 3, 4, 9, 11, 16, 17, 22, 23])


@methods
def test_losses_of_the_chosen_and_of_the_others_make_up_the_loss_of_all(algorithm):
    """S L(chosen) + (B - S) L(others) = B L(all): denominators count only what is trained.

    It holds only where chunks, times and noise of a sample do not depend on who else is chosen.
    """
    others = torch.tensor([b for b in range(B) if b not in CHOSEN.tolist()])
    ((value, gradient, _),) = trained(algorithm, None)
    total, sums = 0.0, 0.0
    for rows in (CHOSEN, others):
        ((part, of_part, parts),) = trained(algorithm, rows)
        assert torch.equal(samples_of(parts), rows)
        total, sums = total + len(rows) * part, sums + len(rows) * of_part
    close(sums / B, gradient, 1e-5)
    assert (total / B).item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


@methods
def test_samples_that_are_not_chosen_are_not_even_read(algorithm):
    """Advantages of others may be anything; 2 updates deal the chosen ones out."""
    algorithm = replace(algorithm, loss=replace(algorithm.loss, updates=2))
    plain = trained(algorithm, CHOSEN, move=shift(0.02))
    poisoned = trained(algorithm, CHOSEN, poison=True, move=shift(0.02))
    for (value, gradient, parts), (other, other_gradient, _) in zip(plain, poisoned, strict=True):
        assert value == other and torch.equal(gradient, other_gradient)
        assert gradient.isfinite().all() and gradient.norm() > 0
        assert len(samples_of(parts)) in (4, 5)
    dealt = torch.cat([samples_of(parts) for _, _, parts in plain])
    assert torch.equal(dealt.sort().values, CHOSEN)


@methods
def test_what_a_sample_draws_does_not_depend_on_who_is_chosen(algorithm):
    def drawn(rows):
        ((_, _, parts),) = trained(algorithm, rows)
        pairs = {}
        for part in parts:
            for b, i in zip(
                part.diagnostics["sample"].tolist(), part.diagnostics["step"].tolist(), strict=True
            ):
                pairs.setdefault(b, set()).add(i)
        return pairs

    every, some = drawn(None), drawn(CHOSEN)
    assert some == {b: every[b] for b in CHOSEN.tolist()}


@methods
def test_fewer_chosen_samples_than_updates_are_refused(algorithm):
    algorithm = replace(algorithm, loss=replace(algorithm.loss, updates=3))
    with pytest.raises(ValueError, match="3 updates need as many samples, and 2 samples are tr"):
        trained(algorithm, CHOSEN[:2])


# --- what holding costs -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("correlation", [0.3, 0.9, 0.99])
def test_a_held_score_that_is_correlated_leaves_the_residual_of_a_regression(correlation, keep):
    """Not collinear with the reward: of its advantages the share 1 - r^2 is left, direction known.

    By hand: the advantages of the samples trained on, less their regression on the held score.
    """
    generator = seeded(5)
    reward, noise = torch.randn(2, B, generator=generator)
    held = correlation * reward + (1 - correlation**2) ** 0.5 * noise
    batch = RewardBatch({"reward": reward}, reward, torch.ones(1), watched={"held": held})
    plain, left = (Credit(keep=keep, project_out=names)([batch], P) for names in ((), ("held",)))
    rows = torch.arange(B) if left.chosen is None else left.chosen
    a, x = plain.values.double()[rows], centred(held)[rows]
    expected = a - x * (x @ a) / (x @ x)
    torch.testing.assert_close(left.values.double()[rows], expected, rtol=1e-5, atol=1e-6)
    assert abs(float(x @ left.values.double()[rows])) < 1e-5
    # Something is left, and it still says which image is better.
    r = float(x @ a / (x.norm() * a.norm()))
    assert 0.1 < abs(r) < 1
    assert float(expected.norm() / a.norm()) == pytest.approx((1 - r**2) ** 0.5, rel=1e-5)
    assert float(expected @ a) > 0


def test_the_clip_holds_after_the_projection_too():
    """Both at once: no advantage above the clip, and no drift of the held score."""
    reward = torch.zeros(B)
    reward[0], reward[8:16] = 1.0, torch.linspace(0, 1, 8)
    held = reward + 0.3 * torch.randn(B, generator=seeded(2))
    held[0] = -1.0
    batch = RewardBatch({"reward": reward}, reward, torch.ones(1), watched={"held": held})
    loose = Credit(clip=50.0, project_out=("held",))([batch], P)
    clip = 0.9 * float(loose.values.abs().max())
    plain = Credit(clip=clip)([batch], P)
    tight = Credit(clip=clip, project_out=("held",))([batch], P)
    assert plain.values.abs().max() == pytest.approx(clip)
    assert tight.values.abs().max() <= clip
    assert drift(tight.values, held, torch.arange(B)).max() < 1e-5


def test_a_group_that_lost_too_many_images_is_left_out_of_what_is_held():
    """Two scores explain any advantages of three images; those of the other groups are held."""
    kept = torch.ones(B, dtype=torch.bool)
    kept[:5] = False  # group 0 has three images left, two degrees of freedom
    batch = scores(kept=kept, names=("a", "b"))
    held = Credit(project_out=("a", "b"))([batch], P)
    assert held.values[:8].tolist() == [0.0] * 8
    assert (held.values[8:] != 0).all()
    for name in ("a", "b"):
        assert drift(held.values, batch.watched[name], torch.arange(8, B)).max() < 1e-5
    assert int(held.num_zero_spread) == 1
    assert int(Credit()([batch], P).num_zero_spread) == 0
    one = Credit(project_out=("a",))([batch], P)
    assert (one.values[5:8] != 0).all() and int(one.num_zero_spread) == 0


@pytest.mark.parametrize("left", [3, 8])
def test_nothing_left_to_learn_is_refused(left):
    kept = torch.zeros(B, dtype=torch.bool)
    kept.view(P, -1)[:, :left] = True
    names = tuple("abcdefg"[: left - 1])
    batch = scores(kept=None if left == 8 else kept, names=names)
    with pytest.raises(RewardError, match=rf"no group has more than {left} images with a score"):
        Credit(project_out=names)([batch], P)
    assert Credit(project_out=names[1:])([batch], P).values.abs().max() > 0.01


def test_a_score_is_held_once():
    with pytest.raises(ValueError, match="project_out names 'a' twice"):
        Credit(project_out=("a", "b", "a"))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("size", [1e-20, 1e20, 3e36])
def test_rewards_of_any_size_that_float32_holds_are_told_apart(size, dropped):
    kept = torch.arange(B) % 8 > 0 if dropped else None
    found = Credit()([scores(scale=size, kept=kept)], P).values
    unit = Credit(convention="group_std")([scores(scale=1e3, kept=kept)], P).values
    torch.testing.assert_close(found, unit if size > 1 else torch.zeros(B), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rewards_whose_sum_overflows_are_refused(convention):
    """Their mean would be infinite, and every advantage the lowest there is, in silence."""
    reward = torch.tensor([3e38, 3.1e38]).repeat(B // 2)
    batch = RewardBatch({"reward": reward}, reward, torch.ones(1))
    with pytest.raises(ValueError, match=r"as large as 3\.1e\+38, and the sum of 24 overflows"):
        Credit(convention=convention)([batch], P)


def test_advantages_that_cancel_at_infinity_are_refused():
    reward = torch.randn(B, generator=seeded(0))
    weights = torch.tensor([3e38, -3e38])
    batch = RewardBatch({"a": reward, "b": reward + 0.1}, reward, weights, "advantage")
    with pytest.raises(NonFiniteError, match="reward: an advantage is not finite; lower the weig"):
        Credit()([batch], P)
