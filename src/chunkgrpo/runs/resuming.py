# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: what it was set to, what may change, and what is still there of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkgrpo.config import Config, ConfigError, dump_config, parse_config
from chunkgrpo.config.changing import ABSENT, Change, changes, flat, refusal
from chunkgrpo.config.files import Assignment, as_tree, assigned, plain, read_yaml, validated
from chunkgrpo.config.rules import check
from chunkgrpo.report.metrics import (
    irregular_iterations,
    lost_metrics,
    read_metrics,
    torn_line,
    truncate_metrics,
)
from chunkgrpo.runs.history import (
    HISTORY,
    History,
    HistoryError,
    append_history,
    line_of,
    read_history,
    set_aside,
)
from chunkgrpo.runtime.checkpoints import list_checkpoints, newest_sound, number_of
from chunkgrpo.runtime.files import atomic_write, settle_folders

CONFIG = "config.yaml"


# --- settings -------------------------------------------------------------------------------------


def read_run(folder: Path) -> Config:
    """Read the configuration of a run folder, as ``config.yaml`` has it.

    Raises:
        ConfigError: If the folder holds no run, or its settings are damaged or cannot be a run's.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no {CONFIG}")
    try:
        config = parse_config(read_yaml(path))
        check(config)
        return config
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def resumed_config(folder: Path, assignments: Sequence[Assignment | str] = ()) -> Config:
    """Return the settings that a run goes on with; nothing is loaded and nothing written.

    They are those of ``config.yaml``, so what was edited there counts as a change, with the given
    ones over them. Where that file is missing, the history has them.

    Args:
        folder: The run.
        assignments: Changes, as ``--set`` gives them.

    Raises:
        ConfigError: If the folder holds no run, or a setting differs that cannot change; with the
            differences.
    """
    before = settings_in_force(folder)
    if before is not None and not (folder / CONFIG).exists():
        config = _parsed(before, folder)
    else:
        config = read_run(folder)
    tree = as_tree(config.model_dump(mode="json"), CONFIG)
    for each in assignments:
        tree = assigned(tree, Assignment.parse(each) if isinstance(each, str) else each)
    config = validated(plain(tree))
    check(config)
    if before is not None:
        refuse_fixed(folder, changes(_complete(before, folder), config.model_dump(mode="json")))
    return config


def settings_in_force(folder: Path) -> Mapping[str, Any] | None:
    """Return the settings that a run was last going on with, from its history or, where that is
    missing or damaged, from its newest checkpoint; None where neither has any.
    """
    try:
        found = read_history(folder).settings()
    except (HistoryError, OSError):
        found = None
    if found is not None:
        return found
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        if found := settings_of(path):
            return found
    return None


def edits(folder: Path, config: Config) -> list[Change]:
    """Return in what settings differ from those that a run was last going on with."""
    before = settings_in_force(folder)
    if before is None:
        return []
    try:
        return changes(_complete(before, folder), config.model_dump(mode="json"))
    except ConfigError:  # of another version
        return []


def settings_of(checkpoint: Path) -> Mapping[str, Any] | None:
    """Return the settings that a checkpoint was written with; None where it has none."""
    try:
        found = json.loads((checkpoint / "state.json").read_bytes()).get("settings")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, dict) and found else None


def _parsed(settings: Mapping[str, Any], folder: Path) -> Config:
    try:
        return parse_config(settings)
    except ConfigError as error:
        raise ConfigError(f"the settings that {folder} was started with: {error}") from None


def _complete(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings with defaults for those that were added to this package since."""
    return _parsed(settings, folder).model_dump(mode="json")


def refuse_fixed(folder: Path, found: Sequence[Change]) -> None:
    """Refuse changes that a run cannot go on with.

    Raises:
        ConfigError: With the differences, the reasons and the alternative.
    """
    problem = refusal(found)
    if problem:
        raise ConfigError(
            f"{folder}: {problem}; leave them as they were (in {CONFIG}, or without the option), "
            "or start a new run with another --out"
        )


# --- what is there --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """How a run begins or goes on, from all that is in its folder.

    Attributes:
        folder: The run.
        config: Its settings from now on.
        prompts: Digests of its prompts.
        checkpoint: Where it goes on, verified; None: from the beginning.
        changed: Settings that are other than before.
        edited: Keys of those that stand in ``config.yaml`` already.
        begins: Whether the history begins with this.
        notes: What a reader of the results should know; they were said.
    """

    folder: Path
    config: Config
    prompts: Mapping[str, Any]
    checkpoint: Path | None = None
    changed: Sequence[Change] = ()
    edited: frozenset[str] = frozenset()
    begins: bool = True
    notes: tuple[str, ...] = ()

    def enter(self, iteration: int, recorded: int, say: Callable[[str], None]) -> None:
        """Write down that the run begins or goes on; set lost metrics aside.

        Args:
            iteration: Number of finished iterations.
            recorded: Those of them whose metrics are written.
            say: Told of each change and each loss.
        """
        notes = [*self.notes, *settle_metrics(self.folder, recorded, say)]
        for change in self.changed:
            say(f"from iteration {iteration + 1} on: {change}")
        # The file before the history: where a crash comes between the two, the changes are met
        # again as edits of the file, and written down then.
        atomic_write(self.folder / CONFIG, dump_config(self.config))
        settings = {"settings": self.config.model_dump(mode="json")}
        if self.begins:
            settings |= {"prompts": dict(self.prompts), "directory": str(Path.cwd())}
        first = "start" if self.begins else "resume"
        append_history(
            self.folder,
            *(line_of("note", iteration, text=note) for note in notes),
            *(
                line_of(
                    "change", iteration, key=c.key, old=c.old, new=c.new,
                    given=CONFIG if c.key in self.edited else "--set",
                )
                for c in self.changed
            ),
            line_of(first, iteration, **settings),
        )  # fmt: skip


def arrive(
    folder: Path, config: Config, prompts: Mapping[str, Any], say: Callable[[str], None]
) -> Arrival:
    """Return how a run begins or goes on in a folder; the folder is owned.

    Nothing is written, but that partial folders are tidied up, and a damaged history is renamed.

    Args:
        folder: The run's.
        config: Its settings from now on.
        prompts: Digests of its prompts, by use.
        say: Told of what is damaged and passed over.

    Raises:
        ConfigError: If a setting or the prompts differ that cannot change, or the checkpoints of
            finished iterations are gone.
        CheckpointError: If all checkpoints are damaged.
        ValueError: If a line of the metrics is no record.
    """
    notes: list[str] = []

    def tell(text: str) -> None:
        notes.append(text)
        say(text)

    checkpoints = folder / "checkpoints"
    refuse_wrong_kinds(folder)
    settle_folders(checkpoints)
    records = read_metrics(folder / "metrics.jsonl")
    history = _history(folder, tell)
    checkpoint = newest_sound(checkpoints, tell)
    before = history.settings()
    if before is None and checkpoint is not None:
        before = settings_of(checkpoint)
        tell(
            f"{history.path} says nothing of how the run began; its settings are compared with "
            f"those in checkpoint {checkpoint.name}"
            if before is not None
            else f"neither {history.path} nor checkpoint {checkpoint.name} says which settings the "
            f"run began with; those of {CONFIG} are taken as they are"
        )
    changed: list[Change] = []
    if before is not None:
        changed = changes(_complete(before, folder), config.model_dump(mode="json"))
        refuse_fixed(folder, changed)
        refuse_other_prompts(folder, history, prompts)
        every = _complete(before, folder)["checkpoints"]["every"]
    else:
        every = config.checkpoints.every
    if checkpoint is None:
        refuse_lost(folder, history, records, every)
        if records:
            tell(f"{folder} stopped before its first checkpoint: it begins again at iteration 1")
    elif config.iterations < number_of(checkpoint):
        raise ConfigError(
            f"iterations = {config.iterations}, and {number_of(checkpoint)} are finished in "
            f"{folder}; give at least that many"
        )
    return Arrival(
        folder,
        config,
        prompts,
        checkpoint,
        changed,
        _edited(folder, changed),
        begins=history.settings() is None,
        notes=tuple(notes),
    )


FOLDERS = ("checkpoints", "evaluation", "model")
FILES = (
    CONFIG, HISTORY, "metrics.jsonl", "metrics.lost.jsonl", "evaluation/base.npz",
    "evaluation/base.json", "evaluation/tuned.npz", "evaluation/tuned.json",
    "checkpoints/best.json", "summary.json", "curves.png", "samples.png", "report.html",
)  # fmt: skip
"""What a run writes into its folder."""


def refuse_wrong_kinds(folder: Path) -> None:
    """Refuse a file where a run has a folder, and the reverse: writing would fail when it is late.

    Raises:
        ConfigError: With the first one.
    """
    for name in FOLDERS:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ConfigError(f"{folder / name} is no folder; put the run's own back there")
    for name in FILES:
        if (folder / name).is_dir():
            raise ConfigError(f"{folder / name} is a folder, not a file; move it away")


def _history(folder: Path, tell: Callable[[str], None]) -> History:
    try:
        history = read_history(folder)
    except HistoryError as error:
        aside = set_aside(folder / HISTORY)
        tell(f"{error}; it is {aside.name} now, and a new one begins")
        return History(folder / HISTORY)
    if history.torn:
        tell(f"{history.path}: the last line was incomplete, after a crash, and is left out")
    return history


def _edited(folder: Path, changed: Sequence[Change]) -> frozenset[str]:
    """Return which changes stand in ``config.yaml``."""
    try:
        written = read_run(folder).model_dump(mode="json")
    except (ConfigError, OSError):
        return frozenset()
    held = flat(written)
    return frozenset(c.key for c in changed if held.get(c.key, ABSENT) == c.new)


def refuse_other_prompts(folder: Path, history: History, prompts: Mapping[str, Any]) -> None:
    """Refuse prompts with another content than those that the run began with.

    Raises:
        ConfigError: With the use of the first ones that differ.
    """
    for use, before in history.prompts().items():
        now = prompts.get(use)
        if now != before:
            raise ConfigError(
                f"{folder}: the prompts of {use} are not those that the run began with: "
                f"{now and now['number']} now, {before['number']} then"
                + (", with another content" if now and now["number"] == before["number"] else "")
                + "; put the former ones back, or start a new run with another --out"
            )


def refuse_lost(
    folder: Path, history: History, records: Sequence[Mapping[str, Any]], every: int
) -> None:
    """Refuse to begin again where checkpoints of finished iterations are gone.

    A run that was killed while its first checkpoint was written has as many records as there are
    iterations between two checkpoints, and may begin again.

    Raises:
        ConfigError: With what says so.
    """
    last = max((r["iteration"] for r in records if r.get("iteration")), default=0)
    signs = {
        f"metrics.jsonl has {last} iterations": last > every,
        f"{HISTORY} mentions iteration {history.iteration}": history.iteration > 0,
        "there is a tuned model": (folder / "model").exists(),
        "there is a summary": (folder / "summary.json").exists(),
    }
    found = [sign for sign, holds in signs.items() if holds]
    if found:
        raise ConfigError(
            f"{folder / 'checkpoints'} has no checkpoint, although {found[0]}; nothing is begun "
            "again over it: put the checkpoints back, or start anew with another --out "
            f"(chunkgrpo train {folder / CONFIG} --out NEW)"
        )


def settle_metrics(folder: Path, recorded: int, say: Callable[[str], None]) -> list[str]:
    """Set aside records of iterations that are done again; return what is lost or wrong, said."""
    path = folder / "metrics.jsonl"
    found = []
    if torn_line(path):
        found.append(f"{path}: the last line was incomplete, after a crash, and is cut off")
    moved = truncate_metrics(path, recorded)
    if moved:
        found.append(
            f"{path}: {moved} record{'s' * (moved > 1)} of iterations after {recorded}, which are "
            f"done again, {'are' if moved > 1 else 'is'} in {lost_metrics(path).name} now"
        )
    problems = irregular_iterations(read_metrics(path), recorded)
    found += [f"{path}: {problem}; curves lack them or show them twice" for problem in problems]
    for line in found:
        say(line)
    return found
