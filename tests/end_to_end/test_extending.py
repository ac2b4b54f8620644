# SPDX-License-Identifier: Apache-2.0
"""The page on adding a method works as it says."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from chunkgrpo.config import ConfigError, load_config
from chunkgrpo.config.build import build_trainer

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write the page's files into a folder that Python imports from."""
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE.read_text(), re.S):
        name = re.match(r"# (\S+)", block)
        assert name, "every block of the page begins with its file's name"
        (tmp_path / name[1]).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)  # code elsewhere needs permission
    yield tmp_path
    for module in ("cispo", "check_cispo", "bright"):
        sys.modules.pop(module, None)


def test_the_method_trains(files, tiny_pipeline_path):
    small = ["iterations=2", "sampling.prompts=2", "sampling.group_size=4", "evaluation.every=0"]
    small += [f"model.path={tiny_pipeline_path}", "model.precision=fp32"]
    (files / "bright.py").write_text("def bright(images, prompts): return images.mean((1, 2, 3))")
    small += ["rewards=[{name: 'bright:bright'}]", "evaluation.reward={name: 'bright:bright'}"]
    config = load_config(files / "cispo.yaml", small)
    trainer = build_trainer(config, files / "run")
    trust = trainer.algorithm.loss.trust  # type: ignore[attr-defined]
    assert type(trust.region).__name__ == "Cispo" and trust.region.high == 1e-3
    before = [p.detach().clone() for p in trainer.parameters]
    records = []
    trainer.on_iteration = records.append
    assert trainer.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert 0 <= records[-1]["clip_fraction"] <= 1


def test_the_check_passes(files):
    runpy.run_path(str(files / "check_cispo.py"))


@pytest.mark.parametrize(
    ("trust", "message"),
    [
        ("clib", "did you mean 'clip'"),
        ("{kind: imported, path: 'no_such_module:Region'}", "cannot be built: No module named"),
        ("{kind: imported, path: 'chunkgrpo.core.trust:Nothing'}", "cannot be built: .*'Nothing'"),
        ("{kind: imported, path: no_such_module}", "cannot be built: .* must look like"),
    ],
)
def test_wrong_trust_regions_are_named(trust, message):
    """Before a model is loaded."""
    with pytest.raises(ConfigError, match=message):
        load_config("chunk-grpo", [f"objective.trust={trust}", "model.path=/nowhere"])
