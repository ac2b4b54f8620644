# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in a healthy run, and the check of the doctor that has to name each."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from chunkgrpo import rollout
from chunkgrpo.algorithms import chunk_update
from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.chunk_update import Evaluator
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import FlowDiffusion, Gaussian, Transition
from chunkgrpo.doctor import prompts as doctor_prompts
from chunkgrpo.doctor import resources as doctor_resources
from chunkgrpo.doctor.findings import Measured
from chunkgrpo.rewards.ocr import OcrReward
from chunkgrpo.rewards.protocol import RewardError
from chunkgrpo.runtime.seeds import NoiseSource
from chunkgrpo.types import Prompt, Trajectory

FULL = {"model__adaptation": {"kind": "full"}}
BROKEN = {"rewards": [{"name": "examined:broken"}]}
GUIDED = {"model__guidance": 4.0, "model__negative_prompt": "a cross"}


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        plant: Breaks a trainer; gets pytest's monkeypatch too.
        check: The check that has to name it, and the only one.
        status: As what.
        says: Part of its message.
        settings: Of the run, as ``examined.built`` takes them.
    """

    plant: Any
    check: str
    status: str = "failure"
    says: str = ""
    settings: Any = ()


def nothing(trainer, patch):
    """The fault is in the settings."""


# --- sampling -----------------------------------------------------------------------------------


def wrong_std(trainer, patch):
    sample = Gaussian.sample

    def louder(self, generator=None, *, noise=None):
        return sample(replace(self, std=1.3 * self.std), generator, noise=noise)

    patch.setattr(Gaussian, "sample", louder)


def drift(trainer, patch):
    sample = Gaussian.sample
    patch.setattr(Gaussian, "sample", lambda self, *a, **k: sample(self, *a, **k) + 0.8 * self.std)


def other_transition(trainer, patch):
    trainer.sampler = replace(trainer.sampler, transition=Transition(FlowDiffusion(0.9)))
    trainer.algorithm.transition = trainer.sampler.transition


def other_kernel_in_training(trainer, patch):
    trainer.algorithm.transition = Transition(FlowDiffusion(0.8))


class NoDiffusion:
    has_density = True

    def __call__(self, sigma, sigma_next):
        return torch.zeros_like(sigma)


def zero_std(trainer, patch):
    trainer.sampler = replace(trainer.sampler, transition=Transition(NoDiffusion()))
    trainer.algorithm.transition = trainer.sampler.transition


def wrong_density(trainer, patch):
    step = rollout._Rollout.stochastic_step

    def wrong(self, x, v, i, rows, inside):
        found = step(self, x, v, i, rows, inside)
        self.log_prob_BN[rows, i - self.window.start] += 0.02
        return found

    patch.setattr(rollout._Rollout, "stochastic_step", wrong)


def shared_noise(trainer, patch):
    draw = NoiseSource.draw

    def shared(self, shape, device="cpu"):
        found = draw(self, shape, device)
        return found[:1].expand_as(found).clone()

    patch.setattr(NoiseSource, "draw", shared)


def repeated_noise(trainer, patch):
    draw = NoiseSource.draw

    def repeated(self, shape, device="cpu"):
        states = [g.get_state() for g in self._generators]
        found = draw(self, shape, device)
        for g, state in zip(self._generators, states, strict=True):
            g.set_state(state)
        return found

    patch.setattr(NoiseSource, "draw", repeated)


def own_noise(trainer, patch):
    trainer.sampler = replace(trainer.sampler, same_noise=False)


def off_by_one_in_sigmas(trainer, patch):
    sigmas = make_sigmas(5)[1:]
    trainer.sampler = replace(trainer.sampler, sigmas=sigmas)
    trainer.evaluator = replace(trainer.evaluator, sigmas=sigmas)


def unshifted_sigmas(trainer, patch):
    sigmas = make_sigmas(4, 1.0)
    trainer.sampler = replace(trainer.sampler, sigmas=sigmas)
    trainer.evaluator = replace(trainer.evaluator, sigmas=sigmas)


def other_sigmas_in_evaluations(trainer, patch):
    trainer.evaluator = replace(trainer.evaluator, sigmas=make_sigmas(4, 1.0))


# --- prompts and guidance -----------------------------------------------------------------------


def swapped_prompts(trainer, patch):
    encode = trainer.policy.encode

    def permuted(prompts):
        rows = encode(prompts)
        return rows[torch.arange(len(rows)).flip(0)]

    trainer.policy.encode = permuted


def misplaced_samples(trainer, patch):
    right = Trajectory.conditioning_of

    def wrong(self, sample):
        if isinstance(sample, slice):
            return self.conditioning[self._prompt_of_sample[sample].flip(0) * 0]
        return right(self, sample * 0)

    patch.setattr(Trajectory, "conditioning_of", wrong)


def ignored_prompts(trainer, patch):
    predict = trainer.policy.predict

    def deaf(x, sigma, texts):
        return predict(x, sigma, {name: torch.ones_like(t) for name, t in texts.items()})

    trainer.policy.predict = deaf


def ignored_guidance(trainer, patch):
    trainer.policy.guide = lambda without, with_prompt: with_prompt


def ignored_negative_prompt(trainer, patch):
    encode = trainer.policy.encode_texts
    trainer.policy.encode_texts = lambda prompts, negatives: encode(prompts, [""] * len(negatives))


# --- the network against the stock pipeline -----------------------------------------------------


def late_timestep(trainer, patch):
    trainer.policy.timestep = lambda sigma: (sigma - 1 / 16).clamp(min=0)


def turned_sign(trainer, patch):
    predict = trainer.policy.predict
    trainer.policy.predict = lambda x, sigma, texts: -predict(x, sigma, texts)


def wrong_guidance_formula(trainer, patch):
    policy = trainer.policy
    policy.guide = lambda without, one: one + policy.cfg_scale * (one - without)


def wrong_scaling_factor(trainer, patch):
    vae_input = trainer.policy.vae_input
    trainer.policy.vae_input = lambda x: 3 * vae_input(x)


def dropout(trainer, patch):
    for module in trainer.policy.pipe.transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
            module.train()


def other_training_mode(trainer, patch):
    velocity = trainer.policy.velocity

    def trained(x, sigma, conditioning):
        v = velocity(x, sigma, conditioning)
        return 1.02 * v if torch.is_grad_enabled() else v

    trainer.policy.velocity = trained


def endless_network(trainer, patch):
    velocity = trainer.policy.velocity
    trainer.policy.velocity = lambda *a: velocity(*a) * float("nan")


# --- the loss -----------------------------------------------------------------------------------


def coarse_densities(trainer, patch):
    log_prob = Evaluator.log_prob
    patch.setattr(Evaluator, "log_prob", lambda self, p, s: log_prob(self, p, s).bfloat16().float())


def rounded_densities(trainer, patch):
    log_prob = Evaluator.log_prob
    patch.setattr(Evaluator, "log_prob", lambda self, p, s: log_prob(self, p, s) + 2.5e-6)


def other_step_in_training(trainer, patch):
    right = Trajectory.state

    def wrong(self, sample, step):
        return right(self, sample, step.clamp(max=self.num_trained - 1))

    place = chunk_update.MicroBatch.state
    patch.setattr(
        chunk_update.MicroBatch,
        "state",
        lambda self, t, ahead=0: (
            wrong(t, *(self.pairs[0], self.pairs[1] + ahead)) if ahead else place(self, t)
        ),
    )


def detached_kl(trainer, patch):
    kl = chunk_update.reference_kl
    patch.setattr(chunk_update, "reference_kl", lambda new, ref: kl(new, ref).detach())


def stale_casts(trainer, patch):
    """Weights are swapped within an open autocast that goes on serving casts of the former ones."""
    patch.setattr(torch, "clear_autocast_cache", lambda: None)
    losses = ChunkGRPO.losses

    def within(self, policy, experience, generator):
        with torch.autocast("cpu", torch.bfloat16):
            yield from losses(self, policy, experience, generator)

    patch.setattr(ChunkGRPO, "losses", within)
    trainer.policy.arithmetic = nullcontext


def following_reference(trainer, patch):
    trainer.policy.reference = nullcontext


def other_base(trainer, patch):
    for value in trainer.policy.base.base:
        value.mul_(1.1)


def reference_that_stays(trainer, patch):
    """The trained weights do not come back."""

    @contextmanager
    def applied():
        trainer.policy.pipe.transformer.disable_adapters()
        yield

    trainer.policy.reference = applied


def strange_gradient(trainer, patch):
    frozen = next(p for p in trainer.policy.pipe.transformer.parameters() if not p.requires_grad)
    frozen.requires_grad_(True)


def detached_weight(trainer, patch):
    for name, module in trainer.policy.pipe.transformer.named_modules():
        if name.endswith("transformer_blocks.0.attn.to_q.lora_B.default"):
            module.forward = lambda x, m=module: torch.nn.functional.linear(x, m.weight.detach())


def detached_loss(trainer, patch):
    velocity = trainer.policy.velocity
    trainer.policy.velocity = lambda *a: velocity(*a).detach()


def other_optimizer(trainer, patch):
    copies = [p.detach().clone().requires_grad_() for p in trainer.parameters]
    trainer.optimizer = trainer.optimization.make(copies)


def other_average(trainer, patch):
    trainer.ema.values = [torch.zeros_like(value) for value in trainer.ema.values]


# --- rewards ------------------------------------------------------------------------------------


def dead_server(trainer, patch):
    class Remote:
        name, url = "remote", "http://127.0.0.1:9"

        def __call__(self, images, prompts):
            raise RewardError(self.name, "does not answer at http://127.0.0.1:9")

    trainer.scorer = replace(trainer.scorer, rewards=[(Remote(), 1.0)])


# --- prompts and room ---------------------------------------------------------------------------


def full_disk(trainer, patch):
    patch.setattr(doctor_resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000.0))


def read_only(trainer, patch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    patch.setattr(doctor_resources.tempfile, "NamedTemporaryFile", refuse)


def little_memory(trainer, patch):
    patch.setattr(doctor_resources, "SMALL", 0.0)
    patch.setattr(doctor_resources.os, "sysconf", lambda name: 64)


def leak(trainer, patch):
    trainer.evaluator = replace(trainer.evaluator, held_out=trainer.prompts.head(1))


def long_prompts(trainer, patch):
    texts = " ".join(["a red star left of a blue circle"] * 9)
    first = replace(trainer.prompts.prompts[0], text=texts)
    trainer.prompts = type(trainer.prompts)((first, *trainer.prompts.prompts[1:]))


def open_quotation(trainer, patch):
    reads = object.__new__(OcrReward)  # the recogniser itself is not asked
    reads.name = "ocr"
    trainer.scorer = replace(trainer.scorer, watched=[reads])
    patch.setattr(OcrReward, "__call__", lambda self, images, prompts: images.mean((1, 2, 3)))
    texts = ('a 5" sign that says "Hi"', 'a sign that says "Open" and "Closed')
    trainer.prompts = type(trainer.prompts)(tuple(map(Prompt, texts)))
    trainer.evaluator = replace(trainer.evaluator, held_out=trainer.prompts)
    patch.setattr(doctor_prompts, "build_prompts", lambda config, which: trainer.prompts)
    patch.setattr(doctor_prompts, "held_out_ones", lambda *_: Measured("ok", ""))


def twice(trainer, patch):
    trainer.prompts = type(trainer.prompts)(trainer.prompts.prompts * 2)


FAULTS = {
    "wrong std": Fault(wrong_std, "transition", says="variance"),
    "mean that drifts": Fault(drift, "transition", says="mean of the noise"),
    "another transition": Fault(other_transition, "transition", says="transition of sampling"),
    "another kernel in training": Fault(
        other_kernel_in_training, "transition", says="transition of training"
    ),
    "zero std": Fault(zero_std, "transition", says="have a spread of 0"),
    "wrong log-density": Fault(wrong_density, "transition", says="log-densities"),
    "noise shared by all images": Fault(shared_noise, "noise", says="two images"),
    "noise repeated in every step": Fault(repeated_noise, "noise", says="of two steps"),
    "same_noise not honoured": Fault(own_noise, "noise", says="begin up to"),
    "off-by-one in sigmas": Fault(off_by_one_in_sigmas, "schedule"),
    "sigmas without their shift": Fault(unshifted_sigmas, "schedule", says="at level 2"),
    "other sigmas in evaluations": Fault(
        other_sigmas_in_evaluations, "schedule", says="evaluations"
    ),
    "swapped prompts": Fault(swapped_prompts, "encoding", says="another row"),
    "samples with another prompt": Fault(misplaced_samples, "encoding", says="trained on"),
    "prompts ignored": Fault(ignored_prompts, "encoding", says="changes the prediction by 0 %"),
    "guidance ignored": Fault(ignored_guidance, "guidance", says="guidance 4", settings=GUIDED),
    "negative prompt ignored": Fault(
        ignored_negative_prompt, "guidance", says="as an empty one", settings=GUIDED
    ),
    "negative prompt without guidance": Fault(
        nothing, "guidance", says="without", settings={"model__negative_prompt": "blurry"}
    ),
    "guidance below 1": Fault(nothing, "guidance", settings={"model__guidance": 0.5}),
    "timestep that is late": Fault(late_timestep, "stock", says="latents"),
    "turned sign": Fault(turned_sign, "stock", says="latents"),
    "another formula of guidance": Fault(
        wrong_guidance_formula, "stock", says="latents", settings=GUIDED
    ),
    "wrong scaling factor": Fault(wrong_scaling_factor, "stock", says="decoded"),
    "dropout left on": Fault(dropout, "modes", says="dropout"),
    "training mode is another": Fault(other_training_mode, "modes", says="with gradients"),
    "network that is not finite": Fault(endless_network, "modes", says="inf"),
    "coarse densities in training": Fault(coarse_densities, "ratio_one", says="log-ratios"),
    "another step in training": Fault(other_step_in_training, "ratio_one", says="log-ratios"),
    "clip as small as rounding": Fault(
        rounded_densities, "ratio_one", "warning", "of the clip range",
        {"objective__trust": {"kind": "clip", "low": 4e-6, "high": 4e-6}},
    ),
    "detached KL": Fault(detached_kl, "kl_gradient", says="norm 0.00e+00"),
    "weights swapped within an open autocast": Fault(
        stale_casts, "kl_gradient", says="worked out apart",
        settings={**FULL, "model__precision": "bf16"},
    ),
    "reference that follows": Fault(following_reference, "reference", says="the reference's by"),
    "reference that is not the base": Fault(
        other_base, "reference", says="before any update", settings=FULL
    ),
    "reference that stays": Fault(reference_that_stays, "reference", says="moves by 0.0e+00"),
    "gradient of a frozen weight": Fault(strange_gradient, "gradients", says="not trained"),
    "trained weight without gradient": Fault(
        detached_weight, "gradients", says="to_q.lora_B.default.weight, on which"
    ),
    "loss that is detached": Fault(detached_loss, "gradients", says="reaches 0 of"),
    "optimizer of other weights": Fault(other_optimizer, "gradients", says="optimizer"),
    "average of other weights": Fault(other_average, "gradients", says="averaged"),
    "constant reward": Fault(
        nothing, "rewards", says="one score", settings={"rewards": [{"name": "examined:constant"}]}
    ),
    "reward that is always 0": Fault(
        nothing, "rewards", "warning", settings={"rewards": [{"name": "examined:never"}]}
    ),
    "reward that is NaN": Fault(
        nothing, "rewards", says="nan", settings={"rewards": [{"name": "examined:not_a_number"}]}
    ),
    "reward that raises": Fault(
        nothing, "rewards", says="no such model", settings=BROKEN
    ),
    "server that is gone": Fault(dead_server, "rewards", says="does not answer"),
    "reward that drowns another": Fault(
        nothing, "rewards", "warning", "drowned: dark",
        {"rewards": [{"name": "examined:dark"}, {"name": "examined:loud"}]},
    ),
    "full disk": Fault(full_disk, "resources", says="are free"),
    "read-only folder": Fault(read_only, "resources", says="Read-only"),
    "little memory": Fault(little_memory, "resources", "warning", "GiB"),
    "held-out prompts trained on": Fault(leak, "prompts", "warning", "1 of 3 held-out"),
    "prompts that are cut": Fault(long_prompts, "prompts", "warning", "1 of 7 prompts are longer"),
    "quotation that is left open": Fault(
        open_quotation, "prompts", "warning", "1 of 2 prompts leave a quotation open; of 'a sign"
    ),
    "prompts that stand twice": Fault(twice, "prompts", "warning", "4 more are repetitions"),
}  # fmt: skip
