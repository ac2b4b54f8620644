# SPDX-License-Identifier: Apache-2.0
"""Chunk-GRPO written by hand: the loop that ``chunkgrpo train`` runs."""

import torch

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.core import FlowDiffusion, ListedSelection, Transition, group_advantages, make_sigmas
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.core.trust import Clip
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.rewards import make_reward, score
from chunkgrpo.rollout import Sampler
from chunkgrpo.shapes import pipeline_path
from chunkgrpo.types import Experience

policy = load_policy(pipeline_path(), max_sequence_length=1)  # a LoRA on every attention
transition = Transition(FlowDiffusion(eta=1.0))
sampler = Sampler(transition, make_sigmas(num_steps=10), window=range(3, 6))  # noise in 3 steps
loss = ChunkLoss(trust=Clip(1e-3, 1e-3))
algorithm = ChunkGRPO(ChunkPlan((1, 2)), transition, loss, ListedSelection((0, 1)))
rewards = [(make_reward("shapes"), 1.0)]
prompts = ["a red square and a yellow circle", "three stars", "a cross above a circle"]
optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
generator = torch.Generator().manual_seed(0)
for iteration in range(40):
    trajectory = sampler.rollout(policy, prompts, group_size=24, generator=generator)
    images = policy.decode(trajectory.final)
    total = score(rewards, images, [p for p in prompts for _ in range(24)]).total
    experience = Experience(trajectory, group_advantages(total, len(prompts)).values)
    for part in algorithm.losses(policy, experience, generator):
        part.backward()
        if part.ends_update:
            optimizer.step()
            optimizer.zero_grad()
    print(f"iteration {iteration}: mean reward {total.mean():.3f}")
policy.save("runs/quickstart")  # for pipe.load_lora_weights
