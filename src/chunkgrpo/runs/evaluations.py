# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a run on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from chunkgrpo.evaluate import Evaluation
from chunkgrpo.prompts import PromptSet
from chunkgrpo.types import Prompt

NUM_SHOWN = 12


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
    with np.load(path, allow_pickle=False) as file:
        labelled = zip(file["texts"].tolist(), file["groups"].tolist(), strict=True)
        scores = {k.removeprefix("score."): file[k] for k in file.files if k.startswith("score.")}
        return Evaluation(
            PromptSet(tuple(Prompt(text, group=group) for text, group in labelled)),
            int(file["num_seeds"]),
            scores,
            torch.from_numpy(file["images"]),
            json.loads(str(file["health"])),
        )
