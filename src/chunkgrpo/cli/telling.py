# SPDX-License-Identifier: Apache-2.0
"""Commands that describe runs: ``estimate``, ``config``, ``recipes`` and ``methods``."""

from __future__ import annotations

from typing import Annotated

import typer

from chunkgrpo.cli.common import AllowCodeOption, ChunksOption, SetOption, app, clear_errors, echo


@app.command("plan", hidden=True)
@app.command("estimate")
def estimate(
    config: Annotated[
        str, typer.Argument(help="A recipe's name (`chunkgrpo recipes`) or a .yaml file.")
    ],
    set_: SetOption = None,
    chunks: ChunksOption = None,
    utilisation: Annotated[
        float, typer.Option(help="Share of the accelerator's peak rate that is reached.")
    ] = 0.4,
    price: Annotated[
        float | None, typer.Option(help="Price of a GPU-hour, in any currency.")
    ] = None,
    gpus: Annotated[
        list[int] | None, typer.Option(help="Numbers of GPUs to compare. [default: 1, 8, 64]")
    ] = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Estimate what a run will do and cost, before anything is loaded.

    The batch in words; operations by phase, memory, time and cost on common accelerators.
    Of the model only its config.json files are read. (`chunkgrpo plan` is the same command.)
    """
    with clear_errors():
        from chunkgrpo.cli.estimates import print_estimate
        from chunkgrpo.cli.terminal import PlainConsole
        from chunkgrpo.config import load_config
        from chunkgrpo.estimate import make_estimate

        found = make_estimate(load_config(config, set_ or [], chunks))
        print_estimate(PlainConsole(), found, utilisation, price, tuple(gpus or (1, 8, 64)))


@app.command()
def config(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name (`chunkgrpo recipes`) or a .yaml file.")
    ] = "demo",
    set_: SetOption = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")
    ] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Print every setting of a recipe: its value, meaning, default, and where it was set."""
    with clear_errors():
        if schema:
            import json

            from chunkgrpo.config.describe import json_schema

            echo(json.dumps(json_schema(), indent=1))
            return
        from chunkgrpo.config import load_config
        from chunkgrpo.config.describe import described_yaml
        from chunkgrpo.config.files import load_tree

        found = load_config(recipe, set_ or [])
        echo(described_yaml(found, load_tree(recipe, set_ or [])), nl=False)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe in full.")] = None,
) -> None:
    """List the recipes, or print one with every setting it implies."""
    with clear_errors():
        from chunkgrpo.recipes import recipe_names, recipe_summary

        if name is None:
            for each in recipe_names():
                echo(f"{each:24} {recipe_summary(each)}")
            return
        from chunkgrpo.config import dump_config, load_config

        config = load_config(name)
        echo(f"# {recipe_summary(name)}")
        echo(dump_config(config))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Print this method's recipe.")] = None,
) -> None:
    """List the published methods: what each needs and costs; or print one's recipe.

    Every method is a recipe on the embedded model: `chunkgrpo train NAME` runs it.
    """
    with clear_errors():
        from chunkgrpo.core.names import unknown_name
        from chunkgrpo.methods import read_method, read_methods
        from chunkgrpo.recipes import method_names, recipe_path

        if name is not None:
            if name not in method_names():
                raise ValueError(unknown_name("method", name, method_names()))
            method = read_method(name)
            echo(recipe_path(name).read_text().rstrip())
            cost = method.cost
            echo(
                f"# costs: {cost.forwards} network rows per iteration: {cost.rollout:.0f} sampled, "
                f"{cost.measured:.0f} measured, {cost.trained:.0f} trained (forward and backward); "
                f"{cost.rewards:.0f} images scored"
            )
            return
        from rich.table import Column, Table

        from chunkgrpo.cli.terminal import PlainConsole

        headings = ("what", "paper", "needs", "rows", "trained", "scored")
        table = Table(Column("method", no_wrap=True), *headings, box=None)
        for method in read_methods():
            cost = method.cost
            numbers = (str(cost.forwards), f"{cost.trained:.0f}", f"{cost.rewards:.0f}")
            table.add_row(method.name, method.summary, method.paper, method.needs, *numbers)
        console = PlainConsole()
        if not console.is_terminal:  # a file or a pipe: a line each
            console = PlainConsole(width=1000)
        console.print(table)
        echo(
            "rows: network forwards per iteration; trained: how many of them go backward too; "
            "scored: images that are scored. `chunkgrpo methods NAME` prints a recipe."
        )
