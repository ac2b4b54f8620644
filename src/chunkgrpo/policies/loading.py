# SPDX-License-Identifier: Apache-2.0
"""From a model folder or hub id to the policy of its family."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from chunkgrpo.policies.embeddings import text_encoder_names
from chunkgrpo.policies.pipeline import (
    Adaptation,
    PipelinePolicy,
    pipeline_class_name,
    quiet_diffusers,
)

FAMILIES = {
    "StableDiffusion3Pipeline": ("chunkgrpo.policies.sd3", "StableDiffusion3Policy"),
}


def load_policy(
    model: str | Path,
    adaptation: Adaptation | None = None,
    device: str = "cpu",
    lora: Path | None = None,
    embedding_cache: Path | None = None,
    **options: Any,
) -> PipelinePolicy:
    """Load a diffusers pipeline as a policy.

    Args:
        model: Folder written by ``save_pretrained``, or a hub id.
        adaptation: Which weights are trained.
        device: Where it runs.
        lora: Folder of a trained LoRA to fuse into the weights.
        embedding_cache: Folder of encoded prompts. Text encoders are then not loaded before a
            prompt that is missing there.
        options: Passed to :class:`PipelinePolicy`.

    Raises:
        ValueError: If the model is missing, no pipeline, or of an unknown family.
    """
    name = pipeline_class_name(model)
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{model} is a {name}, which has no policy yet; known: {known}")
    from diffusers import DiffusionPipeline

    module, attribute = FAMILIES[name]
    absent: dict[str, Any] = {}
    if embedding_cache is not None:
        index: Any = DiffusionPipeline.load_config(str(model))
        absent = dict.fromkeys(text_encoder_names(index))
    with quiet_diffusers():
        pipe = DiffusionPipeline.from_pretrained(str(model), **absent).to(device)
        if lora is not None:
            pipe.load_lora_weights(str(lora))
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    policy = getattr(import_module(module), attribute)(pipe, adaptation, **options)
    if embedding_cache is not None:
        policy.use_embeddings(embedding_cache)
    return policy
