# SPDX-License-Identifier: Apache-2.0
"""Which image people prefer for a prompt, by ImageReward: BLIP with a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.rewards.aesthetic import linear_chain
from chunkgrpo.rewards.images import check_batch
from chunkgrpo.rewards.loading import (
    dtype_of,
    fill,
    fix_attention,
    freeze,
    load,
    place,
    state_dict,
)
from chunkgrpo.rewards.preprocess import Preprocess

# The published model's own: the mean and deviation of its raw scores, the longest text it reads,
# and how it prepares images.
RAW_MEAN, RAW_STD = 0.16717362830052426, 1.0333394966054072
TEXT_TOKENS = 35
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of every attention head, in BERT and in the vision transformers alike

VISION = "blip.visual_encoder."
TEXT = "blip.text_encoder."
HEAD = "mlp.layers."
VISION_OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
VISION_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def blip_vision_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of BLIP's published vision transformer into transformers' names.

    Args:
        tensors: The tensors below ``blip.visual_encoder.``, without that prefix.

    Raises:
        ValueError: If a name is not one of such a model.
    """
    converted = {}
    for name, tensor in tensors.items():
        if name in VISION_OUTSIDE_BLOCKS:
            converted[VISION_OUTSIDE_BLOCKS[name]] = tensor
            continue
        parts = name.split(".")
        part, kind = ".".join(parts[2:-1]), parts[-1]
        if parts[0] != "blocks" or part not in VISION_BLOCK:
            raise ValueError(f"{name!r} is not a weight of BLIP's vision transformer")
        converted[f"encoder.layers.{parts[1]}.{VISION_BLOCK[part]}.{kind}"] = tensor
    return converted


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def build_vision(reward: str, tensors: Mapping[str, Tensor]) -> Any:
    """Build BLIP's vision transformer; its sizes follow from the weights.

    Args:
        reward: The reward's name, for messages.
        tensors: The tensors below ``blip.visual_encoder.``, without that prefix.

    Raises:
        ValueError: If the weights do not fit.
    """
    from transformers import BlipVisionConfig, BlipVisionModel

    patch = tensors["patch_embed.proj.weight"]
    width, patch_size = int(patch.shape[0]), int(patch.shape[-1])
    positions = int(tensors["pos_embed"].shape[1]) - 1
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=int(tensors["blocks.0.mlp.fc1.weight"].shape[0]),
        num_hidden_layers=_num_layers(tensors, "blocks."),
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        image_size=round(positions**0.5) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,  # what it was trained with; transformers' default differs
    )
    model = BlipVisionModel(config)
    fill(reward, model, blip_vision_weights(tensors))
    return model


def build_text(reward: str, tensors: Mapping[str, Tensor], vision_width: int) -> Any:
    """Build BLIP's text encoder, which attends to the image; its sizes follow from the weights.

    Args:
        reward: The reward's name, for messages.
        tensors: The tensors below ``blip.text_encoder.``, without that prefix.
        vision_width: Width of the vision transformer's states.

    Raises:
        ValueError: If the weights do not fit.
    """
    from transformers import BlipTextConfig, BlipTextModel

    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=int(vocabulary),
        hidden_size=int(width),
        encoder_hidden_size=vision_width,
        intermediate_size=int(tensors["encoder.layer.0.intermediate.dense.weight"].shape[0]),
        num_hidden_layers=_num_layers(tensors, "encoder.layer."),
        num_attention_heads=max(int(width) // HEAD_WIDTH, 1),
        max_position_embeddings=int(tensors["embeddings.position_embeddings.weight"].shape[0]),
        is_decoder=True,  # gives each layer the attention to the image
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    known = set(model.state_dict())
    # Positions 0, 1, 2, ... are stored in older files and computed in newer classes.
    stored = {k: t for k, t in tensors.items() if k in known or not k.endswith("position_ids")}
    fill(reward, model, stored)
    return model


def _num_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of layers whose names begin with ``prefix`` and a number."""
    numbers = {n[len(prefix) :].split(".")[0] for n in tensors if n.startswith(prefix)}
    return len(numbers)


class ImageRewardReward:
    r"""ImageReward: BLIP reads prompt and image together, a linear head scores its first token.

    .. math:: r = (h(BLIP(image, prompt)) - 0.167) / 1.033

    Scores are about -2.3 to 2, mean 0 on its training data. The published file is read into
    transformers' BLIP classes; their sizes follow from the weights. Prompts are cut to 35 tokens.

    Args:
        weights: Published weights: a file, or ``owner/repository:file`` on the hub.
        tokenizer: Folder or hub id of BERT's uncased tokenizer.
        use_package: Score with the ``image-reward`` package instead, which needs torchvision and
            an older transformers; ``weights`` is then the name or path its ``load`` takes.
        precision: ``"fp32"`` or ``"bf16"``; the head stays in float32.
        device: Where to compute; None follows the images.
        batch_size: Images at once.
        name: What metrics are filed under.

    Raises:
        ImportError: If ``use_package`` is set and the package is not installed or does not import.
        OSError: If something cannot be loaded.
        ValueError: If an option is out of its range or the weights do not fit.

    Reference: ImageReward, arXiv:2304.05977, section 3.
    """

    def __init__(
        self,
        weights: str = "THUDM/ImageReward:ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        use_package: bool = False,
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 16,
        name: str = "image_reward",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        self.name, self.device, self.batch_size = name, device, batch_size
        self.package = None
        if use_package:
            self.package = self._load_package(weights)
            return
        from transformers import AutoTokenizer

        tensors = state_dict(name, weights)
        vision_in, text_in = below(tensors, VISION), below(tensors, TEXT)
        if not vision_in or not text_in:
            raise ValueError(
                f"reward {name!r}: {weights} has no tensors below {VISION} and {TEXT} but "
                f"{sorted(tensors)[:3]}; is this the file of another model?"
            )
        self.tokenizer = load(name, tokenizer, AutoTokenizer.from_pretrained)
        self.vision = build_vision(name, vision_in)
        self.text = build_text(name, text_in, self.vision.config.hidden_size)
        self.head = linear_chain(name, tensors, HEAD)
        dtype = dtype_of(precision)
        self.vision.to(dtype)
        self.text.to(dtype)
        for part in (self.vision, self.text):
            fix_attention(part)
        for part in (self.vision, self.text, self.head):
            freeze(part)
        side = self.vision.config.image_size
        self.preprocess = Preprocess(CLIP_MEAN, CLIP_STD, shortest_edge=side, crop=(side, side))

    def _load_package(self, weights: str) -> object:
        try:
            import ImageReward  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(
                f"reward {self.name!r} was asked to use the image-reward package, which does not "
                f"import ({error}); leave use_package off, or install it with: "
                "pip install 'chunkgrpo[image-reward]' torchvision"
            ) from error
        name = "ImageReward-v1.0" if weights == "THUDM/ImageReward:ImageReward.pt" else weights
        return ImageReward.load(name, device=self.device or "cpu")

    def _score_by_package(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import tempfile
        from pathlib import Path

        from PIL import Image

        from chunkgrpo.rewards.images import byte_images

        scores = []
        with tempfile.TemporaryDirectory() as folder:  # its interface takes paths
            for i, (array, prompt) in enumerate(zip(byte_images(images), prompts)):
                path = str(Path(folder) / f"{i}.png")
                Image.fromarray(array).save(path)
                scores.append(float(self.package.score(prompt, path)))  # type: ignore[attr-defined]
        return torch.tensor(scores)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        check_batch(images, prompts)
        if self.package is not None:
            return self._score_by_package(images, prompts)
        device = place(self.vision, self.device, images)
        self.text.to(device)
        self.head.to(device)
        scores = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pixels = self.preprocess(images[rows].to(device)).to(self.vision.dtype)
            seen = self.vision(pixel_values=pixels).last_hidden_state
            tokens = self.tokenizer(
                list(prompts[rows]),
                padding="max_length",
                truncation=True,
                max_length=TEXT_TOKENS,
                return_tensors="pt",
            ).to(device)
            read = self.text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
            ).last_hidden_state
            raw = self.head(read[:, 0].float()).squeeze(-1)
            scores.append((raw - RAW_MEAN) / RAW_STD)
        return torch.cat(scores).float().cpu()
