# SPDX-License-Identifier: Apache-2.0
"""The models of a run: sampled, evaluated and exported."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from chunkgrpo.config import Config, ConfigError
from chunkgrpo.config.build import (
    build_prompts,
    build_sigmas,
    device_of,
    policy_options,
    resolve_model,
)
from chunkgrpo.evaluate import Evaluation, EvaluationSettings, evaluate, sample_images
from chunkgrpo.policies.loading import export_fused, load_policy
from chunkgrpo.policies.pipeline import Adaptation, PipelinePolicy
from chunkgrpo.rewards import make_reward
from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.runs.resuming import read_run
from chunkgrpo.types import ProgressHook


def find_tuned(folder: Path) -> tuple[Config, str, Path | None]:
    """Return a finished run's settings, and its tuned model: a whole one, or a base and a LoRA.

    Raises:
        ConfigError: If the folder holds no run, or one that is not finished.
    """
    config = read_run(folder)
    model = folder / "model"
    if not model.is_dir():
        raise ConfigError(
            f"{folder} has no tuned model yet; finish it with: chunkgrpo train --resume {folder}"
        )
    if config.model.adaptation.kind == "full":
        return config, str(model), None
    return config, resolve_model(config.model.path), model


def load_tuned(folder: Path) -> tuple[Config, PipelinePolicy]:
    """Load the tuned model of a finished run."""
    config, model, lora = find_tuned(folder)
    return config, load_untrained(config, model, lora)


def export_run(folder: Path, out: Path, dtype: str = "float32") -> None:
    """Write a finished run's tuned model as one whole pipeline; a LoRA is fused into its base.

    Args:
        folder: The run.
        out: A folder that is empty or does not exist.
        dtype: Type of the written weights, ``"float32"`` or ``"bfloat16"``.

    Raises:
        ConfigError: If the run is not finished, the folder is not empty, or the type is unknown.
    """
    _, model, lora = find_tuned(folder)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ConfigError(f"unknown --dtype {dtype!r}; known: {', '.join(known)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out")
    export_fused(model, lora, out, known[dtype])


def load_untrained(config: Config, path: str, lora: Path | None = None) -> PipelinePolicy:
    """Load a model with a run's sampling settings and nothing to train."""
    m = config.model
    return load_policy(path, Adaptation("none"), device_of(m), lora=lora, **policy_options(m))


def draw_both(folder: Path, prompt: str, seeds: Sequence[int]) -> tuple[Config, dict[str, Tensor]]:
    """Sample a prompt with the base and the tuned model of a finished run, one after the other.

    The first is released before the second is loaded, so they need not fit into memory together.

    Args:
        folder: The run.
        prompt: The prompt.
        seeds: One per image; both models start from the same noise.

    Returns:
        The run's settings, and the images of ``"base"`` and ``"tuned"``, [len(seeds), 3, H, W] in
        [0, 1].

    Raises:
        ConfigError: If the folder holds no run, or one that is not finished.
    """
    config, model, lora = find_tuned(folder)
    drawn: dict[str, Tensor] = {}
    base = resolve_model(config.model.path)
    for name, path, adapter in (("base", base, None), ("tuned", model, lora)):
        policy = load_untrained(config, path, adapter)
        images = sample_images(
            policy, [prompt] * len(seeds), build_sigmas(config, policy), seeds,
            config.sampling.batch_size,
        )  # fmt: skip
        drawn[name] = images.float() / 255
        del policy
        gc.collect()  # with checkpointing the network and its policy hold each other
    return config, drawn


def evaluate_run(
    folder: Path,
    progress: ProgressHook,
    split: str | None = None,
    seed: int | None = None,
    base: bool = False,
) -> tuple[Evaluation, Reward]:
    """Evaluate a finished run's tuned model again, or with other prompts or noise.

    Args:
        folder: The run.
        progress: Called after each batch.
        split: Of the embedded world; the run's own held-out prompts where None.
        seed: Seed of the noise; the run's own where None. It does not change the prompts.
        base: Evaluate the base model instead.

    Returns:
        The evaluation, and the judge whose scores are in it.
    """
    if base:
        config = read_run(folder)
        policy = load_untrained(config, resolve_model(config.model.path))
    else:
        config, policy = load_tuned(folder)
    e = config.evaluation
    prompts = build_prompts(config, "final")
    if split:
        from chunkgrpo.prompts import shapes_prompts

        prompts = shapes_prompts(split, e.final_prompts, e.seed)
    judge = make_reward(e.reward.name, e.reward.options)
    sigmas = build_sigmas(config, policy)
    settings = EvaluationSettings(
        e.final_seeds,
        e.seed if seed is None else seed,
        config.sampling.batch_size,
        folder=folder / "unscored",
    )
    found = evaluate(policy, prompts, sigmas, [judge], settings, progress)
    return found, judge
