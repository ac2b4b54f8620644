# SPDX-License-Identifier: Apache-2.0
"""Paths in a run's settings: absolute where something is, refused where nothing is."""

import json

import pytest

from chunkgrpo.config import ConfigError, parse_config
from chunkgrpo.config.paths import absolute_option, check_paths, with_absolute_paths


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "models" / "sd3").mkdir(parents=True)
    (tmp_path / "strict").mkdir()  # the name of a mode, too
    (tmp_path / "shapes").mkdir()  # and the embedded world's
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    (tmp_path / "p.txt").write_text("a star\n")
    (tmp_path / "data").mkdir()
    return tmp_path


def test_every_path_becomes_absolute(here) -> None:
    reward = {"name": "clip", "options": {
        "model": "clip", "mode": "strict", "files": ["p.txt", "none.txt"],
        "deep": {"weights": "./models/sd3", "number": 3}, "hub": "openai/clip",
    }}  # fmt: skip
    found = with_absolute_paths(
        parse_config(
            {
                "model": {"path": "models/sd3", "embedding_cache": "cache/here"},
                "prompts": {"train": "p.txt", "held_out": "data:test"},
                "rewards": [reward],
                "watched_rewards": [reward],
                "evaluation": {"reward": reward},
            }
        )
    )
    assert found.model.path == str(here / "models/sd3")
    assert found.model.embedding_cache == str(here / "cache/here")  # it is made where missing
    assert found.prompts.train == str(here / "p.txt")
    assert found.prompts.held_out == f"{here / 'data'}:test"
    for each in (found.rewards[0], found.watched_rewards[0], found.evaluation.reward):
        assert each.options == {
            "model": str(here / "clip"), "mode": "strict",
            "files": [str(here / "p.txt"), "none.txt"],
            "deep": {"weights": str(here / "models/sd3"), "number": 3}, "hub": "openai/clip",
        }  # fmt: skip
    assert with_absolute_paths(found) == found


def test_names_that_are_no_paths_stay() -> None:
    for config in (
        parse_config({}),
        parse_config({"model": {"path": "owner/name", "embedding_cache": None}}),
        parse_config({"rewards": [{"name": "my_package.my_module:my_function"}]}),
    ):
        assert with_absolute_paths(config) == config


def test_the_home_is_expanded(here) -> None:
    found = with_absolute_paths(parse_config({"model": {"path": "~/model"}}))
    assert found.model.path == str(here / "home" / "model")


@pytest.mark.parametrize("value", ["\0", "x" * 5000, "", "a/" * 3000, 1.5, None, True])
def test_options_that_can_be_no_path_stay(value) -> None:
    assert absolute_option(value) == value


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": {"path": "./nowhere"}}, "model.path: model folder ./nowhere does not exist"),
        ({"model": {"path": "/no/where"}}, "model.path: model folder /no/where does not exist"),
        ({"model": {"path": "models/sd4"}}, "models is a folder here"),
        ({"model": {"path": "a/b/c"}}, "a hub id is owner/name"),
        ({"model": {"path": "sd3.safetensors"}}, "it ends in .safetensors"),
        ({"prompts": {"train": "~/nowhere"}}, "prompts.train: prompt file ~/nowhere does not"),
        ({"prompts": {"held_out": "data/sets/x:test"}}, "prompts.held_out: prompt file data/sets"),
    ],
)
def test_what_can_only_be_a_path_is_refused(settings, says) -> None:
    with pytest.raises(ConfigError) as error:
        check_paths(parse_config(settings))
    assert says in str(error.value)


def test_what_is_there_or_may_be_on_a_hub_is_not_refused() -> None:
    for settings in (
        {},
        {"model": {"path": "models/sd3"}, "prompts": {"train": "p.txt", "held_out": "data"}},
        {"model": {"path": "black-forest-labs/FLUX.1-dev"}, "prompts": {"train": "owner/set:test"}},
    ):
        check_paths(parse_config(json.loads(json.dumps(settings))))
