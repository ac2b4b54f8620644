# SPDX-License-Identifier: Apache-2.0
"""Network rows of an iteration, counted on the real sampler and algorithm."""

import pytest

from chunkgrpo.config import load_config, parse_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.cost import Cost, chunk_sizes, iteration_cost, with_known_chunks
from chunkgrpo.policies.toy import CountingPolicy


def settings(**sections):
    """Two prompts x three images, chunks of 1 and 3 steps."""
    values = {
        "sampling": {"steps": 5, "prompts": 2, "group_size": 3},
        "objective": {
            "plan": {"kind": "explicit", "sizes": [1, 3]},
            "selection": {"kind": "uniform", "fraction": 1.0},
        },
    }
    for name, changes in sections.items():
        values[name] = values[name] | changes
    return parse_config(values)


def test_an_iteration_by_hand():
    """The first update needs no ratios; the second measures those of the chunk of 3 steps."""
    cost = iteration_cost(settings(sampling={"same_noise": False}))
    assert cost == Cost(
        rollout=6 * 5, measured=3 * 3, trained=6 * 4, rewards=6, pairs=6 * 4, stored=5 * 4
    )
    assert cost.forwards == 30 + 9 + 24
    # A group is one row until its first step of its own.
    cost = iteration_cost(settings(objective={"updates": 1}))
    assert (cost.rollout, cost.measured, cost.trained) == (2 + 6 * 4, 0, 2 + 6 * 3)
    kl = {"kl": {"kind": "transition", "weight": 0.1}, "updates": 1, "anchor": "replay"}
    cost = iteration_cost(settings(objective=kl))
    assert (cost.measured, cost.trained) == (2 * (2 + 6 * 3), 2 + 6 * 3)


def test_rows_of_a_common_first_step_are_counted_once(monkeypatch):
    monkeypatch.setattr("chunkgrpo.cost.DRAWS", 100)

    def saved(**sections):
        cost = iteration_cost(settings(**sections))
        return cost.pairs - cost.trained

    # One update: six first steps are two rows. Two updates of 3 of the 6 images: one that holds
    # both prompts saves one row, and one of a single prompt (1 of 10 draws) two.
    assert saved(objective={"updates": 1}) == pytest.approx(4)
    assert saved(objective={"updates": 2}) == pytest.approx(2 * (0.9 * 1 + 0.1 * 2), abs=0.18)
    assert saved(sampling={"same_noise": False}) == pytest.approx(0)
    listed = {"selection": {"kind": "listed", "indices": [1]}}
    assert saved(objective=listed) == pytest.approx(0)


def test_chunks_that_only_the_model_tells_are_counted_as_nearly_equal_ones():
    config = load_config("chunk-grpo-optimal")
    assert chunk_sizes(config) == (2, 2, 2, 3)
    known = with_known_chunks(config).objective.plan
    assert known.kind == "explicit" and known.sizes == (2, 2, 2, 3)
    given = load_config("chunk-grpo")
    assert with_known_chunks(given) is given and chunk_sizes(given) == (1, 2, 2, 4)
    assert iteration_cost(config).pairs == pytest.approx(192 * 9 / 2, rel=0.02)


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"updates": 1}},
        {"sampling": {"same_noise": False}},
        {"objective": {"anchor": "replay", "updates": 1}},
        {"sampling": {"same_noise": False},
         "objective": {"window": {"kind": "fixed", "start": 1, "size": 2},
                       "plan": {"kind": "equal", "size": 2}}},
        {"sampling": {"same_noise": False, "transition": "ode"},
         "objective": {"kind": "awm", "times": {"kind": "stratified", "number": 2},
                       "updates": 2}},
    ],
    ids=["one-update", "own-noises", "replay", "window", "awm"],
)  # fmt: skip
def test_costs_are_those_of_a_measured_run(sections, tiny_pipeline_path, tmp_path, monkeypatch):
    """What a trainer built of the same settings asks of its model."""
    values = settings(**{k: v for k, v in sections.items() if "kind" not in v}).model_dump()
    model = {"path": str(tiny_pipeline_path), "device": "cpu", "precision": "fp32"}
    values["model"] |= model | {"max_sequence_length": 4, "embedding_cache": None}
    values["rewards"] = [{"name": "brightness"}]
    values["evaluation"] |= {"every": 0, "reward": {"name": "brightness"}}
    if "kind" in sections.get("objective", {}):
        values["objective"] = sections["objective"]
    config = parse_config(values)
    trainer = build_trainer(config, tmp_path)
    rows, velocity = {True: 0, False: 0}, trainer.policy.velocity

    def counted(x, sigma, conditioning):
        result = velocity(x, sigma, conditioning)
        rows[result.requires_grad] += len(x)
        return result

    monkeypatch.setattr(trainer.policy, "velocity", counted)
    record = trainer.train_once()
    assert record["idle_pairs"] == 0
    cost = iteration_cost(config)
    assert rows[True] == cost.trained
    assert rows[False] == cost.rollout + cost.measured
    assert record["rollout_evaluations"] == cost.rollout
    assert record["trained_pairs"] == cost.pairs


def test_the_counting_policy_counts_what_it_is_asked():
    import torch

    policy = CountingPolicy()
    texts = policy.encode(["a", "b"])
    x, sigma = torch.zeros(2, 1), torch.full((2,), 0.5)
    policy.velocity(x, sigma, texts).sum().backward()
    with torch.no_grad():
        policy.velocity(x[:1], sigma[:1], texts[:1])
    assert policy.decode(x).shape == (2, 3, 1, 1)
    assert (policy.trained_rows, policy.quiet_rows, policy.decoded) == (2, 1, 2)
    assert policy.weight.grad == 2
    policy.reset()
    assert (policy.trained_rows, policy.quiet_rows, policy.decoded) == (0, 0, 0)
