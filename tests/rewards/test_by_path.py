# SPDX-License-Identifier: Apache-2.0
"""Rewards of one's own, by import path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunkgrpo.rewards import FunctionReward, make_reward, score

CODE = """
class Level:
    share = True
    def __init__(self, level=0.5, name="level"):
        self.level, self.name = level, name
    def __call__(self, images, prompts):
        return (images.mean((1, 2, 3)) > self.level).float()

ready = Level(0.25, "ready")
number = 3

def mean(images, prompts):
    return images.mean((1, 2, 3)).tolist()

class Nameless:
    def __call__(self, images, prompts):
        return [1.0] * len(prompts)

class Dumb:
    pass
"""
IMAGES = torch.tensor([0.1, 0.3, 0.6, 0.9]).view(4, 1, 1, 1).expand(4, 3, 2, 2)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)  # code elsewhere needs permission
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)


@pytest.mark.parametrize(
    ("path", "options", "name", "scores"),
    [
        ("own_rewards:mean", {}, "mean", [0.1, 0.3, 0.6, 0.9]),
        ("own_rewards:Level", {}, "level", [0, 0, 1, 1]),
        ("own_rewards:Level", {"level": 0.7, "name": "high"}, "high", [0, 0, 0, 1]),
        ("own_rewards:ready", {}, "ready", [0, 1, 1, 1]),
        ("own_rewards:Nameless", {}, "Nameless", [1, 1, 1, 1]),
    ],
)
def test_functions_classes_and_objects_score(
    path: str, options: dict, name: str, scores: list[float]
) -> None:
    reward = make_reward(path, options)
    assert reward.name == name
    found = score([(reward, 1.0)], IMAGES, ["x"] * 4)
    torch.testing.assert_close(found.total, torch.tensor(scores, dtype=torch.float32))


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("own_rewards:mean", {"level": 1}, "is no class and takes no options, but has level"),
        ("own_rewards:ready", {"level": 1}, "is no class and takes no options"),
        ("own_rewards:Level", {"height": 1}, "does not take these options: .*height"),
        ("own_rewards:number", {}, "is a int, which cannot be called"),
        ("own_rewards:Dumb", {}, "is a Dumb, which cannot be called"),
        ("own_rewards:absent", {}, "cannot be imported: .*no attribute 'absent'"),
        ("no_such_module:x", {}, "cannot be imported: No module named"),
        (":x", {}, "cannot be imported: ':x' must look like package.module:attribute"),
        ("own_rewards", {}, "unknown reward 'own_rewards'; known: .*package.module:function"),
    ],
)
def test_what_can_not_score_is_refused(path: str, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_reward(path, options)


def test_a_function_says_what_it_is() -> None:
    def plain(images, prompts):
        return [0.0]

    assert not FunctionReward("plain", plain).share
    plain.share = True  # type: ignore[attr-defined]
    assert FunctionReward("plain", plain).share


def test_the_command_finds_modules_where_it_is_called(tmp_path: Path) -> None:
    # As an installed command is started: the script's folder comes first, not the current one.
    code = "import sys; from chunkgrpo import cli; sys.path = sys.path[1:]; cli.main()"
    source = str(Path(__file__).resolve().parents[2] / "src")
    result = subprocess.run(
        [sys.executable, "-c", code, "serve-reward", "own_rewards:number"],
        cwd=tmp_path, env={"PYTHONPATH": source}, capture_output=True, text=True,
    )  # fmt: skip
    assert "which cannot be called" in result.stderr and result.returncode == 2
