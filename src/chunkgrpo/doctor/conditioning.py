# SPDX-License-Identifier: Apache-2.0
"""Whether images are those of the model's own pipeline: prompts, guidance, sampling, decoding.

Axis names: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from chunkgrpo.core.sde import OdeDiffusion, Transition
from chunkgrpo.doctor.findings import Measured, failure, judged, ok, skipped, warning
from chunkgrpo.doctor.patient import Patient
from chunkgrpo.doctor.ratios import larger, relative
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.policies.quiet import quiet_diffusers
from chunkgrpo.policies.stock import stock_sample
from chunkgrpo.rollout import Sampler
from chunkgrpo.types import Conditioning, Prompt

GRID = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Noise levels of the comparison: whole thousandths, which no rounding of the timestep changes."""

FEWEST = 2  # prompts that the stock pipeline samples


# --- prompts ------------------------------------------------------------------------------------


def encoding(patient: Patient) -> Iterator[Measured]:
    """Compare the rows that samples are conditioned on with their prompts, encoded alone."""
    trajectory, prompts = patient.trial, patient.prompts
    own = [patient.policy.encode([prompt]) for prompt in prompts]
    held = trajectory.conditioning
    wrong = [i for i, row in enumerate(own) if not alike(row, held[i : i + 1])]
    yield judged(
        len(held) == len(prompts) and not wrong,
        f"{len(prompts)} prompts, {len(wrong)} with another row than when encoded alone"
        + (f", such as {prompts[wrong[0]].text!r:.80}" if wrong else ""),
        "none",
        "rows of the conditioning are permuted or mixed: return them in the order of the prompts",
    )
    size = trajectory.group_size
    misplaced = [
        b
        for b in range(trajectory.num_samples)
        if not alike(own[b // size], trajectory.conditioning_of(slice(b, b + 1)))
    ]
    if misplaced and not wrong:
        yield failure(
            f"{len(misplaced)} of {trajectory.num_samples} images are trained on the prompt of "
            "another one",
            "none",
            "samples are prompt-major: the prompt of sample b is b // group_size",
        )
    yield from effect_of_prompts(patient, own)


def alike(first: Conditioning, second: Conditioning) -> bool:
    """Whether two rows are equal but for padding."""
    for name, one in first.tensors.items():
        other = second.tensors[name]
        if one.ndim > 1 and one.shape[1:] != other.shape[1:]:
            length = min(one.shape[1], other.shape[1])
            if bool(one[:, length:].any()) or bool(other[:, length:].any()):
                return False
            one, other = one[:, :length], other[:, :length]
        if not torch.equal(one, other):
            return False
    return True


def effect_of_prompts(patient: Patient, own: list[Conditioning]) -> Iterator[Measured]:
    """Check that another prompt gives another velocity."""
    if len(own) < 2 or patient.pipeline is None:
        return
    if any(alike(own[0], other) for other in own[1:]):
        yield warning(
            f"the prompt {patient.prompts[0].text!r:.60} is encoded as another one is",
            "different rows for different prompts",
            "the text encoders read no further than where the two differ",
        )
        return
    trajectory = patient.trial
    held = trajectory.conditioning
    x, sigma = trajectory.state(slice(0, 1), 0), trajectory.trained_sigmas[:1]
    with torch.no_grad():
        first, other = (patient.policy.velocity(x, sigma, held[i : i + 1]) for i in (0, 1))
    off = relative(other, first)
    yield judged(
        off > 0,
        f"another prompt changes the prediction by {100 * off:.2g} %",
        "more than 0",
        "the network ignores its texts: look at the family's predict",
    )


# --- guidance -----------------------------------------------------------------------------------


def guidance(patient: Patient) -> Iterator[Measured]:
    """Change guidance and negative prompt a little, and see whether the velocity changes."""
    policy = patient.pipeline
    if policy is None:
        yield skipped("not a pipeline: there is no guidance")
        return
    yield from scale_of_guidance(patient, policy)
    own = [p for p in patient.trainer.prompts if p.negative_prompt]
    if policy.guided:
        yield from effect_of_negatives(patient, policy, own)
    elif policy.negative_prompt or own:
        what = f"model.negative_prompt {policy.negative_prompt!r:.60}"
        if not policy.negative_prompt:
            what = f"the negative prompts of {len(own):,} prompts"
        yield failure(
            f"{what} without classifier-free guidance",
            "guidance wherever a negative prompt is given",
            turn_on(policy) + ", or leave the negative prompt out",
        )


def turn_on(policy: PipelinePolicy) -> str:
    """Say how guidance is turned on."""
    if policy.guided_by is None:
        return "this model has no classifier-free guidance"
    if policy.guided_by == "true_cfg":
        return f"set model.options {{true_cfg: ...}} above {policy.guided_above:g}"
    return f"set model.{policy.guided_by} above {policy.guided_above:g}"


def scale_of_guidance(patient: Patient, policy: PipelinePolicy) -> Iterator[Measured]:
    """Check that guidance scales that were given have an effect."""
    given = {"guidance": policy.guidance}
    if "true_cfg" in vars(policy):
        given["true_cfg"] = vars(policy)["true_cfg"]
    for name, value in given.items():
        if value in (0.0, 1.0):
            yield ok(f"{name} {value:g}, which asks for nothing")
            continue
        off = change_of_velocity(patient, policy, name, 0.9 * value)
        shown = f"{name} {value:g}: a tenth less changes the prediction by {100 * off:.2g} %"
        if off > 0:
            yield ok(shown, "more than 0")
        elif value > policy.guided_above and not policy.guided and name == "guidance":
            yield warning(
                shown, "more than 0", "this model is distilled and has no guidance: leave it out"
            )
        else:
            yield failure(shown, "more than 0", turn_on(policy) + ", or set it to 1")


def change_of_velocity(
    patient: Patient, policy: PipelinePolicy, attribute: str, value: float
) -> float:
    """Return the relative change of the velocity when a scale of guidance changes."""
    trajectory, former = patient.trial, getattr(policy, attribute)
    middle = trajectory.num_trained // 2
    rows = slice(0, min(2, trajectory.num_samples))
    x, texts = trajectory.state(rows, middle), trajectory.conditioning_of(rows)
    sigma = trajectory.trained_sigmas[middle].expand(len(x))
    guided = policy.guided
    with torch.no_grad():
        before = policy.velocity(x, sigma, texts)
        try:
            setattr(policy, attribute, value)
            # Below the threshold there is no unconditional half any more: that is an effect.
            after = policy.velocity(x, sigma, texts) if policy.guided == guided else 2 * before
        finally:
            setattr(policy, attribute, former)
    return relative(after, before)


def effect_of_negatives(
    patient: Patient, policy: PipelinePolicy, own: list[Prompt]
) -> Iterator[Measured]:
    """Check that negative prompts reach the unconditional half, and that it is used."""
    trajectory = patient.trial
    row = trajectory.conditioning[0:1]
    x = trajectory.state(slice(0, 1), trajectory.num_trained // 2)
    sigma = trajectory.trained_sigmas[trajectory.num_trained // 2][None]
    negatives = [n for n in row.tensors if n.startswith("negative_")]
    if not negatives:
        yield failure(
            "guidance is on, and there is nothing encoded for its unconditional half",
            "rows named negative_...",
            "encode_texts must encode the negative prompts too",
        )
        return
    shown = [each for each in negatives if row.tensors[each].is_floating_point()]
    zeros = {name: torch.zeros_like(row.tensors[name]) for name in shown}
    with torch.no_grad():
        before = policy.velocity(x, sigma, row)
        after = policy.velocity(x, sigma, Conditioning({**row.tensors, **zeros}))
    off = relative(after, before)
    yield judged(
        off > 0,
        f"without the unconditional half's texts the prediction changes by {100 * off:.2g} %",
        "more than 0",
        "the negative half of guidance does not get its texts",
    )
    first = own[0].negative_prompt if own else policy.negative_prompt
    if not first:
        return
    if not policy.has_text_encoders:
        yield skipped("the text encoders are not loaded: whether the negative prompt is read")
        return
    text = patient.prompts[0].text
    pair = [Prompt(text, negative_prompt=n) for n in (first, "")]
    one, other = (encoded_apart(policy, each) for each in pair)
    differs = any(not torch.equal(one.tensors[n], other.tensors[n]) for n in negatives)
    yield judged(
        differs,
        f"the negative prompt {first!r:.60} is encoded "
        + ("differently from an empty one" if differs else "as an empty one"),
        "differently",
        "encode_texts must use its negative prompts",
    )


def encoded_apart(policy: PipelinePolicy, prompt: Prompt) -> Conditioning:
    """Encode a prompt without keeping its row."""
    negative = policy.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
    with torch.no_grad(), quiet_diffusers(), policy.visiting("text_encoders"):
        return policy.encode_texts([prompt.text], [negative])


# --- the stock pipeline -------------------------------------------------------------------------


def stock(patient: Patient) -> Iterator[Measured]:
    """Sample without noise, with the policy and with the pipeline's own call; compare."""
    policy = patient.pipeline
    if policy is None:
        yield skipped("not a pipeline: there is no stock sampler")
        return
    if not policy.has_text_encoders:
        yield skipped(
            "the text encoders are not loaded, because all prompts are in model.embedding_cache",
            "set it to null to compare",
        )
        return
    prompts = patient.prompts[:FEWEST]
    sampler = Sampler(Transition(OdeDiffusion()), torch.tensor(GRID))
    trajectory = sampler.rollout(policy, prompts, generator=patient.generator(6))
    latents, images = stock_sample(policy, prompts, trajectory.states[:, 0], torch.tensor(GRID))
    exact = policy.dtype == torch.float32
    bound = 1e-3 if exact else 0.05
    off = relative(trajectory.final, latents.to(trajectory.device))
    yield judged(
        off <= bound,
        f"latents of {len(prompts)} prompts in {len(GRID) - 1} steps without noise differ by "
        f"{100 * off:.2g} %",
        f"at most {100 * bound:g} %",
        "sampling is not that of the pipeline: look at sign, timestep, guidance and texts of the "
        "family's predict and guide",
    )
    decoded = policy.decode(latents.to(policy.device))
    off = colour_distance(decoded, images)
    bound = 2e-3 if exact else 0.03
    yield judged(
        off <= bound,
        f"decoded images differ by {off:.1e} of the range of colours in the mean",
        f"at most {bound:g}",
        "decoding is not that of the pipeline: look at the VAE's scaling factor and shift",
    )


def colour_distance(first: Tensor, second: Tensor) -> float:
    """Return the mean absolute difference; infinity where it is not finite."""
    value = float((first.cpu().float() - second.cpu().float()).abs().mean())
    return larger(value, 0.0) if math.isfinite(value) else math.inf
