# SPDX-License-Identifier: Apache-2.0
"""Attacks on the numbers of a run: rates that diverge, images that are no images, scores that are
all alike, evaluations that say nothing. None may go on in silence, and nothing bad is written."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chunkgrpo.shapes.build import PipelineSize, build_pipeline

PART = "numbers"
# 64 x 64 pixels, as the verifier wants, but next to no weights.
SIZE = PipelineSize(
    width=32, layers=1, head_dim=16, clip_width=16, clip_layers=2, t5_width=32,
    vae_channels=(4, 4, 4, 4), latent_channels=4, latent_size=8,
)  # fmt: skip
SMALL = [
    "iterations=3", "sampling.prompts=3", "sampling.group_size=4", "objective.window=all",
    "sampling.tail=euler", "sampling.steps=5", "objective.plan.sizes=[1,3]",
    "objective.selection.indices=[0]", "evaluation.every=0", "evaluation.prompts=6",
    "evaluation.final_prompts=12", "checkpoints.every=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers") / "model"
    build_pipeline(SIZE).save_pretrained(folder)
    return folder


def command(model: Path, folder: Path, *settings: str) -> list[str]:
    """The command line of a small run."""
    given = [*SMALL, f"model.path={model}", *settings]
    options = [word for setting in given for word in ("--set", setting)]
    return [sys.executable, "-m", "chunkgrpo", "train", "demo", "--out", str(folder), *options]


def nothing_bad_in(folder: Path) -> None:
    """Assert that every number that a run has written is finite."""
    for path in folder.rglob("*.safetensors"):
        wrong = [name for name, value in load_file(path).items() if not value.isfinite().all()]
        assert not wrong, f"{path}: {wrong}"
    for path in folder.rglob("*.json*"):
        for line in path.read_text().splitlines():
            assert "NaN" not in line and "Infinity" not in line, path
    assert not (folder / "model").exists()


def through_a_pipe(words: list[str]) -> tuple[int, str, str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def on_a_terminal(words: list[str]) -> tuple[int, str, str]:
    """Run with a terminal as both streams."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not read:
            break
        text += read
    os.close(ours)
    said = text.decode(errors="replace").replace("\r", "")
    return running.wait(), said, said


@pytest.mark.parametrize("run", [through_a_pipe, on_a_terminal])
def test_a_rate_that_diverges_ends_in_one_line(attempt, full, small_model, tmp_path, run) -> None:
    # Refused as a setting, or stopped before a step: in either case nothing bad is written.
    cases = [("1e30", 2), ("1e30", 1), ("100", 2), ("100", 1)] if full else [("100", 2)]
    if run is through_a_pipe and not full:
        cases = [("1e30", 2)]
    for number, (rate, updates) in enumerate(cases):
        folder = tmp_path / f"{number}"
        with attempt(PART, f"optimizer.learning_rate={rate}, {run.__name__.replace('_', ' ')}"):
            settings = (f"optimizer.learning_rate={rate}", f"objective.updates={updates}")
            code, _, said = run(command(small_model, folder, *settings))
            assert code == 2, said
            last = said.strip().splitlines()[-1]
            assert "chunkgrpo: " in said and "Traceback" not in said
            assert "learning_rate" in said.replace("\n", "") and last.strip()
            nothing_bad_in(folder)
