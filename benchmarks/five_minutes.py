# SPDX-License-Identifier: Apache-2.0
"""What do five minutes of training gain? A race of recipes on the embedded model.

Every recipe trains from the same weights for the same budget: ``--seconds`` of training on idle
cores, or ``--rows`` network rows (one latent at one noise level through the network; a backward
counts as two more), which other work on the machine does not change. Its averaged weights are kept
at fifths of the budget and judged afterwards as the demo is judged: on the same held-out prompts
and noises, with image health. Building, judging and saving are not in the budget; sampling,
decoding, scoring and training are.

Finished runs are kept in ``--out`` and not run again: stop this at any time and start it again.
``--table`` writes the table into ``docs/five-minutes.md`` and draws
``docs/images/five-minutes.png``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkgrpo.config import Config, load_config
from chunkgrpo.config.build import build_prompts, build_sigmas, build_trainer
from chunkgrpo.cost import iteration_cost
from chunkgrpo.evaluate import EvaluationSettings, evaluate
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.report.health import HEALTH_BANDS
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.report.statistics import Estimate, paired_difference
from chunkgrpo.rewards import make_reward
from chunkgrpo.runtime.files import atomic_write
from chunkgrpo.train.loop import Trainer
from results_file import put_between, read_results, weights_digest
from row_counter import RowCounter

REFERENCE = "demo"
"""The recipe whose sampler, prompts, noises and judge are everybody's."""
PARTS = 5
"""Weights are judged after so many equal parts of the budget."""
MARKS = (5, 10, 15, 20)
"""Gains in points, of which the table says when they are reached."""
BATCH = 128
BEGIN, END = "<!-- five minutes: begin -->", "<!-- five minutes: end -->"
ROOT = Path(__file__).resolve().parents[1]


# --- judging ------------------------------------------------------------------------------------


def judged(trainer: Trainer, config: Config, images: int) -> dict[str, Any]:
    """Score the policy as it is.

    Args:
        trainer: Of which the policy is judged.
        config: The reference.
        images: Images of each prompt.

    Returns:
        ``scores``, one character per image, prompt-major, and ``health``.
    """
    policy = trainer.policy
    assert isinstance(policy, PipelinePolicy)
    judge = make_reward(config.evaluation.reward.name, config.evaluation.reward.options)
    settings = EvaluationSettings(images, config.evaluation.seed, BATCH)
    sigmas = build_sigmas(config, policy)
    found = evaluate(policy, build_prompts(config, "final"), sigmas, [judge], settings)
    scores = found.scores[judge.name]
    if not np.isin(scores, (0.0, 1.0)).all():
        raise SystemExit(f"the judge {judge.name!r} gives no verdicts of 0 or 1")
    text = "".join("01"[int(score)] for score in scores.ravel())
    return {"scores": text, "health": {k: round(v, 4) for k, v in found.health.items()}}


def verdicts(text: str) -> np.ndarray:
    """Return scores as numbers, [images]."""
    return np.array([int(each) for each in text], dtype=float)


def change(base: str, runs: Sequence[str], num_prompts: int) -> Estimate:
    """Return the change of some runs, of which each has all images; prompts are clusters."""
    before = np.tile(verdicts(base), len(runs))
    after = np.concatenate([verdicts(run) for run in runs])
    clusters = np.tile(
        np.repeat(np.arange(num_prompts), len(verdicts(base)) // num_prompts), len(runs)
    )
    return paired_difference(before, after, clusters=clusters)


# --- one run ------------------------------------------------------------------------------------


class Snapshots:
    """Keeps the averaged weights whenever another part of the budget is spent."""

    def __init__(self, budget: float) -> None:
        self.budget, self.kept = budget, []

    def __call__(self, counter: RowCounter) -> None:
        """Look at a run after an iteration."""
        spent = counter.of_budget(counter)
        if spent < self.budget * (len(self.kept) + 1) / PARTS or len(self.kept) == PARTS - 1:
            return
        trainer = counter.trainer
        with trainer.averaged():
            weights = [p.detach().clone() for p in trainer.parameters]
        self.kept.append((state_of(counter), weights))


def state_of(counter: RowCounter) -> dict[str, Any]:
    """Return how far a run is."""
    b = counter.trainer.budget
    return {
        "seconds": round(counter.trainer.seconds, 1),
        "rows": counter.spent,
        "images": counter.iterations * b.prompts * b.group_size,
        "iterations": counter.iterations,
    }


@torch.no_grad()
def put(parameters: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
    """Give parameters the values of kept weights."""
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)


def racing(name: str, settings: list[str], rows: int) -> Config:
    """Return a recipe that trains until its budget is spent.

    A rate that falls needs to know the end of the run. For a budget of rows it is worked out; for
    one of seconds a recipe whose rate falls ends with its own number of iterations at the latest.
    """
    quiet = ["checkpoints.every=1000000", "evaluation.every=0"]
    config = load_config(name, [*settings, *quiet])
    iterations = 1_000_000
    if config.optimizer.fall and rows:
        cost = iteration_cost(config)
        iterations = round(rows / (cost.rollout + cost.measured + 3 * cost.trained))
    elif config.optimizer.fall:
        iterations = config.iterations
    return load_config(name, [*settings, *quiet, f"iterations={iterations}"])


def run_one(name: str, seed: int, options: argparse.Namespace, results: dict[str, Any]) -> Any:
    """Train one recipe with one seed and judge it.

    Raises:
        KeyboardInterrupt: If it was stopped before the budget was spent; nothing of it is kept.
    """
    folder = options.out.parent / f".{options.out.stem}-{Path(name).stem}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    config = racing(name, [*options.set, f"seed={seed}"], options.rows)
    reference = load_config(REFERENCE, options.set)
    trainer = build_trainer(config, folder)
    num_images = reference.evaluation.final_seeds
    if "base" not in results:
        results["base"] = judged(trainer, reference, num_images)
        results["base_once"] = judged(trainer, reference, 1)["scores"]
        save(options, results)
    budget = options.rows or options.seconds
    by_time = None if options.rows else lambda counter: counter.trainer.seconds
    snapshots = Snapshots(budget)
    counter = RowCounter(trainer, budget, by_time, snapshots)
    trainer.run()
    if not counter.done and not trainer.finished:
        raise KeyboardInterrupt
    found = state_of(counter) | {"threads": torch.get_num_threads(), "date": str(date.today())}
    started = time.perf_counter()
    with trainer.averaged():
        found |= judged(trainer, reference, num_images)
    records = read_metrics(folder / "metrics.jsonl")
    found["rewards"] = [round(record["reward_mean"], 3) for record in records]
    found["curve"] = []
    for state, weights in snapshots.kept:
        put(trainer.parameters, weights)
        found["curve"].append(state | {"scores": judged(trainer, reference, 1)["scores"]})
    found["judging_seconds"] = round(time.perf_counter() - started, 1)
    shutil.rmtree(folder)
    return found


# --- the table ----------------------------------------------------------------------------------


def points(run: dict[str, Any], results: dict[str, Any]) -> list[tuple[float, float, float]]:
    """Return (seconds, rows, gain in points) of a run, from the beginning on."""
    once = verdicts(results["base_once"]).mean()
    found = [(0.0, 0.0, 0.0)]
    for part in run["curve"]:
        gain = 100 * (verdicts(part["scores"]).mean() - once)
        found.append((part["seconds"], part["rows"], gain))
    gain = 100 * (verdicts(run["scores"]).mean() - verdicts(results["base"]["scores"]).mean())
    return [*found, (run["seconds"], run["rows"], gain)]


def best_first(results: dict[str, Any]) -> list[str]:
    """Return the names of the recipes that have a finished run, by their mean gain."""
    gains = {
        name: np.mean([points(run, results)[-1][2] for run in runs.values()])
        for name, runs in results["runs"].items()
        if runs
    }
    return sorted(gains, key=lambda name: gains[name], reverse=True)


def reached(curve: Sequence[tuple[float, float, float]], mark: float, axis: int) -> float | None:
    """Return where a gain is first reached, interpolated; None where it is not."""
    for before, after in pairwise(curve):
        if after[2] >= mark:
            share = (mark - before[2]) / (after[2] - before[2])
            return before[axis] + share * (after[axis] - before[axis])
    return None


def health_of(run: dict[str, Any], base: dict[str, float]) -> dict[str, float]:
    """Return each measure of health over the base's."""
    return {name: run["health"][name] / base[name] for name in HEALTH_BANDS}


def told_health(runs: Sequence[dict[str, Any]], base: dict[str, float]) -> str:
    """Say which measures leave their band in which number of runs, with the furthest value."""
    told = []
    for name, (low, high) in HEALTH_BANDS.items():
        found = [health_of(run, base)[name] for run in runs]
        outside = [value for value in found if not low <= value <= high]
        if outside:
            worst = max(outside, key=lambda value: abs(np.log(value)))
            told.append(f"{name.replace('_', ' ')} {worst:.2f} ({len(outside)} of {len(found)})")
    return ", ".join(told) or "all inside"


def row_of(name: str, runs: Sequence[dict[str, Any]], results: dict[str, Any]) -> str:
    """Return a recipe's line."""
    num_prompts = len(results["base_once"])
    base = results["base"]
    all_runs = change(base["scores"], [run["scores"] for run in runs], num_prompts)
    each = [100 * change(base["scores"], [run["scores"]], num_prompts).estimate for run in runs]
    axis = 1 if results["setup"]["rows"] else 0
    curves = [points(run, results) for run in runs]
    cells = [name, str(len(runs)), ", ".join(f"{gain:+.1f}" for gain in each)]
    cells += [
        f"{100 * all_runs.estimate:+.1f} ({100 * all_runs.low:.1f} to {100 * all_runs.high:.1f})"
    ]
    for mark in MARKS:
        found = [when for curve in curves if (when := reached(curve, mark, axis)) is not None]
        if not found:
            cells.append("-")
            continue
        mean = float(np.mean(found))
        text = f"{mean / 1000:.0f}" if axis else f"{mean:.0f}"
        cells.append(text + ("" if len(found) == len(runs) else f" ({len(found)} of {len(runs)})"))
    cells += [f"{np.mean([run[key] for run in runs]):,.0f}" for key in ("images", "iterations")]
    cells += [f"{np.mean([run['rows'] for run in runs]) / 1000:,.0f}"]
    cells += [f"{np.mean([run['seconds'] for run in runs]):.0f}", told_health(runs, base["health"])]
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, Any]) -> str:
    """Return the table with what it means, best first."""
    setup, runs = results["setup"], results["runs"]
    unit = "thousand rows" if setup["rows"] else "seconds"
    marks = " | ".join(f"{unit} to +{mark}" for mark in MARKS)
    lines = [
        f"| recipe | seeds | points, by seed | points, all seeds (95 %) | {marks} | images "
        "| iterations | thousand rows | seconds | health outside its band, over the base's |",
        "|---" * (9 + len(MARKS)) + "|",
    ]
    for name in best_first(results):
        lines.append(row_of(name, [runs[name][k] for k in sorted(runs[name])], results))
    rows, seconds = setup["rows"], setup["seconds"]
    budget = f"{rows:,} network rows" if rows else f"{seconds} seconds of training"
    settings = f", settings {' '.join(setup['settings'])}" if setup["settings"] else ""
    before = 100 * verdicts(results["base"]["scores"]).mean()
    dates = sorted({run["date"] for each in runs.values() for run in each.values()})
    lines += [
        "",
        f"Budget {budget} a run; strict score of {len(results['base_once'])} held-out prompts x "
        f"{len(results['base']['scores']) // len(results['base_once'])} images, base {before:.1f} "
        f"%, the same noise before and after{settings}. The interval is that of the prompts, over "
        "the seeds that ran. When a gain is reached is read off straight lines between the fifths "
        f"of the budget, where one image a prompt is judged. Measured on {', '.join(dates)}.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the gain against the budget, one line per recipe, thin ones per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis = 1 if results["setup"]["rows"] else 0
    drawn = best_first(results)
    figure = Figure(figsize=(8, 5 + 0.2 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(0, color="0.7", linewidth=0.8)
    scale, unit = (1e-3, "thousand network rows") if axis else (1.0, "seconds of training")
    for number, name in enumerate(drawn):
        curves = [points(run, results) for run in results["runs"][name].values()]
        color = f"C{number % 10}"
        for curve in curves:
            axes.plot(
                [scale * p[axis] for p in curve],
                [p[2] for p in curve],
                color=color,
                alpha=0.3,
                linewidth=0.8,
            )
        mean = np.mean(np.array([c for c in curves if len(c) == len(curves[0])]), axis=0)
        style = "-" if number < 10 else "--"
        axes.plot(scale * mean[:, axis], mean[:, 2], style, color=color, label=name)
    axes.set_xlabel(unit)
    axes.set_ylabel("gain in strict score, points")
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# --- the command --------------------------------------------------------------------------------


def setup_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all results of a file must share."""
    config = load_config(REFERENCE, options.set)
    return {
        "seconds": None if options.rows else options.seconds,
        "rows": options.rows or None,
        "settings": options.set,
        "prompts": config.evaluation.final_prompts,
        "model": weights_digest(config),
    }


def save(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results so that no reader ever meets half of them."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out, json.dumps(results, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", default=["demo"], help="recipes or files; demo if none is named")
    add("--seconds", type=float, default=300, help="seconds of training of a run")
    add("--rows", type=int, default=0, help="network rows of a run, in place of seconds")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--set", action="append", default=[], help="a setting for all recipes")
    add(
        "--out",
        type=Path,
        default=ROOT / "benchmarks/results/five_minutes.json",
        help="results, added to",
    )
    add("--docs", type=Path, default=ROOT / "docs/five-minutes.md", help="page with the table")
    add("--table", action="store_true", help="only write the table and the picture")
    options = parser.parse_args(arguments)
    if min(options.seeds) < 0 or options.rows < 0 or options.seconds <= 0:
        parser.error("--seeds and --rows must not be negative, and --seconds must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or write the table."""
    options = parse(arguments)
    if options.table:
        if not options.out.exists():
            raise SystemExit(f"{options.out} does not exist; run without --table first")
        results = json.loads(options.out.read_text())
        picture = options.docs.parent / "images" / f"{options.docs.stem}.png"
        draw(results, picture)
        put_between(options.docs, BEGIN, END, table(results))
        print(f"The table is in {options.docs}, the picture is {picture}")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.names:
        load_config(name, options.set)  # refuse a wrong one before the first run
    results = read_results(options.out, setup_of(options))
    wanted = [(name, seed) for seed in options.seeds for name in options.names]
    begun, ran = time.perf_counter(), 0
    for number, (name, seed) in enumerate(wanted, 1):
        runs = results["runs"].setdefault(Path(name).stem, {})
        label = f"[{number}/{len(wanted)}] {Path(name).stem}, seed {seed}"
        if str(seed) in runs:
            print(f"{label}: there already", flush=True)
            continue
        left = ""
        if ran:
            minutes = (time.perf_counter() - begun) / ran * (len(wanted) - number + 1) / 60
            left = f", about {minutes:.0f} min left"
        print(f"{label} ...{left}", flush=True)
        try:
            runs[str(seed)] = run_one(name, seed, options, results)
        except KeyboardInterrupt:
            raise SystemExit(
                f"stopped in {name}, seed {seed}; finished runs are in {options.out}, and the same "
                "command goes on from there"
            ) from None
        ran += 1
        save(options, results)
        print(row_of(Path(name).stem, [runs[str(seed)]], results), flush=True)
    print(table(results))
    print(f"Results are in {options.out}; --table writes them into {options.docs}")


if __name__ == "__main__":
    main()
