# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a run on disk, each with a seal: ``base.npz`` and ``base.json``.

The seal holds the SHA-256 of the file and what it is an evaluation of: digests of the prompts and
of the settings that cannot change in a run, the number of images per prompt, and the noise's seed.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkgrpo.config import Config
from chunkgrpo.config.changing import fixed_settings
from chunkgrpo.evaluate import Evaluation
from chunkgrpo.prompts import PromptSet
from chunkgrpo.runtime.files import atomic_write
from chunkgrpo.types import Prompt

NUM_SHOWN = 12


class EvaluationError(ValueError):
    """A saved evaluation that is damaged."""


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's JSON; what has none is taken by its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def prompts_digest(prompts: PromptSet) -> str:
    """Return the SHA-256 of everything that prompts say, in their order."""
    return digest_of(
        [[p.text, dict(p.metadata), p.negative_prompt, list(p.images), p.group] for p in prompts]
    )


def evaluation_identity(config: Config, final: PromptSet) -> dict[str, Any]:
    """Return what the evaluations before and after training are of, apart from the weights."""
    return {
        "prompts": prompts_digest(final),
        "images per prompt": config.evaluation.final_seeds,
        "seed": config.evaluation.seed,
        "settings": digest_of(fixed_settings(config.model_dump(mode="json"))),
    }


def save_evaluation(path: Path, result: Evaluation, identity: Mapping[str, Any]) -> None:
    """Save scores, health and the images that reports show, and the seal."""
    shown = shown_rows(result)
    arrays = {f"score.{name}": values for name, values in result.scores.items()}
    content = io.BytesIO()
    np.savez_compressed(
        content,
        images=result.images[[row * result.num_seeds for row in shown]].numpy(),
        texts=np.array(result.prompts.texts),
        groups=np.array(result.prompts.groups),
        health=json.dumps(result.health),
        num_seeds=result.num_seeds,
        **arrays,  # type: ignore[arg-type]
    )
    data = content.getvalue()
    atomic_write(path, data)
    seal = {"sha256": hashlib.sha256(data).hexdigest(), "of": dict(identity)}
    atomic_write(_seal_of(path), json.dumps(seal, indent=1) + "\n")


def evaluation_problem(path: Path, identity: Mapping[str, Any]) -> str | None:
    """Return why a saved evaluation cannot be used; None where it can.

    Args:
        path: The file.
        identity: What it must be an evaluation of.
    """
    try:
        _, seal = _sealed(path)
    except EvaluationError as error:
        return str(error)
    other = [key for key in identity if seal["of"].get(key) != identity[key]]
    return f"{path} is of other {other[0]}" if other else None


def _seal_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _sealed(path: Path) -> tuple[bytes, Mapping[str, Any]]:
    """Return a file's content, checked against its seal, and the seal."""
    seal = _seal_of(path)
    for each in (path, seal):
        if not each.is_file():
            raise EvaluationError(f"{each} is missing")
    try:
        data, found = path.read_bytes(), json.loads(seal.read_bytes())
        known = found["sha256"] if isinstance(found["of"], dict) else None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EvaluationError(f"{seal} is damaged") from None
    if hashlib.sha256(data).hexdigest() != known:
        raise EvaluationError(f"{path} is damaged: its SHA-256 is not that of {seal.name}")
    return data, found


def shown_rows(result: Evaluation) -> list[int]:
    """Choose prompts for the picture, one group after the other, repeatedly."""
    groups = np.array(result.prompts.groups)
    members = [list(np.flatnonzero(groups == g)) for g in dict.fromkeys(result.prompts.groups)]
    rows: list[int] = []
    while len(rows) < min(NUM_SHOWN, len(groups)):
        rows += [int(m.pop(0)) for m in members if m]
    return rows[:NUM_SHOWN]


def load_evaluation(path: Path) -> Evaluation:
    """Load what ``save_evaluation`` saved; images are only those shown.

    Raises:
        EvaluationError: If it is damaged.
    """
    data, _ = _sealed(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            labelled = zip(file["texts"].tolist(), file["groups"].tolist(), strict=True)
            scores = {
                k.removeprefix("score."): file[k] for k in file.files if k.startswith("score.")
            }
            return Evaluation(
                PromptSet(tuple(Prompt(text, group=group) for text, group in labelled)),
                int(file["num_seeds"]),
                scores,
                torch.from_numpy(file["images"]),
                json.loads(str(file["health"])),
            )
    except (
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise EvaluationError(f"{path} is no evaluation: {e}") from e
