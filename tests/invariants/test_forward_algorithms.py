# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT and AWM against their formulas, pair by pair, on one graph and by autograd.

The transcriptions know nothing of micro-batches. They take from a run only which (sample, time)
pairs it trained and the noised latents the policy was shown, from which the noise follows.
"""

from dataclasses import dataclass, replace
from itertools import chain

import pytest
import torch

import oracles
from chunkgrpo.algorithms.awm import AWM, AWMLoss
from chunkgrpo.algorithms.nft import DiffusionNFT, NFTLoss
from chunkgrpo.core import (
    ChunkTimes,
    FlowDiffusion,
    GeneralHuberLogProb,
    HuberLogProb,
    LinearLogProb,
    OdeDiffusion,
    QuadraticLogProb,
    ShuffledTimes,
    StratifiedTimes,
    Transition,
    UniformLogProb,
    group_advantages,
    make_sigmas,
)
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.types import Experience, SamplingRequest
from compose import awm, diffusion_nft, rollout
from oracles import close, seeded

SIGMAS = make_sigmas(8)
# No step of it has a density, and none is needed.
ODE = Transition(OdeDiffusion())
DIM = 12
THREE = StratifiedTimes(3)
NUM_SAMPLES = 12


class Recorder(GaussianPolicy):
    """The toy, remembering what it was asked with gradient, and how often without."""

    def __init__(self, seed=5):
        super().__init__(torch.randn(DIM, generator=seeded(seed), dtype=torch.float64), 0.5)
        self.seen, self.quiet = [], 0

    def velocity(self, x, sigma, conditioning):
        if torch.is_grad_enabled():
            self.seen += list(zip(x.detach().clone(), sigma, strict=True))
        else:
            self.quiet += len(x)
        assert len(conditioning) == len(x)
        return super().velocity(x, sigma, conditioning)


def make_experience(policy, prompts=("a", "b", "c"), group_size=4, sigmas=SIGMAS):
    return oracles.make_experience(policy, prompts, group_size, ODE, sigmas)


def shift(policy, amount, seed=50):
    oracles.shift(amount, seed)(policy)


@dataclass
class Update:
    """One optimizer step: what was yielded, what was asked, and the weights it started from."""

    value: torch.Tensor
    grad: torch.Tensor
    parts: list
    seen: list
    weights: list

    def column(self, name):
        return torch.cat([part.diagnostics[name] for part in self.parts])

    @property
    def pairs(self):
        return list(zip(self.column("sample").tolist(), self.column("step").tolist(), strict=True))


def collect(algorithm, policy, experience, amount=0.0, seed=3):
    """Sum each update's values and gradients; move the policy after each one."""
    updates, parts, value = [], [], 0.0
    for parameter in policy.parameters():
        parameter.grad = None
    if isinstance(policy, Recorder):
        policy.seen, policy.quiet = [], 0
    for part in algorithm.losses(policy, experience, seeded(seed)):
        part.backward()
        value = value + part.loss.detach().double()
        parts.append(part)
        if part.ends_update:
            grad = torch.cat([p.grad.detach().double().flatten() for p in policy.parameters()])
            weights = [p.detach().clone() for p in policy.parameters()]
            seen = getattr(policy, "seen", [])
            updates.append(Update(value, grad, parts, list(seen), weights))
            seen.clear()
            parts, value = [], 0.0
            for parameter in policy.parameters():
                parameter.grad = None
            shift(policy, amount, 50 + len(updates))
    return updates


# --- the formulas, transcribed ------------------------------------------------------------------


def velocity(mean, x, sigma, std=0.5):
    """The toy's velocity of one latent, as its docstring has it."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / variance
    return slope * (x - (1 - sigma) * mean) - mean


def nft_loss(update, experience, old, base, beta, clip, coefficient):
    """Value and gradient of one update's DiffusionNFT loss."""
    mean, total = update.weights[0].clone().requires_grad_(), 0
    for (b, i), (x_t, sigma) in zip(update.pairs, update.seen, strict=True):
        assert sigma == experience.trajectory.sigmas[i]
        x0, x_t, t = experience.trajectory.final[b].double(), x_t.double(), sigma.double()
        r = min(max(experience.advantages[b].item() / (2 * clip) + 0.5, 0.0), 1.0)
        v, v_old, v_ref = (velocity(m, x_t, t) for m in (mean, old, base))
        pair = 0
        for share, u in (
            (r, beta * v + (1 - beta) * v_old),
            (1 - r, (1 + beta) * v_old - beta * v),
        ):
            off = x_t - t * u - x0
            weight = max(off.detach().abs().mean().item(), 1e-5)
            pair = pair + share * (off**2 / weight).mean()
        total = total + clip * pair / beta + coefficient * ((v - v_ref) ** 2).mean()
    total = total / len(update.pairs)
    return total.detach(), torch.autograd.grad(total, mean)[0]


KINDS = {
    "uniform": UniformLogProb(),
    "t": LinearLogProb(),
    "t2": QuadraticLogProb(),
    "huber": HuberLogProb(),
    "ghuber": GeneralHuberLogProb(),
}

LOG_PROBS = {
    "uniform": lambda e, t, p: -e,
    "t": lambda e, t, p: -t * e,
    "t2": lambda e, t, p: -(t**2) * e,
    "huber": lambda e, t, p: -t * ((e + 1e-10) ** 0.5 - 1e-5),
    "ghuber": lambda e, t, p: -t / p * ((e + 1e-10) ** p - 1e-10**p),
}


def awm_loss(update, experience, anchor, base, averaged, loss):
    """Value, gradient and ratios of one update's AWM loss."""
    power = getattr(loss.log_prob, "power", None)
    mean, penalties = update.weights[0].clone().requires_grad_(), 0
    log_ratios = {}
    for (b, i), (x_t, sigma) in zip(update.pairs, update.seen, strict=True):
        assert sigma == experience.trajectory.sigmas[i]
        x0, x_t, t = experience.trajectory.final[b].double(), x_t.double(), sigma.double()
        target = (x_t - (1 - t) * x0) / t - x0
        v, v_old, v_ref, v_ema = (velocity(m, x_t, t) for m in (mean, anchor, base, averaged))
        log_prob, old = (
            LOG_PROBS[loss.log_prob.kind](((u - target) ** 2).mean(), t, power) for u in (v, v_old)
        )
        log_ratios.setdefault(b, []).append(log_prob - old)
        penalties = penalties + loss.kl * ((v - v_ref) ** 2).mean()
        penalties = penalties + loss.ema_weight * ((v - v_ema) ** 2).mean()
    ratios, advantages = [], []
    for b, values in log_ratios.items():
        advantage = min(max(experience.advantages[b].item(), -loss.advantage_clip),
                        loss.advantage_clip)  # fmt: skip
        advantage *= loss.advantage_max / loss.advantage_clip
        assert len(values) == loss.times.number
        if loss.mode == "sum_first":
            values = [sum(values) / len(values)]
        ratios += [value.exp() for value in values]
        advantages += [advantage] * len(values)
    surrogate = 0
    for ratio, advantage in zip(ratios, advantages, strict=True):
        clipped = ratio.clip(1 - loss.clip_low, 1 + loss.clip_high)
        surrogate = surrogate - torch.min(ratio * advantage, clipped * advantage)
    total = surrogate / len(ratios) + penalties / len(update.pairs)
    (grad,) = torch.autograd.grad(total, mean)
    return total.detach(), grad, torch.stack(ratios).detach(), torch.tensor(advantages)


def matches(update, expected, expected_grad):
    """Latents are float32, and the noise was worked out from them."""
    assert update.value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    close(update.grad, expected_grad, 1e-5)


# --- DiffusionNFT -------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("with_old", [True, False], ids=["old", "no-old"])
def test_nft_pieces_sum_to_the_direct_loss_and_gradient(beta, coefficient, with_old):
    policy = Recorder()
    base = policy.mean.detach().clone()
    shift(policy, 0.1, 70)
    experience = make_experience(policy)
    assert (experience.advantages > 0).any() and (experience.advantages < 0).any()
    old = OldPolicy(policy.named_parameters(), "nft1") if with_old else None
    sampled = policy.mean.detach().clone()
    # A small clip, so that some samples are wholly good or bad and others between.
    algorithm = diffusion_nft(
        old,
        beta=beta,
        advantage_clip=1.0,
        times=ShuffledTimes(0.99),
        updates=3,
        micro_batch=5,
        kl=coefficient,
    )
    updates = collect(algorithm, policy, experience, 0.05)
    assert len(updates) == 3
    for n, update in enumerate(updates):
        assert (update.column("old_gap") == 0).all() == (n == 0)
        assert [part.ends_update for part in update.parts] == [False] * 5 + [True]
        value, grad = nft_loss(update, experience, sampled, base, beta, 1.0, coefficient)
        matches(update, value, grad)


def test_nft_is_anchored_at_the_old_policy_it_is_given():
    policy = Recorder()
    old = OldPolicy(policy.named_parameters())
    shift(policy, 0.1)
    experience = make_experience(policy)
    algorithm = diffusion_nft(old, beta=0.5, advantage_clip=2.0, kl=0.0)
    (update,) = collect(algorithm, policy, experience)
    assert (update.column("old_gap") > 0).all()
    expected = nft_loss(update, experience, old.values[0], old.values[0], 0.5, 2.0, 0)
    matches(update, *expected)
    other = nft_loss(update, experience, policy.mean.detach(), old.values[0], 0.5, 2.0, 0)
    assert (other[1] - expected[1]).norm() > 0.01 * expected[1].norm()


def test_nft_trains_each_samples_times_once():
    policy = Recorder()
    updates = collect(diffusion_nft(updates=2, micro_batch=7), policy, make_experience(policy))
    pairs = [pair for update in updates for pair in update.pairs]
    # 0.99 of 8 steps is 7 of them.
    assert len(set(pairs)) == len(pairs) == NUM_SAMPLES * 7
    samples = [{b for b, _ in update.pairs} for update in updates]
    assert [len(s) for s in samples] == [6, 6] and not samples[0] & samples[1]
    assert {i for _, i in pairs} == set(range(8))


# --- AWM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_prob", list(LOG_PROBS))
@pytest.mark.parametrize("mode", ["exp_first", "sum_first"])
@pytest.mark.parametrize("clip", [1.0, 2e-3], ids=["wide", "clipped"])
def test_awm_pieces_sum_to_the_direct_loss_and_gradient(mode, clip, log_prob):
    policy = Recorder()
    base = policy.mean.detach().clone()
    experience = make_experience(policy, group_size=12)
    algorithm = awm(
        log_prob=KINDS[log_prob], mode=mode, times=THREE, clip_low=clip, clip_high=clip,
        advantage_clip=1.0, updates=2, micro_batch=5,
    )  # fmt: skip
    first, second = collect(algorithm, policy, experience, 0.05)
    for update in (first, second):
        value, grad, ratio, advantage = awm_loss(
            update, experience, base, base, base, algorithm.loss
        )
        matches(update, value, grad)
    # The policy has moved by now, and ratios leave the range on the right side and on the wrong
    # one, where the gradient stays; or they are seen not to.
    cut = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
    reported = second.column("cut")
    if clip == 1.0:
        assert not cut.any() and not reported.any() and (ratio - 1).abs().max() > 0.01
    else:
        for sign in (advantage > 0, advantage < 0):
            assert (sign & (ratio > 1 + clip)).any() and (sign & (ratio < 1 - clip)).any()
        times = algorithm.loss.times.number if mode == "sum_first" else 1
        assert reported.sum() == cut.sum() * times
    assert (first.column("log_ratio") == 0).all() and not first.column("cut").any()
    assert (second.column("log_ratio") != 0).all()


@pytest.mark.parametrize("mode", ["exp_first", "sum_first"])
def test_awm_penalties_join_the_direct_loss(mode):
    policy = Recorder()
    base = policy.mean.detach().clone()
    shift(policy, 0.1, 70)
    old = OldPolicy(policy.named_parameters(), "awm")
    shift(policy, 0.1, 80)
    anchor = policy.mean.detach().clone()
    experience = make_experience(policy)
    algorithm = awm(
        old, mode=mode, times=StratifiedTimes(4), updates=2, micro_batch=7, kl=0.3, ema_weight=0.7,
        advantage_max=2.0,
    )  # fmt: skip
    for update in collect(algorithm, policy, experience, 0.05):
        value, grad, _, _ = awm_loss(
            update, experience, anchor, base, old.values[0], algorithm.loss
        )
        matches(update, value, grad)
        for name in ("reference_gap", "ema_gap"):
            assert (update.column(name) > 0).all()


def test_awm_averages_the_powers_it_is_told():
    policy = Recorder()
    base, experience = policy.mean.detach().clone(), make_experience(policy)
    for power in (0.5, 1.0):
        algorithm = awm(log_prob=GeneralHuberLogProb(power), times=StratifiedTimes(2))
        (update,) = collect(algorithm, policy, experience)
        value, grad, _, _ = awm_loss(update, experience, base, base, base, algorithm.loss)
        matches(update, value, grad)
    (linear,) = collect(awm(log_prob=LinearLogProb(), times=StratifiedTimes(2)), policy, experience)
    close(update.grad, linear.grad, 1e-6)


def test_awm_on_policy_weighs_the_gradient_of_matching_by_the_advantage():
    policy = Recorder()
    experience = make_experience(policy)
    (update,) = collect(awm(log_prob=UniformLogProb(), times=THREE), policy, experience)
    mean, total = policy.mean.detach().clone().requires_grad_(), 0
    for (b, _), (x_t, sigma) in zip(update.pairs, update.seen, strict=True):
        x0, x_t, t = experience.trajectory.final[b].double(), x_t.double(), sigma.double()
        error = (velocity(mean, x_t, t) - ((x_t - (1 - t) * x0) / t - x0)).square().mean()
        total = total + experience.advantages[b].double() / 5 * error
    (grad,) = torch.autograd.grad(total / len(update.pairs), mean)
    close(update.grad, grad, 1e-5)


def test_awm_trains_stratified_times():
    policy = Recorder()
    updates = collect(awm(times=THREE, updates=2), policy, make_experience(policy))
    times = {}
    for update in updates:
        for b, i in update.pairs:
            times.setdefault(b, []).append(i)
    assert sorted(times) == list(range(NUM_SAMPLES))
    # Seven candidates in strata of 2, 2 and 3; never the first.
    for row in times.values():
        low, middle, high = sorted(row)
        assert low in (1, 2) and middle in (3, 4) and high in (5, 6, 7)


# --- both ---------------------------------------------------------------------------------------

BOTH = {
    "nft": diffusion_nft(beta=0.5, updates=2, kl=0.2),
    "awm": awm(times=THREE, updates=2, kl=0.2, clip_low=0.01, clip_high=0.01),
    "awm-sum": awm(
        times=THREE, updates=2, kl=0.2, clip_low=0.01, clip_high=0.01, mode="sum_first",
    ),
}  # fmt: skip


def changed(algorithm, anchor=None, **loss):
    """The algorithm with other numbers in its loss, and with a second policy if one is given."""
    loss = replace(algorithm.loss, **loss)
    return AWM(loss, anchor) if isinstance(loss, AWMLoss) else DiffusionNFT(loss, anchor)


both = pytest.mark.parametrize("algorithm", BOTH.values(), ids=BOTH.keys())


@both
def test_any_micro_batch_gives_the_same_noise_and_gradient(algorithm):
    found = []
    for micro_batch in (1, 4, 7, 1000):
        policy = Recorder()
        shift(policy, 0.1, 70)
        smaller = changed(algorithm, micro_batch=micro_batch)
        updates = collect(smaller, policy, make_experience(policy), 0.05)
        noised = {p: x for u in updates for p, (x, _) in zip(u.pairs, u.seen, strict=True)}
        found.append((updates, noised))
        for update in updates:
            sizes = {len(part.diagnostics["sample"]) for part in update.parts}
            assert max(sizes) <= micro_batch and max(sizes) - min(sizes) <= 1
    first, first_noised = found[0]
    for updates, noised in found[1:]:
        assert noised.keys() == first_noised.keys()
        assert all(torch.equal(noised[pair], first_noised[pair]) for pair in noised)
        for update, expected in zip(updates, first, strict=True):
            assert update.value.item() == pytest.approx(expected.value.item(), rel=1e-6, abs=1e-7)
            close(update.grad, expected.grad, 1e-6)


@both
def test_every_pair_has_noise_of_its_own(algorithm):
    policy = Recorder()
    experience = make_experience(policy)
    noises = []
    for update in collect(algorithm, policy, experience):
        for (b, _), (x_t, sigma) in zip(update.pairs, update.seen, strict=True):
            noises.append((x_t - (1 - sigma) * experience.trajectory.final[b]) / sigma)
    noise = torch.stack(noises)
    assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=5 / noise.numel() ** 0.5)
    alike = torch.corrcoef(noise).fill_diagonal_(0)
    assert alike.max() < 0.999


@both
def test_the_generator_decides_everything(algorithm):
    grads = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(grads))
        policy = Recorder()
        shift(policy, 0.1, 70)
        grads.append(collect(algorithm, policy, make_experience(policy), 0.05, seed)[1].grad)
    assert torch.equal(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


@both
def test_the_reference_is_asked_only_where_it_counts(algorithm):
    def silent(coefficient, moved):
        policy = Recorder()
        shift(policy, moved, 70)
        experience = make_experience(policy)
        # Advantage 0 everywhere: what is left pulls by the penalty alone.
        experience = replace(experience, advantages=torch.zeros(NUM_SAMPLES))
        alone = changed(algorithm, kl=coefficient, updates=1)
        (update,) = collect(alone, policy, experience)
        return update, policy

    update, policy = silent(0.0, 0.1)
    assert policy.quiet == 0 and update.grad.abs().max() < 1e-6
    assert "reference_gap" not in update.parts[0].diagnostics
    update, policy = silent(0.2, 0.0)
    assert policy.quiet == len(update.pairs)
    assert update.grad.abs().max() < 1e-6 and (update.column("reference_gap") == 0).all()
    once, _ = silent(0.2, 0.1)
    twice, policy = silent(0.4, 0.1)
    # It pulls back to where the policy came from.
    assert once.grad @ (policy.mean - policy._base) > 0
    close(twice.grad, 2 * once.grad, 1e-5)


@both
def test_nothing_is_asked_twice_while_the_policy_stands_still(algorithm):
    policy = Recorder()
    once = changed(algorithm, kl=0.0, updates=1)
    (update,) = collect(once, policy, make_experience(policy))
    assert policy.quiet == 0 and len(update.seen) == len(update.pairs)


@both
def test_the_policy_is_left_as_it_was(algorithm):
    policy = Recorder()
    old = OldPolicy(policy.named_parameters())
    algorithm = changed(algorithm, old)
    shift(policy, 0.1)
    before, parameter = policy.mean.detach().clone(), policy.mean
    collect(algorithm, policy, make_experience(policy))
    assert policy.mean is parameter and torch.equal(policy.mean, before)
    assert policy.mean.data_ptr() != old.values[0].data_ptr()


@both
@pytest.mark.parametrize("number", [1, 5])
def test_updates_deal_every_sample_once(algorithm, number):
    policy = Recorder()
    algorithm = changed(algorithm, updates=number)
    updates = collect(algorithm, policy, make_experience(policy), 0.01)
    dealt = [sorted({b for b, _ in update.pairs}) for update in updates]
    assert len(dealt) == number and sorted(chain(*dealt)) == list(range(NUM_SAMPLES))
    sizes = {len(share) for share in dealt}
    assert max(sizes) - min(sizes) <= 1


@both
@pytest.mark.parametrize("method", ["lora", "full"])
def test_micro_batches_agree_on_a_network(tiny_policy, algorithm, method):
    found = []
    for micro_batch in (3, 1000):
        policy = tiny_policy(Adaptation(method, rank=4))
        # A fresh LoRA answers with 0, and so half of its gradient is 0: move it first.
        shift(policy, 0.05)
        before = [p.detach().clone() for p in policy.parameters()]
        experience = make_experience(policy, ["a star", "two circles"], 2, make_sigmas(4))
        terms = {"ema_weight": 0.1} if isinstance(algorithm, AWM) else {}
        old = OldPolicy(policy.named_parameters())
        smaller = changed(algorithm, old, micro_batch=micro_batch, **terms)
        updates = collect(smaller, policy, experience)
        found.append(torch.cat([update.grad for update in updates]))
        assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
        assert all((update.column("reference_gap") > 0).all() for update in updates)
    close(found[1], found[0], 1e-3)


# --- credit by chunk of the times ----------------------------------------------------------------


CHUNKS = ChunkTimes(sizes=(2, 3), numbers=(1, 2), start=1)


@pytest.mark.parametrize("make", [diffusion_nft, awm], ids=["nft", "awm"])
def test_each_pair_has_the_advantage_of_its_chunk(make):
    """The loss of two chunks is that of one sample advantage each, on the pairs of the chunk."""
    policy = Recorder()
    experience = make_experience(policy)
    by_chunk = torch.randn(NUM_SAMPLES, 2, generator=seeded(9))
    algorithm = make(times=CHUNKS, micro_batch=1000)
    (whole,) = collect(algorithm, policy, replace(experience, advantages=by_chunk))
    steps, total = whole.column("step"), 0
    for chunk, members in enumerate(((1, 2), (3, 4, 5))):
        one = replace(experience, advantages=by_chunk[:, chunk])
        mask = torch.isin(steps, torch.tensor(members))
        assert mask.sum() == NUM_SAMPLES * CHUNKS.numbers[chunk]
        # The same draws, of which only this chunk's have a weight.
        numbers = tuple(n if c == chunk else 0 for c, n in enumerate(CHUNKS.numbers))
        other = make(times=CHUNKS, micro_batch=1)
        (update,) = collect(other, policy, one)
        losses = [part for part in update.parts if part.diagnostics["step"].item() in members]
        assert len(losses) == NUM_SAMPLES * sum(numbers)
        total = total + sum(part.loss.detach().double() for part in losses)
    close(whole.value, total, 1e-6)


def test_credit_by_chunk_asks_for_the_states_where_chunks_begin():
    found = DiffusionNFT(NFTLoss(times=CHUNKS), by_chunk=True).begin(0, seeded())
    assert found == SamplingRequest(window=range(1, 6), chunk_starts=(0, 2))
    # Without, no state of the ODE is stored, and any solver may take all steps.
    assert DiffusionNFT(NFTLoss(times=CHUNKS), by_ode=True).begin(0, seeded()).window == range(0)
    assert DiffusionNFT(NFTLoss(times=CHUNKS)).begin(0, seeded()).window is None


# --- noise that a group shares ------------------------------------------------------------------


@pytest.mark.parametrize("make", [diffusion_nft, awm], ids=["nft", "awm"])
def test_a_group_shares_times_and_noises(make):
    policy = Recorder()
    experience = make_experience(policy)
    algorithm = make(times=THREE, shared_noise=True, updates=2, micro_batch=5)
    drawn, owners = {}, []
    for update in collect(algorithm, policy, experience):
        owners.append({b // 4 for b, _ in update.pairs})
        for (b, i), (x, sigma) in zip(update.pairs, update.seen, strict=True):
            clean = experience.trajectory.final[b].double()
            drawn[b, i] = (x.double() - (1 - sigma) * clean) / sigma
    assert len(drawn) == NUM_SAMPLES * 3
    # Whole groups: one prompt in one update, two in the other.
    assert sorted(len(each) for each in owners) == [1, 2] and not owners[0] & owners[1]
    for prompt in range(3):
        steps = {i for b, i in drawn if b == 4 * prompt}
        for i in steps:
            first = drawn[4 * prompt, i]
            for b in range(4 * prompt, 4 * prompt + 4):
                close(drawn[b, i], first, 1e-4)
            others = [noise for (b, j), noise in drawn.items() if b // 4 != prompt or j != i]
            assert all((noise - first).abs().max() > 0.01 for noise in others)


@pytest.mark.parametrize("make", [diffusion_nft, awm], ids=["nft", "awm"])
def test_what_a_group_has_in_common_cancels(make):
    """Images that are all alike teach nothing, whatever their advantages, if these sum to 0."""
    policy = Recorder()
    experience = make_experience(policy)
    final = experience.trajectory.final.reshape(3, 4, -1)[:, :1].expand(-1, 4, -1).flatten(0, 1)
    centred = torch.randn(3, 4, generator=seeded(4))
    centred = (centred - centred.mean(1, keepdim=True)).flatten()
    alike = replace(
        experience, trajectory=replace(experience.trajectory, final=final), advantages=centred
    )
    sizes = {}
    for shared in (True, False):
        algorithm = make(times=THREE, shared_noise=shared, micro_batch=1000)
        (update,) = collect(algorithm, policy, alike)
        sizes[shared] = update.grad.norm()
    assert sizes[True] < 1e-5 * sizes[False]


def test_shared_noise_deals_prompts_that_are_trained():
    policy = Recorder()
    experience = replace(make_experience(policy), chosen=torch.tensor([0, 1, 9]))
    algorithm = diffusion_nft(shared_noise=True, updates=2)
    updates = collect(algorithm, policy, experience)
    assert sorted({b for b, _ in each.pairs} for each in updates if each.pairs) in (
        [{0, 1}, {9}], [{9}, {0, 1}],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"3 updates need as many prompts .* 2 prompts"):
        collect(diffusion_nft(shared_noise=True, updates=3), policy, experience)


# --- refusals -----------------------------------------------------------------------------------


def test_what_can_not_work_is_refused():
    policy = Recorder()
    experience = make_experience(policy)

    def start(algorithm, experience=experience):
        next(iter(algorithm.losses(policy, experience, seeded())))

    for algorithm, loss in ((diffusion_nft, NFTLoss), (awm, AWMLoss)):
        assert algorithm().begin(0, seeded()) == SamplingRequest()
        with pytest.raises(ValueError, match="13 updates need as many samples, and 12 samples are"):
            start(algorithm(updates=13, **({"times": THREE} if algorithm is awm else {})))
        chunked = replace(experience, advantages=torch.zeros(12, 3))
        with pytest.raises(ValueError, match=r"advantages have shape \(12, 3\)"):
            start(algorithm(), chunked)
        with pytest.raises(ValueError, match="must be at least 1, got 0 and 64"):
            loss(updates=0)
        with pytest.raises(ValueError, match="must be at least 1, got 1 and 0"):
            loss(micro_batch=0)
        with pytest.raises(ValueError, match=r"advantage_clip is 0; it must be positive"):
            loss(advantage_clip=0)
        with pytest.raises(ValueError, match=r"kl is -1; a penalty must not be neg"):
            loss(kl=-1)
    with pytest.raises(ValueError, match=r"beta is 0; it must be positive"):
        NFTLoss(beta=0)
    with pytest.raises(ValueError, match=r"trained share of the times"):
        ShuffledTimes(0)
    with pytest.raises(ValueError, match="unknown mode 'mean'; known: exp_first, sum_first"):
        AWMLoss(mode="mean")
    with pytest.raises(ValueError, match="power is 0; it must be positive"):
        GeneralHuberLogProb(0)
    with pytest.raises(ValueError, match="ema_weight is 1, but there is no averaged policy"):
        awm(ema_weight=1)
    with pytest.raises(ValueError, match="advantage_max is 0"):
        AWMLoss(advantage_max=0)
    with pytest.raises(ValueError, match="num_times is 8; a schedule of 8 steps offers 1 to 7"):
        start(awm(times=StratifiedTimes(8)))


# --- does it learn? -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nft", "awm", "awm-sum"])
def test_the_mean_moves_towards_what_is_rewarded(name):
    transition, target = Transition(FlowDiffusion(0.7)), torch.tensor([1.0, -1.0])
    policy = GaussianPolicy(torch.zeros(2), 0.5)
    parameters = policy.parameters()
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    if name == "nft":
        old = OldPolicy(policy.named_parameters(), "nft1")
        algorithm = diffusion_nft(old, advantage_clip=2.0, micro_batch=1000)
    else:
        old = OldPolicy(policy.named_parameters(), "awm")
        mode = "sum_first" if name == "awm-sum" else "exp_first"
        algorithm = awm(old, mode=mode, updates=2, ema_weight=0.1, micro_batch=1000)
    distances, step = [], 0
    for iteration in range(15):
        generator = seeded(100 + iteration)
        trajectory = rollout(policy, ["p"] * 2, transition, SIGMAS, 16, generator)
        rewards = -(trajectory.final - target).square().sum(1)
        experience = Experience(trajectory, group_advantages(rewards, 2).values)
        for part in algorithm.losses(policy, experience, generator):
            part.backward()
            if part.ends_update:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        algorithm.finish(policy, step)
        distances.append((policy.mean.detach() - target).norm().item())
    assert distances[4] < 1.41
    assert distances[-1] < min(1.0, distances[4])


def test_the_old_policy_samples_where_there_is_one():
    policy = Recorder()
    old = OldPolicy(policy.named_parameters())
    before = policy.mean.detach().clone()
    shift(policy, 0.5)
    moved = policy.mean.detach().clone()
    with diffusion_nft(old).sampling(policy):
        assert torch.equal(policy.mean.detach(), before)
    assert torch.equal(policy.mean.detach(), moved)
    with diffusion_nft(None).sampling(policy):
        assert torch.equal(policy.mean.detach(), moved)
