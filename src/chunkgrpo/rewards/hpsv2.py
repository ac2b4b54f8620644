# SPDX-License-Identifier: Apache-2.0
"""Which image people prefer for a prompt, by HPSv2; and open_clip's weights as a ``CLIPModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.rewards.clip_features import DualEncoder
from chunkgrpo.rewards.loading import dtype_of, fill, load, state_dict

BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE_BLOCKS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    # The misspelling is the name in transformers.
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {
    "text_projection": "text_projection.weight",  # open_clip multiplies from the other side
    "visual.proj": "visual_projection.weight",
}
NOT_WEIGHTS = {"attn_mask", "text.attn_mask"}


def clip_from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and cut the weights of an open_clip model into those of a ``CLIPModel``.

    Exact: no number changes. open_clip keeps queries, keys and values of a layer in one matrix
    and its projections transposed; everything else differs by name alone. Holds for vision
    transformers with a class token (HPSv2, PickScore's and DFN's ViT-H, LAION's); the activation
    is no weight, so take it from the configuration that goes with the checkpoint.

    Args:
        tensors: open_clip's ``state_dict``, text tower at the top level or below ``text.``.

    Raises:
        ValueError: If a name is not one of such a model.
    """
    converted: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        if full in NOT_WEIGHTS:
            continue
        name = full.removeprefix("text.")
        if name in OUTSIDE_BLOCKS:
            # Some files store this scalar as one row.
            converted[OUTSIDE_BLOCKS[name]] = tensor.reshape(()) if tensor.numel() == 1 else tensor
        elif name in TRANSPOSED:
            converted[TRANSPOSED[name]] = tensor.t().contiguous()
        else:
            converted.update(_block_tensor(full, name, tensor))
    return converted


def _block_tensor(full: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Convert one tensor of a transformer block."""
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    inner = name.removeprefix("visual.").split(".", 3)
    if inner[:2] != ["transformer", "resblocks"] or len(inner) != 4:
        raise ValueError(
            f"{full!r} is not a weight of an open_clip vision transformer with a text "
            "transformer; only such models convert to CLIPModel"
        )
    layer = f"{tower}.encoder.layers.{inner[2]}"
    part = inner[3]
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        return {
            f"{layer}.self_attn.{letter}_proj.{kind}": third.contiguous()
            for letter, third in zip("qkv", tensor.chunk(3))
        }
    where, _, kind = part.rpartition(".")
    if where not in BLOCK:
        raise ValueError(f"{full!r} is not a weight of an open_clip transformer block")
    return {f"{layer}.{BLOCK[where]}.{kind}": tensor}


class HpsV2Reward:
    """Cosine of HPSv2's embeddings, a CLIP-H trained on people's rankings of images.

    Scores are about 0.2 to 0.3. The published checkpoint is in open_clip's format and is
    converted exactly (:func:`clip_from_open_clip`). Images are prepared as HPSv2 does: scaled until
    the longer side fits the model, and padded with black to a square. Nothing is cut off, where
    CLIP-H's own image processor would crop to the centre.

    Args:
        weights: open_clip ``state_dict``: a file, or ``owner/repository:file`` on the hub.
        model: Folder or hub id with the configuration, tokenizer and image processor of the
            same CLIP in transformers' format; its weights are not read.
        precision: ``"fp32"`` or ``"bf16"``.
        device: Where to compute; None follows the images.
        batch_size: Images embedded at once.
        name: What metrics are filed under.

    Raises:
        OSError: If something cannot be loaded.
        ValueError: If an option is out of its range or the weights do not fit.

    Reference: HPSv2, arXiv:2306.09341, section 4.
    """

    def __init__(
        self,
        weights: str = "xswu/HPSv2:HPS_v2.1_compressed.pt",
        model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 32,
        name: str = "hpsv2",
    ) -> None:
        from transformers import CLIPConfig, CLIPModel

        self.name = name
        converted = clip_from_open_clip(state_dict(name, weights))
        network: Any = CLIPModel(load(name, model, CLIPConfig.from_pretrained))
        fill(name, network, converted)
        network.to(dtype_of(precision))
        self.encoder = DualEncoder(name, network, model, device, batch_size)
        side = int(network.config.vision_config.image_size)
        self.encoder.preprocess = self.encoder.preprocess.padded_to(side)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        return self.encoder.cosines(images, prompts)
