# SPDX-License-Identifier: Apache-2.0
"""``chunkgrpo serve-reward``."""

from __future__ import annotations

from typing import Annotated

import typer

from chunkgrpo.cli.common import AllowCodeOption, app, clear_errors, echo


@app.command("serve-reward")
def serve_reward(
    name: Annotated[
        str, typer.Argument(help="A reward's name, or package.module:function, as in a recipe.")
    ],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the reward, e.g. --option mode=strict."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Network interface; any but the loopback needs a token.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8900,
    token: Annotated[
        str | None,
        typer.Option(envvar="CHUNKGRPO_REWARD_TOKEN", help="Token that clients must send."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Largest number of images per request.")
    ] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest request, in megabytes.")] = 80,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Largest number of pixels per request, all images together.")
    ] = 1 << 24,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 120.0,
    idle: Annotated[
        float, typer.Option(min=0.1, help="Seconds a connection may be silent in a request.")
    ] = 10.0,
    allow_code: AllowCodeOption = False,
) -> None:
    """Serve a reward over HTTP; train with it by naming http://HOST:PORT as a reward.

    Needs the packages of chunkgrpo[server].
    """
    with clear_errors():
        from chunkgrpo.config.yaml_files import YamlError, read_yaml_text
        from chunkgrpo.rewards import make_reward
        from chunkgrpo.rewards.requests import Limits
        from chunkgrpo.rewards.server import serve

        options = {}
        for assignment in option or []:
            key, separator, text = assignment.partition("=")
            if not separator:
                raise ValueError(f"--option {assignment!r} must look like key=value")
            try:
                options[key] = read_yaml_text(text)
            except YamlError as error:
                raise ValueError(f"--option {key}: the value is no YAML: {error}") from None
        limits = Limits(max_batch, max_megabytes << 20, max_pixels, timeout, idle=idle)
        reward = make_reward(name, options)

        def announce(address: str) -> None:
            echo(f"Serving {reward.name} at {address}; Ctrl-C ends it.")

        serve(reward, host, port, token, limits, announce)
