# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the application, options, and errors in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from chunkgrpo import __version__
from chunkgrpo.plain_text import one_line, printable

# A wrong option, a wrong command: typer exports only what derives from it.
UsageError: Any = typer.BadParameter.__mro__[1]


class OneLineUsage(TyperGroup):
    """Commands whose wrong usage is answered with one line, like every other wrong input."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        """Read the options before the command."""
        with _one_line_usage():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        """Find the command, read its options, and call it."""
        with _one_line_usage():
            return super().invoke(ctx)


@contextmanager
def _one_line_usage() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        message = error.format_message()
        if not message.strip() or "\n" in message:  # no command at all: the help is the answer
            raise
        path = error.ctx.command_path if error.ctx else "chunkgrpo"
        echo(f"chunkgrpo: {one_line(message).removesuffix('.')}; see: {path} --help", err=True)
        raise typer.Exit(2) from None


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print a text; what a terminal would obey instead of showing is spelled out.

    Args:
        text: One line or more.
        err: Whether it goes to the standard error.
        nl: Whether a line end follows.
    """
    typer.echo(printable(text), err=err, nl=nl)


class PlainLog(logging.Handler):
    """Prints warnings of this package, each on one line; they may quote prompts and servers."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            echo(one_line(record.getMessage()), err=True)
        except Exception:
            self.handleError(record)


def show_warnings() -> None:
    """Print what this package logs, once, unless the program that calls it does so itself."""
    log = logging.getLogger("chunkgrpo")
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(PlainLog(logging.WARNING))


app = typer.Typer(
    name="chunkgrpo",
    cls=OneLineUsage,
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
        echo(f"chunkgrpo {__version__}")
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
    show_warnings()


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, e.g. --set optimizer.learning_rate=5e-5."),
]
RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        help="A recipe's name (`chunkgrpo recipes`) or a .yaml file. "
        "[default: demo, or paper with --model]"
    ),
]
ModelOption = Annotated[
    str | None, typer.Option(help="A diffusers pipeline: its folder or hub id.")
]
PromptsOption = Annotated[
    str | None, typer.Option(help="Prompts to train on and to evaluate with: a file or dataset.")
]
RewardOption = Annotated[
    list[str] | None,
    typer.Option(help="A reward: its name, package.module:function or http://host:port."),
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
        echo(f"chunkgrpo: {one_line(str(error))}", err=True)
        raise typer.Exit(2) from None
