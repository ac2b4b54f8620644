# SPDX-License-Identifier: Apache-2.0
"""A run on the stock pipeline's own schedule, from the first rollout to an exported pipeline."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import compose
import stock_sampling
import tiny_pipelines
from chunkgrpo.cli import app
from chunkgrpo.config import parse_config
from chunkgrpo.config.build import build_policy, build_sigmas
from chunkgrpo.core import OdeDiffusion, Transition
from chunkgrpo.core.schedules import Native
from chunkgrpo.runs import load_tuned, read_run

PROMPTS = ["a red star", "two circles"]
SEEDS = [3, 4]
STEPS = 5


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    tiny_pipelines.flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, model, tmp_path_factory) -> Path:
    """A finished run of two iterations, 16 x 24 pixels, with a LoRA of alpha other than rank."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("a red star\ntwo circles\na blue cross\n")
    settings = {
        "iterations": 2, "model.height": 16, "model.width": 24, "model.max_sequence_length": 8,
        "model.precision": "fp32", "model.guidance": 3.5, "model.adaptation.kind": request.param,
        "sampling.schedule": "native", "sampling.steps": STEPS, "sampling.prompts": 2,
        "sampling.group_size": 3, "objective.plan.kind": "equal", "objective.plan.size": 2,
        "objective.selection.fraction": 1.0, "optimizer.learning_rate": 0.02,
        "objective.trust.low": 0.1, "objective.trust.high": 0.1, "evaluation.every": 0,
    }  # fmt: skip
    if request.param == "lora":
        settings |= {"model.adaptation.rank": 4, "model.adaptation.alpha": 16}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    call(
        "train", "--model", str(model), "--prompts", str(folder / "prompts.txt"),
        "--reward", "brightness", "--out", str(folder / "run"), *given,
    )  # fmt: skip
    return folder / "run"


def flux_sigmas(steps: int, tokens: int) -> list[float]:
    """The published schedule of FLUX.1 dev: a shift of exp(mu), mu linear in the tokens."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    grid = [1 - i / steps for i in range(steps)]
    return [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in grid] + [0.0]


def test_the_schedule_follows_the_size(model):
    def sigmas(**sampling):
        values = {
            "model": {"path": str(model), "height": 16, "width": width, "precision": "fp32",
                      "max_sequence_length": 8},
            "sampling": {"steps": STEPS, **sampling},
        }  # fmt: skip
        config = parse_config(values)
        return build_sigmas(config, build_policy(config))

    for width in (16, 24, 64):
        tokens = (16 // 4) * (width // 4)
        expected = torch.tensor(flux_sigmas(STEPS, tokens))
        assert (sigmas(schedule="native") - expected).abs().max() < 1e-6
        merged = sigmas(schedule="native", merge={"kind": "sizes", "sizes": [1, 3, 1]})
        assert torch.equal(merged, sigmas(schedule="native")[[0, 1, 4, 5]])
        assert (sigmas() - expected).abs().max() > 0.05  # the default is another one


def test_a_run_trains_evaluates_and_samples_on_it(run):
    config, policy = load_tuned(run)
    assert build_sigmas(config, policy).tolist() == pytest.approx(flux_sigmas(STEPS, 24), abs=1e-6)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(len(record["l1_rel"]) == STEPS - 1 for record in records)
    summary = json.loads((run / "summary.json").read_text())
    words = " ".join(call("evaluate", str(run)).split())
    assert f"{summary['tuned']:.4g} over 3 prompts" in words
    call("sample", str(run), "a red star", "--images", "2")
    assert (run / "drawn" / "a-red-star.png").is_file()
    source = ["--recipe", str(run / "config.yaml"), "--out", str(run / "profile")]
    call("chunks", *source, "--prompts", "2", "--seeds", "2", "--rule", "equal")
    levels = json.loads((run / "profile" / "dynamics.json").read_text())[0]
    assert len(levels["mean"]) == STEPS - 1


def test_the_export_is_the_tuned_model_in_stock_diffusers(run, tmp_path):
    """In a fresh process, on the pipeline's default schedule, nothing of ours imported."""
    text = call("export", str(run), "--out", str(tmp_path / "whole"))
    assert str(tmp_path / "whole") in "".join(text.split("\n"))
    assert not list((tmp_path / "whole").rglob("*lora*"))
    config, policy = load_tuned(run)
    sigmas = build_sigmas(config, policy)
    trajectory = compose.rollout(
        policy, PROMPTS, Transition(OdeDiffusion()), sigmas, 1, seeds=SEEDS
    )
    noise = tmp_path / "noise.pt"
    torch.save(trajectory.states[:, 0].clone(), noise)
    jobs = [
        {
            "base": str(base), "lora": "", "prompts": PROMPTS, "noise": str(noise),
            "arguments": {
                "num_inference_steps": STEPS, "height": 16, "width": 24, "guidance_scale": 3.5,
                "max_sequence_length": 8,
            },
            "answer": str(tmp_path / f"{name}.pt"),
        }
        for name, base in (("whole", tmp_path / "whole"), ("base", config.model.path))
    ]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(stock_sampling.__file__)
    subprocess.run([sys.executable, script, tmp_path / "jobs.json"], check=True, timeout=600)
    latents, images = torch.load(tmp_path / "whole.pt")
    scale = trajectory.final.abs().max()
    assert (latents - trajectory.final).abs().max() <= 1e-5 * scale
    assert (images - policy.decode(trajectory.final)).abs().max() <= 1e-5
    base, _ = torch.load(tmp_path / "base.pt")
    assert (base - latents).abs().max() > 1e-3 * scale  # training did something


def test_an_export_in_bfloat16_is_half_the_size(run, tmp_path):
    assert read_run(run).sampling.schedule == Native()
    for dtype in ("float32", "bfloat16"):
        call("export", str(run), "--out", str(tmp_path / dtype), "--dtype", dtype)
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / dtype / "transformer").glob("*.safetensors"))
        for dtype in ("float32", "bfloat16")
    ]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    assert "is not empty" in call("export", str(run), "--out", str(tmp_path / "float32"), code=2)
    assert "float32, bfloat16" in call("export", str(run), "--dtype", "int8", code=2)
