# SPDX-License-Identifier: Apache-2.0
"""The training loop, which composes policy, sampler, rewards, credit and algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from chunkgrpo.algorithms.protocol import Algorithm
from chunkgrpo.core.finite import NonFiniteError
from chunkgrpo.credit import Credit
from chunkgrpo.evaluate import Evaluation
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import MetricsWriter, truncate_metrics
from chunkgrpo.rewards.monitor import RewardMonitor
from chunkgrpo.rewards.protocol import RewardError
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import (
    Checkpointing,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_sound,
    number_of,
    save_checkpoint,
    score_of,
)
from chunkgrpo.runtime.ema import Averaging, Ema
from chunkgrpo.runtime.files import settle_folders
from chunkgrpo.runtime.finite import AnyNonFiniteRule, FiniteGuard, StopNonFinite
from chunkgrpo.runtime.interrupts import finish_on_interrupt
from chunkgrpo.runtime.optimizers import Optimization
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.train.checkpoint import restore_training_state, training_state
from chunkgrpo.train.collecting import Collector, trainable
from chunkgrpo.train.evaluating import Evaluator
from chunkgrpo.train.metrics import PhaseClock, UpdateLog, rollout_record
from chunkgrpo.types import Experience, ProgressHook, Prompt


@dataclass(frozen=True)
class Budget:
    """Run length, batch sizes and intervals.

    Attributes:
        iterations: Number of iterations.
        prompts: P prompts per rollout.
        group_size: G samples per prompt.
        evaluate_every: Iterations between small held-out evaluations; 0 turns them off.
        overlap: Score images in threads while later ones are sampled.
        seed: Seed of everything random.
    """

    iterations: int = 50
    prompts: int = 16
    group_size: int = 12
    evaluate_every: int = 10
    overlap: bool = False
    seed: int = 0


class Unfinished(Exception):
    """An evaluation was given up, because the run is to end."""


@dataclass
class Trainer:
    """A run; :meth:`run` trains and resumes.

    Attributes:
        policy, sampler, algorithm, credit, scorer: The method. Sampler and algorithm share the
            transition. The sampler's window is the algorithm's choice, iteration by iteration.
        prompts: What is trained on.
        evaluator: Evaluates on held-out prompts.
        folder: The run directory.
        budget: Run length, batch sizes and intervals.
        optimization, averaging: How weights are updated and averaged.
        checkpoints: When checkpoints are written, and which are kept.
        with_model: Whether a checkpoint holds the model's own files, too: where they are small.
        on_nonfinite: What to do with an update that is not finite.
        on_iteration: Called with every metrics record.
        say: Called with a line for whoever watches the run.
        settings: Kept with every checkpoint: what the run was set to.
        check_folder: Called before anything is written into the folder; raises where that is no
            longer this run's.
    """

    policy: Policy
    sampler: Sampler
    algorithm: Algorithm
    credit: Credit
    scorer: Scorer
    prompts: PromptSet
    evaluator: Evaluator
    folder: Path
    budget: Budget = field(default_factory=Budget)
    optimization: Optimization = field(default_factory=Optimization)
    averaging: Averaging = field(default_factory=Averaging)
    checkpoints: Checkpointing = field(default_factory=Checkpointing)
    with_model: bool = False
    on_nonfinite: AnyNonFiniteRule = field(default_factory=StopNonFinite)
    on_iteration: Callable[[Mapping[str, Any]], None] = lambda record: None
    say: Callable[[str], None] = print
    check_folder: Callable[[], None] = lambda: None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = self.policy.named_parameters()
        self.names, self.parameters = list(named), list(named.values())
        self.optimizer = self.optimization.make(self.parameters)
        self.ema = Ema(self.parameters, self.averaging.decay, self.averaging.warmup)
        self.guard = FiniteGuard(self.on_nonfinite, self.names)
        self.num_updates = 0
        self.iteration = 0
        self.seconds = 0.0
        self.stopped = False
        self.unrecorded: dict[str, Any] | None = None
        unscored = self.folder / "unscored"
        self.scorer = replace(self.scorer, folder=unscored)
        self.evaluator = replace(self.evaluator, folder=unscored)

    @cached_property
    def monitor(self) -> RewardMonitor:
        """Metrics about the rewards."""
        return RewardMonitor(self.scorer, self.credit.convention)

    def run(self) -> bool:
        """Train to the last iteration, from the newest checkpoint where there is one.

        Returns:
            True when finished; False when it was told to stop (everything is saved then).

        Raises:
            RewardError: If a reward gives no usable score. All finished iterations are saved: a
                later call continues with the one that failed.
            CheckpointError: If all checkpoints are damaged, or one cannot be written.
            NonFiniteError: If a number is not finite and may not be left out. Nothing is saved
                then: the last checkpoint may be the last that can be trained.
        """
        if not self.iteration:
            self.resume()
        path = self.folder / "metrics.jsonl"
        truncate_metrics(path, self.num_recorded)
        with MetricsWriter(path) as metrics, finish_on_interrupt(self.stop):
            while not self.stopped and not self.finished:
                try:
                    self.advance(metrics)
                except RewardError as error:
                    # Scores come before any update, so this is the state after the last iteration.
                    raise self.saved_before(error) from error
        return self.finished and not self.stopped

    @property
    def finished(self) -> bool:
        """Whether every iteration is trained and recorded."""
        return self.iteration >= self.budget.iterations and self.unrecorded is None

    @property
    def num_recorded(self) -> int:
        """Iterations whose metrics are written: not the last one, while its evaluation waits."""
        return self.iteration - (self.unrecorded is not None)

    def advance(self, metrics: MetricsWriter) -> None:
        """Train one iteration, unless one still waits to be evaluated; evaluate, record, save."""
        if self.unrecorded is None:
            started = time.perf_counter()
            try:
                record = self.train_once()
            except NonFiniteError as error:
                record = self.without_updates(error)
            self.iteration += 1
            self.seconds += time.perf_counter() - started
            self.unrecorded = record | {"iteration": self.iteration, "seconds": self.seconds}
        try:
            found = self.evaluate_if_due()
        except Unfinished:
            self.save()
            return
        except NonFiniteError as error:
            metrics.write(self.unrecorded)
            raise self.located(error) from error
        self.check_folder()
        written, self.unrecorded = metrics.write(self.unrecorded | found), None
        self.on_iteration(written)
        self.save_if_due(found.get("accuracy"))

    def train_once(self) -> dict[str, Any]:
        """Sample, score, compute advantages, and update the policy; return the metrics."""
        clock, log = PhaseClock(self.policy.device), UpdateLog()
        generator = Generator().manual_seed(derive_seed(self.budget.seed, self.iteration, 0))
        prompts = self.prompts_of(self.iteration)
        request = self.algorithm.begin(self.iteration, generator)
        with self.algorithm.sampling(self.policy):
            label = f"{self.iteration + 1:06d}-"
            trajectory, scores = self.collector.collect(prompts, request, generator, clock, label)
        advantages = self.credit(scores, len(prompts), self.algorithm.updates)
        clock.lap("reward")
        values = advantages.values.to(trajectory.device)
        chosen = trainable(trajectory, advantages.chosen)
        experience = Experience(trajectory, values, chosen)
        for part in self.algorithm.losses(self.policy, experience, generator):
            part.backward()
            log.add(part)
            if part.ends_update:
                self.update(log)
        self.guard.look()
        own = self.algorithm.finish(self.policy, self.num_updates)
        clock.lap("train")
        seconds = clock.seconds()
        return {
            **self.monitor.record(scores, len(prompts), self.iteration + 1),
            **rollout_record(trajectory, request, scores, advantages),
            **log.record(trajectory.num_trained),
            **own,
            "phase_seconds": seconds,
            "images_per_second": trajectory.num_samples / sum(seconds.values()),
        }

    @cached_property
    def collector(self) -> Collector:
        """What samples and scores."""
        b = self.budget
        return Collector(
            self.policy, self.sampler, self.scorer, b.group_size, b.overlap, self.credit.by_chunk
        )

    def prompts_of(self, iteration: int) -> list[Prompt]:
        """Return the prompts that an iteration trains on."""
        seed = derive_seed(self.budget.seed, 1)
        rows = self.prompts.batch_rows(iteration, self.budget.prompts, seed)
        return [self.prompts.prompts[row] for row in rows]

    def every_prompt(self) -> list[Prompt]:
        """Return every prompt of the run, in the order of first use."""
        found = [p for i in range(self.budget.iterations) for p in self.prompts_of(i)]
        return found + list(self.evaluator.held_out.prompts if self.budget.evaluate_every else ())

    def update(self, log: UpdateLog) -> None:
        """Clip the gradient, step, and average, unless a number of the update is not finite."""
        o, left = self.optimization, self.budget.iterations - self.iteration
        gradients = [p.grad for p in self.parameters]
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if self.guard.refuses(*log.present, gradients, norm):
            self.optimizer.zero_grad(set_to_none=True)
            log.left_out()
            return
        torch.nn.utils.clip_grads_with_norm_(self.parameters, o.max_grad_norm, norm)
        rate = o.rate(self.num_updates, max(1, left) / self.budget.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        if self.averaging.decay:
            self.ema.update(self.parameters)
        self.guard.has_stepped(self.parameters, self.ema.values if self.averaging.decay else ())
        log.ended(norm)

    def without_updates(self, error: NonFiniteError) -> dict[str, Any]:
        """Leave out an iteration whose images are not finite; return its metrics.

        Raises:
            NonFiniteError: If it may not be left out.
        """
        try:
            self.guard.leave_out(error)
        except NonFiniteError as final:
            raise self.located(final) from error
        self.optimizer.zero_grad(set_to_none=True)
        return {"skipped_updates": self.algorithm.updates}

    def located(self, error: NonFiniteError) -> NonFiniteError:
        """Return an error with the iteration, and with where to go on."""
        found = list_checkpoints(self.folder / "checkpoints")
        saved = f"the last checkpoint is {found[-1]}" if found else "no checkpoint was written yet"
        if found and found[-1].name == f"{self.iteration:06d}":
            saved = f"the last checkpoint, {found[-1]}, has the weights that gave this"
            saved += f"; the one before is {found[-2]}" if len(found) > 1 else ""
        note = f"{error.note}; {saved}" if error.note else saved
        present = self.iteration + (error.phase != "evaluation")
        return error.at(f"iteration {present}", note)

    def evaluate_if_due(self) -> dict[str, Any]:
        """Evaluate the averaged policy on a few held-out prompts, if it is due.

        Raises:
            Unfinished: If the run is to end first.
        """
        every = self.budget.evaluate_every
        if not every or self.iteration % every:
            return {}

        def give_up(done: int, total: int) -> None:
            if self.stopped:
                raise Unfinished

        give_up(0, 0)
        seed, label = derive_seed(self.budget.seed, 2), f"{self.iteration:06d}-evaluation-"
        with self.averaged():
            return self.evaluator.summary(self.policy, seed, label, give_up)

    def evaluate(
        self, prompts: PromptSet, num_seeds: int, seed: int, progress: ProgressHook | None = None
    ) -> Evaluation:
        """Evaluate the policy with its current weights; see :meth:`Evaluator.evaluate`."""
        label = f"{self.iteration:06d}-evaluation-"
        return self.evaluator.evaluate(self.policy, prompts, num_seeds, seed, label, progress)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the policy has the averaged weights, if averaging is on."""
        if not self.averaging.decay or self.ema.num_updates == 0:
            yield
            return
        with self.ema.applied(self.parameters):
            yield

    def stop(self) -> None:
        """End the run after the current iteration, and in an evaluation after the current batch.

        Raises:
            KeyboardInterrupt: If it was called before.
        """
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def saved_before(self, error: RewardError) -> RewardError:
        """Save all finished iterations; return the error with a note on that."""
        if not self.iteration:
            return RewardError(error.reward, error.reason)
        numbers = [number_of(path) for path in list_checkpoints(self.folder / "checkpoints")]
        if self.unrecorded is not None or self.iteration not in numbers:
            self.save()
        saved = f"all {self.iteration} finished iterations are saved, go on with --resume"
        return RewardError(error.reward, f"{error.reason}; {saved} {self.folder}")

    def save_if_due(self, score: float | None = None) -> None:
        """Write a checkpoint, if one is due or the judge's score is the best yet."""
        last = self.iteration == self.budget.iterations
        if self.checkpoints.due(self.iteration) or last or self.stopped or self.is_best(score):
            self.save(score)

    def is_best(self, score: float | None) -> bool:
        """Return whether no checkpoint that is kept for its score has one as high."""
        if score is None or not self.checkpoints.keep_best:
            return False
        found = list_checkpoints(self.folder / "checkpoints")
        best = best_checkpoint([path for path in found if number_of(path) < self.iteration])
        top = score_of(best) if best is not None else None
        return top is None or score > top

    @property
    def changing(self) -> tuple[Any, ...]:
        """All that changes while training."""
        return self.names, self.parameters, self.ema, self.optimizer, self.algorithm

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint, with the judge's score of this iteration where there is one."""
        self.check_folder()
        tensors, info = training_state(*self.changing)
        info |= {"num_updates": self.num_updates, "seconds": self.seconds, "score": score}
        info |= {"unrecorded": self.unrecorded, "skipped_in_a_row": self.guard.in_a_row}
        info["settings"] = self.settings
        save_checkpoint(
            self.folder / "checkpoints",
            self.iteration,
            tensors,
            info,
            self.checkpoints,
            self.save_model if self.with_model else None,
        )

    def save_model(self, folder: Path) -> None:
        """Save the averaged policy in the format of its own library."""
        with self.averaged():
            self.policy.save(folder)

    def resume(self, path: Path | None = None) -> None:
        """Continue exactly from a checkpoint.

        Args:
            path: It, verified; the newest sound one, if there is one, where None.

        Raises:
            CheckpointError: If there are checkpoints and all are damaged.
            ValueError: If it is of another model or method.
        """
        if path is None:
            folder = self.folder / "checkpoints"
            settle_folders(folder)
            path = newest_sound(folder, self.say)
        if path is None:
            return
        tensors, info = load_checkpoint(path)
        restore_training_state(tensors, info, *self.changing)
        self.iteration, self.num_updates = info["iteration"], info["num_updates"]
        self.seconds, self.unrecorded = info["seconds"], info["unrecorded"]
        self.guard.in_a_row = info.get("skipped_in_a_row", 0)
