# SPDX-License-Identifier: Apache-2.0
"""From a model folder or hub id to the policy of its family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkgrpo.core.names import unknown_name
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.embeddings import text_encoder_names
from chunkgrpo.policies.pipeline import GenerationOptions, PipelinePolicy
from chunkgrpo.policies.quiet import quiet_diffusers
from chunkgrpo.runtime.finite import check_finite
from chunkgrpo.runtime.sources import local_path

FAMILIES = {
    "StableDiffusion3Pipeline": ("chunkgrpo.policies.sd3", "StableDiffusion3Policy"),
    "FluxPipeline": ("chunkgrpo.policies.flux", "FluxPolicy"),
    "QwenImagePipeline": ("chunkgrpo.policies.qwen_image", "QwenImagePolicy"),
    "ZImagePipeline": ("chunkgrpo.policies.z_image", "ZImagePolicy"),
    "Lumina2Pipeline": ("chunkgrpo.policies.lumina2", "Lumina2Policy"),
    "SanaPipeline": ("chunkgrpo.policies.sana", "SanaPolicy"),
    "Flux2KleinPipeline": ("chunkgrpo.policies.flux2", "Flux2KleinPolicy"),
    "Flux2Pipeline": ("chunkgrpo.policies.flux2", "Flux2Policy"),
}
"""Pipeline class -> (module, class) of its policy."""
LIBRARIES = ("diffusers", "transformers")
GENERAL = {"generation", "precision", "gradient_checkpointing", "execution", "device"}
"""Options of every policy that settings of their own stand for."""


def load_policy(
    model: str | Path,
    adaptation: Adaptation | None = None,
    device: str = "cpu",
    lora: Path | None = None,
    embedding_cache: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> PipelinePolicy:
    """Load a diffusers pipeline as a policy.

    Args:
        model: Folder written by ``save_pretrained``, or a hub id.
        adaptation: Which weights are trained.
        device: Where it runs.
        lora: Folder of a trained LoRA to fuse into the weights.
        embedding_cache: Folder of encoded prompts. Text encoders are then loaded only when
            a prompt is missing there.
        weights: Of the transformer, by name; they replace those of the model.
        options: Options of :meth:`PipelinePolicy.from_options`, and of the family.

    Raises:
        ValueError: If the model is missing, no pipeline, or of an unknown family.
    """
    module, attribute = family(model)
    kind: type[PipelinePolicy] = getattr(import_module(module), attribute)
    settings = {each.name for each in fields(GenerationOptions)} | GENERAL
    check_options(kind, {k: v for k, v in options.items() if k not in settings})
    # In host memory; the policy moves parts to the device in the type they have there.
    pipe = load_pipeline(model, lora, embedding_cache is not None, weights)
    policy = kind.from_options(pipe, adaptation, device=device, **options)
    if embedding_cache is not None:
        policy.use_embeddings(embedding_cache)
    return policy


def own_options(kind: type[PipelinePolicy]) -> dict[str, Any]:
    """Return the options that a family adds to those of every policy, with their defaults."""
    found: dict[str, Any] = {}
    for each in kind.__mro__:
        if issubclass(each, PipelinePolicy) and "__init__" in each.__dict__:
            parameters = signature(each.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    return {name: default for name, default in found.items() if name not in GENERAL}


def check_options(kind: type[PipelinePolicy], options: Mapping[str, Any]) -> None:
    """Refuse options that a family does not have, or whose value is of another type.

    Args:
        kind: The family's class.
        options: Of ``model.options``.

    Raises:
        ValueError: With the option, and those that there are.
    """
    known = own_options(kind)
    for name, value in options.items():
        if name not in known:
            raise ValueError(unknown_name(f"option of {kind.__name__}", name, known))
        default = known[name]
        wanted = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (
            not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ValueError(
                f"model.options.{name} = {value!r} must be of type {type(default).__name__}, as "
                f"its default {default!r} is"
            )


def family(model: str | Path) -> tuple[str, str]:
    """Return the module and class of a model's policy.

    Raises:
        ValueError: If the model is missing, no pipeline, or of an unknown family.
    """
    name = pipeline_class_name(model)
    if name not in FAMILIES:
        raise ValueError(
            f"{model} is a {name}, which has no policy yet; known: {', '.join(FAMILIES)}; "
            "docs/models.md says how to add one"
        )
    return FAMILIES[name]


def pipeline_class_name(model: str | Path) -> str:
    """Read a model folder's pipeline class.

    Raises:
        ValueError: If the folder is missing or holds no diffusers pipeline.
    """
    path = model_folder(model)
    if path is None:
        from diffusers import DiffusionPipeline

        try:
            config: Any = DiffusionPipeline.load_config(str(model))
            return str(config["_class_name"])
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{model} is neither a folder nor a pipeline on the hub: {reason}"
            ) from error
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{model} is no diffusers pipeline: it has no model_index.json; "
            "point to the folder that save_pretrained wrote"
        )
    return str(json.loads(index.read_text())["_class_name"])


def model_folder(model: str | Path) -> Path | None:
    """Return a model's folder; None for a hub id.

    Raises:
        ValueError: If the name can only be a path, and nothing is there.
    """
    try:
        return local_path(model)
    except FileNotFoundError as error:
        raise ValueError(f"model folder {error}; give a folder or a hub id owner/name") from None


def check_components(model: str | Path, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline whose parts name code that is neither of diffusers nor of transformers.

    Former versions of diffusers import whatever module its ``model_index.json`` names, so that a
    model of someone else could choose what runs; newer ones take any that is imported already.

    Raises:
        ValueError: With the part and what it names.
    """
    for part, value in index.items():
        named = value[0] if isinstance(value, list | tuple) and value else None
        if named is not None and named not in LIBRARIES:
            raise ValueError(
                f"model {model}: its model_index.json takes {part} from {named!r}; only parts of "
                f"{' and '.join(LIBRARIES)} are loaded, as a model must not choose code to run"
            )


def load_pipeline(
    model: str | Path,
    lora: str | Path | None = None,
    without_text: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """Load a pipeline in float32.

    Args:
        model: Folder or hub id.
        lora: Folder of a trained LoRA to fuse into the weights.
        without_text: Leave the text encoders out.
        weights: Of the transformer, by name; they replace those of the model.

    Raises:
        ValueError: If a weight has another name or shape than the transformer's, or a part of the
            model would be code of another library.
    """
    from diffusers import DiffusionPipeline

    index: Any = DiffusionPipeline.load_config(str(model))
    check_components(model, index)
    absent = dict.fromkeys(text_encoder_names(index)) if without_text else {}
    with quiet_diffusers():
        pipe = DiffusionPipeline.from_pretrained(str(model), **absent)
        if lora is not None:
            pipe.load_lora_weights(str(lora))
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    replace_weights(pipe.transformer, weights or {})
    return pipe


@torch.no_grad()
def replace_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a network, by name.

    Raises:
        ValueError: If one has another name or shape than the network's; nothing has changed then.
    """
    own = dict(network.named_parameters())
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            shape = tuple(own[name].shape) if name in own else "none"
            raise ValueError(
                f"the model has no weight {name} of shape {tuple(value.shape)} (its own: {shape}); "
                "was it trained from another model?"
            )
    for name, value in weights.items():
        own[name].copy_(value)


def export_fused(
    model: str | Path,
    lora: str | Path | None,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Fuse a trained LoRA into its base model and write a whole pipeline.

    ``DiffusionPipeline.from_pretrained(folder)`` loads it, without peft.

    Args:
        model: The base model, as in :func:`load_policy`.
        lora: Folder that :meth:`PipelinePolicy.save` wrote; None writes the model as it is.
        folder: Where the pipeline is written.
        dtype: Type of the written weights; they are fused in float32.
        weights: Of the transformer, by name; they replace those of the model.

    Raises:
        ValueError: If the model is missing, no pipeline, or of an unknown family.
        NonFiniteError: If a weight is not finite; nothing is written then.
    """
    family(model)
    pipe = load_pipeline(model, lora, weights=weights).to(dtype)
    check_finite("weights", dict(pipe.transformer.named_parameters()))
    with quiet_diffusers():
        pipe.save_pretrained(str(folder))
