# SPDX-License-Identifier: Apache-2.0
"""Train every method on the embedded model with one budget and print a table.

The budget is network rows (a forward is one, a backward two more): each method gets as many
iterations as fit, all start from the same weights and are judged on the same held-out prompts and
noises. Finished runs are kept: running again with the same folder does only what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chunkgrpo.config import Config, load_config
from chunkgrpo.methods import iteration_cost
from chunkgrpo.recipes import method_names
from chunkgrpo.report.statistics import paired_difference
from chunkgrpo.runs import load_evaluation, train_run


def budget_rows(config: Config) -> int:
    """Return what an iteration spends."""
    cost = iteration_cost(config)
    return cost.forwards + 2 * cost.trained


def run_one(name: str, seed: int, folder: Path, rows: int, settings: Sequence[str]) -> Path:
    """Train one method with one seed, unless its folder is complete."""
    out = folder / f"{name}-{seed}"
    if not (out / "summary.json").exists():
        iterations = max(1, round(rows / budget_rows(load_config(name, settings))))
        assignments = [*settings, f"iterations={iterations}", f"seed={seed}", "evaluation.every=0"]
        config = load_config(name, assignments)
        print(f"{out.name}: {iterations} iterations", flush=True)
        train_run(config, out, lambda record: None, lambda phase: lambda done, total: None)
    return out


def table_row(name: str, folders: Sequence[Path]) -> str:
    """Return one line of the table, over the seeds."""
    base, tuned, clusters, summaries = [], [], [], []
    for folder in folders:
        before = load_evaluation(folder / "evaluation" / "base.npz")
        after = load_evaluation(folder / "evaluation" / "tuned.npz")
        base.append(before.scores["strict"].ravel())
        tuned.append(after.scores["strict"].ravel())
        clusters += before.clusters()  # the same prompt is one cluster in every seed
        summaries.append(json.loads((folder / "summary.json").read_text()))
    change = paired_difference(np.concatenate(base), np.concatenate(tuned), clusters=clusters)
    minutes = np.mean([s["train_minutes"] for s in summaries])
    cost = iteration_cost(load_config(name))
    return (
        f"| {name} | {100 * np.mean(base):.1f} | {100 * np.mean(tuned):.1f} | "
        f"{100 * change.estimate:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f}) | "
        f"{cost.forwards} | {60 * minutes:.0f} |"
    )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="methods; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=140_000, help="network rows per run")
    parser.add_argument("--set", action="append", default=[], help="a setting for all methods")
    options = parser.parse_args()
    names = options.names or method_names()
    lines = ["| method | base % | tuned % | change (95 %) | rows an iteration | seconds |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in names:
        seeds = range(options.seeds)
        folders = [run_one(name, s, options.out, options.rows, options.set) for s in seeds]
        lines.append(table_row(name, folders))
        print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"The table is in {options.out / 'table.md'}")


if __name__ == "__main__":
    main()
