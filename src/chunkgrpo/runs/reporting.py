# SPDX-License-Identifier: Apache-2.0
"""What a finished run shows: summary, curves, pictures and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chunkgrpo.config import Config
from chunkgrpo.evaluate import Evaluation
from chunkgrpo.report.curves import DEFAULT_PANELS, panels_of_score, save_curves
from chunkgrpo.report.grids import save_comparison
from chunkgrpo.report.health import HEALTH_BANDS
from chunkgrpo.report.html import write_html
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.report.tables import (
    HEADINGS,
    AccuracyRow,
    accuracy_cells,
    accuracy_rows,
    change_text,
    interval_text,
    score_text,
)
from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.rewards.scoring import is_share
from chunkgrpo.runs.evaluations import load_evaluation, shown_rows
from chunkgrpo.runs.history import HistoryError, read_history
from chunkgrpo.runtime.files import atomic_write


def write_report(
    config: Config, folder: Path, judge: Reward, train_seconds: float, total_minutes: float
) -> dict[str, Any]:
    """Write summary.json, curves.png, samples.png and report.html; return the summary."""
    base = load_evaluation(folder / "evaluation" / "base.npz")
    tuned = load_evaluation(folder / "evaluation" / "tuned.npz")
    name, share = judge.name, is_share(judge)
    rows = accuracy_rows(base.by_group(name), tuned.by_group(name), base.clusters())
    records = read_metrics(folder / "metrics.jsonl")
    summary = {
        "name": config.name,
        "seed": config.seed,
        "judge": name,
        "share": share,
        **scores_of_summary(base, rows),
        **health_of_summary(base, tuned),
        "train_minutes": train_seconds / 60,
        "total_minutes": total_minutes,
        "iterations": len(records),
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    save_curves(folder / "curves.png", records, DEFAULT_PANELS if share else panels_of_score(name))
    save_samples(folder / "samples.png", base, tuned, judge)
    write_html(
        folder,
        page(config, folder, summary, rows),
        (folder / "config.yaml").read_text(),
        {
            "Same prompt, same noise: base and tuned": folder / "samples.png",
            "Training": folder / "curves.png",
        },
    )
    return summary


def scores_of_summary(base: Evaluation, rows: Sequence[AccuracyRow]) -> dict[str, Any]:
    """Return the judge's scores before and after, in all and by task."""
    overall = rows[-1]
    return {
        "prompts": len(base.prompts),
        "seeds_per_prompt": base.num_seeds,
        "base": overall.base,
        "tuned": overall.tuned,
        "difference": overall.difference.estimate,
        "difference_low": overall.difference.ends[0],
        "difference_high": overall.difference.ends[1],
        "too_few": overall.difference.too_few,
        "by_task": {
            row.task: {
                "base": row.base,
                "tuned": row.tuned,
                "difference": row.difference.estimate,
                "low": row.difference.ends[0],
                "high": row.difference.ends[1],
                "images": row.difference.n,
                "too_few": row.difference.too_few,
            }
            for row in rows
        },
    }


def health_of_summary(base: Evaluation, tuned: Evaluation) -> dict[str, Any]:
    """Return the image health before and after, and the figures outside their bands."""
    ratios = {k: tuned.health[k] / max(base.health[k], 1e-9) for k in base.health}
    outside = [k for k, r in ratios.items() if not HEALTH_BANDS[k][0] <= r <= HEALTH_BANDS[k][1]]
    return {
        "health_base": base.health,
        "health_tuned": tuned.health,
        "health_ratio": ratios,
        "health_bands": HEALTH_BANDS,
        "health_outside": outside,
    }


def save_samples(path: Path, base: Evaluation, tuned: Evaluation, judge: Reward) -> None:
    """Draw images of the base and the tuned model side by side, with the judge's marks."""
    shown = shown_rows(base)
    marks = {
        which: [bool(result.scores[judge.name][row, 0] > 0.5) for row in shown]
        for which, result in (("base", base), ("tuned", tuned))
    }
    save_comparison(
        path,
        {"base": base.images.float() / 255, "tuned": tuned.images.float() / 255},
        [base.prompts.texts[row] for row in shown],
        marks=marks if is_share(judge) else None,
    )


def page(
    config: Config, folder: Path, summary: Mapping[str, Any], rows: list[AccuracyRow]
) -> dict[str, Any]:
    """Return the content of the HTML page."""
    s, share = summary, summary["share"]
    health = [
        [k, f"{s['health_base'][k]:.4f}", f"{s['health_tuned'][k]:.4f}",
         f"{s['health_ratio'][k]:.2f}", f"{HEALTH_BANDS[k][0]} to {HEALTH_BANDS[k][1]}"]
        for k in s["health_ratio"]
    ]  # fmt: skip
    return {
        "title": f"{config.name}, seed {config.seed}",
        "subtitle": f"{s['iterations']} iterations in {s['train_minutes']:.1f} minutes",
        "headline": [
            {"label": "base", "value": score_text(s["base"], share)},
            {"label": "tuned", "value": score_text(s["tuned"], share)},
            {
                "label": "difference",
                "value": change_text(s["difference"], share) + (" points" if share else ""),
                "note": f"95 % interval: {interval_text(rows[-1].difference, share)}",
            },
        ],
        "tables": [
            {
                "title": f"{s['judge']} score by task, {s['prompts']} held-out prompts",
                "columns": list(HEADINGS),
                "rows": [list(accuracy_cells(row, share)) for row in rows],
                "note": "Same prompts and same initial noise before and after.",
            },
            {
                "title": "Image health",
                "columns": ["measure", "base", "tuned", "ratio", "band"],
                "rows": health,
                "note": "A ratio outside its band is a sign of reward hacking.",
            },
            *history_tables(folder),
        ],
        "command": f"chunkgrpo train {folder / 'config.yaml'}",
        "files": [
            {"path": "model/", "what": "the tuned model, for stock diffusers"},
            {"path": "metrics.jsonl", "what": "one record per iteration"},
            {"path": "history.jsonl", "what": "when it was started and continued, what changed"},
            {"path": "checkpoints/", "what": "to continue from"},
            {"path": "evaluation/", "what": "scores of every held-out image"},
        ],
    }


def history_tables(folder: Path) -> list[dict[str, Any]]:
    """Return the table of what happened to a run; none where it ran in one piece.

    A history that is damaged has its problem in place of lines.
    """
    columns = ["time (UTC)", "iteration", "event", "old", "new", "version"]
    try:
        records = read_history(folder).records
    except (HistoryError, OSError) as error:
        rows = [["", "", str(error), "", "", ""]]
    else:
        rows = [_history_row(record) for record in records]
        if {record["event"] for record in records} <= {"start", "finish"}:
            return []
    note = "A change holds for the iterations after the one named. The whole is in history.jsonl."
    return [{"title": "What happened to the run", "columns": columns, "rows": rows, "note": note}]


def _history_row(record: Mapping[str, Any]) -> list[str]:
    event, old, new = record["event"], "", ""
    if event == "change":
        event = f"{record['key']} changed, by {record.get('given', 'an unknown hand')}"
        old, new = json.dumps(record["old"]), json.dumps(record["new"])
    elif event == "note":
        event = record.get("text", "")
    first = [str(record["time"])[:19].replace("T", " "), str(record["iteration"])]
    return [*first, event, old, new, str(record["version"])]
