# SPDX-License-Identifier: Apache-2.0
"""Every method is a valid recipe, says what it needs, and costs what it says."""

import math
import re

import pytest
import torch

from chunkgrpo.config import ConfigError, load_config
from chunkgrpo.config.build import (
    build_algorithm,
    build_sampler,
    build_sigmas,
    build_trainer,
    build_window,
)
from chunkgrpo.config.derived import merge_sizes, merged_steps
from chunkgrpo.core import group_advantages, step_plan
from chunkgrpo.cost import iteration_cost, with_known_chunks
from chunkgrpo.methods import read_method, read_methods
from chunkgrpo.recipes import method_names, recipe_path
from chunkgrpo.runtime.old_policy import DECAY_SCHEDULES
from chunkgrpo.types import Experience
from compose import rollout
from oracles import close, collect, seeded, shift, toy


def algorithm_of(config, policy):
    """The algorithm of a recipe whose chunks are not measured."""
    sampler = build_sampler(config, build_sigmas(config, policy))
    return build_algorithm(config, policy, sampler, lambda distance: pytest.fail("measured"))


def test_every_method_is_complete():
    methods = read_methods()
    assert len(methods) >= 15
    for method in methods:
        assert method.config.name == method.name
        assert all((method.summary, method.paper, method.needs, method.published))
        assert method.summary.endswith(".")
        assert len(recipe_path(method.name).read_text().splitlines()) <= 14, "a few lines"


def near(value):
    """A mean over drawn chunks: 768 samples of a few steps each, which spread by one or two."""
    return pytest.approx(value, rel=0.03)


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
    assert cost.pairs == near(192 * 9 / 2)
    assert cost.trained == near(192 * 9 / 2 - 96 + 2 * 16 * (1 - absent))
    # Of the second update's chunks, those of several steps: half of the eight steps.
    assert cost.measured == near(96 * 8 / 2)
    # Flow-GRPO: no shared noise, all steps, a reference pass each; steps need no pass for ratios.
    cost = read_method("flow-grpo").cost
    assert (cost.rollout, cost.trained) == (192 * 10, 192 * 9)
    assert cost.measured == 192 * 9
    # Branching at one of nine steps: in the mean five steps are shared, and one is trained.
    cost = read_method("tempflow-grpo").cost
    assert (cost.rollout, cost.pairs, cost.trained) == pytest.approx(
        (16 * 5 + 192 * 5, 192, 2 * 16)
    )
    assert read_method("stepwise-gain").cost.rewards == 192 * 10
    # Cut into four chunks by a measurement, two of which are trained; or into an unknown number.
    assert read_method("chunk-grpo-optimal").cost.pairs == near(192 * 9 / 2)
    assert read_method("chunk-grpo-adaptive").cost.pairs == near(192 * 9 / 2)
    # Nine steps of the merged grid, branching at the third to the sixth: 4.5 + 1 shared ones.
    cost = read_method("e-grpo").cost
    assert (cost.rollout, cost.pairs) == (16 * 4.5 + 192 * 4.5, 192)
    # Neighbouring chunks, two rows a pair, in the second update.
    plain = iteration_cost(load_config("chunk-grpo"))
    pulled = iteration_cost(load_config("chunk-grpo", ["objective.consistency=1"]))
    assert pulled.trained - plain.trained == 2 * 3 * 192 // 2


def small_run(name, pipeline, folder):
    """A method's own run on a tiny model, of weights that all but stay where they are."""
    settings = {
        "model.path": pipeline, "model.precision": "fp32", "model.max_sequence_length": 4,
        "sampling.prompts": 2, "sampling.group_size": 4, "optimizer.learning_rate": 1e-30,
        "evaluation.every": 0, "rewards": "[{name: brightness}]",
        "evaluation.reward": "{name: brightness}",
    }  # fmt: skip
    config = load_config(name, [f"{key}={value}" for key, value in settings.items()])
    config = with_known_chunks(config)
    return config, build_trainer(config, folder)


@pytest.mark.parametrize("name", method_names())
def test_a_method_costs_what_its_run_does(name, tiny_pipeline_path, tmp_path, monkeypatch):
    """The rows that a trainer asks of its model, and its metrics, draw by draw."""
    config, trainer = small_run(name, tiny_pipeline_path, tmp_path)
    rows, velocity, decode = {True: 0, False: 0, "decoded": 0}, trainer.policy.velocity, []

    def counted(x, sigma, conditioning):
        rows[torch.is_grad_enabled()] += len(x)
        return velocity(x, sigma, conditioning)

    monkeypatch.setattr(trainer.policy, "velocity", counted)
    decoded = trainer.policy.decode
    monkeypatch.setattr(trainer.policy, "decode", lambda x: decode.append(len(x)) or decoded(x))
    # One draw each, of one source: the same window, the same chunks of the same samples.
    monkeypatch.setattr("chunkgrpo.cost.DRAWS", 1)
    monkeypatch.setattr("chunkgrpo.cost._places", lambda algorithm: [(algorithm, 1.0)])
    monkeypatch.setattr("chunkgrpo.train.loop.derive_seed", lambda *_: 0)
    cost, record = iteration_cost(config), trainer.train_once()
    assert record["rollout_evaluations"] == cost.rollout
    assert sum(decode) == cost.rewards
    assert record["idle_pairs"] == 0
    found = rows[True], rows[False], record["trained_pairs"]
    counted = cost.trained, cost.rollout + cost.measured, cost.pairs
    if config.objective.kind == "chunk_grpo" and config.objective.selection.kind == "weighted":
        # Which chunks are drawn depends on how fast the model's own states move.
        assert found == pytest.approx(counted, rel=0.25)
    else:
        assert found == counted


def test_what_is_not_kept_is_rolled_out_and_not_trained():
    kl = "objective.kl={kind: transition, weight: 0.01}"
    for name, settings, exact in (
        ("chunk-grpo", [kl, "sampling.same_noise=false"], False),
        ("flow-grpo", [], True),
        ("awm", [], True),
    ):
        every = iteration_cost(load_config(name, settings))
        half = iteration_cost(load_config(name, [*settings, "credit.keep=0.5"]))
        assert (half.rollout, half.rewards) == (every.rollout, every.rewards)
        expected = [each / 2 for each in (every.measured, every.trained, every.pairs)]
        found = [half.measured, half.trained, half.pairs]
        assert found == (expected if exact else pytest.approx(expected, rel=0.03))


def test_costs_follow_where_a_window_is():
    """Steps before it are one row a prompt; a window that decays stays longer where it begins."""
    settings = ["objective.window.every=4", "objective.window.stride=5"]
    even = iteration_cost(load_config("mixgrpo", settings))  # starts 0 and 5, 4 iterations each
    assert even.rollout == 16 * 3.5 + 192 * (10 - 3.5)
    settings.append("objective.window.decay=linear")  # 4 and ceil(4 * 4 / 9) = 2 iterations
    decayed = iteration_cost(load_config("mixgrpo", settings))
    start = 5 * 2 / 6
    assert decayed.rollout == pytest.approx(16 * (start + 1) + 192 * (9 - start))


def test_branches_are_the_merged_steps():
    """Whatever the threshold: the grid's steps that were taken together, the last one aside."""
    for settings, sizes, merged in (
        ([], (1, 1, 2, 2, 3, 4, 1, 1, 1), (2, 3, 4, 5)),
        (["sampling.merge.least=0.2"], (1,) * 7 + (2,) * 3 + (1,) * 3, (7, 8, 9)),
        (
            ["sampling.merge={kind: sizes, sizes: [1, 3, 2, 4, 6]}"],
            (1, 3, 2, 4, 6),
            (1, 2, 3),
        ),
    ):
        config = load_config("e-grpo", settings)
        assert merge_sizes(config) == sizes and merged_steps(config) == merged
        window, plan = build_window(config, config.objective), step_plan(len(sizes) - 1)
        assert window.indices == merged
        drawn = {window.choose(i, plan, plan.num_steps, seeded(i))[0] for i in range(40)}
        assert drawn == {range(i, i + 1) for i in merged}
    listed = load_config("e-grpo", ["objective.window.indices=[0, 1]"])
    assert build_window(listed, listed.objective).indices == (0, 1)


def test_the_exponential_decay_is_what_is_set():
    """ceil(6 exp(-0.5 relu(l - 1))) iterations at each start of a window of 4 in 9 steps."""
    names = ("decay=exponential", "rate=0.5", "after=1", "every=6")
    window = load_config("mixgrpo", [f"objective.window.{each}" for each in names]).objective.window
    stays = [6, 6, 4, 3, 2, 1]
    assert [window.stays(start, 9) for start in range(6)] == stays
    assert window.starts_of(9) == pytest.approx({i: n / 22 for i, n in enumerate(stays)})
    places = {place.start: share for place, share in window.places(step_plan(4), 9).items()}
    assert places == window.starts_of(9)


def test_the_averaged_policy_of_awm_is_wired():
    """The recipe's published pull, and its schedule, reach the algorithm."""
    algorithm = algorithm_of(load_config("awm"), toy())
    assert (algorithm.loss.ema_weight, algorithm.loss.kl) == (1.0, 1e-3)
    assert algorithm.average is not None and algorithm.average.schedule == "awm"
    assert [DECAY_SCHEDULES["awm"](step) for step in (0, 100, 1000)] == [0.0, 0.1, 0.3]
    half = algorithm_of(load_config("awm", ["objective.ema_weight=0.5"]), toy())
    assert half.loss.ema_weight == 0.5
    settings = ["objective.ema_weight=0", "objective.average=null"]
    off = algorithm_of(load_config("awm", settings), toy())
    assert off.loss.ema_weight == 0 and off.average is None


def test_published_values_of_recipes():
    """Those that differ from the library's defaults, or did."""
    assert load_config("paper").optimizer.max_grad_norm == 0.01
    kappa = load_config("chunk-grpo-kappa").objective
    assert (kappa.inner_weights, kappa.outer_weights.kind) == ("equal_kappa", "chunk_size")
    assert load_config("chunk-grpo-adaptive").objective.plan.kind == "adaptive"
    assert load_config("chunk-grpo-optimal").objective.plan.kind == "optimal"


def test_step_level_reweighted_has_the_demos_gradient_at_ratio_one():
    """Two recipes, one gradient before the policy moves, its KL to the base included."""
    found = {}
    for name in ("demo", "step-level", "step-level-reweighted"):
        config = load_config(name, ["objective.updates=1"])
        policy, window = toy(), range(3, 6)
        algorithm, sigmas = algorithm_of(config, policy), build_sigmas(config, policy)
        shift(0.1)(policy)  # away from the base, so that the KL pulls
        trajectory = rollout(
            policy, "abc", algorithm.transition, sigmas, 8, seeded(1), window=window
        )
        rewards = torch.randn(24, generator=seeded(2))
        experience = Experience(trajectory, group_advantages(rewards, 3).values)
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
        ("demo", "sampling.transition=ode", "'ode' has no density.*'flow' or 'dance'"),
        ("e-grpo", "sampling.merge.sizes=[4, 4]", "merge.kind sizes, and .* is of another kind"),
        (
            "e-grpo",
            "sampling.merge={kind: sizes, sizes: [4, 4]}",
            r"merged steps \(4, 4\) sum to 8, but the schedule has 16 steps",
        ),
        ("flow-cps", "sampling.transition.eta=1.5", r"mixes noise with eta in \[0, 1\]"),
        ("chunk-grpo", "sampling.transition.eta=0", "'flow' with eta 0 .*with eta above 0"),
        ("demo", "objective.updates=193", "192 images of a rollout"),
        ("awm", "objective.times.number=10", r"objective.times: num_times is 10; .* offers 1 to 9"),
        ("demo", "objective.updates=1 objective.consistency=1", "consistency compares with"),
        ("demo", "objective.updates=1 objective.old_kl=1", "updates is 1; .* or old_kl to 0"),
        ("sequence-level", "objective.consistency=1", "one chunk here"),
        ("tempflow-grpo", "objective.consistency=1", "one chunk here"),
        ("awm", "objective.plan=steps", "objective.plan belongs to objective.kind chunk_grpo"),
        ("awm", "objective.window=random", "objective.window belongs to objective.kind chunk_grpo"),
        ("diffusion-nft", "credit.assign=gain", "needs objective.times of kind 'chunks'"),
        (
            "diffusion-nft",
            "sampling.tail=dpm sampling.transition=flow",
            "sampling.tail 'dpm' takes the steps of rollouts by the ODE, and .* 'flow' draws noise",
        ),
        (
            "awm",
            "credit.assign=gain objective.times=chunks objective.mode=sum_first",
            "needs objective.times of kind 'chunks', and of awm mode 'exp_first'",
        ),
        (
            "diffusion-nft",
            "credit.assign=gain objective.times={kind: chunks, sizes: [5, 5], numbers: [1, 1]}",
            "reach the last of the 10 times",
        ),
        (
            "diffusion-nft",
            "objective.times={kind: chunks, sizes: [5, 6], numbers: [1, 1]}",
            "objective.times: the chunks of times reach from 0 to 10, and a schedule of 10 steps",
        ),
        (
            "diffusion-nft",
            "objective.times={kind: chunks, sizes: [5], numbers: [6]}",
            "draw from 0 to all of each chunk",
        ),
        ("demo", "credit.keep=0", r"credit.keep = 0: must be from 1e-06 to 1"),
        ("diffusion-nft", "objective.ratio=guard", "objective.ratio belongs to .* chunk_grpo, and"),
        ("awm", "objective.consistency=1", "objective.consistency belongs to .*: remove it, or"),
        ("awm", "objective.old_kl=1", "objective.old_kl belongs to .*: remove it, or change the"),
        ("awm", "objective.kl={kind: rate, weight: 1}", "objective.kl = .*'rate'.* valid number"),
        ("diffusion-nft", "objective.anchor=replay", "objective.anchor belongs to .* chunk_grpo"),
        ("diffusion-nft", "objective.trust=kl_mask", "objective.trust belongs to .* chunk_grpo"),
        ("awm", "objective.ema_weight=0", "average is 'awm' and ema_weight 0.0; .* give both"),
        ("awm", "objective.average=null", "average is None and ema_weight 1.0; .* give both"),
        (
            "diffusion-nft",
            "objective.ema_weight=1",
            "ema_weight belongs to objective.kind awm, and",
        ),
        (
            "diffusion-nft",
            "objective.log_prob=linear",
            "log_prob belongs to objective.kind awm, and",
        ),
        ("awm", "objective.beta=2", "objective.beta belongs to objective.kind diffusion_nft, and"),
        ("awm", "objective.fraction=1", "since 0.2.0 it is objective.times.fraction"),
        (
            "awm",
            "objective.log_prob.kind=huber objective.log_prob.power=0.5",
            "objective.log_prob.power belongs to objective.log_prob.kind ghuber, and",
        ),
        ("demo", "objective.trust.threshold=1e-3", "belongs to objective.trust.kind kl_mask, and"),
        ("demo", "objective.trust.options={a: 1}", "belongs to objective.trust.kind imported, and"),
        (
            "demo",
            "objective.outer_weights.sizes=[1, 2]",
            "belongs to objective.outer_weights.kind implicit, and",
        ),
        (
            "chunk-grpo-learned",
            "objective.kl={kind: transition, weight: 0.01}",
            "objective.kl of weight 0.01 would .*the pull.*set objective.kl to none, or use 'rew",
        ),
        # Weights that come from a cut of the steps.
        ("step-level", "objective.outer_weights=implicit", "outer_weights.sizes .* field required"),
        (
            "step-level-reweighted",
            "objective.outer_weights.sizes=[1, 3]",
            "the 3 trained steps, .*3 in all, and they sum to 4",
        ),
        (
            "step-level-reweighted",
            "objective.outer_weights.sizes=[0, 3]",
            "objective.outer_weights.sizes = 0: must be from 1 to 10,000",
        ),
        (
            "step-level-reweighted",
            "objective.plan=whole",
            "weights that chunks have anyhow, and objective.plan is of kind 'whole'; use plan "
            "'steps', or set",
        ),
        ("step-level-reweighted", "objective.plan=adaptive", "plan is of kind 'adaptive'; use"),
        (
            "tempflow-grpo",
            "objective.outer_weights=chunk_size",
            "'chunk_size' weighs chunks against one another, and .* trains one an iteration",
        ),
        # Exponential decay: the published 13 lies beyond the last of the embedded model's starts.
        (
            "mixgrpo",
            "objective.window.decay=exponential",
            "starts after step 13, and a window of 4 in 9 .* starts at 5 .*; set after below 5",
        ),
        ("mixgrpo", "objective.window.rate=0.2", "rate = 0.2 belongs to decay 'exponential', and"),
        ("mixgrpo", "objective.window.after=2", "after = 2 belongs to .*decay is 'constant'; set"),
        # Branches.
        (
            "e-grpo",
            "sampling.merge.least=-5",
            "'entropy' takes none of the trained steps together; raise its least, -5.0,",
        ),
        (
            "e-grpo",
            "sampling.merge=none",
            "'none' takes none of the trained steps together; choose kind 'entropy', or list",
        ),
        (
            "e-grpo",
            "sampling.merge={kind: sizes, sizes: [1,1,1,1,1,1,1,1,1,1,1,1,1,3]}",
            "takes none of the trained steps together",
        ),
        ("e-grpo", "objective.plan=whole", "'merged' are sampler steps, and .* of kind 'whole'"),
        (
            "chunk-grpo-branching",
            "objective.window.indices=[0] objective.plan={kind: adaptive, refresh: 2}",
            "whose number objective.plan.refresh = 2 may change",
        ),
        ("demo", "objective.beta=2", "objective.beta belongs to objective.kind diffusion_nft, and"),
        ("mixgrpo", "objective.plan=optimal", "steps that stay.*'sliding' moves"),
        ("demo", "objective.window.start=7", "steps from step 7 does not lie in the 9 trained"),
        ("flow-grpo-fast", "objective.window.high=10", r"high must be in \[2, 9\]"),
        ("e-grpo", "objective.window.indices=[8]", "has chunks 0 to 7; branch at these only"),
        ("chunk-grpo-branching", "sampling.same_noise=false", "must start from one noise"),
        ("chunk-grpo-branching", "objective.selection=learned", "draws one chunk"),
        (
            "chunk-grpo-branching",
            "objective.selection={kind: listed, indices: [0]}",
            "window.indices lists chunks",
        ),
    ],
)
def test_pairs_that_do_not_go_together_are_refused(name, setting, message, tmp_path):
    settings = re.split(r" (?=[a-z_]+\.)", setting)
    with pytest.raises(ConfigError, match=message):
        load_config(name, settings)


def test_a_window_that_stays_is_cut_from_its_own_dynamics(tiny_pipeline_path, tmp_path):
    """A measured plan covers the window, by its speed with noise in it alone."""
    from chunkgrpo.core.measured_plans import optimal_plan
    from chunkgrpo.rollout import Sampler, measured_speed

    settings = [
        f"model.path={tiny_pipeline_path}", "model.precision=fp32", "objective.plan=optimal",
        "objective.plan.num_chunks=2", "objective.plan.min_size=1", "rewards=[{name: brightness}]",
        "evaluation.reward={name: brightness}",
    ]  # fmt: skip
    config = load_config("demo", settings)
    trainer = build_trainer(config, tmp_path)
    texts = trainer.prompts.texts[:64]
    sampler = Sampler(trainer.sampler.transition, trainer.sampler.sigmas, range(3, 6))
    curve = measured_speed(trainer.policy, texts, sampler, range(64)).mean(0)
    plan = trainer.algorithm.plan
    assert plan == optimal_plan(curve, 2, 1) and plan.num_steps == 3


def test_replay_and_more_updates_cost_more():
    apart = "sampling.same_noise=false"
    config = load_config("chunk-grpo", ["objective.anchor=replay", "objective.updates=4", apart])
    plain = iteration_cost(load_config("chunk-grpo", [apart]))
    assert plain.trained == plain.pairs
    cost = iteration_cost(config)
    # All rows once, and those of later updates' chunks of several steps once more: 4 of 4.5.
    assert cost.measured == near(plain.trained * (3 / 4 * 8 / 9 + 1))


@pytest.mark.parametrize("name", method_names())
def test_dumped_method_is_itself(name, tmp_path):
    import yaml

    from chunkgrpo.config import dump_config, parse_config

    config = load_config(name)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_extends_puts_settings_over_the_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nsampling: {transition: {eta: 0.5}}\n")
    config, base = load_config(file), load_config("demo")
    assert config.sampling.transition.eta == 0.5
    assert config.sampling.steps == base.sampling.steps
    assert config.objective == base.objective


def test_unknown_base_is_an_error(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demon\n")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_config(file)
