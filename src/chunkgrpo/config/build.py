# SPDX-License-Identifier: Apache-2.0
"""From settings to the parts of a run: those that need a model, a schedule or a folder.

The other parts of the method are their own settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkgrpo.algorithms.awm import AWM
from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.nft import DiffusionNFT
from chunkgrpo.algorithms.protocol import Algorithm
from chunkgrpo.config.derived import merge_sizes, merged_steps, num_planned, num_trained
from chunkgrpo.config.paths import check_paths
from chunkgrpo.config.rules import check_training
from chunkgrpo.config.schema import (
    AWMObjective,
    ChunkGRPOObjective,
    Config,
    ConfigError,
    LoraAdaptation,
    ModelConfig,
    NFTObjective,
    RewardConfig,
    WatchedRewardConfig,
)
from chunkgrpo.core.dynamics import mean_curve
from chunkgrpo.core.learned import Learned
from chunkgrpo.core.names import check_name
from chunkgrpo.core.plan_rules import Curve
from chunkgrpo.core.schedules import TIMESTEP_ROUNDINGS, Native, merge_sigmas
from chunkgrpo.core.sde import OdeDiffusion, kernel_of
from chunkgrpo.core.windows import ChunkWindow, FixedWindow, WindowSchedule
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards import Scorer, make_reward
from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.rewards.scoring import check_prompts, is_groupwise
from chunkgrpo.rollout import Sampler, measured_speed
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.train.evaluating import Evaluator
from chunkgrpo.train.loop import Budget, Trainer

if TYPE_CHECKING:
    from chunkgrpo.policies.execution import Execution
    from chunkgrpo.policies.pipeline import PipelinePolicy
    from chunkgrpo.policies.protocol import Policy

PROBED = 64
"""Number of prompts that a measured plan is cut from."""


# --- the model ----------------------------------------------------------------------------------


def resolve_model(path: str) -> str:
    """Return the folder or hub id of a model name; ``~`` is the user's home."""
    if path != "shapes":
        return os.path.expanduser(path)
    from chunkgrpo.shapes import pipeline_path

    return str(pipeline_path())


def embedding_folder(model: ModelConfig) -> Path | None:
    """Return the folder of encoded prompts; None where text encoders stay loaded.

    ``auto`` is ``$CHUNKGRPO_CACHE/embeddings``, by default in ``~/.cache/chunkgrpo``.
    """
    if model.embedding_cache is None:
        return None
    if model.embedding_cache != "auto":
        return Path(model.embedding_cache).expanduser()
    if model.path == "shapes":  # its text encoders are smaller than a cache would be
        return None
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chunkgrpo"
    return Path(os.environ.get("CHUNKGRPO_CACHE") or user) / "embeddings"


def device_of(model: ModelConfig) -> str:
    """Return the device a model runs on."""
    if model.device != "auto":
        return model.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_machine(model: ModelConfig) -> None:
    """Refuse a device that this machine lacks, and a compiler that this torch lacks.

    Torch says the first while a model is moved there, and the second at its first call.

    Raises:
        ConfigError: With what there is.
    """
    kind, _, index = device_of(model).partition(":")
    module = getattr(torch, kind)
    count = module.device_count() if module.is_available() else 0
    if int(index or 0) >= count:
        raise ConfigError(
            f"model.device is {model.device!r}, and torch finds {count or 'no'} such "
            f"device{'s' * (count != 1)} here; use 'auto'"
        )
    if model.compile.kind == "blocks":
        from torch._dynamo import list_backends

        known = list_backends(exclude_tags=())
        check_name("model.compile.backend", model.compile.backend, known)


def text_encoder_dtype(model: ModelConfig) -> torch.dtype:
    """Return the type of the text encoders on the device the model runs on."""
    wanted = model.text_encoder_precision
    if wanted == "auto":
        wanted = "bf16" if device_of(model).startswith("cuda") else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def build_execution(model: ModelConfig, training: bool = True) -> Execution:
    """Return types and places of frozen weights, and kernels.

    Args:
        model: The settings.
        training: Whether a reference is needed.

    Raises:
        ValueError: If a name is unknown or a setting has no effect.
    """
    from chunkgrpo.policies.execution import Execution

    parts = tuple(part for part in model.offload if training or part != "reference")
    return Execution(
        lower_frozen=model.lower_frozen,
        text_dtype=text_encoder_dtype(model),
        offload=parts,
        attention_backend=model.attention_backend,
        compile=model.compile.backend if model.compile.kind == "blocks" else None,
        vae_slicing=model.vae_slicing,
        vae_tiling=model.vae_tiling,
    )


def policy_options(model: ModelConfig, training: bool = False) -> dict[str, Any]:
    """Return the options of a policy, for sampling unless told otherwise."""
    from chunkgrpo.policies.loading import check_options, family

    check_machine(model)
    if training:
        check_training(model)
    if model.options:
        module, attribute = family(resolve_model(model.path))
        check_options(getattr(import_module(module), attribute), model.options)
    return {
        "precision": model.precision,
        "guidance": model.guidance,
        "size": (model.height, model.width) if model.height and model.width else None,
        "max_sequence_length": model.max_sequence_length,
        "timestep": TIMESTEP_ROUNDINGS[model.timestep] if model.timestep else None,
        "negative_prompt": model.negative_prompt,
        "gradient_checkpointing": model.gradient_checkpointing,
        "execution": build_execution(model, training),
        **model.options,
    }


def build_policy(config: Config) -> PipelinePolicy:
    """Load the model as a policy."""
    from chunkgrpo.policies.loading import load_policy
    from chunkgrpo.policies.pipeline import Adaptation

    m, a = config.model, config.model.adaptation
    adaptation = Adaptation("full", targets=a.targets)
    if isinstance(a, LoraAdaptation):
        adaptation = Adaptation("lora", a.rank, a.alpha or a.rank, a.targets, seed=config.seed)
    return load_policy(
        resolve_model(m.path),
        adaptation,
        device_of(m),
        embedding_cache=embedding_folder(m),
        **policy_options(m, training=True),
    )


# --- sampling -----------------------------------------------------------------------------------


def build_sigmas(config: Config, policy: PipelinePolicy) -> Tensor:
    """Return the sampling schedule of a policy, [K+1] on the CPU."""
    s, sizes = config.sampling, merge_sizes(config)
    if isinstance(s.schedule, Native):
        sigmas = policy.native_sigmas(s.steps)
    else:
        sigmas = s.schedule.sigmas(s.steps)
    return merge_sigmas(sigmas, sizes) if sizes else sigmas


def build_sampler(config: Config, sigmas: Tensor) -> Sampler:
    """Return how images are rolled out; the window is the algorithm's choice."""
    s = config.sampling
    return Sampler(
        transition=kernel_of(s.transition),
        sigmas=sigmas,
        prefix=s.prefix,
        tail=s.tail.solver,
        same_noise=s.same_noise,
        store=s.store,
        batch_size=s.batch_size,
    )


# --- prompts and rewards ------------------------------------------------------------------------


def build_prompts(config: Config, which: str) -> PromptSet:
    """Return the prompts of training (``train``), of the small evaluations (``watch``) or of the
    final ones (``final``).

    The last two are disjoint where the held-out set is large enough.
    """
    from chunkgrpo.prompts import read_prompts, shapes_prompts

    p, e = config.prompts, config.evaluation
    if which == "train":
        if p.train == "shapes":
            return shapes_prompts("train", None, config.seed, p.tasks)
        return read_prompts(p.train, p.column)
    wanted = e.final_prompts + e.prompts
    if p.held_out == "shapes":
        found = shapes_prompts("held_out", wanted, e.seed, e.tasks)
    else:
        found = read_prompts(p.held_out, p.column)
    if which == "final":
        return found.head(e.final_prompts)
    rest = found[e.final_prompts :]
    return rest.head(e.prompts) if len(rest) else found.head(e.prompts)


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run.

    Attributes:
        scorer: Those that are trained on or watched.
        judge: The reward of the evaluations; one that is also trained on or watched is the same
            object, so that its model is loaded once.
    """

    scorer: Scorer
    judge: Reward

    @property
    def distinct(self) -> list[Reward]:
        """Every reward once, the judge last."""
        others = [r for r in self.scorer.everything if r is not self.judge]
        return [*others, self.judge]


def build_rewards(config: Config) -> Rewards:
    """Make the rewards.

    Raises:
        ValueError: If one cannot be made, two have one name, a weight does not fit, the judge
            compares groups, or ``credit.project_out`` names a reward that is not watched.
    """
    s = config.scoring
    listed: list[RewardConfig | WatchedRewardConfig] = [*config.rewards, *config.watched_rewards]
    made = [make_reward(each.name, each.options) for each in listed]
    trained = [(reward, each.weight) for reward, each in zip(made, config.rewards, strict=False)]
    scorer = Scorer(trained, made[len(trained) :], s.combine, s.on_error, quantise=s.quantise)
    names = [reward.name for reward in scorer.watched]
    for name in config.credit.project_out:
        if name not in names:
            raise ConfigError(
                f"credit.project_out names {name!r}, which is no watched reward; watched are "
                f"{', '.join(names) or 'none'}; add it to watched_rewards"
            )
    j = config.evaluation.reward
    same = [
        r for r, c in zip(made, listed, strict=True) if (c.name, c.options) == (j.name, j.options)
    ]
    judge = same[0] if same else make_reward(j.name, j.options)
    if is_groupwise(judge):
        raise ConfigError(
            f"reward {judge.name!r} compares the images of a group and cannot judge single ones; "
            "name another judge: evaluation.reward.name"
        )
    return Rewards(scorer, judge)


# --- the algorithm ------------------------------------------------------------------------------


def fixed_window(config: Config) -> range | None:
    """Return the planned steps where they never move; None where they are all."""
    w = getattr(config.objective, "window", None)
    return range(w.start, w.start + w.size) if isinstance(w, FixedWindow) else None


def curve_of(config: Config, policy: Policy, sampler: Sampler, prompts: PromptSet) -> Curve:
    """Return what measures a policy's dynamics, [N], averaged over samples."""
    fixed = replace(sampler, window=fixed_window(config), tail=None)
    probe = prompts.prompts[:PROBED]

    def curve(distance: str) -> Tensor:
        speed_BN = measured_speed(policy, probe, fixed, range(len(probe)), distance)
        return mean_curve(speed_BN).cpu()

    return curve


def build_window(config: Config, objective: ChunkGRPOObjective) -> WindowSchedule:
    """Return the schedule of windows, with merged steps found."""
    window = objective.window
    if isinstance(window, ChunkWindow) and window.indices == "merged":
        return replace(window, indices=merged_steps(config))
    return window


def build_algorithm(config: Config, policy: Policy, sampler: Sampler, curve: Curve) -> Algorithm:
    """Return the algorithm.

    Args:
        config: The run.
        policy: What is trained.
        sampler: Whose transition it shares.
        curve: Measures the policy's dynamics; called for measured plans only.
    """
    o, by_chunk = config.objective, config.credit.by_chunk
    by_ode = isinstance(config.sampling.transition, OdeDiffusion)
    if isinstance(o, NFTObjective):
        old = OldPolicy(policy.named_parameters(), o.old)
        return DiffusionNFT(o, old, by_chunk, by_ode)
    if isinstance(o, AWMObjective):
        named = policy.named_parameters()
        average = None if o.average is None else OldPolicy(named, o.average)
        return AWM(o, average, by_chunk, by_ode)
    cut = partial(o.plan.cut, num_planned(config), curve)
    return ChunkGRPO(
        plan=cut(),
        transition=sampler.transition,
        loss=o,
        selection=o.selection.make() if isinstance(o.selection, Learned) else o.selection,
        window=build_window(config, o),
        num_trained=num_trained(config),
        recut=cut if o.plan.refresh else None,
        refresh=o.plan.refresh,
    )


# --- the run ------------------------------------------------------------------------------------


def build_trainer(config: Config, folder: Path) -> Trainer:
    """Build everything a run needs; mistakes are reported before a model is loaded where possible.

    Raises:
        ConfigError: Or another ValueError, with one clear line.
    """
    check_machine(config.model)
    if config.threads:
        torch.set_num_threads(config.threads)
    check_paths(config)
    rewards = build_rewards(config)
    config.optimizer.make([torch.zeros(1)])  # refuses what is not installed
    train, watch = build_prompts(config, "train"), build_prompts(config, "watch")
    judged = build_prompts(config, "final")
    for reward in rewards.distinct:
        shown = [watch, judged] + ([train] if reward is not rewards.judge else [])
        check_prompts(reward, [prompt for each in shown for prompt in each.prompts])
    policy = build_policy(config)
    sampler = build_sampler(config, build_sigmas(config, policy))
    curve = curve_of(config, policy, sampler, train)
    s, e = config.sampling, config.evaluation
    return Trainer(
        policy=policy,
        sampler=sampler,
        algorithm=build_algorithm(config, policy, sampler, curve),
        credit=config.credit,
        scorer=rewards.scorer,
        prompts=train,
        evaluator=Evaluator(
            watch,
            rewards.judge,
            sampler.sigmas,
            rewards.scorer.everything,
            config.scoring.on_error == "drop",
            s.batch_size,
        ),
        folder=folder,
        budget=Budget(
            config.iterations,
            s.prompts,
            s.group_size,
            e.every,
            config.async_rewards,
            config.seed,
        ),
        optimization=config.optimizer,
        averaging=config.ema,
        checkpoints=config.checkpoints,
        with_model=isinstance(config.model.adaptation, LoraAdaptation),
        on_nonfinite=config.on_nonfinite,
    )
