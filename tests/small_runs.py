# SPDX-License-Identifier: Apache-2.0
"""Whole runs in a second or two: the command line in this process, on the tiny pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from chunkgrpo.cli import app
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.train.loop import Trainer

TIMES = ("seconds", "phase_seconds", "images_per_second", "train_minutes", "total_minutes")
SETTINGS = (
    "iterations=4", "sampling.prompts=2", "sampling.group_size=2", "sampling.steps=3",
    "objective.plan={kind: equal, size: 1}", "objective.selection=uniform",
    "objective.window=all", "sampling.tail=euler", "credit.keep=1.0", "credit.project_out=[]",
    "watched_rewards=[]", "evaluation.every=2",
    "evaluation.prompts=3", "evaluation.final_prompts=4", "evaluation.final_seeds=2",
    "evaluation.reward={name: brightness}", "rewards=[{name: brightness}]", "checkpoints.every=1",
    "model.adaptation=lora", "model.max_sequence_length=4", "model.precision=fp32",
    "model.embedding_cache=null", "optimizer.learning_rate=1e-2", "optimizer.warmup=0",
    "threads=1",
)  # fmt: skip


def settings_of(model, place):
    """Arguments of ``train`` for a run on a model, with prompts in a file in ``place``."""
    prompts = Path(place, "prompts.txt")
    if not prompts.exists():
        prompts.write_text("".join(f"a picture of {n} stars\n" for n in range(8)))
    given = [*SETTINGS, f"model.path={model}"]
    given += [f"prompts.{each}={prompts}" for each in ("train", "held_out")]
    return [part for each in given for part in ("--set", each)]


def call(*arguments):
    """Run the command line here; return the exit code and what it printed, errors last."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout + result.stderr


def trained(*arguments):
    """Run ``train``; it must succeed."""
    code, output = call("train", *arguments)
    assert code == 0, output
    return output


def stopped(iteration, *arguments):
    """Run ``train`` until it is told to stop in an iteration, which it finishes."""
    inner = Trainer.train_once

    def train_once(self):
        if self.iteration == iteration - 1:
            self.stop()
        return inner(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_once", train_once)
        code, output = call("train", *arguments)
    assert code == 75, output
    return output


def without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES}


def metrics(folder):
    """The records of a run, without times."""
    return [without_times(record) for record in read_metrics(folder / "metrics.jsonl")]


def results(folder):
    """What a finished run has learned, and how it was judged."""
    scores = {}
    for name in ("base", "tuned"):
        with np.load(folder / "evaluation" / f"{name}.npz") as file:
            scores |= {f"{name} {key}": file[key].tobytes() for key in file.files}
    summary = json.loads((folder / "summary.json").read_text())
    for key in (*TIMES, "iterations"):
        summary.pop(key, None)
    return {"model": weights(folder / "model"), "scores": scores, "summary": summary}


def weights(folder):
    """All tensors below a folder, as lists."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                found[str(path.relative_to(folder)), name] = file.get_tensor(name).tolist()
    assert found
    return found
