# SPDX-License-Identifier: Apache-2.0
"""Calling a policy's own pipeline as its users do, to compare with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.policies.quiet import quiet_diffusers
from chunkgrpo.types import Prompt


def stock_sample(
    policy: PipelinePolicy, prompts: Sequence[Prompt], noise: Tensor, sigmas: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample with the pipeline's own call, in the policy's precision.

    Args:
        policy: The policy; its text encoders must be loaded.
        prompts: B prompts.
        noise: First latents, [B, *latent].
        sigmas: [K+1], the schedule, from 1 to 0.

    Returns:
        Clean latents [B, *latent] and images [B, 3, H, W] in [0, 1].
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe, seen = policy.pipe, {}

    def keep(_pipe: Any, _step: Any, _time: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        seen.update(tensors)
        return {}

    former = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    try:
        with (
            quiet_diffusers(),
            policy.visiting("text_encoders"),
            policy.visiting("vae"),
            in_policys_arithmetic(policy),
        ):
            images = pipe(
                prompt=[each.text for each in prompts],
                latents=stock_noise(policy, noise),
                sigmas=sigmas[:-1].tolist(),
                num_inference_steps=len(sigmas) - 1,
                output_type="pt",
                callback_on_step_end=keep,
                callback_on_step_end_tensor_inputs=["latents"],
                **stock_arguments(policy, prompts),
            ).images
    finally:
        pipe.scheduler = former
    return seen["latents"].float(), images.float()


def stock_noise(policy: PipelinePolicy, noise: Tensor) -> Tensor:
    """Return first latents as the pipeline takes them: those of FLUX.2 are not packed yet."""
    if not type(policy.pipe).__name__.startswith("Flux2"):
        return noise.clone()
    height, width = (side // policy.size_step for side in policy.size)
    return noise.transpose(1, 2).reshape(len(noise), -1, height, width).clone()


def stock_arguments(policy: PipelinePolicy, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that say what the policy's settings say."""
    taken = inspect.signature(type(policy.pipe).__call__).parameters
    found: dict[str, Any] = {
        "height": policy.size[0],
        "width": policy.size[1],
        "max_sequence_length": policy.max_sequence_length,
        "guidance_scale": policy.guidance,
        "use_resolution_binning": False,
    }
    if "true_cfg_scale" in taken:
        found["true_cfg_scale"] = policy.cfg_scale
        if policy.guided_by == "guidance":  # its other scale is for a model that embeds it
            del found["guidance_scale"]
    if policy.guided:
        own = [each.negative_prompt for each in prompts]
        found["negative_prompt"] = [policy.negative_prompt if n is None else n for n in own]
    options = vars(policy)
    for argument, attribute in (
        ("system_prompt", "system_prompt"),
        ("cfg_normalization", "cfg_normalization"),
        ("text_encoder_out_layers", "layers"),
    ):
        if attribute in options:
            found[argument] = options[attribute]
    if options.get("instruction") is False:
        found["complex_human_instruction"] = None
    return {name: value for name, value in found.items() if name in taken}


@contextmanager
def in_policys_arithmetic(policy: PipelinePolicy) -> Iterator[None]:
    """Let the pipeline call its network as the policy does: the same kernels and casts."""
    transformer, vae = policy.pipe.transformer, policy.pipe.vae
    forward, decode = transformer.forward, vae.decode
    inside = False

    def wide(value: Any) -> Any:
        return [row.float() for row in value] if isinstance(value, list) else value.float()

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # the policy's own call of the network
            return forward(*args, **kwargs)
        bound = inspect.signature(forward).bind(*args, **kwargs).arguments
        bound |= bound.pop("kwargs", {})
        bound.pop("return_dict", None)
        inside = True
        try:
            with policy.arithmetic():
                if policy.pure:
                    return (wide(policy.network(**bound)),)
                return (wide(forward(**bound, return_dict=False)[0]),)
        finally:
            inside = False

    # Pipelines sample in the type of some weight of the network, which need not be the VAE's.
    def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(z.to(vae.dtype), *args, **kwargs)

    transformer.forward, vae.decode = called, decoded
    try:
        with torch.no_grad():
            yield
    finally:
        del transformer.forward, vae.decode
