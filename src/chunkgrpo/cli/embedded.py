# SPDX-License-Identifier: Apache-2.0
"""``chunkgrpo shapes``: training of the embedded world's models from scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from chunkgrpo.cli.common import clear_errors, echo, shapes_app


@shapes_app.command("pretrain")
def shapes_pretrain(
    out: Annotated[Path, typer.Option(help="Folder; running again continues.")],
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
        typer.Option(min=0, help="Steps of guidance distillation. [default: 0]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
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
    echo(f"The pipeline is in {folder}")


@shapes_app.command("train-clip")
def shapes_train_clip(
    out: Annotated[Path, typer.Option(help="Folder; running again continues.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps. [default: 1500]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train the embedded world's CLIP, the reward `clip`, as the shipped one was."""
    with clear_errors():
        from chunkgrpo.shapes.pretrain.clip import ClipSettings, train_clip

        settings = ClipSettings(seed=seed)
        folder = train_clip(out, replace(settings, steps=steps) if steps else settings)
    echo(f"The CLIP is in {folder}")
