# SPDX-License-Identifier: Apache-2.0
"""Sample pipelines with stock diffusers alone: imported by tests, or run in a fresh process."""

import json
import sys
from typing import Any

import torch
from torch import Tensor


def sample(
    pipe: Any, prompts: list[str], noise: Tensor | None, arguments: dict
) -> tuple[Tensor, Tensor]:
    """Call a pipeline as its users do; return the loop's last latents, and images.

    Without noise it draws its own, from ``generator`` among the arguments.

    The latents are those that ``output_type="latent"`` returns, except for FLUX.2 klein, which
    returns them in the VAE's scale. One call yields both.
    """
    seen = {}

    def keep(_pipe, _step, _time, tensors):
        seen.update(tensors)
        return {}

    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt=list(prompts),  # Z-Image writes into the caller's list
        latents=None if noise is None else noise.clone(),
        output_type="pt",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
        **arguments,
    ).images
    return seen["latents"], images


def main() -> None:
    """Work off a list of jobs; nothing of this project is imported."""
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        pipe = DiffusionPipeline.from_pretrained(job["base"])
        if job["lora"]:
            pipe.load_lora_weights(job["lora"])
        answer = sample(pipe, job["prompts"], torch.load(job["noise"]), job["arguments"])
        torch.save(answer, job["answer"])
    assert "chunkgrpo" not in sys.modules


if __name__ == "__main__":
    main()
