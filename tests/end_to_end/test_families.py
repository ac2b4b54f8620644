# SPDX-License-Identifier: Apache-2.0
"""Real pipelines of all families by the command line; several learn what a reward asks for."""

import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import compose
import tiny_pipelines
from chunkgrpo.cli import app
from chunkgrpo.core import ChunkPlan, FlowDiffusion, OdeDiffusion, Transition
from chunkgrpo.core.trust import Clip
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.policies.pipeline import Adaptation
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rollout import Sampler
from chunkgrpo.types import as_prompts

FLOW = Transition(FlowDiffusion(0.7))
PROMPTS = PromptSet(as_prompts(("a red star", "two circles")))
FAMILIES = {
    "sd3": (tiny_pipelines.sd3, {"size": (32, 32), "guidance": 3.0, "max_sequence_length": 8}),
    "flux": (tiny_pipelines.flux, {"size": (16, 16), "guidance": 3.5, "max_sequence_length": 8}),
    "qwen_image": (tiny_pipelines.qwen_image, {"size": (16, 16), "guidance": 3.0}),
}


def brightness(policy, sigmas):
    """[24] of images sampled without noise, from the same first noise each time."""
    transition, seeds = Transition(OdeDiffusion()), list(range(24))
    trajectory = compose.rollout(policy, PROMPTS.texts, transition, sigmas, 12, seeds=seeds)
    return policy.decode(trajectory.final).mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1], ids=["brighter", "darker"])
@pytest.mark.parametrize("name", FAMILIES)
def test_brightness_follows_its_reward(name, sign, tmp_path):
    build, options = FAMILIES[name]
    build().save_pretrained(tmp_path / "pipeline")
    policy = load_policy(
        tmp_path / "pipeline", Adaptation(rank=4, alpha=8.0), precision="fp32", **options
    )
    sigmas = policy.native_sigmas(4)
    reward = FunctionReward("brightness", lambda images, prompts: sign * images.mean((1, 2, 3)))
    trust = Clip(1e-2, 1e-2)
    algorithm = compose.chunk_grpo(ChunkPlan((1, 2)), FLOW, trust=trust, updates=2, micro_batch=24)
    trainer = compose.trainer(
        policy, algorithm, Sampler(FLOW, sigmas, same_noise=True, batch_size=96), PROMPTS,
        [(reward, 1.0)], PROMPTS, reward, tmp_path / "run", iterations=20, num_prompts=2,
        group_size=8, learning_rate=2e-2, evaluate_every=0, checkpoint_every=20,
    )  # fmt: skip
    before = brightness(policy, sigmas)
    assert trainer.run()
    gained = sign * (brightness(policy, sigmas) - before)
    error = gained.std() / len(gained) ** 0.5
    print(f"{name}: {before.mean():.4f}, gained {gained.mean():.4f} +- {error:.4f}")
    assert gained.mean() > 5 * error


FLUX2 = "model.options={text_encoder_out_layers: [1, 2, 3]}"
EVERY_FAMILY = {
    "sd3": (tiny_pipelines.sd3, 32, 8, 3.0, None),
    "flux": (tiny_pipelines.flux, 16, 8, 3.5, None),
    "flux2": (tiny_pipelines.flux2, 16, 160, 4.0, FLUX2),
    "flux2_klein": (tiny_pipelines.flux2_klein, 16, 64, 4.0, FLUX2),
    "qwen_image": (tiny_pipelines.qwen_image, 16, 64, 3.0, None),
    "z_image": (tiny_pipelines.z_image, 16, 48, 3.0, None),
    "lumina2": (tiny_pipelines.lumina2, 32, 64, 4.0, "model.options={system_prompt: Describe}"),
    "sana": (tiny_pipelines.sana, 32, 8, 4.5, "model.options={instruction: false}"),
}
"""Pipeline, side of images, text rows, guidance, and what else a tiny one needs."""


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_model_prompts_and_a_reward_are_enough(name, tmp_path):
    """The published settings, made small: a LoRA that moved, and a score before and after."""
    build, side, rows, guidance, more = EVERY_FAMILY[name]
    build().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a red star\ntwo circles\n")
    small = [
        "iterations=1", "threads=1", "sampling.steps=3", "sampling.prompts=2",
        "sampling.group_size=2", "objective.plan=steps", "objective.selection.fraction=1.0",
        "model.adaptation.rank=2",
        f"model.height={side}", f"model.width={side}", f"model.max_sequence_length={rows}",
        f"model.guidance={guidance}", "evaluation.every=0", *([more] if more else []),
    ]  # fmt: skip
    call = [
        "train", "--model", str(tmp_path / "pipeline"), "--prompts", str(tmp_path / "prompts.txt"),
        "--reward", "brightness", "--out", str(tmp_path / "run"),
        *(part for each in small for part in ("--set", each)),
    ]  # fmt: skip
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "encoding 2 prompts into" in " ".join(result.output.split())
    weights = load_file(tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors")
    # Half of each adapter starts as zeros; 2 updates at 1e-4 each move it by at most 2e-4.
    ups = {key: w for key, w in weights.items() if "lora_B" in key or "lora.up" in key}
    assert ups and len(weights) == 2 * len(ups)
    moved = [float(w.abs().max()) for w in ups.values()]
    assert 5e-5 < max(moved) < 2.5e-4 and sum(m > 0 for m in moved) > len(moved) / 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["prompts"] == 2 and 0 < summary["base"] < 1 and 0 < summary["tuned"] < 1
