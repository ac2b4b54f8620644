# SPDX-License-Identifier: Apache-2.0
"""Commands on the tuned model of a run: ``sample``, ``evaluate`` and ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from chunkgrpo.cli.common import AllowCodeOption, RunArgument, app, clear_errors, echo
from chunkgrpo.cli.display import Display
from chunkgrpo.plain_text import one_line

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        help="A checkpoint instead: a number of iterations, last or best. "
        "[default: the finished model, or the last checkpoint of a run that is not finished]"
    ),
]


def tell(text: str) -> None:
    """Print a line beside the results."""
    echo(one_line(text), err=True)


@app.command()
def sample(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    images: Annotated[int, typer.Option(min=1, max=64, help="Number of images.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    out: Annotated[Path | None, typer.Option(help="PNG; in the run folder by default.")] = None,
    checkpoint: CheckpointOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Sample a prompt with the base and the tuned model, side by side."""
    with clear_errors():
        from chunkgrpo.report.grids import save_comparison
        from chunkgrpo.runs import draw_both, find_tuned

        seeds = list(range(seed, seed + images))
        tuned = find_tuned(run, checkpoint, tell)
        drawn = draw_both(tuned, prompt, seeds)
        marks = judge_marks(prompt, drawn) if tuned.config.model.path == "shapes" else None
        words = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())[:60]
        name = "-".join(each for each in (words, tuned.label) if each) or "prompt"
        path = out or run / "drawn" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_comparison(path, drawn, [f"{prompt} (seed {s})" for s in seeds], marks=marks)
    if marks:
        for name, right in marks.items():
            echo(f"{name}: {sum(right)} of {images} right")
    echo(f"The picture is {path}")


def judge_marks(prompt: str, drawn: Mapping[str, Any]) -> dict[str, list[bool]] | None:
    """Return whether each image is correct, if the prompt is one of the embedded world."""
    from chunkgrpo.shapes.grammar import parse
    from chunkgrpo.shapes.verifier import verify_batch

    try:
        ask = parse(prompt).ask
    except ValueError as error:
        echo(f"not judged: {error}", err=True)
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
        typer.Option(help="Prompts of the embedded world: train, held_out or held_out_pairs."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise; the run's own by default.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model instead.")] = False,
    checkpoint: CheckpointOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Score the tuned model of a run on its held-out prompts again, or from other noise."""
    with clear_errors():
        from chunkgrpo.report.statistics import Estimate, mean_estimate
        from chunkgrpo.report.tables import score_text
        from chunkgrpo.rewards.scoring import is_share
        from chunkgrpo.runs import evaluate_run, find_base, find_tuned

        if base and checkpoint is not None:
            raise ValueError("--base is the model before training, which has no checkpoint")
        model = find_base(run) if base else find_tuned(run, checkpoint, tell)
        with Display(0, 0) as display:
            phase = display.phase(f"evaluating the {'base' if base else 'tuned'} model")
            result, judge = evaluate_run(run, phase, split, seed, model)
        from rich.table import Table

        name, share = judge.name, is_share(judge)

        def cells(e: Estimate) -> tuple[str, str, str]:
            low, high = e.ends
            span = "unknown: all scores are equal"
            if low is not None and high is not None:
                span = f"{score_text(low, share)} to {score_text(high, share)}"
            return score_text(e.estimate, share), span, str(e.n)

        table = Table("task", "score", "95 % interval", "images", title=f"{name} score")
        clusters = result.clusters()
        for task, values in result.by_group(name).items():
            estimate = mean_estimate(values, clusters=clusters[task], share=share)
            table.add_row(task, *cells(estimate))
        values = result.scores[name].ravel()
        labels = [text for text in result.prompts.texts for _ in range(result.num_seeds)]
        overall = mean_estimate(values, clusters=labels, share=share)
        table.add_row("all", *cells(overall), style="bold")
        display.console.print(table)
    mean = score_text(result.mean(name), share)
    echo(f"{mean} over {len(result.prompts)} prompts of {run}")


@app.command()
def export(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pipeline; RUN/pipeline by default.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the written weights: float32 or bfloat16.")
    ] = "float32",
    checkpoint: CheckpointOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Write the tuned model of a run as one whole pipeline; a LoRA is fused into its base.

    DiffusionPipeline.from_pretrained loads it, without peft and without this package.
    """
    with clear_errors():
        from chunkgrpo.runs import export_run

        folder = export_run(run, out, dtype, checkpoint, tell)
    echo(f"The pipeline is in {folder}")
