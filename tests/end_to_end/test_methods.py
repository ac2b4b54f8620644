# SPDX-License-Identifier: Apache-2.0
"""Every method is a valid recipe, says what it needs, and costs what it says."""

import math

import pytest

from chunkgrpo.config import ConfigError, load_config
from chunkgrpo.methods import iteration_cost, read_method, read_methods
from chunkgrpo.recipes import method_names, recipe_path


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
    # Cut into four chunks by a measurement, two of which are trained.
    assert read_method("chunk-grpo-adaptive").cost.pairs == 192 * 9 // 2
    # Neighbouring chunks, two rows a pair, in the second update.
    plain = iteration_cost(load_config("chunk-grpo"))
    pulled = iteration_cost(load_config("chunk-grpo", ["objective.consistency=1"]))
    assert pulled.trained - plain.trained == 2 * 3 * 192 // 2


def test_costs_follow_where_a_window_is():
    """Steps before it are one row a prompt; a window that decays stays longer where it begins."""
    settings = ["sampling.window.every=4", "sampling.window.stride=5"]
    even = iteration_cost(load_config("mixgrpo", settings))  # starts 0 and 5, 4 iterations each
    assert even.rollout == 16 * 3.5 + 192 * (10 - 3.5)
    settings.append("sampling.window.decay=linear")  # 4 and ceil(4 * 4 / 9) = 2 iterations
    decayed = iteration_cost(load_config("mixgrpo", settings))
    start = 5 * 2 / 6
    assert decayed.rollout == round(16 * (start + 1) + 192 * (9 - start))


def test_costs_of_forward_objectives():
    cost = read_method("diffusion-nft").cost  # 5 of 10 times; old policy and reference
    assert (cost.rollout, cost.trained, cost.measured) == (1920, 960, 2 * 960)
    cost = read_method("awm").cost
    assert (cost.rollout, cost.trained, cost.measured) == (1920, 192 * 6, 192 * 3)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("demo", "sampling.diffusion=ode", "'ode' has no density.*'flow' or 'dance'"),
        ("e-grpo", "sampling.merge=[4, 4, 4, 4]", "set one of the two to null"),
        ("e-grpo", "sampling.merge_entropy=null sampling.merge=[4,4]", "sums to 8, but .* is 16"),
        ("flow-cps", "sampling.eta=1.5", r"mixes noise with eta in \[0, 1\]"),
        ("demo", "objective.updates=193", "192 images of a rollout"),
        ("awm", "objective.forward.times=10", "only 9 times besides pure noise"),
        ("demo", "objective.updates=1 objective.consistency=1", "consistency compares with"),
        ("demo", "objective.updates=1 objective.old_kl=1", "or objective.old_kl to 0"),
        ("sequence-level", "objective.consistency=1", "one chunk here"),
        ("tempflow-grpo", "objective.consistency=1", "one chunk here"),
        ("awm", "chunks.plan=steps", "has no use for chunks"),
        ("awm", "sampling.window.kind=random", "has no use for sampling.window"),
        ("diffusion-nft", "objective.credit=gain", "has no use for objective.credit"),
        ("diffusion-nft", "objective.ratio=guard", "ratio or weights"),
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
    settings = setting.split(" ") if " sampling." in setting or " obj" in setting else [setting]
    with pytest.raises(ConfigError, match=message):
        load_config(name, settings)


def test_a_window_that_stays_is_cut_from_its_own_dynamics(tiny_pipeline_path, tmp_path):
    """A measured plan covers the window, by its speed with noise in it alone."""
    from chunkgrpo.config import build_trainer
    from chunkgrpo.core.chunks import optimal_plan
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
