# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its report, in one folder."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkgrpo.config import Config, ConfigError, dump_config, parse_config
from chunkgrpo.config.build import (
    build_prompts,
    build_sigmas,
    build_trainer,
    device_of,
    policy_options,
    resolve_model,
)
from chunkgrpo.config.files import read_yaml
from chunkgrpo.evaluate import Evaluation, EvaluationSettings, evaluate, sample_images
from chunkgrpo.policies.loading import export_fused, load_policy
from chunkgrpo.policies.pipeline import Adaptation, PipelinePolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.curves import DEFAULT_PANELS, panels_of_score, save_curves
from chunkgrpo.report.grids import save_comparison
from chunkgrpo.report.health import HEALTH_BANDS
from chunkgrpo.report.html import write_html
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.report.tables import (
    HEADINGS,
    AccuracyRow,
    accuracy_cells,
    accuracy_rows,
    change_text,
    interval_text,
    score_text,
)
from chunkgrpo.rewards import make_reward
from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.rewards.scoring import is_share
from chunkgrpo.runtime.files import atomic_write
from chunkgrpo.types import ProgressHook, Prompt

NUM_SHOWN = 12


def new_folder(root: Path, name: str) -> Path:
    """Return a folder that does not exist yet: ``root/name``, or with a number behind."""
    number, folder = 1, root / name
    while folder.exists():
        number += 1
        folder = root / f"{name}-{number}"
    return folder


def read_run(folder: Path) -> Config:
    """Read the configuration of a run folder.

    Raises:
        ConfigError: If the folder holds no run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml")
    return parse_config(read_yaml(path))


def save_evaluation(path: Path, result: Evaluation) -> None:
    """Save scores, health and the images that reports show."""
    shown = shown_rows(result)
    arrays = {f"score.{name}": values for name, values in result.scores.items()}
    partial = path.with_suffix(".partial.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        partial,
        images=result.images[[row * result.num_seeds for row in shown]].numpy(),
        texts=np.array(result.prompts.texts),
        groups=np.array(result.prompts.groups),
        health=json.dumps(result.health),
        num_seeds=result.num_seeds,
        **arrays,  # type: ignore[arg-type]
    )
    partial.replace(path)


def shown_rows(result: Evaluation) -> list[int]:
    """Choose prompts for the picture, one group after the other, repeatedly."""
    groups = np.array(result.prompts.groups)
    members = [list(np.flatnonzero(groups == g)) for g in dict.fromkeys(result.prompts.groups)]
    rows: list[int] = []
    while len(rows) < min(NUM_SHOWN, len(groups)):
        rows += [int(m.pop(0)) for m in members if m]
    return rows[:NUM_SHOWN]


def load_evaluation(path: Path) -> Evaluation:
    """Load what ``save_evaluation`` saved; images are only those shown."""
    with np.load(path) as file:
        labelled = zip(file["texts"].tolist(), file["groups"].tolist(), strict=True)
        scores = {k.removeprefix("score."): file[k] for k in file.files if k.startswith("score.")}
        return Evaluation(
            PromptSet(tuple(Prompt(text, group=group) for text, group in labelled)),
            int(file["num_seeds"]),
            scores,
            torch.from_numpy(file["images"]),
            json.loads(str(file["health"])),
        )


def train_run(
    config: Config,
    folder: Path,
    on_iteration: Callable[[Mapping[str, Any]], None],
    on_phase: Callable[[str], ProgressHook],
    on_start: Callable[[Reward], None] = lambda judge: None,
) -> dict[str, Any] | None:
    """Evaluate the base, train, evaluate again and report.

    Continues where an earlier call with the same folder stopped.

    Args:
        config: What to run.
        folder: The run directory.
        on_iteration: Called with every metrics record.
        on_phase: Called with the name of a long phase; returns its progress hook.
        on_start: Called with the judge once everything is loaded and checked.

    Returns:
        The summary, or None where the run was interrupted (all is saved).
    """
    started = time.perf_counter()
    trainer = build_trainer(config, folder)
    on_start(trainer.evaluator.judge)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.yaml", dump_config(config))
    trainer.on_iteration = on_iteration
    e = config.evaluation
    final = build_prompts(config, "final")
    if isinstance(trainer.policy, PipelinePolicy) and trainer.policy.embeddings:
        encode_ahead(trainer.policy, [*trainer.every_prompt(), *final], on_phase)
    base_file = folder / "evaluation" / "base.npz"
    if not base_file.exists():
        hook = on_phase(f"evaluating the base on {len(final)} held-out prompts")
        base = trainer.evaluate(final, e.final_seeds, e.seed, progress=hook)
        save_evaluation(base_file, base)
    if not trainer.run():
        return None
    hook = on_phase(f"evaluating the tuned model on {len(final)} held-out prompts")
    with trainer.averaged():
        tuned = trainer.evaluate(final, e.final_seeds, e.seed, progress=hook)
        trainer.policy.save(folder / "model")
    save_evaluation(folder / "evaluation" / "tuned.npz", tuned)
    minutes = (time.perf_counter() - started) / 60
    return write_report(config, folder, trainer.evaluator.judge, trainer.seconds, minutes)


def encode_ahead(
    policy: PipelinePolicy,
    prompts: Sequence[Prompt | str],
    on_phase: Callable[[str], ProgressHook],
) -> None:
    """Encode every prompt of a run to disk, and release the text encoders.

    One line is printed: how many were encoded, and how many were found.
    """
    cache = policy.embeddings
    assert cache is not None
    wanted = list(dict.fromkeys(policy.encoding_keys(prompts)))
    missing = [key for key in wanted if key not in cache]
    found = len(wanted) - len(missing)
    if missing:
        new = f"{len(missing)} prompt{'s' * (len(missing) > 1)}"
        others = f", {found} are there" if found else ""
        hook = on_phase(f"encoding {new} into {cache.folder}{others}")
        for number, _ in enumerate(policy.encode_new(missing), 1):
            hook(number, len(missing))
    else:
        unloaded = "" if policy.has_text_encoders else ", text encoders not loaded"
        hook = on_phase(f"found {found} encoded prompts in {cache.folder}{unloaded}")
        hook(found, found)
    policy.release_text_encoders()


def write_report(
    config: Config, folder: Path, judge: Reward, train_seconds: float, total_minutes: float
) -> dict[str, Any]:
    """Write summary.json, curves.png, samples.png and report.html; return the summary."""
    base = load_evaluation(folder / "evaluation" / "base.npz")
    tuned = load_evaluation(folder / "evaluation" / "tuned.npz")
    name, share = judge.name, is_share(judge)
    rows = accuracy_rows(base.by_group(name), tuned.by_group(name), base.clusters())
    records = read_metrics(folder / "metrics.jsonl")
    summary = {
        "name": config.name,
        "seed": config.seed,
        "judge": name,
        "share": share,
        **scores_of_summary(base, rows),
        **health_of_summary(base, tuned),
        "train_minutes": train_seconds / 60,
        "total_minutes": total_minutes,
        "iterations": len(records),
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    save_curves(folder / "curves.png", records, DEFAULT_PANELS if share else panels_of_score(name))
    save_samples(folder / "samples.png", base, tuned, judge)
    write_html(
        folder,
        page(config, folder, summary, rows),
        (folder / "config.yaml").read_text(),
        {
            "Same prompt, same noise: base and tuned": folder / "samples.png",
            "Training": folder / "curves.png",
        },
    )
    return summary


def scores_of_summary(base: Evaluation, rows: Sequence[AccuracyRow]) -> dict[str, Any]:
    """Return the judge's scores before and after, in all and by task."""
    overall = rows[-1]
    return {
        "prompts": len(base.prompts),
        "seeds_per_prompt": base.num_seeds,
        "base": overall.base,
        "tuned": overall.tuned,
        "difference": overall.difference.estimate,
        "difference_low": overall.difference.ends[0],
        "difference_high": overall.difference.ends[1],
        "too_few": overall.difference.too_few,
        "by_task": {
            row.task: {
                "base": row.base,
                "tuned": row.tuned,
                "difference": row.difference.estimate,
                "low": row.difference.ends[0],
                "high": row.difference.ends[1],
                "images": row.difference.n,
                "too_few": row.difference.too_few,
            }
            for row in rows
        },
    }


def health_of_summary(base: Evaluation, tuned: Evaluation) -> dict[str, Any]:
    """Return the image health before and after, and the figures outside their bands."""
    ratios = {k: tuned.health[k] / max(base.health[k], 1e-9) for k in base.health}
    outside = [k for k, r in ratios.items() if not HEALTH_BANDS[k][0] <= r <= HEALTH_BANDS[k][1]]
    return {
        "health_base": base.health,
        "health_tuned": tuned.health,
        "health_ratio": ratios,
        "health_bands": HEALTH_BANDS,
        "health_outside": outside,
    }


def save_samples(path: Path, base: Evaluation, tuned: Evaluation, judge: Reward) -> None:
    """Draw images of the base and the tuned model side by side, with the judge's marks."""
    shown = shown_rows(base)
    marks = {
        which: [bool(result.scores[judge.name][row, 0] > 0.5) for row in shown]
        for which, result in (("base", base), ("tuned", tuned))
    }
    save_comparison(
        path,
        {"base": base.images.float() / 255, "tuned": tuned.images.float() / 255},
        [base.prompts.texts[row] for row in shown],
        marks=marks if is_share(judge) else None,
    )


def page(
    config: Config, folder: Path, summary: Mapping[str, Any], rows: list[AccuracyRow]
) -> dict[str, Any]:
    """Return the content of the HTML page."""
    s, share = summary, summary["share"]
    health = [
        [k, f"{s['health_base'][k]:.4f}", f"{s['health_tuned'][k]:.4f}",
         f"{s['health_ratio'][k]:.2f}", f"{HEALTH_BANDS[k][0]} to {HEALTH_BANDS[k][1]}"]
        for k in s["health_ratio"]
    ]  # fmt: skip
    return {
        "title": f"{config.name}, seed {config.seed}",
        "subtitle": f"{s['iterations']} iterations in {s['train_minutes']:.1f} minutes",
        "headline": [
            {"label": "base", "value": score_text(s["base"], share)},
            {"label": "tuned", "value": score_text(s["tuned"], share)},
            {
                "label": "difference",
                "value": change_text(s["difference"], share) + (" points" if share else ""),
                "note": f"95 % interval: {interval_text(rows[-1].difference, share)}",
            },
        ],
        "tables": [
            {
                "title": f"{s['judge']} score by task, {s['prompts']} held-out prompts",
                "columns": list(HEADINGS),
                "rows": [list(accuracy_cells(row, share)) for row in rows],
                "note": "Same prompts and same initial noise before and after.",
            },
            {
                "title": "Image health",
                "columns": ["measure", "base", "tuned", "ratio", "band"],
                "rows": health,
                "note": "A ratio outside its band is a sign of reward hacking.",
            },
        ],
        "command": f"chunkgrpo train {folder / 'config.yaml'}",
        "files": [
            {"path": "model/", "what": "the tuned model, for stock diffusers"},
            {"path": "metrics.jsonl", "what": "one record per iteration"},
            {"path": "checkpoints/", "what": "to continue from"},
            {"path": "evaluation/", "what": "scores of every held-out image"},
        ],
    }


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
