# SPDX-License-Identifier: Apache-2.0
"""A small run to examine, built as a run is, and rewards for it."""

from __future__ import annotations

from pathlib import Path

import torch

import tiny_pipelines
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


def assert_named(fault, model, folder, patch):
    """Check that a planted fault is named by its check, with advice, and by no other."""
    trainer, config = built(model, folder, **dict(fault.settings))
    fault.plant(trainer, patch)
    named, findings = examined(trainer, config)
    told = [str(f) for f in findings if f.status in ("warning", "failure")]
    assert {check for check, _ in named} == {fault.check}, told
    mine = [f for f in findings if f.name == fault.check and f.status == fault.status]
    assert any(fault.says in str(f) for f in mine), told
    assert all(f.advice and "\n" not in str(f) for f in mine), told


# --- healthy runs -------------------------------------------------------------------------------

LAYERS = {"text_encoder_out_layers": [1, 2, 3]}
FAMILIES = {
    "sd3": (tiny_pipelines.sd3, 32, 8, 3.0, {}),
    "flux": (tiny_pipelines.flux, 16, 8, 3.5, {"true_cfg": 2.0}),
    "flux2": (tiny_pipelines.flux2, 16, 160, 4.0, LAYERS),
    "flux2_klein": (tiny_pipelines.flux2_klein, 16, 64, 4.0, LAYERS),
    "qwen_image": (tiny_pipelines.qwen_image, 16, 64, 3.0, {}),
    "z_image": (tiny_pipelines.z_image, 16, 48, 3.0, {}),
    "lumina2": (tiny_pipelines.lumina2, 32, 64, 4.0, {"system_prompt": "Describe"}),
    "sana": (tiny_pipelines.sana, 32, 16, 4.5, {"instruction": False}),
}
"""Pipeline, side of images, text tokens, guidance, and other options of the policy."""

FULL = {"kind": "full", "targets": None}
METHODS = ("diffusion-nft", "awm", "chunk-grpo-branching", "mixgrpo-flash")
"""One of each kind that is sampled or trained in another way."""

TINY = {
    "iterations": 2,
    "threads": 1,
    "model.device": "cpu",
    "sampling.prompts": 2,
    "sampling.group_size": 2,
    "evaluation.final_prompts": 6,
    "evaluation.prompts": 6,
}
RARE = ("rewards",)
"""Of four images of a weak model, hardly any may succeed, and the doctor says so."""


def family_run(name, folder, **changes):
    build, side, rows, guidance, options = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    build().save_pretrained(folder / "pipeline")
    return built(
        folder / "pipeline", folder,
        model__height=side, model__width=side, model__max_sequence_length=rows,
        model__guidance=guidance, model__options=options, **changes,
    )  # fmt: skip


def assert_healthy(trainer, config, ignored=()):
    named, findings = examined(trainer, config)
    told = [str(f) for f in findings if f.status in ("warning", "failure")]
    assert {n for n in named if n[0] not in ignored} == set(), told
    return {f.name: f for f in findings}


def recipe_run(name, folder):
    """A recipe on the embedded model, made small."""
    own = {"model.path": "shapes", "model.embedding_cache": None}
    if load_config(name).credit.project_out:  # which needs degrees of freedom
        # Not for all: with 3 or 4 images the guard recipes, whose clip range is 4e-6, are told
        # truly that the rounding of bf16 reaches it; with 2 or 12 it does not.
        own["sampling.group_size"] = 4
    config = load_config(name, [Assignment(k, v, "test") for k, v in (TINY | own).items()])
    return build_trainer(config, folder / "run"), config


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
