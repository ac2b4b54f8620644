# SPDX-License-Identifier: Apache-2.0
"""Measure one training iteration, in batches and sample by sample, on a tiny FLUX-shaped model.

Run as ``python benchmarks/iteration.py``; ``--quick`` is a check of a few seconds, not a figure.

Two programs do the same work: two prompts, twelve images each, 17 steps, chunks of 2, 3, 4 and 7
steps, half of them trained, two optimizer steps. *Batched* is the training loop of this library
(``Trainer.train_once``). *Sample by sample* is a plain loop in the shape of the published
implementation: every forward holds one image, or one image's chunk. It is written here from the
formulas and shares with the library only the networks and the seeds, so that the losses and the
gradients of both, which are compared in float32, check one another.

A second table has what is done once and could be done twice. *No forward twice*: single steps,
whose ratios the second update takes from the forward that it trains, against a separate pass before
it, as chunks of several steps need. *Encoded prompts*: a row per prompt against one per image.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from chunkgrpo.algorithms import chunk_loss
from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.algorithms.chunk_update import Update
from chunkgrpo.algorithms.pairs import MicroBatch
from chunkgrpo.core.plans import PAPER_SIZES, ChunkPlan, paper_plan, step_plan
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import FlowDiffusion, Transition
from chunkgrpo.core.selection import UniformSelection
from chunkgrpo.core.trust import Clip
from chunkgrpo.credit import Credit
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.runtime.ema import Averaging
from chunkgrpo.runtime.optimizers import Optimization
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.train.evaluating import Evaluator
from chunkgrpo.train.loop import Budget, Trainer
from chunkgrpo.train.metrics import UpdateLog
from chunkgrpo.types import Conditioning, Experience, LossPart, Prompt, as_prompts

NUM_STEPS, ETA, CLIP, FRACTION, NUM_UPDATES = 17, 0.7, 5e-5, 0.5, 2
# Large enough for random weights to leave the clip range by the second update, which the
# comparison of both programs is meant to cover.
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, (0.9, 0.999), 1e-8, 1e-4, 1.0
SEED, GUIDANCE = 0, 3.5
PROMPTS = ("a red circle", "two blue stars")
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
# What float32 leaves of one gradient summed in two orders, and of one more update on top.
TOLERANCES = (1e-4, 1e-3)
# Two programs may decide differently about a ratio this near the edge of the clip range.
EDGE = 1e-6
OVERHEAD_LIMIT = 0.10


@dataclass(frozen=True)
class Scale:
    """How large everything is: heads of 32, ``side``^2 image tokens, ``text`` text tokens."""

    heads: int = 4
    double_blocks: int = 2
    single_blocks: int = 4
    side: int = 8
    text: int = 16
    group_size: int = 12
    vae_channels: tuple[int, ...] = (16, 16, 32, 32)
    repeats: int = 3
    product: int = 2048


QUICK = Scale(1, 1, 1, 4, 4, 4, (8, 8, 8, 8), 1, 512)


@dataclass
class Clock:
    """Seconds and network rows by name; the network's backward pass is timed by hooks."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    backward_began: float | None = None

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def begin_backward(self, gradient: Tensor) -> None:
        """Note that the gradient has reached the network's output (a tensor hook)."""
        self.backward_began = time.perf_counter()

    def end_backward(self) -> None:
        """Note that the gradient is complete, if one is under way."""
        if self.backward_began is not None:
            self.seconds["backward"] += time.perf_counter() - self.backward_began
            self.backward_began = None


class FluxShapedPolicy:
    """A tiny FLUX transformer and VAE with random weights, as a policy."""

    reads_images: ClassVar[bool] = False

    def __init__(self, scale: Scale) -> None:
        from diffusers import AutoencoderKL, FluxTransformer2DModel

        self.scale, self.dtype, self.clock = scale, torch.float32, Clock()
        self.sampling = True
        self.latent_shape = (scale.side**2, 64)
        self.device = torch.device("cpu")
        torch.manual_seed(SEED)
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=scale.double_blocks,
            num_single_layers=scale.single_blocks,
            attention_head_dim=32,
            num_attention_heads=scale.heads,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        # Its annotations say tuples of one.
        four_blocks: dict[str, Any] = {
            "block_out_channels": scale.vae_channels,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        self.vae = AutoencoderKL(
            **four_blocks,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).requires_grad_(False)
        self.initial = [p.detach().clone() for p in self.transformer.parameters()]
        rows, columns = torch.meshgrid(
            torch.arange(scale.side), torch.arange(scale.side), indexing="ij"
        )
        self.image_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        self.image_ids = self.image_ids.float()
        self.text_ids = torch.zeros(scale.text, 3)

    def restart(self, precision: str) -> Clock:
        """Return to the initial weights, with a new clock."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), self.initial, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        self.dtype, self.clock = PRECISIONS[precision], Clock()
        return self.clock

    def parameters(self) -> list[Tensor]:
        """Return the transformer's parameters."""
        return list(self.transformer.parameters())

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the transformer's parameters by name."""
        return dict(self.transformer.named_parameters())

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the chosen precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast("cpu", self.dtype)

    def encode(self, prompts: Sequence[Prompt | str]) -> Conditioning:
        """Return embeddings that are random, but the same for the same prompt."""
        self.sampling = True
        joint, pooled = [], []
        for prompt in as_prompts(prompts):
            generator = Generator().manual_seed(zlib.crc32(prompt.text.encode()))
            joint.append(torch.randn(self.scale.text, 128, generator=generator))
            pooled.append(torch.randn(64, generator=generator))
        return Conditioning({"joint": torch.stack(joint), "pooled": torch.stack(pooled)})

    def network(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer with whatever attention kernel is on."""
        with self.autocast():
            return self.transformer(
                hidden_states=x,
                timestep=sigma,
                guidance=torch.full_like(sigma, GUIDANCE),
                encoder_hidden_states=conditioning.tensors["joint"],
                pooled_projections=conditioning.tensors["pooled"],
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
                return_dict=False,
            )[0].float()

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict dx/dsigma."""
        phase = "ratio pass" if not self.sampling else "rollout network"
        phase = "forward" if torch.is_grad_enabled() else phase
        self.clock.rows[phase] += len(x)
        with self.clock.measure(phase), plain_attention():
            v = self.network(x, sigma, conditioning)
        if v.requires_grad:
            v.register_hook(self.clock.begin_backward)
        return v

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Unpack and decode latents."""
        self.sampling = False
        side = self.scale.side
        z: Any = x.unflatten(1, (side, side)).unflatten(3, (16, 2, 2))
        z = z.permute(0, 3, 1, 4, 2, 5).reshape(len(x), 16, 2 * side, 2 * side)
        with self.autocast():
            image = self.vae.decode(z, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def reference(self) -> AbstractContextManager[None]:
        """Not needed: there is no KL term."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Save the transformer."""
        self.transformer.save_pretrained(folder)


def warmth(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Score images [B, 3, H, W]: red minus blue, plus the mean step between neighbours."""
    red_minus_blue = (images[:, 0] - images[:, 2]).mean((1, 2))
    return red_minus_blue + images.diff(dim=-1).abs().mean((1, 2, 3))


@dataclass
class Result:
    """What an iteration gave and took.

    Attributes:
        losses: Loss of each update.
        norms: Norm of each update's gradient, before it is clipped.
        gradients: Each update's gradient after clipping, by parameter.
        seconds: By phase.
        edge: Least distance of a chunk's ratio from the edges of the clip range.
        outside: Chunks whose ratio left the clip range.
        trained: (image, step) pairs trained.
        rows: Network rows by phase.
    """

    losses: list[float]
    norms: list[float]
    gradients: list[list[Tensor | None]]
    seconds: dict[str, float]
    edge: float = math.inf
    outside: int = 0
    trained: int = 0
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of the iteration."""
        return sum(self.seconds.values())

    @property
    def overhead(self) -> float:
        """Share of the time outside the transformer, the VAE and the reward."""
        work = ("rollout network", "decode", "reward", "ratio pass", "forward", "backward")
        return 1 - sum(self.seconds.get(name, 0.0) for name in work) / self.total


# ---------------------------------------------------------------------------------------------
# Batched: the library


class WatchedTrainer(Trainer):
    """The trainer, timing its optimizer and keeping the gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gradients: list[list[Tensor | None]] = []
        self.norms: list[float] = []

    def update(self, log: UpdateLog) -> None:
        """Take the step; gradients are clipped in place, so what is kept is clipped."""
        clock: Clock = self.policy.clock  # type: ignore[attr-defined]
        clock.end_backward()
        self.gradients.append([p.grad for p in self.parameters])
        with clock.measure("optimizer"):
            super().update(log)
        self.norms.append(float(log.norms[-1]))


@dataclass
class WatchedChunkGRPO(ChunkGRPO):
    """The algorithm, noting where a backward pass ends and keeping the losses."""

    kept: list[tuple[Tensor, bool]] = field(default_factory=list)

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield the same pieces."""
        for part in super().losses(policy, experience, generator):
            self.kept.append((part.loss.detach(), part.ends_update))
            yield part
            policy.clock.end_backward()  # type: ignore[attr-defined]


class UpdateAfterPass(Update):
    """An update that measures the ratios of single steps before, as those of longer chunks."""

    def by_size(self, batch: list[MicroBatch], single: bool) -> list[MicroBatch]:
        """Return all pairs as those whose ratios must be known before."""
        return [] if single else batch


class TwiceForward(WatchedChunkGRPO):
    """The algorithm with a forward of its own for every ratio of the second update."""

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield the same loss in pieces that leave out what turned out to be cut."""
        with patch.object(chunk_loss, "Update", UpdateAfterPass):
            yield from super().losses(policy, experience, generator)


def make_trainer(
    policy: FluxShapedPolicy, plan: ChunkPlan, kind: type[WatchedChunkGRPO]
) -> WatchedTrainer:
    """Return a trainer of the published settings, at its first iteration."""
    transition = Transition(FlowDiffusion(ETA))
    prompts = PromptSet(as_prompts(PROMPTS))
    reward = FunctionReward("warmth", warmth)
    sampler = Sampler(transition, make_sigmas(NUM_STEPS), same_noise=True, batch_size=96)
    loss = ChunkLoss(trust=Clip(CLIP, CLIP), updates=NUM_UPDATES)
    return WatchedTrainer(
        policy=policy,
        sampler=sampler,
        algorithm=kind(plan, transition, loss, UniformSelection(FRACTION)),
        credit=Credit(),
        scorer=Scorer([(reward, 1.0)]),
        prompts=prompts,
        evaluator=Evaluator(prompts, reward, sampler.sigmas),
        folder=Path(),
        budget=Budget(prompts=len(PROMPTS), group_size=policy.scale.group_size, seed=SEED),
        optimization=Optimization(
            learning_rate=LEARNING_RATE,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
        ),
        averaging=Averaging(decay=0.0),
    )


def batched_iteration(
    policy: FluxShapedPolicy,
    precision: str,
    plan: ChunkPlan | None = None,
    kind: type[WatchedChunkGRPO] = WatchedChunkGRPO,
) -> Result:
    """Do one iteration with the library; with the published chunks where no plan is given."""
    clock = policy.restart(precision)
    trainer = make_trainer(policy, plan or paper_plan(NUM_STEPS - 1), kind)
    start = time.perf_counter()
    record = trainer.train_once()
    total = time.perf_counter() - start
    phases: dict[str, float] = record["phase_seconds"]
    seconds = dict(clock.seconds) | {"decode": phases["decode"], "reward": phases["reward"]}
    seconds["rollout rest"] = phases["rollout"] - seconds["rollout network"]
    seconds["rest"] = total - sum(seconds.values())
    losses, running = [], 0.0
    for loss, ends in trainer.algorithm.kept:  # type: ignore[attr-defined]
        running += float(loss)
        if ends:
            losses.append(running)
            running = 0.0
    return Result(losses, trainer.norms, trainer.gradients, seconds, rows=dict(clock.rows))


# ---------------------------------------------------------------------------------------------
# Sample by sample: the shape of the published implementation


def sde_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of Flow-GRPO's step."""
    dt = sigma_next - sigma
    g = ETA * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma)))
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * torch.sqrt(-dt)


def mean_log_prob(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density per latent element."""
    squared = (value - mean) ** 2 / (2 * std**2)
    return (-squared - torch.log(std) - 0.5 * math.log(2 * math.pi)).mean()


def naive_iteration(policy: FluxShapedPolicy, precision: str) -> Result:
    """Do one iteration with one image, or one image's chunk, at a time."""
    clock = policy.restart(precision)
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY)
    group, num_images = policy.scale.group_size, len(PROMPTS) * policy.scale.group_size
    started = time.perf_counter()

    # The trainer's random choices, drawn in its order.
    generator = Generator().manual_seed(derive_seed(SEED, 0, 0))
    prompts = PromptSet(as_prompts(PROMPTS)).batch(0, len(PROMPTS), derive_seed(SEED, 1))
    base = int(torch.randint(2**62, (), generator=generator))
    seeds = [derive_seed(base, b) for b in range(num_images)]

    sigmas = make_sigmas(NUM_STEPS)
    embeddings = [policy.encode([prompt]) for prompt in prompts]
    states: list[list[Tensor]] = []
    old: list[list[Tensor]] = []
    scores: list[Tensor] = []
    with torch.no_grad():
        for b in range(num_images):
            shared = Generator().manual_seed(seeds[b - b % group])
            own = Generator().manual_seed(derive_seed(seeds[b], 2))
            x = torch.randn((1, *policy.latent_shape), generator=shared)
            visited, log_probs = [x], []
            for i in range(NUM_STEPS):
                with clock.measure("rollout network"):
                    v = policy.network(x, sigmas[i : i + 1], embeddings[b // group])
                if i == NUM_STEPS - 1:
                    x = x - sigmas[i] * v
                    break
                mean, std = sde_step(x, v, sigmas[i], sigmas[i + 1])
                x = mean + std * torch.randn(x.shape, generator=own)
                log_probs.append(mean_log_prob(x, mean, std))
                visited.append(x)
            with clock.measure("decode"):
                image = policy.decode(x)
            with clock.measure("reward"):
                scores.append(warmth(image, [prompts[b // group].text])[0])
            states.append(visited)
            old.append(log_probs)
    sampled = time.perf_counter() - started

    rewards = torch.stack(scores).view(len(PROMPTS), group)
    spread = rewards.std(1, keepdim=True)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-8)).flatten()
    num_chosen = max(1, int(len(PAPER_SIZES) * FRACTION))
    keys = torch.rand(num_images, len(PAPER_SIZES), generator=generator)
    chosen = keys.argsort(dim=1)[:, :num_chosen].tolist()
    order = torch.randperm(num_images, generator=generator)
    starts = [sum(PAPER_SIZES[:c]) for c in range(len(PAPER_SIZES))]

    losses: list[float] = []
    norms: list[float] = []
    gradients: list[list[Tensor | None]] = []
    edge, outside, trained = math.inf, 0, 0
    for share in order.chunk(NUM_UPDATES):
        running = 0.0
        for b in share.tolist():
            for c in chosen[b]:
                steps = range(starts[c], starts[c] + PAPER_SIZES[c])
                x = torch.cat([states[b][i] for i in steps])
                rows = Conditioning(
                    {
                        name: tensor.expand(len(steps), *tensor.shape[1:])
                        for name, tensor in embeddings[b // group].tensors.items()
                    }
                )
                with clock.measure("forward"):
                    v = policy.network(x, sigmas[steps.start : steps.stop], rows)
                v.register_hook(clock.begin_backward)
                new = []
                for k, i in enumerate(steps):
                    mean, std = sde_step(x[k], v[k], sigmas[i], sigmas[i + 1])
                    new.append(mean_log_prob(states[b][i + 1][0], mean, std))
                ratio = torch.exp(
                    torch.stack(new).mean() - torch.stack([old[b][i] for i in steps]).mean()
                )
                plain = -advantages[b] * ratio
                clipped = -advantages[b] * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
                loss = torch.maximum(plain, clipped) / (num_chosen * len(share))
                loss.backward()
                clock.end_backward()
                running += loss.item()
                trained += len(steps)
                moved = abs(ratio.item() - 1)
                edge, outside = min(edge, abs(moved - CLIP)), outside + (moved > CLIP)
        gradients.append([p.grad for p in parameters])
        with clock.measure("optimizer"):
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(running)
    total = time.perf_counter() - started
    seconds = dict(clock.seconds)
    inside = ("rollout network", "decode", "reward")
    seconds["rollout rest"] = sampled - sum(seconds[name] for name in inside)
    seconds["rest"] = total - sum(seconds.values())
    return Result(losses, norms, gradients, seconds, edge, outside, trained)


# ---------------------------------------------------------------------------------------------
# Comparison


def relative_difference(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """Return the norm of the difference of two gradients over the norm of the second."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    assert all(a is not None for a, _ in pairs), "a parameter has a gradient in one program only"
    difference = sum(float((a - b).square().sum()) for a, b in pairs)  # type: ignore[operator]
    return math.sqrt(difference / sum(float(b.square().sum()) for _, b in pairs))


def check_same_work(ours: Result, theirs: Result) -> list[float]:
    """Compare losses and gradients in float32; return each update's relative difference.

    Raises:
        AssertionError: If the two programs did not compute the same thing.
    """
    found = []
    for update, tolerance in enumerate(TOLERANCES):
        loss, other = ours.losses[update], theirs.losses[update]
        assert abs(loss - other) < 1e-5, f"update {update + 1}: losses {loss} and {other}"
        found.append(relative_difference(ours.gradients[update], theirs.gradients[update]))
        norm, other = ours.norms[update], theirs.norms[update]
        if update == 0 or theirs.edge > EDGE:
            assert found[-1] < tolerance, f"update {update + 1}: gradients differ by {found[-1]}"
            assert abs(norm / other - 1) < tolerance, f"update {update + 1}: norms {norm}, {other}"
    return found


def product_rate(size: int, precision: str) -> float:
    """Measure the floating-point operations a second of a large matrix product, best of ten."""
    a, b = torch.randn(2, size, size, dtype=PRECISIONS[precision])
    out = a @ b
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def flops_per_row(policy: FluxShapedPolicy) -> tuple[float, float]:
    """Count the transformer's operations for one row: forward, and forward with backward."""
    policy.restart("float32")
    x = torch.zeros(1, *policy.latent_shape)
    conditioning = policy.encode(PROMPTS[:1])
    with plain_attention():
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            policy.network(x, torch.ones(1), conditioning)
        with FlopCounterMode(display=False) as both:
            policy.network(x, torch.ones(1), conditioning).sum().backward()
    return float(forward.get_total_flops()), float(both.get_total_flops())


@dataclass(frozen=True)
class Measured:
    """All repetitions in one precision, in the order they ran: batched, sample by sample, ..."""

    batched: list[Result]
    naive: list[Result]
    product: float
    differences: list[float]

    def ratios(self) -> list[float]:
        """Sample by sample over batched, pair by pair."""
        return [b.total / a.total for a, b in zip(self.batched, self.naive, strict=True)]


def measure(policy: FluxShapedPolicy, precision: str, repeats: int) -> Measured:
    """Warm up, then alternate the two programs; in float32, compare what they computed."""
    programs: tuple[Callable[[FluxShapedPolicy, str], Result], ...]
    programs = (batched_iteration, naive_iteration)
    if repeats > 1:
        batched_iteration(policy, precision)
    results: list[list[Result]] = [[], []]
    products: list[float] = []
    differences: list[float] = []
    for _ in range(repeats):
        products.append(product_rate(policy.scale.product, precision))
        for program, kept in zip(programs, results, strict=True):
            kept.append(program(policy, precision))
        if precision == "float32":
            differences = check_same_work(results[0][-1], results[1][-1])
        for kept in results:
            kept[-1].gradients.clear()
    return Measured(results[0], results[1], max(products), differences)


# ---------------------------------------------------------------------------------------------
# What is done once


@dataclass(frozen=True)
class Once:
    """Repetitions of a step-level iteration in float32, and what encoded prompts weigh.

    Attributes:
        own: Ratios of the second update from its training forward.
        separate: Ratios from a pass before.
        per_prompt, per_image: Bytes of encoded prompts.
    """

    own: list[Result]
    separate: list[Result]
    per_prompt: int
    per_image: int


def measure_once(policy: FluxShapedPolicy, repeats: int) -> Once:
    """Alternate the two step-level iterations; weigh what a rollout encodes.

    Raises:
        AssertionError: If the two did not compute the same losses.
    """
    plan, kinds = step_plan(NUM_STEPS - 1), (WatchedChunkGRPO, TwiceForward)
    if repeats > 1:
        batched_iteration(policy, "float32", plan)
    results: list[list[Result]] = [[], []]
    for _ in range(repeats):
        for kind, kept in zip(kinds, results, strict=True):
            kept.append(batched_iteration(policy, "float32", plan, kind))
            kept[-1].gradients.clear()
        for loss, other in zip(results[0][-1].losses, results[1][-1].losses, strict=True):
            assert abs(loss - other) < 1e-5, f"losses {loss} and {other}"
    encoded = policy.encode(PROMPTS)
    images = encoded.repeat_interleave(policy.scale.group_size)
    weights = [sum(t.nbytes for t in each.tensors.values()) for each in (encoded, images)]
    return Once(results[0], results[1], *weights)


def print_once(console: Console, once: Once) -> None:
    """Print what is done once beside what it would be twice."""
    table = Table(title="What is done once")
    for column in ("", "once", "twice", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    train = ("ratio pass", "forward", "backward", "optimizer", "rest")

    def seconds(results: list[Result], names: Sequence[str]) -> float:
        return median(sum(result.seconds.get(n, 0.0) for n in names) for result in results)

    def forwards(result: Result) -> int:
        return result.rows["forward"] + result.rows.get("ratio pass", 0)

    ours, theirs = seconds(once.own, train), seconds(once.separate, train)
    table.add_row(
        "no forward twice: training, s", f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}"
    )
    first, second = forwards(once.own[-1]), forwards(once.separate[-1])
    table.add_row(
        "no forward twice: network rows", str(first), str(second), f"{second / first:.2f}"
    )
    table.add_row(
        "encoded prompts, bytes",
        f"{once.per_prompt:,}",
        f"{once.per_image:,}",
        f"{once.per_image / once.per_prompt:.2f}",
    )
    console.print(table)
    console.print(
        "no forward twice: single steps in float32, half of them trained, the ratios of the second "
        "update from the forward that is back-propagated, or from a pass of its own before; pairs "
        "cut in that pass are not trained. Encoded prompts: a row a prompt, or a row an image."
    )


ROWS = {
    "rollout network": "rollout: transformer",
    "rollout rest": "rollout: the rest",
    "decode": "decode",
    "reward": "reward",
    "ratio pass": "train: ratio pass",
    "forward": "train: forward",
    "backward": "train: backward",
    "optimizer": "train: optimizer",
    "rest": "everything else",
}


def print_results(
    console: Console, policy: FluxShapedPolicy, measured: dict[str, Measured]
) -> None:
    """Print the table and what follows from it."""
    quick = policy.scale is QUICK
    table = Table(title="One training iteration, seconds (median over repetitions)")
    table.add_column("phase")
    for precision in measured:
        for name in ("batched", "sample by sample", "ratio"):
            table.add_column(f"{precision}\n{name}", justify="right")

    def row(label: str, seconds: Callable[[Result], float]) -> None:
        cells = []
        for m in measured.values():
            ours, theirs = (median(seconds(r) for r in rs) for rs in (m.batched, m.naive))
            ratio = f"{theirs / ours:.2f}" if ours > 1e-4 and theirs > 0 else "-"
            cells += [f"{ours:.3f}", f"{theirs:.3f}" if theirs > 0 else "-", ratio]
        table.add_row(label, *cells)

    for name, label in ROWS.items():
        row(label, lambda result, name=name: result.seconds.get(name, 0.0))
    table.add_section()
    row("total", lambda result: result.total)

    forward, both = flops_per_row(policy)
    num_images = len(PROMPTS) * policy.scale.group_size
    rows = {
        "batched": num_images * (NUM_STEPS - 1) + len(PROMPTS),
        "naive": num_images * NUM_STEPS,
    }

    def share(results: list[Result], names: Sequence[str], flops: float, rate: float) -> str:
        seconds = median(sum(result.seconds.get(n, 0.0) for n in names) for result in results)
        return f"{100 * flops / seconds / rate:.1f}"

    trained = measured["float32"].naive[-1].trained

    table.add_section()
    rollout = ("rollout network", "rollout rest")
    train = ("ratio pass", "forward", "backward", "optimizer", "rest")
    for label, names, work in (
        (
            "rollout: % of a large matrix product",
            rollout,
            {k: v * forward for k, v in rows.items()},
        ),
        ("train: % of a large matrix product", train, dict.fromkeys(rows, trained * both)),
    ):
        cells = []
        for m in measured.values():
            cells.append(share(m.batched, names, work["batched"], m.product))
            cells += [share(m.naive, names, work["naive"], m.product), ""]
        table.add_row(label, *cells)
    console.print(table)

    size = sum(p.numel() for p in policy.parameters())
    console.print(
        f"Transformer: {size / 1e6:.2f} M parameters, {policy.scale.side**2} image and "
        f"{policy.scale.text} text tokens; {forward / 1e9:.3f} GFLOP a forward, {both / 1e9:.3f} "
        f"with its backward. {num_images} images, {trained} trained (image, step) pairs. "
        f"{torch.get_num_threads()} threads."
    )
    for precision, m in measured.items():
        product = m.product / 1e9
        console.print(
            f"{precision}: a {policy.scale.product}^3 product runs {product:.0f} GFLOP/s."
        )
    console.print(
        "The training share counts the forward and backward of each trained pair once; the ratio "
        "pass, which bounds memory, counts as time only."
    )
    for precision, m in measured.items():
        ratios = m.ratios()
        console.print(
            f"ratio ({precision}): sample by sample takes {median(ratios):.2f} times as long "
            f"(pairs: {', '.join(f'{r:.2f}' for r in ratios)})"
        )
    for precision, m in measured.items():
        overhead = median(result.overhead for result in m.batched)
        verdict = "within" if overhead <= OVERHEAD_LIMIT else "ABOVE"
        limit = f"; {verdict} the limit of {100 * OVERHEAD_LIMIT:.0f} %" if not quick else ""
        console.print(
            f"overhead ({precision}): {100 * overhead:.1f} % of the batched iteration lies outside "
            f"the transformer, the VAE and the reward{limit}"
        )
    first, second = measured["float32"].differences
    console.print(
        f"same work: in float32 the gradients of the two updates differ by {first:.1e} and "
        f"{second:.1e} of their norm; {measured['float32'].naive[-1].outside} chunks had left the "
        "clip range"
    )


def main() -> None:
    """Measure both programs in both precisions and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition")
    parser.add_argument("--repeats", type=int, help="pairs of iterations in each precision")
    options = parser.parse_args()
    # The transformer's float32 norms under autocast; torch says so once a process.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    scale = QUICK if options.quick else Scale()
    policy = FluxShapedPolicy(scale)
    repeats = options.repeats or scale.repeats
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    measured = {precision: measure(policy, precision, repeats) for precision in PRECISIONS}
    print_results(console, policy, measured)
    print_once(console, measure_once(policy, repeats))
    if options.quick:
        console.print("These sizes are a check that everything runs, not a measurement.")


if __name__ == "__main__":
    main()
