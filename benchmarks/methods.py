# SPDX-License-Identifier: Apache-2.0
"""Train every method on the embedded model with one budget and write the table of docs/methods.md.

The budget is network evaluations: rows (one latent at one noise level) that pass through the
network while training, a forward counted as one and a backward as two more. They are counted as
they happen, so a method that skips work trains for more iterations; each ends with the iteration
that brings it nearest to the budget. Decoding and scoring are not in it, they show in the seconds,
which are the processors' own: other work on the machine hardly changes them.

All methods start from the same weights and are judged with the same sampler on the same held-out
prompts and noises, after training by their averaged weights.

Every result is written as soon as it is there, and what is there is not run again: stop this at any
time and start it again. ``--table`` only writes the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_prompts, build_sigmas, build_trainer
from chunkgrpo.core.names import unknown_name
from chunkgrpo.evaluate import EvaluationSettings, evaluate
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.recipes import method_names, recipe_names
from chunkgrpo.report.statistics import paired_difference
from chunkgrpo.rewards import make_reward
from chunkgrpo.runtime.files import atomic_write
from chunkgrpo.train.loop import Trainer
from results_file import put_between, read_results, weights_digest
from row_counter import RowCounter

REFERENCE = "chunk-grpo"
"""The recipe whose sampler and prompts judge all of them; E-GRPO's own schedule is another."""

BEGIN, END = "<!-- methods table: begin -->", "<!-- methods table: end -->"
BATCH = 128


def setup_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all results of a file must share."""
    config = load_config(REFERENCE, options.set)
    return {
        "rows": options.rows,
        "prompts": options.prompts,
        "images": options.images,
        "settings": options.set,
        "judge": make_reward(config.evaluation.reward.name, config.evaluation.reward.options).name,
        "model": weights_digest(config),
    }


def judged(trainer: Trainer, options: argparse.Namespace) -> list[list[float]]:
    """Score the policy as it is, [prompts][images]."""
    config = load_config(REFERENCE, [*options.set, f"evaluation.final_prompts={options.prompts}"])
    reward = config.evaluation.reward
    judge = make_reward(reward.name, reward.options)
    prompts = build_prompts(config, "final")
    policy = trainer.policy
    assert isinstance(policy, PipelinePolicy)
    settings = EvaluationSettings(options.images, config.evaluation.seed, BATCH)
    found = evaluate(policy, prompts, build_sigmas(config, policy), [judge], settings)
    return np.round(found.scores[judge.name].astype(float), 6).tolist()


def run_one(
    name: str, seed: int, options: argparse.Namespace, results: dict[str, Any]
) -> dict[str, Any]:
    """Train one method with one seed and judge it.

    Raises:
        KeyboardInterrupt: If it was stopped before the budget was spent; nothing of it is kept.
    """
    folder = options.out.parent / f"{options.out.stem}-unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    endless = ["iterations=1000000", "checkpoints.every=1000000", "evaluation.every=0"]
    config = load_config(name, [*options.set, *endless, f"seed={seed}"])
    trainer = build_trainer(config, folder)
    if "base" not in results:
        results["base"] = judged(trainer, options)
        save(options, results)
    counter = RowCounter(trainer, options.rows)
    begun = time.process_time()
    trainer.run()
    processor_seconds = time.process_time() - begun
    if not counter.done:
        raise KeyboardInterrupt
    forward, backward = counter.forward, counter.backward
    started = time.perf_counter()
    with trainer.averaged():
        scores = judged(trainer, options)
    rewards = [
        json.loads(line)["reward_mean"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    shutil.rmtree(folder)
    per_rollout = config.sampling.prompts * config.sampling.group_size
    return {
        "iterations": counter.iterations,
        "images": counter.iterations * per_rollout,
        "forward": forward,
        "backward": backward,
        "seconds": round(trainer.seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "judging_seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "rewards": rewards,
        "scores": scores,
    }


def save(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results so that no reader ever meets half of them."""
    atomic_write(options.out, json.dumps(results) + "\n")


def table_row(name: str, base: Sequence[Sequence[float]], runs: Sequence[dict[str, Any]]) -> str:
    """Return a method's line: the mean over its training seeds."""
    before = np.concatenate([np.ravel(base)] * len(runs))
    after = np.concatenate([np.ravel(run["scores"]) for run in runs])
    # The same prompt is one cluster in every seed.
    clusters = np.tile(np.repeat(np.arange(len(base)), len(base[0])), len(runs))
    change = paired_difference(before, after, clusters=clusters)

    def mean(key: str) -> float:
        return float(np.mean([run[key] for run in runs]))

    rows = mean("forward") + 2 * mean("backward")
    cells = [
        name,
        f"{100 * before.mean():.1f}",
        f"{100 * after.mean():.1f}",
        f"{100 * change.estimate:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})",
        str(len(runs)),
        f"{mean('iterations'):.0f}",
        f"{mean('images'):,.0f}",
        f"{mean('forward'):,.0f}",
        f"{rows:,.0f}",
        f"{mean('processor_seconds'):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, Any]) -> str:
    """Return the table with what it means."""
    setup = results["setup"]
    lines = [
        "| method | before % | after % | change (95 %) | seeds | iterations | images | forwards "
        "| budget used | processor seconds |",
        "|---|" + "---|" * 9,
    ]
    runs = results["runs"]
    for name in sorted(runs):
        lines.append(table_row(name, results["base"], [runs[name][k] for k in sorted(runs[name])]))
    settings = f", settings {' '.join(setup['settings'])}" if setup["settings"] else ""
    lines += [
        "",
        f"Budget {setup['rows']:,} network evaluations a run, a backward counted as two forwards; "
        f"{setup['judge']} score of {setup['prompts']} held-out prompts x {setup['images']} "
        f"images, the same noise before and after{settings}. The interval is that of the prompts; "
        "how much another training seed would change it shows only where there are several.",
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", help="methods, or recipes such as demo; all methods if none is named")
    add("--rows", type=int, default=20_000, help="budget of a run, network evaluations")
    add("--seeds", type=int, default=1, help="training seeds, 0 to this less one")
    add("--prompts", type=int, default=252, help="held-out prompts to judge by")
    add("--images", type=int, default=2, help="images of each")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--set", action="append", default=[], help="a setting for all methods")
    add("--out", type=Path, default=Path("runs/methods.json"), help="results, added to")
    add("--docs", type=Path, default=Path("docs/methods.md"), help="page that holds the table")
    add("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args(arguments)
    known = [*method_names(), *recipe_names()]
    for name in options.names:
        if name not in known:
            parser.error(str(unknown_name("method", name, known)))
    if min(options.rows, options.seeds, options.images) < 1 or options.prompts < 2:
        parser.error("--rows, --seeds and --images must be at least 1, and --prompts 2")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or write the table."""
    options = parse(arguments)
    if options.table:
        if not options.out.exists():
            raise SystemExit(f"{options.out} does not exist; run without --table first")
        results = json.loads(options.out.read_text())
        if not results["runs"]:
            raise SystemExit(f"{options.out} holds no finished run yet")
        put_between(options.docs, BEGIN, END, table(results))
        print(f"The table of {len(results['runs'])} methods is in {options.docs}")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    results = read_results(options.out, setup_of(options))
    # Seed by seed, so that an early stop leaves a whole table rather than half of one.
    wanted = [(n, s) for s in range(options.seeds) for n in options.names or method_names()]
    for number, (name, seed) in enumerate(wanted, 1):
        runs = results["runs"].setdefault(name, {})
        label = f"[{number}/{len(wanted)}] {name}, seed {seed}"
        if str(seed) in runs:
            print(f"{label}: there already", flush=True)
            continue
        print(f"{label} ...", flush=True)
        try:
            found = run_one(name, seed, options, results)
        except KeyboardInterrupt:
            finished = sum(len(each) for each in results["runs"].values())
            raise SystemExit(
                f"stopped in {name}, seed {seed}; {finished} finished runs are in {options.out}, "
                "the same command goes on from there"
            ) from None
        runs[str(seed)] = found
        save(options, results)
        print(table_row(name, results["base"], [found]), flush=True)
    print(table(results))
    print(f"Results are in {options.out}; --table writes them into {options.docs}")


if __name__ == "__main__":
    main()
