# SPDX-License-Identifier: Apache-2.0
"""``chunkgrpo train``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from chunkgrpo.cli.common import (
    AllowCodeOption,
    ChunksOption,
    ModelOption,
    PromptsOption,
    RecipeArgument,
    RewardOption,
    SetOption,
    app,
    clear_errors,
    echo,
)
from chunkgrpo.cli.display import Display
from chunkgrpo.runtime.interrupts import EXIT_CODE, raising_on_signals

if TYPE_CHECKING:
    from chunkgrpo.config.files import Assignment
    from chunkgrpo.config.schema import Config
    from chunkgrpo.rewards.protocol import Reward


@app.command()
def train(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    prompts: PromptsOption = None,
    reward: RewardOption = None,
    set_: SetOption = None,
    chunks: ChunksOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder, with its settings; --set changes some of them."
        ),
    ] = None,
    async_rewards: Annotated[
        bool,
        typer.Option(
            "--async-rewards", help="Score images while later ones are sampled; same results."
        ),
    ] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Post-train a model; without arguments, the embedded one, in about five minutes.

    Ctrl-C, SIGTERM and SIGUSR1 end the run after the iteration, save it, and print how to continue;
    the exit code is 75 then. A second one ends it at once.
    """
    with clear_errors(), stopping_when_told():
        given = Overrides(model, prompts, reward, async_rewards, set_ or [])
        if resume is not None:
            config, folder = old_run(resume, recipe, given, chunks, out), resume
        else:
            config, folder = new_run(recipe or ("paper" if model else "demo"), given, chunks, out)
        with no_folder_if_nothing_begins(folder):
            run(config, folder)


@contextmanager
def no_folder_if_nothing_begins(folder: Path) -> Iterator[None]:
    """Remove a run's folder where it is still empty when a mistake ends the command."""
    try:
        yield
    except BaseException:
        for each in (folder, folder.parent):
            with suppress(OSError):
                each.rmdir()  # refuses a folder that holds anything
        raise


@contextmanager
def stopping_when_told() -> Iterator[None]:
    """End with one line where a signal comes before there is a run."""
    with raising_on_signals():
        try:
            yield
        except KeyboardInterrupt:
            echo("chunkgrpo: stopped while starting; nothing was begun", err=True)
            raise typer.Exit(EXIT_CODE) from None


@dataclass(frozen=True)
class Overrides:
    """The options of ``train`` that set settings.

    Attributes:
        model, prompts, rewards, async_rewards: The options themselves.
        settings: ``key=value`` of each ``--set``; they override the other options.
    """

    model: str | None
    prompts: str | None
    rewards: Sequence[str] | None
    async_rewards: bool
    settings: Sequence[str]

    def assignments(self) -> list[Assignment | str]:
        """Return the settings; paths and names are taken literally, not read as YAML."""
        from chunkgrpo.config.files import Assignment

        found: list[Assignment | str] = []
        if self.model:
            found.append(Assignment("model.path", self.model, "--model"))
        if self.prompts:
            keys = ("prompts.train", "prompts.held_out")
            found += [Assignment(key, self.prompts, "--prompts") for key in keys]
        if self.rewards:
            listed = [{"name": name} for name in self.rewards]
            found.append(Assignment("rewards", listed, "--reward"))
            # What is trained is judged, too, unless a setting names another judge.
            found.append(Assignment("evaluation.reward.name", self.rewards[0], "--reward"))
        if self.async_rewards:
            found.append(Assignment("async_rewards", True, "--async-rewards"))
        return [*found, *self.settings]


def new_run(
    recipe: str, given: Overrides, chunks: Path | None, out: Path | None
) -> tuple[Config, Path]:
    """Return the settings and the folder of a run that does not exist yet."""
    from chunkgrpo.config import ConfigError, load_config
    from chunkgrpo.runs import new_folder

    config = load_config(recipe, given.assignments(), chunks)
    folder = out or new_folder(Path("runs"), config.name)
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder} holds a run already; go on with it by --resume {folder}, or "
            "choose another --out"
        )
    return config, folder


def old_run(
    folder: Path, recipe: str | None, given: Overrides, chunks: Path | None, out: Path | None
) -> Config:
    """Return the settings that a run goes on with, its own and those that may change."""
    from chunkgrpo.config import ConfigError
    from chunkgrpo.config.files import read_chunks
    from chunkgrpo.runs import resumed_config

    for option, value in (("the recipe", recipe), ("--out", out)):
        if value is not None:
            raise ConfigError(
                f"--resume goes on in {folder} with that run's own settings, and {option} "
                f"{value} says otherwise; leave it out, or leave --resume out for a new run"
            )
    between = [] if chunks is None else read_chunks(chunks)
    return resumed_config(folder, [*between, *given.assignments()])


def run(config: Config, folder: Path) -> None:
    """Train, and print the results."""
    from chunkgrpo.rewards.scoring import is_share
    from chunkgrpo.runs import train_run

    display = Display(config.iterations, config.sampling.images)

    def start(judge: Reward) -> None:
        display.share = is_share(judge)
        display.say((config.name, "bold"), f", seed {config.seed}, into {folder}")

    with display:
        try:
            summary = train_run(
                config, folder, display.iteration, display.phase, start, display.say
            )
            if summary is not None:
                show_summary(display, summary, folder)
                return
        except KeyboardInterrupt:
            stopped(display, folder, "Stopped at once")
        stopped(display, folder, "Stopped and saved")


def stopped(display: Display, folder: Path, how: str) -> NoReturn:
    """Say how to go on with a run that was told to stop, and end the program."""
    if (folder / "config.yaml").exists():
        display.say(f"{how}. Go on with: chunkgrpo train --resume {folder}")
    else:
        display.say(f"{how}, before anything was begun.")
    raise typer.Exit(EXIT_CODE)


def show_summary(display: Display, summary: Mapping[str, Any], folder: Path) -> None:
    """Print the results: the table, image health, time, and the paths of the files."""
    from chunkgrpo.report.statistics import Estimate
    from chunkgrpo.report.tables import AccuracyRow, accuracy_table, score_text

    rows = [
        AccuracyRow(
            task,
            r["base"],
            r["tuned"],
            Estimate.of(r["difference"], r["low"], r["high"], r["images"], r["too_few"]),
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
        (f"{score_text(summary['base'], share)} to {score_text(summary['tuned'], share)}", "bold"),
        f"; the tuned model is in {folder}/model",
    )
