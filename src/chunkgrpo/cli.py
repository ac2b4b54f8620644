# SPDX-License-Identifier: Apache-2.0
"""The command line. Everything heavy is imported inside the commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from chunkgrpo.rewards.protocol import Reward

app = typer.Typer(
    name="chunkgrpo",
    help="Post-train flow-matching text-to-image models with reinforcement learning: "
    "sample step by step, optimise chunk by chunk (Chunk-GRPO, arXiv:2510.21583).\n\n"
    "Start with `chunkgrpo train`: about five minutes on a laptop, nothing to download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
shapes_app = typer.Typer(help="The embedded world: pretrain its pipeline, train its CLIP.")
app.add_typer(shapes_app, name="shapes")

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, e.g. --set optimizer.learning_rate=5e-5."),
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.")]


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors of wrong input into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        typer.echo(f"chunkgrpo: {message}", err=True)
        raise typer.Exit(2) from None


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name (`chunkgrpo recipes`) or a .yaml file. "
            "[default: demo, or paper with --model]"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A diffusers pipeline: its folder or hub id.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts to train on and to judge by: a file or dataset.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="A reward: its name, package.module:function or http://host:port."),
    ] = None,
    set_: SetOption = None,
    chunks: Annotated[
        Path | None, typer.Option(help="Chunk settings, as `chunkgrpo chunks` writes them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with an interrupted run folder.")
    ] = None,
    async_rewards: Annotated[
        bool,
        typer.Option(
            "--async-rewards", help="Score images while later ones are rolled out; same results."
        ),
    ] = False,
) -> None:
    """Post-train a model; without arguments, the embedded one, in about five minutes.

    Ctrl-C ends after the iteration, saves, and says how to go on.
    """
    with clear_errors():
        from chunkgrpo.config import ConfigError, load_config

        if resume is not None:
            if set_ or out or chunks or async_rewards or model or prompts or reward:
                raise ConfigError(
                    "--resume takes no --set, --chunks, --out, --model, --prompts, --reward or "
                    "--async-rewards: a run keeps its settings"
                )
            from chunkgrpo.runs import read_run

            config, folder = read_run(resume), resume
        else:
            settings = chosen(model, prompts, reward, async_rewards) + (set_ or [])
            config = load_config(recipe or ("paper" if model else "demo"), settings, chunks)
            from chunkgrpo.runs import new_folder

            folder = out or new_folder(Path("runs"), config.name)
            if (folder / "config.yaml").exists():
                raise ConfigError(
                    f"{folder} holds a run already; go on with it by --resume {folder}, or "
                    "choose another --out"
                )
        from chunkgrpo.rewards.scoring import is_share
        from chunkgrpo.runs import train_run

        display = Display(config.iterations, config.sampling.prompts * config.sampling.group_size)

        def start(judge: Reward) -> None:
            display.share = is_share(judge)
            display.say(f"[bold]{config.name}[/bold], seed {config.seed}, into {folder}")

        summary = train_run(config, folder, display.iteration, display.phase, start)
    if summary is None:
        display.say(f"Stopped and saved. Go on with: chunkgrpo train --resume {folder}")
        return
    show_summary(display, summary, folder)


def chosen(
    model: str | None, prompts: str | None, rewards: Sequence[str] | None, async_rewards: bool
) -> list[str]:
    """Write the options of ``train`` that stand for settings as settings."""
    import json

    settings: list[str] = []
    if model:
        settings.append(f"model.path={model}")
    if prompts:
        settings += [f"prompts.train={prompts}", f"prompts.held_out={prompts}"]
    if rewards:
        listed = [{"name": name} for name in rewards]
        # What is trained is judged, too, unless a setting names another judge.
        settings += [
            f"rewards={json.dumps(listed)}",
            f"evaluation.reward={json.dumps(listed[0])}",
        ]
    if async_rewards:
        settings.append("async_rewards=true")
    return settings


def show_summary(display: Display, summary: Mapping[str, Any], folder: Path) -> None:
    """Print the end of a run: the table, health, time, and where everything is."""
    from chunkgrpo.report.statistics import Estimate
    from chunkgrpo.report.tables import AccuracyRow, accuracy_table, score_text

    rows = [
        AccuracyRow(
            task, r["base"], r["tuned"], Estimate(r["difference"], r["low"], r["high"], r["images"])
        )
        for task, r in summary["by_task"].items()
    ]
    title = (
        f"{summary['judge']} score on {summary['prompts']} held-out prompts, "
        f"{summary['seeds_per_prompt']} images each, same noise before and after"
    )
    share = summary["share"]
    display.console.print(accuracy_table(rows, title, share))
    ratios = ", ".join(f"{k} {v:.2f}" for k, v in summary["health_ratio"].items())
    outside = summary["health_outside"]
    verdict = f"outside its band: {', '.join(outside)}" if outside else "all within their bands"
    display.say(f"Image health, tuned over base: {ratios} ({verdict})")
    display.say(
        f"Training took {summary['train_minutes']:.1f} minutes, everything "
        f"{summary['total_minutes']:.1f}."
    )
    display.say(f"Pictures: {folder}/samples.png, {folder}/curves.png; page: {folder}/report.html")
    display.say(
        f"[bold]{score_text(summary['base'], share)} to {score_text(summary['tuned'], share)}"
        "[/bold]; "
        f"the tuned model is in {folder}/model"
    )


@app.command()
def sample(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    images: Annotated[int, typer.Option(min=1, max=64, help="How many images.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    out: Annotated[Path | None, typer.Option(help="PNG; in the run folder by default.")] = None,
) -> None:
    """Draw a prompt with the base and the tuned model side by side."""
    with clear_errors():
        from chunkgrpo.report.grids import save_comparison
        from chunkgrpo.runs import draw_both

        seeds = list(range(seed, seed + images))
        config, drawn = draw_both(run, prompt, seeds)
        marks = judge_marks(prompt, drawn) if config.model.path == "shapes" else None
        words = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())[:60]
        path = out or run / "drawn" / f"{words}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_comparison(path, drawn, [f"{prompt} (seed {s})" for s in seeds], marks=marks)
    if marks:
        for name, right in marks.items():
            typer.echo(f"{name}: {sum(right)} of {images} right")
    typer.echo(f"The picture is {path}")


def judge_marks(prompt: str, drawn: Mapping[str, Any]) -> dict[str, list[bool]] | None:
    """Say of each image whether it is right, where the embedded world knows the prompt."""
    from chunkgrpo.shapes.grammar import parse
    from chunkgrpo.shapes.verifier import verify_batch

    try:
        ask = parse(prompt).ask
    except ValueError as error:
        typer.echo(f"not judged: {error}", err=True)
        return None
    arrays = {name: images.permute(0, 2, 3, 1).numpy() for name, images in drawn.items()}
    return {
        name: [verdict.strict for verdict in verify_batch(array, [ask] * len(array))]
        for name, array in arrays.items()
    }


@app.command()
def evaluate(
    run: RunArgument,
    split: Annotated[
        str | None,
        typer.Option(help="Of the embedded world: train, held_out or held_out_pairs."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the noises; the run's own by default.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Score the model that the run started from instead.")
    ] = False,
) -> None:
    """Score the tuned model of a run on its held-out prompts again, or from other noises."""
    with clear_errors():
        from chunkgrpo.report.statistics import Estimate, bootstrap_interval
        from chunkgrpo.report.tables import score_text
        from chunkgrpo.rewards.scoring import is_share
        from chunkgrpo.runs import evaluate_run, read_run

        read_run(run)
        display = Display(0, 0)
        phase = display.phase(f"evaluating the {'base' if base else 'tuned'} model")
        result, judge = evaluate_run(run, phase, split, seed, base)
        display.close()
        from rich.table import Table

        name, share = judge.name, is_share(judge)

        def cells(e: Estimate) -> tuple[str, str, str]:
            span = f"{score_text(e.low, share)} to {score_text(e.high, share)}"
            return score_text(e.estimate, share), span, str(e.n)

        table = Table("task", "score", "95 % interval", "images", title=f"{name} score")
        clusters = result.clusters()
        for task, values in result.by_group(name).items():
            table.add_row(task, *cells(bootstrap_interval(values, clusters=clusters[task])))
        values = result.scores[name].ravel()
        labels = [i for i in range(len(result.prompts)) for _ in range(result.num_seeds)]
        table.add_row("[bold]all", *cells(bootstrap_interval(values, clusters=labels)))
        display.console.print(table)
    mean = score_text(result.mean(name), share)
    typer.echo(f"{mean} over {len(result.prompts)} prompts of {run}")


@app.command()
def export(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pipeline; RUN/pipeline by default.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the written weights: float32 or bfloat16.")
    ] = "float32",
) -> None:
    """Write the tuned model of a run as one whole pipeline; a LoRA is fused into its base.

    DiffusionPipeline.from_pretrained loads it, without peft and without this package.
    """
    with clear_errors():
        from chunkgrpo.runs import export_run

        folder = out or run / "pipeline"
        export_run(run, folder, dtype)
    typer.echo(f"The pipeline is in {folder}")


@app.command()
def chunks(
    model: Annotated[
        str | None,
        typer.Argument(
            help="'shapes', a pipeline folder or a hub id, the recipe's by default; or a recipe."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe or .yaml file whose prompts and schedule are used. [default: chunk-grpo]"
        ),
    ] = None,
    set_: SetOption = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to measure.")] = 8,
    seeds: Annotated[int, typer.Option(min=2, help="Trajectories of each prompt.")] = 4,
    rule: Annotated[
        str,
        typer.Option(
            help="Whose chunks to write: optimal, optimal-4, adaptive-forward, adaptive-backward, "
            "adaptive-central, equal or paper."
        ),
    ] = "optimal",
    out: Annotated[Path | None, typer.Option(help="Folder; runs/chunks by default.")] = None,
) -> None:
    """Measure how fast a model's trajectories move and propose where to cut them.

    Says whether the dynamics depend on the prompt, under the recipe's own sampler, the flow SDE,
    the Dance SDE and the ODE, and writes chunks.yaml, for `chunkgrpo train --chunks`, beside a
    picture of the curves. All steps are measured; where a recipe trains a window of them, chunks
    are proposed for the window, and where that moves, their sizes count from its start.
    """
    with clear_errors():
        from chunkgrpo.config import (
            ConfigError,
            build_prompts,
            build_sigmas,
            load_config,
            num_planned,
            resolve_model,
            window_places,
        )
        from chunkgrpo.recipes import method_names, recipe_names

        known = [*recipe_names(), *method_names()]
        if model is not None and (model in known or model.endswith((".yaml", ".yml"))):
            if recipe is not None:
                raise ConfigError(f"{model} and --recipe {recipe} are both recipes; name one")
            model, recipe = None, model
        recipe = recipe or "chunk-grpo"
        settings = ([f"model.path={model}"] if model else []) + (set_ or [])
        config = load_config(recipe, settings, check_chunks=False)
        check_can_cut(config, recipe)
        from chunkgrpo.profile import (
            RULES,
            Measurement,
            Window,
            print_profile,
            profile_policy,
            save_profile,
        )
        from chunkgrpo.runs import load_untrained, new_folder

        s, c, planned = config.sampling, config.chunks, num_planned(config)
        if rule not in RULES:
            raise ConfigError(f"unknown --rule {rule!r}; known: {', '.join(RULES)}")
        if rule == "paper" and planned != 16:
            raise ConfigError(
                "--rule paper needs 16 trained steps, which sampling.steps = 17 without a window "
                f"leaves; this recipe trains {planned}"
            )
        window = None
        if s.window.kind not in ("all", "chunk"):
            window = Window(s.window.size, window_places(config), s.window.prefix)
        texts = build_prompts(config, "train").texts[:prompts]
        policy = load_untrained(config, resolve_model(config.model.path))
        sigmas = build_sigmas(config, policy)
        display = Display(0, 0)
        samplers = samplers_of(config)
        number = f"{len(samplers)} samplers"
        hook = display.phase(f"measuring {len(texts)} prompts x {seeds} seeds, {number}")
        measurement = Measurement(
            texts, sigmas, seeds, c.distance, config.seed, batch_size=s.batch_size
        )
        profiles = profile_policy(
            policy, samplers, measurement, min_size=c.min_size, window=window, progress=hook
        )
        display.close()
        levels = sigmas.tolist()
        folder = out or new_folder(Path("runs"), "chunks")
        chosen = profiles[0].proposal(rule)
        title = f"{config.model.path}, {s.steps} steps, {len(texts)} prompts x {seeds} seeds, "
        title += c.distance
        title += f"; chunks of {window}" if window else ""
        choice = listed_again(config, chosen.plan)
        file = save_profile(folder, profiles, levels, rule, choice, title, c.distance)
        print_profile(display.console, profiles, levels, rule)
    for profile in profiles:
        typer.echo(f"{profile.name}: {profile.shares.sentence}.")
    if window:
        moves = len(window.places) > 1
        typer.echo(
            f"The recipe trains {window}; chunks are cut from its speed there, "
            + ("their sizes count from where it begins." if moves else "of these steps alone.")
        )
    if choice["selection"] != c.selection:
        typer.echo(
            f"The chunks that the recipe lists, {list(c.indices or ())}, are not those of the new "
            "ones; the choice is uniform now."
        )
    typer.echo(f"The curves are drawn in {folder}/dynamics.png")
    command = ["chunkgrpo", "train", recipe, "--chunks", str(file)]
    command += ["--model", model] if model else []
    decided = [f"chunks.{key}" for key in ("plan", "sizes", "selection", "indices", "refresh")]
    again = [each for each in set_ or [] if each.partition("=")[0] not in decided]
    command += [part for setting in again for part in ("--set", setting)]
    typer.echo(f"Train with: {shlex.join(command)}")


def check_can_cut(config: Any, recipe: str) -> None:
    """Refuse recipes that would have no use for the chunks, before anything is measured."""
    from chunkgrpo.config import ConfigError, branches

    if config.objective.algorithm != "chunk_grpo":
        raise ConfigError(
            f"recipe {recipe!r} trains by objective.algorithm {config.objective.algorithm!r}, on "
            "noised clean latents, and has no chunks; use another, such as chunk-grpo"
        )
    if config.sampling.window.indices:
        raise ConfigError(
            f"recipe {recipe!r} branches at chunks {list(branches(config))} of its "
            "own plan, which new chunks would renumber; add --set sampling.window.indices=[]"
        )
    if config.objective.outer_weights == "implicit":
        raise ConfigError(
            f"recipe {recipe!r} trains single steps with the weights of chunks, and new chunks "
            "would take their place; add --set objective.outer_weights=none --set "
            "objective.implicit_sizes=null"
        )


def samplers_of(config: Any) -> dict[str, Any]:
    """Return the samplers to compare: a recipe's own first, the others as published."""
    from chunkgrpo.config import make_kernel

    own = config.sampling.diffusion
    etas = {own: config.sampling.eta}
    etas |= {kind: eta for kind, eta in (("flow", 0.7), ("dance", 0.3)) if kind != own}
    names = {"flow": "flow SDE", "dance": "Dance SDE", "cps": "CPS"}
    found = {f"{names[kind]}, eta {eta:g}": make_kernel(kind, eta) for kind, eta in etas.items()}
    return found | {"ODE": make_kernel("ode", 0.0)}


def listed_again(config: Any, plan: Any) -> dict[str, Any]:
    """Return how to choose among new chunks, where a recipe lists those of its own plan.

    Listed are the chunks that hold the steps which the recipe trains. Of a plan that is measured
    first, or that does not fit the steps, these are unknown: then all are listed where all were,
    and else the choice becomes uniform.
    """
    from chunkgrpo.config import MEASURED_PLANS, build_plan, num_planned
    from chunkgrpo.core.chunks import ChunkPlan
    from chunkgrpo.profile import carried_indices

    c = config.chunks
    # Only measured plans can be refreshed.
    fixed = {"refresh": 0} if c.refresh else {}
    if c.selection != "listed":
        return {"selection": c.selection} | fixed
    old = ChunkPlan(c.sizes) if c.plan == "explicit" and c.sizes else None
    if old and set(c.indices or ()) == set(range(old.num_chunks)):
        return {"selection": "listed", "indices": list(range(plan.num_chunks))}
    if c.plan in MEASURED_PLANS or (old and old.num_steps != num_planned(config)):
        return {"selection": "uniform"} | fixed
    old = build_plan(config, lambda: plan)
    return {"selection": "listed", "indices": list(carried_indices(old, c.indices or (), plan))}


@app.command()
def plan(
    config: Annotated[
        str, typer.Argument(help="A recipe's name (`chunkgrpo recipes`) or a .yaml file.")
    ],
    set_: SetOption = None,
    chunks: Annotated[
        Path | None, typer.Option(help="Chunk settings, as `chunkgrpo chunks` writes them.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(help="Share of the accelerator's peak rate that is reached.")
    ] = 0.4,
    price: Annotated[
        float | None, typer.Option(help="Price of a GPU-hour, in any currency.")
    ] = None,
    gpus: Annotated[
        list[int] | None, typer.Option(help="Numbers of GPUs to compare; 1, 8 and 64 by default.")
    ] = None,
) -> None:
    """Say what a run will do and cost, before anything is loaded.

    The batch in plain words; operations by phase, memory, time and cost on common accelerators.
    Of the model only its config.json files are read.
    """
    with clear_errors():
        from rich.console import Console

        from chunkgrpo.config import load_config
        from chunkgrpo.plan import make_plan, print_plan

        found = make_plan(load_config(config, set_ or [], chunks))
        print_plan(Console(), found, utilisation, price, tuple(gpus or (1, 8, 64)))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe in full.")] = None,
) -> None:
    """List the recipes, or print one with every setting it implies."""
    with clear_errors():
        from chunkgrpo.recipes import recipe_names, recipe_summary

        if name is None:
            for each in recipe_names():
                typer.echo(f"{each:24} {recipe_summary(each)}")
            return
        from chunkgrpo.config import dump_config, load_config

        config = load_config(name)
        typer.echo(f"# {recipe_summary(name)}")
        typer.echo(dump_config(config))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Print this method's recipe.")] = None,
) -> None:
    """List the published methods: what each needs and costs; or print one's recipe.

    Every method is a recipe on the embedded model: `chunkgrpo train NAME` runs it.
    """
    with clear_errors():
        from chunkgrpo.config import unknown_name
        from chunkgrpo.methods import read_method, read_methods
        from chunkgrpo.recipes import method_names, recipe_path

        if name is not None:
            if name not in method_names():
                raise unknown_name("method", name, method_names())
            method = read_method(name)
            typer.echo(recipe_path(name).read_text().rstrip())
            cost = method.cost
            typer.echo(
                f"# costs: {cost.forwards} network rows an iteration: {cost.rollout} rolled out, "
                f"{cost.measured} measured, {cost.trained} trained (forward and backward); "
                f"{cost.rewards} images scored"
            )
            return
        from rich.console import Console
        from rich.table import Column, Table

        headings = ("what", "paper", "needs", "rows", "trained", "scored")
        table = Table(Column("method", no_wrap=True), *headings, box=None)
        for method in read_methods():
            cost = method.cost
            numbers = (str(cost.forwards), str(cost.trained), str(cost.rewards))
            table.add_row(method.name, method.summary, method.paper, method.needs, *numbers)
        console = Console()
        if not console.is_terminal:  # a file or a pipe: a line each
            console = Console(width=1000)
        console.print(table)
        typer.echo(
            "rows: network forwards an iteration; trained: how many of them go backward too; "
            "scored: images the reward sees. `chunkgrpo methods NAME` prints a recipe."
        )


@app.command("serve-reward")
def serve_reward(
    name: Annotated[
        str, typer.Argument(help="A reward's name, or package.module:function, as in a recipe.")
    ],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the reward, e.g. --option mode=strict."),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface; others than this need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8900,
    token: Annotated[
        str | None,
        typer.Option(envvar="CHUNKGRPO_REWARD_TOKEN", help="What clients must know."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most images a request.")] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 80,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Most pixels a request, all images together.")
    ] = 1 << 24,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 120.0,
) -> None:
    """Serve a reward over HTTP; train with it by naming http://HOST:PORT as a reward.

    Needs the packages of chunkgrpo[server].
    """
    with clear_errors():
        import yaml

        from chunkgrpo.rewards import make_reward
        from chunkgrpo.rewards.server import Limits, serve

        options = {}
        for assignment in option or []:
            key, separator, text = assignment.partition("=")
            if not separator:
                raise ValueError(f"--option {assignment!r} must look like key=value")
            options[key] = yaml.safe_load(text)
        limits = Limits(max_batch, max_megabytes << 20, max_pixels, timeout)
        reward = make_reward(name, options)

        def announce(address: str) -> None:
            typer.echo(f"Serving {reward.name} at {address}; Ctrl-C ends it.")

        serve(reward, host, port, token, limits, announce)


@shapes_app.command("pretrain")
def shapes_pretrain(
    out: Annotated[Path, typer.Option(help="Folder; running again goes on.")],
    scenes: Annotated[
        int | None, typer.Option(min=100, help="Scenes to render. [default: 80000]")
    ] = None,
    vae_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the autoencoder. [default: 2400]")
    ] = None,
    transformer_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the transformer. [default: 13000]")
    ] = None,
    guidance_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps that put guidance into the weights. [default: 0]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train the embedded pipeline from rendered scenes, as the shipped one was."""
    with clear_errors():
        from chunkgrpo.shapes.pretrain import PretrainSettings, pretrain

        settings = PretrainSettings(seed=seed)
        given = {
            "num_scenes": scenes,
            "vae_steps": vae_steps,
            "transformer_steps": transformer_steps,
            "guidance_steps": guidance_steps,
        }
        settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
        folder = pretrain(out, settings)
    typer.echo(f"The pipeline is in {folder}")


@shapes_app.command("train-clip")
def shapes_train_clip(
    out: Annotated[Path, typer.Option(help="Folder; running again goes on.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps. [default: 1500]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train the embedded world's CLIP, the reward `clip`, as the shipped one was."""
    with clear_errors():
        from chunkgrpo.shapes.pretrain.clip import ClipSettings, train_clip

        settings = ClipSettings(seed=seed)
        folder = train_clip(out, replace(settings, steps=steps) if steps else settings)
    typer.echo(f"The CLIP is in {folder}")


class Display:
    """Live progress on a terminal, plain lines elsewhere."""

    def __init__(self, iterations: int, images: int) -> None:
        from rich.console import Console

        self.console = Console()
        self.iterations, self.images = iterations, images
        self.progress: Any = None
        self.training: Any = None
        self.accuracy, self.share = "", True

    def say(self, text: str) -> None:
        """Print a line."""
        self.close()
        self.console.print(text, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """End the live part."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = self.training = None

    def _start(self, text: str, total: int) -> Any:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.close()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.progress.start()
        return self.progress.add_task(text, total=total)

    def phase(self, text: str) -> Callable[[int, int], None]:
        """Show a phase; return its progress hook."""
        if not self.console.is_terminal:
            self.say(text)
            return lambda done, total: None
        task = self._start(text, 1)

        def hook(done: int, total: int) -> None:
            self.progress.update(task, completed=done, total=total)

        return hook

    def iteration(self, record: Mapping[str, Any]) -> None:
        """Show one iteration."""
        number = record["iteration"]
        if "accuracy" in record:
            value = record["accuracy"]
            shown = f"{100 * value:.0f} %" if self.share else f"{value:.4g}"
            self.accuracy = f"  held out {shown}"
        text = (
            f"reward {record['reward_mean']:.3f}{self.accuracy}  "
            f"{record['images_per_second']:.0f} images/s"
        )
        if self.console.is_terminal:
            if self.training is None:
                self.training = self._start(text, self.iterations)
            self.progress.update(self.training, completed=number, description=text)
            return
        left = record["seconds"] / number * (self.iterations - number) / 60
        self.console.print(
            f"{number:4}/{self.iterations}  {text}  clip {record.get('clip_fraction', 0):.2f}  "
            f"grad {record['grad_norm']:.3f}  {left:.1f} min left",
            highlight=False,
            soft_wrap=True,
        )


def main() -> None:
    """Run the command line."""
    # An installed command does not look for modules where it is called; rewards of your own are.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("chunkgrpo: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
