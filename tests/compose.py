# SPDX-License-Identifier: Apache-2.0
"""Parts put together as tests need them: one call where the library composes several values."""

from dataclasses import fields

from chunkgrpo.algorithms.awm import AWM, AWMLoss
from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.algorithms.nft import DiffusionNFT, NFTLoss
from chunkgrpo.core.selection import UniformSelection
from chunkgrpo.credit import Credit
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import Checkpointing
from chunkgrpo.runtime.ema import Averaging
from chunkgrpo.runtime.finite import StopNonFinite
from chunkgrpo.runtime.optimizers import Optimization
from chunkgrpo.train.evaluating import Evaluator
from chunkgrpo.train.loop import Budget, Trainer


def rollout(
    policy,
    prompts,
    transition,
    sigmas,
    group_size,
    generator=None,
    *,
    seeds=None,
    progress=None,
    finished=None,
    **sampling,
):
    """Sample with a sampler made on the spot; ``sampling`` are fields of ``Sampler``."""
    return Sampler(transition, sigmas, **sampling).rollout(
        policy, prompts, group_size, generator=generator, seeds=seeds, progress=progress,
        finished=finished,
    )  # fmt: skip


def chunk_grpo(plan, transition, selection=None, **options):
    """Chunk-GRPO; options of its loss and of the algorithm may be mixed."""
    names = {each.name for each in fields(ChunkLoss)}
    loss = {name: options.pop(name) for name in list(options) if name in names}
    selection = UniformSelection() if selection is None else selection
    return ChunkGRPO(plan, transition, ChunkLoss(**loss), selection, **options)


def diffusion_nft(old=None, **loss):
    """DiffusionNFT with an old policy, or without."""
    return DiffusionNFT(NFTLoss(**loss), old)


def awm(average=None, **loss):
    """AWM with an averaged policy, or without."""
    return AWM(AWMLoss(**loss), average)


PARTS = {
    "credit": Credit, "optimization": Optimization, "averaging": Averaging, "budget": Budget,
    "checkpoints": Checkpointing,
}  # fmt: skip
RENAMED = {
    (Averaging, "decay"): "ema_decay",
    (Averaging, "warmup"): "ema_warmup",
    (Budget, "prompts"): "num_prompts",
    (Checkpointing, "every"): "checkpoint_every",
}


def trainer(
    policy,
    algorithm,
    sampler,
    prompts,
    rewards,
    held_out,
    judge,
    folder,
    *,
    watched=(),
    combine="sum",
    on_error="stop",
    quantise=False,
    on_iteration=None,
    on_nonfinite=None,
    **options,
):
    """A trainer whose parts are given whole (``credit=...``) or by their fields, mixed.

    Args:
        rewards: (reward, weight) pairs.
        options: Parts, or fields of them: ``iterations=3, learning_rate=1e-3, keep=0.5``. The
            average has ``ema_decay`` and ``ema_warmup``, the weights' warm-up is ``warmup``, and
            prompts a rollout are ``num_prompts``.
    """
    parts = {}
    for name, kind in PARTS.items():
        if name in options:
            parts[name] = options.pop(name)
            continue
        given = {}
        for each in fields(kind):
            short = RENAMED.get((kind, each.name), each.name)
            if short in options:
                given[each.name] = options.pop(short)
        parts[name] = kind(**given)
    assert not options, f"no part has these: {options}"
    scorer = Scorer(rewards, watched, combine, on_error, quantise=quantise)
    evaluator = Evaluator(
        held_out, judge, sampler.sigmas, scorer.everything, on_error == "drop", sampler.batch_size
    )
    made = Trainer(
        policy, sampler, algorithm, parts["credit"], scorer, prompts, evaluator, folder,
        parts["budget"], parts["optimization"], parts["averaging"], parts["checkpoints"],
        on_nonfinite=on_nonfinite or StopNonFinite(),
    )  # fmt: skip
    if on_iteration is not None:
        made.on_iteration = on_iteration
    return made
