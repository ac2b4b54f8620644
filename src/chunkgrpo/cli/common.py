# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the application, options, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from chunkgrpo import __version__
from chunkgrpo.plain_text import one_line

app = typer.Typer(
    name="chunkgrpo",
    help="Post-train flow-matching text-to-image models with reinforcement learning: "
    "sample step by step, optimise chunk by chunk (Chunk-GRPO, arXiv:2510.21583).\n\n"
    "Start with `chunkgrpo train`: about five minutes on a laptop, no download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
shapes_app = typer.Typer(help="The embedded world: pretrain its pipeline, train its CLIP.")
app.add_typer(shapes_app, name="shapes")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chunkgrpo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the command line itself."""


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, e.g. --set optimizer.learning_rate=5e-5."),
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.")]
ChunksOption = Annotated[
    Path | None, typer.Option(help="File with a plan, as `chunkgrpo chunks` writes it.")
]


def _allow_code(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        from chunkgrpo.imported_code import code_allowed

        context.with_resource(code_allowed())
    return wanted


AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        callback=_allow_code,
        is_eager=True,
        help="Let settings name code outside the working directory and the installed packages.",
    ),
]


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors of wrong input into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"chunkgrpo: {one_line(str(error))}", err=True)
        raise typer.Exit(2) from None
