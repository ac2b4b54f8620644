# SPDX-License-Identifier: Apache-2.0
"""The models of a run: sampled, evaluated and exported."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from chunkgrpo.runs.history import HistoryError, read_history
from chunkgrpo.runs.resuming import CONFIG, edits, read_run
from chunkgrpo.runtime.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    newest_sound,
    number_of,
    tuned_weights,
)
from chunkgrpo.types import ProgressHook


@dataclass(frozen=True)
class Tuned:
    """A tuned model of a run, on disk.

    Attributes:
        config: The run's settings.
        model: Folder or hub id of a whole model.
        lora: Folder of a LoRA on top of it; None without one.
        weights: Checkpoint that holds other weights of it; None without one.
        label: Number of iterations, as folders of checkpoints have it; empty for ``model/``.
    """

    config: Config
    model: str
    lora: Path | None = None
    weights: Path | None = None
    label: str = ""

    def load(self) -> PipelinePolicy:
        """Load it, with the run's sampling settings and nothing to train."""
        weights = None if self.weights is None else tuned_weights(self.weights)
        return load_untrained(self.config, self.model, self.lora, weights)


def find_tuned(folder: Path, which: str | None = None, say: Callable[[str], None] = print) -> Tuned:
    """Find the tuned model of a run; nothing is written, and the run may be going on.

    Args:
        folder: The run.
        which: A checkpoint: its number of iterations, ``"last"`` or ``"best"``. None: ``model/``
            where the run is finished, and the newest sound checkpoint otherwise, which is said.
        say: Told of that, and of settings in ``config.yaml`` that the run did not have.

    Raises:
        ConfigError: If the folder holds no run, or one without a checkpoint.
        CheckpointError: If there is no such checkpoint, or it is damaged.
    """
    config, checkpoints = read_run(folder), folder / "checkpoints"
    for change in edits(folder, config):
        say(f"{folder / CONFIG} was edited since the run last went on: {change}; it is used as is")
    model = folder / "model"
    if which is not None:
        path = find_checkpoint(checkpoints, which)
    elif model.is_dir() and not _goes_on(folder, checkpoints):
        if config.model.adaptation.kind == "full":
            return Tuned(config, str(model))
        return Tuned(config, resolve_model(config.model.path), model)
    else:
        path = newest_sound(checkpoints, say)
        if path is None:
            raise ConfigError(
                f"{folder} has no tuned model and no checkpoint yet; go on with it: chunkgrpo "
                f"train --resume {folder}"
            )
        say(f"{folder} is not finished: this is its checkpoint of {number_of(path)} iterations")
    base = resolve_model(config.model.path)
    if (path / "model").is_dir():
        return Tuned(config, base, path / "model", label=path.name)
    return Tuned(config, base, weights=path, label=path.name)


def _goes_on(folder: Path, checkpoints: Path) -> bool:
    """Whether a run with a ``model/`` was continued beyond it."""
    try:
        finished = read_history(folder).finished
    except (HistoryError, OSError):
        return False
    found = list_checkpoints(checkpoints)
    return bool(finished and found) and number_of(found[-1]) > finished


def load_tuned(
    folder: Path, which: str | None = None, say: Callable[[str], None] = print
) -> tuple[Config, PipelinePolicy]:
    """Load the tuned model of a run; see :func:`find_tuned`."""
    tuned = find_tuned(folder, which, say)
    return tuned.config, tuned.load()


def export_run(
    folder: Path,
    out: Path | None = None,
    dtype: str = "float32",
    which: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the tuned model of a run as one whole pipeline; a LoRA is fused into its base.

    Args:
        folder: The run.
        out: A folder that is empty or does not exist; None: ``pipeline`` in the run's, with the
            number of iterations behind it for a checkpoint.
        dtype: Type of the written weights, ``"float32"`` or ``"bfloat16"``.
        which, say: As in :func:`find_tuned`.

    Returns:
        The folder written.

    Raises:
        ConfigError: If there is no such model, the folder is not empty, or the type is unknown.
    """
    tuned = find_tuned(folder, which, say)
    if out is None:
        out = folder / (f"pipeline-{tuned.label}" if tuned.label else "pipeline")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ConfigError(f"unknown --dtype {dtype!r}; known: {', '.join(known)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out")
    weights = None if tuned.weights is None else tuned_weights(tuned.weights)
    export_fused(tuned.model, tuned.lora, out, known[dtype], weights)
    return out


def load_untrained(
    config: Config,
    path: str,
    lora: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> PipelinePolicy:
    """Load a model with a run's sampling settings and nothing to train."""
    m = config.model
    return load_policy(
        path, Adaptation("none"), device_of(m), lora=lora, weights=weights, **policy_options(m)
    )


def find_base(folder: Path) -> Tuned:
    """Return the model that a run started from."""
    config = read_run(folder)
    return Tuned(config, resolve_model(config.model.path))


def draw_both(tuned: Tuned, prompt: str, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Sample a prompt with the base and the tuned model of a run, one after the other.

    The first is released before the second is loaded, so they need not fit into memory together.

    Args:
        tuned: The tuned model; see :func:`find_tuned`.
        prompt: The prompt.
        seeds: One per image; both models start from the same noise.

    Returns:
        The images of ``"base"`` and ``"tuned"``, [len(seeds), 3, H, W] in [0, 1].
    """
    config = tuned.config
    drawn: dict[str, Tensor] = {}
    for name, model in (
        ("base", Tuned(config, resolve_model(config.model.path))),
        ("tuned", tuned),
    ):
        policy = model.load()
        images = sample_images(
            policy, [prompt] * len(seeds), build_sigmas(config, policy), seeds,
            config.sampling.batch_size,
        )  # fmt: skip
        drawn[name] = images.float() / 255
        del policy
        gc.collect()  # with checkpointing the network and its policy hold each other
    return drawn


def evaluate_run(
    folder: Path,
    progress: ProgressHook,
    split: str | None = None,
    seed: int | None = None,
    tuned: Tuned | None = None,
) -> tuple[Evaluation, Reward]:
    """Evaluate a run's tuned model again, or with other prompts or noise.

    Args:
        folder: The run.
        progress: Called after each batch.
        split: Of the embedded world; the run's own held-out prompts where None.
        seed: Seed of the noise; the run's own where None. It does not change the prompts.
        tuned: The model; the run's own (:func:`find_tuned`) where None.

    Returns:
        The evaluation, and the judge whose scores are in it.
    """
    tuned = tuned or find_tuned(folder)
    config, policy = tuned.config, tuned.load()
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
