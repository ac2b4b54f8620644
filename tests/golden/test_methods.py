# SPDX-License-Identifier: Apache-2.0
"""Two iterations of every method on a tiny pipeline, against figures kept beside this file.

They change when, and only when, a method changes. To accept a change on purpose, run

    CHUNKGRPO_ACCEPT=1 pytest tests/golden

and look at the difference before committing it.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from chunkgrpo.config import build_trainer, load_config
from chunkgrpo.recipes import method_names, recipe_names

KEPT = Path(__file__).with_name("methods.json")
FIGURES = ("reward_mean", "grad_norm", "loss", "ratio_std", "trained_pairs", "rollout_evaluations")


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def run(name, folder, pipeline):
    reward = {"name": f"{Path(__file__).stem}:brightness"}
    small = {
        "iterations": 2,
        "threads": 1,
        "model.path": str(pipeline),
        "model.precision": "fp32",
        "sampling.prompts": 2,
        "sampling.group_size": 4,
        "evaluation.every": 0,
        "rewards": [reward],
        "evaluation.reward": reward,
    }
    settings = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in small.items()
    ]
    trainer = build_trainer(load_config(name, settings), folder)
    records = []
    trainer.on_iteration = records.append
    trainer.run()
    return [{key: record[key] for key in FIGURES if key in record} for record in records]


@pytest.mark.parametrize("name", [*recipe_names(), *method_names()])
def test_two_iterations(name, tmp_path, tiny_pipeline_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    threads = torch.get_num_threads()
    records = run(name, tmp_path, tiny_pipeline_path)
    torch.set_num_threads(threads)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if os.environ.get("CHUNKGRPO_ACCEPT"):
        kept[name] = records
        KEPT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
        return
    assert name in kept, f"no figures of {name!r}; run with CHUNKGRPO_ACCEPT=1"
    assert len(records) == len(kept[name]) == 2
    for record, expected in zip(records, kept[name], strict=True):
        # Other processors round differently; a changed method differs by far more.
        # The loss is a sum that nearly cancels; the rest are sizes.
        assert record.pop("loss") == pytest.approx(expected.pop("loss"), rel=2e-2, abs=2e-4)
        assert record == pytest.approx(expected, rel=2e-2, abs=1e-9)
