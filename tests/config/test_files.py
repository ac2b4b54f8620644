# SPDX-License-Identifier: Apache-2.0
"""Reading settings: exact texts, merging by kind, sources, refusals with the new spelling."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkgrpo.config import ConfigError, dump_config, load_config, parse_config
from chunkgrpo.config.files import Assignment, load_tree
from chunkgrpo.config.migration import MOVED
from chunkgrpo.core.kl import NoKl, RateKl
from chunkgrpo.core.plan_rules import ExplicitPlan, StepPlan
from chunkgrpo.core.trust import Clip, KlMask
from chunkgrpo.recipes import method_names, recipe_names

RECIPES = [*recipe_names(), *method_names()]


# --- texts are texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [" ", "no", "blurry: bad", "a #2", "null", "[x]", "1e-4", "'q'"])
def test_a_negative_prompt_is_taken_as_it_stands(text):
    config = load_config("paper", [f"model.negative_prompt={text}"])
    assert config.model.negative_prompt == text


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=30))
def test_any_text_is_taken_as_it_stands(text):
    assert Assignment.parse(f"model.negative_prompt={text}").value == text
    assert Assignment.parse(f"name={text}").value == text


def test_a_model_that_looks_like_a_date_stays_a_text():
    assert load_config("paper", ["model.path=2024-11-30"]).model.path == "2024-11-30"


@pytest.mark.parametrize("name", ["[v2].txt", "my prompts #2.txt"])
def test_prompt_files_keep_their_names(name):
    config = load_config("demo", [f"prompts.train={name}", f"prompts.held_out={name}"])
    assert config.prompts.train == config.prompts.held_out == name


@pytest.mark.parametrize(
    "option, value, key",
    [
        ("--model", "2024-11-30", "model.path"),
        ("--prompts", "[v2].txt", "prompts.train"),
        ("--prompts", "my prompts #2.txt", "prompts.held_out"),
        ("--reward", "http://host:1/#no", "rewards"),
    ],
)
def test_options_of_train_never_pass_through_yaml(option, value, key):
    from chunkgrpo.cli.training import Overrides

    given = Overrides(
        value if option == "--model" else None,
        value if option == "--prompts" else None,
        [value] if option == "--reward" else None,
        False,
        [],
    )
    found = {each.key: each.value for each in given.assignments()}
    expected = [{"name": value}] if key == "rewards" else value
    assert found[key] == expected


def test_an_optional_text_may_be_absent():
    assert load_config("paper", ["model.embedding_cache=null"]).model.embedding_cache is None
    assert load_config("paper", ["model.embedding_cache=no"]).model.embedding_cache == "no"


def test_a_file_says_to_quote_what_yaml_makes_of_a_text(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {negative_prompt: true}\n")
    with pytest.raises(ConfigError, match=r"model.negative_prompt = True: .*quotes"):
        load_config(file)
    file.write_text("model: {negative_prompt: no}\n")  # false in YAML 1.1
    assert load_config(file).model.negative_prompt == "no"


def test_numbers_lists_and_sections_are_yaml():
    changes = ["optimizer.learning_rate=1e-5", "objective.plan={kind: explicit, sizes: [4, 5]}"]
    config = load_config("chunk-grpo", changes)
    assert config.optimizer.learning_rate == 1e-5
    assert config.objective.plan == ExplicitPlan((4, 5))


# --- merging ------------------------------------------------------------------------------------


def test_a_section_of_the_same_kind_is_merged():
    config = load_config("demo", ["objective.trust.low=2e-3"])
    assert config.objective.trust == Clip(2e-3, 1e-3)


def test_a_section_whose_kind_changes_is_replaced():
    config = load_config("demo", ["objective.trust.kind=kl_mask"])
    assert config.objective.trust == KlMask()
    config = load_config("demo", ["objective.trust=kl_mask", "objective.trust.threshold=1e-4"])
    assert config.objective.trust == KlMask(1e-4)
    again = load_config("demo", ["objective.trust=kl_mask", "objective.trust=clip"])
    assert again.objective.trust == Clip()


def test_the_kind_alone_stands_for_a_section():
    config = load_config("chunk-grpo", ["objective.plan=steps", "objective.kl=none"])
    assert config.objective.plan == StepPlan() and config.objective.kl == NoKl()


def test_extends_replaces_a_section_whose_kind_changes(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: flow-grpo\nobjective: {kl: {kind: transition, weight: 0.1}}\n")
    assert load_config("flow-grpo").objective.kl == RateKl(0.04)
    assert load_config(file).objective.kl.weight == 0.1


def test_a_reward_whose_name_changes_loses_its_options():
    assert load_config("demo").evaluation.reward.options == {"mode": "strict", "name": "strict"}
    judge = load_config("demo", ["evaluation.reward.name=brightness"]).evaluation.reward
    assert (judge.name, judge.options) == ("brightness", {})
    judge = load_config("demo", ["evaluation.reward={name: clip, options: {name: x}}"])
    assert judge.evaluation.reward.options == {"name": "x"}
    judge = load_config("demo", ["evaluation.reward.options.mode=soft"]).evaluation.reward
    assert judge.options == {"mode": "soft", "name": "strict"}


def test_entries_of_lists_are_set_by_number():
    config = load_config("demo", ["rewards.0.weight=2", "rewards.0.options.mode=strict"])
    assert config.rewards[0].weight == 2
    assert config.rewards[0].options["mode"] == "strict"
    assert config.rewards[0].options["extra_penalty"] == 0.1
    with pytest.raises(ConfigError, match="counted from 0"):
        load_config("demo", ["rewards.3.weight=2"])


def test_every_setting_knows_its_source():
    tree = load_tree("demo", ["objective.trust.low=2e-3"])
    objective = tree["objective"]
    assert objective["trust"]["low"].source == "--set objective.trust.low"
    assert objective["trust"]["high"].source == "recipe embedded"
    assert objective["plan"]["sizes"].source == "recipe demo"
    assert tree["seed"].source == "default"


# --- refusals -----------------------------------------------------------------------------------

UNREAD = [
    # each passed in silence before parts were their own schema
    ("chunk-grpo", "objective.plan={kind: paper, sizes: [4, 4, 4, 4]}"),
    ("chunk-grpo", "objective.plan={kind: steps, size: 4}"),
    ("chunk-grpo", "objective.selection={kind: uniform, floor: 0.1}"),
    ("chunk-grpo", "objective.selection={kind: uniform, decay: 0.5}"),
    ("chunk-grpo", "objective.selection={kind: uniform, usefulness: reward}"),
    ("mixgrpo", "objective.window={kind: all, start: 2}"),
    ("mixgrpo", "objective.window={kind: fixed, size: 4, low: 1}"),
    ("mixgrpo", "objective.window={kind: fixed, size: 4, high: 5}"),
    ("chunk-grpo", "sampling.tail={kind: euler, fraction: 0.5}"),
    ("chunk-grpo", "sampling.tail=dpm"),
    ("chunk-grpo", "sampling.prefix=sde"),
    ("chunk-grpo", "sampling.schedule={kind: native, shift: 2}"),
    ("chunk-grpo", "model.adaptation={kind: full, rank: 8}"),
    ("awm", "objective.beta=2"),
    ("diffusion-nft", "objective.times={kind: shuffled, number: 3}"),
    ("awm", "objective.times={kind: stratified, fraction: 0.5}"),
    ("awm", "objective.log_prob={kind: huber, power: 0.5}"),
    ("mixgrpo", "objective.window.rate=0.2"),
    ("chunk-grpo", "prompts.column=text"),
]


@pytest.mark.parametrize("recipe, change", UNREAD)
def test_a_setting_that_nothing_reads_is_refused(recipe, change):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [change])
    assert "\n" not in str(error.value)
    assert change.partition("=")[0].split(".")[-1] in str(error.value)


@pytest.mark.parametrize("key", sorted(MOVED))
def test_keys_of_version_0_1_are_refused_with_their_new_spelling(key):
    with pytest.raises(ConfigError, match=r"since 0\.2\.0 it is") as error:
        load_config("demo", [f"{key}=1"])
    assert MOVED[key] in str(error.value)


def test_an_old_file_is_refused_with_the_new_spelling(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("chunks: {plan: explicit, sizes: [4, 5]}\nsampling: {steps: 10}\n")
    with pytest.raises(ConfigError, match=r"'chunks': since 0.2.0 it is objective.plan"):
        load_config(file)
    file.write_text("sampling: {diffusion: flow, eta: 0.7}\n")
    with pytest.raises(ConfigError, match=r"'sampling.diffusion': since 0.2.0 it is"):
        load_config(file)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.learning_rate'"):
        load_config("demo", ["optimizer.learningrate=1"])
    with pytest.raises(ConfigError, match=r"objective\.trust\.kind 'clpi'; did you mean 'clip'"):
        load_config("demo", ["objective.trust.kind=clpi"])


def test_a_parts_own_rule_is_said_at_its_key():
    with pytest.raises(ConfigError, match=r"^objective: updates and micro_batch must be at least"):
        load_config("demo", ["objective.micro_batch=0"])
    with pytest.raises(ConfigError, match=r"^objective\.selection: fraction is 0\.0; the trained"):
        load_config("demo", ["objective.selection={kind: uniform, fraction: 0}"])


@pytest.mark.parametrize(
    "change, message",
    [
        ("name=", r"^name = '': it is the name of the run's folder"),
        ("objective=null", r"^objective = None: "),
        ("objective.plan=[2, 1]", r"^objective\.plan = \[2, 1\]: "),
        ("sampling=none", r"^sampling = 'none': "),
        ("rewards=[]", r"^rewards = \[\]: "),
        ("objective.trust={kind: imported, path: 'os:getcwd'}", r"belongs to Python itself"),
        ("objective.trust={kind: imported, path: 'torch:Size'}", r"is a Size without needs_div"),
        ("objective.trust={kind: imported, path: nope}", r"must look like package\.module:"),
        ("credit.keep=nan", r"^credit.keep = 'nan': must be a number"),
        ("optimizer.learning_rate=.nan", r"^optimizer.learning_rate = nan: must be from"),
    ],
)
def test_nonsense_is_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config("demo", [change])
    assert "\n" not in str(error.value)


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_dumped_loads_as_the_same(name, tmp_path):
    config = load_config(name)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    file = tmp_path / "dumped.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    "text",
    ["1e-4", "1E5", ".5", "5.", "+1", "-.inf", ".nan", "010", "1:30", "1_000", "0x10", "2024-01-01",
     "no", "on", "y", "null", "~", "true", "<<", "=", "{a}", "[b]", "- c", "d: e", "# f", "'"],
)  # fmt: skip
def test_a_text_that_looks_like_something_else_is_read_back_as_a_text(text, tmp_path):
    """A run named 1e-4 could not be resumed: its own settings were read as a number."""
    from chunkgrpo.config.describe import described_yaml

    changes = [f"prompts.train={text}", f"prompts.held_out={text}", f"model.negative_prompt={text}"]
    changes += [] if text.startswith("null") else [f"name={text}"]
    config = load_config("demo", changes)
    file = tmp_path / "written.yaml"
    for written in (dump_config(config), described_yaml(config, load_tree("demo", changes))):
        file.write_text(written)
        assert load_config(file) == config
    # Other readers of YAML 1.1 find the same texts.
    assert yaml.safe_load(dump_config(config))["model"]["negative_prompt"] == text


@pytest.mark.parametrize("name", ["demo", "awm", "diffusion-nft", "e-grpo", "mixgrpo"])
def test_the_described_configuration_loads_as_the_same(name, tmp_path):
    from chunkgrpo.config.describe import described_yaml

    config = load_config(name)
    file = tmp_path / "described.yaml"
    file.write_text(described_yaml(config, load_tree(name)))
    assert load_config(file) == config


def test_errors_are_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "chunkgrpo", "train", "demo", "--set", "chunks.plan=paper"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip().count("\n") == 0 and "objective.plan.kind" in run.stderr
