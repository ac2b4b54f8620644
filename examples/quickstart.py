# SPDX-License-Identifier: Apache-2.0
"""Chunk-GRPO written by hand: the loop that ``chunkgrpo train`` runs."""

import torch

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.core import FlowDiffusion, Transition, explicit_plan, group_advantages, make_sigmas
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.rewards import make_reward, score
from chunkgrpo.rollout import rollout
from chunkgrpo.shapes import pipeline_path
from chunkgrpo.types import Experience

policy = load_policy(pipeline_path(), max_sequence_length=1)  # a LoRA on every attention
transition, sigmas = Transition(FlowDiffusion(eta=0.7)), make_sigmas(num_steps=10)
algorithm = ChunkGRPO(explicit_plan([1, 2, 2, 4], 9), transition, clip_low=5e-4, clip_high=5e-4)
rewards = [(make_reward("shapes"), 1.0)]
prompts = ["a red square and a yellow circle", "three stars", "a cross above a circle"]
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)
for iteration in range(20):
    trajectory = rollout(policy, prompts, transition, sigmas, 12, generator, same_noise=True)
    images = policy.decode(trajectory.final)
    total = score(rewards, images, [p for p in prompts for _ in range(12)]).total
    experience = Experience(trajectory, group_advantages(total, len(prompts)).values)
    for part in algorithm.losses(policy, experience, generator):
        part.loss.backward()
        if part.ends_update:
            optimizer.step()
            optimizer.zero_grad()
    print(f"iteration {iteration}: mean reward {total.mean():.3f}")
policy.save("runs/quickstart")  # for pipe.load_lora_weights
