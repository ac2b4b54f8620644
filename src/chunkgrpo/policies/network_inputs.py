# SPDX-License-Identifier: Apache-2.0
"""Inputs of the transformer of each family: zeros of the right shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from chunkgrpo.policies.architecture import Architecture

Inputs = dict[str, Any]


def _sd3(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    # Both CLIPs fill their whole length, and T5's rows follow.
    clip = max((e.get("max_position_embeddings", 0) for _, e in a.text_encoders), default=77)
    return {
        "hidden_states": torch.zeros(rows, c["in_channels"], h, w),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, clip + text, c["joint_attention_dim"]),
        "pooled_projections": torch.zeros(rows, c["pooled_projection_dim"]),
    }


def _flux(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c, tokens = a.transformer, h * w // 4
    return {
        "hidden_states": torch.zeros(rows, tokens, c["in_channels"]),
        "timestep": torch.zeros(rows),
        "guidance": torch.zeros(rows) if c.get("guidance_embeds") else None,
        "pooled_projections": torch.zeros(rows, c["pooled_projection_dim"]),
        "encoder_hidden_states": torch.zeros(rows, text, c["joint_attention_dim"]),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.zeros(tokens, 3),
    }


def _flux2(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c, tokens = a.transformer, h * w // 4
    return {
        "hidden_states": torch.zeros(rows, tokens, c["in_channels"]),
        "timestep": torch.zeros(rows),
        "guidance": torch.zeros(rows) if c.get("guidance_embeds", True) else None,
        "encoder_hidden_states": torch.zeros(rows, text, c["joint_attention_dim"]),
        "txt_ids": torch.zeros(rows, text, 4),
        "img_ids": torch.zeros(rows, tokens, 4),
    }


def _qwen_image(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "hidden_states": torch.zeros(rows, h * w // 4, c["in_channels"]),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, text, c["joint_attention_dim"]),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, h // 2, w // 2)]] * rows,
    }


def _z_image(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "x": [torch.zeros(c["in_channels"], 1, h, w) for _ in range(rows)],
        "t": torch.zeros(rows),
        "cap_feats": [torch.zeros(text, c["cap_feat_dim"]) for _ in range(rows)],
    }


def _sana(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "hidden_states": torch.zeros(rows, c["in_channels"], h, w),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, text, c["caption_channels"]),
        "encoder_attention_mask": torch.ones(rows, text),
    }


def _lumina2(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "hidden_states": torch.zeros(rows, c["in_channels"], h, w),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, text, c["cap_feat_dim"]),
        "encoder_attention_mask": torch.ones(rows, text, dtype=torch.bool),
    }


INPUTS: Mapping[str, Callable[[Architecture, int, int, int, int], Inputs]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "SanaTransformer2DModel": _sana,
    "Lumina2Transformer2DModel": _lumina2,
}
"""Transformer class -> (architecture, rows, latent height and width, text rows) -> its inputs."""

TEXT_ROWS = {"SD3Transformer2DModel": 256, "SanaTransformer2DModel": 300,
             "Lumina2Transformer2DModel": 256}  # fmt: skip
"""Default number of text tokens by pipeline; 512 for the others."""

OF_THE_IMAGE = ("hidden_states", "x", "timestep", "t", "guidance", "img_ids", "img_shapes")
"""Inputs that are not encoded prompts."""

EMBEDDED_GUIDANCE = ("FluxPipeline", "Flux2Pipeline")
"""Pipelines whose guidance is an input of the network and costs no second row."""


def text_rows(architecture: Architecture, wanted: int | None) -> int:
    """Return the maximum number of text tokens per row; shorter prompts can cost less."""
    return wanted or TEXT_ROWS.get(str(architecture.transformer["_class_name"]), 512)


def rows_of_guidance(architecture: Architecture, guidance: float, true_cfg: float = 1.0) -> int:
    """Return the network rows per latent: 2 where classifier-free guidance is on.

    Args:
        architecture: The model.
        guidance: Guidance scale as the pipeline defines it.
        true_cfg: Scale of classifier-free guidance of FLUX.1, whose ``guidance`` is an input of
            the network.
    """
    if architecture.pipeline == "FluxPipeline":
        return 2 if true_cfg > 1 else 1
    if architecture.pipeline in EMBEDDED_GUIDANCE or architecture.distilled:
        return 1
    above = 0.0 if architecture.pipeline == "ZImagePipeline" else 1.0
    return 2 if guidance > above else 1


def network_inputs(
    architecture: Architecture, rows: int, size: tuple[int, int], text: int
) -> Inputs:
    """Return the transformer's inputs, zeros of the right shapes.

    Args:
        architecture: The model.
        rows: Number of network rows.
        size: Height and width of images in pixels.
        text: Text rows.

    Raises:
        ValueError: If the transformer is of an unknown class.
    """
    name = str(architecture.transformer["_class_name"])
    if name not in INPUTS:
        raise ValueError(
            f"how {name} is called is not known; known: {', '.join(INPUTS)}; add it to INPUTS of "
            "policies/network_inputs.py"
        )
    height, width = (side // architecture.vae_factor for side in size)
    return INPUTS[name](architecture, rows, height, width, text)


def conditioning_bytes(architecture: Architecture, text: int, guidance_rows: int = 1) -> int:
    """Return the bytes of an encoded prompt: the transformer's inputs that depend on it.

    Args:
        architecture: The model.
        text: Text rows.
        guidance_rows: 2 with classifier-free guidance, which also needs the negative prompt.
    """
    with torch.device("meta"):
        side = 2 * architecture.vae_factor  # a size that divides; the image does not count
        inputs = network_inputs(architecture, 1, (side, side), text)
    tensors = [
        tensor
        for name, value in inputs.items()
        if name not in OF_THE_IMAGE and value is not None
        for tensor in (value if isinstance(value, list) else [value])
    ]
    return guidance_rows * sum(tensor.nbytes for tensor in tensors)
