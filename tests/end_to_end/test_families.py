# SPDX-License-Identifier: Apache-2.0
"""Learning on real pipelines of several families: images follow a reward of brightness."""

import pytest

import tiny_pipelines
from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.core import ChunkPlan, FlowDiffusion, OdeDiffusion, Transition
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.policies.pipeline import Adaptation
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rollout import rollout
from chunkgrpo.train import Trainer, TrainSettings

FLOW = Transition(FlowDiffusion(0.7))
PROMPTS = PromptSet(("a red star", "two circles"), ("all",) * 2)
FAMILIES = {
    "sd3": (tiny_pipelines.sd3, {"size": (32, 32), "guidance": 3.0, "max_sequence_length": 8}),
    "flux": (tiny_pipelines.flux, {"size": (16, 16), "guidance": 3.5, "max_sequence_length": 8}),
    "qwen_image": (tiny_pipelines.qwen_image, {"size": (16, 16), "guidance": 3.0}),
}


def brightness(policy, sigmas):
    """[24] of images sampled without noise, from the same first noise each time."""
    transition, seeds = Transition(OdeDiffusion()), list(range(24))
    trajectory = rollout(policy, PROMPTS.texts, transition, sigmas, 12, seeds=seeds)
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
    trainer = Trainer(
        policy=policy,
        transition=FLOW,
        algorithm=ChunkGRPO(
            ChunkPlan((1, 2)), FLOW, clip_low=1e-2, clip_high=1e-2, num_updates=2, micro_batch=24
        ),
        sigmas=sigmas,
        prompts=PROMPTS,
        rewards=[(reward, 1.0)],
        held_out=PROMPTS,
        judge=reward,
        folder=tmp_path / "run",
        settings=TrainSettings(
            iterations=20, num_prompts=2, group_size=8, learning_rate=2e-2, evaluate_every=0,
            checkpoint_every=20,
        ),
    )  # fmt: skip
    before = brightness(policy, sigmas)
    assert trainer.run()
    gained = sign * (brightness(policy, sigmas) - before)
    error = gained.std() / len(gained) ** 0.5
    print(f"{name}: {before.mean():.4f}, gained {gained.mean():.4f} +- {error:.4f}")
    assert gained.mean() > 5 * error
