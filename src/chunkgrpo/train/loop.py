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
from chunkgrpo.runtime.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from chunkgrpo.runtime.ema import Averaging, Ema
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
        checkpoint_every: Iterations between checkpoints.
        evaluate_every: Iterations between small held-out evaluations; 0 turns them off.
        overlap: Score images in threads while later ones are sampled.
        seed: Seed of everything random.
    """

    iterations: int = 50
    prompts: int = 16
    group_size: int = 12
    checkpoint_every: int = 10
    evaluate_every: int = 10
    overlap: bool = False
    seed: int = 0


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
        on_nonfinite: What to do with an update that is not finite.
        on_iteration: Called with every metrics record.
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
    on_nonfinite: AnyNonFiniteRule = field(default_factory=StopNonFinite)
    on_iteration: Callable[[Mapping[str, Any]], None] = lambda record: None

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
            True when finished; False when interrupted (everything is saved then).

        Raises:
            RewardError: If a reward gives no usable score. All finished iterations are saved: a
                later call continues with the one that failed.
            NonFiniteError: If a number is not finite and may not be left out. Nothing is saved
                then: the last checkpoint may be the last that can be trained.
        """
        self.resume()
        truncate_metrics(self.folder / "metrics.jsonl", self.iteration)
        with (
            MetricsWriter(self.folder / "metrics.jsonl") as metrics,
            finish_on_interrupt(self.stop),
        ):
            while self.iteration < self.budget.iterations and not self.stopped:
                started = time.perf_counter()
                try:
                    record = self.train_once()
                except RewardError as error:
                    # Scores come before any update, so this is the state after the last iteration.
                    raise self.saved_before(error) from error
                except NonFiniteError as error:
                    record = self.without_updates(error)
                self.iteration += 1
                self.seconds += time.perf_counter() - started
                record |= {"iteration": self.iteration, "seconds": self.seconds}
                try:
                    record |= self.evaluate_if_due()
                except RewardError as error:
                    metrics.write(record)
                    raise self.saved_before(error) from error
                except NonFiniteError as error:
                    metrics.write(record)
                    raise self.located(error) from error
                self.on_iteration(metrics.write(record))
                self.save_if_due()
        return self.iteration >= self.budget.iterations

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
        """Evaluate the averaged policy on a few held-out prompts, if it is due."""
        every = self.budget.evaluate_every
        if not every or self.iteration % every:
            return {}
        with self.averaged():
            seed = derive_seed(self.budget.seed, 2)
            return self.evaluator.summary(self.policy, seed, f"{self.iteration:06d}-evaluation-")

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
        """End the run after the current iteration.

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
        found = list_checkpoints(self.folder / "checkpoints")
        if not found or found[-1].name != f"{self.iteration:06d}":
            self.save()
        saved = f"all {self.iteration} finished iterations are saved, go on with --resume"
        return RewardError(error.reward, f"{error.reason}; {saved} {self.folder}")

    def save_if_due(self) -> None:
        """Write a checkpoint, if it is due."""
        last = self.iteration == self.budget.iterations
        if self.iteration % self.budget.checkpoint_every == 0 or last or self.stopped:
            self.save()

    @property
    def changing(self) -> tuple[Any, ...]:
        """All that changes while training."""
        return self.names, self.parameters, self.ema, self.optimizer, self.algorithm

    def save(self) -> None:
        """Write a checkpoint."""
        tensors, info = training_state(*self.changing)
        info |= {"num_updates": self.num_updates, "seconds": self.seconds}
        info |= {"skipped_in_a_row": self.guard.in_a_row}
        save_checkpoint(self.folder / "checkpoints", self.iteration, tensors, info)

    def resume(self) -> None:
        """Continue exactly from the newest checkpoint, if there is one."""
        found = list_checkpoints(self.folder / "checkpoints")
        if not found:
            return
        tensors, info = load_checkpoint(found[-1])
        restore_training_state(tensors, info, *self.changing)
        self.iteration, self.num_updates = info["iteration"], info["num_updates"]
        self.seconds = info["seconds"]
        self.guard.in_a_row = info.get("skipped_in_a_row", 0)
