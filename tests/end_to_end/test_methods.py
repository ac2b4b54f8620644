# SPDX-License-Identifier: Apache-2.0
"""Every method is a valid recipe, says what it needs, and costs what it says."""

import math
import re

import pytest
import torch

from chunkgrpo.config import (
    ConfigError,
    branches,
    build_chunk_grpo,
    build_forward,
    build_sigmas,
    build_transition,
    build_windows,
    given_sizes,
    load_config,
    merge_sizes,
    moving_window,
    window_places,
)
from chunkgrpo.core import ChunkPlan, group_advantages, step_plan
from chunkgrpo.methods import iteration_cost, read_method, read_methods
from chunkgrpo.recipes import method_names, recipe_path
from chunkgrpo.rollout import rollout
from chunkgrpo.runtime.old_policy import DECAY_SCHEDULES
from chunkgrpo.types import Experience
from oracles import close, collect, seeded, shift, toy


def test_every_method_is_complete():
    methods = read_methods()
    assert len(methods) >= 15
    for method in methods:
        assert method.config.name == method.name
        assert all((method.summary, method.paper, method.needs, method.published))
        assert method.summary.endswith(".")
        assert len(recipe_path(method.name).read_text().splitlines()) <= 14, "a few lines"


def test_costs_are_counted_by_hand():
    # 16 prompts x 12 images, 10 steps, the first shared by a group.
    cost = read_method("sequence-level").cost
    assert cost.rollout == 16 * 1 + 192 * 9
    # Each of the two updates trains some image of every prompt: 16 rows for the common first step.
    assert (cost.pairs, cost.trained) == (192 * 9, 192 * 8 + 2 * 16)
    assert cost.measured == cost.trained // 2
    assert cost.rewards == 192
    # Two of four chunks of mean size 9/4; 48 of 192 images train the first step in an update, and
    # a prompt is among them unless all draws fall on the other 180.
    cost, absent = (
        read_method("chunk-grpo").cost,
        math.prod((180 - i) / (192 - i) for i in range(48)),
    )
    assert cost.pairs == 192 * 9 // 2
    assert cost.trained == round(192 * 9 / 2 - 96 + 2 * 16 * (1 - absent))
    # Flow-GRPO: no shared noise, all steps, a reference pass each.
    cost = read_method("flow-grpo").cost
    assert (cost.rollout, cost.trained) == (192 * 10, 192 * 9)
    assert cost.measured == 192 * 9 // 2 + 192 * 9
    # Branching at one of nine steps: in the mean five steps are shared, and one is trained.
    cost = read_method("tempflow-grpo").cost
    assert (cost.rollout, cost.pairs, cost.trained) == (16 * 5 + 192 * 5, 192, 2 * 16)
    assert read_method("stepwise-gain").cost.rewards == 192 * 10
    # Cut into four chunks by a measurement, two of which are trained; or into an unknown number.
    assert read_method("chunk-grpo-optimal").cost.pairs == 192 * 9 // 2
    assert read_method("chunk-grpo-adaptive").cost.pairs == 192 * 9 // 2
    # Nine steps of the merged grid, branching at the third to the sixth: 4.5 + 1 shared ones.
    cost = read_method("e-grpo").cost
    assert (cost.rollout, cost.pairs) == (16 * 4.5 + 192 * 4.5, 192)
    # Neighbouring chunks, two rows a pair, in the second update.
    plain = iteration_cost(load_config("chunk-grpo"))
    pulled = iteration_cost(load_config("chunk-grpo", ["objective.consistency=1"]))
    assert pulled.trained - plain.trained == 2 * 3 * 192 // 2


def test_what_is_not_kept_is_rolled_out_and_not_trained():
    settings = ["objective.kl=0.01", "sampling.same_noise=false"]
    every = iteration_cost(load_config("chunk-grpo", settings))
    half = iteration_cost(load_config("chunk-grpo", [*settings, "objective.keep=0.5"]))
    assert (half.rollout, half.rewards) == (every.rollout, every.rewards)
    assert [half.measured, half.trained, half.pairs] == [
        every.measured / 2, every.trained / 2, every.pairs / 2
    ]  # fmt: skip


def test_costs_follow_where_a_window_is():
    """Steps before it are one row a prompt; a window that decays stays longer where it begins."""
    settings = ["sampling.window.every=4", "sampling.window.stride=5"]
    even = iteration_cost(load_config("mixgrpo", settings))  # starts 0 and 5, 4 iterations each
    assert even.rollout == 16 * 3.5 + 192 * (10 - 3.5)
    settings.append("sampling.window.decay=linear")  # 4 and ceil(4 * 4 / 9) = 2 iterations
    decayed = iteration_cost(load_config("mixgrpo", settings))
    start = 5 * 2 / 6
    assert decayed.rollout == round(16 * (start + 1) + 192 * (9 - start))


def test_branches_are_the_merged_steps():
    """Whatever the threshold: the grid's steps that were taken together, the last one aside."""
    for settings, sizes, merged in (
        ([], (1, 1, 2, 2, 3, 4, 1, 1, 1), (2, 3, 4, 5)),
        (["sampling.merge_entropy=0.2"], (1,) * 7 + (2,) * 3 + (1,) * 3, (7, 8, 9)),
        (
            ["sampling.merge_entropy=null", "sampling.merge=[1, 3, 2, 4, 6]"],
            (1, 3, 2, 4, 6),
            (1, 2, 3),
        ),
    ):
        config = load_config("e-grpo", settings)
        assert merge_sizes(config) == sizes and branches(config) == merged
        windows = build_windows(config, step_plan(len(sizes) - 1))
        drawn = {windows(i, seeded(i)) for i in range(40)}
        assert drawn == {range(i, i + 1) for i in merged}
    listed = load_config("e-grpo", ["sampling.window.indices=[0, 1]"])
    assert branches(listed) == (0, 1)


def test_the_exponential_decay_is_what_is_set():
    """ceil(6 exp(-0.5 relu(l - 1))) iterations at each start of a window of 4 in 9 steps."""
    names = ("decay=exponential", "rate=0.5", "after=1", "every=6")
    config = load_config("mixgrpo", [f"sampling.window.{each}" for each in names])
    window = moving_window(config)
    stays = [6, 6, 4, 3, 2, 1]
    assert [window.stays(start) for start in range(6)] == stays
    assert window_places(config) == pytest.approx({i: n / 22 for i, n in enumerate(stays)})


def test_the_averaged_policy_of_awm_is_wired():
    """The recipe's published pull, and its schedule, reach the algorithm."""
    algorithm = build_forward(load_config("awm"), toy())
    assert (algorithm.ema_coefficient, algorithm.kl_coefficient) == (1.0, 1e-3)
    assert algorithm.old is not None and algorithm.old.schedule == "awm"
    assert [DECAY_SCHEDULES["awm"](step) for step in (0, 100, 1000)] == [0.0, 0.1, 0.3]
    half = build_forward(load_config("awm", ["objective.forward.ema_weight=0.5"]), toy())
    assert half.ema_coefficient == 0.5
    settings = ["objective.forward.ema_weight=0", "objective.forward.old=none"]
    off = build_forward(load_config("awm", settings), toy())
    assert off.ema_coefficient == 0 and off.old is None


def test_published_values_of_recipes():
    """Those that differ from the library's defaults, or did."""
    assert load_config("paper").optimizer.max_grad_norm == 0.01
    kappa = load_config("chunk-grpo-kappa").objective
    assert (kappa.inner_weights, kappa.outer_weights) == ("equal_kappa", "chunk_size")
    assert load_config("chunk-grpo-adaptive").chunks.plan == "adaptive"
    assert load_config("chunk-grpo-optimal").chunks.plan == "optimal"


def test_step_level_reweighted_has_the_demos_gradient_at_ratio_one():
    """Two recipes, one gradient before the policy moves, its KL to the base included."""
    found = {}
    for name in ("demo", "step-level", "step-level-reweighted"):
        config = load_config(name, ["objective.updates=1"])
        policy, transition = toy(), build_transition(config)
        sigmas, window = build_sigmas(config, policy), range(3, 6)
        shift(0.1)(policy)  # away from the base, so that the KL pulls
        trajectory = rollout(policy, "abc", transition, sigmas, 8, seeded(1), window=window)
        rewards = torch.randn(24, generator=seeded(2))
        experience = Experience(trajectory, group_advantages(rewards, 3).values)
        plan = ChunkPlan(given_sizes(config))
        algorithm = build_chunk_grpo(config, plan, transition)
        ((_, found[name], _),) = collect(algorithm, policy, experience)
    close(found["step-level-reweighted"], found["demo"], 1e-6)
    assert (found["step-level"] - found["demo"]).norm() > 0.05 * found["demo"].norm()


def test_costs_of_forward_objectives():
    cost = read_method("diffusion-nft").cost  # 5 of 10 times; old policy and reference
    assert (cost.rollout, cost.trained, cost.measured) == (1920, 960, 2 * 960)
    cost = read_method("awm").cost
    # Ratios of the second update; the reference and the averaged policy for every pair.
    assert (cost.rollout, cost.trained, cost.measured) == (1920, 192 * 6, 192 * (3 + 6 + 6))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("demo", "sampling.diffusion=ode", "'ode' has no density.*'flow' or 'dance'"),
        ("e-grpo", "sampling.merge=[4, 4, 4, 4]", "set one of the two to null"),
        ("e-grpo", "sampling.merge_entropy=null sampling.merge=[4,4]", "sums to 8, but .* is 16"),
        ("flow-cps", "sampling.eta=1.5", r"mixes noise with eta in \[0, 1\]"),
        ("chunk-grpo", "sampling.eta=0", r"eta = 0: it must be above 0.*diffusion 'ode'"),
        ("demo", "objective.updates=193", "192 images of a rollout"),
        ("awm", "objective.forward.times=10", "only 9 times besides pure noise"),
        ("demo", "objective.updates=1 objective.consistency=1", "consistency compares with"),
        ("demo", "objective.updates=1 objective.old_kl=1", "or objective.old_kl to 0"),
        ("sequence-level", "objective.consistency=1", "one chunk here"),
        ("tempflow-grpo", "objective.consistency=1", "one chunk here"),
        ("awm", "chunks.plan=steps", "has no use for chunks"),
        ("awm", "sampling.window.kind=random", "has no use for sampling.window"),
        ("diffusion-nft", "objective.credit=gain", "has no use for objective.credit"),
        ("awm", "objective.keep=0.5", "has no use for objective.keep"),
        ("demo", "objective.keep=0", "greater than 0"),
        ("diffusion-nft", "objective.ratio=guard", "no use for objective.ratio = 'guard'"),
        ("awm", "objective.consistency=1", r"no use for objective.consistency = 1\.0; remove it"),
        ("awm", "objective.old_kl=1", r"no use for objective.old_kl = 1\.0; remove it, or use"),
        ("awm", "objective.kl_form=rate", "no use for objective.kl_form = 'rate'"),
        ("diffusion-nft", "objective.anchor=replay", "no use for objective.anchor = 'replay'"),
        ("diffusion-nft", "objective.kl_threshold=1e-3", "objective.kl_threshold = 0.001; remove"),
        ("awm", "objective.forward.ema_weight=0", "old = 'awm' is .* that weight is 0; raise it"),
        ("diffusion-nft", "objective.forward.times=9", "forward.times = 9 belongs to .*'awm', and"),
        ("diffusion-nft", "objective.forward.ema_weight=1", "ema_weight = 1.0 belongs to .*'awm'"),
        ("diffusion-nft", "objective.forward.log_prob=t", "log_prob = 't' belongs to .*'awm'"),
        ("awm", "objective.forward.beta=2", "beta = 2.0 belongs to .*'diffusion_nft', and 'awm'"),
        ("awm", "objective.forward.fraction=1", "fraction = 1.0 belongs to .*'diffusion_nft'"),
        (
            "awm",
            "objective.forward.log_prob=huber objective.forward.power=0.5",
            "power = 0.5 belongs to .*'ghuber', not 'huber'",
        ),
        ("demo", "objective.kl_threshold=1e-3", "belongs to objective.trust 'kl_mask', which is"),
        ("demo", "objective.trust_options={a: 1}", r"\{'a': 1\} belongs to an objective.trust of"),
        ("demo", "objective.implicit_sizes=[1, 2]", "belongs to objective.outer_weights 'implic"),
        (
            "chunk-grpo-learned",
            "objective.kl=0.01",
            "objective.kl = 0.01 that of the pull.*set objective.kl to 0, or use 'reward'",
        ),
        # Weights that come from a cut of the steps.
        (
            "step-level",
            "objective.outer_weights=implicit",
            r"implicit_sizes = \[\] must be .* the 3 ",
        ),
        ("step-level-reweighted", "objective.implicit_sizes=[1, 3]", "3 in all, and they sum to 4"),
        ("step-level-reweighted", "objective.implicit_sizes=[0, 3]", "each at least 1"),
        (
            "step-level-reweighted",
            "chunks.plan=whole",
            "weights that chunks have anyhow, and chunks.plan is 'whole'; use plan 'steps', or set",
        ),
        ("step-level-reweighted", "chunks.plan=adaptive", "chunks.plan is 'adaptive'; use"),
        (
            "tempflow-grpo",
            "objective.outer_weights=chunk_size",
            "'chunk_size' weighs chunks against one another, and .* trains one an iteration",
        ),
        # Exponential decay: the published 13 lies beyond the last of the embedded model's starts.
        (
            "mixgrpo",
            "sampling.window.decay=exponential",
            "starts after step 13, and a window of 4 in 9 .* starts at 5 .*; set after below 5",
        ),
        ("mixgrpo", "sampling.window.rate=0.2", "rate = 0.2 belongs to decay 'exponential', and"),
        ("mixgrpo", "sampling.window.after=2", "after = 2 belongs to .*decay is 'constant'; set"),
        # Branches.
        (
            "e-grpo",
            "sampling.merge_entropy=-5",
            "needs a second one for an entropy of .*; raise it",
        ),
        (
            "e-grpo",
            "sampling.merge_entropy=null",
            "sampling.merge = None takes none of the trained",
        ),
        (
            "e-grpo",
            "sampling.merge_entropy=null sampling.merge=[1,1,1,1,1,1,1,1,1,1,1,1,1,3]",
            "takes none of the trained steps together",
        ),
        ("e-grpo", "chunks.plan=whole", "'merged' are sampler steps, and chunks.plan 'whole'"),
        (
            "chunk-grpo-branching",
            "sampling.window.indices=[0] chunks.plan=adaptive chunks.refresh=2",
            "whose number chunks.refresh = 2 may change",
        ),
        ("demo", "objective.forward.beta=2", "belongs to objective.algorithm"),
        ("mixgrpo", "chunks.plan=optimal", "steps that stay.*'sliding' moves"),
        ("demo", "sampling.window.start=7", "steps from step 7 does not lie in the 9 trained"),
        ("flow-grpo-fast", "sampling.window.high=10", r"high must be in \[2, 9\]"),
        ("e-grpo", "sampling.window.indices=[8]", "has chunks 0 to 7; branch at these only"),
        ("chunk-grpo-branching", "sampling.same_noise=false", "must start from one noise"),
        ("chunk-grpo-branching", "chunks.selection=learned", "draws one chunk"),
        ("chunk-grpo-branching", "chunks.selection=listed", "window.indices lists chunks"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused(name, setting, message, tmp_path):
    settings = re.split(r" (?=\w+\.)", setting)
    with pytest.raises(ConfigError, match=message):
        load_config(name, settings)


def test_a_window_that_stays_is_cut_from_its_own_dynamics(tiny_pipeline_path, tmp_path):
    """A measured plan covers the window, by its speed with noise in it alone."""
    from chunkgrpo.config import build_trainer
    from chunkgrpo.core.measured_plans import optimal_plan
    from chunkgrpo.rollout import measured_speed
    from chunkgrpo.train import plan_of

    settings = [
        f"model.path={tiny_pipeline_path}", "model.precision=fp32", "chunks.plan=optimal",
        "chunks.num_chunks=2", "chunks.min_size=1", "rewards=[{name: brightness}]",
        "evaluation.reward={name: brightness}",
    ]  # fmt: skip
    config = load_config("demo", settings)
    trainer = build_trainer(config, tmp_path)
    texts = trainer.prompts.texts[:64]
    curve = measured_speed(
        trainer.policy, texts, trainer.transition, trainer.sigmas, range(64), window=range(3, 6)
    ).mean(0)
    plan = plan_of(trainer.algorithm)
    assert plan == optimal_plan(curve, 2, 1) and plan.num_steps == 3


def test_replay_and_more_updates_cost_more():
    apart = "sampling.same_noise=false"
    config = load_config("chunk-grpo", ["objective.anchor=replay", "objective.updates=4", apart])
    plain = iteration_cost(load_config("chunk-grpo", [apart]))
    assert plain.trained == plain.pairs
    cost = iteration_cost(config)
    assert cost.measured == round(plain.trained * (3 / 4 + 1))


@pytest.mark.parametrize("name", method_names())
def test_dumped_method_is_itself(name, tmp_path):
    import yaml

    from chunkgrpo.config import dump_config, parse_config

    config = load_config(name)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_extends_puts_settings_over_the_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nsampling: {eta: 0.5}\n")
    config, base = load_config(file), load_config("demo")
    assert config.sampling.eta == 0.5
    assert config.sampling.steps == base.sampling.steps
    assert config.chunks == base.chunks


def test_unknown_base_is_an_error(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demon\n")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_config(file)
