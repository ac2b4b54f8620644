# SPDX-License-Identifier: Apache-2.0
"""Profiles of closed-form policies, the statistics behind them, and the settings they lead to."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from chunkgrpo.config import Config, ConfigError, load_config, parse_config
from chunkgrpo.config.derived import num_planned
from chunkgrpo.config.rules import check
from chunkgrpo.core.learned import LearnedSelection
from chunkgrpo.core.measured_plans import adaptive_plan, explained_variation, optimal_plan
from chunkgrpo.core.plan_rules import ExplicitPlan
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import DanceDiffusion, FlowDiffusion, OdeDiffusion, Transition
from chunkgrpo.core.selection import UniformSelection, WeightedSelection
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.profile import (
    RULES,
    Measurement,
    Window,
    carried_indices,
    crossed_interval,
    measure_speed,
    plot_lines,
    print_profile,
    profile_policy,
    propose,
    save_profile,
    variance_shares,
)
from chunkgrpo.types import Conditioning, as_prompts

SIGMAS = make_sigmas(9, 3.0)
PROMPTS = ["a", "bb", "cccc"]
FLOW = Transition(FlowDiffusion(0.7))
ODE = Transition(OdeDiffusion())
SAMPLERS = {"flow": FLOW, "dance": Transition(DanceDiffusion(0.3)), "ODE": ODE}


class SizedPolicy(GaussianPolicy):
    """Data whose spread, and so its dynamics, depends on the prompt's length."""

    def encode(self, prompts):
        lengths = [[len(p.text) / 10] for p in as_prompts(prompts)]
        return Conditioning({"rows": torch.tensor(lengths)})

    def velocity(self, x, sigma, conditioning):
        spread = conditioning.tensors["rows"].double().view(-1, *[1] * (x.ndim - 1))
        s = sigma.double().view(-1, *[1] * (x.ndim - 1))
        slope = (s - (1 - s) * spread**2) / ((1 - s) ** 2 * spread**2 + s**2)
        return slope * x.double()


def ode_speed(spread: float) -> np.ndarray:
    """Of zero-mean Gaussian data under Euler's method, exactly: |slope| times the step."""
    s, s_next = SIGMAS[:-2].double().numpy(), SIGMAS[1:-1].double().numpy()
    slope = (s - (1 - s) * spread**2) / ((1 - s) ** 2 * spread**2 + s**2)
    return np.abs(slope) * (s - s_next)


# --- measuring ----------------------------------------------------------------------------------


def test_speed_of_the_ode_is_the_closed_form() -> None:
    policy = SizedPolicy(torch.zeros(6))
    speed = measure_speed(policy, ODE, Measurement(PROMPTS, SIGMAS, 2))
    assert speed.shape == (3, 2, 8)
    for prompt, rows in zip(PROMPTS, speed):
        for row in rows:
            assert row == pytest.approx(ode_speed(len(prompt) / 10), rel=1e-5)


def test_seeds_are_the_same_noise_for_every_prompt() -> None:
    policy = GaussianPolicy(torch.zeros(6))
    speed = measure_speed(policy, FLOW, Measurement(PROMPTS, SIGMAS, 3, seed=5))
    assert np.array_equal(speed[0], speed[1]) and np.array_equal(speed[0], speed[2])
    assert not np.allclose(speed[0, 0], speed[0, 1])
    again = measure_speed(policy, FLOW, Measurement(PROMPTS[:1], SIGMAS, 2, seed=5))
    assert np.array_equal(again[0], speed[0, :2])


# --- shares and intervals -----------------------------------------------------------------------


def design(rng, num_prompts, num_seeds, num_steps, step=0.0, prompt=0.0, seed=0.0, rest=0.0):
    """Values of the crossed model with the given standard deviations."""
    return (
        step * rng.standard_normal(num_steps)
        + prompt * rng.standard_normal((num_prompts, 1, num_steps))
        + seed * rng.standard_normal((1, num_seeds, num_steps))
        + rest * rng.standard_normal((num_prompts, num_seeds, num_steps))
    )


def test_shares_recover_known_variances() -> None:
    values = design(np.random.default_rng(0), 60, 50, 400, 2.0, 1.0, 0.5, 0.7)
    shares = variance_shares(np.exp(values))
    total = 4 + 1 + 0.25 + 0.49
    assert shares.step == pytest.approx(4 / total, rel=0.15)
    assert shares.prompt == pytest.approx(1 / total, rel=0.15)
    assert shares.seed == pytest.approx(0.25 / total, rel=0.15)
    assert shares.residual == pytest.approx(0.49 / total, rel=0.15)
    assert shares.prompt_std == pytest.approx(1, rel=0.05)
    assert shares.step + shares.prompt + shares.seed + shares.residual == pytest.approx(1)


def test_noise_alone_is_not_taken_for_prompts() -> None:
    """A quotient of sums of squares would give the prompt 3/11 of pure noise here."""
    values = design(np.random.default_rng(1), 4, 3, 2000, step=1.0, rest=1.0)
    assert variance_shares(np.exp(values)).prompt < 0.02


def test_shares_by_hand() -> None:
    # Logs: prompt 0 has 1 at step 0, prompt 1 has 3; both 0 at step 1; seeds change nothing.
    logs = np.array([[[1.0, 0.0]] * 2, [[3.0, 0.0]] * 2])
    shares = variance_shares(np.exp(logs))
    # Between prompts: (2 + 0) / 2 = 1, between steps: var(2, 0) = 1.
    assert shares.prompt_std == pytest.approx(1.0)
    expected = [0.5, 0.5, 0.0, 0.0]
    found = [shares.step, shares.prompt, shares.seed, shares.residual]
    assert found == pytest.approx(expected, abs=1e-12)
    assert "the prompt 50.00 %" in shares.sentence
    assert variance_shares(np.ones((2, 2, 3))).step == 1.0


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    for prompt, seed, rest in ((1.0, 0.0, 0.3), (0.0, 1.0, 0.3), (0.5, 0.5, 0.5), (0.0, 0.0, 1.0)):
        values = design(np.random.default_rng(2), 8, 4, 4000, prompt=prompt, seed=seed, rest=rest)
        mean, low, high = crossed_interval(values)
        assert mean == pytest.approx(values.mean((0, 1)))
        covered = float(((low <= 0) & (high >= 0)).mean())
        assert 0.93 < covered < 0.99, (prompt, seed, rest)
    mean, low, high = crossed_interval(np.full((2, 2, 3), 0.25))
    assert low.tolist() == mean.tolist() == high.tolist() == [0.25] * 3


def test_too_few_values_are_refused() -> None:
    for shape in ((1, 4, 3), (4, 1, 3), (4, 3)):
        with pytest.raises(ValueError, match="at least 2 prompts and 2 seeds"):
            variance_shares(np.ones(shape))
        with pytest.raises(ValueError, match="at least 2 prompts and 2 seeds"):
            crossed_interval(np.ones(shape))
    with pytest.raises(ValueError, match="speeds above 0"):
        variance_shares(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="1 prompts and 2 seeds"):
        profile_policy(GaussianPolicy(torch.zeros(2)), SAMPLERS, Measurement(["a"], SIGMAS, 2))


# --- proposals ----------------------------------------------------------------------------------


def test_every_rule_proposes_what_core_says() -> None:
    curve = np.array([0.75, 0.77, 0.53, 0.45, 0.40, 0.37, 0.36, 0.34,
                      0.34, 0.33, 0.32, 0.32, 0.30, 0.28, 0.25, 0.22])  # fmt: skip
    found = {p.rule: p for p in propose(curve, 7)}
    assert tuple(found) == RULES
    tensor = torch.tensor(curve)
    assert found["optimal"].plan == optimal_plan(tensor)
    assert found["optimal-4"].plan == optimal_plan(tensor, 4)
    assert found["adaptive-forward"].plan == adaptive_plan(tensor, 7, "forward")
    assert found["adaptive-backward"].plan.sizes[0] == 2
    assert found["equal"].plan.sizes == (4, 4, 4, 4)
    assert found["paper"].plan.sizes == (2, 3, 4, 7)
    assert all(p.reason.endswith(".") and "%" in p.reason for p in found.values())
    assert [p.rule for p in propose(curve[:3])] == list(RULES[:-1])


def test_listed_chunks_are_carried_over_by_their_steps() -> None:
    old = ChunkPlan((1, 2, 2, 4))
    assert carried_indices(old, (0, 1, 2), ChunkPlan((5, 4))) == (0,)
    assert carried_indices(old, (0, 1, 2), ChunkPlan((2, 2, 2, 3))) == (0, 1, 2)
    assert carried_indices(old, (0, 1, 2), ChunkPlan((2, 2, 3, 2))) == (0, 1)
    assert carried_indices(old, (0,), ChunkPlan((3, 6))) == (0,)
    assert carried_indices(old, (3,), ChunkPlan((9,))) == (0,)


# --- the whole ----------------------------------------------------------------------------------


def test_a_policy_that_ignores_the_prompt_is_found_invariant_and_another_is_not() -> None:
    measurement = Measurement(PROMPTS, SIGMAS, 3)
    blind = profile_policy(GaussianPolicy(torch.zeros(64)), SAMPLERS, measurement)
    seen: list[tuple[int, int]] = []
    sized = profile_policy(
        SizedPolicy(torch.zeros(64)), SAMPLERS, measurement,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(i, 9) for i in range(1, 10)]
    assert [p.name for p in blind] == ["flow", "dance", "ODE"]
    for profile in blind:
        assert profile.shares.prompt < 1e-12 and profile.shares.step > 0.5
        assert (profile.low <= profile.mean).all() and (profile.mean <= profile.high).all()
    # Without noise the seed does not matter, and the prompt's part is the closed form's.
    logs = np.log([ode_speed(len(p) / 10) for p in PROMPTS])
    between = logs.var(axis=0, ddof=1).mean()
    assert sized[2].shares.prompt_std == pytest.approx(between**0.5, rel=1e-4)
    assert sized[2].shares.prompt == pytest.approx(
        between / (between + logs.mean(0).var()), rel=1e-4
    )
    assert sized[2].mean == pytest.approx(np.mean([ode_speed(len(p) / 10) for p in PROMPTS], 0))
    # The sampler's noise hides what the prompt does.
    assert 0 < sized[0].shares.prompt_std < sized[2].shares.prompt_std


def test_a_moving_window_is_cut_by_the_geometric_mean_over_its_places() -> None:
    """Sizes count from its start; the worst place is named."""
    curves = np.array([[1.0, 1.0, 4.0, 4.0], [9.0, 9.0, 9.0, 1.0]])
    shares = [0.75, 0.25]
    found = {p.rule: p for p in propose(curves, 2, shares)}
    mean = np.exp(0.75 * np.log(curves[0]) + 0.25 * np.log(curves[1]))
    expected = {p.rule: p.plan for p in propose(mean, 2)}
    assert {rule: p.plan for rule, p in found.items()} == expected
    # [2, 2] leaves the second curve 9, 1 in its last chunk: 2 (log 3)^2 of 3 (log 3)^2 unexplained.
    assert found["equal"].plan.sizes == (1, 1, 1, 1)
    assert found["optimal"].plan.num_chunks == 3
    pair = {p.rule: p for p in propose(np.tile(curves[:, :2], 1), 2, shares)}
    assert pair["equal"].reason.endswith("100 % at the worst one.")
    two = [p.reason for p in propose(np.vstack([mean, curves[1]]), 2, (1.0, 0.0))]
    for reason, rule in zip(two, RULES):
        plan = expected[rule]
        share = explained_variation(torch.tensor(curves[1]), plan)
        mine = explained_variation(torch.tensor(mean), plan)
        worst = f"{100 * min(share, mine):.0f} % at the worst one."
        assert reason.endswith(f"in the mean over the places, {worst}"), rule


def test_a_window_is_measured_with_noise_inside_it_alone() -> None:
    policy = GaussianPolicy(torch.zeros(64))
    window = Window(3, {1: 0.5, 4: 0.5})
    seen: list[tuple[int, int]] = []
    measurement = Measurement(PROMPTS, SIGMAS, 2, seed=3)
    first, *others = profile_policy(
        policy, SAMPLERS, measurement, window=window,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    # Three samplers and two places, three prompts each.
    assert seen == [(i, 15) for i in range(1, 16)]
    for start, curve in first.inside.items():
        steps = range(start, start + 3)
        alone = measure_speed(policy, FLOW, measurement, window=steps).mean((0, 1))
        assert curve == pytest.approx(alone)
        assert not np.allclose(curve, first.mean[start : start + 3], rtol=1e-3)
    for other in others:
        assert other.offset == 1
        for start, curve in other.inside.items():
            assert curve.tolist() == other.mean[start : start + 3].tolist()
    assert all(p.plan.num_steps == 3 for p in first.proposals)
    assert str(window) == "3 steps that begin at one of 2 places, step 1 to step 4"
    assert str(Window(5, {2: 1.0})) == "steps 2 to 6"


def test_files_and_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    profiles = profile_policy(
        GaussianPolicy(torch.zeros(16)), SAMPLERS, Measurement(PROMPTS, SIGMAS, 2)
    )
    file = save_profile(
        tmp_path / "out", profiles, SIGMAS.tolist(), "equal", {"kind": "uniform"}, "a title"
    )
    assert yaml.safe_load(file.read_text()) == {
        "objective": {
            "plan": {"kind": "explicit", "sizes": [2, 2, 2, 2]},
            "selection": {"kind": "uniform"},
        }
    }
    assert file.read_text().startswith("# a title\n# flow: the step explains")
    assert (file.parent / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"'paper' here; there are: optimal"):
        save_profile(tmp_path / "none", profiles, SIGMAS.tolist(), "paper")
    text = io.StringIO()
    print_profile(Console(file=text, width=140), profiles, SIGMAS.tolist(), "equal")
    printed = text.getvalue()
    assert f"{profiles[0].mean[0]:.3f} ±" in printed and "equal *" in printed
    assert "2,2,2,2" in printed and "● flow, ▲ dance, ■ ODE" in printed


def test_the_plot_puts_every_value_in_its_row() -> None:
    lines = plot_lines([[1.0, 0.5, 0.0]], ChunkPlan((1, 2)), height=3)
    assert lines == [
        " 1.000 ┤  ● │",
        " 0.500 ┤    │ ●",
        " 0.000 ┤    │     ●",
        "       └────────────",
        "         0   1   2",
    ]
    lines = plot_lines([[1.0, 1.0, 1.0, 1.0]], ChunkPlan((1, 1)), height=2, offset=1)
    assert lines[1] == " 0.000 ┤    │   │   │"


# --- settings -----------------------------------------------------------------------------------


def settings(steps: int = 17, **objective) -> Config:
    """A run with a plan and a selection."""
    return parse_config({"sampling": {"steps": steps}, "objective": objective})


def plan_of(config: Config, curve=None) -> ChunkPlan:
    """Cut a run's steps, with the curve that would be measured."""
    return config.objective.plan.cut(num_planned(config), lambda distance: curve)


LEARNED = {"kind": "learned"}


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"plan": {"kind": "paper", "refresh": 5}}, "refresh belongs to .* adaptive, optimal, and"),
        (
            {"plan": {"kind": "optimal", "refresh": 5}, "selection": LEARNED},
            "objective.plan.refresh = 5 would change what they are; set it to 0",
        ),
        (
            {"selection": {"kind": "uniform", "correction": True}},
            "selection.correction belongs to .*selection.kind learned, weighted, and",
        ),
        (
            {"selection": {"kind": "listed", "indices": [0], "correction": True}},
            "selection.correction belongs to .*selection.kind learned, weighted, and",
        ),
        ({"selection": {"kind": "listed"}}, "objective.selection.indices .* field required"),
        (
            {"selection": {"kind": "listed", "indices": [0, 4]}},
            "has chunks 0 to 3; list only these",
        ),
        ({"selection": {"kind": "listed", "indices": [-1]}}, "must be from 0 to 10,000"),
        (
            {
                "plan": {"kind": "adaptive", "refresh": 2},
                "selection": {"kind": "listed", "indices": [0]},
            },
            "does not change",
        ),
        ({"plan": {"kind": "optimal", "num_chunks": 5}}, "at most 4 chunks of that size"),
        ({"plan": {"kind": "optimal", "min_size": 17}}, "at most 0 chunks"),
    ],
)
def test_wrong_combinations_are_refused(objective: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(settings(**objective))


@pytest.mark.parametrize(
    "objective",
    [
        {
            "plan": {"kind": "adaptive", "refresh": 5},
            "selection": {"kind": "weighted", "correction": True},
        },
        {
            "plan": {"kind": "optimal", "num_chunks": 4, "refresh": 5},
            "selection": {"kind": "listed", "indices": [3]},
        },
        {"plan": {"kind": "adaptive"}, "selection": {"kind": "listed", "indices": [6]}},
        {"selection": {"kind": "learned", "correction": True, "usefulness": "reward"}},
    ],
)
def test_right_combinations_are_not(objective: dict) -> None:
    check(settings(**objective))


def test_number_of_chunks_before_anything_is_measured() -> None:
    def num_chunks(**plan):
        config = settings(plan=plan)
        return config.objective.plan.num_chunks_of(num_planned(config))

    for kind, count in {"steps": 16, "whole": 1, "paper": 4, "equal": 4, "adaptive": None}.items():
        assert num_chunks(kind=kind) == count
    assert num_chunks(kind="explicit", sizes=[10, 6]) == 2
    assert num_chunks(kind="equal", size=5) == 4


def test_plans_and_selections_follow_their_settings() -> None:
    curve = torch.tensor([1.0, 2.0, 4.0, 3.0, 2.5, 2.4])
    for difference, sizes in {"forward": (2, 4), "backward": (3, 3)}.items():
        config = settings(7, plan={"kind": "adaptive", "difference": difference})
        assert plan_of(config, curve).sizes == sizes
    config = settings(7, plan={"kind": "optimal", "min_size": 1, "explained": 0.0})
    assert plan_of(config, curve).sizes == (6,)
    softmax = {"kind": "weighted", "softmax": True, "fraction": 0.25, "correction": True}
    weighted = settings(selection=softmax).objective.selection
    assert weighted == WeightedSelection(0.25, softmax=True, correction=True)
    for usefulness, power in (("gradient", 0.5), ("reward", 1.0)):
        learned = {"kind": "learned", "floor": 0.3, "decay": 0.8, "usefulness": usefulness}
        made = settings(selection=learned).objective.selection.make()
        assert made == LearnedSelection(0.5, 0.3, 0.8, power, usefulness=usefulness)


def test_a_chunks_file_changes_plan_and_selection(tmp_path: Path) -> None:
    """Key by key, but where the kind changes."""
    file = tmp_path / "chunks.yaml"
    file.write_text("objective: {plan: {sizes: [4, 5]}, selection: {fraction: 0.25}}\n")
    objective = load_config("chunk-grpo", [], file).objective
    assert (objective.plan, objective.selection) == (ExplicitPlan((4, 5)), UniformSelection(0.25))
    file.write_text("objective: {plan: {sizes: [4, 5]}}\n")
    given = ["objective.selection={kind: listed, indices: [1]}"]
    objective = load_config("chunk-grpo", given, file).objective
    assert (objective.plan.sizes, objective.selection.indices) == ((4, 5), (1,))
    same = load_config("chunk-grpo", [], file).objective
    assert same.selection == load_config("chunk-grpo").objective.selection
    for text, says in (
        ("objective: [1]", "must hold one section"),
        ("sizes: [4, 5]", "must hold one section"),
        ("objective: {}\nname: x", "nothing else"),
        ("objective: {clip: 1}", "a plan and a selection and nothing else"),
        ("objective: {plan: {sizes: [1, 3]}}", "sum to 4"),
        ("objective: {plan: {kind: equal, size: x}}", "objective.plan.size"),
        ("objective: {plan: {siezs: [9]}}", "did you mean 'objective.plan.sizes'"),
        ("[", "no YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            load_config("demo", [], file)
