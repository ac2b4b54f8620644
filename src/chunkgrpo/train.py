# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.protocol import Algorithm
from chunkgrpo.core.chunks import ChunkPlan
from chunkgrpo.core.credit import (
    combined_advantages,
    combined_chunk_advantages,
    hold_still,
)
from chunkgrpo.core.dynamics import mean_curve
from chunkgrpo.core.learned import LearnedSelection, gradient_usefulness, reward_usefulness
from chunkgrpo.core.sde import Kernel, predict_clean
from chunkgrpo.core.windows import ChunkWindow, WindowSchedule, restrict_plan
from chunkgrpo.evaluate import Evaluation, EvaluationSettings, evaluate
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import MetricsWriter, truncate_metrics
from chunkgrpo.report.statistics import wilson_interval
from chunkgrpo.rewards.overlap import PendingScores, ScoringQueue
from chunkgrpo.rewards.protocol import Reward, RewardError
from chunkgrpo.rewards.scoring import Scorer, is_groupwise, is_share, jointly_kept
from chunkgrpo.rewards.watch import RewardWatch
from chunkgrpo.rollout import Store, Tail, rollout
from chunkgrpo.runtime.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    name_parameters,
    optimizer_tensors,
    save_checkpoint,
)
from chunkgrpo.runtime.ema import Ema
from chunkgrpo.runtime.optimizers import make_optimizer
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.types import Experience, LossPart, Prompt, RewardBatch, Trajectory


@dataclass(frozen=True)
class TrainSettings:
    """How long, how much at a time, and how often to look.

    Attributes:
        iterations: Rollouts.
        num_prompts: P prompts a rollout.
        group_size: G images a prompt.
        same_noise: Start each group from one noise.
        rollout_batch: Most samples in one forward of a rollout or an evaluation.
        advantage: Convention of the advantages (``core.credit.CONVENTIONS``).
        advantage_clip: Largest absolute advantage.
        credit: ``"trajectory"`` credits every chunk with the image's reward; ``"gain"`` each chunk
            with what it added to the reward of the predicted clean image.
        combine: How several rewards become one signal (``core.credit.COMBINATIONS``).
        on_error: ``"stop"`` or ``"drop"``, what a score that is not usable does (``Scorer``).
        quantise: Round images to 8 bits before they are scored.
        async_rewards: Score images in threads while later ones are rolled out. The scores are the
            same ones.
        optimizer: Which form of AdamW (``runtime.optimizers``).
        learning_rate, betas, eps, weight_decay: Of AdamW.
        warmup: Optimizer steps of linear warm-up.
        fall: Share of the run, at its end, over which the rate falls linearly towards zero.
        max_grad_norm: Gradient clipping.
        ema_decay: Of the averaged weights that are evaluated and saved; 0 turns it off.
        ema_warmup: How the decay rises, see :class:`~.runtime.ema.Ema`.
        store: Where and in which type a rollout's states wait for training.
        evaluate_every: Iterations between small held-out evaluations; 0 turns them off.
        checkpoint_every: Iterations between checkpoints.
        seed: Of everything random.
    """

    iterations: int = 50
    num_prompts: int = 16
    group_size: int = 12
    same_noise: bool = True
    rollout_batch: int = 96
    advantage: str = "group_std"
    advantage_clip: float = 5.0
    credit: str = "trajectory"
    combine: str = "sum"
    on_error: str = "stop"
    quantise: bool = False
    async_rewards: bool = False
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    warmup: int = 0
    fall: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9
    ema_warmup: float = 9.0
    store: Store = field(default_factory=Store)
    evaluate_every: int = 10
    checkpoint_every: int = 10
    seed: int = 0


@dataclass
class Trainer:
    """Everything a run needs; ``run()`` trains and resumes.

    Attributes:
        policy, transition, algorithm: The method. Rollout and algorithm share the transition.
        sigmas: [K+1], the sampling schedule.
        prompts: What is trained on.
        rewards: (reward, weight) pairs that make the training signal.
        held_out: Prompts of the small evaluations while training.
        judge: The reward of the evaluations, in [0, 1].
        folder: The run directory.
        settings: See :class:`TrainSettings`.
        on_iteration: Called with every metrics record.
        windows: Which steps are stochastic and trained; all where None. With a ``ChunkWindow`` the
            algorithm's plan covers all steps, else it covers the window. A ``ChunkWindow`` has the
            algorithm's plan, and gets each new one.
        prefix, tail: How the steps before and after the window are taken, see ``rollout``.
        replan: Measures the policy's dynamics and cuts them into chunks anew.
        refresh: Iterations between calls of ``replan``; 0 keeps the plan.
        usefulness: What a ``LearnedSelection`` of the algorithm observes: ``"gradient"`` or
            ``"reward"``.
        watched: Rewards that score every rollout and are only logged.
        held: Names of those that the advantages must not move, see ``core.credit.hold_still``.
    """

    policy: Policy
    transition: Kernel
    algorithm: Algorithm
    sigmas: Tensor
    prompts: PromptSet
    rewards: Sequence[tuple[Reward, float]]
    held_out: PromptSet
    judge: Reward
    folder: Path
    settings: TrainSettings = field(default_factory=TrainSettings)
    on_iteration: Callable[[Mapping[str, Any]], None] = lambda record: None
    windows: WindowSchedule | None = None
    prefix: str = "ode"
    tail: Tail | None = None
    replan: Callable[[], ChunkPlan] | None = None
    refresh: int = 0
    usefulness: str = "gradient"
    watched: Sequence[Reward] = ()
    held: Sequence[str] = ()

    def __post_init__(self) -> None:
        s = self.settings
        selection = getattr(self.algorithm, "selection", None)
        self.learned = selection if isinstance(selection, LearnedSelection) else None
        self.parameters = self.policy.parameters()
        self.optimizer = make_optimizer(
            s.optimizer, self.parameters, s.learning_rate, s.betas, s.eps, s.weight_decay
        )
        self.ema = Ema(self.parameters, s.ema_decay, s.ema_warmup)
        self.num_updates = 0
        self.iteration = 0
        self.seconds = 0.0
        self.stopped = False

    @cached_property
    def scorer(self) -> Scorer:
        """The rewards, and what happens when one of them misbehaves."""
        s = self.settings
        folder = self.folder / "unscored"
        return Scorer(self.rewards, self.watched, s.combine, s.on_error, folder, s.quantise)

    @cached_property
    def watch(self) -> RewardWatch:
        """What the rewards say about one another."""
        return RewardWatch(self.scorer, self.settings.advantage)

    def run(self) -> bool:
        """Train to the last iteration, from the newest checkpoint where there is one.

        Returns:
            True when finished; False when interrupted (everything is saved then).

        Raises:
            RewardError: If a reward misbehaves. All finished iterations are saved: a later call
                goes on with the one that failed.
        """
        self.resume()
        truncate_metrics(self.folder / "metrics.jsonl", self.iteration)
        with MetricsWriter(self.folder / "metrics.jsonl") as metrics, self.finish_on_interrupt():
            while self.iteration < self.settings.iterations and not self.stopped:
                started = time.perf_counter()
                try:
                    record = self.train_once()
                except RewardError as error:
                    # Scores come before any update, so this is the state after the last iteration.
                    raise self.saved_before(error) from error
                self.iteration += 1
                self.seconds += time.perf_counter() - started
                record |= {"iteration": self.iteration, "seconds": self.seconds}
                try:
                    record |= self.look()
                except RewardError as error:
                    metrics.write(record)
                    raise self.saved_before(error) from error
                self.on_iteration(metrics.write(record))
                every = self.settings.checkpoint_every
                last = self.iteration == self.settings.iterations
                if self.iteration % every == 0 or last or self.stopped:
                    self.save()
        return self.iteration >= self.settings.iterations

    def train_once(self) -> dict[str, Any]:
        """Roll out, score, and take the algorithm's optimizer steps; return the metrics."""
        s = self.settings
        clock = PhaseClock(self.policy.device)
        generator = Generator().manual_seed(derive_seed(s.seed, self.iteration, 0))
        prompts = [self.prompts.prompts[row] for row in self.rows_of(self.iteration)]
        if self.replan and self.refresh and self.iteration and not self.iteration % self.refresh:
            self.adopt(self.replan())
        algorithm, window = self.plan_iteration(generator)
        observer = None
        if self.learned is not None:
            plan = plan_of(algorithm)
            row = torch.ones(1, plan.num_steps)
            drawn = self.learned(plan, row, Generator().manual_seed(0))
            weights_C = self.learned.loss_weights(plan, row, drawn)[0]
            observer = ChunkObserver(plan, self.parameters, self.usefulness, weights_C)
        repeated = [p for p in prompts for _ in range(s.group_size)]
        label = f"{self.iteration + 1:06d}-"
        with ScoringQueue(self.scorer, s.async_rewards) as queue:
            pending = queue.batch(repeated, s.group_size, label)

            def finished(rows: slice, latents: Tensor) -> None:
                clock.lap("rollout")
                pending.add(self.policy.decode(latents))
                clock.lap("decode")

            with self.sampling_policy(algorithm):
                trajectory = rollout(
                    self.policy,
                    prompts,
                    self.transition,
                    self.sigmas,
                    s.group_size,
                    generator,
                    same_noise=s.same_noise,
                    batch_size=s.rollout_batch,
                    window=window,
                    prefix=self.prefix,
                    tail=self.tail,
                    keep_velocities=algorithm.needs_velocities or s.credit == "gain",
                    finished=finished,
                    store=s.store,
                )
            clock.lap("rollout")
            boundaries = []
            if s.credit == "gain":
                plan = plan_of(algorithm)
                boundaries = self.boundaries(queue, trajectory, plan, repeated, label)
            rewards = pending.result()
            boundaries = [*(each.result() for each in boundaries), rewards]
        kept = jointly_kept(boundaries)
        weights, num_prompts = self.scorer.weights, len(prompts)
        options = (weights, num_prompts, s.combine, s.advantage, s.advantage_clip, kept)
        advantages = combined_advantages(stacked(rewards), *options)
        credit = advantages.values
        if s.credit == "gain":
            rewards_RBE = torch.stack([stacked(each) for each in boundaries], dim=2)
            credit = combined_chunk_advantages(rewards_RBE, *options)
        if self.held:
            chosen = torch.arange(len(credit))
            if isinstance(algorithm, ChunkGRPO):
                chosen = algorithm.chosen(credit)
            if kept is not None:  # what has no reward keeps the advantage 0
                chosen = chosen[kept[chosen]]
            held_RB = torch.stack([rewards.watched[name] for name in self.held])
            credit = hold_still(credit, held_RB, num_prompts, chosen)
        clock.lap("reward")
        experience = Experience(trajectory, credit.to(trajectory.device))
        parts: list[Mapping[str, Tensor]] = []
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        for part in algorithm.losses(self.policy, experience, generator):
            if observer is None:
                part.loss.backward()
            else:
                observer.backward(part)
            losses.append(part.loss.detach())
            parts.append(part.diagnostics)
            if part.ends_update:
                norms.append(self.update())
        if algorithm.old is not None:
            algorithm.old.update(self.parameters, self.num_updates)
        if observer is not None and self.learned is not None:
            self.learned.observe(observer.usefulness())
        clock.lap("train")
        pairs = sum(len(d["sample"]) for d in parts if "sample" in d)
        idle = sum(len(d["idle"]) for d in parts if "idle" in d)
        record: dict[str, Any] = {
            **self.watch.record(
                replace(rewards, kept=kept), num_prompts, self.iteration + 1, boundaries[:-1]
            ),
            "advantage_spread": advantages.spread.mean(),
            "zero_spread_groups": advantages.num_zero_spread,
            "loss": torch.stack(losses).sum(),
            "grad_norm": torch.stack(norms).mean(),
            "l1_rel": mean_curve(trajectory.dynamics).tolist(),
            "rollout_evaluations": trajectory.num_evaluations,
            "trained_pairs": pairs - idle,
            "idle_pairs": idle,
            "window": [window.start, window.stop] if window else None,
        }
        if hasattr(algorithm, "plan"):
            record["chunks"] = list(plan_of(algorithm).sizes)
        if self.learned is not None:
            number = plan_of(algorithm).num_chunks
            record["chunk_probability"] = self.learned.probabilities(number).tolist()
        if s.credit == "gain":
            totals_BE = torch.stack([each.total for each in boundaries], dim=1)
            record["chunk_gain"] = totals_BE.diff(dim=1).nanmean(0).tolist()
        record |= summarise(parts, trajectory.num_trained)
        seconds = clock.seconds()
        images_per_second = trajectory.num_samples / sum(seconds.values())
        return record | {"phase_seconds": seconds, "images_per_second": images_per_second}

    def rows_of(self, iteration: int) -> list[int]:
        """Return which prompts an iteration trains on."""
        s = self.settings
        return self.prompts.batch_rows(iteration, s.num_prompts, derive_seed(s.seed, 1))

    def every_prompt(self) -> list[Prompt]:
        """Return the prompts that training will meet, in the order of their first use."""
        rows = dict.fromkeys(
            row for i in range(self.settings.iterations) for row in self.rows_of(i)
        )
        watched = self.held_out.prompts if self.settings.evaluate_every else ()
        return [*(self.prompts.prompts[row] for row in rows), *watched]

    def sampling_policy(self, algorithm: Algorithm) -> AbstractContextManager[None]:
        """Inside this context the policy is the one that samples."""
        if algorithm.samples_old and algorithm.old is not None:
            return algorithm.old.applied(self.parameters)
        return nullcontext()

    def adopt(self, plan: ChunkPlan) -> None:
        """Cut the steps anew, for the algorithm and for a window that branches at chunks."""
        self.algorithm = with_plan(self.algorithm, plan)
        if isinstance(self.windows, ChunkWindow):
            self.windows = replace(self.windows, plan=plan)

    def plan_iteration(self, generator: Generator) -> tuple[Algorithm, range | None]:
        """Choose the iteration's window, and the algorithm whose plan fits it."""
        if self.windows is None:
            return self.algorithm, None
        window = self.windows(self.iteration, generator)
        if not isinstance(self.windows, ChunkWindow):
            return self.algorithm, window
        plan = restrict_plan(plan_of(self.algorithm), window)
        return with_plan(self.algorithm, plan), window

    def boundaries(
        self,
        queue: ScoringQueue,
        trajectory: Trajectory,
        plan: ChunkPlan,
        prompts: Sequence[Prompt],
        label: str,
    ) -> list[PendingScores]:
        """Begin to score the clean prediction where each chunk begins."""
        begun = []
        for start in plan.starts:
            sigma = trajectory.trained_sigmas[start]
            every = slice(None)
            clean = predict_clean(
                trajectory.state(every, start), trajectory.velocity(every, start), sigma
            )
            size = trajectory.group_size
            pending = queue.batch(prompts, size, f"{label}step-{start}-", watched=False)
            for part in clean.split(self.settings.rollout_batch):
                pending.add(self.policy.decode(part))
            begun.append(pending)
        return begun

    def rate_factor(self) -> float:
        """Return what the learning rate is multiplied by now, in (0, 1]."""
        s = self.settings
        rise = min(1.0, (self.num_updates + 1) / s.warmup) if s.warmup else 1.0
        left = max(1, s.iterations - self.iteration) / s.iterations
        return rise * (min(1.0, left / s.fall) if s.fall else 1.0)

    def update(self) -> Tensor:
        """Clip, step, average; return the gradient's norm before clipping."""
        s = self.settings
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, s.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * self.rate_factor()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        if s.ema_decay:
            self.ema.update(self.parameters)
        return norm

    def look(self) -> dict[str, Any]:
        """Evaluate the averaged policy on a few held-out prompts, when it is time to."""
        every = self.settings.evaluate_every
        if not every or self.iteration % every:
            return {}
        with self.averaged():
            result = self.evaluate(self.held_out, 1, seed=derive_seed(self.settings.seed, 2))
        values = result.scores[self.judge.name]
        if is_share(self.judge):
            low, high = wilson_interval(int(values.sum().round()), values.size)
        else:
            half = 1.96 * float(values.std()) / values.size**0.5
            low, high = float(values.mean()) - half, float(values.mean()) + half
        return {"accuracy": float(values.mean()), "accuracy_low": low, "accuracy_high": high}

    def evaluate(self, prompts: PromptSet, num_seeds: int, seed: int, **kwargs: Any) -> Evaluation:
        """Evaluate the policy as it is, by the judge and by every reward that can.

        A groupwise reward can not judge single images. Under ``on_error`` ``"drop"`` rewards other
        than the judge may leave images without a score.

        Raises:
            RewardError: If a score of the judge, or with ``"stop"`` of any reward, is not usable.
        """
        others = [r for r in self.scorer.everything if num_seeds > 1 or not is_groupwise(r)]
        unique = list({r.name: r for r in reversed([self.judge, *others])}.values())
        drop = self.settings.on_error == "drop"
        lenient = {reward.name for reward in unique} - {self.judge.name} if drop else set()
        settings = EvaluationSettings(
            num_seeds, seed, self.settings.rollout_batch, lenient,
            self.scorer.folder, f"{self.iteration:06d}-evaluation-",
        )  # fmt: skip
        return evaluate(self.policy, prompts, self.sigmas, unique, settings, **kwargs)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the policy has the averaged weights, if averaging is on."""
        if not self.settings.ema_decay or self.ema.num_updates == 0:
            yield
            return
        with self.ema.applied(self.parameters):
            yield

    def saved_before(self, error: RewardError) -> RewardError:
        """Save all finished iterations; return the error, which then says so."""
        if not self.iteration:
            return RewardError(error.reward, error.reason)
        found = list_checkpoints(self.folder / "checkpoints")
        if not found or found[-1].name != f"{self.iteration:06d}":
            self.save()
        saved = f"all {self.iteration} finished iterations are saved, go on with --resume"
        return RewardError(error.reward, f"{error.reason}; {saved} {self.folder}")

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = name_parameters("parameter", self.parameters)
        tensors |= name_parameters("ema", self.ema.values) | optimizer_tensors(self.optimizer)
        if self.algorithm.old is not None:
            tensors |= self.algorithm.old.state()
        info = {
            "num_updates": self.num_updates,
            "ema_updates": self.ema.num_updates,
            "seconds": self.seconds,
        }
        if hasattr(self.algorithm, "plan"):
            info["chunks"] = list(plan_of(self.algorithm).sizes)
        if self.learned is not None:
            info["learned"] = self.learned.state()
        save_checkpoint(self.folder / "checkpoints", self.iteration, tensors, info)

    def resume(self) -> None:
        """Continue exactly from the newest checkpoint, if there is one."""
        found = list_checkpoints(self.folder / "checkpoints")
        if not found:
            return
        tensors, info = load_checkpoint(found[-1])
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{i}"])
                self.ema.values[i].copy_(tensors[f"ema.{i}"])
        load_optimizer_tensors(self.optimizer, tensors)
        if self.algorithm.old is not None:
            self.algorithm.old.load(tensors)
        self.iteration, self.num_updates = info["iteration"], info["num_updates"]
        self.ema.num_updates, self.seconds = info["ema_updates"], info["seconds"]
        if "chunks" in info:
            self.adopt(ChunkPlan(tuple(info["chunks"])))
        if self.learned is not None:
            self.learned.load(info.get("learned", {}))

    @contextmanager
    def finish_on_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C end the run after the present iteration; a second one ends it at once."""

        def stop(signum: int, frame: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread, which alone may set handlers
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def plan_of(algorithm: Algorithm) -> ChunkPlan:
    """Return an algorithm's chunk plan.

    Raises:
        ValueError: If it has none.
    """
    plan = getattr(algorithm, "plan", None)
    if plan is None:
        raise ValueError(
            f"{type(algorithm).__name__} does not work on chunks of steps, so chunks cannot be "
            "credited or branched at; use credit 'trajectory' and no chunk window"
        )
    return plan


def with_plan(algorithm: Algorithm, plan: ChunkPlan) -> Algorithm:
    """Return the algorithm with another chunk plan."""
    plan_of(algorithm)
    return replace(algorithm, plan=plan)  # type: ignore[type-var]


class ChunkObserver:
    """Measures, while the updates of one iteration happen, how useful each chunk was.

    Args:
        plan: The iteration's chunks.
        parameters: What is trained.
        kind: ``"gradient"``: squared gradient norm of the first update per network row, for which
            every piece of the loss must hold steps of one chunk. ``"reward"``: the first-order
            reward gain of later updates' samples, which the moves before them were not trained on.
        weights_C: Loss weights of the selection, [C], which a chunk's usefulness must not contain;
            ones where None.
    """

    def __init__(
        self,
        plan: ChunkPlan,
        parameters: Sequence[Tensor],
        kind: str,
        weights_C: Tensor | None = None,
    ) -> None:
        self.plan, self.parameters, self.kind = plan, parameters, kind
        self.weights_C = torch.ones(plan.num_chunks) if weights_C is None else weights_C
        self.update = 0
        self.sums: list[list[Tensor] | None] = [None] * plan.num_chunks
        self.rows = torch.zeros(plan.num_chunks)
        self.gains: list[Mapping[str, Tensor]] = []

    def backward(self, part: LossPart) -> None:
        """Back-propagate a piece and note what it says."""
        measured = self.kind == "gradient" and self.update == 0 and "idle" not in part.diagnostics
        if measured and "step" in part.diagnostics:
            before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
            part.loss.backward()
            chunk = int(self.plan.chunk_of_step[part.diagnostics["step"][0]])
            added = [
                p.grad if b is None else p.grad - b
                for p, b in zip(self.parameters, before, strict=True)
                if p.grad is not None
            ]
            held = self.sums[chunk]
            self.sums[chunk] = [a.clone() for a in added] if held is None else held
            if held is not None:
                torch._foreach_add_(held, added)
            self.rows[chunk] += len(part.diagnostics["step"])
        else:
            part.loss.backward()
        if self.kind == "reward" and self.update and "chunk_log_ratio" in part.diagnostics:
            self.gains.append(part.diagnostics)
        self.update += part.ends_update

    def usefulness(self) -> Tensor:
        """Return one value per chunk, NaN where it was not measured."""
        number = self.plan.num_chunks
        if self.kind == "gradient":
            norms = [
                sum((g.double().square().sum() for g in held), torch.zeros((), dtype=torch.float64))
                if held
                else torch.zeros((), dtype=torch.float64)
                for held in self.sums
            ]
            squared_C = torch.stack([n.cpu() for n in norms]) / self.weights_C.double().cpu() ** 2
            return gradient_usefulness(squared_C, self.rows)
        if not self.gains:
            return torch.full((number,), float("nan"))
        chunk = torch.cat([d["chunk"] for d in self.gains]).cpu()
        gain, credit = (
            torch.cat([d[name] for d in self.gains]).cpu()
            for name in ("chunk_log_ratio", "chunk_advantage")
        )
        mask = torch.nn.functional.one_hot(chunk, number).bool()
        return reward_usefulness(gain[:, None].expand(-1, number), credit, mask)


class PhaseClock:
    """Seconds by phase; waits for the device only at the end of a phase."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [("", time.perf_counter())]

    def lap(self, name: str) -> None:
        """End a phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, all its laps together."""
        sums: dict[str, float] = defaultdict(float)
        for (_, start), (name, end) in zip(self.times, self.times[1:], strict=False):
            sums[name] += end - start
        return dict(sums)


def stacked(rewards: RewardBatch) -> Tensor:
    """Return the trained rewards as [R, B]."""
    return torch.stack(list(rewards.raw.values()))


def summarise(parts: Sequence[Mapping[str, Tensor]], num_trained: int) -> dict[str, Any]:
    """Turn the diagnostics of all pieces into numbers, one host synchronisation for all.

    Each key only where the algorithm's pieces tell it; one without ratios has none about them.

    Returns:
        ``ratio_mean``, ``ratio_std``, ``kl`` (k3 to the sampling policy, per dimension),
        ``clip_fraction``; ``step_ratio_mean``, ``step_ratio_std`` per step;
        ``chunk_ratio_mean`` and ``chunk_clip_fraction`` per chunk, as of each update's start (so
        the first update adds ratios of 1, none of them cut);
        ``reference_kl`` where that is on, and the mean squared distance from the velocity of the
        reference, the old and the averaged policy as ``reference_gap``, ``old_gap`` and
        ``ema_gap``. Steps never trained are None.
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for part in parts:
        for name, values in part.items():
            columns[name].append(values)
    joined = {name: torch.cat(values).cpu() for name, values in columns.items()}
    record: dict[str, Any] = {}
    if "log_ratio" in joined:
        ratio, step = joined["log_ratio"].double().exp(), joined["step"]
        record |= {
            "ratio_mean": ratio.mean(),
            "ratio_std": ratio.std(correction=0),
            "kl": (ratio - 1 - joined["log_ratio"].double()).mean(),
        }
        # Times may go one past the trained transitions: the last step has no density, but a time.
        num_steps = max(num_trained, int(step.max()) + 1)
        steps = [ratio[step == i] for i in range(num_steps)]
        record["step_ratio_mean"] = [r.mean().item() if len(r) else None for r in steps]
        record["step_ratio_std"] = [r.std(correction=0).item() if len(r) else None for r in steps]
    if "cut" in joined:
        record["clip_fraction"] = joined["cut"].float().mean()
    if "chunk_log_ratio" in joined:
        chunk_ratio = joined["chunk_log_ratio"].double().exp()
        ids = joined["chunk"]
        chunks = [ids == c for c in range(int(ids.max()) + 1)]
        record["chunk_ratio_mean"] = [
            chunk_ratio[m].mean().item() if m.any() else None for m in chunks
        ]
        record["chunk_clip_fraction"] = [
            joined["cut"][m].float().mean().item() if m.any() else None for m in chunks
        ]
    for name in ("reference_kl", "consistency", "reference_gap", "old_gap", "ema_gap"):
        if name in joined:
            record[name] = joined[name].mean()
    return record
