# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: the embedded world's grammar, or a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chunkgrpo.runtime.seeds import derive_seed


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the group each belongs to in a report.

    Attributes:
        texts: The prompts.
        groups: One label each, such as a task.
    """

    texts: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, iteration: int, number: int, seed: int) -> list[str]:
        """Return the prompts of an iteration: passes over the set, each in a new order.

        A pure function of its arguments, so a resumed run sees the prompts it would have seen.
        """
        if not self.texts:
            raise ValueError("there are no prompts to draw from")
        batch: list[str] = []
        position = iteration * number
        while len(batch) < number:
            epoch, offset = divmod(position + len(batch), len(self))
            order = np.random.default_rng(derive_seed(seed, epoch)).permutation(len(self))
            wanted = order[offset : offset + number - len(batch)]
            batch += [self.texts[i] for i in wanted]
        return batch

    def head(self, number: int) -> PromptSet:
        """Return the first prompts."""
        return PromptSet(self.texts[:number], self.groups[:number])


def shapes_prompts(
    split: str, number: int | None, seed: int, tasks: Sequence[str] | None = None
) -> PromptSet:
    """Return prompts of the embedded world, evenly over its tasks.

    Args:
        split: ``"train"``, ``"held_out"`` or ``"held_out_pairs"``.
        number: How many; None gives every task equal weight by repeating the smaller ones.
        seed: Seed of the choice.
        tasks: Tasks to draw from; all by default.
    """
    from chunkgrpo.shapes import grammar

    chosen = tuple(tasks or grammar.TASKS)
    if number is not None:
        found = grammar.sample_prompts(number, split, seed, chosen)
        return PromptSet(tuple(p.text for p in found), tuple(p.task for p in found))
    pools = [grammar.prompts(task, split) for task in chosen]
    largest = min(max(len(pool) for pool in pools), 1200)
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(np.resize(np.arange(len(p)), largest)) for p in pools]
    every = [pools[t][columns[t][i]] for i in range(largest) for t in range(len(pools))]
    return PromptSet(tuple(p.text for p in every), tuple(p.task for p in every))


def read_prompts(path: str | Path) -> PromptSet:
    """Read prompts: a line each (.txt), or the field ``prompt`` of each record (.jsonl, .csv).

    A field ``tag``, ``task`` or ``group`` labels the prompt.

    Raises:
        ValueError: If the file is missing, empty, of another kind, or a record has no prompt; the
            message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist")
    records: list[tuple[int, dict[str, str]]] = []
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        records = [(n, {"prompt": line}) for n, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix == ".jsonl":
        # Not splitlines: JSON strings may hold other line separators of Unicode.
        for n, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {n} is no JSON: {error}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {n} is no JSON object")
                records.append((n, record))
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            records = [(reader.line_num, row) for row in reader]
    else:
        raise ValueError(f"prompt file {path} must end in .txt, .jsonl or .csv")
    texts, groups = [], []
    for n, record in records:
        text = str(record.get("prompt") or "").strip()
        if not text:
            raise ValueError(f"{path}, line {n} has no prompt")
        texts.append(text)
        groups.append(str(record.get("tag") or record.get("task") or record.get("group") or "all"))
    if not texts:
        raise ValueError(f"prompt file {path} holds no prompts")
    return PromptSet(tuple(texts), tuple(groups))
