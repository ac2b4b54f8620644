# SPDX-License-Identifier: Apache-2.0
"""Rules between the sections of a configuration; those within a section are in its class.

Each function takes the whole configuration and raises :class:`ConfigError`, with the value, the
rule and the fix, before anything is loaded.
"""

from __future__ import annotations

import re

from chunkgrpo.config.derived import merged_steps, num_planned, num_trained
from chunkgrpo.config.forward_rules import check_forward
from chunkgrpo.config.schema import (
    ChunkGRPOObjective,
    Config,
    ConfigError,
    FullAdaptation,
    ModelConfig,
)
from chunkgrpo.config.section import at
from chunkgrpo.core.combination import COMBINATIONS
from chunkgrpo.core.learned import Learned
from chunkgrpo.core.names import check_name
from chunkgrpo.core.plan_rules import AdaptivePlan, ExplicitPlan, OptimalPlan, PaperPlan
from chunkgrpo.core.plans import PAPER_SIZES
from chunkgrpo.core.schedules import MergeEntropy, Native
from chunkgrpo.core.selection import ListedSelection
from chunkgrpo.core.step_weights import ChunkSizeWeights, ImplicitWeights
from chunkgrpo.core.subset import num_chosen
from chunkgrpo.core.windows import ChunkWindow, FixedWindow
from chunkgrpo.rewards import check_reward
from chunkgrpo.runtime.solvers import EulerTail
from chunkgrpo.shapes.grammar import TASKS

LEAST_WEIGHT = 1e-6
"""The largest weight of the rewards must not be smaller."""
LEAST_NOISE = 1e-4
"""Noise levels above 0 must not be smaller."""
DEVICE = re.compile(r"(auto|cpu|mps|(cuda|xpu)(:\d{1,3})?)\Z")
MAX_IMAGES = 10_000_000
"""Images of one rollout, and of one evaluation."""


def check(config: Config, chunks: bool = True) -> None:
    """Refuse incompatible settings.

    Args:
        config: The run.
        chunks: Whether the plan must fit the schedule; False where it is still to be found.

    Raises:
        ConfigError: With the rule and the fix.
    """
    check_sampling(config)
    check_updates(config)
    check_sources(config)
    check_held(config)
    check_rewards(config)
    if not isinstance(config.objective, ChunkGRPOObjective):
        check_forward(config, config.objective)
        return
    check_transition(config)
    check_window(config, config.objective)
    if chunks:
        check_plan(config, config.objective)
        check_branches(config, config.objective)
        check_selection(config, config.objective)
        check_outer_weights(config, config.objective)
        check_neighbours(config, config.objective)


def check_sampling(config: Config) -> None:
    """Refuse noise that is none, and merged steps that do not fit the schedule."""
    s = config.sampling
    if isinstance(s.schedule, Native) and isinstance(s.merge, MergeEntropy):
        raise ConfigError(
            "sampling.merge of kind 'entropy' is worked out before the model is loaded, which "
            "sampling.schedule 'native' comes from; use schedule 'shifted', or list the merged "
            "steps: sampling.merge.kind sizes"
        )
    eta = getattr(s.transition, "eta", 0)
    if 0 < eta < LEAST_NOISE:
        raise ConfigError(
            f"sampling.transition.eta = {eta} is noise whose densities float32 cannot hold; "
            f"raise it to {LEAST_NOISE} at least; 0 is the ODE"
        )
    if not isinstance(s.schedule, Native):
        with at("sampling.schedule"):
            s.schedule.sigmas(s.steps)
    with at("sampling.merge"):
        num_trained(config)


def check_updates(config: Config) -> None:
    """Refuse more optimizer steps than samples."""
    s, o = config.sampling, config.objective
    if s.images > MAX_IMAGES:
        raise ConfigError(
            f"sampling.prompts x group_size = {s.prompts:,} x {s.group_size:,} images are sampled "
            f"before each update; at most {MAX_IMAGES:,} are possible; lower one"
        )
    if config.credit.keep * s.images < 1:
        raise ConfigError(
            f"credit.keep = {config.credit.keep} of the {s.images} images of a rollout (sampling."
            "prompts x group_size) is less than one; raise it"
        )
    if o.updates > s.images:
        raise ConfigError(
            f"objective.updates = {o.updates} share the {s.images} images of a rollout (sampling."
            "prompts x group_size), and each needs at least one; lower it"
        )


def check_rewards(config: Config) -> None:
    """Refuse rewards that do not exist or do not take their options, and weights without effect.

    All of them are looked at before the first is made, which may load a model.
    """
    listed = {f"rewards.{n}": each for n, each in enumerate(config.rewards)}
    watched = {f"watched_rewards.{n}": each for n, each in enumerate(config.watched_rewards)}
    for key, each in (listed | watched | {"evaluation.reward": config.evaluation.reward}).items():
        with at(key):
            check_reward(each.name, each.options)
    weights, combine = [reward.weight for reward in config.rewards], config.scoring.combine
    if max(abs(weight) for weight in weights) < LEAST_WEIGHT:
        raise ConfigError(
            f"the weight of {'each' if len(weights) > 1 else 'the only'} reward is 0 or next to "
            f"it, {weights[:5]}, so that nothing is trained; set a weight to another number"
        )
    if COMBINATIONS[combine].positive and min(weights) <= 0:
        raise ConfigError(
            f"scoring.combine {combine!r} needs positive weights of rewards, and they are "
            f"{weights[:5]}; use 'sum' to subtract a reward"
        )


def check_sources(config: Config) -> None:
    """Refuse settings of the embedded world for other prompts, and the reverse."""
    p, e = config.prompts, config.evaluation
    if not DEVICE.match(config.model.device):
        raise ConfigError(
            f"model.device = {config.model.device!r} is no device; use auto, cpu, cuda, cuda:1, "
            "mps or xpu"
        )
    if e.final_prompts * e.final_seeds > MAX_IMAGES:
        raise ConfigError(
            f"evaluation.final_prompts x final_seeds = {e.final_prompts:,} x {e.final_seeds:,} "
            f"images; at most {MAX_IMAGES:,} are possible; lower one"
        )
    for key, tasks, which, source in (
        ("prompts.tasks", p.tasks, "prompts.train", p.train),
        ("evaluation.tasks", e.tasks, "prompts.held_out", p.held_out),
    ):
        if tasks is not None and not tasks:
            raise ConfigError(f"{key} is an empty list; set it to null for all tasks")
        with at(key):
            for task in tasks or ():
                check_name("task", task, TASKS)
        if tasks is not None and source != "shapes":
            raise ConfigError(
                f"{key} = {list(tasks)} are tasks of the embedded world, and {which} is "
                f"{source!r}; set it to null, or {which} to shapes"
            )
    if p.column is not None and p.train == p.held_out == "shapes":
        raise ConfigError(
            f"prompts.column = {p.column!r} names a field of records, and all prompts are those of "
            "the embedded world; set it to null, or name a file"
        )
    if config.model.adaptation.targets == ():
        raise ConfigError(
            "model.adaptation.targets is an empty list, which trains nothing; set it to null for "
            "the default, or name modules"
        )
    if (config.model.height is None) != (config.model.width is None):
        raise ConfigError("model.height and model.width must be given together")


def check_held(config: Config) -> None:
    """Refuse to project out as many scores as there are degrees of freedom: nothing would be left.

    The deviations of a group's images from their mean have one less than there are images.
    """
    held, s = config.credit.project_out, config.sampling
    if not held:
        return
    if len(held) >= s.group_size - 1:
        raise ConfigError(
            f"credit.project_out lists {len(held)} scores, and a group of sampling.group_size = "
            f"{s.group_size} images has {s.group_size - 1} degrees of freedom, so that nothing "
            f"would be left to learn; raise sampling.group_size to {len(held) + 2} or more, or "
            "list fewer"
        )
    trained = num_chosen(s.images, config.credit.keep, config.objective.updates)
    if len(held) >= trained:
        raise ConfigError(
            f"credit.project_out lists {len(held)} scores, and credit.keep = {config.credit.keep} "
            f"leaves {trained} samples to train on, so that nothing would be left to learn; raise "
            "credit.keep, or list fewer"
        )


def check_training(model: ModelConfig) -> None:
    """Refuse a precision that loses the gradient, and offloading of parts that do not exist."""
    if model.precision == "fp16":
        raise ConfigError(
            "model.precision 'fp16' is for sampling alone: in training small gradients become 0, "
            "as there is no loss scaling; set it to 'bf16'"
        )
    if "reference" in model.offload and not isinstance(model.adaptation, FullAdaptation):
        raise ConfigError(
            "model.offload 'reference' is the frozen copy of model.adaptation 'full'; the "
            "reference of a LoRA is the model itself: take it out"
        )


def check_transition(config: Config) -> None:
    """Refuse steps without a density."""
    t = config.sampling.transition
    if not t.has_density:
        raise ConfigError(
            f"sampling.transition {t.kind!r}{' with eta 0' if t.kind != 'ode' else ''} has no "
            "density, and objective.kind 'chunk_grpo' needs that of every trained step; use "
            "'flow' or 'dance' with eta above 0 (0.7 is published), or objective.kind "
            "'diffusion_nft' or 'awm'"
        )


def check_window(config: Config, objective: ChunkGRPOObjective) -> None:
    """Refuse a window outside the trainable steps, and settings that only a window would read."""
    s, window = config.sampling, objective.window
    with at("objective.window"):
        planned = window.num_planned(num_trained(config))
    if isinstance(window, ChunkWindow):
        if not s.same_noise:
            raise ConfigError(
                "objective.window of kind 'chunk' compares images that branch from one state, so a "
                "group must start from one noise; set sampling.same_noise to true"
            )
        return
    whole = planned == num_trained(config)
    fixed_first = isinstance(window, FixedWindow) and window.start == 0
    if s.prefix != "ode" and (whole or fixed_first):
        raise ConfigError(
            f"sampling.prefix {s.prefix!r} is for steps before objective.window, and there are "
            "none; set it to ode, or choose a later window"
        )
    if not isinstance(s.tail, EulerTail) and whole:
        raise ConfigError(
            f"sampling.tail {s.tail.kind!r} is for steps after objective.window, which is all "
            "steps here; set it to euler, or choose a window"
        )


def check_plan(config: Config, objective: ChunkGRPOObjective) -> None:
    """Refuse a plan that does not cover its steps, or is measured for a window that moves."""
    plan, window, planned = objective.plan, objective.window, num_planned(config)
    if isinstance(plan, ExplicitPlan) and sum(plan.sizes) != planned:
        listed = ", ".join(map(str, plan.sizes))
        if window.kind in ("all", "chunk"):
            why = f"sampling.steps = {config.sampling.steps} leaves {planned} trained steps"
            fix = f"sampling.steps to {sum(plan.sizes) + 1}"
        else:
            why = f"objective.window of kind {window.kind!r} trains {planned} steps"
            fix = f"objective.window.size to {sum(plan.sizes)}"
        raise ConfigError(
            f"objective.plan.sizes ({listed}) sum to {sum(plan.sizes)}, but {why}; change a chunk "
            f"or set {fix}"
        )
    if isinstance(plan, PaperPlan) and planned != sum(PAPER_SIZES):
        raise ConfigError(
            f"objective.plan 'paper' is {list(PAPER_SIZES)} and needs sampling.steps = 17 (and no "
            f"window), {sum(PAPER_SIZES)} trained steps, not {planned}; use plan 'explicit' with "
            f"sizes that sum to {planned}"
        )
    if isinstance(plan, AdaptivePlan | OptimalPlan):
        if window.kind in ("random", "sliding"):
            raise ConfigError(
                f"objective.plan of kind {plan.kind!r} is cut from the dynamics of steps that "
                f"stay, but objective.window of kind {window.kind!r} moves; give sizes that sum to "
                "the window's size (`chunkgrpo chunks` proposes them)"
            )
        count = plan.num_chunks_of(planned)
        most = planned // plan.min_size
        if not 1 <= (count or 1) <= most and plan.kind == "optimal":
            raise ConfigError(
                f"objective.plan.num_chunks = {count} with min_size = {plan.min_size}: the "
                f"{planned} trained steps can be cut into at most {most} chunks of that size; "
                "lower one of the two"
            )
        return
    with at(f"objective.plan of kind {plan.kind!r}"):
        plan.num_chunks_of(planned)


def check_branches(config: Config, objective: ChunkGRPOObjective) -> None:
    """Refuse branching at chunks that the plan does not have, or may lose when it is cut anew."""
    plan, window = objective.plan, objective.window
    if not isinstance(window, ChunkWindow) or not window.indices:
        return
    trained = num_trained(config)
    count = plan.num_chunks_of(trained)
    if window.indices == "merged" and count != trained:
        raise ConfigError(
            f"objective.window.indices 'merged' are sampler steps, and objective.plan of kind "
            f"{plan.kind!r} has chunks of several; use plan 'steps', or list chunks"
        )
    found = merged_steps(config) if isinstance(window.indices, str) else window.indices
    if count is None and plan.refresh:
        raise ConfigError(
            f"objective.window.indices = {list(found)} lists chunks, whose number "
            f"objective.plan.refresh = {plan.refresh} may change; give objective.plan.num_chunks, "
            "set refresh to 0, or branch at all: indices []"
        )
    if count is not None and not 0 <= min(found) <= max(found) < count:
        raise ConfigError(
            f"objective.window.indices = {list(found)}, but the plan of kind {plan.kind!r} has "
            f"chunks 0 to {count - 1}; branch at these only"
        )


def check_selection(config: Config, objective: ChunkGRPOObjective) -> None:
    """Refuse a selection that does not fit the plan, the window or the loss."""
    o, selection, plan = objective, objective.selection, objective.plan
    if isinstance(selection, Learned | ListedSelection) and isinstance(o.window, ChunkWindow):
        raise ConfigError(
            "objective.window of kind 'chunk' draws one chunk an iteration itself, which leaves "
            f"nothing for objective.selection {selection.kind!r} to choose; use 'uniform' with "
            "fraction 1 (objective.window.indices lists chunks to draw from)"
        )
    if isinstance(selection, Learned):
        if selection.usefulness == "reward" and o.updates < 2:
            raise ConfigError(
                "objective.selection.usefulness 'reward' is measured on the samples of later "
                "updates, and objective.updates is 1; set it to 2 or more, or use 'gradient'"
            )
        if selection.usefulness == "gradient" and o.kl.weight:
            raise ConfigError(
                "objective.selection.usefulness 'gradient' measures the gradient of each chunk's "
                f"loss, and objective.kl of weight {o.kl.weight} would add that of the pull to the "
                "base; set objective.kl to none, or use 'reward'"
            )
        if plan.refresh:
            raise ConfigError(
                "objective.selection 'learned' knows its chunks by number, and "
                f"objective.plan.refresh = {plan.refresh} would change what they are; set it to 0"
            )
    if not isinstance(selection, ListedSelection):
        return
    count = plan.num_chunks_of(num_planned(config))
    if count is None and plan.refresh:
        raise ConfigError(
            "objective.selection 'listed' needs a number of chunks that objective.plan.refresh "
            "does not change: give objective.plan.num_chunks, or set refresh to 0"
        )
    if count is not None and max(selection.indices) >= count:
        raise ConfigError(
            f"objective.selection.indices = {list(selection.indices)}, but the plan of kind "
            f"{plan.kind!r} has chunks 0 to {count - 1}; list only these"
        )


def check_outer_weights(config: Config, objective: ChunkGRPOObjective) -> None:
    """Refuse weights by chunk sizes that do not fit the steps."""
    weights, planned = objective.outer_weights, num_planned(config)
    if not isinstance(weights, ChunkSizeWeights | ImplicitWeights):
        return
    if isinstance(objective.window, ChunkWindow):
        raise ConfigError(
            f"objective.outer_weights {weights.kind!r} weighs chunks against one another, and "
            "objective.window of kind 'chunk' trains one an iteration; set the weights to 'none', "
            "or use another window"
        )
    if not isinstance(weights, ImplicitWeights):
        return
    if sum(weights.sizes) != planned:
        raise ConfigError(
            f"objective.outer_weights.sizes = {list(weights.sizes)} must be the sizes of chunks "
            f"that cover the {planned} trained steps, each at least 1 and {planned} in all, and "
            f"they sum to {sum(weights.sizes)}; name the sizes whose weights the steps are to have"
        )
    if objective.plan.num_chunks_of(planned) != planned:
        raise ConfigError(
            "objective.outer_weights 'implicit' gives single steps the weights that chunks have "
            f"anyhow, and objective.plan is of kind {objective.plan.kind!r}; use plan 'steps', or "
            "set the weights to 'none'"
        )


def check_neighbours(config: Config, objective: ChunkGRPOObjective) -> None:
    """Refuse temporal consistency of neighbouring chunks if there is only one chunk."""
    count = objective.plan.num_chunks_of(num_planned(config))
    alone = isinstance(objective.window, ChunkWindow) or count == 1
    if objective.consistency > 0 and alone:
        raise ConfigError(
            "objective.consistency compares neighbouring chunks, and an iteration has one chunk "
            "here; set it to 0, or cut objective.plan into several"
        )
