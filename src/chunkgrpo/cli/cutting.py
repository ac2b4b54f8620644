# SPDX-License-Identifier: Apache-2.0
"""``chunkgrpo chunks``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkgrpo.cli.common import AllowCodeOption, SetOption, app, clear_errors, echo
from chunkgrpo.cli.display import Display

if TYPE_CHECKING:
    from chunkgrpo.config.schema import ChunkGRPOObjective, Config
    from chunkgrpo.core.plans import ChunkPlan
    from chunkgrpo.core.sde import Kernel
    from chunkgrpo.profile import SamplerProfile, Window


@app.command()
def chunks(
    model: Annotated[
        str | None,
        typer.Argument(
            help="'shapes', a pipeline folder or a hub id (default: the recipe's); or a recipe."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe or .yaml file whose prompts and schedule are used. [default: chunk-grpo]"
        ),
    ] = None,
    set_: SetOption = None,
    prompts: Annotated[int, typer.Option(min=2, help="Number of prompts to measure.")] = 8,
    seeds: Annotated[int, typer.Option(min=2, help="Trajectories per prompt.")] = 4,
    rule: Annotated[
        str,
        typer.Option(
            help="Rule of the plan: optimal, optimal-4, adaptive-forward, adaptive-backward, "
            "adaptive-central, equal or paper."
        ),
    ] = "optimal",
    out: Annotated[Path | None, typer.Option(help="Folder; runs/chunks by default.")] = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Measure how fast a model's trajectories move, and propose plans.

    Says whether the dynamics depend on the prompt, under the recipe's own sampler, the flow SDE,
    the Dance SDE and the ODE, and writes chunks.yaml, for `chunkgrpo train --chunks`, beside a
    picture of the curves. All steps are measured; where a recipe trains a window of them, chunks
    are proposed for the window, and where that moves, their sizes count from its start.
    """
    with clear_errors():
        from chunkgrpo.config import ConfigError, load_config
        from chunkgrpo.config.files import Assignment
        from chunkgrpo.recipes import method_names, recipe_names

        known = [*recipe_names(), *method_names()]
        if model is not None and (model in known or model.endswith((".yaml", ".yml"))):
            if recipe is not None:
                raise ConfigError(f"{model} and --recipe {recipe} are both recipes; name one")
            model, recipe = None, model
        recipe = recipe or "chunk-grpo"
        named = [Assignment("model.path", model, "MODEL")] if model else []
        config = load_config(recipe, [*named, *(set_ or [])], check_chunks=False)
        check_can_cut(config, recipe)
        cut = measure(config, prompts, seeds, rule, out)
    say_where(cut)
    if cut.unlisted:
        echo(
            f"The chunks that the recipe lists, {list(cut.unlisted)}, do not refer to the new "
            "plan; the selection is uniform now."
        )
    echo(f"The curves are drawn in {cut.file.parent}/dynamics.png")
    command = ["chunkgrpo", "train", recipe, "--chunks", str(cut.file)]
    command += ["--model", model] if model else []
    decided = ("objective.plan", "objective.selection")
    again = [each for each in set_ or [] if not each.startswith(decided)]
    command += [part for setting in again for part in ("--set", setting)]
    echo(f"Train with: {shlex.join(command)}")


def say_where(cut: Cut) -> None:
    """Say what the speed depends on, and of which steps chunks are cut."""
    for profile in cut.profiles:
        echo(f"{profile.name}: {profile.shares.sentence}.")
    if cut.window:
        moves = len(cut.window.places) > 1
        echo(
            f"The recipe trains {cut.window}; chunks are cut from its speed there, "
            + ("their sizes count from where it begins." if moves else "of these steps alone.")
        )


@dataclass(frozen=True)
class Cut:
    """What was measured and proposed.

    Attributes:
        profiles: One for each sampler.
        window: Window of the plan; None: all steps.
        selection: The selection, as settings.
        file: ``chunks.yaml``.
        unlisted: Chunks that the recipe lists and the new choice does not.
    """

    profiles: Sequence[SamplerProfile]
    window: Window | None
    selection: dict[str, Any]
    file: Path
    unlisted: tuple[int, ...] = ()


def measure(config: Config, num_prompts: int, num_seeds: int, rule: str, out: Path | None) -> Cut:
    """Measure a model's dynamics, write what was found, and show it."""
    from chunkgrpo.config import ConfigError
    from chunkgrpo.config.build import build_prompts, build_sigmas, resolve_model
    from chunkgrpo.config.derived import num_planned
    from chunkgrpo.config.schema import chunk_objective
    from chunkgrpo.profile import (
        RULES,
        Measurement,
        print_profile,
        profile_policy,
        save_profile,
    )
    from chunkgrpo.runs import load_untrained, new_folder

    s, o, planned = config.sampling, chunk_objective(config), num_planned(config)
    if rule not in RULES:
        raise ConfigError(f"unknown --rule {rule!r}; known: {', '.join(RULES)}")
    if rule == "paper" and planned != 16:
        raise ConfigError(
            "--rule paper needs 16 trained steps, which sampling.steps = 17 without a window "
            f"leaves; this recipe trains {planned}"
        )
    window, distance = profiled_window(config), getattr(o.plan, "distance", "l1")
    probe = build_prompts(config, "train").prompts[:num_prompts]
    policy = load_untrained(config, resolve_model(config.model.path))
    sigmas, samplers = build_sigmas(config, policy), samplers_of(config)
    measurement = Measurement(probe, sigmas, num_seeds, distance, config.seed, s.batch_size)
    min_size = getattr(o.plan, "min_size", 4)
    with Display(0, 0) as display:
        hook = display.phase(
            f"measuring {len(probe)} prompts x {num_seeds} seeds, {len(samplers)} samplers"
        )
        profiles = profile_policy(
            policy, samplers, measurement, min_size=min_size, window=window, progress=hook
        )
    levels = sigmas.tolist()
    folder = out or new_folder(Path("runs"), "chunks")
    title = f"{config.model.path}, {s.steps} steps, {len(probe)} prompts x {num_seeds} seeds, "
    title += distance + (f"; chunks of {window}" if window else "")
    selection = selection_again(o, profiles[0].proposal(rule).plan, planned)
    file = save_profile(folder, profiles, levels, rule, selection, title, distance)
    print_profile(display.console, profiles, levels, rule)
    listed = getattr(o.selection, "indices", ())
    return Cut(profiles, window, selection, file, () if "indices" in selection else listed)


def profiled_window(config: Config) -> Window | None:
    """Return the window that plans are proposed for; None: all steps."""
    from chunkgrpo.config.derived import num_trained
    from chunkgrpo.config.schema import chunk_objective
    from chunkgrpo.core.windows import AllSteps, ChunkWindow
    from chunkgrpo.profile import Window

    window = chunk_objective(config).window
    if isinstance(window, AllSteps | ChunkWindow):
        return None
    return Window(window.size, window.starts_of(num_trained(config)), config.sampling.prefix)


def check_can_cut(config: Config, recipe: str) -> None:
    """Refuse recipes that do not use a plan, before anything is measured."""
    from chunkgrpo.config import ConfigError

    o = config.objective
    if o.kind != "chunk_grpo":
        raise ConfigError(
            f"recipe {recipe!r} trains by objective.kind {o.kind!r}, on noised clean latents, and "
            "has no chunks; use another, such as chunk-grpo"
        )
    if o.window.kind == "chunk" and o.window.indices:
        raise ConfigError(
            f"recipe {recipe!r} branches at chunks {o.window.indices} of its own plan, which new "
            "chunks would renumber; add --set objective.window.indices=[]"
        )
    if o.outer_weights.kind == "implicit":
        raise ConfigError(
            f"recipe {recipe!r} trains single steps with the weights of chunks, and new chunks "
            "would take their place; add --set objective.outer_weights=none"
        )


def samplers_of(config: Config) -> dict[str, Kernel]:
    """Return the samplers to compare: a recipe's own first, the others as published."""
    from chunkgrpo.core.sde import DanceDiffusion, FlowDiffusion, OdeDiffusion, kernel_of

    own = config.sampling.transition
    others = [each for each in (FlowDiffusion(0.7), DanceDiffusion(0.3)) if each.kind != own.kind]
    names = {"flow": "flow SDE", "dance": "Dance SDE", "cps": "CPS"}
    compared = [t for t in (own, *others) if not isinstance(t, OdeDiffusion)]
    found = {f"{names[t.kind]}, eta {t.eta:g}": kernel_of(t) for t in compared}
    return found | {"ODE": kernel_of(OdeDiffusion())}


def selection_again(objective: ChunkGRPOObjective, plan: ChunkPlan, planned: int) -> dict[str, Any]:
    """Return the selection among new chunks, as settings.

    Where a recipe lists chunks of its own plan, the new chunks with the same steps are listed.
    Where the recipe's plan is measured, or does not fit the steps, these are unknown: if it lists
    all chunks, all new ones are listed, and otherwise the selection becomes uniform.
    """
    import torch

    from chunkgrpo.profile import carried_indices

    former, rule = objective.selection, objective.plan
    if former.kind != "listed":
        return {"kind": former.kind}
    sizes = getattr(rule, "sizes", None)
    if sizes and set(former.indices) == set(range(len(sizes))):
        return {"kind": "listed", "indices": list(range(plan.num_chunks))}
    if rule.measured or (sizes and sum(sizes) != planned):
        return {"kind": "uniform"}
    old = rule.cut(planned, lambda distance: torch.ones(planned))
    return {"kind": "listed", "indices": list(carried_indices(old, former.indices, plan))}
