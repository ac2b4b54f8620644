# SPDX-License-Identifier: Apache-2.0
"""``chunkgrpo doctor``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from chunkgrpo.cli.training import Overrides

if TYPE_CHECKING:
    from chunkgrpo.doctor import Finding

COLOURS = {"ok": "green", "warning": "yellow", "failure": "red", "skipped": "dim"}


@app.command()
def doctor(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    prompts: PromptsOption = None,
    reward: RewardOption = None,
    set_: SetOption = None,
    chunks: ChunksOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder that the run would be in; nothing is left there.")
    ] = Path("runs"),
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Examine a whole rollout, and overfit one prompt."),
    ] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Examine a run before it starts: whether it is the run that was asked for.

    Takes the options of `train`, and trains nothing. Every check prints what it measured, the
    bound, and what to do. `train` makes the same checks by itself.
    """
    with clear_errors():
        from chunkgrpo.cli.estimates import geometry
        from chunkgrpo.cli.terminal import PlainConsole
        from chunkgrpo.config import load_config
        from chunkgrpo.config.build import build_trainer
        from chunkgrpo.doctor import examine, in_words
        from chunkgrpo.estimate import make_estimate
        from chunkgrpo.runtime.lock import FolderLock

        given = Overrides(model, prompts, reward, False, set_ or [])
        config = load_config(recipe or ("paper" if model else "demo"), given.assignments(), chunks)
        console = PlainConsole()
        if not console.is_terminal:  # a file or a pipe: a line each
            console = PlainConsole(width=1000)
        for line in geometry(make_estimate(config)):
            console.print(line)
        if (out / "config.yaml").is_file():
            with FolderLock(out):  # refused where a process trains in it
                pass
        trainer = build_trainer(config, out)
        begun, d = time.perf_counter(), config.doctor
        findings = examine(trainer, config, thorough=thorough or d.thorough, skip=d.skip)
        console.print(table_of(findings))
        echo(f"{in_words(findings, time.perf_counter() - begun)}.")
        if any(each.status == "failure" for each in findings):
            raise typer.Exit(2)


def table_of(findings: Sequence[Finding]) -> object:
    """Return findings as a table; texts are shown as they are, never as markup."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("check", no_wrap=True), "", "measured", "expected", box=None)
    former = ""
    for each in findings:
        said = Text(each.measured)
        if each.advice and each.status in ("warning", "failure"):
            said.append(f"\n{each.advice}", style="italic")
        name = "" if each.name == former else each.name
        table.add_row(Text(name), Text(each.status, COLOURS[each.status]), said, Text(each.bound))
        former = each.name
    return table
