# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chunkgrpo.config import Config, dump_config
from chunkgrpo.config.build import build_prompts, build_trainer
from chunkgrpo.config.paths import with_absolute_paths
from chunkgrpo.doctor import examine_as_set, lines_of, refuse
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.runs.evaluations import (
    evaluation_identity,
    evaluation_problem,
    prompts_digest,
    save_evaluation,
)
from chunkgrpo.runs.history import append_history, line_of
from chunkgrpo.runs.reporting import write_report
from chunkgrpo.runs.resuming import CONFIG, arrive
from chunkgrpo.runtime.files import (
    atomic_folder,
    atomic_write,
    disk_problem,
    is_disk_problem,
    settle_folders,
)
from chunkgrpo.runtime.lock import FolderLock
from chunkgrpo.train.loop import Trainer
from chunkgrpo.types import ProgressHook, Prompt


def train_run(
    config: Config,
    folder: Path,
    on_iteration: Callable[[Mapping[str, Any]], None],
    on_phase: Callable[[str], ProgressHook],
    on_start: Callable[[Reward], None] = lambda judge: None,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Evaluate the base, train, evaluate again and report.

    Continues where an earlier call with the same folder stopped. The folder is owned meanwhile.

    Args:
        config: What to run.
        folder: The run directory.
        on_iteration: Called with every metrics record.
        on_phase: Called with the name of a long phase; returns its progress hook.
        on_start: Called with the judge once everything is loaded and checked.
        say: Called with a line for whoever watches the run.

    Returns:
        The summary, or None where the run was interrupted (all is saved).

    Raises:
        LockError: If another process owns the folder; nothing was loaded then.
        CheckpointError: If all checkpoints are damaged, or one cannot be written.
        OSError: If the folder cannot be written.
        DoctorError: If a check of the doctor failed.
    """
    try:
        with FolderLock(folder) as lock:
            for each in (folder, folder / "checkpoints", folder / "evaluation"):
                settle_folders(each)
            return train_owned(config, folder, lock, on_iteration, on_phase, on_start, say)
    except OSError as error:
        if not is_disk_problem(error):
            raise
        hint = f"go on with: chunkgrpo train --resume {folder}"
        raise OSError(f"{disk_problem(error, folder)}; nothing saved is lost, {hint}") from error


def train_owned(
    config: Config,
    folder: Path,
    lock: FolderLock,
    on_iteration: Callable[[Mapping[str, Any]], None],
    on_phase: Callable[[str], ProgressHook],
    on_start: Callable[[Reward], None],
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Do what :func:`train_run` says, in a folder that is owned."""
    started = time.perf_counter()
    config = with_absolute_paths(config)
    prompts = {use: build_prompts(config, use) for use in ("train", "watch", "final")}
    arrival = arrive(folder, config, described(prompts), say)
    trainer = build_trainer(config, folder)
    on_start(trainer.evaluator.judge)
    trainer.on_iteration, trainer.say, trainer.check_folder = on_iteration, say, lock.check
    trainer.settings = config.model_dump(mode="json")
    if arrival.begins:
        atomic_write(folder / CONFIG, dump_config(config))
    e, final = config.evaluation, prompts["final"]
    if isinstance(trainer.policy, PipelinePolicy) and trainer.policy.embeddings:
        wanted = [*trainer.every_prompt(), *final]
        encode_ahead(trainer.policy, wanted, on_phase, release=False)
    examine_first(trainer, config, say, resumed=not arrival.begins)
    identity = evaluation_identity(config, final)
    evaluate_base(trainer, folder, final, config, identity, on_phase, say)
    trainer.resume(arrival.checkpoint)
    arrival.enter(trainer.iteration, trainer.num_recorded, say)
    if not trainer.run():
        append_history(folder, line_of("stop", trainer.iteration))
        return None
    hook = on_phase(f"evaluating the tuned model on {len(final)} held-out prompts")
    with trainer.averaged():
        tuned = trainer.evaluate(final, e.final_seeds, e.seed, progress=hook)
        lock.check()
        with atomic_folder(folder / "model") as partial:
            trainer.policy.save(partial)
    append_history(folder, line_of("finish", trainer.iteration))
    save_evaluation(folder / "evaluation" / "tuned.npz", tuned, identity)
    minutes = (time.perf_counter() - started) / 60
    return write_report(config, folder, trainer.evaluator.judge, trainer.seconds, minutes)


def examine_first(
    trainer: Trainer,
    config: Config,
    say: Callable[[str], None],
    resumed: bool,
) -> None:
    """Have the doctor examine a run; of one that goes on, only what needs no network.

    Text encoders whose results are on the disk are released as soon as the doctor needs them no
    more.

    Raises:
        DoctorError: If a check failed.
    """
    policy, begun = trainer.policy, time.perf_counter()

    def release() -> None:
        if isinstance(policy, PipelinePolicy) and policy.embeddings:
            policy.release_text_encoders()

    findings = examine_as_set(trainer, config, quick=resumed, release=release)
    for line in lines_of(findings, time.perf_counter() - begun):
        say(line)
    refuse(findings)


def described(prompts: Mapping[str, PromptSet]) -> dict[str, Any]:
    """Return number and digest of the prompts of each use, as histories have them."""
    return {
        use: {"number": len(found), "sha256": prompts_digest(found)}
        for use, found in prompts.items()
    }


def evaluate_base(
    trainer: Trainer,
    folder: Path,
    final: PromptSet,
    config: Config,
    identity: Mapping[str, Any],
    on_phase: Callable[[str], ProgressHook],
    say: Callable[[str], None],
) -> None:
    """Evaluate the base, unless a sound evaluation of it is there; nothing is trained yet."""
    path = folder / "evaluation" / "base.npz"
    problem = evaluation_problem(path, identity)
    if problem is None:
        return
    if path.exists():
        say(f"{problem}; the base is evaluated again")
    hook = on_phase(f"evaluating the base on {len(final)} held-out prompts")
    e = config.evaluation
    base = trainer.evaluate(final, e.final_seeds, e.seed, progress=hook)
    trainer.check_folder()
    save_evaluation(path, base, identity)


def encode_ahead(
    policy: PipelinePolicy,
    prompts: Sequence[Prompt | str],
    on_phase: Callable[[str], ProgressHook],
    release: bool = True,
) -> None:
    """Encode every prompt of a run to disk, and release the text encoders unless told otherwise.

    One line is printed: how many were encoded, and how many were found.
    """
    cache = policy.embeddings
    assert cache is not None
    wanted = list(dict.fromkeys(policy.encoding_keys(prompts)))
    missing = [key for key in wanted if key not in cache]
    found = len(wanted) - len(missing)
    if missing:
        new = f"{len(missing)} prompt{'s' * (len(missing) > 1)}"
        others = f", {found} are there" if found else ""
        hook = on_phase(f"encoding {new} into {cache.folder}{others}")
        for number, _ in enumerate(policy.encode_new(missing), 1):
            hook(number, len(missing))
    else:
        unloaded = "" if policy.has_text_encoders else ", text encoders not loaded"
        hook = on_phase(f"found {found} encoded prompts in {cache.folder}{unloaded}")
        hook(found, found)
    if release:
        policy.release_text_encoders()
