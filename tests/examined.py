# SPDX-License-Identifier: Apache-2.0
"""A small run to examine, built as a run is, and rewards for it."""

from __future__ import annotations

from pathlib import Path

import torch

from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.config.files import Assignment
from chunkgrpo.doctor import examine

TEXTS = ["a red star", "two blue circles", "a cross left of a star", "a green square"]
"""Words of the tiny pipeline's vocabulary."""
HELD_OUT = ["a blue star", "two red circles", "a green cross"]

SETTINGS = {
    "iterations": 4,
    "threads": 1,
    "model.device": "cpu",
    "model.precision": "fp32",
    "model.adaptation": {"kind": "lora", "rank": 2, "alpha": 2.0, "targets": None},
    "model.embedding_cache": None,
    "model.max_sequence_length": 8,
    "rewards": [{"name": "examined:warm"}],
    "evaluation.reward": {"name": "brightness", "options": {}},
    "evaluation.final_prompts": 2,
    "evaluation.prompts": 1,
    "sampling.steps": 4,
    "sampling.prompts": 2,
    "sampling.group_size": 2,
    "sampling.batch_size": 3,
    "objective.plan": {"kind": "explicit", "sizes": [1, 2]},
    "objective.selection": {"kind": "uniform", "fraction": 1.0},
    "objective.kl": {"kind": "transition", "weight": 0.1},
    "objective.trust": {"kind": "clip", "low": 1e-2, "high": 1e-2},
    "objective.micro_batch": 5,
}


def built(model: Path, folder: Path, **changes):
    """Return a small run's trainer and settings; ``__`` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", TEXTS), ("held_out", HELD_OUT)):
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
    settings = {
        **SETTINGS,
        "model.path": str(model),
        "prompts.train": str(folder / "train.txt"),
        "prompts.held_out": str(folder / "held_out.txt"),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config = load_config("chunk-grpo", [Assignment(k, v, "test") for k, v in settings.items()])
    return build_trainer(config, folder / "run"), config


def examined(trainer, config, **options):
    """Return a run's findings that are not fine: (name, status), and all of them."""
    findings = examine(trainer, config, **options)
    return {(f.name, f.status) for f in findings if f.status in ("warning", "failure")}, findings


# --- rewards ------------------------------------------------------------------------------------


def warm(images, prompts):
    """How much redder than blue an image is."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def dark(images, prompts):
    return -images.mean((1, 2, 3))


def loud(images, prompts):
    return 1e4 * warm(images.flip(1), prompts) + 1e4 * images[:, 1].var((1, 2))


def constant(images, prompts):
    return torch.full((len(images),), 0.37)


def never(images, prompts):
    return torch.zeros(len(images))


def not_a_number(images, prompts):
    scores = images.mean((1, 2, 3))
    scores[1] = float("nan")
    return scores


def broken(images, prompts):
    raise KeyError("no such model")
